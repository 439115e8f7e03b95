"""Who answers the server: decided by the mode, the two connections, and what the server asks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import ScramMechanism

from proxy.authentication import Authenticator, AuthMode, Legs, RefusalError, Step
from proxy.wire import backend, build
from proxy.wire.frames import ProtocolError
from proxy.wire.messages import SCRAM_SHA_256, SCRAM_SHA_256_PLUS, Authentication

OURS, THEIRS = b"\1" * 32, b"\2" * 32
BOTH = Legs(client_tls=True, server_tls=True, binding=THEIRS, own_binding=OURS)
SAME = Legs(client_tls=True, server_tls=True, binding=OURS, own_binding=OURS)
CLIENT = Legs(client_tls=True, own_binding=OURS)
SERVER = Legs(server_tls=True, binding=THEIRS)
PLAIN = Legs()

OFFER = build.authentication_sasl([SCRAM_SHA_256_PLUS, SCRAM_SHA_256])[5:]
PLAIN_OFFER = build.authentication_sasl([SCRAM_SHA_256])[5:]
ASK = build.authentication(Authentication.CLEARTEXT_PASSWORD)


def r(code: int, data: bytes = b"") -> bytes:
    return build.authentication(Authentication(code), data)[5:]


def first(legs: Legs, payload: bytes, mode: AuthMode = AuthMode.AUTO) -> Step:
    return Authenticator(mode, legs, b"ann").request(payload)


@pytest.mark.parametrize("legs", [CLIENT, SERVER, PLAIN])
def test_bound_scram_is_not_offered_where_a_leg_is_plain(legs: Legs) -> None:
    assert first(legs, OFFER).to_client == build.authentication_sasl([SCRAM_SHA_256])


@pytest.mark.parametrize("mode", [AuthMode.AUTO, AuthMode.RELAY])
def test_it_is_where_both_show_the_same_certificate(mode: AuthMode) -> None:
    assert first(SAME, OFFER, mode).to_client[5:] == OFFER


@pytest.mark.parametrize(
    ("mode", "legs", "payload", "asks"),
    [
        (AuthMode.AUTO, BOTH, OFFER, True),
        # A server that can't bind takes the proof of a client that could.
        (AuthMode.AUTO, BOTH, PLAIN_OFFER, False),
        (AuthMode.AUTO, BOTH, r(Authentication.MD5_PASSWORD, b"salt"), False),
        (AuthMode.AUTO, Legs(client_tls=True, server_tls=True), OFFER, True),
        (AuthMode.RELAY, BOTH, OFFER, False),
        (AuthMode.PASSWORD, BOTH, PLAIN_OFFER, True),
        (AuthMode.PASSWORD, CLIENT, PLAIN_OFFER, True),
        (AuthMode.PASSWORD, CLIENT, r(Authentication.MD5_PASSWORD, b"salt"), True),
        *((mode, legs, payload, False) for mode in AuthMode for legs in (BOTH, CLIENT, SERVER, PLAIN) for payload in (
            r(Authentication.GSS), r(Authentication.SSPI), r(Authentication.KERBEROS_V5),
            build.authentication_sasl(["OAUTHBEARER"])[5:])),
    ],
)
def test_when_the_client_is_asked(mode: AuthMode, legs: Legs, payload: bytes, asks: bool) -> None:
    step = first(legs, payload, mode)
    assert step.to_server == b""
    assert step.to_client == ASK if asks else step.to_client[5:] == payload


@pytest.mark.parametrize("legs", [SERVER, PLAIN])
def test_never_in_the_open(legs: Legs) -> None:
    with pytest.raises(RefusalError) as caught:
        first(legs, PLAIN_OFFER, AuthMode.PASSWORD)
    assert caught.value.sqlstate == "28000"
    assert first(legs, r(Authentication.OK), AuthMode.PASSWORD).to_client == build.authentication(Authentication.OK)


def scram(password: str, binding: bytes | None) -> tuple[Authenticator, object, Step]:
    """An exchange up to the client's proof, with a server of the library."""
    mechanism = ScramMechanism(SCRAM_SHA_256_PLUS if binding else SCRAM_SHA_256)
    server = mechanism.make_server(
        lambda _: mechanism.make_auth_info("right"), channel_binding=("tls-server-end-point", binding) if binding else None)
    a = Authenticator(AuthMode.PASSWORD, BOTH, b"ann")
    assert a.request(OFFER if binding else PLAIN_OFFER).to_client == ASK
    assert a.asking
    assert not a.answering
    step = a.answer(password.encode() + b"\0")
    assert a.answering
    name, _, rest = step.to_server[5:].partition(b"\0")
    assert name.decode() == mechanism.name
    server.set_client_first(rest[4:].decode())
    payload = r(Authentication.SASL_CONTINUE, server.get_server_first().encode())
    assert a.is_slow(payload)
    return a, server, a.request(payload)


