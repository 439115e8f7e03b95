"""Clients and servers that vanish, stall, lie or shout: each harms itself only."""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from proxy.tls import ServerTlsFiles
from proxy.wire import backend, build
from proxy.wire.frames import Frame, FrameParser
from proxy.wire.messages import Backend
from tests.fix_postgres import Database, running_cluster, versions
from tests.proxy.proxies import RunningProxy, running_proxy


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until `condition` holds; fails after a time that only a broken program needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def connect(proxy: RunningProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def start(proxy: RunningProxy, database: Database) -> socket.socket:
    """A raw session that is ready for a query."""
    s = connect(proxy)
    s.sendall(build.startup({"user": database.owner, "database": database.name}))
    read_until(s, Backend.READY_FOR_QUERY)
    return s


def read_until(s: socket.socket, type_: int) -> list[Frame]:
    parser, got = FrameParser(), []
    while True:
        data = s.recv(65536)
        assert data, f"closed after {got}"
        parser.feed(data)
        while (frame := parser.next_frame()) is not None:
            got.append(frame)
            if frame.type == type_:
                return got


def rest(s: socket.socket) -> bytes:
    """What comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while data := s.recv(65536):
            parts.append(data)
    return b"".join(parts)


def serves(proxy: RunningProxy, database: Database) -> bool:
    with psycopg.connect(proxy.dsn(database), connect_timeout=30) as c:
        return c.execute("SELECT 1").fetchone() == (1,)


def backends(database: Database) -> int:
    """Sessions of clients in this database, as the server counts them."""
    with psycopg.connect(database.cluster.dsn(), autocommit=True) as c:
        row = c.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'", (database.name,)
        ).fetchone()
    assert row is not None
    return int(row[0])


@contextlib.contextmanager
def cancelling(cancel: Callable[[], object]) -> Iterator[None]:
    """Cancels again and again, since a request that comes before the query has begun does nothing."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.1):
            cancel()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- before there is a session ---


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-OpenSSH_9.0\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"\0" * 100,
        b"\xff" * 100, b"\0\0\0\x08\x04\xd2\x16\x33", b"\0\0\0\x07\0\0\0", struct.pack(">II", 10_001, 3 << 16),
        build.ssl_request() * 2, build.gssenc_request() * 2,
    ],
)
def test_garbage_ends_that_connection_only(database18: Database, proxied18: RunningProxy, garbage: bytes) -> None:
    with connect(proxied18) as s:
        s.sendall(garbage)
        answer = rest(s)
        assert len(answer) <= 1  # the `N` that a first encryption request gets
    assert serves(proxied18, database18)
    eventually(lambda: proxied18.server.clients == 0)


def test_random_garbage(database18: Database, proxied18: RunningProxy) -> None:
    rng = random.Random(7)
    for _ in range(200):
        with connect(proxied18) as s:
            s.sendall(rng.randbytes(rng.randrange(1, 300)))
            s.shutdown(socket.SHUT_WR)
            rest(s)
    assert serves(proxied18, database18)


def test_every_encryption_request_is_answered_with_no(database18: Database, proxied18: RunningProxy) -> None:
    with connect(proxied18) as s:
        s.sendall(build.gssenc_request())
        assert s.recv(1) == b"N"
        s.sendall(build.ssl_request())
        assert s.recv(1) == b"N"
        s.sendall(build.startup({"user": database18.owner, "database": database18.name}))
        read_until(s, Backend.READY_FOR_QUERY)


def test_a_startup_packet_in_single_bytes(database18: Database, proxied18: RunningProxy) -> None:
    with connect(proxied18) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in build.startup({"user": database18.owner, "database": database18.name}) + build.query("SELECT 42"):
            s.sendall(bytes((byte,)))
        read_until(s, Backend.DATA_ROW)


def test_requests_sent_along_with_the_startup_packet(database18: Database, proxied18: RunningProxy) -> None:
    with connect(proxied18) as s:
        s.sendall(build.startup({"user": database18.owner, "database": database18.name}) + build.query("SELECT df.one()"))
        assert read_until(s, Backend.DATA_ROW)[-1].payload[6:] == b"1"


