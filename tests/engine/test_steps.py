"""Single SQL steps: what they may do, what they leave behind, how they fail, and what is recorded."""

from __future__ import annotations

import time

import pytest

from engine import runner
from engine.connection import StepConnection
from engine.slots import Backlog
from tests.engine.fix_graphs import join, seq, sql
from tests.engine.helpers import Client, ended, install, running_worker, until, worker_process
from tests.fix_postgres import Database

DONE = '{"rows":[],"row_count":0}'


async def run_steps(database: Database, *queries: str, through: Database | None = None,
                    **changes: object) -> list[tuple[str, str | None]]:
    """Each query as a workflow of its own, one after the other, through one session (`through`: the worker's way there)."""
    outcomes = []
    with Client(database) as c:
        async with running_worker(through or database, max_user_connections=1, **changes) as worker:
            for query in queries:
                instance = c.start(sql(query))
                worker.wake()
                outcomes += await ended(c, instance)
    return outcomes


CARRY = [
    ("SET search_path = nowhere", "SELECT current_setting('search_path') AS found"),
    ("SELECT set_config('df.in_workflow', 'false', false)", "SELECT current_setting('df.in_workflow') AS found"),
    ("SET TIME ZONE 'Asia/Tokyo'", "SELECT current_setting('TimeZone') AS found"),
    ("CREATE TEMP TABLE x (n int)", "SELECT count(*)::text AS found FROM pg_class WHERE relname = 'x'"),
    ("SELECT pg_advisory_lock(42)", "SELECT count(*)::text AS found FROM pg_locks WHERE locktype = 'advisory' "
                                    "AND pid = pg_backend_pid()"),
    ("PREPARE p AS SELECT 1", "SELECT count(*)::text AS found FROM pg_prepared_statements WHERE name = 'p'"),
    ("LISTEN channel", "SELECT count(*)::text AS found FROM pg_listening_channels()"),
    ("DECLARE k CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*)::text AS found FROM pg_cursors WHERE name = 'k'"),
    ("SELECT set_config('role', session_user, false)", "SELECT current_setting('role') AS found"),
]


async def test_nothing_carries_over(database18: Database) -> None:
    await install(database18)
    looks = [look for _, look in CARRY]
    outcomes = await run_steps(database18, *looks, *[step for step, _ in CARRY], *looks)
    before, changed, after = (outcomes[n * len(CARRY):(n + 1) * len(CARRY)] for n in range(3))
    for (step, _), (status, _), was, is_ in zip(CARRY, changed, before, after, strict=True):
        assert (status, is_) == ("completed", was), step


async def test_nothing_carries_over_from_step_to_step(database18: Database) -> None:
    """The second step goes to the session in one write with the first one's commit."""
    await install(database18)
    with Client(database18) as c:
        before = await run_steps(database18, *[look for _, look in CARRY])
        async with running_worker(database18, max_user_connections=1) as worker:
            for (step, look), was in zip(CARRY, before, strict=True):
                instance = c.start(seq(sql(step), sql(look)))
                worker.wake()
                assert await ended(c, instance) == [was], step


