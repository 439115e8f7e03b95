"""From a host name to a connection with an address that was checked, as httpcore's network backend.

httpcore asks for `host:port` when it needs a connection. The name is resolved here, every address is judged, and the
socket is connected to one that passed, by its number: nothing resolves a second time. SNI, certificate and Host header
go by the name, which httpcore keeps.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from typing import Any

import httpcore
import structlog

from engine.http.names import normalise
from engine.http.policy import Address, HttpPolicy, unmapped

log = structlog.get_logger("dfproxy.engine")

#: Seconds for one address, where there is another to try.
ADDRESS_TIMEOUT = 5.0
#: Seconds for connecting and for the TLS handshake, each.
CONNECT_TIMEOUT = 30.0
_READ_LIMIT = 2**17

#: Host to addresses, in the order in which to try them. Raises OSError.
Resolver = Callable[[str], Awaitable[list[Address]]]


def system_resolver(executor: Executor) -> Resolver:
    """The operating system's resolver, in threads of its own: a slow name server must not hold up other work."""

    async def resolve(host: str) -> list[Address]:
        found = await asyncio.get_running_loop().run_in_executor(
            executor, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        # A zone (`fe80::1%2`) stays in the text, and no address with one is ever public.
        return list(dict.fromkeys(ipaddress.ip_address(item[4][0]) for item in found))

    return resolve


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to what the policy allows. For one connection: `abort` drops it, whatever state it is in."""

    def __init__(self, policy: HttpPolicy, resolve: Resolver) -> None:
        self._policy = policy
        self._resolve = resolve
        self._stream: _Stream | None = None

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
                          socket_options: Iterable[Any] | None = None) -> httpcore.AsyncNetworkStream:
        """Raises BlockedError, and httpcore.ConnectError with a text for people."""
        addresses = self._policy.check_addresses(host, await self._addresses(host))
        error: Exception | None = None
        for n, address in enumerate(addresses):
            limit = ADDRESS_TIMEOUT if n + 1 < len(addresses) else CONNECT_TIMEOUT
            try:
                async with asyncio.timeout(limit):
                    connected = await _connect(unmapped(address), port)
            except TimeoutError:
                error = TimeoutError("connecting timed out")
            except OSError as e:
                error = e
            else:
                self._stream = _Stream(connected)
                return self._stream
        raise httpcore.ConnectError(_reason(error)) from error

    async def _addresses(self, host: str) -> list[Address]:
        known = normalise(f"[{host}]" if ":" in host else host)
        if not isinstance(known, str):
            return [known]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await self._resolve(host)
        except TimeoutError:
            raise httpcore.ConnectError(f"resolving '{host}' timed out") from None
        except (OSError, UnicodeError) as e:
            raise httpcore.ConnectError(f"'{host}' can't be resolved: {_reason(e)}") from e

    def abort(self) -> None:
        """Drops the connection at once."""
        if self._stream is not None:
            self._stream.abort()


async def _connect(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connected = socket.socket(family, socket.SOCK_STREAM)
    try:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connected, (str(address), port))
    except BaseException:
        connected.close()
        raise
    return connected


class _Reader(asyncio.StreamReader):
    """Knows whether there is something to read."""

    unread = 0

    def feed_data(self, data: Any) -> None:
        self.unread += len(data)
        super().feed_data(data)

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        self.unread -= len(data)
        return data


class _Stream(httpcore.AsyncNetworkStream):
    """A connected socket; plain or TLS is decided by the first use. The whole exchange is timed, not single calls."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket: socket.socket | None = connected
        self._reader: _Reader
        self._writer: asyncio.StreamWriter | None = None

    async def _open(self, **tls: Any) -> asyncio.StreamWriter:
        if self._writer is not None:
            return self._writer
        if self._socket is None:
            raise ConnectionAbortedError("the connection is closed")
        loop = asyncio.get_running_loop()
        reader = self._reader = _Reader(limit=_READ_LIMIT, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        connected = self._socket
        transport, _ = await loop.create_connection(lambda: protocol, sock=connected, **tls)
        self._socket = None  # the transport's now
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return self._writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            await self._open()
            return await self._reader.read(max_bytes)
        except OSError as e:
            raise httpcore.ReadError(_reason(e)) from e

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            writer = await self._open()
            writer.write(buffer)
            await writer.drain()
        except OSError as e:
            # Once open, the next read says what there is to say: the other end may have answered before it closed.
            if self._writer is None:
                raise httpcore.WriteError(_reason(e)) from e

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Closes without waiting for anybody. No effect the second time."""
        if self._writer is not None:
            self._writer.transport.abort()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str | None = None,
                        timeout: float | None = None) -> httpcore.AsyncNetworkStream:
        try:
            await self._open(ssl=ssl_context, server_hostname=server_hostname,
                             ssl_handshake_timeout=CONNECT_TIMEOUT)
        except OSError as e:
            self.abort()
            raise httpcore.ConnectError(_reason(e)) from e
        except BaseException:
            self.abort()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # On an idle connection: the server closed it, or said something that nobody asked for.
            return self._writer is None or self._writer.transport.is_closing() or bool(self._reader.unread) \
                or self._reader.at_eof()
        if self._writer is None:
            return None
        return self._writer.get_extra_info({"server_addr": "peername", "client_addr": "sockname"}.get(info, info))


def _reason(error: BaseException | None) -> str:
    """What the system says; asyncio would add the address, which is nobody's business."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