def test_a_newer_minor_protocol_version_and_unknown_options_are_the_servers_to_judge(
    database: Database, proxied: RunningProxy
) -> None:
    def greet(port: int | None) -> list[Frame]:
        with socket.create_connection(("127.0.0.1", port or 0), timeout=30) as s:
            parameters = {"user": database.owner, "database": database.name, "_pq_.unknown": "x"}
            s.sendall(build.startup(parameters, version=3 << 16 | 9999))
            frames = read_until(s, Backend.READY_FOR_QUERY)
        return [f for f in frames if f.type != Backend.BACKEND_KEY_DATA]

    through = greet(proxied.port)
    assert through == greet(database.cluster.port)
    assert through[0].type == Backend.NEGOTIATE_PROTOCOL_VERSION


@pytest.mark.parametrize("version", [2 << 16, 4 << 16, 0x00010000])
def test_other_major_versions_are_refused(proxied18: RunningProxy, version: int) -> None:
    with connect(proxied18) as s:
        s.sendall(build.startup({"user": "ann"}, version=version))
        parser = FrameParser()
        parser.feed(rest(s))
    frame = parser.next_frame()
    assert frame is not None
    assert backend.error_fields(frame.payload)["C"] == "0A000"


def test_clients_that_say_nothing_are_let_go(database18: Database) -> None:
    with running_proxy(database18.dsn(), startup_timeout=0.3) as proxy:
        with connect(proxy) as silent, connect(proxy) as half, connect(proxy) as asked:
            half.sendall(b"\0\0")
            asked.sendall(build.ssl_request())
            assert rest(silent) == rest(half) == b""
            assert rest(asked) == b"N"
        with psycopg.connect(proxy.dsn(database18)) as c:  # the time-out is for logging in alone
            assert c.execute("SELECT pg_sleep(0.6)").fetchone() is not None


def test_clients_that_do_not_answer_the_server_are_let_go() -> None:
    hba = ["local all all trust", "host all all 127.0.0.1/32 scram-sha-256"]
    with (
        running_cluster(versions()[0], hba=hba) as cluster,
        running_proxy(cluster.dsn(), startup_timeout=0.5) as proxy,
        connect(proxy) as s,
    ):
        s.sendall(build.startup({"user": "postgres"}))
        read_until(s, Backend.AUTHENTICATION)
        assert rest(s) == b""


def test_too_many_clients(database18: Database) -> None:
    with running_proxy(database18.dsn(), max_client_connections=2) as proxy:
        with psycopg.connect(proxy.dsn(database18)) as first, psycopg.connect(proxy.dsn(database18)):
            with pytest.raises(psycopg.OperationalError, match="too many clients"):
                psycopg.connect(proxy.dsn(database18))
            # Cancel requests are served nevertheless.
            with pytest.raises(psycopg.errors.QueryCanceled), cancelling(first.cancel_safe):
                first.execute("SELECT pg_sleep(600)")
        eventually(lambda: proxy.server.clients == 0)
        assert serves(proxy, database18)


# --- during a session ---


@pytest.mark.parametrize("length", [0, 3, 0x40000004, 0xFFFFFFFF])
def test_a_bad_length_ends_the_session(database18: Database, proxied18: RunningProxy, length: int) -> None:
    with start(proxied18, database18) as s:
        s.sendall(struct.pack(">BI", ord("Q"), length) + b"x")
        parser = FrameParser()
        parser.feed(rest(s))
        frame = parser.next_frame()
        assert frame is not None
        assert backend.error_fields(frame.payload)["C"] == "08P01"
    eventually(lambda: backends(database18) == 0)
    assert serves(proxied18, database18)


@pytest.mark.parametrize("message", [build.message(ord("Q"), b"no end"), build.message(ord("P"), b"x"), build.message(ord("y"))])
def test_messages_that_are_wrong_inside_are_the_servers_to_judge(
    database18: Database, proxied18: RunningProxy, message: bytes
) -> None:
    def judged(port: int | None) -> list[dict[str, str]]:
        with socket.create_connection(("127.0.0.1", port or 0), timeout=30) as s:
            s.sendall(build.startup({"user": database18.owner, "database": database18.name}))
            read_until(s, Backend.READY_FOR_QUERY)
            s.sendall(message + build.sync() + build.terminate())
            parser = FrameParser()
            parser.feed(rest(s))
        got = []
        while (frame := parser.next_frame()) is not None:
            got.append(backend.error_fields(frame.payload) if frame.type == Backend.ERROR_RESPONSE else {"Z": ""})
        return got

    assert judged(proxied18.port) == judged(database18.cluster.port) != []


