"""TLS with the clients and with the server: handshakes that succeed, that fail, that never come, and what then passes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import psutil
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from psycopg import sql

from engine.connection import StepConnection
from engine.errors import ConnectionLostError, ServerError
from engine.target import Target
from proxy.embedded import Cluster
from proxy.relay import Leg
from proxy.tls import ServerTlsFiles
from proxy.wire import build
from proxy.wire.frames import FrameParser
from proxy.wire.messages import Backend
from proxy.wire.tls import ALPN, TlsStream
from proxy.wire.tls_options import TlsConfigError, for_asyncpg
from tests.e2e.fix_dfproxy import running_proxy as running_command
from tests.fix_certificates import Authority, Pair
from tests.fix_postgres import Database, fresh_database
from tests.proxy.fix_tls import PASSWORD, TLS_VERSION, Login, guarded_proxy, needs_tls_server, upstream_dsn
from tests.proxy.proxies import RunningProxy, running_proxy
from tests.proxy.test_adversity import eventually, read_until, rest

MIB = 1 << 20


@pytest.fixture
def secured(database18: Database, files: ServerTlsFiles) -> Iterator[RunningProxy]:
    """A proxy with a certificate before a plain server, with a short time to get started in."""
    with running_proxy(database18.dsn(), tls=files, startup_timeout=20.0) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def both(tls_cluster: Cluster, authority: Authority, files: ServerTlsFiles) -> Iterator[Login]:
    """TLS on both sides."""
    with guarded_proxy(tls_cluster, authority, client_tls=True, server_tls=True, files=files) as made:
        yield made


def connect(proxy: RunningProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def client_context(authority: Authority, *, alpn: tuple[str, ...] = (ALPN,)) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


class TlsSocket:
    """A raw client over TLS, which can end its direction and still read. Has what read_until and rest want."""

    def __init__(self, proxy: RunningProxy, authority: Authority, *, direct: bool = False) -> None:
        self._socket = connect(proxy)
        if not direct:
            self._socket.sendall(build.ssl_request())
            assert self._socket.recv(1) == b"S"
        self.tls = TlsStream(client_context(authority), server_side=False, server_hostname="localhost")
        while not self.tls.handshake():
            self._flush()
            self._feed()
        self._flush()

    def _flush(self) -> None:
        self._socket.sendall(self.tls.outgoing())

    def _feed(self) -> bool:
        data = self._socket.recv(65536)
        self.tls.feed(data)
        return bool(data)

    def sendall(self, data: bytes) -> None:
        self.tls.write([data])
        self._flush()

    def recv(self, _: int = 0) -> bytes:
        while not (data := self.tls.read()):
            if self.tls.ended or not self._feed():
                return b""
        return data

    def write_eof(self) -> None:
        self.tls.write_eof()
        self._flush()

    def start(self, user: str, database: str) -> None:
        self.sendall(build.startup({"user": user, "database": database}))
        read_until(self, Backend.READY_FOR_QUERY)  # type: ignore[arg-type]

    def __enter__(self) -> TlsSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def served(proxy: RunningProxy, authority: Authority) -> bytes:
    """The certificate that a new client is shown, in DER."""
    with TlsSocket(proxy, authority) as s:
        certificate = s.tls.peer_certificate
    assert certificate is not None
    return certificate


def says(dsn: str, authority: Authority, **more: Any) -> str:
    """What libpq says of a login that fails."""
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(dsn, **{"sslmode": "verify-full", "sslrootcert": str(authority.file), "host": "localhost",
                                "hostaddr": "127.0.0.1", **more})
    return str(caught.value)


# --- handshakes ---


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
def test_both_ways_to_start(secured: RunningProxy, database18: Database, authority: Authority, negotiation: str) -> None:
    with psycopg.connect(
        secured.dsn(database18), sslmode="verify-full", sslrootcert=str(authority.file), host="localhost",
        sslnegotiation=negotiation,
    ) as c:
        assert c.pgconn.ssl_in_use
        assert c.execute("SELECT 1").fetchone() == (1,)


def test_direct_tls_in_small_pieces(secured: RunningProxy, database18: Database, authority: Authority) -> None:
    """The first byte decides, and those that were read with it are part of the handshake."""
    tls = TlsStream(client_context(authority), server_side=False, server_hostname="localhost")
    with connect(secured) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not tls.handshake():
            for byte in tls.outgoing():
                s.sendall(bytes([byte]))
            tls.feed(s.recv(65536))
        # The end of the handshake, the startup packet and the first query in one piece.
        tls.write([build.startup({"user": database18.owner, "database": database18.name})])
        s.sendall(tls.outgoing())
        got = b""
        while b"Z\0\0\0\5I" not in got:
            data = s.recv(65536)
            assert data
            tls.feed(data)
            got += tls.read()


@pytest.mark.parametrize("alpn", [(), ("http/1.1",)], ids=["none", "another"])
def test_direct_tls_needs_alpn(
    secured: RunningProxy, database18: Database, authority: Authority, alpn: tuple[str, ...]
) -> None:
    with connect(secured) as s, client_context(authority, alpn=alpn).wrap_socket(s, server_hostname="localhost") as t:
        t.sendall(build.startup({"user": database18.owner, "database": database18.name}))
        assert rest(t) == b""


def test_tls_after_a_request_does_not(secured: RunningProxy, database18: Database, authority: Authority) -> None:
    with connect(secured) as s:
        s.sendall(build.ssl_request())
        assert s.recv(1) == b"S"
        with client_context(authority, alpn=()).wrap_socket(s, server_hostname="localhost") as t:
            t.sendall(build.startup({"user": database18.owner, "database": database18.name}))
            read_until(t, Backend.READY_FOR_QUERY)


def test_encryption_of_kerberos_is_refused_and_tls_asked_for_next(
    secured: RunningProxy, database18: Database, authority: Authority
) -> None:
    with connect(secured) as s:
        s.sendall(build.gssenc_request())
        assert s.recv(1) == b"N"
        s.sendall(build.ssl_request())
        assert s.recv(1) == b"S"
        with client_context(authority).wrap_socket(s, server_hostname="localhost") as t:
            t.sendall(build.startup({"user": database18.owner, "database": database18.name}))
            read_until(t, Backend.READY_FOR_QUERY)


@pytest.mark.parametrize("extra", [b"\x16", build.startup({"user": "trust"}), build.ssl_request()])
def test_bytes_before_the_handshake_end_the_connection(
    secured: RunningProxy, database18: Database, authority: Authority, extra: bytes
) -> None:
    """What came unprotected must never count as said inside of TLS (CVE-2021-23214)."""
    with connect(secured) as s:
        s.sendall(build.ssl_request() + extra)
        assert rest(s) == b""
    assert served(secured, authority)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, bytes(1000), b"\x15\x03\x03\0\2\2\x28"])
@pytest.mark.parametrize("asked", [True, False], ids=["after asking", "directly"])
def test_garbage_in_the_place_of_a_handshake(
    secured: RunningProxy, authority: Authority, garbage: bytes, asked: bool
) -> None:
    with connect(secured) as s:
        if asked:
            s.sendall(build.ssl_request())
            assert s.recv(1) == b"S"
        with contextlib.suppress(ConnectionError):
            s.sendall(garbage)
        # An alert at most, never a message.
        assert rest(s)[:1] in (b"", b"\x15")
    assert served(secured, authority)


def test_garbage_after_the_handshake(secured: RunningProxy, database18: Database, authority: Authority) -> None:
    with TlsSocket(secured, authority) as s:
        s.start(database18.owner, database18.name)
        s._socket.sendall(b"\x17\x03\x03\0\x20" + b"x" * 32)
        rest(s._socket)
    eventually(lambda: secured.call(lambda: secured.server.clients) == 0)
    assert served(secured, authority)


@pytest.mark.parametrize("sent", [b"", build.ssl_request(), b"\x16\x03\x01\2\0", build.ssl_request()[:5]])
def test_a_slow_handshake_is_not_waited_for(database18: Database, files: ServerTlsFiles, sent: bytes) -> None:
    with running_proxy(database18.dsn(), tls=files, startup_timeout=0.3) as proxy, connect(proxy) as s:
        s.sendall(sent)
        assert rest(s) in (b"", b"S")


@pytest.mark.parametrize("sent", [build.ssl_request(), b"\x16\x03\x01\2\0"])
def test_clients_that_vanish_in_the_handshake(secured: RunningProxy, authority: Authority, sent: bytes) -> None:
    for _ in range(20):
        with connect(secured) as s:
            s.sendall(sent)
    eventually(lambda: secured.call(lambda: secured.server.clients) == 0)
    assert served(secured, authority)


def test_a_stop_in_the_middle_of_a_handshake(database18: Database, files: ServerTlsFiles) -> None:
    with running_proxy(database18.dsn(), tls=files) as proxy, connect(proxy) as s:
        s.sendall(build.ssl_request())
        assert s.recv(1) == b"S"
        proxy.drain()
        # Nothing unprotected after the S.
        assert rest(s) == b""


def test_old_versions_are_refused(database18: Database, files: ServerTlsFiles, authority: Authority) -> None:
    strict = ServerTlsFiles(files.certificate, files.key, min_version="TLSv1.3")
    with running_proxy(database18.dsn(), tls=strict) as proxy:
        assert "version" in says(proxy.dsn(database18), authority, ssl_max_protocol_version="TLSv1.2")
        with psycopg.connect(proxy.dsn(database18), sslmode="require"):
            pass
    with running_proxy(database18.dsn(), tls=files) as proxy, psycopg.connect(
        proxy.dsn(database18), sslmode="require", ssl_max_protocol_version="TLSv1.2"
    ) as c:
        assert c.execute("SELECT 1").fetchone() == (1,)


def test_tls_can_be_required(database18: Database, files: ServerTlsFiles, authority: Authority) -> None:
    with running_proxy(database18.dsn(), tls=files, tls_required=True) as proxy:
        message = says(proxy.dsn(database18), authority, sslmode="disable")
        assert "FATAL:  dfproxy accepts encrypted connections only" in message
        assert "HINT:  Connect with sslmode=require." in message
        for mode in ("allow", "prefer", "require"):
            with psycopg.connect(proxy.dsn(database18), sslmode=mode) as c:
                assert c.pgconn.ssl_in_use
                with cancelled(c, lambda: cancel_in_the_open(proxy)):
                    c.execute("SELECT pg_sleep(60)")


@contextlib.contextmanager
def cancelled(c: psycopg.Connection[Any], cancel: Callable[[], None]) -> Iterator[None]:
    """What runs inside has to end by a cancel request."""
    timer = threading.Timer(0.1, cancel)
    timer.start()
    with pytest.raises(psycopg.errors.QueryCanceled, match="due to user request"):
        yield
    timer.join()
    c.rollback()


def cancel_in_the_open(proxy: RunningProxy) -> None:
    """As every client did before libpq 17, also those on TLS."""
    (key,) = proxy.server.keys
    with connect(proxy) as s:
        s.sendall(build.cancel_request(*key))
        assert rest(s) == b""


def test_without_a_certificate_there_is_no_tls(database18: Database, authority: Authority) -> None:
    with running_proxy(database18.dsn()) as proxy:
        assert "server does not support SSL" in says(proxy.dsn(database18), authority)
        says(proxy.dsn(database18), authority, sslnegotiation="direct")
        with psycopg.connect(proxy.dsn(database18)) as c:
            assert not c.pgconn.ssl_in_use


# --- certificates of clients ---


@pytest.fixture
def asking(database18: Database, files: ServerTlsFiles, authority: Authority) -> Iterator[RunningProxy]:
    with running_proxy(
        database18.dsn(), tls=ServerTlsFiles(files.certificate, files.key, str(authority.file))
    ) as proxy:
        yield proxy


def test_a_client_with_a_certificate(asking: RunningProxy, database18: Database, authority: Authority) -> None:
    pair = authority.issue("ann", client=True)
    with psycopg.connect(asking.dsn(database18), sslmode="require", sslcert=str(pair.cert), sslkey=str(pair.key)) as c:
        assert c.execute("SELECT 1").fetchone() == (1,)


def test_a_client_without(asking: RunningProxy, database18: Database, authority: Authority) -> None:
    assert "connection requires a valid client certificate" in says(asking.dsn(database18), authority)
    assert "encrypted connections only" in says(asking.dsn(database18), authority, sslmode="disable")


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_client_with_a_bad_one(
    asking: RunningProxy, database18: Database, authority: Authority, stranger: Authority, version: str
) -> None:
    for pair, said in (
        (stranger.issue("ann", client=True), "unknown ca"),
        (authority.issue("ann", client=True, expired=True), "certificate expired"),
    ):
        message = says(asking.dsn(database18), authority, sslcert=str(pair.cert), sslkey=str(pair.key),
                       ssl_max_protocol_version=version)
        assert said in message


# --- files, and reading them again ---


@pytest.fixture
def own(tmp_path: Path, authority: Authority) -> ServerTlsFiles:
    """Files that a test may change."""
    install(tmp_path, authority.issue("first"))
    return ServerTlsFiles(str(tmp_path / "server.pem"), str(tmp_path / "server.key"))


def install(folder: Path, pair: Pair) -> None:
    shutil.copy(pair.cert, folder / "server.pem")
    shutil.copy(pair.key, folder / "server.key")


def subject(der: bytes) -> str:
    return x509.load_der_x509_certificate(der).subject.rfc4514_string()


def test_new_connections_get_the_new_certificate(
    database18: Database, own: ServerTlsFiles, authority: Authority, tmp_path: Path
) -> None:
    with running_proxy(database18.dsn(), tls=own) as proxy:
        old = psycopg.connect(proxy.dsn(database18), sslmode="require")
        assert subject(served(proxy, authority)) == "CN=first"
        install(tmp_path, authority.issue("second"))
        assert subject(served(proxy, authority)) == "CN=first"
        proxy.call(proxy.server.reload)
        assert subject(served(proxy, authority)) == "CN=second"
        assert old.execute("SELECT 1").fetchone() == (1,)
        old.close()


@pytest.mark.parametrize("damage", ["gone", "garbage", "empty", "another key", "encrypted", "cut"])
def test_bad_files_change_nothing(
    database18: Database, own: ServerTlsFiles, authority: Authority, tmp_path: Path, damage: str
) -> None:
    with running_proxy(database18.dsn(), tls=own) as proxy:
        key = tmp_path / "server.key"
        match damage:
            case "gone":
                key.unlink()
            case "garbage":
                (tmp_path / "server.pem").write_bytes(os.urandom(1000))
            case "empty":
                (tmp_path / "server.pem").write_bytes(b"")
            case "another key":
                shutil.copy(authority.issue("other").key, key)
            case "encrypted":
                install(tmp_path, authority.issue("other", key_password="secret"))
            case "cut":
                key.write_bytes(key.read_bytes()[:50])
        proxy.call(proxy.server.reload)
        assert subject(served(proxy, authority)) == "CN=first"
    with pytest.raises(TlsConfigError, match=r"tls_cert|tls_key") as caught, running_proxy(database18.dsn(), tls=own):
        pass
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_sighup(database18: Database, own: ServerTlsFiles, authority: Authority, tmp_path: Path, processes: int) -> None:
    """The command itself: the signal, also to a parent with children, and an orderly end after it."""
    options = ["--no-engine", "--processes", str(processes), "--set", f"tls_cert={own.certificate}", "--set",
               f"tls_key={own.key}", "--set", "tls_required=on"]
    with running_command(database18.dsn(), *options) as command:
        assert command.process is not None

        def shown() -> str:
            with socket.create_connection(("127.0.0.1", command.port), timeout=30) as s:
                s.sendall(build.ssl_request())
                assert s.recv(1) == b"S"
                with client_context(authority).wrap_socket(s, server_hostname="localhost") as t:
                    return subject(t.getpeercert(binary_form=True) or b"")

        assert {shown() for _ in range(20)} == {"CN=first"}
        install(tmp_path, authority.issue("second"))
        command.process.send_signal(signal.SIGHUP)
        # Which process takes a connection is the kernel's choice: all of them must have changed.
        eventually(lambda: {shown() for _ in range(40)} == {"CN=second"})
        (tmp_path / "server.key").write_text("garbage")
        command.process.send_signal(signal.SIGHUP)
        eventually(lambda: command.log.read_text().count("the old certificate stays in use") == processes)
        assert shown() == "CN=second"
        assert command.stop() == 0


def test_a_bad_certificate_ends_the_command_before_it_starts(database18: Database, own: ServerTlsFiles, tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text("garbage")
    with pytest.raises(AssertionError, match=r"dfproxy: error: tls_cert \(.*server.pem\) with tls_key"), running_command(
        database18.dsn(), "--set", f"tls_cert={own.certificate}", "--set", f"tls_key={own.key}"
    ):
        pass


# --- the server's side ---


def through(authority: Authority, upstream: str, database: str = "postgres", user: str = "trust", **config: Any) -> Any:
    """One query through a new proxy before `upstream`, or psycopg's error."""
    with running_proxy(upstream, **config) as proxy, psycopg.connect(
        f"postgresql://{user}@127.0.0.1:{proxy.port}/{database}", connect_timeout=30
    ) as c:
        row = c.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
        assert row is not None
        return row[0]


