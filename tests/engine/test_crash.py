"""Workers that die or stall: steps take effect exactly once, and a lost lease can't write."""

from __future__ import annotations

import asyncio
import os
import random
import signal as unix

import pytest

from tests.engine.fix_graphs import loop, seq, sql
from tests.engine.helpers import Client, ended, install, running_worker, until, worker_process
from tests.fix_postgres import Database


@pytest.mark.slow
async def test_exactly_once_under_kill_9(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE documents (id int PRIMARY KEY, processed bool DEFAULT false)")
        c.execute("INSERT INTO documents SELECT generate_series(1, 2000)")
        c.execute("CREATE TABLE log (id int, instance text)")
        batch = seq(
            sql("SELECT id FROM documents WHERE NOT processed ORDER BY id LIMIT 10", "batch"),
            sql("INSERT INTO log SELECT id, '{sys_instance_id}' FROM $batch.*"),
            sql("UPDATE documents SET processed = true WHERE id IN (SELECT id FROM $batch.*)"))
        instance = c.start(loop(batch, sql("SELECT EXISTS (SELECT FROM documents WHERE NOT processed) AS more")))
        sequences = [c.start(seq(*[sql(f"INSERT INTO log SELECT {-n}, '{{sys_instance_id}}'") for n in range(1, 8)]))
                     for _ in range(20)]
        kills = 0
        while c.one("SELECT count(*) FROM duroxide.queue") and kills < 5:
            with worker_process(database18, lease=2.0) as process:
                before = c.one("SELECT count(*) FROM log")
                await until(lambda before=before: c.one("SELECT count(*) FROM log") > before
                            or not c.one("SELECT count(*) FROM duroxide.queue"))
                await asyncio.sleep(random.uniform(0, 0.2))
                process.kill()
            kills += 1
        assert kills >= 3
        async with running_worker(database18):
            outcomes = await ended(c, instance, *sequences)
        assert {s for s, _ in outcomes} == {"completed"}
        assert c.rows("SELECT count(*) FROM documents WHERE processed") == [(2000,)]
        assert c.rows("SELECT count(*), count(DISTINCT id) FROM log WHERE id > 0") == [(2000, 2000)]
        assert c.rows("SELECT count(*), count(DISTINCT (id, instance)) FROM log WHERE id < 0") == [(140, 140)]


async def test_a_stalled_worker_is_replaced_and_can_t_write(database18: Database) -> None:
    """The first worker stops between its step's end and its checkpoint, or in the step; the second one takes over."""
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE log (worker int)")
        instance = c.start(seq(sql("WITH s AS (SELECT pg_sleep(1)) INSERT INTO log SELECT pg_backend_pid() FROM s"),
                               sql("SELECT count(*) AS n FROM log")))
        with worker_process(database18, lease=1.0) as stalled:
            await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE state = 'active' "
                                      "AND application_name = 'dfproxy:step' AND datname = current_database()") == 1)
            os.kill(stalled.pid, unix.SIGSTOP)
            token = c.one("SELECT token FROM duroxide.queue")
            async with running_worker(database18, lease=1.0):
                assert await ended(c, instance) == [("completed", '{"rows":[{"n":1}],"row_count":1}')]
                os.kill(stalled.pid, unix.SIGCONT)
                # It notices, begins a new life, and is of use again.
                await until(lambda: c.one("SELECT count(*) FROM duroxide.workers") == 2)
            assert stalled.poll() is None
            another = c.start(sql("SELECT 2 AS n"))
            assert (await ended(c, another))[0][0] == "completed"
        assert c.rows("SELECT count(*) FROM log") == [(1,)]
        with pytest.raises(Exception, match=f"lease on instance {instance} lost"):
            c.execute("SELECT duroxide.checkpoint(%s, %s, '[]')", instance, token)


async def test_a_killed_worker_s_instances_are_taken_over_without_waiting(database18: Database) -> None:
    """A successor on the same machine sees that the process is gone; the lease is far from over."""
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
        instance = c.start(sql("WITH s AS (SELECT pg_sleep(0.5)) INSERT INTO t SELECT 1 FROM s"))
        with worker_process(database18, lease=3600.0) as process:
            await until(lambda: c.one("SELECT count(*) FROM duroxide.queue WHERE owner IS NOT NULL") == 1)
            process.kill()
            process.wait()
        async with running_worker(database18, lease=3600.0):
            assert (await ended(c, instance))[0][0] == "completed"
        assert c.rows("SELECT n FROM t") == [(1,)]


async def test_two_workers_share_the_work(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
        instances = [c.start(sql(f"INSERT INTO t VALUES ({n})")) for n in range(200)]
        async with running_worker(database18, claim_batch=5, max_instances=5) as first, \
                running_worker(database18, claim_batch=5, max_instances=5) as second:
            outcomes = await ended(c, *instances)
            assert first.statistics.claimed + second.statistics.claimed == 200
            assert min(first.statistics.claimed, second.statistics.claimed) > 0
        assert {s for s, _ in outcomes} == {"completed"}
        assert c.rows("SELECT count(*), count(DISTINCT n) FROM t") == [(200, 200)]
