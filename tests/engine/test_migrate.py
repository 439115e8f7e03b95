"""Installing, upgrading and removing the schemas."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import sql

import engine.migrate as module
from engine.migrate import (
    Migration,
    MigrationError,
    UnfinishedWorkflowsError,
    migrate,
    migrations,
    schema_version,
    uninstall,
)
from tests.engine.fix_surface import value
from tests.fix_postgres import Database


def connect(database: Database) -> psycopg.Connection[Any]:
    return psycopg.connect(database.dsn(), autocommit=True)


async def version_of(database: Database) -> int | None:
    connection = await asyncpg.connect(database.dsn())
    try:
        return await schema_version(connection)
    finally:
        await connection.close()


def as_superuser(database: Database, statement: str) -> None:
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        c.execute(statement)  # type: ignore[arg-type]


async def test_installing_and_doing_it_again(database: Database) -> None:
    newest = migrations()[-1].version
    assert await version_of(database) is None
    first = await migrate(database.dsn())
    assert (first.version, first.applied, first.installed) == (newest, tuple(m.version for m in migrations()), True)
    assert await version_of(database) == newest
    again = await migrate(database.dsn())
    assert (again.version, again.applied, again.installed, again.changed) == (newest, (), False, False)
    with connect(database) as c:
        owners = {r[0] for r in c.execute("""
            SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace IN ('df'::regnamespace, 'duroxide'::regnamespace)
            UNION SELECT relowner::regrole::text FROM pg_class WHERE relnamespace IN ('df'::regnamespace, 'duroxide'::regnamespace)""")}
        assert owners == {database.owner}
        assert value(c, "SELECT count(*) FROM pg_extension") == 1


async def test_many_at_once(database: Database) -> None:
    outcomes = await asyncio.gather(*(migrate(database.dsn()) for _ in range(6)))
    assert sorted(v for o in outcomes for v in o.applied) == [m.version for m in migrations()]
    assert sum(o.installed for o in outcomes) == 1


async def test_an_interrupted_installation_goes_on_where_it_stopped(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    files = migrations()
    broken = [*files[:2], Migration(files[2].version, files[2].name, "CREATE TABLE df.half (); SELECT 1/0")]
    monkeypatch.setattr(module, "migrations", lambda: broken)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(database.dsn())
    assert await version_of(database) == 2
    monkeypatch.undo()
    assert (await migrate(database.dsn())).applied == tuple(m.version for m in files[2:])
    with connect(database) as c:
        assert value(c, "SELECT to_regclass('df.half')") is None


@pytest.mark.parametrize("schema", ["df", "duroxide"])
async def test_schemas_of_others_are_left_alone(database: Database, schema: str) -> None:
    with connect(database) as c:
        c.execute(f"CREATE SCHEMA {schema}")
    with pytest.raises(MigrationError, match=f"schema {schema} that dfproxy did not make"):
        await migrate(database.dsn())
    assert await version_of(database) is None
    await uninstall(database.dsn(), force=True)
    with connect(database) as c:
        assert value(c, "SELECT count(*) FROM pg_namespace WHERE nspname IN ('df', 'duroxide')") == 1


async def test_a_newer_installation_is_not_touched(database: Database) -> None:
    await migrate(database.dsn())
    with connect(database) as c:
        c.execute("INSERT INTO duroxide.migrations (version, name, checksum) VALUES (9999, 'future', '')")
    with pytest.raises(MigrationError, match="newer dfproxy"):
        await migrate(database.dsn())


async def test_an_installation_from_other_files_is_not_touched(database: Database) -> None:
    await migrate(database.dsn())
    with connect(database) as c:
        c.execute("UPDATE duroxide.migrations SET checksum = 'x' WHERE version = 3")
    with pytest.raises(MigrationError, match="0003_control was applied from a file with other contents"):
        await migrate(database.dsn())


async def test_an_upgrade_runs_only_what_is_new(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await migrate(database.dsn())
    newer = [*migrations(), Migration(9000, "later", "CREATE TABLE duroxide.later ()")]
    monkeypatch.setattr(module, "migrations", lambda: newer)
    assert (await migrate(database.dsn())).applied == (9000,)
    assert await version_of(database) == 9000


async def test_an_upgrade_waits_without_holding_up_others(
    database: Database, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A transaction that has started a workflow and does not end: others start theirs meanwhile, between two attempts."""
    await migrate(database.dsn())
    newer = [*migrations(), Migration(9000, "later", "ALTER TABLE duroxide.instances ADD COLUMN later integer")]
    monkeypatch.setattr(module, "migrations", lambda: newer)
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    monkeypatch.setattr(module, "_PAUSE", 0.5)
    with connect(database) as idle, connect(database) as busy:
        idle.execute("BEGIN")
        idle.execute("SELECT df.start('SELECT 1')")
        upgrade = asyncio.create_task(migrate(database.dsn()))
        waiting, started = "", 0
        while waiting.count("waits for transactions") < 2:
            await asyncio.wait_for(asyncio.to_thread(busy.execute, "SELECT df.start('SELECT 1')"), 60)
            started += 1
            waiting += capfd.readouterr().out
            assert not upgrade.done()
        assert str(idle.info.backend_pid) in waiting
        idle.execute("COMMIT")
        assert (await upgrade).applied == (9000,)
        assert value(busy, "SELECT count(*) FROM duroxide.instances WHERE later IS NULL") == started + 1


