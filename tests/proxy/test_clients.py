"""Real clients through the proxy: what they get is what they get from the server itself."""

from __future__ import annotations

import os
import subprocess
from decimal import Decimal
from pathlib import Path

import asyncpg
import pg8000.dbapi
import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm
from psycopg import sql

from tests.fix_postgres import Database
from tests.proxy.proxies import RunningProxy


def psql(dsn: str, *args: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["psql", "-X", "-v", "ON_ERROR_STOP=1", dsn, *args],
        input=stdin, capture_output=True, text=True, timeout=60, check=check,
        env={**os.environ, "PGCLIENTENCODING": "UTF8"},
    )


# --- psql ---


def test_psql_prints_the_same_as_without_the_proxy(database: Database, proxied: RunningProxy, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("1,one\n2,\"tw\no\"\n3,\n")
    script = f"""
        CREATE TABLE t (a int PRIMARY KEY, b text);
        \\copy t FROM '{rows}' CSV
        \\d t
        SELECT * FROM t ORDER BY a;
        \\copy (SELECT * FROM t ORDER BY a) TO STDOUT CSV
        \\set ON_ERROR_STOP off
        \\set ON_ERROR_ROLLBACK on
        BEGIN;
        SELECT nonsense FROM t;
        INSERT INTO t VALUES (1, 'again');
        INSERT INTO t VALUES (4, 'four');
        COMMIT;
        SELECT a, b FROM t WHERE a = 4 \\gx
        DO $$ BEGIN RAISE NOTICE 'a notice with % in it', 1; END $$;
        SELECT 1 \\; SELECT 2 \\; SELECT 3;
        SELECT * FROM t, nowhere;
        DROP TABLE t;
    """
    direct = psql(database.dsn(), stdin=script)
    through = psql(proxied.dsn(database), stdin=script)
    assert through.stdout == direct.stdout
    # With -f - psql numbers its messages by line, so the same faults stand in the same places.
    assert through.stderr == direct.stderr
    assert "tw" in direct.stdout
    assert "LINE 1: SELECT * FROM t, nowhere;" in direct.stderr


def test_psql_listings(database: Database, proxied: RunningProxy) -> None:
    psql(database.dsn(), "-c", "CREATE TABLE t (a serial, b text DEFAULT 'x'); CREATE VIEW v AS SELECT * FROM t")
    for command in (r"\d", r"\d+ t", r"\df", r"\dt *.*", r"\du", r"\l", r"\conninfo", r"\encoding", r"\dn+"):
        direct = psql(database.dsn(), "-c", command, check=False)  # psql may be older than the server
        through = psql(proxied.dsn(database), "-c", command, check=False)
        if command == r"\conninfo":  # which names the port
            assert str(proxied.port) in through.stdout
        else:
            assert (through.stdout, through.stderr) == (direct.stdout, direct.stderr)


def test_psql_copy_of_many_rows(database18: Database, proxied18: RunningProxy) -> None:
    data = "".join(f"{n}\t{'x' * (n % 300)}\n" for n in range(50_000))
    dsn = proxied18.dsn(database18)
    psql(dsn, "-c", "CREATE TABLE t (a int, b text)")
    assert psql(dsn, "-c", "COPY t FROM STDIN", stdin=data).stdout == "COPY 50000\n"
    assert psql(dsn, "-c", "COPY (SELECT * FROM t ORDER BY a) TO STDOUT").stdout == data


# --- psycopg ---


def test_psycopg(database: Database, proxied: RunningProxy) -> None:
    with psycopg.connect(proxied.dsn(database)) as c:
        assert c.execute("SELECT 1, 'é', NULL, ARRAY[1, 2], 1.50::numeric, '\\x00ff'::bytea").fetchone() == (
            1, "é", None, [1, 2], Decimal("1.50"), b"\0\xff"
        )
        c.execute("CREATE TABLE t (a int, b text)")
        with c.cursor() as cursor:
            cursor.executemany("INSERT INTO t VALUES (%s, %s)", [(n, str(n)) for n in range(100)])
            with cursor.copy("COPY t FROM STDIN") as copy:
                for n in range(100, 1000):
                    copy.write_row((n, "copied"))
            with cursor.copy("COPY (SELECT a FROM t ORDER BY a) TO STDOUT") as copy:
                assert [int(r[0]) for r in copy.rows()] == list(range(1000))
        for _ in range(10):  # psycopg prepares what it sees more than five times
            assert c.execute("SELECT count(*) FROM t WHERE a >= %s", (0,)).fetchone() == (1000,)
        with c.cursor(name="portal") as named:
            named.itersize = 7
            named.execute("SELECT a FROM t ORDER BY a")
            assert [r[0] for r in named] == list(range(1000))


def test_psycopg_pipeline(database: Database, proxied: RunningProxy) -> None:
    with psycopg.connect(proxied.dsn(database), autocommit=True) as c:
        c.execute("CREATE TABLE t (a int PRIMARY KEY)")
        with c.pipeline() as pipeline:
            cursors = [c.execute("INSERT INTO t VALUES (%s) RETURNING a", (n,)) for n in range(500)]
            assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(500)]
            # Each INSERT is a batch of its own here, so the one that fails takes no other with it.
            c.execute("INSERT INTO t VALUES (1000)")
            pipeline.sync()
            c.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(psycopg.errors.UniqueViolation):
                pipeline.sync()
            ok = c.execute("SELECT count(*) FROM t")
            assert ok.fetchone() == (501,)


