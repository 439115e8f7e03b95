"""The budget of step connections: places that are taken in the order in which they were asked for.

Not all of them are given out while the worker can't keep up with those that are. If several answers are there whenever
it comes to look, then one more step would end no sooner: its answer would only wait with the others, and its session
would meanwhile take the processor's caches from theirs. Where answers come one by one, because steps take long, or the
server is far away or has processors of its own, every place is given out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

#: Mean number of answers at a look, above which fewer places are given out, and below which more are.
MANY, FEW = 3.0, 2.0
#: Seconds between two changes of that, by one place. Where answers come one by one, or none, as when steps begin to
#: take long, there are more places by this factor each time, until every place is given out.
PACE = 0.01
MORE = 1.25


Wish = TypeVar("Wish")
Given = TypeVar("Given")


class Backlog:
    """How many answers there are, on average, when the worker comes to look."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._here = self._answers = self._looks = 0

    def note(self) -> None:
        """An answer has been read. All that are read before the loop does anything else are those of one look."""
        if not self._here:
            self._loop.call_soon(self._look)
        self._here += 1

    def _look(self) -> None:
        self._answers += self._here
        self._looks += 1
        self._here = 0

    def mean(self) -> float:
        """Since it was last asked for."""
        mean = self._answers / self._looks if self._looks else 0.0
        self._answers = self._looks = 0
        return mean


class Slots(Generic[Wish, Given]):
    """`limit` places. A wait for one times out once none was given back for so long: a queue that moves is no fault.

    Who waits may have a wish: something that whoever has a place can hand over together with it. `shed` takes back what
    was handed over to somebody who has given up in that very moment, and frees the place.
    """

    def __init__(self, limit: int, timeout: float, backlog: Backlog | None = None,
                 shed: Callable[[Given], None] = lambda given: None) -> None:
        self.limit = limit
        self.timeout = timeout
        self.in_use = 0
        self.room = float(limit)  #: so many are given out at present
        self._backlog = backlog
        self._shed = shed
        self._pacing: asyncio.TimerHandle | None = None  # while anyone waits
        #: When it was asked for, the place, and the wish.
        self._queue: deque[tuple[float, asyncio.Future[Given | None], Wish | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None  # one for all that wait: there are many, and few time out
        self._given_back = 0.0  # loop time
        self.crowd = 10 * limit  #: so many that wait are more than enough: whoever adds to them should hold back
        self.on_room: Callable[[], None] = lambda: None  #: called when they become fewer than that

    @property
    def waiting(self) -> int:
        """How many wait for a place (or have just given up)."""
        return len(self._queue)

    async def take(self, wish: Wish | None = None) -> Given | None:
        """Waits for a place, and returns what came with it. Raises TimeoutError. `free` gives it back."""
        if self.in_use < int(self.room) and not self._queue:
            self.in_use += 1
            return None
        loop = asyncio.get_running_loop()
        place: asyncio.Future[Given | None] = loop.create_future()
        self._queue.append((loop.time(), place, wish))
        if self._timer is None:
            self._timer = loop.call_later(self.timeout, self._look)
        if self._pacing is None and self._backlog is not None:
            self._backlog.mean()  # what was before anyone waited doesn't count
            self._pacing = loop.call_later(PACE, self._pace)
        try:
            return await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.exception() is None:
                # It was given in this very moment.
                if (given := place.result()) is None:
                    self.free()
                else:
                    self._shed(given)
            raise

    def next_wish(self) -> Wish | None:
        """The wish of whoever would get the next place; None: there is none, or no place to give."""
        while self._queue and self._queue[0][1].done():
            self._pop()
        return self._queue[0][2] if self._queue and self.in_use <= int(self.room) else None

    def hand_over(self, given: Given) -> None:
        """Gives a place, and this with it, to the one with `next_wish`, who must free it."""
        self._given_back = asyncio.get_running_loop().time()
        self._pop().set_result(given)

    def _look(self) -> None:
        """Gives up on those that have waited in vain for too long; they stand in front."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._queue:
            asked, place, _ = self._queue[0]
            due = max(asked, self._given_back) + self.timeout
            if not place.done() and due > loop.time():
                self._timer = loop.call_at(due, self._look)
                return
            self._pop()
            if not place.done():
                place.set_exception(TimeoutError())

    def _pop(self) -> asyncio.Future[Given | None]:
        _, place, _ = self._queue.popleft()
        if len(self._queue) == self.crowd - 1:
            self.on_room()
        return place

    def free(self) -> None:
        """Gives a place back, to whoever has waited longest."""
        self._given_back = asyncio.get_running_loop().time()
        self.in_use -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue and self.in_use < int(self.room):
            place = self._pop()
            if not place.done():
                self.in_use += 1
                place.set_result(None)

    def _pace(self) -> None:
        """Gives out fewer places or more."""
        assert self._backlog is not None
        self._pacing = None
        if not self._queue:
            self.room = float(self.limit)
            return
        mean = self._backlog.mean()
        if mean > MANY:
            self.room = min(self.limit, max(MANY, min(self.room, self.in_use) - 1))
        elif mean < FEW:
            self.room = min(self.limit, self.room + 1 if mean > 1 else self.room * MORE)
            self._hand_out()
        self._pacing = asyncio.get_running_loop().call_later(PACE, self._pace)
