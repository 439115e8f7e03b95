"""The budget of step connections: places that are taken in the order in which they were asked for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Slots:
    """`limit` places. A wait for one times out once none was given back for so long: a queue that moves is no fault."""

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit = limit
        self.timeout = timeout
        self.in_use = 0
        self._queue: deque[tuple[float, asyncio.Future[None]]] = deque()  # when it was asked for, and the place
        self._timer: asyncio.TimerHandle | None = None  # one for all that wait: there are many, and few time out
        self._given_back = 0.0  # loop time
        self.crowd = 10 * limit  #: so many that wait are more than enough: whoever adds to them should hold back
        self.on_room: Callable[[], None] = lambda: None  #: called when they become fewer than that

    @property
    def waiting(self) -> int:
        """How many wait for a place (or have just given up)."""
        return len(self._queue)

    async def take(self) -> None:
        """Waits for a place. Raises TimeoutError. `free` gives it back."""
        if self.in_use < self.limit and not self._queue:
            self.in_use += 1
            return
        loop = asyncio.get_running_loop()
        place = loop.create_future()
        self._queue.append((loop.time(), place))
        if self._timer is None:
            self._timer = loop.call_later(self.timeout, self._look)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.exception() is None:
                self.free()  # it was handed over in this very moment
            raise

    def _look(self) -> None:
        """Gives up on those that have waited in vain for too long; they stand in front."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._queue:
            asked, place = self._queue[0]
            due = max(asked, self._given_back) + self.timeout
            if not place.done() and due > loop.time():
                self._timer = loop.call_at(due, self._look)
                return
            self._pop()
            if not place.done():
                place.set_exception(TimeoutError())

    def _pop(self) -> asyncio.Future[None]:
        _, place = self._queue.popleft()
        if len(self._queue) == self.crowd - 1:
            self.on_room()
        return place

    def free(self) -> None:
        """Gives a place back, to whoever has waited longest."""
        self._given_back = asyncio.get_running_loop().time()
        while self._queue:
            place = self._pop()
            if not place.done():
                place.set_result(None)
                return
        self.in_use -= 1
