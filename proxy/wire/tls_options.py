"""How to protect a connection to a PostgreSQL server: libpq's `ssl…` parameters, and the context that they ask for."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from proxy.wire.tls import ALPN

#: libpq's value of `sslrootcert` for the certificate authorities that the system trusts.
SYSTEM: Final = "system"
#: Where libpq looks for root certificates unless it is told, below the home directory.
_DEFAULT_ROOT: Final = ".postgresql/root.crt"
_VERSIONS: Final = {
    "tlsv1": ssl.TLSVersion.TLSv1,
    "tlsv1.1": ssl.TLSVersion.TLSv1_1,
    "tlsv1.2": ssl.TLSVersion.TLSv1_2,
    "tlsv1.3": ssl.TLSVersion.TLSv1_3,
}
#: Connection parameters that are read here, and the environment variable of each.
PARAMETERS: Final = {
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslpassword": "",  # libpq knows no variable for it
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
}


class SslMode(Enum):
    """What libpq's `sslmode` asks for. `allow` is read as PREFER: TLS where there is any, plain otherwise."""

    DISABLE = "disable"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"

    @property
    def verifies(self) -> bool:
        return self in (SslMode.VERIFY_CA, SslMode.VERIFY_FULL)


class TlsConfigError(ValueError):
    """Parameters or files that can't be used; the text is for the person who gave them."""


def tls_version(text: str, parameter: str) -> ssl.TLSVersion:
    """`TLSv1.2` and the like. Raises TlsConfigError, which names `parameter`."""
    try:
        return _VERSIONS[text.lower()]
    except KeyError:
        raise TlsConfigError(f"{parameter} is one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3") from None


@dataclass(frozen=True)
class ClientTls:
    """The parameters, with libpq's meanings (libpq, "Parameter Key Words"). Paths are those of files in PEM."""

    mode: SslMode = SslMode.PREFER
    negotiation: Literal["postgres", "direct"] = "postgres"
    root: str | None = None  # a file, or SYSTEM
    certificate: str | None = None
    key: str | None = None
    key_password: str | None = field(default=None, repr=False)
    crl: str | None = None
    crl_dir: str | None = None
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    maximum: ssl.TLSVersion | None = None

    @classmethod
    def from_parameters(cls, given: Mapping[str, str], environ: Mapping[str, str] | None = None) -> ClientTls:
        """What a connection string says, by the names of PARAMETERS; others are ignored.

        What is missing comes from libpq's environment variables. Raises TlsConfigError.
        """
        environ = os.environ if environ is None else environ

        def value(name: str) -> str | None:
            return given.get(name) or environ.get(PARAMETERS[name]) or None

        root, text = value("sslrootcert"), value("sslmode")
        if text is None:
            # libpq: the system's authorities vouch for anybody, so a name has to be checked too.
            text = "verify-full" if root == SYSTEM else "prefer"
        try:
            mode = SslMode.PREFER if text == "allow" else SslMode(text)
        except ValueError:
            raise TlsConfigError(
                "sslmode is one of disable, allow, prefer, require, verify-ca, verify-full") from None
        if root == SYSTEM and mode is not SslMode.VERIFY_FULL:
            raise TlsConfigError("sslrootcert=system needs sslmode=verify-full")
        negotiation = value("sslnegotiation") or "postgres"
        if negotiation not in ("postgres", "direct"):
            raise TlsConfigError("sslnegotiation is postgres or direct")
        if negotiation == "direct" and mode in (SslMode.DISABLE, SslMode.PREFER):
            raise TlsConfigError("sslnegotiation=direct needs sslmode=require, verify-ca or verify-full")
        certificate, key = value("sslcert"), value("sslkey")
        if (certificate is None) != (key is None):
            raise TlsConfigError("sslcert and sslkey go together")
        low, high = value("ssl_min_protocol_version"), value("ssl_max_protocol_version")
        return cls(
            mode, cast("Literal['postgres', 'direct']", negotiation), root, certificate, key, value("sslpassword"),
            value("sslcrl"), value("sslcrldir"),
            tls_version(low, "ssl_min_protocol_version") if low else ssl.TLSVersion.TLSv1_2,
            tls_version(high, "ssl_max_protocol_version") if high else None,
        )

    def context(self) -> ssl.SSLContext:
        """A context for connections in the client role. Reads the files. Raises TlsConfigError.

        As in libpq a certificate is verified in every mode if there is a root certificate to verify it by.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.mode is SslMode.VERIFY_FULL
        context.set_alpn_protocols([ALPN])
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.minimum_version = self.minimum
        if self.maximum is not None:
            context.maximum_version = self.maximum
        if self.root == SYSTEM:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        elif (root := self.root or self._default_root()) is not None:
            _load(context.load_verify_locations, "sslrootcert", root)
        elif self.mode.verifies:
            raise TlsConfigError(f"sslmode={self.mode.value} needs sslrootcert: a file, or \"system\"")
        else:
            context.verify_mode = ssl.CERT_NONE
        if self.crl is not None or self.crl_dir is not None:
            if self.crl is not None:
                _load(context.load_verify_locations, "sslcrl", self.crl)
            if self.crl_dir is not None:
                _load(lambda path: context.load_verify_locations(capath=path), "sslcrldir", self.crl_dir)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        if self.certificate is not None and self.key is not None:
            load_identity(context, self.certificate, self.key, ("sslcert", "sslkey"), self.key_password)
        return context

    def _default_root(self) -> str | None:
        path = os.path.join(os.path.expanduser("~"), _DEFAULT_ROOT)  # unlike Path.home() happy without a home
        return path if os.path.exists(path) else None


def load_identity(context: ssl.SSLContext, certificate: str, key: str, parameters: tuple[str, str],
                  password: str | None = None) -> None:
    """Gives `context` a certificate (with its chain) and its key. Raises TlsConfigError, which names the parameters."""

    def asked() -> str:
        # Without this OpenSSL would ask on the terminal, and wait.
        if password is None:
            raise TlsConfigError(f"the key in {parameters[1]} ({key}) is encrypted, and no password was given")
        return password

    for name, path in zip(parameters, (certificate, key), strict=True):
        _readable(name, path)
    try:
        context.load_cert_chain(certificate, key, asked)
    except (ssl.SSLError, ValueError) as e:
        if isinstance(e, TlsConfigError):
            raise
        if isinstance(e, ssl.SSLError) and e.reason == "KEY_VALUES_MISMATCH":
            raise TlsConfigError(
                f"the key in {parameters[1]} ({key}) is not that of the certificate in {parameters[0]} ({certificate})"
            ) from e
        raise TlsConfigError(f"{parameters[0]} ({certificate}) with {parameters[1]} ({key}) can't be used: {e}") from e


def _load(load: Callable[[str], object], parameter: str, path: str) -> None:
    _readable(parameter, path)
    try:
        load(path)
    except (ssl.SSLError, OSError) as e:
        raise TlsConfigError(f"{parameter} ({path}) can't be used: {e}") from e


def _readable(parameter: str, path: str) -> None:
    """Says which file it is; ssl's own errors do not."""
    try:
        if not Path(path).is_dir():
            with Path(path).open("rb"):
                pass
    except OSError as e:
        raise TlsConfigError(f"{parameter} ({path}) can't be read: {e.strerror}") from e


