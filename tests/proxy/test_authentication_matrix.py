"""Every way to log in over every combination of plain and TLS connections, with clients that know nothing of a proxy."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
from cryptography.hazmat.primitives import hashes
from structlog.testing import capture_logs

import proxy.session
from proxy.authentication import AuthMode
from proxy.embedded import Cluster
from proxy.tls import ServerTlsFiles
from proxy.wire import build
from tests.fix_certificates import Authority, Pair, new_authority, postgres_owner
from tests.fix_postgres import running_cluster
from tests.proxy.fix_tls import (
    HBA,
    METHODS,
    PASSWORD,
    TLS_VERSION,
    Login,
    add_logins,
    guarded_proxy,
    needs_tls_server,
    tls_settings,
)
from tests.proxy.test_adversity import eventually

LEGS = [pytest.param((c, s), id=f"{'tls' if c else 'plain'}-{'tls' if s else 'plain'}") for c in (0, 1) for s in (0, 1)]


@pytest.fixture(scope="module", params=LEGS)
def login(request: pytest.FixtureRequest, tls_cluster: Cluster, authority: Authority, files: ServerTlsFiles) -> Iterator[Login]:
    client, server = request.param
    with guarded_proxy(tls_cluster, authority, client_tls=bool(client), server_tls=bool(server), files=files) as made:
        yield made


@pytest.fixture(scope="module", params=LEGS[::2])
def plain_login(
    request: pytest.FixtureRequest, plain_cluster: Cluster, authority: Authority, files: ServerTlsFiles
) -> Iterator[Login]:
    with guarded_proxy(plain_cluster, authority, client_tls=bool(request.param[0]), server_tls=False, files=files) as made:
        yield made


@pytest.fixture(scope="module")
def both(tls_cluster: Cluster, authority: Authority, files: ServerTlsFiles) -> Iterator[Login]:
    """TLS on both sides."""
    with guarded_proxy(tls_cluster, authority, client_tls=True, server_tls=True, files=files) as made:
        yield made


def psql(login: Login, role: str, password: str = PASSWORD, **more: str) -> subprocess.CompletedProcess[str]:
    parameters = login.parameters(role, password, **more)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")} | {"PGPASSWORD": parameters.pop("password")}
    return subprocess.run(
        ["psql", "-XAtw", " ".join(f"{k}={v}" for k, v in parameters.items()), "-c", "SELECT current_user"],
        capture_output=True, text=True, timeout=60, env=environment, check=False)


async def with_asyncpg(login: Login, role: str, password: str = PASSWORD) -> str:
    context: Any = False
    if login.tls:
        context = ssl.create_default_context(cafile=str(login.authority.file))
    c = await asyncpg.connect(
        host="localhost", port=login.proxy.port, user=role, password=password, database="postgres", ssl=context)
    try:
        return str(await c.fetchval("SELECT current_user"))
    finally:
        await c.close()


class Everybody:
    """What is true whatever the legs are."""

    @pytest.mark.parametrize("role", METHODS)
    def test_psql(self, a_login: Login, role: str) -> None:
        done = psql(a_login, role)
        assert (done.stdout, done.stderr) == (f"{role}\n", "")

    @pytest.mark.parametrize("role", METHODS)
    def test_psycopg(self, a_login: Login, role: str) -> None:
        with a_login.connect(role) as c:
            assert c.pgconn.ssl_in_use == a_login.tls
            assert c.execute("SELECT current_user").fetchone() == (role,)

    @pytest.mark.parametrize("role", METHODS)
    async def test_asyncpg(self, a_login: Login, role: str) -> None:
        assert await with_asyncpg(a_login, role) == role

    @pytest.mark.parametrize("role", METHODS[1:])
    def test_a_wrong_password_is_the_servers_own_refusal(self, a_login: Login, role: str) -> None:
        with pytest.raises(psycopg.OperationalError) as caught:
            a_login.connect(role, "wrong")
        assert str(caught.value).endswith(f'FATAL:  password authentication failed for user "{role}"')

    @pytest.mark.parametrize("role", METHODS[1:])
    def test_no_password(self, a_login: Login, role: str) -> None:
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            a_login.connect(role, "")

    def test_an_unknown_database_is_the_servers_own_refusal(self, a_login: Login) -> None:
        with pytest.raises(psycopg.OperationalError, match='FATAL:  database "nowhere" does not exist'):
            a_login.connect("scram", dbname="nowhere")


@needs_tls_server
class TestTlsServer(Everybody):
    @pytest.fixture
    def a_login(self, login: Login) -> Login:
        return login

    def test_the_servers_leg(self, login: Login, request: pytest.FixtureRequest) -> None:
        with login.connect("scram") as c:
            row = c.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
            assert row == (request.node.callspec.params["login"][1] == 1,)


class TestPlainServer(Everybody):
    @pytest.fixture
    def a_login(self, plain_login: Login) -> Login:
        return plain_login


# --- TLS on both sides ---


@needs_tls_server
@pytest.mark.parametrize("password", ["x" * 900, "\U0001fae0", "a\u00a0\u00adb", "\u0627\u0031", "tab\there"])
def test_passwords_that_saslprep_changes_or_forbids(both: Login, tls_cluster: Cluster, password: str) -> None:
    """What libpq makes of them, the proxy has to make of them."""
    with psycopg.connect(tls_cluster.dsn(), autocommit=True) as c:
        # libpq's own preparation: the server is only given the outcome.
        c.execute("DROP ROLE IF EXISTS bound")
        c.execute("CREATE ROLE bound LOGIN")
        c.pgconn.change_password(b"bound", password.encode())
    with both.connect("bound", password) as c:
        assert c.execute("SELECT current_user").fetchone() == ("bound",)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        both.connect("bound", password + "x")


@needs_tls_server
def test_md5_is_relayed(both: Login) -> None:
    """The password is asked for only where there is no other way."""
    with both.connect("md5", require_auth="md5") as c:
        assert c.execute("SELECT current_user").fetchone() == ("md5",)


@needs_tls_server
def test_scram_is_answered_with_channel_binding(both: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server checks what it is told of its certificate: with another one's hash it refuses."""
    with both.connect("scram", require_auth="password"):
        pass
    monkeypatch.setattr(proxy.session, "channel_binding", lambda certificate: b"\1" * 32)
    with pytest.raises(psycopg.OperationalError, match="FATAL:  SCRAM channel binding check failed"):
        both.connect("scram")


