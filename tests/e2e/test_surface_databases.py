"""Several databases: each with its own workflows, steps in another one, and what is said in one without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from tests.e2e.fix_dfproxy import Proxy, running_proxy
from tests.fix_postgres import Cluster, Database, fresh_database, versions


@dataclass
class Served:
    """A proxy that serves `home` and `second`, and not `third`; all belong to the same role."""

    proxy: Proxy
    home: Database
    second: str
    third: str

    def connect(self, database: str | None = None, **arguments: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.proxy.dsn(self.home.owner, quote(database or self.home.name)), autocommit=True, **arguments)


@pytest.fixture(scope="module")
def served(cluster: Cluster, pg_version: int) -> Iterator[Served]:
    with fresh_database(cluster, pg_version) as home:
        names = [f"{home.name}_second", f"{home.name}_Drei ü"]
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            for name in names:
                c.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(home.owner)))
            with running_proxy(home.dsn(), "--databases", names[0]) as proxy:
                yield Served(proxy, home, *names)
            for name in names:
                c.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def one(connection: psycopg.Connection[Any], query: str, *arguments: object) -> Any:
    row = connection.execute(query, arguments).fetchone()
    assert row is not None
    return row[0]


def rows(connection: psycopg.Connection[Any], instance: str) -> Any:
    assert one(connection, "SELECT df.await_instance(%s, 60)", instance) == "completed", one(connection, "SELECT df.error(%s)", instance)
    return json.loads(one(connection, "SELECT df.result(%s)", instance))["rows"]


def test_each_served_database_has_its_own_workflows(served: Served) -> None:
    with served.connect() as home, served.connect(served.second) as second:
        for c, name, mode in ((home, served.home.name, "caller"), (second, served.second, "caller"), (second, served.second, "new")):
            instance = one(c, "SELECT df.start('SELECT 1' ~> 'SELECT current_database()::text AS d', transaction_mode => %s)", mode)
            assert rows(c, instance) == [{"d": name}]
            assert one(c, "SELECT df.target_database()") == name
            other = second if c is home else home
            assert one(other, "SELECT df.status(%s)", instance) is None


def test_steps_in_another_database(served: Served) -> None:
    with served.connect() as c:
        instance = one(c, "SELECT df.start('SELECT current_database()::text AS d, current_user::text AS u' |=> 'a'"
                          " ~> 'SELECT $a.d AS d, $a.u AS u, ''{sys_label}'' AS l', 'there', database => %s)", served.third)
        assert rows(c, instance) == [{"d": served.third, "u": served.home.owner, "l": "there"}]
        assert one(c, "SELECT database FROM df.instances WHERE id = %s", instance) == served.third
        # At least once, and on record before it runs.
        meta = one(c, "SELECT array_agg(meta->>'at_least_once') FROM duroxide.history WHERE instance_id = %s", instance)
        assert meta == ["true", "true"]
        for mode in ("caller", "new"):
            with pytest.raises(psycopg.errors.InvalidCatalogName, match='database "nowhere" does not exist'):
                c.execute("SELECT df.start('SELECT 1', database => 'nowhere', transaction_mode => %s)", (mode,))


UNSERVED = [
    ("SELECT df.start('SELECT 1')", "3F000"),
    ("SELECT 'SELECT 1' ~> 'SELECT 2'", "42883"),
    ("DO $$ BEGIN PERFORM df.status('00000000'); END $$", "3F000"),
    ("SELECT * FROM df.list_instances()", "3F000"),
]


@pytest.mark.parametrize(("statement", "state"), UNSERVED, ids=[s[:24] for s, _ in UNSERVED])
@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
def test_a_database_that_is_not_served_says_which_are(served: Served, statement: str, state: str, encoding: str) -> None:
    with served.connect(served.third, client_encoding=encoding) as c, pytest.raises(psycopg.Error) as caught:
        c.execute(statement)
    assert caught.value.sqlstate == state
    hint = caught.value.diag.message_hint or ""
    assert hint.endswith(
        f'dfproxy runs workflows in "{served.home.name}", "{served.second}", not in "{served.third}". '
        "To have them here too, start dfproxy with --databases naming it (or with *): it installs schema df then.")


def test_the_extension_in_a_database_that_is_not_served(served: Served) -> None:
    with served.connect(served.third) as c, pytest.raises(psycopg.Error) as caught:
        c.execute("CREATE EXTENSION pg_durable")
    assert "dfproxy runs workflows in" in (caught.value.diag.message_hint or "")


def test_other_errors_and_ones_own_df_are_left_alone(served: Served) -> None:
    with served.connect(served.third) as c:
        c.execute("CREATE SCHEMA df; CREATE FUNCTION df.status(text) RETURNS text LANGUAGE sql RETURN 'mine';"
                  "CREATE FUNCTION df.seq(text, text) RETURNS text LANGUAGE sql RETURN 'seq';"
                  "CREATE OPERATOR public.~> (FUNCTION = df.seq, LEFTARG = text, RIGHTARG = text)")
        try:
            assert one(c, "SELECT df.status('x')") == "mine"
            assert one(c, "SELECT 'a'::text ~> 'b'") == "seq"
            for statement in ("SELECT df.nothing()", "SELECT * FROM df_nowhere.t", "SELECT 1/0 FROM (SELECT df.status('x')) s"):
                with pytest.raises(psycopg.Error) as caught:
                    c.execute(statement)
                assert "dfproxy" not in (caught.value.diag.message_hint or "")
        finally:
            c.execute("DROP SCHEMA df CASCADE")


def test_every_database_that_can_have_workflows(cluster18: Cluster) -> None:
    """`--databases *`: a database in which the service role may not create schemas is left out, and says so."""
    with fresh_database(cluster18, versions()[0]) as home:
        second = f"{home.name}_second"
        with psycopg.connect(cluster18.dsn(), autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(second), sql.Identifier(home.owner)))
            with running_proxy(home.dsn(), "--databases", "*") as proxy:
                served = Served(proxy, home, second, "postgres")
                with served.connect(second) as c:
                    assert rows(c, one(c, "SELECT df.start('SELECT 1' ~> 'SELECT current_database()::text AS d')")) == [{"d": second}]
                with served.connect("postgres") as c, pytest.raises(psycopg.errors.InvalidSchemaName) as caught:
                    c.execute("SELECT df.status('00000000')")
                assert 'not in "postgres"' in (caught.value.diag.message_hint or "")
                assert "no workflows in this database" in proxy.log.read_text()
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(second)))