#: libpq's other connection parameters that asyncpg would take for settings of the server, which then refuses them.
_LIBPQ_ONLY: Final = frozenset({
    "channel_binding", "client_encoding", "connect_timeout", "fallback_application_name", "gssdelegation", "gssencmode",
    "hostaddr", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "load_balance_hosts",
    "max_protocol_version", "min_protocol_version", "require_auth", "requirepeer", "requiressl", "sslcertmode",
    "sslcompression", "sslkeylogfile", "sslsni", "tcp_user_timeout",
})


def for_asyncpg(uri: str, environ: Mapping[str, str] | None = None) -> tuple[str, dict[str, Any]]:
    """A libpq URI as asyncpg understands it: the URI without what asyncpg doesn't know, and arguments for `connect`.

    asyncpg has its own reading of most `ssl…` parameters, but not of `sslrootcert=system`. Reads the files that are
    named. Raises TlsConfigError.
    """
    parts = urlsplit(uri)
    query = parse_qsl(parts.query, keep_blank_values=True)
    tls = ClientTls.from_parameters(dict(query), environ)
    kept = [(name, value) for name, value in query if name not in PARAMETERS and name not in _LIBPQ_ONLY]
    arguments: dict[str, Any] = {"ssl": False}
    if tls.mode is SslMode.PREFER:
        # asyncpg's own word: a context would mean that TLS is required.
        arguments = {"ssl": "prefer"}
    elif tls.mode is not SslMode.DISABLE:
        arguments = {"ssl": tls.context(), "direct_tls": tls.negotiation == "direct"}
    options = "?" + urlencode(kept) if kept else ""
    # urlunsplit would drop the slashes where there is no host.
    return f"{parts.scheme}://{parts.netloc}{parts.path}{options}", arguments
