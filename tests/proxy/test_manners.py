"""Limits, the end of a proxy, taking over from another, and the ways in: Unix-domain sockets, PROXY headers."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from structlog.testing import capture_logs

from proxy.wire import build
from proxy.wire.frames import ProtocolError
from proxy.wire.messages import Backend
from proxy.wire.proxy_header import ProxyHeader
from tests.fix_postgres import Database, free_port
from tests.proxy.proxies import RunningProxy, running_proxy
from tests.proxy.test_adversity import connect, eventually, read_until, rest, serves, start

# --- limits ---


def test_a_client_too_many_hears_what_to_do(database18: Database) -> None:
    with running_proxy(database18.dsn(), max_client_connections=1) as proxy, psycopg.connect(proxy.dsn(database18)):
        with pytest.raises(psycopg.OperationalError) as caught:
            psycopg.connect(proxy.dsn(database18))
        assert "too many clients already" in str(caught.value)
        assert "raise max_client_connections" in str(caught.value)


def test_cancel_requests_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.server._MAX_CANCELS", 1)
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        upstream.settimeout(30)
        with (
            running_proxy(f"postgresql://127.0.0.1:{upstream.getsockname()[1]}/?sslmode=disable") as proxy,
            connect(proxy) as first, connect(proxy) as second,
        ):
            first.sendall(build.cancel_request(1, b"1111"))
            one, _ = upstream.accept()
            with one:
                assert one.recv(100) == build.cancel_request(1, b"1111")
                second.sendall(build.cancel_request(2, b"2222"))
                eventually(lambda: proxy.call(lambda: len(proxy.server.cancels._waiters or ())) == 1)
                assert select.select([upstream], [], [], 0)[0] == []
            assert rest(first) == b""
            two, _ = upstream.accept()
            with two:
                assert two.recv(100) == build.cancel_request(2, b"2222")
            assert rest(second) == b""


def test_the_limit_on_open_files_is_raised() -> None:
    script = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 6000));"
              "from proxy.limits import allow_connections;"
              "allow_connections(1000); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]);"
              "allow_connections(10); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]);"
              "allow_connections(100000); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 6000:
        pytest.skip("this machine allows fewer open files than the test needs")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["4000", "4000", "6000"]
    assert "may be too low" in done.stdout


def test_idle_connections_are_probed_within_five_minutes(database18: Database, proxied18: RunningProxy) -> None:
    with psycopg.connect(proxied18.dsn(database18)):

        def probing() -> list[tuple[int, ...]]:
            (session,) = proxied18.server._sessions
            assert session._server is not None
            found = []
            for leg in (session._client, session._server):
                sock = leg._transport.get_extra_info("socket")  # type: ignore[union-attr]
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                found.append(tuple(sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)))
            return found

        for idle, interval, count in proxied18.call(probing):
            assert 0 < idle + interval * count < 300


# --- the end ---


def test_drain_spares_a_client_in_the_middle_of_several_requests(database18: Database) -> None:
    """A client that prepares, looks and executes, each with a round trip, is not idle in between."""
    with running_proxy(database18.dsn(), drain_timeout=60) as proxy, start(proxy, database18) as s:
        drained = threading.Thread(target=proxy.drain)
        drained.start()
        eventually(lambda: proxy.server.draining)
        s.sendall(build.parse("s", "SELECT 1") + build.describe_statement("s") + build.sync())
        read_until(s, Backend.READY_FOR_QUERY)
        s.sendall(build.bind("", "s") + build.execute() + build.sync())
        read_until(s, Backend.DATA_ROW)
        answer = rest(s)
        assert b"57P01" in answer
        drained.join(30)
        assert not drained.is_alive()


def test_drain_ends_a_busy_client_between_transactions(database18: Database) -> None:
    with psycopg.connect(database18.dsn(), autocommit=True) as direct, running_proxy(
            database18.dsn(), drain_timeout=3) as proxy, psycopg.connect(proxy.dsn(database18)) as c:
        direct.execute("CREATE TABLE t (a int)")
        drained = threading.Thread(target=proxy.drain)
        drained.start()
        done = 0
        # One transaction after another, without a pause: none is cut short, none is lost.
        while True:
            try:
                c.execute("SELECT 1")  # with BEGIN in front
            except psycopg.errors.AdminShutdown:
                break
            c.execute("INSERT INTO t VALUES (1)")
            c.commit()
            done += 1
        assert direct.execute("SELECT count(*) FROM t").fetchone() == (done,)
        drained.join(30)
        assert not drained.is_alive()


# --- taking over ---


class Load:
    """Clients that connect, do a transaction and leave, again and again, until `over`; what went wrong is in `failures`.

    `lost` are those that the kernel reset because they were on their way to a socket when it was closed: the one gap that there
    is (docs/operations.md), of microseconds, which a machine under load can hit.
    """

    def __init__(self, dsn: str, clients: int = 4) -> None:
        self.done = self.lost = 0
        self.failures: list[str] = []
        self._dsn = dsn
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with psycopg.connect(self._dsn, connect_timeout=30) as c:
                    assert c.execute("SELECT %s::int + 1", (self.done,), prepare=True).fetchone() is not None
                self.done += 1
            except (psycopg.Error, AssertionError) as e:
                if "connection failed: " in str(e) and "closed the connection unexpectedly" in str(e):
                    self.lost += 1
                    continue
                self.failures.append(f"{type(e).__name__}: {e}")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, transactions: int = 100) -> None:
        """Returns after so many more."""
        wanted = self.done + transactions
        eventually(lambda: self.done >= wanted or bool(self.failures), 60)


def test_a_second_proxy_takes_over(database18: Database, tmp_path: Path) -> None:
    port = free_port()
    for kind in ("tcp", "unix"):
        dsn = f"postgresql://{database18.owner}@127.0.0.1:{port}/{database18.name}"
        if kind == "unix":
            dsn = f"postgresql://{database18.owner}@/{database18.name}?host={tmp_path}&port={port}"
        with contextlib.ExitStack() as stack:

            def another(stack: contextlib.ExitStack = stack) -> RunningProxy:
                return stack.enter_context(
                    running_proxy(database18.dsn(), port=port, reuse_port=True, socket_dir=tmp_path, drain_timeout=20))

            proxy = another()
            with Load(dsn) as load:
                for _ in range(4):
                    load.go_on()
                    following = another()
                    load.go_on(20)
                    proxy.drain()
                    assert proxy.server.clients == 0
                    proxy = following
                load.go_on()
            assert load.failures == []
            assert load.lost <= (4 if kind == "tcp" else 0)  # one for each end


def test_a_port_is_not_shared_by_accident(database18: Database, proxied18: RunningProxy) -> None:
    for share in (False, True):
        with pytest.raises(OSError, match="use"), running_proxy(database18.dsn(), port=proxied18.port, reuse_port=share):
            pass


# --- the Unix-domain socket ---


def test_unix_socket(database18: Database, tmp_path: Path) -> None:
    with running_proxy(database18.dsn(), socket_dir=tmp_path) as proxy:
        dsn = f"postgresql://{database18.owner}@/{database18.name}?host={tmp_path}&port={proxy.port}"
        with psycopg.connect(dsn) as c:
            assert c.execute("SELECT 1").fetchone() == (1,)
        assert serves(proxy, database18)
        assert (tmp_path / f".s.PGSQL.{proxy.port}").stat().st_mode & 0o777 == 0o777
        with pytest.raises(OSError, match=r"in use|another process"), running_proxy(
                database18.dsn(), socket_dir=tmp_path, port=proxy.port):
            pass
        assert serves(proxy, database18)
    assert list(tmp_path.iterdir()) == []


def test_a_unix_socket_that_nobody_listens_on_is_replaced(database18: Database, tmp_path: Path) -> None:
    port = free_port()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / f".s.PGSQL.{port}"))
    with running_proxy(database18.dsn(), socket_dir=tmp_path, port=port), psycopg.connect(
            f"postgresql://{database18.owner}@/{database18.name}?host={tmp_path}&port={port}") as c:
        assert c.execute("SELECT 1").fetchone() == (1,)


def test_a_folder_that_can_not_be_used_is_named(database18: Database, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"), running_proxy(database18.dsn(), socket_dir=tmp_path / "nowhere"):
        pass
    port = free_port()
    with pytest.raises(OSError), running_proxy(database18.dsn(), port=port, socket_dir=tmp_path / "nowhere"):
        pass
    with socket.create_server(("127.0.0.1", port)):  # nothing was left open
        pass


# --- PROXY headers ---

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 5432\r\n"
V1_6 = b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 5432\r\n"


def v2(command: int, family: int, addresses: bytes, more: bytes = b"") -> bytes:
    body = addresses + more
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes((0x20 | command, family)) + struct.pack(">H", len(body)) + body


IPV4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + struct.pack(">HH", 56324, 5432)
IPV6 = b"".join(socket.inet_pton(socket.AF_INET6, a) for a in ("2001:db8::7", "2001:db8::1")) + struct.pack(">HH", 56324, 5432)
#: A type-length-value field that nobody knows.
TLV = b"\xea\0\3abc"

HEADERS = [
    (V1, "192.0.2.7:56324"), (V1_6, "[2001:db8::7]:56324"), (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n", None),
    (v2(1, 0x11, IPV4), "192.0.2.7:56324"), (v2(1, 0x11, IPV4, TLV), "192.0.2.7:56324"),
    (v2(1, 0x21, IPV6), "[2001:db8::7]:56324"), (v2(0, 0x00, b""), None), (v2(1, 0x00, b""), None),
]
BAD_HEADERS = [
    b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 99999\r\n", b"PROXY TCP4 nobody 198.51.100.1 1 2\r\n", b"PROXY " + b"x" * 200,
    b"PROXY\r\n", b"PROXX", v2(1, 0x11, IPV4[:6]), v2(5, 0x11, IPV4), b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff", build.startup({"user": "ann"}), b"\x16\x03\x01",
]


@pytest.mark.parametrize(("header", "peer"), HEADERS)
def test_headers_are_read_however_they_are_cut(header: bytes, peer: str | None) -> None:
    for cut in range(len(header) + 1):
        parser = ProxyHeader()
        rest_ = parser.feed(header[:cut])
        if cut < len(header):
            assert rest_ is None
            rest_ = parser.feed(header[cut:] + b"more")
            assert rest_ == b"more"
        else:
            assert rest_ == b""
        assert parser.peer == peer


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_what_is_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        ProxyHeader().feed(header)


@pytest.fixture(params=["127.0.0.0/8", "unix"])
def behind(request: pytest.FixtureRequest, database18: Database, tmp_path: Path) -> Iterator[
        tuple[RunningProxy, Callable[[], socket.socket]]]:
    """A proxy that expects headers, and how a load balancer connects to it."""
    with running_proxy(database18.dsn(), proxy_protocol=(request.param,), socket_dir=tmp_path) as proxy:

        def balancer() -> socket.socket:
            if request.param != "unix":
                return connect(proxy)
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(30)
            s.connect(str(tmp_path / f".s.PGSQL.{proxy.port}"))
            return s

        yield proxy, balancer


def test_sessions_behind_a_load_balancer(
    database18: Database, behind: tuple[RunningProxy, Callable[[], socket.socket]]
) -> None:
    _, balancer = behind
    for header, _ in HEADERS:
        with balancer() as s:
            s.sendall(header + build.startup({"user": database18.owner, "database": database18.name}))
            read_until(s, Backend.READY_FOR_QUERY)
    with balancer() as s, capture_logs() as logs:
        s.sendall(V1 + b"\0\0\0\x01")
        assert rest(s) == b""
        assert [entry["client"] for entry in logs if entry["event"] == "malformed bytes"] == ["192.0.2.7:56324"]


def test_a_header_is_not_optional(database18: Database, behind: tuple[RunningProxy, Callable[[], socket.socket]]) -> None:
    _, balancer = behind
    for first in BAD_HEADERS:
        with balancer() as s:
            s.sendall(first)
            s.shutdown(socket.SHUT_WR)
            assert rest(s) == b""
    with balancer() as s:
        s.sendall(V1 + V1)
        assert rest(s) == b""


def test_nobody_else_may_send_a_header(database18: Database) -> None:
    with running_proxy(database18.dsn(), proxy_protocol=("192.0.2.0/24", "2001:db8::/32", "unix")) as proxy:
        with connect(proxy) as s:
            s.sendall(V1 + build.startup({"user": database18.owner, "database": database18.name}))
            assert rest(s) == b""
        assert serves(proxy, database18)
