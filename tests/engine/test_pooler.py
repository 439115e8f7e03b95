"""The engine behind PgBouncer in transaction mode: no transaction may rely on what another one left in its session."""

from __future__ import annotations

import asyncio

import psycopg

from engine.store import Store
from tests.engine.fix_graphs import join, loop, race, seq, signal, sleep, sql
from tests.engine.fix_pgbouncer import behind_pgbouncer, needs_pgbouncer
from tests.engine.helpers import Client, ended, install, running_worker, settings, until
from tests.engine.test_identity import grant_usage, make_role
from tests.engine.test_steps import CARRY, run_steps
from tests.fix_postgres import Database

pytestmark = needs_pgbouncer


async def test_who_is_in_between_is_noticed(database18: Database) -> None:
    with behind_pgbouncer(database18) as bounced:
        await install(bounced)
        for database, pooled in ((database18, False), (bounced, True)):
            store = Store(settings(database))
            await store.open()
            assert store.pooled is pooled
            await store.close()


async def test_workflows_of_two_roles(database: Database) -> None:
    """Of every kind of node, through executor logins too, with two workers that share the server connections."""
    with behind_pgbouncer(database) as bounced:
        await install(bounced)
        name = f"app_{database.name}"
        make_role(database, name, "LOGIN")
        await asyncio.to_thread(grant_usage, database, name)
        with psycopg.connect(database.superuser_dsn, autocommit=True) as admin:
            admin.execute(f"ALTER ROLE {name} SET my.tenant = 'a\"b\\c, d'")
            admin.execute("CREATE TABLE public.t (i text, n int); GRANT ALL ON public.t TO public")
        tree = seq(sql("SELECT 40 AS n", "a"),
                   join(sql("INSERT INTO t SELECT '{sys_instance_id}', $a.n + 1"), sql("INSERT INTO t SELECT '{sys_instance_id}', 42")),
                   loop(sql("INSERT INTO t SELECT '{sys_instance_id}', 1"),
                        sql("SELECT count(*) < 3 AS more FROM t WHERE n = 1 AND i = '{sys_instance_id}'")),
                   race(sql("SELECT 1 AS n"), sleep(3600)), signal("go"),
                   sql("SELECT current_user::text AS u, current_setting('my.tenant', true) AS t, current_setting('TimeZone') AS z"))
        with Client(database) as mine, Client(database, name) as theirs:
            async with running_worker(bounced, max_user_connections=4) as one, running_worker(bounced, max_user_connections=4) as two:
                instances = [c.start(tree) for c in (mine, theirs) for _ in range(5)]
                await until(lambda: one.statistics.claimed + two.statistics.claimed >= 10 and one.held + two.held == 0)
                for n, instance in enumerate(instances):
                    (mine, theirs)[n // 5].execute("SELECT df.signal(%s, 'go')", instance)
                outcomes = await ended(mine, *instances)
                assert (one.statistics.bugs, two.statistics.bugs) == (0, 0)
            assert set(outcomes[:5]) == {
                ("completed", f'{{"rows":[{{"u":"{database.owner}","t":null,"z":"UTC"}}],"row_count":1}}')}
            assert set(outcomes[5:]) == {
                ("completed", f'{{"rows":[{{"u":"{name}","t":"a\\"b\\\\c, d","z":"UTC"}}],"row_count":1}}')}
            assert mine.rows("SELECT count(*), count(DISTINCT i) FROM t") == [(50, 10)]


async def test_nothing_is_left_for_others(database18: Database) -> None:
    """Neither by steps that succeed, nor by steps that fail: a rollback leaves locks and prepared statements behind."""
    await install(database18)
    looks = [look for _, look in CARRY]
    failing = ["DO $$ BEGIN PERFORM pg_advisory_lock(42); EXECUTE 'PREPARE p AS SELECT 1'; RAISE 'no'; END $$",
               "SELECT pg_advisory_lock(43), 1 / 0"]
    with behind_pgbouncer(database18, size=1) as bounced:
        outcomes = await run_steps(database18, *looks, *[step for step, _ in CARRY], *looks, *failing, *looks, through=bounced)
        n = len(CARRY)
        before, changed, after = outcomes[:n], outcomes[n:2 * n], outcomes[2 * n:3 * n]
        assert [status for status, _ in outcomes[3 * n:-n]] == ["failed", "failed"]
        for (step, _), (status, _), was, is_, at_last in zip(CARRY, changed, before, after, outcomes[-n:], strict=True):
            assert (status, is_, at_last) == ("completed", was, was), step
        with psycopg.connect(bounced.dsn()) as c:
            found = c.execute("SELECT current_setting('df.in_workflow', true), current_setting('search_path'), current_user,"
                              " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
                              " (SELECT oid FROM pg_database WHERE datname = current_database()))").fetchone()
        assert found is not None
        assert (found[0] or "", *found[1:]) == ("", '"$user", public', database18.owner, 0)


async def test_a_step_can_t_end_its_transaction_here_either(database18: Database) -> None:
    await install(database18)
    with behind_pgbouncer(database18, size=1) as bounced:
        outcomes = await run_steps(database18, "COMMIT", "ROLLBACK", "SELECT 1 AS n", through=bounced)
    assert ["a step can't end its transaction" in (output or "") for _, output in outcomes] == [True, True, False]
    assert outcomes[-1][0] == "completed"


async def test_statements_that_need_no_transaction_block(database18: Database) -> None:
    """The service role's own run; others would need a role that stays with the session, and are told."""
    await install(database18)
    name = f"app_{database18.name}"
    make_role(database18, name, "LOGIN")
    await asyncio.to_thread(grant_usage, database18, name)
    with behind_pgbouncer(database18) as bounced, Client(database18) as mine, Client(database18, name) as theirs:
        mine.execute("CREATE PROCEDURE twice() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$")
        theirs.execute("CREATE TABLE t ()")
        async with running_worker(bounced):
            outcomes = await ended(mine, mine.start(sql("VACUUM duroxide.vars")), mine.start(sql("CALL twice()")),
                                   theirs.start(sql("VACUUM t")))
        assert outcomes[0][0] == "completed"
        for status, output in outcomes[1:]:
            assert status == "failed"
            assert "through a pooler in transaction mode" in (output or "")


async def test_cancelling_and_losing_connections(database18: Database) -> None:
    await install(database18)
    running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_sleep(1000)%%' AND pid <> pg_backend_pid()" \
              " AND state = 'active' AND datname = current_database()"
    with behind_pgbouncer(database18) as bounced, Client(database18) as c:
        instance = c.start(sql("SELECT pg_sleep(1000)"))
        async with running_worker(bounced) as worker:
            await until(lambda: c.one(running) == 1)
            c.execute("SELECT df.cancel(%s)", instance)
            await until(lambda: c.one(running) == 0)
            c.execute("CREATE TABLE t (n int)")
            instances = [c.start(seq(sql("SELECT pg_sleep(0.1)"), sql("INSERT INTO t VALUES (1)"))) for _ in range(10)]
            for _ in range(5):
                await asyncio.sleep(0.05)
                with psycopg.connect(database18.superuser_dsn, autocommit=True) as admin:
                    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                                  "AND pid <> pg_backend_pid() AND application_name LIKE 'dfproxy:%%'")
            assert {s for s, _ in await ended(c, *instances)} == {"completed"}
            assert worker.statistics.bugs == 0
        assert c.one("SELECT count(*) FROM t") == 10
