"""`dfproxy serve --processes N`: N processes share one port (SO_REUSEPORT), and a parent keeps them running.

The parent does not serve. It binds the port without listening, so that the number stays ours while a child is
restarted, and hands each child its settings over a pipe: nothing secret stands in `ps` or in the environment. A child
whose pipe closes stops, so a parent that is killed leaves nobody behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import structlog

from proxy.faults import cannot_listen
from proxy.logs import configure
from proxy.process import run
from proxy.serve import Ready, announce, on_hangup, serve_here, stop_on_signals
from proxy.settings import Settings

log = structlog.get_logger("dfproxy.supervisor")

#: A child that lived longer than this (seconds) is restarted at once; others after a growing pause.
SETTLED = 60.0
LONGEST_PAUSE = 30.0
READY = b"ready\n"


async def supervise(ready: Ready, stop: asyncio.Event) -> int:
    """Runs `processes` children until `stop` is set, then lets them drain. Returns the exit status."""
    settings = ready.settings
    host, port = settings.address
    with _held(host, port, shared=settings.reuse_port) as port:
        own = {"listen": f"{f'[{host}]' if ':' in host else host}:{port}"}
        # A port can be shared, a Unix-domain socket can't: that one is the first child's.
        handed = [_dump(settings.model_copy(update=own if n == 0 else {**own, "socket_dir": None}), ready.databases)
                  for n in range(settings.processes)]
        started = [asyncio.Event() for _ in range(settings.processes)]

        async def say_when_ready() -> None:
            for event in started:
                await event.wait()
            await announce(ready, port)

        live: set[asyncio.subprocess.Process] = set()

        def reload() -> None:
            for process in live:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGHUP)

        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(say_when_ready())]
            if ready.local is not None:
                helpers.append(group.create_task(ready.local.watch()))
            children = [group.create_task(_keep(n, handed[n], stop, event, live, settings.drain_timeout))
                        for n, event in enumerate(started)]
            with on_hangup(reload, stop):
                await asyncio.wait(children)
            for helper in helpers:
                helper.cancel()
    return 0


@contextlib.contextmanager
def _held(host: str, port: int, *, shared: bool) -> Iterator[int]:
    """Keeps a port bound, not listening, for children with SO_REUSEPORT; yields its number (0 has picked one).

    Raises UserError where it is in use; unless `shared`, also by another dfproxy that would share it.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            if not shared:
                with socket.socket(family, kind, proto) as alone:
                    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    alone.bind(address)
            held = stack.enter_context(socket.socket(family, kind, proto))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(address)
        except OSError as e:
            raise cannot_listen(f"{host}:{port}", e) from e
        yield int(held.getsockname()[1])


async def _keep(number: int, handed: bytes, stop: asyncio.Event, started: asyncio.Event,
                live: set[asyncio.subprocess.Process], grace: float) -> None:
    """One child, started again whenever it ends by itself, until `stop`."""
    pause = 0.0
    while not stop.is_set():
        since = time.monotonic()
        status = await _child(number, handed, stop, started, live, grace)
        if stop.is_set():
            return
        pause = 0.0 if time.monotonic() - since > SETTLED else min(max(0.2, pause * 2), LONGEST_PAUSE)
        log.error("a process ended; starting another", number=number, status=status, pause=pause)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)


async def _child(number: int, handed: bytes, stop: asyncio.Event, started: asyncio.Event,
                 live: set[asyncio.subprocess.Process], grace: float) -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy.supervisor", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    try:
        with contextlib.suppress(ConnectionError):
            process.stdin.write(handed + b"\n")
            await process.stdin.drain()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(stop.wait())
            ending = group.create_task(process.wait())
            hearing = group.create_task(_hear(process, started, live))
            await asyncio.wait((stopping, ending), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not ending.done():
                process.terminate()
                # A little more than the child grants itself.
                await asyncio.wait((ending,), timeout=grace + 5)
                if not ending.done():
                    log.error("a process did not stop in time; killing it", number=number)
                    process.kill()
            hearing.cancel()
    finally:
        live.discard(process)
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0


async def _hear(process: asyncio.subprocess.Process, started: asyncio.Event,
                live: set[asyncio.subprocess.Process]) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        if line == READY:
            started.set()
            live.add(process)  # it knows what to do with SIGHUP by now


# -- the child --------------------------------------------------------------------------------------------


def _dump(settings: Settings, databases: tuple[str, ...]) -> bytes:
    values = settings.model_dump(mode="json")
    for name in ("upstream", "secret"):
        value = getattr(settings, name)
        values[name] = None if value is None else value.get_secret_value()
    return json.dumps({"settings": values, "databases": databases}).encode()


async def _serve_as_child() -> int:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    handed = json.loads(await reader.readline())
    settings = Settings(**handed["settings"])
    configure(settings.log_level, settings.log_format)
    stop = stop_on_signals()
    # Ctrl-C reaches the whole foreground group; the parent passes on what concerns the child.
    loop.remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def parent_gone() -> None:
        await reader.read()
        stop.set()

    async def tell(_: int) -> None:
        os.write(sys.stdout.fileno(), READY)

    async with asyncio.TaskGroup() as group:
        watch = group.create_task(parent_gone())
        await serve_here(Ready(settings, tuple(handed["databases"]), None), stop, announce=tell, reuse_port=True)
        watch.cancel()
    return 0


if __name__ == "__main__":
    sys.exit(run(_serve_as_child))
