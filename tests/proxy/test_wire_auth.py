"""Authentication in the client role, against real servers and against servers that misbehave."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from scramp import ScramMechanism

from proxy.embedded import Cluster
from proxy.wire import backend, build
from proxy.wire.auth import AuthenticationError, ClientAuth
from proxy.wire.frames import FrameParser, ProtocolError
from proxy.wire.messages import SCRAM_SHA_256, SCRAM_SHA_256_PLUS, Authentication, Backend
from tests.fix_postgres import running_cluster, versions

METHODS = ("trust", "password", "md5", "scram-sha-256")
HBA = ["local all all trust", *(f"host all {m.partition('-')[0]} 127.0.0.1/32 {m}" for m in METHODS),
       "host all all 127.0.0.1/32 trust"]
PASSWORD = "pä ss'word"


@pytest.fixture(scope="module", params=versions(), ids=lambda v: f"pg{v}")
def guarded(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server on which the role `md5` logs in by md5, and so on."""
    with running_cluster(request.param, hba=HBA) as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            for method in METHODS:
                name = method.partition("-")[0]
                c.execute(f"SET password_encryption = '{'md5' if name == 'md5' else 'scram-sha-256'}'")
                c.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
        yield cluster


@dataclass(frozen=True)
class Refused(Exception):
    sqlstate: str


def log_in(cluster: Cluster, auth: ClientAuth) -> None:
    """Logs in; raises Refused with what the server says."""
    parser = FrameParser()
    with socket.create_connection(("127.0.0.1", cluster.port or 0), timeout=30) as s:
        s.sendall(build.startup({"user": auth.user, "database": "postgres"}))
        while True:
            while (frame := parser.next_frame()) is not None:
                if frame.type == Backend.AUTHENTICATION:
                    answer = auth.respond(frame.payload)
                    if answer is not None:
                        s.sendall(answer)
                elif frame.type == Backend.ERROR_RESPONSE:
                    raise Refused(backend.error_fields(frame.payload)["C"])
                elif frame.type == Backend.READY_FOR_QUERY:
                    s.sendall(build.terminate())
                    return
            data = s.recv(4096)
            assert data
            parser.feed(data)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(guarded: Cluster, method: str) -> None:
    auth = ClientAuth(method.partition("-")[0], PASSWORD)
    log_in(guarded, auth)
    assert auth.done


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_wrong_password(guarded: Cluster, method: str) -> None:
    with pytest.raises(Refused) as caught:
        log_in(guarded, ClientAuth(method.partition("-")[0], "wrong"))
    assert caught.value.sqlstate == "28P01"


@pytest.mark.parametrize("method", METHODS[1:])
def test_no_password(guarded: Cluster, method: str) -> None:
    with pytest.raises(AuthenticationError, match="none was given"):
        log_in(guarded, ClientAuth(method.partition("-")[0]))


def test_the_password_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(ClientAuth("ann", "hunter2"))


def _r(code: int, data: bytes = b"") -> bytes:
    return build.authentication(Authentication(code), data)[5:]


def _scram(auth: ClientAuth, mechanisms: tuple[str, ...] = (SCRAM_SHA_256,)) -> bytes:
    answer = auth.respond(build.authentication_sasl(mechanisms)[5:])
    assert answer is not None
    return answer


def test_a_server_that_skips_the_proof_of_scram() -> None:
    auth = ClientAuth("ann", "x")
    _scram(auth)
    with pytest.raises(AuthenticationError, match="without proving"):
        auth.respond(_r(Authentication.OK))
    assert not auth.done


def test_a_server_that_does_not_know_the_password() -> None:
    auth = ClientAuth("ann", "x")
    first = _scram(auth)
    mechanism = ScramMechanism()
    server = mechanism.make_server(lambda _: mechanism.make_auth_info("another password"))
    server.set_client_first(first[first.index(b"n,,") :].decode())
    auth.respond(_r(Authentication.SASL_CONTINUE, server.get_server_first().encode()))
    with pytest.raises(AuthenticationError):
        auth.respond(_r(Authentication.SASL_FINAL, b"v=" + b"A" * 43 + b"="))


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\xff\xfe", b"r=short,s=AAAA,i=4096", b"i=99999999999,r=x,s=AAAA", b"r=x,s=AAAA,i=2147483647"]
)
def test_malformed_scram_challenges(data: bytes) -> None:
    auth = ClientAuth("ann", "x")
    _scram(auth)
    with pytest.raises(AuthenticationError):
        auth.respond(_r(Authentication.SASL_CONTINUE, data))


@pytest.mark.parametrize("code", [Authentication.SASL_CONTINUE, Authentication.SASL_FINAL])
def test_scram_steps_out_of_place(code: Authentication) -> None:
    with pytest.raises(AuthenticationError, match="without having started"):
        ClientAuth("ann", "x").respond(_r(code, b"r=x"))


def test_scram_twice() -> None:
    auth = ClientAuth("ann", "x")
    _scram(auth)
    with pytest.raises(AuthenticationError, match="twice"):
        _scram(auth)


def test_channel_binding_is_used_only_where_there_is_any() -> None:
    both = (SCRAM_SHA_256_PLUS, SCRAM_SHA_256)
    assert b"SCRAM-SHA-256\0" in _scram(ClientAuth("ann", "x"), both)
    bound = _scram(ClientAuth("ann", "x", channel_binding=b"\1" * 32), both)
    assert b"SCRAM-SHA-256-PLUS\0" in bound
    assert b"p=tls-server-end-point,," in bound
    with pytest.raises(AuthenticationError, match="offers only SCRAM-SHA-256-PLUS"):
        _scram(ClientAuth("ann", "x"), (SCRAM_SHA_256_PLUS,))


def test_cleartext_can_be_refused() -> None:
    with pytest.raises(AuthenticationError, match="in clear"):
        ClientAuth("ann", "x", allow_cleartext=False).respond(_r(Authentication.CLEARTEXT_PASSWORD))


@pytest.mark.parametrize("code", [Authentication.GSS, Authentication.KERBEROS_V5, Authentication.SSPI])
def test_methods_that_are_not_supported_are_named(code: Authentication) -> None:
    with pytest.raises(AuthenticationError, match=code.name):
        ClientAuth("ann", "x").respond(_r(code))
    with pytest.raises(AuthenticationError, match="number 99"):
        ClientAuth("ann", "x").respond(b"\0\0\0\x63")


def test_malformed_requests() -> None:
    with pytest.raises(ProtocolError):
        ClientAuth("ann", "x").respond(b"\0")
    with pytest.raises(AuthenticationError, match="salt"):
        ClientAuth("ann", "x").respond(_r(Authentication.MD5_PASSWORD, b"ab"))
