"""Compiled statements against the installed df functions: what is found is raised by the backend, where and as it should."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from dsl.compiler import compile_sql
from engine.migrate import migrate
from tests.dsl.test_compile_corpus import cases, split_mark
from tests.fix_postgres import Database

Connection = psycopg.Connection[tuple[str]]


@pytest.fixture
async def server(database: Database) -> Database:
    """A database with the surface."""
    await migrate(database.dsn())
    return database


@pytest.fixture
def connection(server: Database) -> Iterator[Connection]:
    with psycopg.connect(server.dsn(), autocommit=True) as made:
        yield made


def run(connection: Connection, source: str) -> psycopg.Cursor[tuple[str]]:
    compiled = compile_sql(source)
    return connection.execute((source if compiled is None else compiled.sql).encode())


def test_a_workflow(connection: Connection) -> None:
    row = run(
        connection,
        "SELECT df.start('SELECT 1 AS id' |=> 'batch' ~> 'SELECT $batch' ~> ('a' & 'b') ~> ('c' ?> 't' !> 'e')"
        " ~> @> ('x' ~> df.break()), 'label')",
    ).fetchone()
    assert row is not None
    types = connection.execute(
        "SELECT string_agg(node ->> 'type', ' ' ORDER BY n) FROM duroxide.instances,"
        " jsonb_array_elements(graph) WITH ORDINALITY AS g(node, n) WHERE id = %s", row
    ).fetchone()  # fmt: skip
    assert types == ("THEN THEN THEN THEN SQL SQL JOIN SQL SQL IF SQL SQL SQL LOOP THEN SQL BREAK",)


def test_operators_give_what_the_functions_give(connection: Connection) -> None:
    pairs = [
        ("'a' ~> 'b'", "df.seq('a', 'b')"),
        ("'c' ?> ('t' & 'u') !> @> 'e' |=> 'n'", "df.as(df.if('c', df.join('t', 'u'), df.loop('e')), 'n')"),
    ]
    for operators, functions in pairs:
        left, right = (run(connection, f"SELECT {x}").fetchone() for x in (operators, functions))
        assert left == right
        assert left is not None
        assert "node_type" in json.loads(left[0])


def test_errors_are_raised(connection: Connection) -> None:
    for marked, expected in cases("errors.txt"):
        source, position = split_mark(marked)
        sqlstate, _, message = expected.partition(" ")
        with pytest.raises(psycopg.Error) as caught:
            run(connection, source)
        diagnostics = caught.value.diag
        assert (diagnostics.sqlstate, diagnostics.constraint_name) == (sqlstate, f"dfproxy:position={position}"), source
        assert (diagnostics.message_primary or "").startswith(message), source


def test_a_builder_would_say_the_same(connection: Connection) -> None:
    """Constants that the compiler checks, hidden from it: the functions' own message and SQLSTATE."""
    hidden = 0
    for marked, expected in cases("errors.txt"):
        source, position = split_mark(marked)
        sqlstate, _, message = expected.partition(" ")
        argument = source[position - 1 :]
        if sqlstate != "22023" or "|=>" in source or "transaction_mode" in source or "\U0001d11e" in source:
            continue
        end = argument.index("'", 1) + 1 if argument.startswith("'") else len(argument.split(")")[0])
        kind = "text" if argument.startswith("'") else "integer"
        text = f"{source[: position - 1]}(SELECT {argument[:end]}::{kind}){argument[end:]}"
        assert compile_sql(text) is None
        with pytest.raises(psycopg.Error) as caught:
            connection.execute(text.encode())
        assert caught.value.diag.sqlstate == sqlstate, text
        assert message in (caught.value.diag.message_primary or ""), text
        hidden += 1
    assert hidden > 8


def test_errors_with_parameters_are_raised(connection: Connection) -> None:
    compiled = compile_sql("SELECT df.start($1 ~> , $2), $2 || 'x'")
    assert compiled is not None
    connection.execute(sql.SQL("PREPARE p AS {}").format(sql.SQL(compiled.sql)))
    with pytest.raises(psycopg.errors.SyntaxError, match="nothing stands on the right") as caught:
        connection.execute("EXECUTE p('a', 'b')")
    assert caught.value.diag.constraint_name == "dfproxy:position=20"


def test_warnings_are_raised(connection: Connection) -> None:
    raised: list[tuple[str | None, str | None, str | None]] = []
    connection.add_notice_handler(
        lambda d: raised.append((d.severity_nonlocalized, d.message_primary, d.constraint_name)) if "was read" in (
            d.message_primary or "") or "defines" in (d.message_primary or "") else None
    )  # fmt: skip
    source = "SELECT df.start('a' ~> 'SELECT $y' & 'it''s \\', 'x')"
    assert run(connection, source).fetchone() is not None
    places = [source.index(mark) + 1 for mark in ("'SELECT", "& ")]
    assert sorted((s, c) for s, _, c in raised) == [("WARNING", f"dfproxy:position={place}") for place in places]
    assert any("('a' ~> 'SELECT $y') & 'it''s \\'" in (m or "") for _, m, _ in raised)


def test_the_extension_is_there(connection: Connection, database: Database) -> None:
    notices: list[str | None] = []
    connection.add_notice_handler(lambda d: notices.append(d.message_primary))
    run(connection, "CREATE EXTENSION IF NOT EXISTS pg_durable")
    assert notices == ["dfproxy provides the surface of pg_durable: there is nothing to install"]
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="can't be dropped"):
        run(connection, "DROP EXTENSION pg_durable CASCADE")


def test_without_the_surface_the_extension_is_an_error(database18: Database) -> None:
    with psycopg.connect(database18.dsn(), autocommit=True) as bare, pytest.raises(psycopg.Error) as caught:
        run(bare, "CREATE EXTENSION pg_durable")
    assert caught.value.diag.sqlstate == "55000"
    assert "dfproxy init" in (caught.value.diag.message_hint or "")


def test_explain_reads_operators(connection: Connection) -> None:
    row = run(connection, "SELECT df.explain('''SELECT 1'' |=> ''a'' ~> ''SELECT 2''')").fetchone()
    assert row is not None
    assert [line.rstrip() for line in row[0].splitlines()] == ["SQL: SELECT 1 |=> 'a'", "→ SQL: SELECT 2"]


def test_a_routine_keeps_its_line_numbers(connection: Connection) -> None:
    source = (
        "CREATE FUNCTION f() RETURNS text LANGUAGE plpgsql AS $$\nDECLARE w text;\nBEGIN\n  w := 'a'\n    ~> 'b'\n"
        "    & 'c';\n  RAISE EXCEPTION 'here';\nEND $$"
    )
    run(connection, source)
    with pytest.raises(psycopg.Error) as caught:
        connection.execute("SELECT f()")
    assert "line 7 at RAISE" in (caught.value.diag.context or "")
