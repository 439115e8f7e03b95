"""What each run of the command comes down to: a coroutine on an event loop, and an exit status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvloop

#: Exit statuses besides 0: a fault that the text names, and a mistake in how dfproxy was called.
FAILED, USAGE = 1, 2


def run(main: Callable[[], Awaitable[int]]) -> int:
    """Runs a coroutine on uvloop to its end and returns the exit status that it gives."""

    async def whole() -> int:
        return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())
