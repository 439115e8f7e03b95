"""What waiting workflows cost: rows, and nothing else. Counted, not timed; bench/parking.py has the figures."""

from __future__ import annotations

import asyncio

from bench.parking import FILL, GRAPHS, PARK, WAITING
from bench.turns import Counter
from tests.engine.fix_graphs import loop, seq, sleep, sql
from tests.engine.helpers import Client, Through, ended, install, running_worker, until
from tests.fix_postgres import Database

ROWS = """
SELECT i.graph->0->>'type', i.status, q.owner, q.token, q.crashes, q.claims, q.started_at IS NOT NULL,
       q.wake_at > now() + interval '20 days', isfinite(q.wake_at), h.event, h.result, h.meta IS NULL,
       (h.meta->>'wake_at')::timestamptz = q.wake_at
  FROM duroxide.instances i JOIN duroxide.queue q ON q.instance_id = i.id
  JOIN duroxide.history h ON h.instance_id = i.id WHERE i.id IN (SELECT max(id) FROM duroxide.instances GROUP BY graph, claims) ORDER BY 1, q.claims
"""


async def test_the_bench_parks_as_the_worker_does(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.connection.execute(FILL, {"graphs": list(GRAPHS), "role": database18.owner, "first": 1, "last": 3})
        async with running_worker(database18) as worker:
            await until(lambda: worker.statistics.claimed == 3 and worker.held == 0)
        parked = c.rows(ROWS)
        c.execute("DELETE FROM duroxide.instances")
        c.connection.execute(FILL, {"graphs": list(GRAPHS), "role": database18.owner, "first": 1, "last": 3})
        c.execute(PARK)
        c.connection.execute(WAITING, {"low": "00000001", "high": "00000003"})
        assert len(parked) == 3
        assert c.rows(ROWS) == parked


async def test_an_idle_worker_asks_once_a_poll_whatever_waits(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c, Counter(database18.cluster.port or 0) as relay:
        c.connection.execute(FILL, {"graphs": list(GRAPHS), "role": database18.owner, "first": 1, "last": 3000})
        c.execute(PARK)
        async with running_worker(Through.of(database18, relay.port), poll_idle=0.05, lease=3600.0, reconcile_interval=0.0) as worker:
            await until(lambda: worker.statistics.polls >= 10)
            polls, turns = worker.statistics.polls, relay.turns("dfproxy:control")
            await until(lambda: worker.statistics.polls >= polls + 30)
            asked, looked = relay.turns("dfproxy:control") - turns, worker.statistics.polls - polls
            assert abs(asked - looked) <= 1
            assert (worker.statistics.claimed, worker.held) == (0, 0)
            assert worker.settings.poll_idle < type(worker.settings).poll_idle == 1.0


async def test_many_that_are_due_at_once_share_transactions(database18: Database) -> None:
    """Each runs its step in a transaction of its own; what the engine itself has to say, it says for all."""
    await install(database18)
    count = 300
    with Client(database18) as c, Counter(database18.cluster.port or 0) as relay:
        c.execute("CREATE TABLE ran (i text)")
        instances = [c.start(seq(sleep(86400), sql("INSERT INTO ran SELECT '{sys_instance_id}'"))) for _ in range(count)]
        async with running_worker(Through.of(database18, relay.port)) as worker:
            await until(lambda: worker.statistics.claimed == count and worker.held == 0)
            c.execute("BEGIN")
            c.execute("UPDATE duroxide.history SET meta = jsonb_build_object('wake_at', now())")
            c.execute("UPDATE duroxide.queue SET wake_at = now()")
            before = relay.turns("dfproxy:control")
            c.execute("COMMIT")
            assert {s for s, _ in await ended(c, *instances)} == {"completed"}
            assert relay.turns("dfproxy:control") - before < count / 2
        assert c.rows("SELECT count(*), count(DISTINCT i) FROM ran") == [(count, count)]


async def test_an_endless_loop_leaves_bounded_rows(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t AS SELECT 0 AS n")
        instance = c.start(loop(seq(sql("UPDATE t SET n = n + 1 RETURNING n", "x"), sql("SELECT $x.n"))))
        async with running_worker(database18):
            most = 0
            while c.one("SELECT n FROM t") < 150:
                most = max(most, c.one("SELECT count(*) FROM duroxide.history"))
                await asyncio.sleep(0.002)
            c.execute("SELECT df.cancel(%s)", instance)
            await ended(c, instance)
        # Two rows a round, ten finished rounds and the one under way, and the loop's own.
        assert 15 < most <= 2 * 11 + 1


async def test_a_poll_reads_no_more_than_it_needs(database18: Database) -> None:
    """Rows of the queue that a poll's functions look at, beside thousands that are parked, and hundreds that are held."""
    await install(database18)
    worker = "00000000-0000-0000-0000-000000000001"
    with Client(database18) as c:
        c.connection.execute(FILL, {"graphs": list(GRAPHS), "role": database18.owner, "first": 1, "last": 3000})
        c.execute(PARK)
        c.execute("UPDATE duroxide.queue SET wake_at = 'infinity'")
        c.execute("INSERT INTO duroxide.workers (id, name, version, lease) VALUES (%s, 'w', '0', '1 day')", worker)
        c.execute("UPDATE duroxide.queue SET owner = %s, token = gen_random_uuid() WHERE instance_id IN "
                  "(SELECT instance_id FROM duroxide.queue ORDER BY instance_id LIMIT 500)", worker)
        c.execute("VACUUM ANALYZE duroxide.queue")

        def read(query: str, *parameters: object) -> tuple[object, int]:
            counted = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relid = 'duroxide.queue'::regclass"
            with c.connection.transaction():
                before = c.one(counted)
                return c.rows(query, *parameters), c.one(counted) - before

        assert read("SELECT duroxide.overdue()") == ([(False,)], 0)
        assert read("SELECT * FROM duroxide.inbox(%s, '{}')", worker) == ([], 0)
        assert read("SELECT * FROM duroxide.claim(%s, 100)", worker) == ([], 0)
        assert read("SELECT duroxide.next_due()") == ([(None,)], 0)
        mine, other = (c.one("SELECT min(instance_id) FROM duroxide.queue WHERE (owner IS NULL) = %s", free) for free in (False, True))
        c.execute("INSERT INTO duroxide.signals (instance_id, name) VALUES (%s, 'go'), (%s, 'go')", mine, other)
        assert [row[1] for row in c.rows("SELECT * FROM duroxide.inbox(%s, '{}')", worker)] == [mine]
        c.execute("UPDATE duroxide.queue SET wake_at = now() WHERE instance_id = %s", other)
        assert c.one("SELECT duroxide.overdue()") is True
        assert [row[0] for row in c.rows("SELECT * FROM duroxide.claim(%s, 100)", worker)] == [other]
        assert c.rows("SELECT seen FROM duroxide.signals WHERE instance_id = %s", other) == [(True,)]
