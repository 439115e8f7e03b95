"""An httpx transport that connects only to what a policy allows, and the connections that it keeps.

Why not httpx's own: its pool goes through all connections for every request, and puts many HTTP/2 requests on one
connection, where aborting one leaves its share of the flow-control window behind for the others to starve on. Here a
connection carries one exchange at a time, is kept for the next only if that one ended well, and is dropped at once
otherwise: aborting a call is closing its connection.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import certifi
import httpcore
import httpx

from engine.http.names import normalise
from engine.http.network import GuardedBackend, Resolver, system_resolver
from engine.http.policy import HttpPolicy

#: Seconds that an unused connection is kept.
KEEP = 15.0
#: Unused connections kept, in all.
MAX_IDLE = 100
#: Exchanges on one connection. HTTP/2 servers end one after 1000 by a farewell that may come amid an exchange.
MAX_USES = 500
#: At most. They are made as they are needed: a slow name server must not keep calls to other hosts waiting.
_RESOLVER_THREADS = 64

#: Scheme, host, port.
Origin = tuple[bytes, bytes, int]


def trust(ca_file: Path | None = None) -> ssl.SSLContext:
    """TLS as clients do it, with the system's certificates (where it has none: Mozilla's) and those of a file.

    Raises OSError and ssl.SSLError for a file that can't be used.
    """
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and (paths.capath is None or not any(Path(paths.capath).iterdir())):
        context.load_verify_locations(certifi.where())
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context


class _Connection:
    """One connection, for one exchange at a time."""

    __slots__ = ("_backend", "http", "used_at", "uses")

    def __init__(self, origin: Origin, context: ssl.SSLContext | None, policy: HttpPolicy,
                 resolve: Resolver) -> None:
        self._backend = GuardedBackend(policy, resolve)
        self.http = httpcore.AsyncHTTPConnection(
            httpcore.Origin(*origin), ssl_context=context, keepalive_expiry=KEEP, http1=True, http2=True,
            network_backend=self._backend)
        self.uses = 0
        self.used_at = 0.0

    @property
    def reusable(self) -> bool:
        return self.uses < MAX_USES and self.http.is_idle() and not self.http.has_expired()

    def abort(self) -> None:
        self._backend.abort()


class GuardedTransport(httpx.AsyncBaseTransport):
    """Raises BlockedError for what the policy refuses, httpcore's errors for what goes wrong on the way.

    No redirects, no cookies, no proxies, no credentials from files: a transport knows nothing of them.
    """

    def __init__(self, policy: HttpPolicy, *, resolve: Resolver | None = None,
                 context: ssl.SSLContext | None = None) -> None:
        self._policy = policy
        self._executor = ThreadPoolExecutor(min(policy.max_parallel, _RESOLVER_THREADS), "dfproxy-resolver")
        self._resolve = resolve or system_resolver(self._executor)
        self._context = context
        self._idle: dict[Origin, deque[_Connection]] = {}
        self._idle_count = 0
        self._busy: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; the response's stream must be closed. Request bodies must be ones that can be sent again."""
        url = request.url
        host = url.raw_host.decode("ascii")
        self._policy.check_scheme(url.scheme)
        self._policy.check_host(normalise(f"[{host}]" if ":" in host else host))
        port = url.port or (443 if url.scheme == "https" else 80)
        origin = (url.raw_scheme, url.raw_host, port)
        wire = httpcore.Request(
            request.method.encode("ascii"),
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=port, target=url.raw_path),
            headers=request.headers.raw, content=request.stream)
        if url.scheme == "https" and self._context is None:
            # Reading the certificates takes a moment: when they are first needed.
            self._context = await asyncio.to_thread(trust, self._policy.ca_file)
        while True:
            connection = self._take(origin)
            try:
                response = await connection.http.handle_async_request(wire)
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError,
                    httpcore.ConnectionNotAvailable):
                self._drop(connection)
                if connection.uses:
                    continue  # It was closed at the other end while it waited. A fresh connection tells the truth.
                raise
            except BaseException:
                self._drop(connection)
                raise
            return httpx.Response(response.status, headers=response.headers,
                                  stream=_Body(self, connection, origin, response), extensions=response.extensions,
                                  request=request)

    async def aclose(self) -> None:
        """Drops all connections."""
        for connection in [*self._busy, *(c for idle in self._idle.values() for c in idle)]:
            connection.abort()
        self._busy.clear()
        self._idle.clear()
        self._idle_count = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._executor.shutdown(wait=False, cancel_futures=True)
        await asyncio.sleep(0)  # the transports' own farewell

    @property
    def open_connections(self) -> int:
        """Connections in use or kept."""
        return len(self._busy) + self._idle_count

    # -- connections -------------------------------------------------------------------------------------------

    def _take(self, origin: Origin) -> _Connection:
        idle = self._idle.get(origin)
        connection = None
        while idle and connection is None:
            found = idle.pop()
            self._idle_count -= 1
            if not idle:
                del self._idle[origin]
            if found.reusable:
                connection = found
            else:
                found.abort()
        if connection is None:
            connection = _Connection(origin, self._context, self._policy, self._resolve)
        self._busy.add(connection)
        return connection

    def _drop(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        connection.abort()

    def _put_back(self, origin: Origin, connection: _Connection) -> None:
        if connection not in self._busy or not connection.reusable:
            self._drop(connection)
            return
        self._busy.discard(connection)
        connection.used_at = time.monotonic()
        connection.uses += 1
        self._idle.setdefault(origin, deque()).append(connection)
        self._idle_count += 1
        while self._idle_count > MAX_IDLE:
            self._drop_oldest(min(self._idle, key=lambda o: self._idle[o][0].used_at))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(KEEP, self._sweep)

    def _drop_oldest(self, origin: Origin) -> None:
        idle = self._idle[origin]
        idle.popleft().abort()
        self._idle_count -= 1
        if not idle:
            del self._idle[origin]

    def _sweep(self) -> None:
        """Drops what has waited too long, now and later."""
        now = time.monotonic()
        for origin in [o for o, idle in self._idle.items() for c in idle if c.used_at <= now - KEEP]:
            self._drop_oldest(origin)
        self._timer = None
        if self._idle:
            oldest = min(idle[0].used_at for idle in self._idle.values())
            self._timer = asyncio.get_running_loop().call_later(oldest + KEEP - now, self._sweep)


class _Body(httpx.AsyncByteStream):
    """A response's body as it came. Read to its end, it gives the connection back; otherwise closing drops it."""

    def __init__(self, transport: GuardedTransport, connection: _Connection, origin: Origin,
                 response: httpcore.Response) -> None:
        self._transport = transport
        self._connection: _Connection | None = connection
        self._origin = origin
        self._stream: Any = response.stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with aclosing(aiter(self._stream)) as parts:
            async for part in parts:
                yield part
        await self._stream.aclose()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport._put_back(self._origin, connection)

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport._drop(connection)
