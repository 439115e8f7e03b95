"""`dfproxy serve` and `dfproxy worker`: bring everything up, say so, and take it down in order.

One process runs the proxy and a worker for each database in one task group. With `--processes N` a parent prepares
(embedded server, schemas), holds the port, and supervises N children that share it (proxy/supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

import proxy
from proxy import dsn, wiring
from proxy.authentication import AuthMode
from proxy.fastpath import COMPILED
from proxy.faults import cannot_listen
from proxy.launch import Launcher
from proxy.limits import allow_connections
from proxy.local import LocalServer, default_folder
from proxy.process import settle
from proxy.server import ProxyConfig, ProxyServer
from proxy.settings import Settings
from proxy.upstream import Upstream

log = structlog.get_logger("dfproxy")


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


@contextlib.contextmanager
def on_hangup(reload: Callable[[], None], stop: asyncio.Event) -> Iterator[None]:
    """Calls `reload` at each SIGHUP; sets `stop` instead if the signal came because the terminal has gone."""
    loop = asyncio.get_running_loop()
    had_terminal = os.isatty(0)

    def on_signal() -> None:
        if had_terminal and not os.isatty(0):
            stop.set()
        else:
            reload()

    loop.add_signal_handler(signal.SIGHUP, on_signal)
    try:
        yield
    finally:
        # Not back to the default, which would end the process in the middle of its orderly stop.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)


@dataclass(frozen=True)
class Ready:
    """The server is there and its schemas are installed: what is left is to serve."""

    settings: Settings          # `upstream` is filled in, embedded or not
    databases: tuple[str, ...]  # those with workflows
    local: LocalServer | None


@contextlib.asynccontextmanager
async def prepared(settings: Settings) -> AsyncIterator[Ready]:
    """Starts the embedded server where none is named, and installs or upgrades the schemas.

    The embedded server is stopped at the end. Raises what proxy.faults explains.
    """
    local: LocalServer | None = None
    async with contextlib.AsyncExitStack() as stack:
        if settings.upstream is None:
            local = LocalServer(settings.data_dir or default_folder())
            stack.push_async_callback(local.stop)
            await local.start()
            settings = wiring.with_upstream(settings, local.upstream)
        databases: tuple[str, ...] = ()
        if settings.engine:
            databases = await wiring.install(settings)
            settings = await wiring.with_shared_secret(settings, databases)
            await wiring.make_keys(settings, databases)
        if local is not None and settings.engine:
            await local.grant()
        yield Ready(settings, databases, local)


async def serve(settings: Settings) -> int:
    """Runs the proxy, with a worker unless `engine` is off, until SIGTERM or SIGINT. Returns the exit status."""
    wiring.check_tls(settings)
    stop = stop_on_signals()
    async with prepared(settings) as ready:
        if settings.processes > 1:
            from proxy.supervisor import supervise

            return await supervise(ready, stop)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(ready.local.watch()) if ready.local is not None else None
            await serve_here(ready, stop, announce=lambda port: announce(ready, port))
            if watch is not None:
                watch.cancel()
    return 0


async def serve_here(ready: Ready, stop: asyncio.Event, *, announce: Callable[[int], Awaitable[None]],
                     reuse_port: bool = False) -> None:
    """The proxy and its workers in this process, until `stop` is set; then both end within `drain_timeout`."""
    from engine.worker import Worker

    settings = ready.settings
    allow_connections(settings.max_client_connections, each=4 if settings.fastpath and COMPILED else 2)
    workers = [Worker(wiring.engine_settings(settings, name)) for name in ready.databases]

    def on_commit() -> None:
        for worker in workers:
            worker.wake()

    launchers = {name: Launcher(wiring.engine_settings(settings, name), settings.max_new_transaction_starts, on_commit)
                 for name in ready.databases}
    server = ProxyServer(_proxy_config(settings, reuse_port=reuse_port), on_commit=on_commit, launchers=launchers)
    async with _listening(server, settings), asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run())
        launching = [group.create_task(launcher.run()) for launcher in launchers.values()]
        with on_hangup(server.reload, stop):
            await announce(server.port)
            group.create_task(asyncio.to_thread(settle))
            await stop.wait()
        log.info("stopping", grace=settings.drain_timeout)
        await _all([server.drain(), *(worker.stop(settings.drain_timeout) for worker in workers)])
        for task in launching:
            task.cancel()


def _proxy_config(settings: Settings, *, reuse_port: bool = False) -> ProxyConfig:
    """What the relay is told."""
    host, port = settings.address
    return ProxyConfig(
        host=host, port=port, upstream=Upstream.parse(settings.dsn), reuse_port=reuse_port or settings.reuse_port,
        socket_dir=settings.socket_dir, proxy_protocol=settings.proxy_protocol,
        startup_timeout=settings.startup_timeout, drain_timeout=settings.drain_timeout,
        max_client_connections=settings.max_client_connections,
        tls=wiring.tls_files(settings), tls_required=settings.tls_required, auth=AuthMode(settings.auth),
        fastpath=settings.fastpath,
    )


@contextlib.asynccontextmanager
async def _listening(server: ProxyServer, settings: Settings) -> AsyncIterator[None]:
    try:
        await server.start()
    except OSError as e:
        raise cannot_listen(settings.listen, e) from e
    try:
        yield
    finally:
        await server.close()


async def work(settings: Settings) -> int:
    """`dfproxy worker`: the engine alone, until SIGTERM or SIGINT. Returns the exit status."""
    from engine.worker import Worker

    stop = stop_on_signals()
    databases = await wiring.install(settings)
    settings = await wiring.with_shared_secret(settings, databases)
    await wiring.make_keys(settings, databases)
    workers = [Worker(wiring.engine_settings(settings, name)) for name in databases]
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run())
        print(f"dfproxy {proxy.__version__}: worker for {dsn.show(settings.dsn)}")
        _ready_line(f"worker ready on {', '.join(databases)}")
        group.create_task(asyncio.to_thread(settle))
        await stop.wait()
        log.info("stopping", grace=settings.drain_timeout)
        await _all([worker.stop(settings.drain_timeout) for worker in workers])
    return 0


async def _all(coroutines: Sequence[Awaitable[None]]) -> None:
    async def one(awaitable: Awaitable[None]) -> None:
        await awaitable

    async with asyncio.TaskGroup() as group:
        for awaitable in coroutines:
            group.create_task(one(awaitable))


async def announce(ready: Ready, port: int) -> None:
    """Says what a person needs to know: on stdout in full, and one line on stderr for whoever waits for it."""
    settings = ready.settings
    host, _ = settings.address
    seen = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    report = await wiring.report(settings)
    if ready.local is not None:
        uri = ready.local.app_uri(seen, port)
    else:
        login = dsn.user(settings.dsn)
        shown = f"[{seen}]" if ":" in seen else seen
        uri = f"postgresql://{login + '@' if login else ''}{shown}:{port}/{dsn.database(settings.dsn)}"
    print(f"dfproxy {proxy.__version__}")
    print(f"  upstream   {report.server}{' (embedded)' if ready.local else ''}, {dsn.show(settings.dsn)}")
    print(f"  workflows  {', '.join(ready.databases) or 'no worker in this process (--no-engine)'}")
    if report.identity:
        print(f"  identity   {report.identity}")
    print(f'  connect    psql "{uri}"')
    for warning in report.warnings:
        print(f"  WARNING    {warning}")
    sys.stdout.flush()
    _ready_line(f"ready on {f'[{host}]' if ':' in host else host}:{port}")


def _ready_line(text: str) -> None:
    print(f"dfproxy {text}", file=sys.stderr, flush=True)
