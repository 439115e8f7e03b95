"""Faults: those of the infrastructure are waited for and never reach the workflow; the others fail the step, in the
server's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from psycopg import sql as pgsql

from engine.migrate import uninstall
from engine.runner import _unfit
from proxy.embedded import Cluster
from tests.engine.fix_graphs import join, seq, sleep, sql
from tests.engine.fix_surface import installed_database
from tests.engine.helpers import Client, Through, ended, install, running_worker, until
from tests.engine.test_identity import grant_usage, make_role
from tests.fix_postgres import Database, versions


@pytest.fixture(scope="module")
def shared(cluster18: Cluster) -> Iterator[Database]:
    """One installed database for those tests that leave it as it was."""
    with installed_database(cluster18, versions()[0]) as database:
        yield database


names = (f"x{n}" for n in itertools.count())

#: What passes by itself: a full disk, no memory, too many connections, a serialization failure, a deadlock.
PASSING = ["53100", "53200", "53300", "40001", "40P01"]


@pytest.mark.parametrize("state", PASSING)
async def test_what_passes_is_tried_again(shared: Database, state: str) -> None:
    """In a step; and in a checkpoint, be it a step's or one by itself."""
    name = next(names)
    with Client(shared) as c:
        c.execute(f"CREATE SEQUENCE {name}; CREATE SEQUENCE {name}_w; CREATE TABLE {name}_t (n int)")
        c.execute(f"CREATE FUNCTION {name}_f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                  f"IF nextval('public.{name}_w') IN (1, 2, 5, 6) THEN RAISE 'not now' USING ERRCODE = '{state}'; END IF; RETURN NEW; END $$")
        c.execute(f"CREATE TRIGGER {name} BEFORE INSERT ON duroxide.history FOR EACH ROW EXECUTE FUNCTION {name}_f()")
        try:
            step = f"DO $$ BEGIN INSERT INTO {name}_t VALUES (1); IF nextval('{name}') < 3 THEN RAISE 'not now' USING ERRCODE = '{state}'; END IF; END $$"
            instance = c.start(seq(sql(step), sleep(1), sql(f"SELECT count(*) AS n FROM {name}_t")))
            async with running_worker(shared, retry_min=0.01) as worker:
                assert await ended(c, instance) == [("completed", '{"rows":[{"n":1}],"row_count":1}')]
                assert worker.statistics.bugs == 0
            assert c.one(f"SELECT last_value >= 3 FROM {name}") is True
        finally:
            c.execute(f"DROP TRIGGER {name} ON duroxide.history")


#: What fails a step, with the SQLSTATE that df.nodes.error then holds.
FAILING = [
    ("SELECT * FROM gone", "42P01"),
    ("SELECT 1 / 0", "22012"),
    ("DO $$ BEGIN RAISE 'odd' USING ERRCODE = '57P01'; END $$", "57P01"),
    ("DO $$ BEGIN RAISE 'odd' USING ERRCODE = '08006', DETAIL = 'in detail', HINT = 'a hint'; END $$", "08006"),
    ("DO $$ BEGIN SET LOCAL lock_timeout = 20; LOCK TABLE locked; END $$", "55P03"),
]


async def test_what_does_not_pass_fails_the_step(shared: Database) -> None:
    with Client(shared) as c, Client(shared) as locker:
        c.execute("CREATE TABLE locked ()")
        locker.execute("BEGIN")
        locker.execute("LOCK TABLE locked")
        instances = [c.start(sql(step)) for step, _ in FAILING]
        async with running_worker(shared):
            outcomes = await ended(c, *instances)
        locker.execute("ROLLBACK")
        for instance, (step, state), (status, output) in zip(instances, FAILING, outcomes, strict=True):
            assert status == "failed", step
            error = c.one("SELECT error FROM df.nodes WHERE instance_id = %s", instance)
            assert error.splitlines()[:2] == [output, f"SQLSTATE: {state}"], step
            if "HINT" in step:
                assert error.splitlines()[2:] == ["DETAIL: in detail", "HINT: a hint"]


async def test_a_role_s_statement_timeout(shared: Database) -> None:
    with Client(shared) as c:
        c.execute(f"ALTER ROLE {shared.owner} SET statement_timeout = '300ms'")
        try:
            instance = c.start(sql("SELECT pg_sleep(1000)"))
            async with running_worker(shared):
                [(status, output)] = await ended(c, instance)
        finally:
            c.execute(f"ALTER ROLE {shared.owner} RESET statement_timeout")
        assert (status, output) == (
            "failed", "SQL execution failed: error returned from database: canceling statement due to statement timeout")


async def test_a_deadlock_between_steps(shared: Database) -> None:
    name = next(names)
    with Client(shared) as c:
        c.execute(f"CREATE TABLE {name} AS SELECT n, 0 AS v FROM generate_series(1, 2) n")

        def both(first: int, second: int) -> str:
            # Each waits until the other one has its row.
            return f"DO $$ BEGIN UPDATE {name} SET v = v + 1 WHERE n = {first}; PERFORM pg_advisory_xact_lock_shared(4711); " \
                   f"FOR i IN 1 .. 500 LOOP EXIT WHEN (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711) > 1; " \
                   f"PERFORM pg_sleep(0.01); END LOOP; UPDATE {name} SET v = v + 1 WHERE n = {second}; END $$"

        instance = c.start(join(sql(both(1, 2)), sql(both(2, 1))))
        async with running_worker(shared, retry_min=0.01):
            assert (await ended(c, instance))[0][0] == "completed"
        assert c.rows(f"SELECT v FROM {name}") == [(2,), (2,)]
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        await until(lambda: c.one(deadlocks) >= 1)


async def test_out_of_connections(database18: Database) -> None:
    """First for the executor login alone, then for the service role itself."""
    await install(database18)
    name = f"app_{database18.name}"
    make_role(database18, name, "LOGIN")
    await asyncio.to_thread(grant_usage, database18, name)
    with psycopg.connect(database18.superuser_dsn, autocommit=True) as admin, Client(database18, name) as c:
        [executor] = admin.execute("SELECT executor::text FROM duroxide.executors").fetchone() or ("",)
        for role in (executor, database18.owner):
            limit = pgsql.SQL("ALTER ROLE {} CONNECTION LIMIT {}")
            admin.execute(limit.format(pgsql.Identifier(role), pgsql.Literal(0)))
            instance = c.start(sql("SELECT 1 AS n"))
            async with running_worker(database18, retry_min=0.01, retry_max=0.1) as worker:
                # Refused, again and again: it is no reason to fail.
                await until(lambda own=role != executor: worker.statistics.lives > 2 if own else worker.held == 1)
                await asyncio.sleep(0.2)
                assert c.one("SELECT status FROM duroxide.instances WHERE id = %s", instance) == "pending"
                admin.execute(limit.format(pgsql.Identifier(role), pgsql.Literal(-1)))
                assert (await ended(c, instance))[0][0] == "completed"
                assert worker.statistics.bugs == 0


@contextlib.asynccontextmanager
async def losing_logins(database: Database, count: int) -> AsyncIterator[Through]:
    """A way to the server on which the first so many logins of steps are lost, and nobody hears of it."""
    handlers: set[asyncio.Task[None]] = set()
    left = count

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        nonlocal left
        while data := await source.read(65536):
            if b"dfproxy:step" in data and left > 0:
                left -= 1
                await asyncio.Event().wait()
            target.write(data)
            await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        handlers.add(handler)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", database.cluster.port)
        with contextlib.suppress(asyncio.CancelledError):  # of the handler, at the end
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        for end in (writer, far_writer):
            end.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Through.of(database, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for handler in handlers:
            handler.cancel()
        await asyncio.wait(handlers)


@pytest.mark.parametrize(("lost", "outcome"), [
    (1, ("completed", '{"rows":[{"n":1}],"row_count":1}')),
    (2, ("failed", "Connection to database '{name}' as '{owner}' timed out after 0.5s"))])
async def test_a_login_that_is_not_answered(shared: Database, lost: int, outcome: tuple[str, str]) -> None:
    """Once, it was lost on its way; more often, it is this login that the server does not answer."""
    with Client(shared) as c:
        async with losing_logins(shared, lost) as way, running_worker(way, connect_timeout=0.5, retry_min=0.01):
            [(status, output)] = await ended(c, instance := c.start(sql("SELECT 1 AS n")))
        assert (status, output) == (outcome[0], outcome[1].replace("{name}", shared.name).replace("{owner}", shared.owner))
        if status == "failed":
            assert c.one("SELECT error->>'sqlstate' FROM duroxide.instances WHERE id = %s", instance) == "08001"


async def test_a_role_that_is_dropped_between_two_steps(database18: Database) -> None:
    """While the worker still believes what it looked up about it."""
    await install(database18)
    name = f"going_{database18.name}"
    make_role(database18, name, "LOGIN")
    await asyncio.to_thread(grant_usage, database18, name)
    with Client(database18, name) as c:
        instance = c.start(seq(sql("SELECT 1"), sleep(1), sql("SELECT 2")))
    with Client(database18) as c, psycopg.connect(database18.superuser_dsn, autocommit=True) as admin:
        async with running_worker(database18):
            await until(lambda: len(c.history(instance)) >= 1)
            admin.execute(pgsql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(pgsql.Identifier(name)))
            assert await ended(c, instance) == [
                ("failed", f"Instance {instance}: submitted_by role no longer exists in pg_roles")]


async def test_the_schemas_are_removed_and_come_back(database18: Database) -> None:
    await install(database18)
    async with running_worker(database18, retry_min=0.01, retry_max=0.1, lease=1.0) as worker:
        with Client(database18) as c:
            assert (await ended(c, c.start(sql("SELECT 1"))))[0][0] == "completed"
        lives = worker.statistics.lives
        await uninstall(database18.dsn(), force=True)
        await until(lambda: worker.statistics.lives > lives)
        await install(database18)
        with Client(database18) as c:
            instance = c.start(sql("SELECT 1 AS n"))
            assert await ended(c, instance) == [("completed", '{"rows":[{"n":1}],"row_count":1}')]


def test_preparing_a_transaction_is_seen_behind_comments() -> None:
    for text in ("PREPARE TRANSACTION 'x'", "  prepare\n transaction 'x'", "-- a\n/* b /* c */ */PREPARE/**/TRANSACTION 'x'",
                 "/* * / ** */ Prepare--\r\nTransaction 'x'"):
        assert _unfit(text) is not None, text
    for text in ("PREPARE transactions AS SELECT 1", "SELECT 'PREPARE TRANSACTION'", "/* PREPARE TRANSACTION */ SELECT 1",
                 "-- PREPARE TRANSACTION\nSELECT 1", "PREPARE x AS SELECT 1", "/* " * 2000 + "*/ " * 1999):
        assert _unfit(text) is None, text