def test_large_messages_before_authentication_are_refused() -> None:
    hba = ["local all all trust", "host all all 127.0.0.1/32 password"]
    with running_cluster(versions()[0], hba=hba) as cluster, running_proxy(cluster.dsn()) as proxy, connect(proxy) as s:
        s.sendall(build.startup({"user": "postgres"}))
        read_until(s, Backend.AUTHENTICATION)
        s.sendall(struct.pack(">BI", ord("p"), 1 << 20))
        assert b"08P01" in rest(s)


def test_a_client_that_ends_its_direction_gets_what_it_asked_for(database18: Database, proxied18: RunningProxy) -> None:
    with start(proxied18, database18) as s:
        s.sendall(build.query("SELECT pg_sleep(0.2)") + build.query("SELECT repeat('x', 3000000)"))
        s.shutdown(socket.SHUT_WR)
        answer = rest(s)
    assert len(answer) > 3_000_000
    assert answer.endswith(build.ready_for_query(ord("I")))
    eventually(lambda: backends(database18) == 0)


def test_a_client_that_vanishes(database18: Database, proxied18: RunningProxy) -> None:
    for linger in (True, False):
        s = start(proxied18, database18)
        s.sendall(build.query("SELECT repeat('x', 1000) FROM generate_series(1, 3000000)"))
        s.recv(1000)
        if linger:  # a reset instead of an orderly end
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
        eventually(lambda: backends(database18) == 0 and proxied18.server.clients == 0)


def test_work_that_was_sent_before_the_client_left_is_done(database18: Database, proxied18: RunningProxy) -> None:
    with psycopg.connect(database18.dsn(), autocommit=True) as c:
        c.execute("CREATE TABLE t (a int)")
        s = start(proxied18, database18)
        s.sendall(build.query(f"SELECT 1 /* {'x' * 2_000_000} */"))
        s.sendall(build.query("SELECT pg_sleep(0.3)") + build.query("INSERT INTO t VALUES (1)") + build.terminate())
        s.close()
        eventually(lambda: c.execute("SELECT count(*) FROM t").fetchone() == (1,))


def test_a_server_that_ends_the_session(database18: Database, proxied18: RunningProxy) -> None:
    with psycopg.connect(proxied18.dsn(database18)) as c:
        with psycopg.connect(database18.cluster.dsn(), autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s)", (c.info.backend_pid,))
        with pytest.raises(psycopg.errors.AdminShutdown):
            c.execute("SELECT 1")
    eventually(lambda: proxied18.server.clients == 0)


@pytest.mark.parametrize("secure", [False, True])
def test_a_client_in_the_middle_of_sending_hears_why(
    database18: Database, files: ServerTlsFiles, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    """Its connection is not reset while it sends: it would lose the error, or never look for one."""
    monkeypatch.setattr("proxy.relay._SILENCE", 10)  # however slow this machine is
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with running_proxy(database18.dsn(), tls=files) as proxy, contextlib.ExitStack() as stack:
        s = stack.enter_context(connect(proxy))
        if secure:
            s.sendall(build.ssl_request())
            assert s.recv(1) == b"S"
            s = stack.enter_context(context.wrap_socket(s))
        s.sendall(build.startup({"user": database18.owner, "database": database18.name}))
        read_until(s, Backend.READY_FOR_QUERY)
        s.sendall(build.query("CREATE TABLE t (a text)") + build.query("COPY t FROM STDIN"))
        read_until(s, Backend.COPY_IN_RESPONSE)
        with psycopg.connect(database18.cluster.dsn(), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database18.name,))

            def ending() -> bool:
                s.sendall(build.copy_data(b"row\n"))
                return proxy.call(lambda: all(x._client._parting is not None for x in proxy.server._sessions))

            eventually(ending)
            for _ in range(50):
                s.sendall(build.copy_data(b"row\n" * 10_000))
        parts = []
        while data := s.recv(65536):  # no reset, and TLS is ended in its own words
            parts.append(data)
        assert b"57P01" in b"".join(parts)
        s.close()
        eventually(lambda: proxy.server.clients == 0)


