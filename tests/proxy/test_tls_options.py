"""libpq's `ssl…` parameters, and TLS without I/O."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.settings import Settings, SettingsError, load
from proxy.upstream import Upstream
from proxy.wire.tls import ALPN, TlsStream, common_name, server_end_point
from proxy.wire.tls_options import ClientTls, SslMode, TlsConfigError
from tests.fix_certificates import Authority, new_authority


def parse(environ: dict[str, str] | None = None, **given: str) -> ClientTls:
    return ClientTls.from_parameters(given, environ or {})


def test_the_defaults_are_libpqs() -> None:
    tls = parse()
    assert tls == ClientTls()
    assert (tls.mode, tls.negotiation, tls.minimum) == (SslMode.PREFER, "postgres", ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "verify-ca", "verify-full"])
def test_modes(mode: str) -> None:
    assert parse(sslmode=mode).mode.value == mode


def test_allow_is_read_as_prefer() -> None:
    assert parse(sslmode="allow").mode is SslMode.PREFER


def test_the_environment_fills_in() -> None:
    environ = {"PGSSLMODE": "require", "PGSSLROOTCERT": "/ca", "PGSSLNEGOTIATION": "direct"}
    tls = parse(environ)
    assert (tls.mode, tls.root, tls.negotiation) == (SslMode.REQUIRE, "/ca", "direct")
    assert parse(environ, sslmode="verify-full").mode is SslMode.VERIFY_FULL


def test_the_system_means_verify_full() -> None:
    assert parse(sslrootcert="system").mode is SslMode.VERIFY_FULL


@pytest.mark.parametrize(
    "given",
    [
        {"sslmode": "yes"},
        {"sslmode": "require", "sslrootcert": "system"},
        {"sslnegotiation": "direct"},
        {"sslnegotiation": "maybe", "sslmode": "require"},
        {"sslcert": "/x"},
        {"sslkey": "/x"},
        {"ssl_min_protocol_version": "SSLv3"},
        {"ssl_max_protocol_version": "1.2"},
    ],
)
def test_mistakes(given: dict[str, str]) -> None:
    with pytest.raises(TlsConfigError) as caught:
        parse(**given)
    assert any(name.partition("_m")[0] in str(caught.value) for name in given)


def test_an_upstream_says_it_in_both_notations() -> None:
    for dsn in ("postgresql://h/d?sslmode=verify-ca&sslrootcert=/a%20b", "host=h sslmode=verify-ca sslrootcert='/a b'"):
        upstream = Upstream.parse(dsn)
        assert (upstream.tls.mode, upstream.tls.root) == (SslMode.VERIFY_CA, "/a b")
    with pytest.raises(ValueError, match="sslmode is one of"):
        Upstream.parse("postgresql://h/d?sslmode=on")


def test_the_name_to_verify_with_hostaddr() -> None:
    upstream = Upstream.parse("host=a,b hostaddr=10.0.0.1,10.0.0.2 port=1,2")
    assert [(x.host, x.port, x.server_name) for x in upstream.addresses] == [("10.0.0.1", 1, "a"), ("10.0.0.2", 2, "b")]


def test_passwords_of_keys_are_in_no_repr() -> None:
    assert "hunter2" not in repr(parse(sslcert="/c", sslkey="/k", sslpassword="hunter2"))


def test_contexts(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = str(authority.file)
    for mode in ("prefer", "require"):
        assert parse(sslmode=mode).context().verify_mode is ssl.CERT_NONE
        # As in libpq: what there is to verify by is used.
        assert parse(sslmode=mode, sslrootcert=root).context().verify_mode is ssl.CERT_REQUIRED
    for mode in ("verify-ca", "verify-full"):
        context = parse(sslmode=mode, sslrootcert=root).context()
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, mode == "verify-full")
        with pytest.raises(TlsConfigError, match="needs sslrootcert"):
            parse(sslmode=mode).context()
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").write_bytes(authority.file.read_bytes())
    assert parse(sslmode="verify-ca").context().verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize("name", ["sslrootcert", "sslcrl", "sslcert", "sslkey"])
def test_files_that_are_not_there(authority: Authority, tmp_path: Path, name: str) -> None:
    pair = authority.issue("client", client=True)
    given = {"sslmode": "require", "sslrootcert": str(authority.file), "sslcert": str(pair.cert), "sslkey": str(pair.key)}
    parse(**given).context()
    with pytest.raises(TlsConfigError, match=rf"^{name} \(/nowhere/x\) can't be read: No such file"):
        parse(**{**given, name: "/nowhere/x"}).context()
    bad = tmp_path / "bad"
    bad.write_text("nonsense")
    with pytest.raises(TlsConfigError, match=name):
        parse(**{**given, name: str(bad)}).context()


def test_keys_with_a_password(authority: Authority) -> None:
    pair = authority.issue("client", client=True, key_password="hunter2")
    given = {"sslcert": str(pair.cert), "sslkey": str(pair.key)}
    parse(**given, sslpassword="hunter2").context()
    with pytest.raises(TlsConfigError, match="is encrypted, and no password was given"):
        parse(**given).context()
    with pytest.raises(TlsConfigError, match="can't be used"):
        parse(**given, sslpassword="wrong").context()


def test_settings_that_belong_together() -> None:
    def loaded(**flags: object) -> Settings:
        return load(flags, environ={}, folder=Path("/nonexistent"))

    assert loaded(tls_cert="/c", tls_key="/k", tls_required="on").tls_required
    for flags in ({"tls_cert": "/c"}, {"tls_key": "/k"}, {"tls_required": "on"}, {"tls_client_ca": "/ca"}):
        with pytest.raises(SettingsError, match="tls_cert"):
            loaded(**flags)
    with pytest.raises(SettingsError, match="auth"):
        loaded(auth="md5")


# --- channel binding ---


@pytest.mark.parametrize(
    ("kind", "digest", "pss", "expected"),
    [
        ("rsa", hashes.SHA256(), False, "sha256"),
        ("rsa", hashes.SHA384(), False, "sha384"),
        ("rsa", hashes.SHA512(), False, "sha512"),
        ("rsa", hashes.SHA512(), True, "sha512"),
        ("ec", hashes.SHA256(), False, "sha256"),
        ("ec", hashes.SHA384(), False, "sha384"),
        ("ed25519", None, False, None),
    ],
)
def test_the_hash_of_a_certificate(kind: str, digest: hashes.HashAlgorithm | None, pss: bool, expected: str | None) -> None:
    with new_authority("x", kind=kind) as authority:
        der = authority.issue("server", digest=digest, pss=pss).der
    assert server_end_point(der) == (hashlib.new(expected, der).digest() if expected else None)


def test_weak_hashes_are_replaced(authority: Authority) -> None:
    """RFC 5929: SHA-256 in the place of MD5 and SHA-1. The signature's name is swapped: nobody signs so any more."""
    with new_authority("x", kind="rsa") as old:
        der = old.issue("server").der
    sha256 = bytes.fromhex("06092a864886f70d01010b")
    assert der.count(sha256) == 2
    for weak in ("06092a864886f70d010104", "06092a864886f70d010105"):  # md5WithRSA, sha1WithRSA
        swapped = der.replace(sha256, bytes.fromhex(weak))
        assert server_end_point(swapped) == hashlib.sha256(swapped).digest()