@needs_tls_server
@pytest.mark.parametrize(
    ("insists", "said"),
    [({"require_auth": "scram-sha-256"}, "server requested a cleartext password"),
     ({"channel_binding": "require"}, "channel binding")],
)
def test_clients_that_insist(both: Login, insists: dict[str, str], said: str) -> None:
    """Their own library refuses, before the proxy could say a word. It says why, and the log what to set."""
    with capture_logs() as logs:
        with pytest.raises(psycopg.OperationalError, match=said):
            both.connect("scram", **insists)
        eventually(lambda: any("auth=relay" in entry.get("advice", "") for entry in logs))


@needs_tls_server
class TestRelay:
    """`auth = relay` with TLS on both sides."""

    @pytest.fixture(scope="class")
    @classmethod
    def relayed(cls, tls_cluster: Cluster, authority: Authority, files: ServerTlsFiles) -> Iterator[Login]:
        with guarded_proxy(
            tls_cluster, authority, client_tls=True, server_tls=True, files=files, auth=AuthMode.RELAY
        ) as made:
            yield made

    def test_a_client_that_does_not_bind(self, relayed: Login) -> None:
        with relayed.connect("scram", channel_binding="disable", require_auth="scram-sha-256") as c:
            assert c.execute("SELECT current_user").fetchone() == ("scram",)

    async def test_a_client_that_knows_no_binding(self, relayed: Login) -> None:
        assert await with_asyncpg(relayed, "scram") == "scram"

    @pytest.mark.parametrize("binding", ["prefer", "require"])
    def test_a_client_that_binds_is_told_what_to_set(self, relayed: Login, binding: str) -> None:
        with pytest.raises(psycopg.OperationalError, match="SCRAM can't be relayed") as caught:
            relayed.connect("scram", channel_binding=binding)
        assert "channel_binding=disable" in str(caught.value)

    @pytest.mark.parametrize("role", ["trust", "password", "md5"])
    def test_the_others_are_as_ever(self, relayed: Login, role: str) -> None:
        with relayed.connect(role) as c:
            assert c.execute("SELECT current_user").fetchone() == (role,)


class TestPassword:
    """`auth = password`: the client is always asked in clear."""

    @pytest.fixture(scope="class")
    @classmethod
    def asked(cls, plain_cluster: Cluster, authority: Authority, files: ServerTlsFiles) -> Iterator[Login]:
        with guarded_proxy(
            plain_cluster, authority, client_tls=True, server_tls=False, files=files, auth=AuthMode.PASSWORD
        ) as made:
            yield made

    @pytest.mark.parametrize("role", METHODS[1:])
    def test_over_tls(self, asked: Login, role: str) -> None:
        with asked.connect(role, require_auth="password") as c:
            assert c.execute("SELECT current_user").fetchone() == (role,)

    @pytest.mark.parametrize("role", METHODS[1:])
    def test_a_wrong_password(self, asked: Login, role: str) -> None:
        with pytest.raises(psycopg.OperationalError, match=f'password authentication failed for user "{role}"'):
            asked.connect(role, "wrong")

    def test_nobody_is_asked_without_need(self, asked: Login) -> None:
        with asked.connect("trust", "", require_auth="none") as c:
            assert c.execute("SELECT current_user").fetchone() == ("trust",)

    def test_never_in_the_open(self, asked: Login) -> None:
        with pytest.raises(psycopg.OperationalError, match="over TLS only"):
            asked.connect("scram", sslmode="disable")
        with asked.connect("trust", sslmode="disable"):
            pass


# --- certificates ---


