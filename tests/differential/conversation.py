"""The corpus's vocabulary: a conversation is a name and the steps that one or more sessions take in turn.

Each step names the session that takes it (`A` unless told). `talk` accepts short forms: a text is a Query, bytes are
messages as they stand; both are read up to the ReadyForQuery that they cause.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from proxy.wire import build
from proxy.wire.messages import PROTOCOL_3_0, Frontend


@dataclass(frozen=True)
class Connect:
    """Opens a session. `parameters` beyond user and database; `until` what the startup's replies end with."""

    session: str = "A"
    parameters: Mapping[str, str] = field(default_factory=dict)
    version: int = PROTOCOL_3_0
    until: str = "Z"


@dataclass(frozen=True)
class Raw:
    """Opens a session with these bytes in the place of a startup packet."""

    session: str
    data: bytes
    until: str = "."


@dataclass(frozen=True)
class Ask:
    """Opens a session with a request that is answered by one byte; the startup packet follows."""

    session: str
    data: bytes


@dataclass(frozen=True)
class Send:
    """Sends bytes and reads until `until` (see wireclient.Connection.exchange)."""

    session: str
    data: bytes
    until: str


@dataclass(frozen=True)
class Sleeping:
    """Waits until the session's backend is in the wait event that is named (pg_stat_activity)."""

    session: str
    event: str


@dataclass(frozen=True)
class Cancel:
    """Sends a CancelRequest for the session, and waits until the server has taken it."""

    session: str
    key: bytes | None = None  #: another one than the session's


@dataclass(frozen=True)
class Admin:
    """A statement of a superuser on a connection of its own; `{A}` stands for the process id of session A."""

    sql: str


@dataclass(frozen=True)
class HalfClose:
    """Ends the client's direction and reads to the end of the connection."""

    session: str = "A"


Step = Connect | Raw | Ask | Send | Sleeping | Cancel | Admin | HalfClose


@dataclass(frozen=True)
class Conversation:
    """What is said, by whom, in which order."""

    name: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.name


def ready_count(data: bytes) -> int:
    """How many ReadyForQuery these messages cause where nothing goes wrong with the protocol itself."""
    position = count = 0
    while position + 5 <= len(data):
        type_, length = struct.unpack_from(">BI", data, position)
        count += type_ in (Frontend.QUERY, Frontend.SYNC, Frontend.FUNCTION_CALL)
        position += 1 + length
    return count


def on(session: str, *messages: str | bytes, until: str | None = None) -> Send:
    """A step of one session: texts are Query messages."""
    data = b"".join(build.query(m) if isinstance(m, str) else m for m in messages)
    return Send(session, data, "Z" * ready_count(data) if until is None else until)


def send(*messages: str | bytes, until: str | None = None) -> Send:
    """The same of session A."""
    return on("A", *messages, until=until)


def talk(name: str, *steps: Step | str | bytes, connect: bool = True, **parameters: str) -> Conversation:
    """A conversation; session A is opened first (with startup `parameters`) unless `connect` is False."""
    taken: list[Step] = [Connect("A", parameters)] if connect else []
    taken += [send(step) if isinstance(step, str | bytes) else step for step in steps]
    return Conversation(name, tuple(taken))


def extended(
    sql: str | bytes,
    *values: bytes | None,
    types: Sequence[int] = (),
    formats: Sequence[int] = (),
    results: Sequence[int] = (0,),
    rows: int = 0,
    name: str = "",
    portal: str = "",
    describe: str = "SP",
    end: bytes | None = None,
) -> bytes:
    """Parse, Bind, Describe, Execute and Sync for one statement. `describe` has S (statement), P (portal) or both."""
    parts = [build.parse(name, sql, types)]
    if "S" in describe:
        parts.append(build.describe_statement(name))
    parts.append(build.bind(portal, name, values, formats, results))
    if "P" in describe:
        parts.append(build.describe_portal(portal))
    parts += [build.execute(portal, rows), build.sync() if end is None else end]
    return b"".join(parts)


def function_call(oid: int, *values: bytes | None, formats: Sequence[int] = (1,), result: int = 1) -> bytes:
    """FunctionCall."""
    payload = struct.pack(f">IH{len(formats)}HH", oid, len(formats), *formats, len(values))
    for value in values:
        payload += struct.pack(">i", -1) if value is None else struct.pack(">I", len(value)) + value
    return build.message(Frontend.FUNCTION_CALL, payload + struct.pack(">H", result))


def copy_in(sql: str, *chunks: bytes, fail: str | None = None) -> tuple[Step, Step]:
    """A COPY FROM STDIN by the simple protocol: its two steps."""
    end = build.copy_done() if fail is None else build.copy_fail(fail)
    return send(sql, until="G"), Send("A", b"".join(build.copy_data(c) for c in chunks) + end, "Z")


def int4(value: int) -> bytes:
    """An integer in binary format."""
    return struct.pack(">i", value)


_HEADING = re.compile(r"^## .*\n", re.MULTILINE)


def statements(text: str) -> list[str]:
    """The statements of a corpus file: blank lines part them, lines that start with `## ` are headings."""
    return [s.strip("\n") for s in re.split(r"\n\s*\n", _HEADING.sub("\n", text)) if s.strip()]
