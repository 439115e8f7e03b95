"""A worker in front of a real database: workflows run, wait, end, and are recorded as they should be."""

from __future__ import annotations

import asyncio
import json

import psycopg
import pytest

from engine import instance as engine_instance
from engine.identity import Identities, Identity
from engine.interpreter import Interpreter
from engine.store import Poll, Store
from engine.worker import Worker
from tests.engine.fix_graphs import if_, join, loop, race, seq, signal, sleep, sql
from tests.engine.helpers import Client, ended, install, running_worker, settings, until
from tests.fix_postgres import Database, running_cluster, versions


async def test_sequence_with_names(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        c.execute("CREATE TABLE t (n int)")
        tree = seq(sql("SELECT 41 AS n", "a"), sql("INSERT INTO t SELECT $a.n + 1"), sql("SELECT n FROM t"))
        instance = c.start(tree)
        async with running_worker(database):
            assert await ended(c, instance) == [("completed", '{"rows":[{"n":42}],"row_count":1}')]
        assert [row[2] for row in c.history(instance)] == ["completed"] * 3
        assert c.one("SELECT count(*) FROM duroxide.queue") == 0
        assert c.one("SELECT count(*) FROM duroxide.workers") == 0
        tags = c.rows("SELECT meta->>'tag' FROM duroxide.history WHERE instance_id = %s ORDER BY node", instance)
        assert tags == [("SELECT 1",), ("INSERT 0 1",), ("SELECT 1",)]
        types = c.one("SELECT types FROM duroxide.history WHERE instance_id = %s AND node = 2", instance)
        assert types == [{"name": "n", "oid": 23, "type": "integer"}]


async def test_failure_keeps_the_server_s_words(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int PRIMARY KEY)")
        c.execute("INSERT INTO t VALUES (1)")
        instance = c.start(seq(sql("INSERT INTO t VALUES (2), (1)"), sql("SELECT 1")))
        async with running_worker(database18):
            [(status, output)] = await ended(c, instance)
        assert status == "failed"
        assert output is not None
        assert output.startswith("SQL execution failed: error returned from database: duplicate key value")
        error = c.one("SELECT error FROM duroxide.instances WHERE id = %s", instance)
        assert error["sqlstate"] == "23505"
        assert error["detail"] == "Key (n)=(1) already exists."
        assert c.rows("SELECT n FROM t") == [(1,)]


async def test_branches_loops_and_conditions(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE log (what text)")
        instances = [
            c.start(if_(sql("SELECT true AS yes"), sql("SELECT 'then' AS r"), sql("SELECT 'else' AS r"))),
            c.start(join(sql("SELECT 1 AS a"), sql("SELECT 2 AS a"), sql("SELECT 3 AS a"))),
            c.start(seq(loop(sql("INSERT INTO log VALUES ('round')"),
                             sql("SELECT count(*) < 5 AS more FROM log")), sql("SELECT count(*) AS n FROM log"))),
        ]
        async with running_worker(database18):
            outcomes = await ended(c, *instances)
        assert outcomes == [
            ("completed", '{"rows":[{"r":"then"}],"row_count":1}'),
            ("completed", '[{"rows":[{"a":1}],"row_count":1},{"rows":[{"a":2}],"row_count":1},'
                          '{"rows":[{"a":3}],"row_count":1}]'),
            ("completed", '{"rows":[{"n":5}],"row_count":1}'),
        ]


async def test_a_lost_race_stops_running_work(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
        instance = c.start(race(sql("SELECT 1 AS won"),
                                sql("WITH s AS (SELECT pg_sleep(1000)) INSERT INTO t SELECT 1 FROM s")))
        async with running_worker(database18):
            assert await ended(c, instance) == [("completed", '{"rows":[{"won":1}],"row_count":1}')]
            await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dfproxy:step' "
                                      "AND state = 'active'") == 0)
        assert c.rows("SELECT n FROM t") == []


async def test_long_waits_leave_memory_and_signals_wake(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        waiting = c.start(seq(signal("go"), sql("SELECT 7 AS n")))
        asleep = c.start(sleep(3600))
        async with running_worker(database) as worker:
            await until(lambda: worker.statistics.claimed == 2 and worker.held == 0)
            rows = c.rows("SELECT instance_id, owner IS NULL, isfinite(wake_at) FROM duroxide.queue")
            assert sorted(rows) == sorted([(waiting, True, False), (asleep, True, True)])
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'other', '1')", waiting)
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '{\"a\":1}')", waiting)
            assert await ended(c, waiting) == [("completed", '{"rows":[{"n":7}],"row_count":1}')]
            assert c.status(asleep) == "pending"
        assert c.history(waiting)[0][2:] == ("completed", '{"signal_name":"go","timed_out":false,"data":{"a":1}}')
        assert c.one("SELECT count(*) FROM duroxide.signals") == 0