async def test_what_steps_are_answered_counts_while_others_wait(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it every connection would be used, however far behind the worker is."""
    told: list[str] = []

    class Told(Backlog):
        def note(self) -> None:
            told.append("answer")
            super().note()

        def mean(self) -> float:
            told.append("asked")
            return super().mean()

    monkeypatch.setattr(runner, "Backlog", Told)
    await install(database18)
    with Client(database18) as c:
        instances = [c.start(sql("SELECT pg_sleep(0.05)")) for _ in range(3)]
        async with running_worker(database18, max_user_connections=1):
            assert {status for status, _ in await ended(c, *instances)} == {"completed"}
    assert told.count("answer") >= 3
    assert told.count("asked") >= 3  # first, and then a hundred times a second


async def test_reset_role_inside_a_step_is_harmless(database18: Database) -> None:
    await install(database18)
    assert await run_steps(database18, "RESET ROLE", "RESET ALL", "SELECT 1 AS n") == [
        ("completed", DONE), ("completed", DONE), ("completed", '{"rows":[{"n":1}],"row_count":1}')]


async def test_a_step_can_t_end_its_transaction(database18: Database) -> None:
    await install(database18)
    steps = ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "ABORT", "END"]
    for status, output in await run_steps(database18, *steps):
        assert status == "failed"
        assert "a step can't end its transaction" in (output or "")
    [(status, output), after] = await run_steps(database18, "PREPARE TRANSACTION 'x'", "SELECT 1 AS n")
    assert (status, "a step can't end its transaction" in (output or "")) == ("failed", True)
    assert after[0] == "completed"


ODD = [
    ("SELECT 1; SELECT 2", "cannot insert multiple commands into a prepared statement"),
    ("COPY pg_class TO STDOUT", "COPY from STDIN and to STDOUT need a client"),
    ("COPY duroxide.vars FROM STDIN", "COPY from STDIN and to STDOUT need a client"),
    ("SET client_encoding = 'LATIN1'", "can't change client_encoding"),
    ("SELECT $1::int", "bind message supplies 0 parameters"),
    ("SELEKT", 'syntax error at or near "SELEKT"'),
    ("DO $$ BEGIN COMMIT; END $$", None),
    ("SET TRANSACTION READ ONLY", None),
    ("-- nothing", None),
    ("SAVEPOINT s", None),
    ("BEGIN", None),
]


async def test_odd_statements(database: Database) -> None:
    await install(database)
    outcomes = await run_steps(database, *[step for step, _ in ODD], "SELECT 1 AS n")
    for (step, words), (status, output) in zip(ODD, outcomes, strict=False):
        if words is None:
            assert (status, output) == ("completed", DONE), step
        else:
            assert (status, words in (output or "")) == ("failed", True), (step, output)
    assert outcomes[-1] == ("completed", '{"rows":[{"n":1}],"row_count":1}')


async def test_a_step_that_kills_its_own_session_fails_in_the_end(database18: Database) -> None:
    await install(database18)
    (status, output), after = await run_steps(
        database18, "SELECT pg_terminate_backend(pg_backend_pid())", "SELECT 1 AS n", max_crashes=3, retry_min=0.01)
    assert status == "failed"
    assert output == "the connection was lost 3 times while this step ran: " \
                     "terminating connection due to administrator command"
    assert after[0] == "completed"


async def test_deferred_constraints_fail_the_step(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        c.execute("CREATE TABLE parent (id int PRIMARY KEY)")
        c.execute("CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    [(status, output)] = await run_steps(database, "INSERT INTO child VALUES (1)")
    assert status == "failed"
    assert "violates foreign key constraint" in (output or "")


async def test_a_checkpoint_that_fails_for_good_fails_the_step(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
        c.execute("CREATE SEQUENCE ran")
        c.execute("CREATE FUNCTION boom() RETURNS trigger LANGUAGE plpgsql AS "
                  "$$ BEGIN RAISE EXCEPTION 'not this one'; END $$")
        # Fires at COMMIT only: SET CONSTRAINTS can't reach a trigger that the checkpoint itself sets off.
        c.execute("CREATE CONSTRAINT TRIGGER boom AFTER INSERT ON duroxide.history DEFERRABLE INITIALLY DEFERRED "
                  "FOR EACH ROW WHEN (NEW.result LIKE '%%poison%%') EXECUTE FUNCTION boom()")
        instance = c.start(seq(sql("INSERT INTO t VALUES (1) RETURNING 'poison' AS what"), sql("SELECT nextval('ran')")))
        async with running_worker(database18):
            [(status, output)] = await ended(c, instance)
        assert status == "failed"
        assert output == "SQL execution failed: error returned from database: not this one"
        assert c.rows("SELECT * FROM t") == []
        assert c.one("SELECT is_called FROM ran") is False  # the step behind it never began


@pytest.mark.parametrize("share", [0.0, 1000.0])
async def test_a_session_is_kept_from_step_to_step_for_a_while(database18: Database, monkeypatch: pytest.MonkeyPatch,
                                                               share: float) -> None:
    """Two workflows and one session: in turns, or, until its share of the time is over, one after the other."""
    monkeypatch.setattr(runner, "SHARE", share)
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE marks (n int GENERATED ALWAYS AS IDENTITY, who text)")
        trees = [seq(*[sql(f"INSERT INTO marks (who) VALUES ('{who}')")] * 4) for who in "ab"]
        # Both are claimed by one poll, and their first steps ask for the session before either has ended.
        with c.connection.transaction():
            instances = [c.start(tree) for tree in trees]
        async with running_worker(database18, max_user_connections=1):
            await ended(c, *instances)
        order = "".join(who for (who,) in c.rows("SELECT who FROM marks ORDER BY n"))
    assert order in (("abababab", "babababa") if share == 0 else ("aaaabbbb", "bbbbaaaa"))


async def test_an_answer_that_came_with_the_commit_s_is_taken_at_once(database18: Database,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read after a write until the server has done all of it: the commit, and the step behind it."""
    await install(database18)
    found: list[bool] = []
    look, write = runner.Runner.ended, StepConnection._flush

    def spy(self: runner.Runner, begun: runner.Begun) -> runner.Ready | None:
        answer = look(self, begun)
        found.append(answer is not None)
        return answer

    def write_and_wait(self: StepConnection) -> None:
        open_ = "SELECT xact_start::text FROM pg_stat_activity WHERE application_name = 'dfproxy:step' " \
                "AND datname = current_database() AND state = 'idle in transaction'"
        chained, before = self._begun is not None, c.rows(open_)
        write(self)
        while chained and (not (now := c.rows(open_)) or now == before):
            time.sleep(0.001)

    monkeypatch.setattr(runner.Runner, "ended", spy)
    monkeypatch.setattr(StepConnection, "_flush", write_and_wait)
    with Client(database18) as c:
        instance = c.start(seq(*[sql(f"SELECT {n} AS n") for n in range(4)]))
        async with running_worker(database18):
            assert await ended(c, instance) == [("completed", '{"rows":[{"n":3}],"row_count":1}')]
    assert found == [True] * 3


async def test_statements_that_need_no_transaction_block(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        c.execute("CREATE TABLE t (n int)")
        c.execute("CREATE PROCEDURE twice() LANGUAGE plpgsql AS "
                  "$$ BEGIN INSERT INTO t VALUES (1); COMMIT; INSERT INTO t VALUES (2); COMMIT; END $$")
        instances = [c.start(sql("VACUUM t")), c.start(sql("CALL twice()"))]
        concurrently = c.start(seq(sql("CREATE INDEX CONCURRENTLY i ON t (n)"), sql("SELECT 1 AS n")))
        async with running_worker(database):
            assert [s for s, _ in await ended(c, *instances, concurrently)] == ["completed"] * 3
        assert c.rows("SELECT n FROM t ORDER BY n") == [(1,), (2,)]
        assert c.one("SELECT meta FROM duroxide.history WHERE instance_id = %s", instances[0]) == \
            {"tag": "VACUUM", "at_least_once": True, "attempt": 1}
        assert c.rows("SELECT node_type, status_details - 'execution_id' FROM df.nodes WHERE instance_id = %s ORDER BY 1, 2::text",
                      concurrently) == [("SQL", {"attempts": 1, "at_least_once": True}), ("SQL", {}), ("THEN", {})]
        assert c.one("SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass") is True


@pytest.mark.parametrize("end", ["killed", "cancelled", "failed"])
async def test_what_is_known_of_a_step_whose_worker_was_lost(database18: Database, end: str) -> None:
    """A worker is killed in the middle of a procedure that has committed a part: the second one knows that it had begun."""
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
        c.execute("CREATE PROCEDURE half() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO t VALUES (1); COMMIT; "
                  "IF (SELECT count(*) FROM t) < 2 THEN PERFORM pg_sleep(1000); END IF; "
                  + ("PERFORM pg_sleep(1000);" if end == "cancelled" else "PERFORM 1 / 0;" if end == "failed" else "") + " END $$")
        tree = seq(sql("CALL half()"), sql("SELECT 1 AS n"))
        instance = c.start(tree)
        details = "SELECT status, status_details - 'execution_id' FROM df.nodes WHERE instance_id = %s AND query = 'CALL half()'"
        with worker_process(database18, lease=3600.0) as process:
            await until(lambda: c.one("SELECT count(*) FROM t") == 1)
            assert c.rows(details, instance) == [("running", {"attempts": 1, "at_least_once": True})]
            process.kill()
            process.wait()
        async with running_worker(database18):
            if end == "cancelled":
                await until(lambda: c.one("SELECT count(*) FROM t") == 2)
                c.execute("SELECT df.cancel(%s)", instance)
                await until(lambda: c.one("SELECT count(*) FROM duroxide.queue") == 0)
            await ended(c, instance)
        status = "completed" if end == "killed" else "failed"
        assert c.rows(details, instance) == [(status, {"attempts": 2, "at_least_once": True})]
        assert c.one("SELECT count(*) FROM t") == 2


async def test_a_step_in_another_database(database18: Database) -> None:
    await install(database18)
    other = database18.name + "_other"
    with Client(database18, "postgres") as c:
        c.execute(f"CREATE DATABASE {other} OWNER {database18.owner}")
    try:
        with Client(database18) as c:
            instances = [
                c.start(sql("SELECT current_database()::text AS d"), database=other),
                c.start(seq(sql("CREATE TYPE pair AS (a int, b text)"), sql("SELECT (1, 'x')::pair AS p")),
                        database=other),
                c.start(sql("SELECT 1"), database=other + "_missing"),
            ]
            async with running_worker(database18):
                first, second, third = await ended(c, *instances)
            assert first == ("completed", f'{{"rows":[{{"d":"{other}"}}],"row_count":1}}')
            assert second == ("completed", '{"rows":[{"p":{"a":1,"b":"x"}}],"row_count":1}')
            assert third[1] == (f"Failed to connect to database '{other}_missing' as '{database18.owner}'. "
                                f"Error: database \"{other}_missing\" does not exist")
    finally:
        with Client(database18, "postgres") as c:
            c.execute(f"DROP DATABASE {other} WITH (FORCE)")


async def test_results_that_are_too_large_fail_before_they_commit(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
    rows, wide, one, fits = await run_steps(
        database18, "INSERT INTO t SELECT generate_series(1, 101) RETURNING n",
        "INSERT INTO t SELECT n FROM generate_series(1, 50) n RETURNING repeat('x', 10000)",
        "SELECT repeat('x', 10000000) AS x", "SELECT count(*) AS n FROM t",
        max_result_rows=100, max_result_bytes=100_000)
    assert rows == ("failed", "SQL execution failed: the result has more rows than max_result_rows (100)")
    assert wide == ("failed", "SQL execution failed: the result is larger than max_result_bytes (100000)")
    assert one == ("failed", "SQL execution failed: the result is larger than max_result_bytes (100000)")
    assert fits == ("completed", '{"rows":[{"n":0}],"row_count":1}')


async def test_serialization_failures_are_tried_again(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE SEQUENCE tries")
        step = "DO $$ BEGIN IF nextval('tries') < 3 THEN RAISE 'no luck' USING ERRCODE = '40001'; END IF; END $$"
        instance = c.start(sql(step))
        async with running_worker(database18, retry_min=0.01):
            assert (await ended(c, instance))[0][0] == "completed"
        assert c.one("SELECT last_value FROM tries") == 3


async def test_serializable_roles(database18: Database) -> None:
    """Conflicts at COMMIT, after the interpreter has been told: the instance is read again and the step runs again."""
    await install(database18)
    with Client(database18) as c:
        c.execute(f"ALTER ROLE {database18.owner} SET default_transaction_isolation = 'serializable'")
        c.execute("CREATE TABLE t (n int)")
        instances = [c.start(sql("INSERT INTO t SELECT count(*) FROM t")) for _ in range(12)]
        async with running_worker(database18, retry_min=0.01):
            outcomes = await ended(c, *instances)
        assert {s for s, _ in outcomes} == {"completed"}
        assert c.rows("SELECT n FROM t ORDER BY n") == [(n,) for n in range(12)]


async def test_read_only_roles(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE t (n int)")
    outcomes = await run_steps(database18, "SELECT set_config('transaction_read_only', 'on', true) AS s", "SELECT 1 AS n")
    assert outcomes == [("completed", '{"rows":[{"s":"on"}],"row_count":1}'),
                        ("completed", '{"rows":[{"n":1}],"row_count":1}')]


async def test_types_made_by_users(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TYPE mood AS ENUM ('sad', 'glad')")
        c.execute("CREATE DOMAIN positive AS int CHECK (value > 0)")
        c.execute("CREATE TYPE point3 AS (x int, y positive, m mood[])")
    step = "SELECT 'glad'::mood AS m, 3::positive AS p, ROW(1, 2, '{sad,glad}')::point3 AS c"
    assert await run_steps(database18, step) == [
        ("completed", '{"rows":[{"m":"glad","p":3,"c":{"x":1,"y":2,"m":["sad","glad"]}}],"row_count":1}')]
    with Client(database18) as c:
        async with running_worker(database18):
            first = c.start(sql(step))
            await ended(c, first)
            c.execute("ALTER TYPE point3 ADD ATTRIBUTE z text")
            second = c.start(sql("SELECT ROW(1, 2, '{}', 'new')::point3 AS c"))
            assert await ended(c, second) == [
                ("completed", '{"rows":[{"c":{"x":1,"y":2,"m":[],"z":"new"}}],"row_count":1}')]


async def test_no_free_connection(database18: Database) -> None:
    """A step that finds none for too long fails; a queue that moves is waited for, however long it takes."""
    await install(database18)
    message = "pg_durable: connection limit reached (max_user_connections=1). Timed out after 1s waiting for an available " \
              "execution slot."
    with Client(database18) as c:
        async with running_worker(database18, max_user_connections=1, execution_acquire_timeout=1.0):
            many = [c.start(sql("SELECT pg_sleep(0.2)")) for _ in range(10)]
            assert {s for s, _ in await ended(c, *many)} == {"completed"}
            long = c.start(sql("SELECT pg_sleep(1000)"))
            await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_sleep(1000)%%' AND "
                                      "datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()") == 1)
            one, both = c.start(sql("SELECT 1")), c.start(join(sql("SELECT 1"), sql("SELECT 2")))
            outcomes = await ended(c, one, both)
            assert outcomes == [("failed", message), ("failed", f"JOIN branch 1 failed: {message}; JOIN branch 2 failed: {message}")]
            assert c.one("SELECT error->>'sqlstate' FROM duroxide.instances WHERE id = %s", one) == "53300"
            c.execute("SELECT df.cancel(%s)", long)
            assert (await ended(c, c.start(sql("SELECT 1"))))[0][0] == "completed"


async def test_sessions_stay_within_their_budget(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE seen (n int)")
        step = "INSERT INTO seen SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dfproxy:step' " \
               "AND datname = current_database()"
        instances = [c.start(sql(step)) for _ in range(30)]
        async with running_worker(database18, max_user_connections=3, idle_connection=0.2, lease=1.0):
            await ended(c, *instances)
            assert 1 <= c.one("SELECT max(n) FROM seen") <= 3
            await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dfproxy:step' "
                                      "AND datname = current_database()") == 0)