@pytest.mark.parametrize("binding", [THEIRS, None])
def test_the_whole_of_scram(binding: bytes | None) -> None:
    a, server, step = scram("right", binding)
    server.set_client_final(step.to_server[5:].decode())  # type: ignore[attr-defined]
    final = r(Authentication.SASL_FINAL, server.get_server_final().encode())  # type: ignore[attr-defined]
    assert a.request(final) == Step()
    assert a.request(r(Authentication.OK)).to_client == build.authentication(Authentication.OK)
    assert not a.answering
    assert a._auth is None  # and the password with it


def test_a_server_that_does_not_prove_to_know_the_password() -> None:
    a, _, _ = scram("right", THEIRS)
    with pytest.raises(RefusalError, match="without proving"):
        a.request(r(Authentication.OK))
    a, _, _ = scram("right", THEIRS)
    with pytest.raises(RefusalError, match="can't authenticate to the server"):
        a.request(r(Authentication.SASL_FINAL, b"v=" + b"A" * 43 + b"="))


def test_md5_and_clear() -> None:
    for payload, answer in (
        (r(Authentication.MD5_PASSWORD, b"salt"), build.password("md5681ab8ba24ea849cdf88e943182fb5e8")),
        (r(Authentication.CLEARTEXT_PASSWORD), build.password(b"p\xe4ss")),
    ):
        a = Authenticator(AuthMode.PASSWORD, CLIENT, b"ann")
        a.request(payload)
        assert a.answer(b"p\xe4ss\0").to_server == answer
        assert a.request(r(Authentication.OK)).to_client


@pytest.mark.parametrize("payload", [b"", b"no end", b"two\0texts\0"])
def test_malformed_passwords(payload: bytes) -> None:
    a = Authenticator(AuthMode.AUTO, BOTH, b"ann")
    a.request(OFFER)
    with pytest.raises(ProtocolError):
        a.answer(payload)


def test_a_second_password() -> None:
    a = Authenticator(AuthMode.AUTO, BOTH, b"ann")
    a.request(OFFER)
    a.answer(b"x\0")
    with pytest.raises(ProtocolError):
        a.answer(b"x\0")


@pytest.mark.parametrize(
    ("legs", "mechanism", "header", "refused"),
    [
        (BOTH, SCRAM_SHA_256_PLUS, b"p=tls-server-end-point,,", True),
        (BOTH, SCRAM_SHA_256, b"y,,", True),
        (BOTH, SCRAM_SHA_256, b"n,,", False),
        (SAME, SCRAM_SHA_256_PLUS, b"p=tls-server-end-point,,", False),
        (CLIENT, SCRAM_SHA_256, b"y,,", False),
    ],
)
def test_relayed_scram_that_the_server_would_refuse(legs: Legs, mechanism: str, header: bytes, refused: bool) -> None:
    a = Authenticator(AuthMode.RELAY, legs, b"ann")
    a.request(OFFER)
    message = build.sasl_initial(mechanism, header + b"n=,r=abc")
    if refused:
        with pytest.raises(RefusalError) as caught:
            a.answer(message[5:])
        assert "channel_binding=disable" in (caught.value.hint or "")
    else:
        assert a.answer(message[5:]).to_server == message


@pytest.mark.parametrize(
    ("name", "challenged", "refused"), [(None, False, True), (b"bob", False, True), (b"ann", False, False), (None, True, False)])
def test_the_proxys_certificate_is_nobodys_login(name: bytes | None, challenged: bool, refused: bool) -> None:
    legs = Legs(client_tls=True, server_tls=True, certificate_sent=True, client_name=name)
    a = Authenticator(AuthMode.AUTO, legs, b"ann")
    if challenged:
        a.request(r(Authentication.MD5_PASSWORD, b"salt"))
        a.answer(b"md5...\0")
    if refused:
        with pytest.raises(RefusalError, match="own certificate"):
            a.request(r(Authentication.OK))
    else:
        assert a.request(r(Authentication.OK)).to_client == build.authentication(Authentication.OK)


def test_the_password_is_in_no_repr() -> None:
    a = Authenticator(AuthMode.AUTO, BOTH, b"ann")
    a.request(OFFER)
    a.answer(b"hunter2\0")
    assert "hunter2" not in repr(a) + repr(vars(a))


@given(
    st.sampled_from(list(AuthMode)), st.sampled_from([BOTH, SAME, CLIENT, SERVER, PLAIN]),
    st.lists(st.tuples(st.booleans(), st.sampled_from([OFFER, PLAIN_OFFER, r(5, b"salt"), r(3), r(0), r(11, b"r=x"), r(12)]) | st.binary(max_size=40))),
)
def test_whatever_comes(mode: AuthMode, legs: Legs, messages: list[tuple[bool, bytes]]) -> None:
    """An answer, a refusal or a violation of the protocol; nothing else is raised, and nothing reaches both sides at once."""
    a = Authenticator(mode, legs, b"ann")
    for from_server, payload in messages:
        try:
            step = a.request(payload) if from_server else a.answer(payload)
        except (RefusalError, ProtocolError):
            return
        assert not (step.to_client and step.to_server)
        if from_server and step.to_client and step.to_client != ASK:
            assert backend.authentication_code(step.to_client[5:]) == backend.authentication_code(payload)
