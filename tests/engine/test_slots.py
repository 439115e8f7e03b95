"""The budget of connections: in order, bounded, and no place lost to whoever gives up."""

from __future__ import annotations

import asyncio

import pytest

from engine.slots import Slots


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
