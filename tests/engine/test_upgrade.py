"""From the first schema to a later one, in the middle of workflows, with workers on both sides.

0001 to 0010 belong together (0003 uses a column that 0010 adds): a database with less of them can't start workflows. What
comes later is whatever files there are, and one more that does what upgrades do: a column, an index, a new function body.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psycopg
import pytest

from engine import migrate
from engine.settings import EngineSettings
from engine.worker import Worker
from tests.engine.fix_surface import Connection, value
from tests.fix_postgres import Database

FIRST = 10
LATER = """
ALTER TABLE duroxide.instances ADD COLUMN upgraded boolean NOT NULL DEFAULT true;
CREATE INDEX instances_upgraded ON duroxide.instances (id) WHERE upgraded;
CREATE OR REPLACE FUNCTION df.version() RETURNS text LANGUAGE sql STABLE RETURN 'upgraded';
"""
WORKFLOWS = {
    "loop": "df.loop('INSERT INTO marks SELECT ''loop''', 'SELECT (SELECT count(*) FROM marks WHERE m = ''loop'') < 5')",
    "sleeper": "df.seq('INSERT INTO marks VALUES (''before'')', df.sleep(2), 'INSERT INTO marks VALUES (''after'')')",
    "signal": "df.seq(df.as(df.wait_for_signal('go'), 's'), 'INSERT INTO marks SELECT $s.data')",
    "race": "df.race(df.seq(df.sleep(2), 'INSERT INTO marks VALUES (''race'')'), df.sleep(600))",
    "failing": "df.seq(df.wait_for_signal('go'), 'SELECT 1/0')",
}


def worker(database: Database, name: str) -> Worker:
    return Worker(EngineSettings(dsn=database.dsn(), worker_name=name, lease=5))


async def until(connection: Connection, query: str, wanted: object) -> None:
    while value(connection, query) != wanted:
        await asyncio.sleep(0.02)


async def test_workflows_survive_an_upgrade_in_their_middle(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = migrate.migrations()
    everything.append(migrate.Migration(everything[-1].version + 1, "later", LATER))
    monkeypatch.setattr(migrate, "migrations", lambda: everything)
    with monkeypatch.context() as first:
        first.setattr(migrate, "migrations", lambda: everything[:FIRST])
        assert (await migrate.migrate(database.dsn())).version == FIRST
    old, new = worker(database, "old"), worker(database, "new")
    with psycopg.connect(database.dsn(), autocommit=True) as c:
        c.execute("CREATE TABLE marks (m text)")
        started = {name: value(c, f"SELECT df.start({expression}, %s)", name) for name, expression in WORKFLOWS.items()}
        async with asyncio.TaskGroup() as group:
            group.create_task(old.run())
            await until(c, "SELECT EXISTS (SELECT FROM marks WHERE m = 'before') AND EXISTS (SELECT FROM marks WHERE m = 'loop')", True)

            result = await migrate.migrate(database.dsn())
            assert result.applied == tuple(m.version for m in everything[FIRST:])
            group.create_task(new.run())
            await until(c, "SELECT count(*) FROM duroxide.workers", 2)
            # Both work: what one has given back the other may take.
            fresh = [value(c, "SELECT df.start('INSERT INTO marks VALUES (''fresh'')')") for _ in range(50)]
            await old.stop(1)
            for name in ("signal", "failing"):
                c.execute("SELECT df.signal(%s, 'go', %s)", (started[name], json.dumps("signalled")))
            await until(c, "SELECT count(*) FROM df.instances WHERE status IN ('pending', 'running')", 0)
            await new.stop(1)

        found = dict(c.execute("SELECT label, status FROM df.instances WHERE label IS NOT NULL").fetchall())
        assert found == {name: "failed" if name == "failing" else "completed" for name in WORKFLOWS}
        assert sum(value(c, "SELECT df.status(%s)", i) == "completed" for i in fresh) == len(fresh)
        marks = dict(c.execute("SELECT m, count(*) FROM marks GROUP BY m").fetchall())
        assert marks == {"after": 1, "before": 1, "fresh": 50, "loop": 5, "race": 1, "signalled": 1}
        assert value(c, "SELECT df.version()") == "upgraded"
        # What the upgrade brought works on instances from before it.
        assert value(c, "SELECT df.diagram(%s)", started["loop"]).startswith("---\n")
        assert value(c, "SELECT df.delete_instance(%s)", started["loop"]) == f"Instance {started['loop']} deleted"
    assert old.statistics.bugs == new.statistics.bugs == 0


async def test_every_step_of_the_way_can_be_taken_alone(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade that was interrupted between two files goes on where it was."""
    everything = migrate.migrations()
    for count in range(1, len(everything) + 1):
        with monkeypatch.context() as some:
            some.setattr(migrate, "migrations", lambda count=count: everything[:count])
            assert (await migrate.migrate(database18.dsn())).applied == (everything[count - 1].version,)
    assert not (await migrate.migrate(database18.dsn())).changed


def test_the_numbers_have_no_gap() -> None:
    found = migrate.migrations()
    assert [m.version for m in found] == list(range(1, len(found) + 1))
    assert Path(migrate.__file__).parent.joinpath("schema").is_dir()
