"""The PostgreSQL server behind the proxy: where a libpq connection string says that it is, and how to get there."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, unquote

from proxy.wire.tls_options import ClientTls

DEFAULT_PORT: Final = 5432
#: Where packaged servers put their socket, in the order in which libpq builds look for it.
SOCKET_FOLDERS: Final = ("/var/run/postgresql", "/run/postgresql", "/tmp")

#: Idle seconds before the first probe, between probes, and probes until a peer counts as gone: within 150 s, which is
#: less than the 350 s after which cloud load balancers forget an idle connection.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 6))

P = TypeVar("P", bound=asyncio.Protocol)


class DialError(Exception):
    """No host of the upstream took the connection; the text says which were tried and why each failed."""


@dataclass(frozen=True)
class Address:
    """One host: a name or address with a port, or a Unix-domain socket in a folder (`host` starts with `/` or `@`).

    `server_name` is what the server's certificate has to say, where that is another name than `host`.
    """

    host: str
    port: int = DEFAULT_PORT
    server_name: str = field(default="", compare=False)

    @property
    def is_socket(self) -> bool:
        return self.host.startswith(("/", "@"))

    @property
    def socket_path(self) -> str:
        """The path of the Unix-domain socket (a leading zero byte means the abstract namespace)."""
        path = f"{self.host}/.s.PGSQL.{self.port}"
        return "\0" + path[1:] if path.startswith("@") else path

    def __str__(self) -> str:
        if self.is_socket:
            return f"{self.host}/.s.PGSQL.{self.port}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class SessionAttributes(Enum):
    """`target_session_attrs` of libpq: which of several hosts will do."""

    ANY = "any"
    READ_WRITE = "read-write"
    READ_ONLY = "read-only"
    PRIMARY = "primary"
    STANDBY = "standby"
    PREFER_STANDBY = "prefer-standby"

    def suits(self, standby: bool, read_only: bool = False) -> bool:
        """Whether a server will do that is a standby, or whose transactions are read-only unless they say otherwise."""
        match self:
            case SessionAttributes.READ_WRITE:
                return not standby and not read_only
            case SessionAttributes.READ_ONLY:
                return standby or read_only
            case SessionAttributes.PRIMARY:
                return not standby
            case SessionAttributes.STANDBY:
                return standby
            case _:
                return True


@dataclass(frozen=True)
class Login:
    """Whom the upstream's connection string names. Clients log in as themselves; this is for the proxy's own looks."""

    user: str
    database: str
    password: str | None = field(default=None, repr=False)


#: Connects to one address within seconds. Raises OSError, TimeoutError.
Connect = Callable[[Address, Callable[[], P], float], Awaitable[P]]


@dataclass(frozen=True)
class Upstream:
    """Where the server is: one address, or several of which the first that answers is used.

    `connect_timeout` is seconds for each address, `tls` what the `ssl…` parameters say, `wanted` which of several
    hosts will do (proxy/hosts.py finds it), `login` the user and password of the string.
    """

    addresses: tuple[Address, ...]
    connect_timeout: float = 10.0
    tls: ClientTls = field(default_factory=ClientTls)
    wanted: SessionAttributes = SessionAttributes.ANY
    login: Login | None = None

    @classmethod
    def parse(cls, dsn: str) -> Upstream:
        """What a libpq URI (`postgresql://…`) or keyword string (`host=… port=…`) says.

        Clients have users, passwords, databases and options of their own: those in the string are not for them.
        Raises ValueError, never quoting the string (it may hold a password).
        """
        options = _parse_uri(dsn) if re.match(r"postgres(ql)?://", dsn) else _parse_keywords(dsn)
        tls = ClientTls.from_parameters(options)
        hosts = options.get("hostaddr") or options.get("host") or ""
        names = hosts.split(",")
        # A certificate is for the name, also where `hostaddr` says how to get there.
        server_names = (options.get("host") or "").split(",") if options.get("hostaddr") else []
        if len(server_names) != len(names):
            server_names = [""] * len(names)
        ports = (options.get("port") or "").split(",")
        if len(ports) == 1:
            ports *= len(names)
        if len(ports) != len(names):
            raise ValueError(f"the upstream names {len(names)} hosts but {len(ports)} ports")
        upstream = cls(
            tuple(
                replace(_address(name, port), server_name=server_name)
                for name, port, server_name in zip(names, ports, server_names, strict=True)
            ),
            tls=tls,
            wanted=_wanted(options.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS") or "any"),
            login=_login(options),
        )
        if timeout := options.get("connect_timeout"):
            try:
                seconds = int(timeout)
            except ValueError:
                raise ValueError("connect_timeout in the upstream is not a whole number of seconds") from None
            if seconds > 0:
                upstream = replace(upstream, connect_timeout=float(max(seconds, 2)))
        return upstream

    def __str__(self) -> str:
        return ", ".join(map(str, self.addresses))

    async def dial(self, factory: Callable[[], P], connect: Connect[P] | None = None) -> tuple[P, Address]:
        """Connects to the first address that answers; `factory` makes the asyncio protocol. Raises DialError.

        `connect` is how to get to one address: `dial`, without TLS, if it isn't given.
        """
        failures = []
        for address in self.addresses:
            try:
                return await (connect or dial)(address, factory, self.connect_timeout), address
            except TimeoutError:
                failures.append(f"{address}: no answer within {self.connect_timeout:g} s")
            except OSError as e:
                failures.append(f"{address}: {e.strerror or e}")
        raise DialError("; ".join(failures))


async def dial(address: Address, factory: Callable[[], P], timeout: float) -> P:
    """Connects to one address. Raises OSError, or TimeoutError after `timeout` seconds."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        if address.is_socket:
            _, protocol = await loop.create_unix_connection(factory, address.socket_path)
        else:
            _, protocol = await loop.create_connection(factory, address.host, address.port)
    return protocol


