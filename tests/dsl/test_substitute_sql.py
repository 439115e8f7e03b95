"""Substituted statements run on real servers: what is inserted is the value, in every type and every place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsl.substitute import substitute_sql
from dsl.values import Result, TypeCatalog
from tests.dsl.fix_results import TYPES, connect, run
from tests.dsl.test_values import VALUES
from tests.fix_postgres import Database

#: What the engine's JSON does not keep, and so references neither: floats that are no numbers, the JSON null, white
#: space in json, lower bounds of arrays.
LOSSY = re.compile(r"[Ny]'::float|'-inf'::float8|'NaN','1.5'|^NULL|'null'|pg_sleep|::json$|\]=\{")
ROUND_TRIPS = [expression for expression, _ in VALUES if not LOSSY.search(expression)]


def fill(text: str, **results: Result) -> str:
    return substitute_sql(text, variables={}, instance_id="0a1b2c3d", label=None, results=results)


def one(connection: psycopg.Connection[Any], statement: str) -> tuple[Any, ...]:
    with psycopg.ClientCursor(connection) as cursor:
        row = cursor.execute(statement.encode()).fetchone()
    assert row is not None
    return row


def test_every_value_comes_back_as_it_was(database: Database) -> None:
    """As an operand, in a literal that is cast, in a row set, in ANY and IN; with its type."""
    assert len(ROUND_TRIPS) > 75
    wrong = []
    with connect(database.dsn()) as c:
        c.execute(TYPES)
        catalog = TypeCatalog()
        for expression in ROUND_TRIPS:
            n = run(c, f"SELECT {expression} AS v UNION ALL SELECT NULL", catalog)
            (name,) = one(c, f"SELECT pg_typeof({expression})::text")
            text, kind = one(c, fill("SELECT ($n.v)::text, pg_typeof($n.v)::text", n=n))
            quoted, = one(c, fill(f"SELECT ('$n.v'::{(n.columns or ())[0].type})::text", n=n))
            listed = one(c, fill("SELECT v::text, pg_typeof(v)::text, count(*) OVER () FROM $n.*", n=n))
            expected, = one(c, f"SELECT ({expression})::text")
            base = re.sub(r"^(posint|home|posints)$", lambda m: {"posint": "integer", "home": '"Odd schema"."Addr ess"',
                                                                 "posints": "posint[]"}[m[0]], name)
            if text != expected or quoted != expected or listed != (expected, "text" if base in ("unknown", "record") else base, 2) \
                    or kind != ("unknown" if base in ("text", "character varying", "unknown", "record") else base):
                wrong.append((expression, name, text, kind, quoted, listed))
        assert not wrong


def test_columns_as_lists(database: Database) -> None:
    """ANY and IN find the value in its column, for each type that can be compared."""
    found = 0
    with connect(database.dsn()) as c:
        c.execute(TYPES)
        catalog = TypeCatalog()
        for expression in ROUND_TRIPS:
            if re.search(r"::(json|point|box|box\[\]|nothing|person)$|^ROW\(1|^ROW\(.*addr ess", expression, re.I):
                continue  # no equality, or no input
            n = run(c, f"SELECT {expression} AS v UNION ALL SELECT NULL", catalog)
            e = Result('{"rows":[],"row_count":0}', n.columns)
            shape = (n.columns or ())[0].shape
            if shape.startswith(("a", "b")):  # ANY looks at elements
                statement = f"SELECT bool_and(x = ANY($n)), bool_or(x <> ALL($n)) FROM unnest({expression}) x WHERE x IS NOT NULL"
                assert one(c, fill(statement, n=n))[0] in (True, None), expression
            else:
                statement = f"SELECT ({expression}) = ANY($n), ({expression}) <> ALL($n.v), ({expression}) = ANY($e)"
                assert one(c, fill(statement, n=n, e=e)) == (True, False, False), expression
            statement = f"SELECT ({expression}) IN ($n), ({expression}) IN ($e), ({expression}) NOT IN ($e.v)"
            assert one(c, fill(statement, n=n, e=e)) == (True, False, True), expression
            found += 1
    assert found > 60


def test_empty_and_wide_row_sets(database18: Database) -> None:
    with connect(database18.dsn()) as c:
        c.execute(TYPES)
        e = run(c, "SELECT 1 AS id, 'sad'::mood AS \"a b\", now() AS t, NULL::numeric(5,2)[] AS l WHERE false")
        c.execute(fill("CREATE TABLE copied AS SELECT * FROM $e.*", e=e).encode())
        assert c.execute("SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
                         "WHERE attrelid = 'copied'::regclass AND attnum > 0 ORDER BY attnum").fetchall() == [
            ("id", "integer"), ("a b", "mood"), ("t", "timestamp with time zone"), ("l", "numeric(5,2)[]")]
        w = run(c, "SELECT g AS id, (g - 5)::smallint AS s, g::bigint * 1000000000000 - 5000000000000 AS b, NULLIF(g, 1) * 1.5::float4 AS f, "
                   "NULLIF('n' || g, 'n1') AS t, (g % 2 = 0) AS o, now() - g * interval '1 day' AS i FROM generate_series(1, 10) g")
        c.execute(fill("CREATE TABLE full_set AS SELECT * FROM $w.*", w=w).encode())
        again = run(c, "SELECT * FROM full_set")
        assert again.text == w.text
        assert [column.type for column in again.columns or ()] == [column.type for column in w.columns or ()]
        z = run(c, "SELECT FROM generate_series(1, 3)")
        assert one(c, fill("SELECT count(*) FROM $z.*", z=z)) == (3,)
        d = run(c, "CREATE TABLE d ()")
        assert one(c, fill("SELECT count(*) FROM $d.*", d=d)) == (0,)


def test_it_does_what_the_readme_says(database18: Database) -> None:
    with connect(database18.dsn()) as c:
        c.execute("CREATE TABLE documents (id int PRIMARY KEY, processed bool DEFAULT false)")
        c.execute("INSERT INTO documents SELECT generate_series(1, 5)")
        batch = run(c, "SELECT id FROM documents WHERE id > 1 ORDER BY id LIMIT 3")
        for statement, expected in [
            ("UPDATE documents SET processed = true WHERE id IN (SELECT id FROM $batch.*) RETURNING id", [2, 3, 4]),
            ("UPDATE documents SET processed = true WHERE id = ANY($batch) RETURNING id", [2, 3, 4]),
            ("DELETE FROM documents WHERE id IN ($batch.id) RETURNING id", [2, 3, 4]),
            ("DELETE FROM documents WHERE id = $batch - 1 RETURNING id", [1]),
        ]:
            with c.cursor() as cursor:
                assert sorted(row[0] for row in cursor.execute(fill(statement, batch=batch).encode()).fetchall()) == expected


def test_utility_statements_take_bare_constants(database18: Database) -> None:
    with connect(database18.dsn()) as c:
        n = run(c, "SELECT 7::bigint AS big, -2::bigint AS minus, '2030-01-01'::timestamptz AS at")
        c.execute("CREATE SEQUENCE s MINVALUE -100 MAXVALUE 100")
        c.execute("CREATE TABLE t (id int)")
        for statement in ["ALTER SEQUENCE s RESTART WITH $n.big", "ALTER SEQUENCE s INCREMENT BY $n.minus",
                          "CREATE SEQUENCE s2 START $n.big", "SET statement_timeout = $n.big", "SET work_mem = '$n.big MB'",
                          "ALTER TABLE t ALTER id SET DEFAULT $n.minus", "RESET statement_timeout",
                          "SELECT 1 FETCH FIRST $n.big ROWS ONLY", "SELECT 1 OFFSET $n.big ROWS", "SELECT 1 LIMIT $n.big OFFSET $n.big"]:
            c.execute(fill(statement, n=n).encode())
        assert one(c, "SELECT nextval('s'), nextval('s'), nextval('s2')") == (7, 5, 7)


@pytest.fixture(scope="module")
def session(cluster18: Any) -> Iterator[psycopg.Connection[Any]]:
    with connect(cluster18.dsn()) as c:
        yield c


NASTY = st.lists(st.sampled_from(["'", "''", "\\", "\\'", '"', "$$", "$df0$", "$a$", "--", "/*", "*/", "\n", ";", "x", "E'", "é", "$v", "{v}", "%", "\t", "\x01"]),
                 max_size=10).map("".join) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=NASTY)
@example("\\'; DROP TABLE x --")
@example("$$; DROP TABLE x --")
@example("$df0$df1$$")
def test_texts_survive_every_place(session: psycopg.Connection[Any], value: str) -> None:
    """No value gets out of its quotes, whichever they are."""
    v = Result(json.dumps({"rows": [{"t": value}], "row_count": 1}), None)
    typed = run(session, "SELECT ''::text AS t")
    for result in (v, Result(v.text, typed.columns)):
        assert one(session, fill("SELECT $v.t, '$v.t', E'$v.t', 'a''$v.t', E'\\'$v', U&'$v.t' -- $v.t", v=result)) == \
            (value, value, value, "a'" + value, "'" + value, value)
        assert one(session, fill("SELECT /* $v */ \"$v\" FROM (SELECT $v.t AS \"$v\") x", v=result)) == (value,)
        assert one(session, fill("SELECT $v IN ($v), $v = ANY($v.t), $v = (SELECT t FROM $v.*), $v::text", v=result)) == (True, True, True, value)
        for tag in ("$$", "$a$", "$df0$"):
            session.execute(fill(f"DO {tag} BEGIN PERFORM set_config('t.a', $v, false), set_config('t.b', '[$v.t]', false); "
                                 f"EXECUTE $b$ SELECT set_config('t.c', $v, false) $b$; END {tag}", v=result).encode())
            assert one(session, "SELECT current_setting('t.a'), current_setting('t.b'), current_setting('t.c')") == (value, f"[{value}]", value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.none() | NASTY, min_size=1, max_size=5))
def test_lists_of_texts_survive(session: psycopg.Connection[Any], values: list[str | None]) -> None:
    n = Result(json.dumps({"rows": [{"t": value} for value in values], "row_count": len(values)}), run(session, "SELECT ''::text AS t").columns)
    a = Result(json.dumps({"rows": [{"a": values}], "row_count": 1}), run(session, "SELECT '{}'::text[] AS a").columns)
    rows = session.execute(fill("SELECT t FROM $n.*", n=n).encode()).fetchall()
    assert [row[0] for row in rows] == values
    assert one(session, fill("SELECT $a, '$a.a'::text[]", a=a)) == (values, values)
    for value in values:
        if value is not None:
            wanted = Result(json.dumps({"rows": [{"t": value}], "row_count": 1}))
            assert one(session, fill("SELECT $w = ANY($n), $w IN ($n.t), $w = ANY($a)", n=n, a=a, w=wanted)) == (True, True, True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(-2**63, 2**63 - 1), real=st.floats(allow_nan=False, allow_infinity=False),
       decimal=st.decimals(allow_nan=False, allow_infinity=False, places=5, min_value=-10**12, max_value=10**12))
def test_numbers_survive(session: psycopg.Connection[Any], number: int, real: float, decimal: Any) -> None:
    n = run(session, f"SELECT '{number}'::bigint AS b, '{real!r}'::float8 AS r, '{decimal}'::numeric AS d")
    assert one(session, fill("SELECT $n.b, $n.r, $n.d, 0-$n.r, 1 - -$n.d", n=n)) == (number, real, decimal, -real, 1 + decimal)
    assert one(session, fill("SELECT b, r, d FROM $n.*", n=n)) == (number, real, decimal)
    assert one(session, fill("SELECT '$n.b'::bigint, '$n.r'::float8, '$n.d'::numeric", n=n)) == (number, real, decimal)
