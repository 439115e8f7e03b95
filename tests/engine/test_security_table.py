"""SURFACE 8.3, row by row: what each function shows of an instance that does not exist, or belongs to another role.

And forging: by hand a granted role inserts at most what df.start would insert for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.engine.fix_surface import Connection, refused, value
from tests.fix_postgres import Database

UNKNOWN = "0f0f0f0f"


@dataclass
class Two:
    """Two granted roles; `theirs` belongs to the other one, and is like an unknown id to us."""

    database: Database
    me: Connection
    other: Connection
    theirs: str
    name: str


@pytest.fixture
def two(surface: Database) -> Iterator[Two]:
    names = [f"{surface.name}_me", f"{surface.name}_Other \"x\""]
    with psycopg.connect(surface.superuser_dsn, autocommit=True) as admin:
        for name in names:
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
            admin.execute("SELECT df.grant_usage(%s)", (name,))
        # Membership does not help.
        admin.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(names[1]), sql.Identifier(names[0])))
    with psycopg.connect(surface.superuser_dsn, user=names[0], autocommit=True) as me, \
            psycopg.connect(surface.superuser_dsn, user=names[1], autocommit=True) as other:
        other.execute("SELECT df.setvar('v', 'secret')")
        yield Two(surface, me, other, value(other, "SELECT df.start('SELECT 1', 'theirs')"), names[1])


TABLE: dict[str, Any] = {
    "SELECT df.status(%s)": [(None,)],
    "SELECT df.result(%s)": [(None,)],
    "SELECT df.error(%s)": [(None,)],
    "SELECT * FROM df.instance_info(%s)": [],
    "SELECT * FROM df.instance_nodes(%s)": [],
    "SELECT * FROM df.instance_nodes(%s, 5)": [],
    "SELECT * FROM df.instance_executions(%s)": [],
    "SELECT * FROM df.instances WHERE id = %s": [],
    "SELECT * FROM df.nodes WHERE instance_id = %s": [],
    "SELECT * FROM duroxide.instances WHERE id = %s": [],
    "SELECT instance_id FROM duroxide.queue WHERE instance_id = %s": [],
    "SELECT * FROM duroxide.history WHERE instance_id = %s": [],
    "SELECT * FROM df.list_instances() WHERE instance_id = %s": [],
    "SELECT * FROM df.list_instances(NULL, 10, NULL) WHERE instance_id = %s": [],
    "SELECT df.explain(%s)": "Instance '{}' not found",
    "SELECT df.diagram(%s)": "Instance '{}' not found",
}
ERRORS = {
    "SELECT df.await_instance(%s, 1)": "Instance not found: {}",
    "SELECT df.signal(%s, 'x')": "Instance not found or access denied: {}",
    "SELECT df.cancel(%s)": "Instance not found or access denied: {}",
    "SELECT df.delete_instance(%s)": "Instance not found or access denied: {}",
    "SELECT df.delete_instance(%s, true)": "Instance not found or access denied: {}",
}


def test_unknown_and_foreign_instances_look_alike(two: Two) -> None:
    for query, expected in TABLE.items():
        for instance in (UNKNOWN, two.theirs):
            wanted = [(expected.format(instance),)] if isinstance(expected, str) else expected
            assert two.me.execute(query, (instance,)).fetchall() == wanted, query
    for query, message in ERRORS.items():
        for instance in (UNKNOWN, two.theirs):
            error = refused(two.me, query, instance)
            assert (error.sqlstate, error.message) == ("02000", message.format(instance)), query
    assert value(two.me, "SELECT df.getvar('v') IS NULL") is True
    assert two.me.execute("DELETE FROM duroxide.instances WHERE id = %s", (two.theirs,)).rowcount == 0
    assert value(two.me, "SELECT df.prune('infinity')") == 0
    assert value(two.other, "SELECT df.status(%s)", two.theirs) == "pending"


def test_set_role_changes_what_is_seen(two: Two) -> None:
    two.me.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(two.name)))
    assert value(two.me, "SELECT df.status(%s)", two.theirs) == "pending"
    assert value(two.me, "SELECT df.getvar('v')") == "secret"


def test_superusers_see_all_but_have_their_own_variables(two: Two) -> None:
    with psycopg.connect(two.database.superuser_dsn, autocommit=True) as admin:
        assert value(admin, "SELECT df.status(%s)", two.theirs) == "pending"
        assert value(admin, "SELECT count(*) FROM df.instance_nodes(%s)", two.theirs) == 1
        assert value(admin, "SELECT df.getvar('v') IS NULL") is True
        assert value(admin, "SELECT df.cancel(%s)", two.theirs) == f"Instance {two.theirs} cancelled: Cancelled by user"


def test_what_may_be_inserted_by_hand_is_ones_own_and_fresh(two: Two) -> None:
    graph = '[{"id":"00000001","type":"SQL","query":"SELECT 1"}]'
    two.me.execute("INSERT INTO duroxide.instances (id, label, graph) VALUES ('0000abcd', 'by hand', %s)", (graph,))
    row = two.me.execute("SELECT status, submitted_by::text = quote_ident(current_user), output, error, started_at, ended_at,"
                         " interpreter FROM duroxide.instances WHERE id = '0000abcd'").fetchone()
    assert row == ("pending", True, None, None, None, None, 1)
    assert value(two.me, "SELECT count(*) FROM duroxide.queue WHERE instance_id = '0000abcd' AND claims = 0") == 1
    for column, given in {"status": "'completed'", "output": "'x'", "error": "'{}'", "submitted_by": "'postgres'::regrole",
                          "started_at": "now()", "ended_at": "now()", "created_at": "now()", "interpreter": "2"}.items():
        error = refused(two.me, f"INSERT INTO duroxide.instances (id, graph, {column}) VALUES ('0000abce', '[]', {given})")
        assert error.sqlstate == "42501", column
    # On conflict is no way to an update, and a signal for another's instance none into its inbox.
    assert refused(two.me, "INSERT INTO duroxide.instances (id, graph) VALUES (%s, '[]')"
                           " ON CONFLICT (id) DO UPDATE SET graph = EXCLUDED.graph", two.theirs).sqlstate == "42501"
    for kind in ("signal", "cancel"):
        assert refused(two.me, "INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, %s, 'x')",
                       two.theirs, kind).sqlstate == "42501"
    assert refused(two.me, "INSERT INTO df.vars (owner, name, value) VALUES (%s::regrole, 'v', 'mine')",
                   '"' + two.name.replace('"', '""') + '"').sqlstate == "42501"


GRAPHS = [
    "[]", "{}", "7", "null", '[{"id":"00000001","type":"SQL"}]', '[{"id":"00000001","type":"NO","query":"x"}]',
    '[{"id":"00000001","type":"THEN","left":0,"right":0}]', '[{"id":"00000001","type":"THEN","left":1,"right":7}]',
    '[{"id":"00000001","type":"SQL","query":"SELECT 1"},{"id":"00000002","type":"SQL","query":"SELECT 2"}]',
]


async def test_what_workers_load_is_validated(two: Two) -> None:
    from engine.settings import EngineSettings
    from engine.worker import Worker

    for n, graph in enumerate(GRAPHS):
        two.me.execute("INSERT INTO duroxide.instances (id, graph) VALUES (%s, %s)", (f"0000abc{n}", graph))
    two.other.execute("SELECT df.cancel(%s)", (two.theirs,))
    worker = Worker(EngineSettings(dsn=two.database.dsn()))
    async with asyncio.TaskGroup() as group:
        group.create_task(worker.run())
        while value(two.me, "SELECT count(*) FROM df.instances WHERE status IN ('pending', 'running')"):
            await asyncio.sleep(0.02)
        await worker.stop(1)
    ends = two.me.execute("SELECT graph, status, output IS NOT NULL AND df.error(id) = output FROM duroxide.instances").fetchall()
    assert len(ends) == len(GRAPHS)
    assert [end for end in ends if end[1:] != ("failed", True)] == []
    assert worker.statistics.bugs == 0