async def test_signals_reach_instances_in_memory(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        tree = join(signal("go"), sql("SELECT pg_sleep(1.5)"))
        instance = c.start(tree)
        async with running_worker(database18) as worker:
            await until(lambda: worker.held == 1)
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '5')", instance)
            [(status, output)] = await ended(c, instance)
        assert status == "completed"
        assert json.loads(output or "")[0] == {"signal_name": "go", "timed_out": False, "data": 5}


async def test_short_sleeps_and_timeouts(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instances = [c.start(sleep(0)), c.start(sleep(1)), c.start(sleep(2)), c.start(signal("never", 1))]
        async with running_worker(database18):
            assert await ended(c, *instances) == [
                ("completed", '{"slept": true, "seconds": 0}'),
                ("completed", '{"slept": true, "seconds": 1}'),
                ("completed", '{"slept": true, "seconds": 2}'),
                ("completed", '{"signal_name":"never","timed_out":true,"data":null}'),
            ]
        waited = c.rows("SELECT ended_at - created_at >= make_interval(secs => 2) FROM duroxide.instances "
                        "WHERE id = %s", instances[2])
        assert waited == [(True,)]


@pytest.mark.parametrize("woken", [True, False])
async def test_cancel_stops_a_running_statement(database18: Database, woken: bool) -> None:
    await install(database18)
    running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_sleep(1000)%%' AND pid <> pg_backend_pid()" \
              " AND state = 'active' AND datname = current_database()"
    with Client(database18) as c:
        instance = c.start(sql("SELECT pg_sleep(1000)"))
        async with running_worker(database18) as worker:
            await until(lambda: c.one(running) == 1)
            c.execute("INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, 'cancel', 'enough')",
                      instance)
            if woken:
                worker.wake()
            await until(lambda: c.one(running) == 0)
            await until(lambda: worker.held == 0)
        assert c.outcome(instance) == ("cancelled", "canceled: enough")
        assert c.rows("SELECT event, error->>'message' FROM duroxide.history WHERE instance_id = %s", instance) == \
            [("failed", "canceled: enough")]
        assert c.one("SELECT count(*) FROM duroxide.queue") == 0


async def test_cancel_of_a_parked_instance(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(signal("never"))
        async with running_worker(database18) as worker:
            await until(lambda: worker.statistics.claimed == 1 and worker.held == 0)
            c.execute("INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, 'cancel', 'why')", instance)
            await until(lambda: c.one("SELECT count(*) FROM duroxide.queue") == 0)
        assert c.outcome(instance) == ("cancelled", "canceled: why")


async def test_many_instances_at_once(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        c.execute("CREATE TABLE t (i text, n int)")
        tree = seq(*[sql(f"INSERT INTO t SELECT {{sys_instance_id}}, {n}".replace("{sys_instance_id}", "'{sys_instance_id}'"))
                     for n in range(3)])
        instances = [c.start(tree) for _ in range(32)]
        async with running_worker(database, max_user_connections=4):
            outcomes = await ended(c, *instances)
        assert {status for status, _ in outcomes} == {"completed"}
        assert c.rows("SELECT count(*), count(DISTINCT (i, n)) FROM t") == [(96, 96)]


@pytest.mark.parametrize("crowd", ["busy", "asleep", "waiting for a connection"])
async def test_nobody_starves(database18: Database, monkeypatch: pytest.MonkeyPatch, crowd: str) -> None:
    """More endless workflows than there is room for, and one that comes last."""
    await install(database18)
    monkeypatch.setattr(engine_instance, "TURN", 0.1)
    bodies = {"busy": sql("SELECT 1"), "asleep": seq(sql("SELECT 1"), sleep(1)), "waiting for a connection": sql("SELECT pg_sleep(0.01)")}
    with Client(database18) as c:
        async with running_worker(database18, max_instances=1000 if crowd.startswith("waiting") else 2, max_user_connections=1) as worker:
            endless = [c.start(loop(bodies[crowd])) for _ in range(15)]
            await until(lambda: worker.statistics.claimed >= 2)
            last = c.start(sql("SELECT 1 AS n"))
            assert (await ended(c, last))[0][0] == "completed"
            # Everybody had a turn.
            await until(lambda: c.one("SELECT count(DISTINCT instance_id) FROM duroxide.history") == 16)
            for i in endless:
                c.execute("SELECT df.cancel(%s)", i)
            await ended(c, *endless)


async def test_a_new_worker_goes_on_where_the_last_one_stopped(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        c.execute("CREATE TABLE t (n int)")
        tree = seq(sql("INSERT INTO t VALUES (1)", "first"), signal("go", name="s"), sql("INSERT INTO t VALUES (2)"))
        instance = c.start(tree)
        async with running_worker(database) as worker:
            await until(lambda: worker.statistics.claimed == 1 and worker.held == 0)
        c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', 'null')", instance)
        async with running_worker(database):
            assert (await ended(c, instance))[0][0] == "completed"
        assert c.rows("SELECT n FROM t ORDER BY n") == [(1,), (2,)]


async def test_stop_finishes_the_running_step_and_gives_back(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
        instance = c.start(seq(sql("WITH s AS (SELECT pg_sleep(1)) INSERT INTO t SELECT 1 FROM s"),
                               sql("INSERT INTO t VALUES (2)")))
        worker = Worker(settings(database18))
        task = asyncio.create_task(worker.run())
        await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dfproxy:step' "
                                  "AND state = 'active'") == 1)
        await worker.stop(30)
        await task
        assert c.rows("SELECT n FROM t") == [(1,)]
        assert c.rows("SELECT owner, crashes FROM duroxide.queue") == [(None, 0)]
        assert c.one("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'dfproxy:%%'"
                     " AND datname = current_database() AND state <> 'idle'") == 0
        async with running_worker(database18):
            await ended(c, instance)
        assert c.rows("SELECT n FROM t ORDER BY n") == [(1,), (2,)]


async def test_cancelling_run_gives_back_too(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.start(sql("SELECT pg_sleep(1000)"))
        worker = Worker(settings(database18))
        task = asyncio.create_task(worker.run())
        await until(lambda: worker.held == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert c.rows("SELECT owner FROM duroxide.queue") == [(None,)]
        assert c.one("SELECT count(*) FROM duroxide.workers") == 0


async def test_what_can_t_be_loaded_fails(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        bad = c.start([{"id": "00000001", "type": "THEN", "left": 1}])
        good = c.start(sql("SELECT 1 AS n"))
        async with running_worker(database18):
            (status, output), (good_status, _) = await ended(c, bad, good)
        assert (status, good_status) == ("failed", "completed")
        assert (output or "").startswith("Invalid graph: ")


async def test_a_bug_stays_with_its_instance(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await install(database18)
    whole = Interpreter.begin

    def begin(self, now):  # type: ignore[no-untyped-def]
        if self.label == "cursed":
            raise ZeroDivisionError("a bug")
        return whole(self, now)

    monkeypatch.setattr(Interpreter, "begin", begin)
    with Client(database18) as c:
        cursed = c.start(sql("SELECT 1"), label="cursed")
        good = c.start(sql("SELECT 1 AS n"))
        async with running_worker(database18, max_crashes=2) as worker:
            assert (await ended(c, good))[0][0] == "completed"
            [(status, output)] = await ended(c, cursed)
            assert worker.statistics.bugs == 2
        assert status == "failed"
        assert output == "the worker was lost 2 times while it ran this instance"


async def test_poison_instances_are_given_up(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(sql("SELECT 1"))
        c.execute("UPDATE duroxide.queue SET crashes = 10")
        almost = c.start(seq(sql("SELECT 1"), signal("go")))
        c.execute("UPDATE duroxide.queue SET crashes = 9 WHERE instance_id = %s", almost)
        async with running_worker(database18) as worker:
            [(status, _)] = await ended(c, instance)
            assert status == "failed"
            await until(lambda: worker.statistics.claimed == 2 and worker.held == 0)
        # It got further this time: what went wrong before does not count any more.
        assert c.one("SELECT crashes FROM duroxide.queue WHERE instance_id = %s", almost) == 0


async def test_what_was_claimed_runs_though_the_poll_s_other_question_fails(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is lost between a claim and the audit that happens to follow it."""
    await install(database18)
    poll, owned = Store.poll, Store.owned
    lost: list[str] = []

    async def failing_poll(self: Store, limit: int, *, beat: bool, brief: bool) -> Poll:
        if not lost:
            lost.append("poll")  # after which an audit is due
            raise ConnectionResetError
        return await poll(self, limit, beat=beat, brief=brief)

    async def failing_owned(self: Store) -> list[str]:
        if lost == ["poll"]:
            lost.append("audit")
            raise ConnectionResetError
        return await owned(self)

    monkeypatch.setattr(Store, "poll", failing_poll)
    monkeypatch.setattr(Store, "owned", failing_owned)
    with Client(database18) as c:
        instance = c.start(sql("SELECT 1 AS n"))
        async with running_worker(database18) as worker:
            assert (await ended(c, instance))[0][0] == "completed"
            assert lost == ["poll", "audit"]
            await until(lambda: worker.held == 0)


#: Says no, or takes its time, when the transaction that claims an instance commits.
AT_COMMIT = """
CREATE SEQUENCE tries;
CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.owner IS NOT NULL AND OLD.owner IS NULL THEN
        PERFORM nextval('tries');
        {what};
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER at_commit AFTER UPDATE ON duroxide.queue DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION at_commit();
"""
CLAIMED = "INSERT INTO log SELECT count(*) FROM duroxide.queue WHERE owner IS NOT NULL"


@pytest.mark.parametrize("count", [1, 20])  # many are not read together with their claim
async def test_nothing_begins_before_its_claim_has_committed(database18: Database, count: int) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE log (claimed bigint)")
        c.execute(AT_COMMIT.format(what="PERFORM pg_sleep(0.3 / " + str(count) + ")"))
        instances = [c.start(sql(CLAIMED)) for _ in range(count)]
        waiting = c.start(sleep(3600))  # does nothing but be parked
        async with running_worker(database18):
            assert {status for status, _ in await ended(c, *instances)} == {"completed"}
            await until(lambda: c.one("SELECT owner IS NULL AND wake_at > now() FROM duroxide.queue"
                                      " WHERE instance_id = %s", waiting))
        assert c.one("SELECT count(*) FROM log WHERE claimed > 0") == count
        assert c.one("SELECT last_value FROM tries") == count + 1  # each was claimed once


async def test_an_instance_that_is_read_again_waits_for_its_claim(database18: Database,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Its role could not be looked up, while the claim still commits."""
    await install(database18)
    resolve, lost = Identities.resolve, []

    async def failing_resolve(self: Identities, oid: int, instance_id: str, database: str | None = None) -> Identity:
        if not lost:
            lost.append(instance_id)
            raise ConnectionResetError
        return await resolve(self, oid, instance_id, database)

    monkeypatch.setattr(Identities, "resolve", failing_resolve)
    with Client(database18) as c:
        c.execute(AT_COMMIT.format(what="PERFORM pg_sleep(0.5)"))
        instance = c.start(sql("SELECT 1 AS n"))
        async with running_worker(database18, retry_min=0.01):
            assert (await ended(c, instance))[0][0] == "completed"
        assert lost == [instance]
        assert c.one("SELECT last_value FROM tries") == 1  # claimed once


@pytest.mark.parametrize("what", [
    "RAISE 'not now' USING ERRCODE = '40001'", "PERFORM pg_terminate_backend(pg_backend_pid())",
    "PERFORM pg_sleep(2)"])  # longer than a poll may take
@pytest.mark.parametrize("count", [1, 20])
async def test_a_claim_that_does_not_commit_begins_nothing(database18: Database, what: str, count: int) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE log (claimed bigint)")
        c.execute(AT_COMMIT.format(what=f"IF (SELECT last_value FROM tries) <= 2 THEN {what}; END IF"))
        instances = [c.start(sql(CLAIMED)) for _ in range(count)]
        async with running_worker(database18, lease=3.0) as worker:
            assert {status for status, _ in await ended(c, *instances)} == {"completed"}
            await until(lambda: worker.held == 0)
            assert worker.statistics.claimed == count
            assert (worker.statistics.bugs, worker.statistics.lives) == (0, 1)
        assert c.one("SELECT last_value FROM tries") > count
        assert c.one("SELECT count(*) FROM log WHERE claimed > 0") == count
        assert c.one("SELECT max(claims) FROM duroxide.queue") is None
        assert c.one("SELECT count(*) FROM duroxide.history") == count


async def test_a_worker_that_was_given_up_starts_anew(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        async with running_worker(database18, lease=1.0) as worker:
            await until(lambda: c.one("SELECT count(*) FROM duroxide.workers") == 1)
            c.execute("DELETE FROM duroxide.workers")
            await until(lambda: worker.statistics.lives == 2)
            instance = c.start(sql("SELECT 1 AS n"))
            assert (await ended(c, instance))[0][0] == "completed"


async def test_wake_finds_work_at_once(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        async with running_worker(database18, poll_idle=3600.0, poll_held=3600.0) as worker:
            await until(lambda: worker.statistics.polls >= 1)
            await asyncio.sleep(0.1)
            instance = c.start(sql("SELECT 1 AS n"))
            worker.wake()
            assert (await ended(c, instance))[0][0] == "completed"


async def test_starts_that_come_all_the_time_do_not_hold_up_signals(database18: Database) -> None:
    """Who is woken by a start claims first, and reads the inbox later, but not ever later."""
    await install(database18)
    with Client(database18) as c:
        instance = c.start(race(signal("go"), sql("SELECT pg_sleep(1000)")))  # in memory all the time
        async with running_worker(database18, poll_idle=3600.0, poll_held=3600.0) as worker, asyncio.timeout(30):
            await until(lambda: worker.held == 1)
            await asyncio.sleep(0.1)  # it looks once more after a claim
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '1')", instance)
            while c.status(instance) != "completed":
                c.start(sql("SELECT 1"))
                await asyncio.sleep(0)


async def test_a_lock_on_the_inbox_holds_up_nobody_else(database18: Database) -> None:
    """A caller that leaves a transaction open with a cancel in it."""
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        held = c.start(seq(sql("SELECT 1"), signal("go", 1)))
        other.execute("BEGIN")
        other.execute("INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, 'cancel', 'x')", held)
        async with running_worker(database18):
            await until(lambda: len(c.history(held)) == 2)
            for _ in range(3):
                instance = c.start(sql("SELECT 1 AS n"))
                assert (await ended(c, instance))[0][0] == "completed"
            other.execute("COMMIT")
            await until(lambda: c.one("SELECT count(*) FROM duroxide.queue") == 0)
        assert c.outcome(held) == ("cancelled", "canceled: x")


async def test_the_database_goes_away_and_comes_back() -> None:
    version = versions()[0]
    with running_cluster(version) as cluster:
        database = Database(cluster, "postgres", "owner", version)
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE owner LOGIN CREATEROLE")
            c.execute("GRANT CREATE ON DATABASE postgres TO owner")
            c.execute("CREATE SCHEMA mine AUTHORIZATION owner")
        await install(database)
        with Client(database) as client:
            client.execute("CREATE TABLE mine.t (n int)")
            instances = [client.start(seq(sql("SELECT pg_sleep(0.3)"), sql(f"INSERT INTO mine.t VALUES ({n})"),
                                          sql("SELECT pg_sleep(0.3)"))) for n in range(20)]
        async with running_worker(database, max_user_connections=4, retry_max=0.5) as worker:
            await until(lambda: worker.held > 0)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(cluster.stop, "immediate")
            await asyncio.sleep(0.5)
            await asyncio.to_thread(cluster.start)
            with Client(database) as client:
                outcomes = await ended(client, *instances)
                assert {status for status, _ in outcomes} == {"completed"}
                assert client.rows("SELECT count(*), count(DISTINCT n) FROM mine.t") == [(20, 20)]
            assert worker.statistics.lives == 1
