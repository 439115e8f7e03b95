"""What each run of the command comes down to: a coroutine on an event loop, and an exit status."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable

import uvloop

#: Exit statuses besides 0: a fault that the text names, and a mistake in how dfproxy was called.
FAILED, USAGE = 1, 2


#: New objects after which garbage is looked for. Python's own 700 are what a few steps or logins make.
_GARBAGE_AFTER = 10_000


def settle() -> None:
    """Loads what nobody needed to become ready, and leaves all that is there by now out of garbage collection.

    It stays to the end, and looking through it again and again takes a tenth of a busy worker's time. To be called in
    a thread: loading takes a quarter of a second.
    """
    from dsl import steptext

    steptext.load()
    gc.freeze()
    gc.set_threshold(_GARBAGE_AFTER, 10, 10)


def run(main: Callable[[], Awaitable[int]]) -> int:
    """Runs a coroutine on uvloop to its end and returns the exit status that it gives."""

    async def whole() -> int:
        return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())
