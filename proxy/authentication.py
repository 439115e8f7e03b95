"""Who answers the server's questions for a password: the client, or the proxy with the password that the client gave.

Relayed authentication is the rule. It can't work for SCRAM with TLS on both sides: the client is on a connection that
it could bind its proof to, the server knows of one too, and they are not the same. There the proxy asks the client for
its password in clear, inside the client's TLS, and answers the server itself. The password is forgotten with the last
answer. Sans-IO: messages in, messages out.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from proxy.wire import backend, build
from proxy.wire.auth import AuthenticationError, ClientAuth
from proxy.wire.frames import ProtocolError
from proxy.wire.messages import SCRAM_SHA_256, SCRAM_SHA_256_PLUS, Authentication, Backend, Frontend


class AuthMode(Enum):
    """The setting `auth`.

    AUTO: relayed wherever that can work, asked for otherwise. RELAY: never asked for. PASSWORD: always asked for.
    """

    AUTO = "auto"
    RELAY = "relay"
    PASSWORD = "password"


class RefusalError(Exception):
    """The session can't go on; what the client is told."""

    def __init__(self, sqlstate: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Legs:
    """What is known of a session's two connections.

    `binding` is the channel binding data of the server's certificate, `own_binding` that of the certificate that the
    client was shown (None: no TLS on that connection, or a certificate without any). `certificate_sent`: the proxy
    has a certificate for the server to log in by. `client_name` is the common name in the client's certificate, where
    one was verified.
    """

    client_tls: bool = False
    server_tls: bool = False
    binding: bytes | None = None
    own_binding: bytes | None = None
    certificate_sent: bool = False
    client_name: bytes | None = None

    @property
    def same_certificate(self) -> bool:
        """Whether the client sees the certificate that the server shows: a bound proof then fits both connections."""
        return (
            self.binding is not None and self.own_binding is not None
            and hmac.compare_digest(self.binding, self.own_binding)
        )


class Step(NamedTuple):
    """What to send to whom; empty: nothing."""

    to_client: bytes = b""
    to_server: bytes = b""


class _State(Enum):
    RELAYING = "the client answers the server"
    ASKED = "the client was asked for its password"
    ANSWERING = "the proxy answers the server"


#: Requests that a password answers.
_PASSWORD_CODES: Final = (Authentication.CLEARTEXT_PASSWORD, Authentication.MD5_PASSWORD)


class Authenticator:
    """Takes the server's Authentication messages and the client's answers of one session, in their order."""

    def __init__(self, mode: AuthMode, legs: Legs, user: bytes) -> None:
        self._mode = mode
        self._legs = legs
        self._user = user
        self._state = _State.RELAYING
        self._challenged = False
        self._request = b""  # the server's, while the client is asked
        self._auth: ClientAuth | None = None

    @property
    def asking(self) -> bool:
        """Whether the client was asked for its password and has not answered."""
        return self._state is _State.ASKED

    @property
    def answering(self) -> bool:
        """Whether the proxy talks with the server now, and the client has to wait."""
        return self._state is _State.ANSWERING

    def is_slow(self, payload: bytes) -> bool:
        """Whether `request` will take long with this payload, and should be called in a thread."""
        return self._state is _State.ANSWERING and ClientAuth.is_slow(payload)

    def request(self, payload: bytes) -> Step:
        """The server sent an Authentication message with this payload.

        Raises RefusalError, and ProtocolError where the payload is malformed.
        """
        code = backend.authentication_code(payload)
        if code == Authentication.OK:
            return self._accepted(payload)
        if self._auth is not None:
            return Step(to_server=self._respond(payload))
        first, self._challenged = not self._challenged, True
        offered = backend.sasl_mechanisms(payload) if code == Authentication.SASL else []
        if first and self._must_ask(code, offered):
            self._state, self._request = _State.ASKED, payload
            return Step(to_client=build.authentication(Authentication.CLEARTEXT_PASSWORD))
        if SCRAM_SHA_256_PLUS in offered and not (self._legs.client_tls and self._legs.server_tls):
            # It binds the proof to one TLS connection from end to end, which there is not.
            return Step(to_client=build.authentication_sasl([n for n in offered if n != SCRAM_SHA_256_PLUS]))
        return Step(to_client=build.message(Backend.AUTHENTICATION, payload))

    def answer(self, payload: bytes) -> Step:
        """The client sent a message of type `p` with this payload. Raises as `request` does."""
        if self._state is _State.ASKED:
            password, end, rest = payload.partition(b"\0")
            if not end or rest:
                raise ProtocolError("a password message is not one zero-terminated text")
            self._state = _State.ANSWERING
            self._auth = ClientAuth(self._user, password, self._legs.binding)
            request, self._request = self._request, b""
            return Step(to_server=self._respond(request))
        if self._state is _State.ANSWERING:
            raise ProtocolError("a second password message")
        self._check_relayed(payload)
        return Step(to_server=build.message(Frontend.PASSWORD, payload))

    def _accepted(self, payload: bytes) -> Step:
        if self._auth is not None:
            self._respond(payload)
            self._auth = None
            self._state = _State.RELAYING
        elif not self._challenged and self._legs.certificate_sent and self._legs.client_name != self._user:
            # The server asked for nothing: perhaps the proxy's own certificate was enough for it. Anybody who can
            # reach the proxy would be whoever that certificate is for.
            raise RefusalError(
                "28000",
                "the server asked for no password, and dfproxy's own certificate must not log its clients in",
                hint="Let the server ask for a password besides the certificate (clientcert=verify-ca in pg_hba.conf), "
                "or give the client a certificate with its user as common name, and dfproxy the setting tls_client_ca.",
            )
        return Step(to_client=build.message(Backend.AUTHENTICATION, payload))

    def _must_ask(self, code: int, offered: list[str]) -> bool:
        scram = SCRAM_SHA_256 in offered or SCRAM_SHA_256_PLUS in offered
        if self._mode is AuthMode.RELAY or not (code in _PASSWORD_CODES or scram):
            return False
        if self._mode is AuthMode.PASSWORD:
            if not self._legs.client_tls:
                raise RefusalError(
                    "28000",
                    "dfproxy asks for the password, and does so over TLS only",
                    hint="Connect with sslmode=require, or set dfproxy's auth to auto.",
                )
            return True
        return (
            SCRAM_SHA_256_PLUS in offered
            and self._legs.client_tls and self._legs.server_tls and not self._legs.same_certificate
        )

    def _check_relayed(self, payload: bytes) -> None:
        """Refuses, with a reason, a SASLInitialResponse that the server would have to refuse without one."""
        legs = self._legs
        if not (legs.client_tls and legs.server_tls) or legs.same_certificate:
            return
        mechanism, _, rest = payload.partition(b"\0")
        if mechanism == SCRAM_SHA_256_PLUS.encode() or (mechanism == SCRAM_SHA_256.encode() and rest[4:6] == b"y,"):
            raise RefusalError(
                "28000",
                "SCRAM can't be relayed for a client that binds it to its own TLS connection",
                hint="Set dfproxy's auth to auto, or channel_binding=disable in the client, or give dfproxy the "
                "server's own certificate.",
            )

    def _respond(self, payload: bytes) -> bytes:
        assert self._auth is not None
        try:
            return self._auth.respond(payload) or b""
        except AuthenticationError as e:
            raise RefusalError("28000", f"dfproxy can't authenticate to the server: {e}") from e
