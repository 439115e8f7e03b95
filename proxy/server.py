"""The proxy: listens, makes a session of each connection, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

import structlog

from proxy.authentication import AuthMode
from proxy.fastpath import close_board, open_board
from proxy.hosts import Hosts
from proxy.launch import Launcher
from proxy.listening import Listener, adopt
from proxy.relay import Leg
from proxy.rewriter import Rewriter
from proxy.session import Key, Limits, Session
from proxy.tls import ServerTls, ServerTlsFiles, UpstreamTls
from proxy.upstream import Address, Upstream
from proxy.wire.tls_options import TlsConfigError

if TYPE_CHECKING:
    from proxy._fastpath import Board

log = structlog.get_logger("dfproxy.server")


@dataclass(frozen=True)
class ProxyConfig:
    """What a proxy is told. Times are seconds, sizes bytes.

    `upstream` is a libpq connection string or what Upstream.parse made of one; `port` 0 picks a free one;
    `reuse_port` lets several processes listen on the same port; in `socket_dir` there is a Unix-domain socket as well.
    Peers in `proxy_protocol` (networks; `unix`: those of the Unix-domain socket) send a PROXY header, others don't.
    `startup_timeout` runs from a client's connection until it is authenticated, `drain_timeout` from `drain` until what
    is left is cut. `write_buffer` is what may wait for one side of a session before the other is no longer read,
    `max_rewrite` the longest statement that is looked into. `tls` is the certificate for clients, None: TLS is not
    offered; with `tls_required` it is the only way in. `fastpath` lets compiled code relay what is not dfproxy's
    business, where it was built.
    """

    upstream: Upstream | str
    host: str = "127.0.0.1"
    port: int = 6432
    reuse_port: bool = False
    socket_dir: Path | None = None
    proxy_protocol: tuple[str, ...] = ()
    backlog: int = 1024
    startup_timeout: float = 60.0
    drain_timeout: float = 30.0
    max_client_connections: int = 10_000
    write_buffer: int = 256 * 1024
    max_rewrite: int = 64 * 1024 * 1024
    tls: ServerTlsFiles | None = None
    tls_required: bool = False
    auth: AuthMode = AuthMode.AUTO
    fastpath: bool = True


#: Connections that may be there beyond `max_client_connections`: those that have not authenticated, and cancel
#: requests.
SPARE: Final = 1000
#: Cancel requests that are forwarded at a time; others wait for their turn.
_MAX_CANCELS: Final = 100
#: Seconds for which a session has to be quiet before it counts as idle when the proxy drains: between the messages of
#: one request, and between those of a client that connects for one transaction, it only looks idle.
_QUIET: Final = 0.5
#: Seconds between looks at the sessions while the proxy drains.
_LOOK: Final = 0.05
#: Seconds in which those that are cut may take in what they are told.
_LAST_WORDS: Final = 1.5
#: Seconds between two calls of `on_commit` for transactions that nobody knows to have mentioned df.
_SELDOM: Final = 0.1
#: What `proxy_protocol` says for clients of the Unix-domain socket.
UNIX: Final = "unix"


def _nothing() -> None:
    """Nobody wants to know of commits."""


class ProxyServer:
    """Serves clients from `start` to `close`, or inside `async with`.

    `on_commit` is called on the event loop, must not block or raise, and means: a transaction in which df was
    mentioned may just have been committed. `launchers`, by database, serve `transaction_mode => 'new'`; somebody else
    runs them. `rewriter` is for tests. Raises ValueError (TlsConfigError is one) where
    the upstream or a certificate can't be used.
    """

    def __init__(
        self, config: ProxyConfig, on_commit: Callable[[], None] = _nothing, *, rewriter: Rewriter | None = None,
        launchers: Mapping[str, Launcher] | None = None,
    ) -> None:
        self.config = config
        self.upstream = config.upstream if isinstance(config.upstream, Upstream) else Upstream.parse(config.upstream)
        if config.tls_required and config.tls is None:
            raise TlsConfigError("tls_required needs tls_cert and tls_key")
        self.upstream_tls = UpstreamTls(self.upstream.tls)
        self.hosts = Hosts(self.upstream, self.upstream_tls)
        self.tls = ServerTls(config.tls) if config.tls is not None else None
        self.tls_required = config.tls_required
        self.auth = config.auth
        self.keys: dict[Key, Address] = {}
        self.board: Board | None = None
        self.draining = False
        self.impatient = False
        self.cancels = asyncio.Semaphore(_MAX_CANCELS)
        self._forwarders = tuple(ipaddress.ip_network(n) for n in config.proxy_protocol if n != UNIX)
        self.rewriter = rewriter if rewriter is not None else Rewriter()
        self.launchers = launchers or {}
        self._on_commit = on_commit
        self._limits = Limits(config.startup_timeout, config.write_buffer, config.max_rewrite)
        self._sessions: set[Session] = set()
        self._admitted: set[Session] = set()
        self._telling: asyncio.TimerHandle | None = None
        self._told_at = float("-inf")
        self._listener: Listener | None = None
        self._closing = False
        self._main: asyncio.Task[None] | None = None
        self._port: int | None = None
        self._group: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()
        self._empty = asyncio.Event()

    # --- life ---

    async def start(self) -> None:
        """Listens. Raises OSError where the address can't be had."""
        if self._main is not None:
            raise RuntimeError("a ProxyServer starts once")
        config = self.config
        listener = Listener(config.host, config.port, folder=config.socket_dir, reuse_port=config.reuse_port,
                            backlog=config.backlog)
        await listener.open(self._leg)
        self._listener = listener
        self._port = listener.port
        self.board = open_board(self.rewriter) if config.fastpath else None
        ready = asyncio.Event()
        self._main = asyncio.create_task(self._serve(ready), name="dfproxy-server")
        await ready.wait()
        await listener.start()

    def _leg(self) -> Leg:
        return _ClientLeg(self, self.config.write_buffer)

    async def close(self) -> None:
        """Stops listening, cuts every connection and returns when all are gone."""
        self.draining = self._closing = True
        if self._listener is not None:
            self._listener.close()
        self._stop.set()
        if self._main is not None:
            await self._main
        if self.board is not None:
            close_board(self.board)
            self.board = None
        if self._telling is not None:
            self._telling.cancel()
        self.rewriter.close()

    def reload(self) -> None:
        """Reads all certificates and keys again, for the connections to come; what can't be used changes nothing."""
        if self.tls is not None:
            self.tls.reload()
        self.upstream_tls.reload()

    async def drain(self) -> None:
        """Stops accepting, and lets clients finish what they are doing; those that do nothing are dismissed.

        In the first half of `drain_timeout` a client is dismissed when it has been idle for a moment, in the second
        half when it begins another transaction. At the end those that are left are cut. Returns when none is left.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.draining = True
        for session in self._sessions:
            session.stir()
        if self._listener is not None:
            await self._listener.stop(self._take)
        try:
            async with asyncio.timeout(self.config.drain_timeout):
                while self._sessions:
                    now = loop.time()
                    self.impatient = now - began >= self.config.drain_timeout / 2
                    for session in tuple(self._sessions):
                        quiet = _LOOK if self.impatient and session.idle else _QUIET
                        if session.quiet_since(now - quiet):
                            session.dismiss()
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            log.warning("cutting clients that did not finish in time", clients=len(self._sessions))
            for session in tuple(self._sessions):
                session.dismiss()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._until_empty(), _LAST_WORDS)
            for session in tuple(self._sessions):
                session.abort()
            await self._until_empty()

    def _take(self, connection: socket.socket) -> None:
        """Serves a connection that was accepted while the listener stopped."""

        async def serve() -> None:
            try:
                await adopt(connection, self._leg)
            except OSError as e:
                log.info("a connection was lost while the proxy stopped listening", reason=str(e))

        if self._group is None:
            connection.close()
        else:
            self._group.create_task(serve())

    async def _until_empty(self) -> None:
        while self._sessions:
            self._empty.clear()
            await self._empty.wait()

    async def __aenter__(self) -> ProxyServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _serve(self, ready: asyncio.Event) -> None:
        """Owns the sessions' tasks: returns when `close` asks for it and the last one has ended."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            ready.set()
            await self._stop.wait()
            for session in tuple(self._sessions):
                session.abort()

    def accept(self, leg: Leg) -> None:
        """Starts a session for a new connection, unless there are far too many."""
        if self._group is None or self._closing or len(self._sessions) >= self.config.max_client_connections + SPARE:
            leg.abort()
            return
        session = Session(self, self._limits, leg)
        self._sessions.add(session)
        self._group.create_task(self._run(session))

    async def _run(self, session: Session) -> None:
        try:
            await session.run()
        except Exception:
            # A bug that one session found must not end the others.
            log.exception("a session failed")
        finally:
            self._sessions.discard(session)
            self._admitted.discard(session)
            if not self._sessions:
                self._empty.set()

    # --- what it knows ---

    @property
    def port(self) -> int:
        """The TCP port that it listens, or did listen, on."""
        if self._port is None:
            raise RuntimeError("the proxy has not been started")
        return self._port

    @property
    def clients(self) -> int:
        """How many connections there are."""
        return len(self._sessions)

    # --- what sessions ask ---

    def admit(self, session: Session) -> bool:
        """Counts one more client, unless there are enough."""
        if len(self._admitted) >= self.config.max_client_connections:
            return False
        self._admitted.add(session)
        return True

    def forwards(self, leg: Leg) -> bool:
        """Whether a new connection is a load balancer's, which begins with a PROXY header."""
        address = leg.address
        if address is None:
            return UNIX in self.config.proxy_protocol
        return any(address in network for network in self._forwarders)

    def committed(self) -> None:
        """Passes on that a transaction may have been committed."""
        self._told_at = asyncio.get_running_loop().time()
        self._on_commit()

    def perhaps_committed(self) -> None:
        """Passes that on as well, at once but not more often than there is any use in it.

        What is called by EXECUTE of a statement that was prepared in SQL, by a trigger or by a function can't be seen.
        """
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_at(max(loop.time(), self._told_at + _SELDOM), self._tell)

    def _tell(self) -> None:
        self._telling = None
        self.committed()


class _ClientLeg(Leg):
    """A client's connection: it gets a session as soon as it is there."""

    def __init__(self, server: ProxyServer, high_water: int) -> None:
        super().__init__(high_water)
        self._accept = server.accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._accept(self)