async def test_a_role_without_create_is_told_which_grant_it_needs(database: Database) -> None:
    as_superuser(database, f"ALTER DATABASE {database.name} OWNER TO postgres")
    with pytest.raises(MigrationError, match=f"GRANT CREATE ON DATABASE {database.name} TO {database.owner}"):
        await migrate(database.dsn())
    as_superuser(database, f"GRANT CREATE ON DATABASE {database.name} TO {database.owner}")
    assert (await migrate(database.dsn())).installed


async def test_a_superuser_upgrades_as_the_owner_and_strangers_do_not(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await migrate(database.dsn())
    newer = [*migrations(), Migration(9000, "later", "CREATE TABLE duroxide.later ()")]
    monkeypatch.setattr(module, "migrations", lambda: newer)
    stranger = f"{database.owner}_s"
    as_superuser(database, f"CREATE ROLE {stranger} LOGIN")
    try:
        for call in (migrate, uninstall):
            with pytest.raises(MigrationError, match=f"belong to role {database.owner}"):
                await call(database.dsn(stranger))
        assert (await migrate(database.superuser_dsn)).applied == (9000,)
        with connect(database) as c:
            assert value(c, "SELECT relowner::regrole::text FROM pg_class WHERE oid = 'duroxide.later'::regclass") == database.owner
    finally:
        as_superuser(database, f"DROP ROLE {stranger}")


async def test_the_defaults_of_role_and_database_do_not_disturb(database: Database) -> None:
    as_superuser(database, f"""
        ALTER ROLE {database.owner} SET search_path = trap, public;
        ALTER ROLE {database.owner} SET default_transaction_read_only = on;
        ALTER ROLE {database.owner} SET default_transaction_isolation = serializable;
        ALTER ROLE {database.owner} SET check_function_bodies = off;
        ALTER ROLE {database.owner} SET statement_timeout = '1s';
        ALTER ROLE {database.owner} SET standard_conforming_strings = off""")
    assert (await migrate(database.dsn())).installed
    assert not (await migrate(database.dsn())).changed


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_databases_in_other_encodings(database: Database, encoding: str) -> None:
    name = f"{database.name}_{encoding.lower()}"
    as_superuser(database, f"CREATE DATABASE {name} OWNER {database.owner} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    try:
        dsn = database.cluster.dsn(user=database.owner, database=name)
        assert (await migrate(dsn)).installed
        with psycopg.connect(dsn, client_encoding="utf8") as c:
            text = value(c, "SELECT df.explain(df.if('a', 'b', 'c'))")
            assert [line.rstrip() for line in text.split("\n")][:3] == ["IF", "    ? condition:", "      `-SQL: a"]
            instance = value(c, "SELECT df.start(df.seq('a', 'b'))")
            assert value(c, "SELECT count(*) FROM df.nodes WHERE instance_id = %s", instance) == 3
    finally:
        as_superuser(database, f"DROP DATABASE {name}")


async def test_uninstalling(database: Database) -> None:
    await uninstall(database.dsn())  # nothing there
    await migrate(database.dsn())
    role = f"{database.owner}_app"
    with connect(database) as c:
        c.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        c.execute("SELECT df.grant_usage(%s)", (role,))
        instance = value(c, "SELECT df.start('SELECT 1')")
        with pytest.raises(UnfinishedWorkflowsError, match="1 workflows have not ended"):
            await uninstall(database.dsn())
        c.execute("SELECT df.cancel(%s)", (instance,))
        executor = value(c, "SELECT executor::text FROM duroxide.executors")
    await uninstall(database.dsn())
    with connect(database) as c:
        assert value(c, "SELECT count(*) FROM pg_namespace WHERE nspname IN ('df', 'duroxide')") == 0
        assert value(c, "SELECT to_regrole(%s)", executor) is None
        c.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert (await migrate(database.dsn())).installed
    with connect(database) as c:
        c.execute("SELECT df.start('SELECT 1')")
    await uninstall(database.dsn(), force=True)
    assert await version_of(database) is None


async def test_uninstalling_spares_what_others_built_on_it(database: Database) -> None:
    await migrate(database.dsn())
    with connect(database) as c:
        c.execute("CREATE SCHEMA mine; CREATE VIEW mine.jobs AS SELECT * FROM df.instances")
    with pytest.raises(MigrationError, match=r"view mine\.jobs"):
        await uninstall(database.dsn())
    await uninstall(database.dsn(), force=True)
    with connect(database) as c:
        assert value(c, "SELECT to_regclass('mine.jobs')") is None


def test_the_files_are_numbered_and_packaged() -> None:
    files = migrations()
    assert [m.version for m in files] == list(range(1, len(files) + 1))
    assert len(list((Path(module.__file__).parent / "schema").glob("*.sql"))) == len(files)
