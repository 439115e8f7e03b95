"""What ended long ago is removed with everything that belongs to it, in batches, by one worker at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from engine import retention
from engine.retention import one_pass
from engine.store import Store
from tests.engine.fix_graphs import seq, signal, sql
from tests.engine.helpers import Client, ended, install, running_worker, settings, until
from tests.fix_postgres import Database

OLD = """
INSERT INTO duroxide.instances (id, graph, status, created_at, ended_at)
SELECT lpad(to_hex(n), 8, '0'), '[{"id":"00000001","type":"SQL","query":"SELECT 1"}]',
       (ARRAY['completed', 'failed', 'cancelled'])[n %% 3 + 1], now() - make_interval(days => n), now() - make_interval(days => n)
  FROM generate_series(1, %s) n
"""
HISTORY = """
INSERT INTO duroxide.history (instance_id, execution, node, event)
SELECT id, '', n, 'completed' FROM duroxide.instances, generate_series(0, 2) n
"""


@asynccontextmanager
async def a_store(database: Database, **changes: Any) -> AsyncIterator[Store]:
    store = Store(settings(database, **changes))
    await store.open()
    await store.register()  # sets its clock
    try:
        yield store
        await store.unregister()
    finally:
        await store.close()


def fill(client: Client, count: int) -> None:
    """Instances that ended 1, 2, 3... days ago; nothing of them is queued."""
    client.execute(OLD, count)
    client.execute("DELETE FROM duroxide.queue")
    client.execute(HISTORY)


def days(client: Client) -> list[int]:
    """Of what is left: how many days ago it ended; each has its history still, and nothing else has any."""
    assert client.one("SELECT count(*) FROM duroxide.history") == 3 * client.one("SELECT count(*) FROM duroxide.instances")
    return [n for n, in client.rows("SELECT ('x' || id)::bit(32)::int FROM duroxide.instances ORDER BY 1")]


async def test_age_and_number(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await install(database)
    monkeypatch.setattr(retention, "BATCH", 4)
    with Client(database) as c:
        fill(c, 40)
        async with a_store(database) as store:
            done = await one_pass(settings(database), store)
            assert (done.removed, done.batches, done.yielded) == (11, 3, False)
            assert days(c) == list(range(1, 30))
            assert (await one_pass(settings(database, retention_max_instances=50), store)).removed == 0
            assert (await one_pass(settings(database, retention_max_instances=20), store)).removed == 9
            assert days(c) == list(range(1, 21))
            # Whichever of the two removes more.
            assert (await one_pass(settings(database, retention_max_instances=1000, retention_days=10), store)).removed == 11
            assert days(c) == list(range(1, 10))
            assert (await one_pass(settings(database, retention_days=0), store)).removed == 9
        assert days(c) == []


async def test_what_has_not_ended_stays(database18: Database) -> None:
    """Neither what waits, nor what was cancelled and is still held by somebody, nor what somebody has locked."""
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        fill(c, 3)
        waiting = c.start(signal("go"))
        cancelled = c.start(signal("go"))
        c.execute("SELECT df.cancel(%s)", cancelled)
        c.execute("UPDATE duroxide.instances SET created_at = '2000-01-01', ended_at = ended_at - interval '1 year'")
        c.execute("INSERT INTO duroxide.signals (instance_id, name) VALUES ('00000001', 'late')")
        other.execute("BEGIN")
        other.execute("SELECT FROM duroxide.instances WHERE id = '00000002' FOR UPDATE")
        async with a_store(database18) as store:
            assert (await one_pass(settings(database18), store)).removed == 2
            left = [i for i, in c.rows("SELECT id FROM duroxide.instances")]
            assert sorted(left) == sorted(["00000002", waiting, cancelled])
            # A signal that came too late for its instance; the cancel is not one of those.
            assert c.rows("SELECT instance_id FROM duroxide.signals") == [(cancelled,)]
            other.execute("COMMIT")
            assert (await one_pass(settings(database18), store)).removed == 1


async def test_one_worker_at_a_time(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        fill(c, 40)
        other.execute("BEGIN")
        other.execute("SELECT duroxide.retain(now() - interval '39 days', NULL, '-infinity', 1)")
        async with a_store(database18) as store:
            done = await one_pass(settings(database18), store)
            assert (done.removed, done.yielded) == (0, True)
            other.execute("COMMIT")
            assert (await one_pass(settings(database18), store)).removed == 10


async def test_batches_shrink_where_they_are_large(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await install(database18)
    monkeypatch.setattr(retention, "BRISK", 0.0)
    monkeypatch.setattr(retention, "BATCH", 8)
    with Client(database18) as c:
        fill(c, 20)
        async with a_store(database18) as store:
            done = await one_pass(settings(database18, retention_days=0), store)
        assert (done.removed, done.batches) == (20, 3 + 6 + 1)  # 8, 4, 2, six with one, and one that finds nothing
        assert days(c) == []


async def test_workers_do_it_by_themselves(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a constraint of somebody's own holds one of them: that stays, the worker goes on."""
    await install(database18)
    monkeypatch.setattr(retention, "FIRST", 0.0)
    with Client(database18) as c:
        fill(c, 40)
        c.execute("CREATE TABLE mine (id text REFERENCES duroxide.instances)")
        c.execute("INSERT INTO mine VALUES ('00000023')")  # 35 days
        tree = seq(sql("SELECT 1"), sql("SELECT 2 AS n"))
        async with running_worker(database18, reconcile_interval=0.05) as worker:
            instance = c.start(tree)
            assert (await ended(c, instance))[0][0] == "completed"
            assert c.one("SELECT count(*) FROM duroxide.instances") == 41
            c.execute("DELETE FROM mine")
            await until(lambda: c.one("SELECT count(*) FROM duroxide.instances") == 30)
            assert worker.statistics.lives == 1
        c.execute("UPDATE duroxide.instances SET ended_at = ended_at - interval '30 days'")
        async with running_worker(database18, reconcile_interval=0.0):
            instance = c.start(tree)
            assert (await ended(c, instance))[0][0] == "completed"
        assert c.one("SELECT count(*) FROM duroxide.instances") == 31


async def test_only_the_service_role_may(database18: Database) -> None:
    await install(database18)
    other = await asyncpg.connect(database18.superuser_dsn)
    try:
        await other.execute(f"CREATE ROLE nosy_{database18.name}")
        await other.execute(f"SELECT df.grant_usage('nosy_{database18.name}')")
        await other.execute(f"SET ROLE nosy_{database18.name}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied for function retain"):
            await other.execute("SELECT duroxide.retain(now(), NULL, '-infinity', 1)")
    finally:
        await other.close()
