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
        self._queue: deque[asyncio.Future[None]] = deque()
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
        self._queue.append(place)
        asked = loop.time()
        try:
            while not place.done():
                left = max(asked, self._given_back) + self.timeout - loop.time()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait((place,), timeout=left)
        except BaseException:
            if not place.cancel():
                self.free()  # it was handed over in this very moment
            raise

    def free(self) -> None:
        """Gives a place back, to whoever has waited longest."""
        self._given_back = asyncio.get_running_loop().time()
        while self._queue:
            place = self._queue.popleft()
            if len(self._queue) == self.crowd - 1:
                self.on_room()
            if not place.done():
                place.set_result(None)
                return
        self.in_use -= 1
