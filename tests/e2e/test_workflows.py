"""What a new user does first: workflows through the proxy, with psql and with drivers."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pg8000.native
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm

from tests.e2e.fix_dfproxy import Through

DOCUMENTS = """
CREATE TABLE documents (id int PRIMARY KEY, title text NOT NULL, processed boolean NOT NULL DEFAULT false);
INSERT INTO documents SELECT n, 'document ' || n FROM generate_series(1, 250) n;
"""


def start(through: Through, statement: str, *arguments: object) -> str:
    with through.connect() as c:
        row = c.execute(statement, arguments or None).fetchone()  # type: ignore[call-overload]
        assert row is not None
        return str(row[0])


def processed(through: Through) -> int:
    with through.connect() as c:
        row = c.execute("SELECT count(*) FROM documents WHERE processed").fetchone()
        assert row is not None
        return int(row[0])


def test_the_first_example_of_the_design_by_psql(through: Through) -> None:
    through.psql(script=DOCUMENTS)
    instance = through.psql(script="""
        SELECT df.start(
          'SELECT id FROM documents WHERE processed = false LIMIT 100' |=> 'batch'
          ~> 'UPDATE documents SET processed = true WHERE id IN (SELECT id FROM $batch.*)',
          'process-documents');""").stdout.strip()
    assert len(instance) == 8
    assert through.psql(script=f"SELECT df.await_instance('{instance}');").stdout.strip() == "completed"
    assert processed(through) == 100
    tree = through.psql(script=f"SELECT df.explain('{instance}');").stdout
    assert f"Instance: {instance} (process-documents)" in tree
    assert "→ SQL: UPDATE documents SET processed = true WHERE id" in tree
    assert tree.count("✓") == 3


def test_the_headline_example_of_the_articles(through: Through) -> None:
    through.psql(script=DOCUMENTS)
    instance = start(through, """SELECT df.start(
        'SELECT id FROM documents WHERE processed = false LIMIT 100' |=> 'batch'
        ~> 'UPDATE documents SET processed = true WHERE id = ANY($batch)')""")
    assert through.wait(instance) == "completed"
    assert processed(through) == 100


def test_a_start_belongs_to_its_transaction(through18: Through) -> None:
    through18.psql(script=DOCUMENTS)
    update = "SELECT df.start('UPDATE documents SET processed = true WHERE id = %s')"
    with through18.connect() as c:
        c.execute("BEGIN")
        rolled_back = c.execute(update % 1).fetchone()
        c.execute("ROLLBACK")
        c.execute("BEGIN")
        late = c.execute(update % 2).fetchone()
        time.sleep(10)  # longer than the five seconds that the original grants
        c.execute("COMMIT")
    assert rolled_back is not None
    assert late is not None
    assert through18.wait(late[0]) == "completed"
    with through18.connect() as c:
        assert c.execute("SELECT id FROM documents WHERE processed").fetchall() == [(2,)]
        assert c.execute("SELECT df.status(%s)", rolled_back).fetchone() == (None,)


def test_starts_from_a_query_a_trigger_and_a_do_block(through18: Through) -> None:
    through18.psql(script="""
        CREATE TABLE orders (id int PRIMARY KEY, done boolean NOT NULL DEFAULT false);
        CREATE TABLE jobs (order_id int, instance text);
        CREATE TABLE audit (order_id int);
        INSERT INTO orders SELECT generate_series(1, 50);
        INSERT INTO jobs SELECT id, df.start('UPDATE orders SET done = true WHERE id = ' || id) FROM orders;
        CREATE FUNCTION follow_up() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM df.start('INSERT INTO audit VALUES (' || NEW.id || ')' ~> 'SELECT 1', 'order-' || NEW.id);
            RETURN NEW;
        END $$;
        CREATE TRIGGER follow_up AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION follow_up();
        INSERT INTO orders VALUES (51), (52);
        DO $$ BEGIN PERFORM df.start(@> ('INSERT INTO audit VALUES (53)' ~> df.break()), 'order-53'); END $$;
    """)
    with through18.connect() as c:
        for (instance,) in c.execute("SELECT id FROM df.instances").fetchall():
            assert through18.wait(instance) == "completed"
        assert c.execute("SELECT count(*) FROM orders WHERE done").fetchone() == (50,)
        assert c.execute("SELECT order_id FROM audit ORDER BY 1").fetchall() == [(51,), (52,), (53,)]


def test_psycopg_parameters(through18: Through) -> None:
    through18.psql(script=DOCUMENTS)
    instance = start(through18, "SELECT df.start(%s ~> %s |=> 'n', %s)", "SELECT 1",
                     "UPDATE documents SET processed = true WHERE id = 7", "by-psycopg")
    assert through18.wait(instance) == "completed"
    assert processed(through18) == 1


async def test_asyncpg_prepared_statement(through18: Through) -> None:
    through18.psql(script=DOCUMENTS)
    c = await asyncpg.connect(through18.dsn)
    try:
        statement = await c.prepare("SELECT df.start($1::text ~> ($2::text |=> 'x') ~> 'SELECT $x')")
        ids = [await statement.fetchval("SELECT 1", f"UPDATE documents SET processed = true WHERE id = {n} RETURNING id")
               for n in (1, 2, 3)]
        for instance in ids:
            assert await c.fetchval("SELECT df.await_instance($1)", instance) == "completed"
        assert await c.fetchval("SELECT df.result($1)::jsonb->'rows'->0->>'?column?'", ids[2]) == "3"
    finally:
        await c.close()
    assert processed(through18) == 3


def test_pg8000(through18: Through) -> None:
    proxy, database = through18.proxy, through18.database
    c = pg8000.native.Connection(database.owner, host="127.0.0.1", port=proxy.port, database=database.name)
    try:
        [[instance]] = c.run("SELECT df.start('SELECT 1' & 'SELECT 2')")
        assert c.run("SELECT df.await_instance(:i)", i=instance) == [["completed"]]
    finally:
        c.close()


def test_sqlalchemy_session(through18: Through) -> None:
    through18.psql(script=DOCUMENTS)
    engine = sqlalchemy.create_engine(through18.dsn.replace("postgresql://", "postgresql+psycopg://"))
    with sqlalchemy.orm.Session(engine) as session:
        text = sqlalchemy.text("SELECT df.start(:step ~> 'SELECT 2', :label)")
        instance = session.execute(text, {"step": "UPDATE documents SET processed = true WHERE id = 9", "label": "orm"}).scalar()
        session.commit()
    engine.dispose()
    assert through18.wait(str(instance)) == "completed"
    assert processed(through18) == 1


def test_every_kind_of_node_in_one_workflow(through: Through) -> None:
    instance = start(through, """SELECT df.start(
        'SELECT 3 AS n' |=> 'first'
        ~> ('SELECT $first.n > 2' ?> ('SELECT 10 AS a' |=> 'a') !> 'SELECT 0')
        ~> (df.sleep(0) & ('SELECT 20 AS b' |=> 'b') & 'SELECT 30')
        ~> ('SELECT 40 AS c' | df.sleep(60))
        ~> df.if_rows('a', 'SELECT 1', 'SELECT 1/0')
        ~> df.loop('SELECT count(*) AS k FROM df.instances' ~> df.break('done'))
        ~> 'SELECT $a.a + $b.b AS total')""")
    assert through.wait(instance) == "completed"
    with through.connect() as c:
        assert c.execute("SELECT df.result(%s)::jsonb->'rows'", (instance,)).fetchone() == ([{"total": 30}],)
        statuses = dict(c.execute("SELECT query, status FROM df.nodes WHERE instance_id = %s AND query IS NOT NULL", (instance,)))
        assert statuses["SELECT 40 AS c"] == "completed"
        assert statuses["SELECT 0"] == "pending"
        inferred = dict(c.execute("SELECT query, inferred_status FROM df.instance_nodes(%s) WHERE query IS NOT NULL", (instance,)))
        assert inferred["SELECT 0"] == "skipped"
        assert inferred["60"] == "skipped"


def test_failure_is_told_with_all_that_postgresql_said(through: Through) -> None:
    through.psql(script="CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1);")
    instance = start(through, "SELECT df.start('INSERT INTO t VALUES (1)' ~> 'SELECT 1')")
    assert through.wait(instance) == "failed"
    with through.connect() as c:
        row = c.execute("SELECT df.error(%s), df.result(%s)", (instance, instance)).fetchone()
        assert row is not None
        assert "duplicate key value violates unique constraint" in row[0]
        assert row[1] is None
        node = c.execute("SELECT error FROM df.nodes WHERE instance_id = %s AND status = 'failed' AND node_type = 'SQL'",
                         (instance,)).fetchone()
        assert node is not None
        assert "23505" in node[0]
        assert "Key (id)=(1) already exists." in node[0]


def test_cancel_stops_a_running_statement(through18: Through) -> None:
    instance = start(through18, "SELECT df.start('SELECT pg_sleep(300)' ~> 'SELECT 1')")
    with through18.connect() as c:
        deadline = time.monotonic() + 20
        running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(300)%' AND pid <> pg_backend_pid()"
        while c.execute(running).fetchone() == (0,) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert c.execute("SELECT df.cancel(%s, 'enough')", (instance,)).fetchone() == (f"Instance {instance} cancelled: enough",)
        assert c.execute("SELECT df.status(%s)", (instance,)).fetchone() == ("cancelled",)
        while c.execute(running + " AND state = 'active'").fetchone() != (0,) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert c.execute(running + " AND state = 'active'").fetchone() == (0,)


def test_variables_and_label_are_snapshots(through18: Through) -> None:
    with through18.connect() as c:
        c.execute("CREATE TABLE said (what text)")
        c.execute("SELECT df.setvar('who', 'Ann'), df.setvar('t', 'said')")
        row = c.execute("SELECT df.start('SELECT ''{who} {sys_label}'' AS x' |=> 'x' ~> 'INSERT INTO {t} VALUES ($x)', 'L')").fetchone()
        c.execute("SELECT df.setvar('who', 'Bob')")
        assert row is not None
        assert through18.wait(row[0]) == "completed"
        assert c.execute("SELECT what FROM said").fetchall() == [("Ann L",)]


def test_sleeping_workflows_wake_in_time(through18: Through) -> None:
    instance = start(through18, "SELECT df.start(df.sleep(2) ~> 'SELECT 1')")
    assert through18.wait(instance) == "completed"
    with through18.connect() as c:
        row = c.execute("SELECT extract(epoch FROM ended_at - started_at) FROM df.instances WHERE id = %s", (instance,)).fetchone()
        assert row is not None
        assert row[0] >= 2


async def test_many_at_once(through18: Through) -> None:
    through18.psql(script="CREATE TABLE hits (n int)")
    c = await asyncpg.connect(through18.dsn)
    try:
        ids = [r[0] for r in await c.fetch(
            "SELECT df.start('INSERT INTO hits VALUES (' || n || ')' ~> 'SELECT pg_sleep(0.01)') FROM generate_series(1, 200) n")]
        async with asyncio.timeout(60):
            while await c.fetchval("SELECT count(*) FROM df.instances WHERE status <> 'completed'"):
                await asyncio.sleep(0.05)
        assert await c.fetchval("SELECT count(DISTINCT n) FROM hits") == len(ids) == await c.fetchval("SELECT count(*) FROM hits")
    finally:
        await c.close()


def test_a_role_that_was_granted_usage_runs_as_itself(through: Through) -> None:
    database = through.database
    user = f"u_{database.owner}"
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        c.execute(f'CREATE ROLE "{user}" LOGIN')
        c.execute(f'GRANT CREATE ON SCHEMA public TO "{user}"')
        c.execute("SELECT df.grant_usage(%s)", (user,))
    with psycopg.connect(through.proxy.dsn(user, database.name), autocommit=True) as c:
        c.execute("CREATE TABLE mine (who text, session text)")
        row = c.execute("SELECT df.start('INSERT INTO mine VALUES (current_user, session_user)')").fetchone()
        assert row is not None
        assert c.execute("SELECT df.await_instance(%s)", row).fetchone() == ("completed",), c.execute("SELECT df.error(%s)", row).fetchone()
        who = c.execute("SELECT who, session FROM mine").fetchone()
        assert who is not None
        assert who[0] == user
        assert who[1].startswith("dfx_")
        assert c.execute("SELECT relowner::regrole::text FROM pg_class WHERE relname = 'mine'").fetchone() == (user,)


@pytest.mark.parametrize(("statement", "sqlstate", "says"), [
    ("SELECT df.strat('SELECT 1')", "42883", "df.strat"),
    ("SELECT df.start('SELECT 1' ~>)", "42601", "~>"),
    ("SELECT df.start(df.wait_for_schedule('61 * * * *'))", "22023", "Invalid cron expression '61 * * * *'"),
    ("SELECT df.start('SELECT 1' |=> '1x')", "22023", "is not a valid identifier"),
    ("SELECT df.start('SELECT 1' ?> 'SELECT 2')", "42601", "!>"),
])
def test_bad_input_is_an_error_with_a_position_and_the_session_goes_on(
        through18: Through, statement: str, sqlstate: str, says: str) -> None:
    with through18.connect() as c:
        with pytest.raises(psycopg.Error) as e:
            c.execute(statement)
        assert e.value.sqlstate == sqlstate
        assert says in str(e.value)
        assert e.value.diag.statement_position is not None
        assert 1 <= int(e.value.diag.statement_position) <= len(statement)
        assert c.execute("SELECT df.status('00000000')").fetchone() == (None,)


def test_nesting_of_257_is_refused_and_256_runs(through18: Through) -> None:
    with through18.connect() as c:
        deep = "SELECT df.start(" + " ~> ".join(["'SELECT 1'"] * 258) + ")"
        with pytest.raises(psycopg.Error, match="maximum nesting depth of 256") as e:
            c.execute(deep)
        assert e.value.sqlstate in ("54001", "54000")
        row = c.execute("SELECT df.start(" + " ~> ".join(["'SELECT 1'"] * 257) + ")").fetchone()
        assert row is not None
        assert through18.wait(row[0]) == "completed"


def test_a_statement_of_ten_megabytes(through18: Through) -> None:
    with through18.connect() as c:
        size = 10_000_000
        assert c.execute(f"SELECT length('{'x' * size}')").fetchone() == (size,)
        row = c.execute(f"SELECT df.start('SELECT length(''{'x' * size}'') AS n' |=> 'n' ~> 'SELECT $n + 1')").fetchone()
        assert row is not None
        assert through18.wait(row[0]) == "completed"
        with pytest.raises(psycopg.Error):
            c.execute("SELECT df.start(" + "'SELECT 1' ~> " * 700_000 + ")")
        assert c.execute("SELECT 1").fetchone() == (1,)