def test_psycopg_errors_have_every_field(database: Database, proxied: RunningProxy) -> None:
    def fields(dsn: str) -> list[dict[str, object]]:
        got = []
        with psycopg.connect(dsn, autocommit=True) as c:
            c.execute("DROP TABLE IF EXISTS t")
            c.execute("CREATE TABLE t (a int NOT NULL CHECK (a > 0))")
            for statement in ("INSERT INTO t VALUES (0)", "INSERT INTO t VALUES (NULL)", "SELECT missing FROM t",
                              "SELECT 1 +", "DO $$ BEGIN PERFORM 1/0; END $$", "SELECT 'x'::int"):
                with pytest.raises(psycopg.Error) as caught:
                    c.execute(statement)
                diagnosis = caught.value.diag
                got.append({n: getattr(diagnosis, n) for n in dir(diagnosis) if not n.startswith("_")})
        return got

    assert fields(proxied.dsn(database)) == fields(database.dsn())


def test_notify(database: Database, proxied: RunningProxy) -> None:
    with psycopg.connect(proxied.dsn(database), autocommit=True) as listener:
        listener.execute("LISTEN news")
        with psycopg.connect(proxied.dsn(database), autocommit=True) as teller:
            for n in range(5):
                teller.execute(sql.SQL("NOTIFY news, {}").format(f"number {n}"))
        got = [n.payload for n in listener.notifies(timeout=30, stop_after=5)]
    assert got == [f"number {n}" for n in range(5)]


def test_large_objects_and_the_function_call_protocol(database18: Database, proxied18: RunningProxy) -> None:
    with psycopg.connect(proxied18.dsn(database18)) as c:
        (oid,) = c.execute("SELECT lo_from_bytea(0, 'abc')").fetchone()  # type: ignore[misc]
        assert c.execute("SELECT lo_get(%s)", (oid,)).fetchone() == (b"abc",)


def test_replication_sessions_pass(database18: Database, proxied18: RunningProxy) -> None:
    dsn = f"postgresql://postgres@127.0.0.1:{proxied18.port}/{database18.name}?replication=database"
    with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as c:
        row = c.execute("IDENTIFY_SYSTEM").fetchone()
        assert row is not None
        assert row[3] == database18.name


def test_startup_parameters_pass(database18: Database, proxied18: RunningProxy) -> None:
    dsn = proxied18.dsn(database18) + "?application_name=t%C3%A9st&options=-c%20search_path%3Dpg_temp"
    with psycopg.connect(dsn) as c:
        assert c.execute("SHOW application_name").fetchone() is not None
        assert c.execute("SHOW search_path").fetchone() == ("pg_temp",)


# --- other drivers ---


async def test_asyncpg(database: Database, proxied: RunningProxy) -> None:
    c = await asyncpg.connect(proxied.dsn(database))
    try:
        assert await c.fetch("SELECT n, n::text FROM generate_series(1, 1000) n") == [(n, str(n)) for n in range(1, 1001)]
        await c.execute("CREATE TABLE t (a int, b bytea)")
        await c.executemany("INSERT INTO t VALUES ($1, $2)", [(n, b"\0" * n) for n in range(200)])
        await c.copy_records_to_table("t", records=[(n, None) for n in range(200, 400)])
        statement = await c.prepare("SELECT count(*) FROM t WHERE a < $1")
        assert await statement.fetchval(300) == 300
        async with c.transaction():
            # Portals with a row limit: each fetch is an Execute that suspends.
            seen = [r["a"] async for r in c.cursor("SELECT a FROM t ORDER BY a", prefetch=7)]
        assert seen == list(range(400))
        with pytest.raises(asyncpg.UndefinedColumnError):
            await c.fetch("SELECT nonsense FROM t")
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with c.transaction():
                await c.fetch("SELECT 1 / (a - a) FROM t")
        assert await c.fetchval("SELECT 1") == 1
    finally:
        await c.close()


async def test_asyncpg_timeouts_cancel(database18: Database, proxied18: RunningProxy) -> None:
    c = await asyncpg.connect(proxied18.dsn(database18))
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await c.execute("SELECT pg_sleep(600)", timeout=0.05)
            assert await c.fetchval("SELECT 1", timeout=30) == 1
    finally:
        await c.close()


def test_pg8000(database: Database, proxied: RunningProxy) -> None:
    c = pg8000.dbapi.connect(database.owner, host="127.0.0.1", port=proxied.port, database=database.name, ssl_context=None)
    try:
        cursor = c.cursor()
        cursor.execute("SELECT %s::int + 1, %s", (1, "ü"))
        assert cursor.fetchall() == ([2, "ü"],)
        with pytest.raises(pg8000.dbapi.DatabaseError):
            cursor.execute("SELECT nonsense")
        c.rollback()
        cursor.execute("SELECT count(*) FROM generate_series(1, 10)")
        assert cursor.fetchone() == [10]
    finally:
        c.close()


def test_sqlalchemy(database: Database, proxied: RunningProxy) -> None:
    engine = sa.create_engine(proxied.dsn(database).replace("postgresql://", "postgresql+psycopg://"))
    try:
        metadata = sa.MetaData()
        table = sa.Table("t", metadata, sa.Column("a", sa.Integer, primary_key=True), sa.Column("b", sa.JSON))
        metadata.create_all(engine)
        with sa.orm.Session(engine) as session:
            session.execute(sa.insert(table), [{"a": n, "b": {"n": n}} for n in range(50)])
            session.commit()
            assert session.execute(sa.select(table.c.b).where(table.c.a == 7)).scalar_one() == {"n": 7}
        assert sa.inspect(engine).get_table_names() == ["t"]
    finally:
        engine.dispose()
