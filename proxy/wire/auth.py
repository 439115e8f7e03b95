"""The client side of authentication, sans-IO: the server's Authentication messages in, the client's answers out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from scramp import ScramClient, ScramException
from scramp.utils import saslprep

from proxy.wire import backend, build
from proxy.wire.messages import SCRAM_SHA_256, SCRAM_SHA_256_PLUS, Authentication

#: PBKDF2 rounds that a server may ask for. Each million costs the event loop about half a second.
MAX_ITERATIONS: Final = 1_000_000
#: PostgreSQL takes the user from the startup packet and ignores SCRAM's; RFC 5802 and the library want one.
_SCRAM_USER: Final = "*"
#: Requests that can't, or need not, bind the login to the TLS connection.
_UNBOUND: Final = (Authentication.OK, Authentication.CLEARTEXT_PASSWORD, Authentication.MD5_PASSWORD)


class AuthenticationError(Exception):
    """Authentication can't go on: the server asks for what we won't give, or doesn't prove to know the password."""


@dataclass
class ClientAuth:
    """Answers a server's Authentication messages for one connection.

    `channel_binding` is the data of `tls-server-end-point` (proxy.wire.tls.server_end_point) on a TLS connection: with
    it SCRAM-SHA-256-PLUS is preferred where the server offers it, and `require_binding` accepts nothing else. `user`
    and `password` as bytes are in whatever encoding the server knows them in. `done` is true after AuthenticationOk.
    """

    user: str | bytes
    password: str | bytes | None = field(default=None, repr=False)
    channel_binding: bytes | None = field(default=None, repr=False)
    allow_cleartext: bool = True
    require_binding: bool = False
    done: bool = field(default=False, init=False)
    _scram: ScramClient | None = field(default=None, init=False, repr=False)
    _scram_proven: bool = field(default=False, init=False, repr=False)
    _bound: bool = field(default=False, init=False, repr=False)

    def respond(self, payload: bytes) -> bytes | None:
        """The message to send in answer to an Authentication message with this payload; None if there is none.

        Raises AuthenticationError, and ProtocolError where the payload is malformed.
        """
        code = backend.authentication_code(payload)
        if self.require_binding and code in _UNBOUND and not (code == Authentication.OK and self._bound):
            raise AuthenticationError("the server does not bind the login to the connection, which is required here")
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

    @staticmethod
    def is_slow(payload: bytes) -> bool:
        """Whether the answer to this Authentication message takes long to compute (PBKDF2): milliseconds to a second.

        `respond` may then be called in a thread.
        """
        return backend.authentication_code(payload) == Authentication.SASL_CONTINUE

    def _password(self) -> bytes:
        if self.password is None:
            user = _bytes(self.user).decode("utf-8", "replace")
            raise AuthenticationError(f"the server asks for a password of user {user!r}, and none was given")
        return _bytes(self.password)

    def _sasl_start(self, offered: list[str]) -> bytes:
        if self._scram is not None:
            raise AuthenticationError("the server starts SASL authentication twice")
        if SCRAM_SHA_256_PLUS in offered and self.channel_binding is not None:
            mechanism, binding = SCRAM_SHA_256_PLUS, ("tls-server-end-point", self.channel_binding)
        elif SCRAM_SHA_256 in offered and not self.require_binding:
            mechanism, binding = SCRAM_SHA_256, None
        else:
            wanted = SCRAM_SHA_256_PLUS if self.require_binding else SCRAM_SHA_256
            raise AuthenticationError(
                f"the server offers only {', '.join(offered) or 'no mechanism'}; supported is {wanted}"
            )
        self._bound = binding is not None
        try:
            self._scram = ScramClient([mechanism], _SCRAM_USER, "", channel_binding=binding)
            # The library refuses passwords that RFC 4013 (SASLprep) does; PostgreSQL takes them as they are.
            self._scram.password = _Prepared(_saslprep(self._password()))
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


class _Prepared:
    """A password as the library wants it: something that `bytes` works on."""

    def __init__(self, password: bytes) -> None:
        self._password = password

    def __bytes__(self) -> bytes:
        return self._password


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def _saslprep(password: bytes) -> bytes:
    """The password as PostgreSQL prepares it: by RFC 4013, or unchanged where that forbids it or it is not UTF-8."""
    try:
        return saslprep(password.decode()).encode() or password
    except (UnicodeDecodeError, ScramException):
        return password


def _md5(user: str | bytes, password: bytes, salt: bytes) -> str:
    """What MD5 authentication sends: `md5` and the hex digest of the salted digest."""
    if len(salt) != 4:
        raise AuthenticationError("the server's MD5 salt is not 4 bytes long")
    inner = hashlib.md5(password + _bytes(user), usedforsecurity=False).hexdigest()
    return "md5" + hashlib.md5(inner.encode() + salt, usedforsecurity=False).hexdigest()


def _check_iterations(server_first: str) -> None:
    """Raises ValueError if the server wants more PBKDF2 rounds than a client should spend on it."""
    for attribute in server_first.split(","):
        if attribute.startswith("i="):
            digits = attribute[2:]
            if len(digits) > 9 or not digits.isascii() or not digits.isdigit() or int(digits) > MAX_ITERATIONS:
                raise ValueError(f"the server asks for {digits[:20]!r} iterations; the limit is {MAX_ITERATIONS}")
