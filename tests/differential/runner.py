"""Holds a conversation: directly or through a proxy, which is only a matter of the address."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass

import psycopg

from proxy.wire import build
from proxy.wire.messages import PROTOCOL_3_0
from tests.differential.compare import Normaliser, Said
from tests.differential.conversation import (
    Admin,
    Ask,
    Cancel,
    Connect,
    Conversation,
    HalfClose,
    Raw,
    Send,
    Sleeping,
)
from tests.differential.wireclient import PATIENCE, Address, Connection

#: The schema in which a conversation may make what it likes; the next one finds it empty.
PLAYGROUND = "play"


@dataclass
class Scene:
    """A database with fixed tables, and a superuser's connection to it."""

    address: Address
    user: str
    database: str
    admin: psycopg.Connection

    def startup(self, parameters: dict[str, str] | None = None, version: int = PROTOCOL_3_0) -> bytes:
        """A StartupMessage; `parameters` beyond (or instead of) user and database."""
        return build.startup({"user": self.user, "database": self.database, **(parameters or {})}, version)

    def clear(self) -> None:
        """Empties the playground."""
        self.admin.execute(f"DROP SCHEMA IF EXISTS {PLAYGROUND} CASCADE; CREATE SCHEMA {PLAYGROUND};"
                           f" GRANT ALL ON SCHEMA {PLAYGROUND} TO PUBLIC")


def hold(scene: Scene, conversation: Conversation, *, address: Address | None = None,
         pieces: random.Random | None = None) -> list[Said]:
    """Everything that the server says in this conversation. Raises Stuck where it does not say what is awaited."""
    scene.clear()
    with contextlib.closing(_Run(scene, address or scene.address, pieces)) as run:
        for step in conversation.steps:
            run.take(step)
        return run.said


class _Run:
    def __init__(self, scene: Scene, address: Address, pieces: random.Random | None) -> None:
        self._scene = scene
        self._address = address
        self._pieces = pieces
        self._sessions: dict[str, Connection] = {}
        self._normaliser = Normaliser()
        self.said: list[Said] = []

    def close(self) -> None:
        """Says goodbye wherever somebody still listens, and waits until the backends are gone."""
        pids = []
        for connection in self._sessions.values():
            with contextlib.suppress(OSError):  # it is closed already
                connection.socket.setblocking(True)
                connection.socket.settimeout(PATIENCE)
                connection.socket.sendall(build.terminate())
            connection.close()
            pids.append(connection.pid)
        deadline = time.monotonic() + PATIENCE
        while pids and self._admin("SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s)", pids):
            assert time.monotonic() < deadline, "a session's backend stays"
            time.sleep(0.001)

    def take(self, step: object) -> None:
        match step:
            case Connect(name, parameters, version, until):
                self._open(name)
                self._start(name, self._scene.startup(dict(parameters), version), until)
            case Raw(name, data, until):
                self._open(name)
                self._exchange(name, data, until)
            case Ask(name, data):
                answer = self._open(name).one_byte(data)
                self.said.append(Said(name, "answer", (("byte", answer),)))
                self._start(name, self._scene.startup(), "Z")
            case Send(name, data, until):
                self._exchange(name, data, until)
            case Sleeping(name, event):
                self._await_event(self._sessions[name].pid, event)
            case Cancel(name, key):
                self._cancel(self._sessions[name], key)
            case Admin(sql):
                self._admin(sql.format(**{n: c.pid for n, c in self._sessions.items()}))
            case HalfClose(name):
                self._sessions[name].half_close()
                self._exchange(name, b"", ".")
            case _:
                raise TypeError(step)

    def _open(self, name: str) -> Connection:
        assert name not in self._sessions
        connection = self._sessions[name] = Connection(self._address, self._pieces)
        return connection

    def _start(self, name: str, packet: bytes, until: str) -> None:
        connection = self._sessions[name]
        frames = connection.exchange(packet, until)
        connection.remember_key(frames)
        self._normaliser.sessions[connection.pid] = name
        self.said += (self._normaliser.said(name, frame) for frame in frames)

    def _exchange(self, name: str, data: bytes, until: str) -> None:
        frames = self._sessions[name].exchange(data, until)
        self.said += (self._normaliser.said(name, frame) for frame in frames)

    def _cancel(self, target: Connection, key: bytes | None) -> None:
        connection = Connection(self._address, self._pieces)
        try:
            frames = connection.exchange(build.cancel_request(target.pid, target.key if key is None else key), ".")
            self.said += (self._normaliser.said("cancel", frame) for frame in frames)
        finally:
            connection.close()

    def _admin(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        cursor = self._scene.admin.execute(sql, values or None)
        return cursor.fetchall() if cursor.description else []

    def _await_event(self, pid: int, event: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._admin("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = %s", pid, event):
            assert time.monotonic() < deadline, f"the backend never waits for {event}"
            time.sleep(0.005)
