"""The budget of connections: in order, bounded, and no place lost to whoever gives up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.slots import FEW, MANY, Backlog, Slots


async def test_first_come_first_served() -> None:
    slots, order = Slots(1, 60), []
    await slots.take()

    async def one(n: int) -> None:
        await slots.take()
        order.append(n)
        slots.free()

    async with asyncio.TaskGroup() as group:
        for n in range(5):
            group.create_task(one(n))
        await asyncio.sleep(0)
        assert slots.waiting == 5
        slots.free()
    assert (order, slots.in_use, slots.waiting) == ([0, 1, 2, 3, 4], 0, 0)


async def test_whoever_gives_up_loses_no_place() -> None:
    slots = Slots(1, 60)
    await slots.take()
    tasks = [asyncio.create_task(slots.take()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    slots.free()  # for the second
    tasks[1].cancel()  # which is told too late
    await asyncio.wait(tasks, timeout=60)
    assert [t.cancelled() for t in tasks] == [True, True, False]
    assert slots.in_use == 1
    slots.free()
    assert slots.in_use == 0


async def test_time_runs_only_while_nothing_moves() -> None:
    slots = Slots(1, 0.2)
    await slots.take()
    with pytest.raises(TimeoutError):
        await slots.take()
    waiting = [asyncio.create_task(slots.take()) for _ in range(3)]
    slots._given_back = asyncio.get_running_loop().time() + 1000
    await asyncio.sleep(0.4)
    assert not any(t.done() for t in waiting)
    for _ in waiting:
        slots.free()
    await asyncio.gather(*waiting)
    slots.free()
    assert slots.in_use == 0


async def test_it_says_when_there_is_room() -> None:
    slots, said = Slots(1, 60), []
    slots.crowd = 2
    slots.on_room = lambda: said.append(slots.waiting)
    await slots.take()
    tasks = [asyncio.create_task(slots.take()) for _ in range(4)]
    await asyncio.sleep(0)
    for _ in range(4):
        slots.free()
    assert said == [1]
    await asyncio.gather(*tasks)


class Told(Backlog):
    """A backlog that says what it is told to, then that nothing is answered."""

    def __init__(self, means: Iterable[float]) -> None:
        super().__init__(asyncio.get_running_loop())
        self.means = iter(means)

    def mean(self) -> float:
        return next(self.means, 0.0)


async def test_a_backlog_is_what_is_there_at_a_look() -> None:
    backlog = Backlog(asyncio.get_running_loop())
    assert backlog.mean() == 0
    for here in (1, 5, 3):
        for _ in range(here):
            backlog.note()
        await asyncio.sleep(0)
    assert (backlog.mean(), backlog.mean()) == (3, 0)


async def test_fewer_places_while_answers_pile_up() -> None:
    """Taken away as they are given back, and given out again when answers come one by one."""
    means = [0.0, *[MANY + 1] * 30, *[(FEW + MANY) / 2] * 5]
    slots = Slots(20, 60, Told(means))
    for _ in range(20):
        await slots.take()
    assert slots._pacing is None  # nobody waits
    tasks = [asyncio.create_task(slots.take()) for _ in range(40)]
    await asyncio.sleep(0)
    taken = []
    for n in range(35):
        slots._pace()
        for _ in range(slots.in_use - int(slots.room)):
            slots.free()
        taken.append(slots.in_use)
        assert slots.waiting == 40, n
    assert taken == sorted(taken, reverse=True)
    assert taken[-6:] == [3] * 6
    slots.free()  # what is given back in time is for the next one
    assert (slots.in_use, slots.waiting) == (3, 39)
    for _ in range(20):
        slots._pace()
    assert (slots.in_use, slots.waiting) == (20, 22)
    for _ in range(22 + 20):
        slots.free()
    await asyncio.gather(*tasks)
    slots._pace()
    assert (slots.in_use, slots.room, slots._pacing) == (0, 20, None)


async def test_all_places_are_given_out_in_time_when_nothing_is_answered() -> None:
    loop = asyncio.get_running_loop()
    slots = Slots(32, 60, Told([]))
    slots.room = MANY
    began = loop.time()
    await asyncio.gather(*(slots.take() for _ in range(32)))
    assert loop.time() - began > 0.05  # in steps: it took all of them
    assert (slots.in_use, slots.waiting) == (32, 0)


@given(limit=st.integers(1, 6), means=st.lists(st.sampled_from([0.0, 1.5, FEW, MANY, 40.0]), max_size=40),
       deeds=st.lists(st.sampled_from(["take", "take", "free", "give up", "pace"]), min_size=20, max_size=60))
def test_no_place_is_lost_or_given_out_twice(limit: int, means: list[float], deeds: list[str]) -> None:
    async def play() -> None:
        slots = Slots(limit, 60, Told(itertools.chain([0.0], means)))
        waiting: list[asyncio.Task[None]] = []
        holders = 0
        for deed in [*deeds, "take", "take", "take"]:
            if deed == "take":
                waiting.append(asyncio.create_task(slots.take()))
            elif deed == "free" and holders:
                holders -= 1
                slots.free()
            elif deed == "give up" and waiting:
                waiting[-1].cancel()
            elif deed == "pace" and slots._pacing is not None:
                slots._pacing.cancel()
                slots._pace()
            for _ in range(3):
                await asyncio.sleep(0)
            holders += sum(t.done() and not t.cancelled() for t in waiting)
            waiting = [t for t in waiting if not t.done()]
            assert holders == slots.in_use <= limit
        async with asyncio.timeout(20):
            while waiting or holders:
                if holders:
                    holders -= 1
                    slots.free()
                if waiting and not holders:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0)
                holders += sum(t.done() and not t.cancelled() for t in waiting)
                waiting = [t for t in waiting if not t.done()]
        assert slots.in_use == 0

    asyncio.run(play())
