"""Garbage for the codec and for a live proxy: `python -m tests.fuzz.wire [--seconds 60] [--seed N] [--live | --codec]`.

The codec gets mutated conversations and pure noise, guided by coverage where atheris is installed; it may raise
ProtocolError (and what says that a login can't go on), nothing else. The live proxy stands before a real server, and
before one that lies; whatever clients and servers send, it must go on to serve others, forget the sessions that ended,
and log no bug. What is found is printed as a seed, with which the same run can be had again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
from structlog.testing import capture_logs

from proxy.replies import client_view
from proxy.wire import backend, build
from proxy.wire.auth import AuthenticationError, ClientAuth
from proxy.wire.frames import NOTE, PEEK, WHOLE, Frame, FrameParser, FrameSplitter, Peek, ProtocolError, StartupParser
from proxy.wire.messages import Authentication, Backend, TransactionStatus
from proxy.wire.proxy_header import ProxyHeader
from proxy.wire.states import BATCH, TELLING, TELLING_PLAIN, Conversation, Startup, packet_event, server_event

LIMIT = 1 << 20
IDLE = TransactionStatus.IDLE
#: What a well-behaved client sends after the startup packet, and a server answers: the material of mutations.
REQUESTS = (
    build.query("SELECT 1"), build.query("SELECT df.one()"), build.query("SELECT generate_series(1, 100)"), build.query(""),
    build.query("SELECT df.refused()"), build.query("COPY (SELECT 1) TO STDOUT"), build.query("BEGIN"), build.query("ROLLBACK"),
    build.query("CREATE TEMP TABLE IF NOT EXISTS f (a int)"), build.query("COPY f FROM STDIN"), build.copy_data(b"1\n"),
    build.copy_done(), build.copy_fail("no"), build.parse("s", "SELECT $1::int, df.one()", [23]), build.parse("", "SELECT $1"),
    build.bind("", "s", [b"1"]), build.bind("p", "", [b"x"]), build.describe_statement("s"), build.describe_portal("p"),
    build.execute("", 0), build.execute("p", 1), build.close_statement("s"), build.close_portal("p"), build.sync(), build.sync(),
    build.flush(), build.query("SELECT 1;" * 100), build.message(ord("F"), b"\0\0\0\1\0\0\0\0\0\0"),
)
REPLIES = (
    build.authentication(Authentication.OK), build.authentication_sasl(["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"]),
    build.authentication(Authentication.MD5_PASSWORD, b"salt"), build.authentication(Authentication.CLEARTEXT_PASSWORD),
    build.authentication(Authentication.SASL_CONTINUE, b"r=x,s=eA==,i=4096"), build.authentication(Authentication.SASL_FINAL, b"v=eA=="),
    build.parameter_status("client_encoding", "LATIN1"), build.parameter_status("in_hot_standby", "on"),
    build.backend_key_data(7, b"12345678"), build.ready_for_query(IDLE), build.ready_for_query(TransactionStatus.FAILED),
    build.command_complete("SELECT 1"), build.data_row([b"1", None, b"x" * 300]), build.message(Backend.ROW_DESCRIPTION, b"\0\0"),
    build.error_response("ERROR", "42601", "no", hint="yes"),
    build.message(Backend.ERROR_RESPONSE, b"SERROR\0P12\0ndfproxy:position=3\0Wa\nb\0\0"),
    build.message(Backend.NOTICE_RESPONSE, b"SINFO\0CDF002\0Mdfproxy:start=1/1\0\0"),
    build.message(Backend.COPY_IN_RESPONSE, b"\0\0\0"), build.message(Backend.COPY_BOTH_RESPONSE, b"\0\0\0"),
    build.message(Backend.COPY_DATA, b"x"), build.message(Backend.PARSE_COMPLETE), build.message(Backend.BIND_COMPLETE),
    build.message(Backend.NO_DATA), build.message(Backend.PORTAL_SUSPENDED), build.message(Backend.NOTIFICATION_RESPONSE, b"\0" * 8),
    build.message(Backend.NEGOTIATE_PROTOCOL_VERSION, b"\0\3\0\0\0\0\0\0"),
)


# --- making inputs ---


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The data with a few things done to it; sometimes nothing."""
    out = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        if not out:
            break
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice([0, 0xFF, 0x7F, 0x80, rng.randrange(256)])
            case 2:
                del out[at : at + rng.choice([1, 4, 50])]
            case 3:
                out[at:at] = rng.randbytes(rng.choice([1, 4, 50]))
            case 4:
                out[at:at] = out[at : at + rng.choice([5, 50])]
            case 5:
                out[at : at + 4] = struct.pack(">I", rng.choice([0, 3, 4, 5, 255, 0x3FFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
    return bytes(out)


def conversation(rng: random.Random, messages: tuple[bytes, ...]) -> bytes:
    """Some messages in any order, perhaps damaged."""
    return mutated(rng, b"".join(rng.choices(messages, k=rng.randrange(1, 12))))


def opening(rng: random.Random, user: str, database: str) -> bytes:
    """How a connection begins: mostly as it should."""
    packet = build.startup({"user": user, "database": database})
    match rng.randrange(12):
        case 0:
            return mutated(rng, packet)
        case 1:
            return build.ssl_request() + packet
        case 2:
            return build.cancel_request(rng.randrange(1 << 32), rng.randbytes(rng.choice([4, 32, 256])))
        case 3:
            return rng.randbytes(rng.randrange(1, 200))
        case 4:
            return build.gssenc_request() + mutated(rng, packet)
        case _:
            return packet


def cut(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """The data in pieces."""
    while data:
        size = rng.choice([1, 2, 5, 7, 100, len(data), len(data)])
        yield data[:size]
        data = data[size:]


# --- the codec ---


def feed_codec(data: bytes) -> None:
    """Everything that reads bytes, with these bytes. Raises what none of it may raise."""
    rng = random.Random(data[:8])
    with contextlib.suppress(ProtocolError):
        packets, startup = StartupParser(), Startup()
        for piece in cut(rng, data):
            packets.feed(piece)
            while (packet := packets.next_packet()) is not None:
                startup.advance(packet_event(packet))
                packet.parameters()
    with contextlib.suppress(ProtocolError):
        header = ProxyHeader()
        for piece in cut(rng, data):
            if header.feed(piece) is not None:
                break
    _feed_splitters(rng, data)
    parser = FrameParser(LIMIT)
    with contextlib.suppress(ProtocolError):
        for piece in cut(rng, data):
            parser.feed(piece)
            while (frame := parser.next_frame()) is not None:
                _decode(frame)


def _feed_splitters(rng: random.Random, data: bytes) -> None:
    """Two splitters, of which one skims, must agree; two conversations listen to them."""
    states: list[Conversation[str]] = [Conversation(), Conversation()]
    results: list[tuple[bytes, bool]] = []
    pieces = list(cut(rng, data))
    for skims, state in enumerate(states):
        splitter, out, failed = FrameSplitter(max_length=LIMIT, max_whole=1000), b"", False
        for type_ in TELLING:
            splitter.modes[type_] = NOTE  # type: ignore[index]
        for type_ in (Backend.ERROR_RESPONSE, Backend.READY_FOR_QUERY, Backend.NOTICE_RESPONSE):
            splitter.modes[type_] = WHOLE  # type: ignore[index]
        splitter.modes[ord("B")] = PEEK  # type: ignore[index]
        try:
            for piece in pieces:
                if skims and splitter.skim(piece, Backend.READY_FOR_QUERY) >= 0:
                    out += piece
                    continue
                for item in splitter.feed(piece):
                    if isinstance(item, Frame):
                        out += item.encode()
                        state.received(item.type)
                    elif isinstance(item, int):
                        state.received(item)
                        state.sent(item, "x")
                    elif not isinstance(item, Peek):
                        out += bytes(item)
                    assert len(state) < 10_000
        except ProtocolError:
            failed = True
        results.append((out, failed))
    assert results[0][1] == results[1][1], "one splitter refuses what the other takes"
    assert results[0][0] == results[1][0], "two splitters pass different bytes"


def _decode(frame: Frame) -> None:
    payload = frame.payload
    for decoder in (
        backend.error_fields, backend.row_description, backend.data_row, backend.parameter_description,
        backend.parameter_status, backend.backend_key_data, backend.command_tag, backend.transaction_status,
        backend.authentication_code, backend.sasl_mechanisms, lambda p: client_view(p, None),
    ):
        with contextlib.suppress(ProtocolError):
            decoder(payload)
    with contextlib.suppress(ProtocolError):
        server_event(frame.type, payload[0] if payload else None)
    state: Conversation[str] = Conversation()
    state.sent_alone(BATCH)
    state.received(frame.type)
    assert state.plain or frame.type in TELLING_PLAIN
    with contextlib.suppress(ProtocolError, AuthenticationError):
        ClientAuth("ann", "secret").respond(payload)


def codec_input(rng: random.Random) -> bytes:
    """Bytes that look like a client's, a server's, or nobody's."""
    match rng.randrange(5):
        case 0:
            return conversation(rng, REQUESTS)
        case 1:
            return opening(rng, "ann", "app") + conversation(rng, REQUESTS)
        case 2:
            return rng.randbytes(rng.randrange(1, 300))
        case 3:
            return mutated(rng, rng.choice([b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
                                            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(range(12))]))
        case _:
            return conversation(rng, REPLIES)


# --- the live proxy ---


def harass(rng: random.Random, port: int, user: str, database: str) -> None:
    """One connection of a client that means no good."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as s:
        s.settimeout(0.05)
        for piece in cut(rng, opening(rng, user, database) + conversation(rng, REQUESTS)):
            s.sendall(piece)
            if rng.random() < 0.2:
                with contextlib.suppress(TimeoutError):
                    s.recv(100)
        match rng.randrange(4):
            case 0:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case 1:
                s.shutdown(socket.SHUT_WR)
            case 2:
                s.sendall(build.terminate())
        with contextlib.suppress(TimeoutError):
            for _ in range(20):
                if not s.recv(65536):
                    break


class Liar:
    """A server that answers whatever comes to its mind."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.1)
        self.port = int(self._socket.getsockname()[1])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection, _ = self._socket.accept()
                with connection:
                    connection.settimeout(0.05)
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        rng = self._rng
        begin = REPLIES[0] + REPLIES[8] + REPLIES[9] if rng.random() < 0.7 else b""
        for piece in cut(rng, begin + conversation(rng, REPLIES) + conversation(rng, REPLIES)):
            connection.sendall(piece)
            if rng.random() < 0.3:
                with contextlib.suppress(TimeoutError):
                    connection.recv(65536)

    def __enter__(self) -> Liar:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


def serves(dsn: str) -> None:
    """Raises unless a decent client is served."""
    with psycopg.connect(dsn, connect_timeout=30) as c:
        assert c.execute("SELECT 41 + 1").fetchone() == (42,)


def live(seed: int, rounds: int, cluster: Any, go_on: Callable[[], bool] = lambda: True) -> int:
    """Clients and servers that misbehave, `rounds` of each or until `go_on` says no. Returns how many there were."""
    from tests.proxy.proxies import running_proxy

    rng, done = random.Random(seed), 0
    with (
        capture_logs() as logs,
        Liar(seed) as liar,
        running_proxy(cluster.dsn(), startup_timeout=2, max_client_connections=50) as honest,
        running_proxy(f"postgresql://127.0.0.1:{liar.port}/?sslmode=disable", startup_timeout=2) as deceived,
    ):
        while done < rounds and go_on():
            harass(rng, honest.port, "postgres", "postgres")
            harass(rng, deceived.port, "postgres", "postgres")
            done += 1
            if done % 20 == 0:
                serves(f"postgresql://postgres@127.0.0.1:{honest.port}/postgres")
            bugs = [entry for entry in logs if entry["log_level"] == "error"]
            assert not bugs, f"seed {seed}, round {done}: {bugs}"
        serves(f"postgresql://postgres@127.0.0.1:{honest.port}/postgres")
        end = time.monotonic() + 30
        for proxy in (honest, deceived):
            while proxy.server.clients:
                assert time.monotonic() < end, f"seed {seed}: sessions that nobody has any more"
                time.sleep(0.05)
        assert not honest.server.keys, f"seed {seed}: cancel keys of sessions that are over"
    return done


# --- running it ---


def _guided(seconds: float) -> None:
    """With atheris; never returns."""
    import atheris

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}"], feed_codec)
    atheris.Fuzz()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--live", action="store_true", help="the live proxy only")
    parser.add_argument("--codec", action="store_true", help="the codec only")
    options = parser.parse_args()
    both = options.live == options.codec
    seconds = options.seconds / 2 if both else options.seconds
    print(f"seed {options.seed}")
    if both or options.live:
        from tests.fix_postgres import running_cluster, versions

        with running_cluster(versions()[0]) as cluster:
            end = time.monotonic() + seconds
            print(f"live: {live(options.seed, 1 << 30, cluster, lambda: time.monotonic() < end)} connections of each kind")
    if both or options.codec:
        if importlib.util.find_spec("atheris") is not None:
            _guided(seconds)
        end, n = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            data = codec_input(random.Random(f"{options.seed} {n}"))
            try:
                feed_codec(data)
            except Exception:
                print(f"input {n} of seed {options.seed}: {data!r}")
                raise
            n += 1
        print(f"codec: {n} inputs")


if __name__ == "__main__":
    main()
