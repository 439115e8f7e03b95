"""Group commit for checkpoints without a step: those that come while one is being written go into the next transaction.

Ten thousand instances that wake, or park, in the same second would else be ten thousand commits over two connections.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

#: The arguments of duroxide.checkpoint.
Arguments = Sequence[str | None]
#: Most checkpoints in one transaction: each holds its instance's lock until the last one is written.
BATCH = 64


class Recorder:
    """Writes what `record` is given, by `write`, which returns an exception or None for each item.

    `run` it in one or several tasks; while none runs, `record` writes by itself.
    """

    def __init__(self, write: Callable[[list[Arguments]], Awaitable[list[Exception | None]]]) -> None:
        self._write = write
        self._pending: deque[tuple[Arguments, asyncio.Future[None]]] = deque()
        self._wake = asyncio.Event()
        self._running = 0

    async def record(self, arguments: Arguments) -> None:
        """Returns once it is committed. Raises what `write` gives or raises."""
        if not self._running:
            [fault] = await self._write([arguments])
            if fault is not None:
                raise fault
            return
        done = asyncio.get_running_loop().create_future()
        self._pending.append((arguments, done))
        self._wake.set()
        await done

    async def run(self) -> None:
        """Until it is cancelled; whoever waits then is told that the connection is lost."""
        self._running += 1
        batch: list[tuple[Arguments, asyncio.Future[None]]] = []
        try:
            while True:
                while not self._pending:
                    self._wake.clear()
                    await self._wake.wait()
                # What was given up while it waited is not written at all.
                batch = [item for item in (self._pending.popleft() for _ in range(min(BATCH, len(self._pending))))
                         if not item[1].done()]
                if batch:
                    await self._flush(batch)
                batch = []
        finally:
            self._running -= 1
            left = batch if self._running else [*batch, *self._pending]
            for _, done in left:
                if not done.done():
                    done.set_exception(ConnectionAbortedError("the worker ends"))
                    done.exception()  # whoever waited may be gone

    async def _flush(self, batch: list[tuple[Arguments, asyncio.Future[None]]]) -> None:
        faults: Sequence[Exception | None]
        try:
            faults = await self._write([arguments for arguments, _ in batch])
        except Exception as e:  # noqa: BLE001 - whoever asked raises it
            faults = [e] * len(batch)
        for (_, done), fault in zip(batch, faults, strict=True):
            if done.done():
                continue
            if fault is None:
                done.set_result(None)
            else:
                done.set_exception(fault)
                done.exception()