@needs_tls_server
@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"])
def test_every_sslmode(tls_cluster: Cluster, authority: Authority, mode: str) -> None:
    assert through(authority, upstream_dsn(tls_cluster, authority, sslmode=mode)) == (mode != "disable")


@needs_tls_server
@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
def test_a_server_that_nobody_vouches_for(
    tls_cluster: Cluster, stranger: Authority, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dsn = upstream_dsn(tls_cluster, stranger, sslmode=mode)
    if mode == "prefer":
        assert through(stranger, dsn) is False  # plain, as libpq has it
    else:
        with pytest.raises(psycopg.OperationalError, match="the server's certificate is not accepted: "):
            through(stranger, dsn)
    monkeypatch.setenv("HOME", str(tmp_path))
    bare = f"postgresql://postgres@127.0.0.1:{tls_cluster.port}/postgres?sslmode={mode}"
    if mode.startswith("verify"):
        with pytest.raises(ValueError, match="needs sslrootcert"):
            through(stranger, bare)
    else:
        assert through(stranger, bare) is True


@needs_tls_server
def test_the_name_in_the_certificate(tls_cluster: Cluster, authority: Authority) -> None:
    """It is for localhost: not for an address, and not for another name."""
    dsn = f"postgresql://postgres@127.0.0.1:{tls_cluster.port}/postgres?sslrootcert={authority.file}&sslmode="
    with pytest.raises(psycopg.OperationalError, match="IP address mismatch"):
        through(authority, dsn + "verify-full")
    assert through(authority, dsn + "verify-ca") is True
    dsn = f"postgresql://postgres@db.example:{tls_cluster.port}/postgres?hostaddr=127.0.0.1&sslrootcert={authority.file}"
    with pytest.raises(psycopg.OperationalError, match="Hostname mismatch"):
        through(authority, dsn + "&sslmode=verify-full")


@needs_tls_server
def test_the_systems_authorities(tls_cluster: Cluster, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = f"postgresql://postgres@localhost:{tls_cluster.port}/postgres?hostaddr=127.0.0.1&sslrootcert=system"
    with pytest.raises(psycopg.OperationalError, match="certificate is not accepted"):
        through(authority, dsn)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    assert through(authority, dsn) is True
    with pytest.raises(ValueError, match="verify-full"):
        through(authority, dsn + "&sslmode=require")


@needs_tls_server
def test_a_certificate_that_was_revoked(tls_cluster: Cluster, authority: Authority) -> None:
    shown = authority.issue("other")
    for listed, said in ([shown], None), ([_served_by(tls_cluster, authority)], "certificate revoked"):
        crl = authority.crl(*listed)
        dsn = upstream_dsn(tls_cluster, authority, sslcrl=str(crl))
        if said is None:
            assert through(authority, dsn) is True
        else:
            with pytest.raises(psycopg.OperationalError, match=said):
                through(authority, dsn)
        crl.unlink()


def _served_by(cluster: Cluster, authority: Authority) -> Pair:
    """What the server shows, as a Pair of which only the certificate is used."""
    with socket.create_connection(("127.0.0.1", cluster.port or 0), timeout=30) as s:
        s.sendall(build.ssl_request())
        assert s.recv(1) == b"S"
        with client_context(authority).wrap_socket(s, server_hostname="localhost") as t:
            der = t.getpeercert(binary_form=True)
    assert der is not None
    path = authority.folder / "served.pem"
    path.write_bytes(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
    return Pair(path, path)


def test_a_server_without_tls(database18: Database, authority: Authority) -> None:
    assert through(authority, database18.dsn() + "?sslmode=prefer", database18.name, database18.owner) is False
    with pytest.raises(psycopg.OperationalError, match="the server has no TLS, and the upstream says sslmode=require"):
        through(authority, database18.dsn() + "?sslmode=require", database18.name, database18.owner)


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
def test_a_proxy_behind_a_proxy(
    database18: Database, files: ServerTlsFiles, authority: Authority, negotiation: str
) -> None:
    """The newest server's protocol over TLS, which its own binaries can't do; and the client role of direct TLS."""
    with running_proxy(database18.dsn(), tls=files, tls_required=True) as inner:
        dsn = (f"postgresql://localhost:{inner.port}/?hostaddr=127.0.0.1&sslmode=verify-full&sslrootcert={authority.file}"
               f"&sslnegotiation={negotiation}")
        with running_proxy(dsn, tls=files) as outer, psycopg.connect(
            outer.dsn(database18), sslmode="verify-full", sslrootcert=str(authority.file), host="localhost",
            sslnegotiation=negotiation, max_protocol_version="3.2",
        ) as c:
            assert c.execute("SELECT 1").fetchone() == (1,)
            with cancelled(c, c.cancel_safe):
                c.execute("SELECT pg_sleep(60)")


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_server_whose_certificate_has_expired(database18: Database, authority: Authority, mode: str) -> None:
    """With nothing to verify by, `require` takes it; as libpq does."""
    pair = authority.issue("late", expired=True)
    with running_proxy(database18.dsn(), tls=ServerTlsFiles(str(pair.cert), str(pair.key))) as inner:
        dsn = f"postgresql://localhost:{inner.port}/?hostaddr=127.0.0.1&sslmode={mode}"
        if mode == "require":
            assert through(authority, dsn, database18.name, database18.owner) is False  # of the innermost leg
        with pytest.raises(psycopg.OperationalError, match="certificate is not accepted: certificate has expired"):
            through(authority, f"{dsn}&sslrootcert={authority.file}", database18.name, database18.owner)


class Impostor:
    """Takes one connection after the other, waits for SSLRequest, and answers it its own way."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while True:
            try:
                s, _ = self._listener.accept()
            except OSError:
                return
            with s, contextlib.suppress(ConnectionError):
                s.settimeout(30)
                self.heard.append(s.recv(8))
                s.sendall(self._answer)
                if self._answer:
                    self.heard.append(rest(s))

    def __enter__(self) -> Impostor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.mark.parametrize(
    "answer", [b"", b"S" + build.authentication(0), b"N" + build.authentication(0), b"X", build.error_response("FATAL", "XX000", "lies")])
@pytest.mark.parametrize("mode", ["require", "prefer"])
def test_servers_that_answer_something_else(answer: bytes, mode: str) -> None:
    """Bytes behind the answer must not count as protected (CVE-2021-23222), and an error in its place is nobody's word."""
    with Impostor(answer) as impostor, running_proxy(
        f"postgresql://127.0.0.1:{impostor.port}/?sslmode={mode}", startup_timeout=5.0
    ) as proxy, pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(f"postgresql://ann@127.0.0.1:{proxy.port}/x", connect_timeout=30)
    assert impostor.heard[0] == build.ssl_request()
    if mode == "require":
        assert "lies" not in str(caught.value)
        assert "dfproxy can't reach PostgreSQL" in str(caught.value)
        assert not any(b"ann" in heard for heard in impostor.heard)


def test_a_server_that_never_ends_the_handshake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, running_proxy(
        f"postgresql://127.0.0.1:{listener.getsockname()[1]}/?sslmode=require&connect_timeout=2"
    ) as proxy, pytest.raises(psycopg.OperationalError, match="no answer within 2 s"):
        psycopg.connect(f"postgresql://ann@127.0.0.1:{proxy.port}/x", connect_timeout=30)


# --- what passes ---


@needs_tls_server
def test_a_lot_in_both_directions(both: Login) -> None:
    with both.connect("trust") as c:
        c.execute("CREATE TEMP TABLE t (n int, a text)")
        line = "x" * 1000
        with c.cursor().copy("COPY t FROM STDIN") as copy:
            for n in range(100_000):
                copy.write_row((n, line))
        size = 0
        with c.cursor().copy("COPY t TO STDOUT") as copy:
            for data in copy:
                size += len(data)
        assert size > 100 * MIB * 0.95
        assert c.execute("SELECT count(*), sum(length(a)) FROM t").fetchone() == (100_000, 100_000_000)
        assert c.execute("SELECT length(%s::text)", ("y" * 20 * MIB,)).fetchone() == (20 * MIB,)
        with c.pipeline():
            cursors = [c.execute("SELECT %s::int", (n,)) for n in range(1000)]
        assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(1000)]


@needs_tls_server
def test_a_client_that_does_not_read_holds_the_server_up(both: Login, authority: Authority) -> None:
    """Nothing piles up in the proxy: its buffers stay within what they may hold."""
    with TlsSocket(both.proxy, authority) as s:
        s.start("trust", "postgres")
        s.sendall(build.query("SELECT repeat('x', 1000000) FROM generate_series(1, 200)"))
        legs = [leg for leg in gc.get_objects() if isinstance(leg, Leg) and not leg.lost.done()]
        eventually(lambda: any(leg._holds for leg in legs))
        for leg in legs:
            assert leg._transport is not None
            # One read beyond the limit at most, and TLS's own overhead.
            assert leg._transport.get_write_buffer_size() < 256 * 1024 + 300 * 1024
        legs.clear()
        got = 0
        while got < 200_000_000:
            data = s.recv()
            assert data
            got += len(data)


@needs_tls_server
def test_a_client_that_ends_its_direction_gets_its_answers(both: Login, authority: Authority) -> None:
    """As over TCP: what it asked for before is answered, through both handshakes."""
    with TlsSocket(both.proxy, authority) as s:
        s.start("trust", "postgres")
        s.sendall(build.query("SELECT pg_sleep(0.2); SELECT repeat('x', 1000000) FROM generate_series(1, 10)"))
        s.write_eof()
        frames = read_until(s, Backend.READY_FOR_QUERY)  # type: ignore[arg-type]
        assert sum(frame.type == Backend.DATA_ROW for frame in frames) == 11
        assert s.recv() == b""
        assert s.tls.ended


@needs_tls_server
def test_the_last_words_reach_a_slow_client(both: Login, authority: Authority, tls_cluster: Cluster) -> None:
    """The server has gone before the client has read what it said."""
    with TlsSocket(both.proxy, authority) as s:
        s.start("trust", "postgres")
        s.sendall(build.query("SET application_name = 'slow'") + build.query("SELECT repeat('x', 1000000) FROM generate_series(1, 4)"))
        s.sendall(build.terminate())
        with psycopg.connect(tls_cluster.dsn(), autocommit=True) as c:
            def gone() -> bool:
                return c.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'slow'").fetchone() == (0,)

            with contextlib.suppress(AssertionError):  # the kernel may hold less than that: then it waits for us
                eventually(gone, 2)
        parser = FrameParser()
        parser.feed(rest(s))  # type: ignore[arg-type]
        assert s.tls.ended
    types = []
    while (frame := parser.next_frame()) is not None:
        types.append(frame.type)
    assert types.count(Backend.DATA_ROW) == 4
    assert types.count(Backend.READY_FOR_QUERY) == 2


@needs_tls_server
def test_a_server_that_ends_the_session(both: Login, tls_cluster: Cluster) -> None:
    with both.connect("trust") as c, psycopg.connect(tls_cluster.dsn(), autocommit=True) as other:
        row = c.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        other.execute("SELECT pg_terminate_backend(%s)", row)
        with pytest.raises(psycopg.errors.AdminShutdown):
            c.execute("SELECT 1")


@needs_tls_server
def test_a_server_that_is_killed(both: Login, tls_cluster: Cluster) -> None:
    """No close_notify, no end of stream in TLS's own words: a lost connection all the same."""
    with both.connect("trust") as c, psycopg.connect(tls_cluster.dsn(), autocommit=True) as other:
        row = other.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").fetchone()
        assert row is not None
        # A walwriter that dies takes every backend with it, with a last warning to its client.
        os.kill(row[0], signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            while True:
                c.execute("SELECT pg_sleep(0.01)")
    eventually(lambda: _answers(tls_cluster))


def _answers(cluster: Cluster) -> bool:
    try:
        with psycopg.connect(cluster.dsn()):
            return True
    except psycopg.OperationalError:
        return False


@needs_tls_server
def test_cancel(both: Login) -> None:
    with both.connect("trust") as c:
        for cancel in (c.cancel_safe, lambda: cancel_in_the_open(both.proxy)):
            with cancelled(c, cancel):
                c.execute("SELECT pg_sleep(60)")


def test_psql_through_tls(secured: RunningProxy, database18: Database, authority: Authority) -> None:
    script = r"\conninfo" "\nSELECT 1;\n" r"\copy (SELECT 2) TO STDOUT" "\n"
    done = subprocess.run(
        ["psql", "-XAtq", f"{secured.dsn(database18)}?sslmode=verify-ca&sslrootcert={authority.file}"],
        input=script, capture_output=True, text=True, timeout=60, check=True)
    assert "SSL connection (protocol: TLSv1.3" in done.stdout
    assert done.stdout.endswith("1\n2\n")


@needs_tls_server
def test_hundreds_of_connections_leave_nothing_behind(both: Login) -> None:
    process = psutil.Process()

    def login(times: int) -> None:
        for _ in range(times):
            both.connect("trust").close()

    def settled() -> bool:
        gc.collect()
        return not [o for o in gc.get_objects() if isinstance(o, TlsStream | Leg)]

    login(20)
    eventually(settled)
    files, memory = process.num_fds(), process.memory_info().rss
    threads = [threading.Thread(target=login, args=(100,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(settled)
    assert process.num_fds() <= files
    assert process.memory_info().rss < memory + 30 * MIB


# --- the engine's way in ---


@needs_tls_server
@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "verify-ca", "verify-full"])
async def test_asyncpg_goes_where_the_proxy_goes(tls_cluster: Cluster, authority: Authority, mode: str) -> None:
    dsn = (f"postgresql://scram:{quote(PASSWORD)}@localhost:{tls_cluster.port}/postgres?sslmode={mode}&channel_binding=prefer"
           f"&connect_timeout=5&application_name=mine&sslrootcert={authority.file}")
    uri, arguments = for_asyncpg(dsn)
    c = await asyncpg.connect(uri, **arguments)
    row = await c.fetchrow("SELECT ssl, current_setting('application_name') FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    await c.close()
    assert tuple(row) == (mode != "disable", "mine")


async def test_asyncpg_with_direct_tls_and_the_systems_authorities(
    database18: Database, files: ServerTlsFiles, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy(database18.dsn(), tls=files, tls_required=True) as proxy:
        dsn = (f"postgresql://{database18.owner}@localhost:{proxy.port}/{database18.name}"
               "?sslnegotiation=direct&sslrootcert=system")
        uri, arguments = for_asyncpg(dsn)
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncpg.connect(uri, **arguments)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        uri, arguments = for_asyncpg(dsn)
        c = await asyncpg.connect(uri, **arguments)
        assert await c.fetchval("SELECT 1") == 1
        await c.close()


async def cancel_a_step(s: StepConnection, watcher: str) -> None:
    """Runs a long statement, cancels it, and closes the session."""
    [[pid]] = await s.fetch("SELECT pg_backend_pid()", [])
    running = asyncio.create_task(s.begin_and_run(None, "SELECT pg_sleep(1000)"))
    c = await asyncpg.connect(watcher)
    while not await c.fetchval("SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = $1", int(pid or b"")):
        await asyncio.sleep(0.01)
    await c.close()
    await s.cancel(20)
    with pytest.raises(ServerError, match="canceling statement"):
        await running
    s.abort()


@needs_tls_server
@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "verify-ca", "verify-full"])
async def test_steps_go_where_the_proxy_goes(tls_cluster: Cluster, authority: Authority, mode: str) -> None:
    """With a bound login where there is TLS, and cancel requests protected like the session."""
    target = Target.from_dsn(f"postgresql://scram:{quote(PASSWORD)}@localhost:{tls_cluster.port}/postgres?sslmode={mode}"
                             f"&sslrootcert={authority.file}")
    s = await StepConnection.connect(target, {}, timeout=20)
    assert await s.fetch("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", []) == [[b"f" if mode == "disable" else b"t"]]
    await cancel_a_step(s, tls_cluster.dsn())


@needs_tls_server
async def test_steps_with_a_certificate_or_without_trust(tls_cluster: Cluster, authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("certified", client=True)
    base = f"@localhost:{tls_cluster.port}/postgres?sslrootcert={authority.file}"
    mine = f"&sslcert={pair.cert}&sslkey={pair.key}"
    s = await StepConnection.connect(Target.from_dsn(f"postgresql://certified{base}{mine}&sslmode=verify-full"), {}, timeout=20)
    s.close()
    with pytest.raises(ServerError, match="client certificate"):
        await StepConnection.connect(Target.from_dsn(f"postgresql://certified{base}"), {}, timeout=20)
    other = Authority(tmp_path, "another authority")
    base = f"postgresql://trust@localhost:{tls_cluster.port}/postgres?sslrootcert={other.file}"
    with pytest.raises(ConnectionLostError, match="certificate is not accepted"):
        await StepConnection.connect(Target.from_dsn(base + "&sslmode=verify-ca"), {}, timeout=20)
    # `prefer` goes on without, as libpq does.
    s = await StepConnection.connect(Target.from_dsn(base), {}, timeout=20)
    assert await s.fetch("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", []) == [[b"f"]]
    s.close()


async def test_steps_with_direct_tls(database18: Database, files: ServerTlsFiles, authority: Authority) -> None:
    with running_proxy(database18.dsn(), tls=files, tls_required=True) as proxy:
        s = await StepConnection.connect(Target.from_dsn(
            f"postgresql://{database18.owner}@localhost:{proxy.port}/{database18.name}?sslnegotiation=direct"
            f"&sslmode=verify-full&sslrootcert={authority.file}"), {}, timeout=20)
        assert await s.fetch("SELECT 1", []) == [[b"1"]]
        await cancel_a_step(s, database18.superuser_dsn)


@needs_tls_server
def test_a_workflow_with_tls_everywhere(tls_cluster: Cluster, authority: Authority, files: ServerTlsFiles) -> None:
    """The whole command: client, relay, worker and steps, and nothing of it in the open."""
    with fresh_database(tls_cluster, TLS_VERSION) as database:
        with psycopg.connect(tls_cluster.dsn(), autocommit=True) as c:
            c.execute(sql.SQL("ALTER ROLE {} PASSWORD 'secret'").format(sql.Identifier(database.owner)))
        upstream = (f"postgresql://{database.owner}:secret@localhost:{tls_cluster.port}/{database.name}"
                    f"?sslmode=verify-full&sslrootcert={authority.file}")
        options = ["--set", f"tls_cert={files.certificate}", "--set", f"tls_key={files.key}", "--set", "tls_required=on"]
        with running_command(upstream, *options) as command, psycopg.connect(
            f"postgresql://{database.owner}:secret@localhost:{command.port}/{database.name}", autocommit=True,
            sslmode="verify-full", sslrootcert=str(authority.file), hostaddr="127.0.0.1",
        ) as c:
            row = c.execute("SELECT df.start('SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()' |=> 'x')").fetchone()
            assert row is not None
            assert c.execute("SELECT df.await_instance(%s, 60)", row).fetchone() == ("completed",)
            result = c.execute("SELECT df.result(%s)::text", row).fetchone()
            assert result is not None
            assert '"ssl": true' in result[0] or '"ssl":true' in result[0]
            with psycopg.connect(database.superuser_dsn) as other:
                plain = other.execute(
                    "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = %s AND NOT ssl"
                    " AND application_name LIKE 'dfproxy%%'", (database.name,)).fetchone()
                assert plain == (0,)