def test_a_client_that_never_closes_is_not_waited_for(
    database18: Database, proxied18: RunningProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.relay._SILENCE", 0.05)
    monkeypatch.setattr("proxy.relay._PATIENCE", 0.2)
    over = threading.Event()

    def send(s: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.01):
                s.sendall(build.query("SELECT 1"))

    with start(proxied18, database18) as silent, start(proxied18, database18) as loud:
        thread = threading.Thread(target=send, args=(loud,))
        thread.start()
        with psycopg.connect(database18.cluster.dsn(), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database18.name,))
        eventually(lambda: proxied18.server.clients == 0)
        over.set()
        thread.join()
        assert b"57P01" in rest(silent)


def test_a_server_that_is_killed_in_the_middle_of_a_query() -> None:
    with running_cluster(versions()[0]) as cluster, running_proxy(cluster.dsn()) as proxy:
        dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"
        with psycopg.connect(dsn) as c:
            timer = threading.Timer(0.3, cluster.kill)
            timer.start()
            with pytest.raises(psycopg.OperationalError, match="closed the connection"):
                c.execute("SELECT pg_sleep(600)")
            timer.join()
        with pytest.raises(psycopg.OperationalError, match="can't reach PostgreSQL"):
            psycopg.connect(dsn)
        cluster.start()
        with psycopg.connect(dsn) as c:
            assert c.execute("SELECT 1").fetchone() == (1,)


def test_a_client_that_does_not_read_harms_nobody(database18: Database, proxied18: RunningProxy) -> None:
    with start(proxied18, database18) as stalled:
        stalled.sendall(build.query("SELECT repeat('x', 1000000) FROM generate_series(1, 100)"))
        time.sleep(0.3)
        for _ in range(20):
            assert serves(proxied18, database18)
        # It still gets everything once it reads.
        total = 0
        while total < 100_000_000:
            data = stalled.recv(1 << 20)
            assert data
            total += len(data)


def test_a_slow_reader_gets_every_byte(database18: Database, proxied18: RunningProxy) -> None:
    with start(proxied18, database18) as s:
        s.sendall(build.query("SELECT n, repeat('x', n % 977) FROM generate_series(1, 20000) n") + build.terminate())
        parser, rows = FrameParser(), 0
        while data := s.recv(3000):
            parser.feed(data)
            while (frame := parser.next_frame()) is not None:
                if frame.type == Backend.DATA_ROW:
                    rows += 1
                    assert backend.data_row(frame.payload) == [b"%d" % rows, b"x" * (rows % 977)]
    assert rows == 20_000


def test_a_server_that_does_not_read_holds_its_client_only(database18: Database, proxied18: RunningProxy) -> None:
    with start(proxied18, database18) as s:
        # The server sleeps, and reads nothing meanwhile: the client must not be able to fill the proxy's memory.
        s.sendall(build.query("SELECT pg_sleep(600)"))
        s.setblocking(False)
        sent = 0
        chunk = build.query("SELECT 1") * 10_000
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < 0.5:
            try:
                sent += s.send(chunk)
                idle_since = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 64 << 20
        assert serves(proxied18, database18)


# --- cancelling ---