def test_common_names(authority: Authority) -> None:
    assert common_name(authority.issue("Ann Müller", client=True).der) == "Ann Müller"


@given(st.binary(max_size=200))
def test_certificates_that_are_none(data: bytes) -> None:
    for function in (server_end_point, common_name):
        with pytest.raises(ValueError):
            function(data)


# --- TLS without I/O ---


def shake(client: TlsStream, server: TlsStream) -> None:
    while not (client.handshake() & server.handshake()):
        server.feed(client.outgoing())
        server.handshake()
        client.feed(server.outgoing())
    server.feed(client.outgoing())
    client.feed(server.outgoing())


def contexts(authority: Authority) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    pair = authority.issue("server")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair.cert, pair.key)
    server.set_alpn_protocols([ALPN])
    return ClientTls(SslMode.VERIFY_FULL, root=str(authority.file)).context(), server


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_bytes_arrive_however_they_are_split(authority: Authority, data: st.DataObject) -> None:
    ours, theirs = contexts(authority)
    client = TlsStream(ours, server_side=False, server_hostname="localhost")
    server = TlsStream(theirs, server_side=True)
    shake(client, server)
    assert (client.alpn, server.alpn) == (ALPN, ALPN)
    for sender, receiver in ((client, server), (server, client)):
        chunks = data.draw(st.lists(st.binary(max_size=50_000), max_size=5))
        sender.write(chunks)
        wire, got = sender.outgoing(), b""
        while wire:
            size = data.draw(st.integers(1, len(wire)))
            receiver.feed(wire[:size])
            got += receiver.read()
            wire = wire[size:]
        assert got == b"".join(chunks)
        assert not receiver.ended


def test_one_direction_may_end_before_the_other(authority: Authority) -> None:
    ours, theirs = contexts(authority)
    client = TlsStream(ours, server_side=False, server_hostname="localhost")
    server = TlsStream(theirs, server_side=True)
    shake(client, server)
    client.write([b"question"])
    client.write_eof()
    server.feed(client.outgoing())
    assert server.read() == b"question"
    assert server.ended
    server.write([b"answer" * 10_000])
    server.write_eof()
    client.feed(server.outgoing())
    assert client.read() == b"answer" * 10_000
    assert client.ended
    with pytest.raises(ssl.SSLError):
        client.write([b"more"])


def test_damage_is_noticed(authority: Authority) -> None:
    ours, theirs = contexts(authority)
    client = TlsStream(ours, server_side=False, server_hostname="localhost")
    server = TlsStream(theirs, server_side=True)
    shake(client, server)
    client.write([b"question"])
    wire = bytearray(client.outgoing())
    wire[-1] ^= 1
    server.feed(wire)
    with pytest.raises(ssl.SSLError):
        server.read()
    assert server.outgoing()  # the alert


def test_names_are_verified(authority: Authority) -> None:
    ours, theirs = contexts(authority)
    client = TlsStream(ours, server_side=False, server_hostname="elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(client, TlsStream(theirs, server_side=True))