@pytest.fixture(scope="module")
def turncoat(authority: Authority) -> Iterator[Callable[[Authority, Pair], Cluster]]:
    """A server whose certificate can be changed."""
    pair = authority.issue("turncoat", hosts=("localhost",), owner=postgres_owner())

    def turn(issuer: Authority, other: Pair) -> Cluster:
        for source, target in ((other.cert, pair.cert), (other.key, pair.key)):
            target.write_bytes(source.read_bytes())
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            c.execute("SELECT pg_reload_conf()")
        # It is read by and by.
        eventually(lambda: served_certificate(cluster) == other.der)
        return cluster

    with running_cluster(TLS_VERSION, settings=tls_settings(authority, pair), hba=HBA) as cluster:
        add_logins(cluster)
        yield turn


def served_certificate(cluster: Cluster) -> bytes:
    with socket.create_connection(("127.0.0.1", cluster.port or 0), timeout=30) as s:
        s.sendall(build.ssl_request())
        assert s.recv(1) == b"S"
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with context.wrap_socket(s) as t:
            return t.getpeercert(binary_form=True) or b""


@needs_tls_server
@pytest.mark.parametrize("kind", ["rsa-sha256", "rsa-sha384", "rsa-sha512", "rsa-pss", "ecdsa-sha384", "ed25519"])
def test_channel_binding_by_every_kind_of_signature(
    turncoat: Callable[[Authority, Pair], Cluster], kind: str, files: ServerTlsFiles, authority: Authority
) -> None:
    """The hash is that of the signature on the server's certificate (RFC 5929), and the server is the judge."""
    name, _, digest = kind.partition("-")
    algorithm = {"sha384": hashes.SHA384(), "sha512": hashes.SHA512()}.get(digest)
    with new_authority(kind, kind={"ecdsa": "ec"}.get(name, name)) as special:
        pair = special.issue("server", hosts=("localhost",), digest=algorithm, pss=digest == "pss")
        cluster = turncoat(special, pair)
        with guarded_proxy(
            cluster, authority, client_tls=True, server_tls=True, files=files, upstream={"sslrootcert": str(special.file)}
        ) as login, login.connect("scram") as c:
            assert c.execute("SELECT current_user").fetchone() == ("scram",)


@needs_tls_server
@pytest.mark.parametrize("mode", [AuthMode.AUTO, AuthMode.RELAY])
def test_the_servers_own_certificate_lets_bound_scram_pass(
    turncoat: Callable[[Authority, Pair], Cluster], authority: Authority, mode: AuthMode
) -> None:
    pair = authority.issue("server")
    cluster = turncoat(authority, pair)
    files = ServerTlsFiles(str(pair.cert), str(pair.key))
    with guarded_proxy(cluster, authority, client_tls=True, server_tls=True, files=files, auth=mode) as login:
        with login.connect("scram", channel_binding="require", require_auth="scram-sha-256") as c:
            assert c.execute("SELECT current_user").fetchone() == ("scram",)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            login.connect("scram", "wrong")


@needs_tls_server
class TestTheProxysCertificate:
    """The upstream's sslcert is for the server's eyes; it must not make a user of whoever connects to the proxy."""

    @pytest.fixture(scope="class")
    @classmethod
    def known(cls, authority: Authority) -> Pair:
        return authority.issue("certified", client=True)

    @pytest.fixture(scope="class", params=[False, True], ids=["unasked", "asked"])
    @classmethod
    def login(
        cls, request: pytest.FixtureRequest, tls_cluster: Cluster, authority: Authority, known: Pair, proxy_pair: Pair
    ) -> Iterator[Login]:
        ca = str(authority.file) if request.param else None
        files = ServerTlsFiles(str(proxy_pair.cert), str(proxy_pair.key), ca)
        with guarded_proxy(
            tls_cluster, authority, client_tls=True, server_tls=True, files=files,
            upstream={"sslcert": str(known.cert), "sslkey": str(known.key)},
        ) as made:
            yield made

    def test_it_lets_nobody_in(self, login: Login, authority: Authority) -> None:
        other = authority.issue("somebody", client=True)
        with pytest.raises(psycopg.OperationalError, match="own certificate must not log its clients in"):
            login.connect("certified", sslcert=str(other.cert), sslkey=str(other.key))

    def test_whoever_has_such_a_certificate_may(self, login: Login, known: Pair, request: pytest.FixtureRequest) -> None:
        parameters = {"sslcert": str(known.cert), "sslkey": str(known.key)}
        if request.node.callspec.params["login"]:
            with login.connect("certified", **parameters) as c:
                assert c.execute("SELECT current_user").fetchone() == ("certified",)
        else:
            with pytest.raises(psycopg.OperationalError, match="own certificate must not log its clients in"):
                login.connect("certified", **parameters)

    def test_with_a_password_beside_it_is_fine(self, login: Login, authority: Authority) -> None:
        other = authority.issue("somebody", client=True)
        with login.connect("both", sslcert=str(other.cert), sslkey=str(other.key)) as c:
            assert c.execute("SELECT current_user").fetchone() == ("both",)


@needs_tls_server
def test_certificates_are_the_servers_business_without_one_of_ours(both: Login) -> None:
    with pytest.raises(psycopg.OperationalError, match="connection requires a valid client certificate"):
        both.connect("certified")