def test_ctrl_c_in_psql(database: Database, proxied: RunningProxy) -> None:
    process = subprocess.Popen(
        ["psql", "-X", proxied.dsn(database), "-c", "SELECT pg_sleep(600)"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    with psycopg.connect(database.cluster.dsn(), autocommit=True) as admin:
        eventually(lambda: admin.execute(
            "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND query LIKE 'SELECT pg_sleep%%' AND state = 'active'",
            (database.name,),
        ).fetchone() is not None)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "canceling statement due to user request" in stderr


def test_a_cancel_request_reaches_its_own_session(database18: Database, proxied18: RunningProxy) -> None:
    with psycopg.connect(proxied18.dsn(database18)) as one, psycopg.connect(proxied18.dsn(database18)) as two:
        done: list[object] = []
        other = threading.Thread(target=lambda: done.append(two.execute("SELECT pg_sleep(0.8)").fetchone()))
        other.start()
        with pytest.raises(psycopg.errors.QueryCanceled), cancelling(one.cancel_safe):
            one.execute("SELECT pg_sleep(600)")
        other.join(30)
        assert done == [("",)]


def test_a_cancel_request_goes_to_the_host_of_its_session() -> None:
    version = versions()[0]
    with running_cluster(version) as first, running_cluster(version) as second:
        with running_proxy(f"postgresql://127.0.0.1:{first.port},127.0.0.1:{second.port}/") as proxy:
            dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"
            first.stop()
            with psycopg.connect(dsn) as c:
                assert c.execute("SHOW port").fetchone() == (str(second.port),)
                first.start()  # new sessions go there again; the old one's key does not
                with pytest.raises(psycopg.errors.QueryCanceled), cancelling(c.cancel_safe):
                    c.execute("SELECT pg_sleep(600)")
                # Another process of the proxy does not know the key, and asks every host.
                with running_proxy(f"postgresql://127.0.0.1:{first.port},127.0.0.1:{second.port}/") as sibling:
                    key = next(iter(proxy.server.keys))
                    c.rollback()

                    def cancel() -> None:
                        with connect(sibling) as s:
                            s.sendall(build.cancel_request(*key))
                            assert rest(s) == b""

                    with pytest.raises(psycopg.errors.QueryCanceled), cancelling(cancel):
                        c.execute("SELECT pg_sleep(600)")
        assert proxy.server.keys == {}


# --- ending ---


def test_drain_lets_transactions_finish(database18: Database, proxied18: RunningProxy) -> None:
    idle = psycopg.connect(proxied18.dsn(database18), autocommit=True)
    busy = psycopg.connect(proxied18.dsn(database18))
    busy.execute("CREATE TABLE t (a int)")
    silent = connect(proxied18)
    drained = threading.Thread(target=proxied18.drain)
    drained.start()
    eventually(lambda: proxied18.server.draining)
    readable = [idle.fileno()]
    eventually(lambda: bool(select.select(readable, [], [], 0)[0]))  # asking would make it one that is not idle
    with pytest.raises(psycopg.errors.AdminShutdown, match="shutting down"):
        idle.execute("SELECT 1")
    assert b"57P01" in rest(silent)
    silent.close()
    with pytest.raises(OSError):
        connect(proxied18).close()
    busy.execute("INSERT INTO t VALUES (1)")
    busy.commit()
    drained.join(30)
    assert not drained.is_alive()
    with pytest.raises(psycopg.OperationalError):
        busy.execute("SELECT 1")
    with psycopg.connect(database18.dsn()) as c:
        assert c.execute("SELECT * FROM t").fetchall() == [(1,)]
    for c in (idle, busy):
        c.close()


def test_drain_does_not_wait_forever(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.server._LAST_WORDS", 0.2)
    with running_proxy(database18.dsn(), drain_timeout=0.3) as proxy, start(proxy, database18) as s, \
            start(proxy, database18) as running:
        s.sendall(build.query("BEGIN"))
        read_until(s, Backend.READY_FOR_QUERY)
        running.sendall(build.query("SELECT 1, pg_sleep(600)"))
        proxy.drain()
        assert proxy.server.clients == 0
        for cut in (s, running):
            assert b"57P01" in rest(cut)
    with psycopg.connect(database18.cluster.dsn(), autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database18.name,))


def test_close_cuts_what_is_left(database18: Database) -> None:
    with running_proxy(database18.dsn()) as proxy:
        sessions = [start(proxy, database18) for _ in range(3)] + [connect(proxy)]
        sessions[0].sendall(build.query("SELECT pg_sleep(600)"))
        eventually(lambda: proxy.server.clients == 4)
    # running_proxy has checked that no task is left.
    for s in sessions:
        assert rest(s) == b""
        s.close()


async def test_a_port_that_is_taken(database18: Database, proxied18: RunningProxy) -> None:
    from proxy.server import ProxyConfig, ProxyServer

    server = ProxyServer(ProxyConfig(upstream=database18.dsn(), port=proxied18.port))
    with pytest.raises(OSError):
        await server.start()
    await server.close()
