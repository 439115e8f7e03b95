"""A proxy in a process of its own, for tests that look at the process: `python -m tests.proxy.proxy_process UPSTREAM`.

Prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

import psutil
import uvloop

from proxy.rewriter import Rewriter
from proxy.server import ProxyConfig, ProxyServer
from tests.proxy.proxies import compile_stub, mentions_stub


async def _serve(upstream: str) -> None:
    rewriter = Rewriter(mentions=mentions_stub, might=mentions_stub, compile_=compile_stub, narrow=True)
    async with ProxyServer(ProxyConfig(upstream=upstream, port=0), rewriter=rewriter) as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def proxy_process(upstream: str) -> Iterator[tuple[int, psutil.Process]]:
    """Its port and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, upstream], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), psutil.Process(process.pid)
    finally:
        process.communicate(timeout=30)
    assert process.returncode == 0


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1]))
