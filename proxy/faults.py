"""What went wrong, in one sentence that says what to do: for the faults that a user can cause or mend.

Anything `explain` does not know is a bug of ours, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl

import asyncpg

from engine.migrate import MigrationError
from proxy.embedded import EmbeddedError
from proxy.logs import redact
from proxy.settings import SettingsError
from proxy.wire.tls_options import TlsConfigError


class UserError(Exception):
    """A fault with its sentence ready."""


def cannot_listen(address: str, error: OSError) -> UserError:
    """What to say where `address` (HOST:PORT) can't be listened on."""
    match error.errno:
        case errno.EADDRINUSE:
            todo = "something listens there already; stop it, or give --listen 127.0.0.1:0 for any free port"
        case errno.EACCES:
            todo = "ports below 1024 are for root; give another one with --listen HOST:PORT"
        case errno.EADDRNOTAVAIL:
            todo = "this machine has no such address; give one of its own, or --listen *:PORT for all"
        case _:
            todo = "check --listen HOST:PORT"
    return UserError(f"can't listen on {address}: {_reason(error)}; {todo}.")


def _single(error: BaseException) -> BaseException:
    """The first of a group of exceptions (a TaskGroup raises one such)."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def explain(error: BaseException, *, where: str = "the server") -> str | None:
    """One sentence about `error`, or None where it is no fault of the user's. `where` names the upstream."""
    error = _single(error)
    match error:
        case UserError() | SettingsError() | EmbeddedError() | MigrationError() | TlsConfigError():
            text = str(error)
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            text = (f"PostgreSQL at {where} refused the login: {_said(error)}. "
                    "Check user and password in --upstream (or DFPROXY_UPSTREAM), and pg_hba.conf of the server.")
        case asyncpg.InvalidCatalogNameError():
            text = f"PostgreSQL at {where}: {_said(error)}. Name an existing database at the end of --upstream."
        case asyncpg.TooManyConnectionsError():
            text = f"PostgreSQL at {where} has no connection left: {_said(error)}. Free some, or raise max_connections."
        case asyncpg.CannotConnectNowError():
            text = f"PostgreSQL at {where} is not ready: {_said(error)}. Try again in a moment."
        case asyncpg.InsufficientPrivilegeError():
            text = f"PostgreSQL at {where}: {_said(error)}. `dfproxy doctor` says which grant is missing."
        case asyncpg.PostgresError():
            text = f"PostgreSQL at {where}: {_said(error)} (SQLSTATE {error.sqlstate})."
        case asyncpg.InterfaceError() | asyncpg.InternalClientError():
            text = f"can't connect to {where}: {error}."
        case socket.gaierror():
            text = f"can't find the host of {where}: {error.strerror}. Check --upstream."
        case ssl.SSLError():
            text = f"TLS with {where} failed: {error.reason or error}. Check sslmode and certificates in --upstream."
        case TimeoutError():
            text = f"{where} did not answer in time. Check the address in --upstream, and firewalls between."
        case ConnectionError() | FileNotFoundError():
            text = f"can't reach PostgreSQL at {where}: {_reason(error)}. Is it running, and is --upstream right?"
        case OSError() if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, None):
            text = f"can't reach PostgreSQL at {where}: {_reason(error)}. Is it running, and is --upstream right?"
        case _:
            return None
    return redact(text)


def _said(error: asyncpg.PostgresError) -> str:
    """The server's own words on one line."""
    parts = [str(error.args[0]) if error.args else type(error).__name__]
    parts += [text for text in (getattr(error, "detail", None), getattr(error, "hint", None)) if text]
    return ". ".join(" ".join(part.split()).rstrip(".") for part in parts)


def _reason(error: OSError) -> str:
    if error.errno is None or error.errno not in errno.errorcode:
        return str(error)
    return os.strerror(error.errno)