def tune(transport: asyncio.Transport) -> None:
    """Sets keepalive and no-delay on a TCP connection; nothing on a Unix-domain socket."""
    sock: Any = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _wanted(text: str) -> SessionAttributes:
    try:
        return SessionAttributes(text)
    except ValueError:
        names = ", ".join(a.value for a in SessionAttributes)
        raise ValueError(f"target_session_attrs in the upstream is one of {names}") from None


def _login(options: dict[str, str]) -> Login | None:
    user = options.get("user") or os.environ.get("PGUSER")
    if not user:
        return None
    database = options.get("dbname") or os.environ.get("PGDATABASE") or user
    return Login(user, database, options.get("password") or os.environ.get("PGPASSWORD"))


def _address(host: str, port: str) -> Address:
    try:
        number = int(port) if port else DEFAULT_PORT
    except ValueError:
        number = 0
    if not 0 < number < 65536:
        raise ValueError("a port of the upstream is not a number between 1 and 65535")
    if host:
        return Address(host, number)
    for folder in SOCKET_FOLDERS:
        if Path(folder, f".s.PGSQL.{number}").exists():
            return Address(folder, number)
    return Address("localhost", number)


def _parse_uri(uri: str) -> dict[str, str]:
    """Options of `postgresql://[user[:password]@][host[:port][,…]][/database][?name=value[&…]]`."""
    rest = uri.partition("://")[2]
    rest, _, query = rest.partition("?")
    authority, _, database = rest.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    user, _, password = credentials.partition(":")
    names, ports = [], []
    for host in hosts.split(","):
        match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(\d*))?", host)
        if match is None:
            raise ValueError("a host of the upstream is not HOST or HOST:PORT (an IPv6 address goes in brackets)")
        names.append(unquote(match[1].strip("[]")))
        ports.append(match[2] or "")
    options = {"host": ",".join(names), "port": ",".join(ports), "dbname": unquote(database),
               "user": unquote(user), "password": unquote(password)}
    for name, value in parse_qsl(query, keep_blank_values=True):
        options[name] = value
    if not any(ports) and "port" not in dict(parse_qsl(query)):
        options["port"] = ""
    return options


_KEYWORD: Final = re.compile(r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?:\s+|$)", re.DOTALL)


def _parse_keywords(text: str) -> dict[str, str]:
    """Options of `name = value name = 'quoted value' …`."""

    def pairs() -> Iterator[tuple[str, str]]:
        position = 0
        while text[position:].strip():
            match = _KEYWORD.match(text, position)
            if match is None:
                raise ValueError("the upstream is neither a postgresql:// URI nor a list of name=value")
            value = match[2] if match[2] is not None else match[3]
            yield match[1], re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
            position = match.end()

    return dict(pairs())
