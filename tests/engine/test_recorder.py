"""Group commit: what waits together is written together, and everybody hears what became of his own."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from engine.model import Changes, Checkpoint, Finish
from engine.recorder import BATCH, Arguments, Recorder
from engine.store import LeaseLostError, Store
from tests.engine.fix_graphs import signal
from tests.engine.helpers import Client, install, polled, settings
from tests.fix_postgres import Database


class Writer:
    """Writes when it is told to; items named `bad` get a fault."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = asyncio.Event()

    async def __call__(self, items: list[Arguments]) -> list[Exception | None]:
        self.batches.append([str(item[0]) for item in items])
        await self.gate.wait()
        return [ValueError("bad") if item[0] == "bad" else None for item in items]


async def test_what_comes_meanwhile_goes_together() -> None:
    writer = Writer()
    recorder = Recorder(writer)
    runner = asyncio.create_task(recorder.run())
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(recorder.record([name])) for name in ["a", *["b"] * BATCH, "bad", "given up", "c"]]
    await asyncio.sleep(0.01)
    waiting[-2].cancel()
    writer.gate.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(o) for o in outcomes[-3:]] == [ValueError, asyncio.CancelledError, type(None)]
    assert set(outcomes[:-3]) == {None}
    assert [name for batch in writer.batches for name in batch] == ["a", *["b"] * BATCH, "bad", "c"]
    assert len(writer.batches) <= 3
    runner.cancel()
    await asyncio.wait([runner])


async def test_the_end_of_the_worker_is_told() -> None:
    writer = Writer()
    recorder = Recorder(writer)
    runner = asyncio.create_task(recorder.run())
    await asyncio.sleep(0)
    written = asyncio.create_task(recorder.record(["a"]))
    await asyncio.sleep(0.01)
    queued = asyncio.create_task(recorder.record(["b"]))
    await asyncio.sleep(0.01)
    runner.cancel()
    for task in (written, queued):
        with pytest.raises(ConnectionAbortedError):
            await task
    writer.gate.set()
    await recorder.record(["c"])  # by itself
    with pytest.raises(ValueError, match="bad"):
        await recorder.record(["bad"])


async def _held(database: Database, count: int) -> tuple[Store, dict[str, str]]:
    store = Store(settings(database))
    await store.open()
    await store.register()
    with Client(database) as c:
        for _ in range(count):
            c.start(signal("go"))
    return store, {claim.instance_id: claim.token for claim in (await polled(store, count)).claims}


async def test_lost_leases_and_faults_stay_with_their_own(database: Database) -> None:
    await install(database)
    store, tokens = await _held(database, 6)
    runner = asyncio.create_task(store.recorder.run())
    await asyncio.sleep(0)
    ids = list(tokens)
    lost, bad = ids[1], ids[3]

    def record(instance: str, text: str = "x") -> asyncio.Task[Any]:
        changes = Changes(rows=[Checkpoint("", 0, "completed", text)], finish=Finish("completed", text))
        token = "00000000-0000-0000-0000-000000000000" if instance == lost else tokens[instance]
        return asyncio.create_task(store.checkpoint(instance, token, changes))

    with Client(database) as c, Client(database) as other:
        first = [record(i) for i in ids[:3]]
        outcomes = await asyncio.gather(*first, return_exceptions=True)
        assert [type(o) for o in outcomes] == [type(None), LeaseLostError, type(None)]
        # A fault of one of them: nothing of the batch is written, then each for itself.
        c.execute("ALTER TABLE duroxide.history ADD CHECK (result <> 'never')")
        outcomes = await asyncio.gather(record(bad, "never"), record(ids[4]), return_exceptions=True)
        assert [type(o) for o in outcomes] == [asyncpg.CheckViolationError, type(None)]
        # A row that somebody has locked holds up itself alone.
        other.execute("BEGIN")
        other.execute("SELECT FROM duroxide.queue WHERE instance_id = %s FOR UPDATE", bad)
        outcomes = await asyncio.gather(record(bad), record(ids[5]), return_exceptions=True)
        assert [type(o) for o in outcomes] == [asyncpg.LockNotAvailableError, type(None)]
        other.execute("COMMIT")
        await record(bad)
        assert {i for i, in c.rows("SELECT id FROM duroxide.instances WHERE status = 'completed'")} == set(ids) - {lost}
    runner.cancel()
    await asyncio.wait([runner])
    await store.close()
