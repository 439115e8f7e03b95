"""Databases with dfproxy's schemas in them, and a stand-in for the worker that writes checkpoints by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
import pytest
from psycopg import sql

from engine.migrate import migrate
from tests.fix_postgres import Cluster, Database, fresh_database

Connection = psycopg.Connection[Any]
_counter = itertools.count(1)


def value(connection: Connection, query: str, *arguments: Any) -> Any:
    """The first column of the first row."""
    row = connection.execute(query, arguments).fetchone()
    assert row is not None
    return row[0]


@dataclass
class Refusal:
    """An error as the client sees it."""

    sqlstate: str | None
    message: str
    hint: str | None
    constraint: str | None


def refused(connection: Connection, query: str, *arguments: Any) -> Refusal:
    """The error of a statement that must fail; the transaction goes on."""
    with pytest.raises(psycopg.Error) as caught, connection.transaction():
        connection.execute(query, arguments)
    d = caught.value.diag
    return Refusal(d.sqlstate, d.message_primary or "", d.message_hint, d.constraint_name)


@contextlib.contextmanager
def installed_database(cluster: Cluster, version: int) -> Iterator[Database]:
    """A fresh database with the schemas."""
    with fresh_database(cluster, version) as database:
        asyncio.run(migrate(database.dsn()))
        yield database


@pytest.fixture(scope="session")
def shared_surface(cluster: Cluster, pg_version: int) -> Iterator[Database]:
    """One installed database a version, for tests that leave nothing behind."""
    with installed_database(cluster, pg_version) as database:
        yield database


@pytest.fixture(scope="session")
def _shared_session(shared_surface: Database) -> Iterator[Connection]:
    connection = psycopg.connect(shared_surface.dsn())
    yield connection
    connection.close()


@pytest.fixture
def df(_shared_session: Connection) -> Iterator[Connection]:
    """The owner's session on each version, in a transaction that is rolled back. All tests share the session."""
    yield _shared_session
    _shared_session.rollback()


@pytest.fixture(scope="session")
def _surface_template(cluster: Cluster, pg_version: int) -> Iterator[Database]:
    with installed_database(cluster, pg_version) as database:
        yield database


@pytest.fixture
def surface(_surface_template: Database) -> Iterator[Database]:
    """A database of its own with the schemas, on each version; a copy, which is quicker than an installation."""
    template = _surface_template
    database = replace(template, name=f"{template.name}_{next(_counter)}")
    names = [sql.Identifier(n) for n in (database.name, template.name, template.owner)]
    with psycopg.connect(template.cluster.dsn(), autocommit=True) as c:
        c.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}").format(*names))
        yield database
        c.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(names[0]))


@dataclass
class Player:
    """Plays the worker: claims instances and writes what a worker would, through the functions it would use."""

    connection: Connection
    worker: uuid.UUID = field(default_factory=uuid.uuid4)
    tokens: dict[str, uuid.UUID] = field(default_factory=dict)

    def claim(self, limit: int = 100) -> list[str]:
        """Claims what is due; returns the ids."""
        self.connection.execute("INSERT INTO duroxide.workers (id, name, version, lease) VALUES (%s, 'player', '0', '1 hour')"
                                " ON CONFLICT (id) DO NOTHING", (self.worker,))
        rows = self.connection.execute("SELECT instance_id, token FROM duroxide.claim(%s, %s)", (self.worker, limit)).fetchall()
        self.tokens |= dict(rows)
        return [r[0] for r in rows]

    def checkpoint(self, instance: str, *rows: dict[str, Any], finish: dict[str, Any] | None = None,
                   **named: Any) -> None:
        """duroxide.checkpoint with the token of the last claim."""
        arguments = {"p_instance": instance, "p_token": self.tokens[instance], "p_rows": json.dumps(rows),
                     "p_finish": json.dumps(finish) if finish is not None else None, **named}
        places = ", ".join(f"{name} => %({name})s" for name in arguments)
        self.connection.execute(f"SELECT duroxide.checkpoint({places})", arguments)  # type: ignore[arg-type]


def done(node: int, result: str = '{"rows":[],"row_count":0}', execution: str = "") -> dict[str, Any]:
    return {"execution": execution, "node": node, "event": "completed", "result": result}


def failed(node: int, message: str, execution: str = "", **error: str) -> dict[str, Any]:
    return {"execution": execution, "node": node, "event": "failed", "error": {"message": message, **error}}


def waiting(node: int, execution: str = "", **meta: Any) -> dict[str, Any]:
    return {"execution": execution, "node": node, "event": "waiting", "meta": meta or None}


def decided(node: int, result: str, execution: str = "") -> dict[str, Any]:
    return {"execution": execution, "node": node, "event": "decided", "result": result}


def loop_round(node: int, number: int, execution: str = "", began: str = "2000-01-01T00:00:00+00:00") -> dict[str, Any]:
    return {"execution": execution, "node": node, "event": "round", "meta": {"round": number, "began": began, "names": {}}}


def completed(output: str = "null") -> dict[str, Any]:
    return {"status": "completed", "output": output}


@pytest.fixture
def player(df: Connection) -> Player:
    """A worker in the transaction of `df`."""
    return Player(df)


@pytest.fixture
def begin(df: Connection, player: Player) -> Callable[[str], str]:
    """Starts the workflow that an SQL expression describes, claims it, and returns its id."""

    def start(expression: str) -> str:
        instance: str = value(df, f"SELECT df.start({expression})")
        assert instance in player.claim()
        return instance

    return start
