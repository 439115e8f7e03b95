"""The client side of authentication, sans-IO: the server's Authentication messages in, the client's answers out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from scramp import ScramClient, ScramException

from proxy.wire import backend, build
from proxy.wire.messages import SCRAM_SHA_256, SCRAM_SHA_256_PLUS, Authentication

#: PBKDF2 rounds that a server may ask for. Each million costs the event loop about half a second.
MAX_ITERATIONS: Final = 1_000_000
#: PostgreSQL takes the user from the startup packet and ignores SCRAM's; RFC 5802 and the library want one.
_SCRAM_USER: Final = "*"


class AuthenticationError(Exception):
    """Authentication can't go on: the server asks for what we won't give, or doesn't prove to know the password."""


@dataclass
class ClientAuth:
    """Answers a server's Authentication messages for one connection.

    `channel_binding` is the data of `tls-server-end-point` (the hash of the server's certificate) on a TLS connection:
    with it SCRAM-SHA-256-PLUS is preferred where the server offers it. `done` is true after AuthenticationOk.
    """

    user: str
    password: str | None = field(default=None, repr=False)
    channel_binding: bytes | None = field(default=None, repr=False)
    allow_cleartext: bool = True
    done: bool = field(default=False, init=False)
    _scram: ScramClient | None = field(default=None, init=False, repr=False)
    _scram_proven: bool = field(default=False, init=False, repr=False)

    def respond(self, payload: bytes) -> bytes | None:
        """The message to send in answer to an Authentication message with this payload; None if there is none.

        Raises AuthenticationError, and ProtocolError where the payload is malformed.
        """
        code = backend.authentication_code(payload)
        match code:
            case Authentication.OK:
                if self._scram is not None and not self._scram_proven:
                    raise AuthenticationError("the server ended SCRAM without proving that it knows the password")
                self.done = True
                return None
            case Authentication.CLEARTEXT_PASSWORD:
                if not self.allow_cleartext:
                    raise AuthenticationError("the server asks for the password in clear, which is not allowed here")
                return build.password(self._password())
            case Authentication.MD5_PASSWORD:
                return build.password(_md5(self.user, self._password(), payload[4:8]))
            case Authentication.SASL:
                return self._sasl_start(backend.sasl_mechanisms(payload))
            case Authentication.SASL_CONTINUE:
                return self._sasl_continue(payload[4:])
            case Authentication.SASL_FINAL:
                self._sasl_final(payload[4:])
                return None
            case _:
                try:
                    name = Authentication(code).name
                except ValueError:
                    name = f"number {code}"
                raise AuthenticationError(
                    f"the server asks for authentication {name}; supported are trust, password, md5 and scram-sha-256"
                )

    def _password(self) -> str:
        if self.password is None:
            raise AuthenticationError(f"the server asks for a password of user {self.user!r}, and none was given")
        return self.password

    def _sasl_start(self, offered: list[str]) -> bytes:
        if self._scram is not None:
            raise AuthenticationError("the server starts SASL authentication twice")
        if SCRAM_SHA_256_PLUS in offered and self.channel_binding is not None:
            mechanism, binding = SCRAM_SHA_256_PLUS, ("tls-server-end-point", self.channel_binding)
        elif SCRAM_SHA_256 in offered:
            mechanism, binding = SCRAM_SHA_256, None
        else:
            raise AuthenticationError(
                f"the server offers only {', '.join(offered) or 'no mechanism'}; supported is {SCRAM_SHA_256}"
            )
        try:
            self._scram = ScramClient([mechanism], _SCRAM_USER, self._password(), channel_binding=binding)
            first: str = self._scram.get_client_first()
        except ScramException as e:
            raise AuthenticationError(f"SCRAM authentication: {e}") from e
        return build.sasl_initial(mechanism, first.encode())

    def _sasl_continue(self, data: bytes) -> bytes:
        scram = self._running()
        try:
            message = data.decode()
            _check_iterations(message)
            scram.set_server_first(message)
            final: str = scram.get_client_final()
        except (ScramException, ValueError) as e:
            raise AuthenticationError(f"SCRAM authentication: {e}") from e
        return build.sasl_response(final.encode())

    def _sasl_final(self, data: bytes) -> None:
        scram = self._running()
        try:
            scram.set_server_final(data.decode())
        except (ScramException, ValueError) as e:
            raise AuthenticationError(f"SCRAM authentication: {e}") from e
        self._scram_proven = True

    def _running(self) -> ScramClient:
        if self._scram is None:
            raise AuthenticationError("the server sends a SASL step without having started SASL authentication")
        return self._scram


def _md5(user: str, password: str, salt: bytes) -> str:
    """What MD5 authentication sends: `md5` and the hex digest of the salted digest."""
    if len(salt) != 4:
        raise AuthenticationError("the server's MD5 salt is not 4 bytes long")
    inner = hashlib.md5((password + user).encode(), usedforsecurity=False).hexdigest()
    return "md5" + hashlib.md5(inner.encode() + salt, usedforsecurity=False).hexdigest()


def _check_iterations(server_first: str) -> None:
    """Raises ValueError if the server wants more PBKDF2 rounds than a client should spend on it."""
    for attribute in server_first.split(","):
        if attribute.startswith("i="):
            digits = attribute[2:]
            if len(digits) > 9 or not digits.isascii() or not digits.isdigit() or int(digits) > MAX_ITERATIONS:
                raise ValueError(f"the server asks for {digits[:20]!r} iterations; the limit is {MAX_ITERATIONS}")
