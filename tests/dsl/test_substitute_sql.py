"""Substituted statements run on real servers: what is inserted is the value, in every type and every place."""

from __future__ import annotations

import datetime
import ipaddress
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


def hexes(size: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=size, max_size=size).map(bytes.hex)


def ranged(bounds: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """A range's text from two bounds in either order, of every kind of bound."""
    return st.builds(lambda a, b, left, right: f"{left}{min(a, b)},{max(a, b)}{right}" if left != "x" else "empty",
                     bounds, bounds, st.sampled_from("[(x"), st.sampled_from("])"))


PLAIN_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | NASTY
INTEGERS = {"smallint": 16, "integer": 32, "bigint": 64}
FLOATS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
DATES = st.dates()
TIMES = st.times().map(str)
STAMPS = st.datetimes(min_value=datetime.datetime(1, 1, 2)).map(str) | st.sampled_from(["infinity", "-infinity", "0044-03-15 12:00 BC", "12024-06-15 12:00"])
OFFSETS = st.sampled_from(["", "+00", "-11:30", "+14"])
NUMERICS = st.decimals(allow_nan=False, allow_infinity=False).filter(lambda d: abs(d.adjusted()) < 200).map(lambda d: f"{d:f}") | st.sampled_from(["NaN", "Infinity", "-0.00"])
JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN_TEXT.filter(lambda t: t.isprintable()),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN_TEXT.filter(str.isprintable), inner, max_size=3), max_leaves=5)
#: Type -> texts that its input function takes: every built-in type of SURFACE 6.6 and Part I "Values".
TYPED: dict[str, st.SearchStrategy[str]] = {
    "boolean": st.sampled_from(["true", "false"]),
    **{name: st.integers(-2**(bits - 1), 2**(bits - 1) - 1).map(str) for name, bits in INTEGERS.items()},
    "real": st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False).map(repr), "double precision": FLOATS.map(repr),
    "numeric": NUMERICS, "numeric(12,3)": st.decimals(-10**8, 10**8, places=3).map(str), "money": st.integers(-10**15, 10**15).map(lambda n: f"{n / 100:.2f}"),
    "text": PLAIN_TEXT, "character varying": PLAIN_TEXT, "character varying(30)": PLAIN_TEXT.map(lambda t: t[:30]), "character(8)": PLAIN_TEXT.map(lambda t: t[:8]),
    "name": PLAIN_TEXT.map(lambda t: t[:15]), '"char"': st.characters(min_codepoint=33, max_codepoint=126), "bytea": st.binary(max_size=20).map(lambda b: "\\x" + b.hex()),
    "uuid": st.uuids().map(str), "date": DATES.map(str) | st.sampled_from(["infinity", "-infinity", "0044-03-15 BC"]),
    "time": TIMES, "time with time zone": st.builds("{}{}".format, TIMES, OFFSETS), "timestamp": STAMPS, "timestamp(3)": STAMPS,
    "timestamp with time zone": STAMPS.map(lambda t: t if "inf" in t else t.replace(" BC", "+02 BC") if "BC" in t else t + "+02"),
    "interval": st.builds("{} months {} days {} s".format, st.integers(-1200, 1200), st.integers(-999, 999), st.decimals(-10**6, 10**6, places=6)),
    "jsonb": JSON_VALUES.filter(lambda v: v is not None).map(json.dumps), "inet": st.ip_addresses().map(str), "cidr": st.ip_addresses().map(lambda a: str(ipaddress.ip_network(a))),
    "macaddr": hexes(6), "macaddr8": hexes(8), "bit(5)": st.text("01", min_size=5, max_size=5), "bit varying": st.text("01", max_size=9),
    "int4range": ranged(st.integers(-10**6, 10**6)), "numrange": ranged(st.decimals(-10**6, 10**6, places=2)), "daterange": ranged(DATES),
    "tstzrange": ranged(st.datetimes(min_value=datetime.datetime(1, 1, 2)).map(str)), "int8multirange": ranged(st.integers(-10**9, 10**9)).map("{{{}}}".format),
    "oid": st.integers(0, 2**32 - 1).map(str), "pg_lsn": st.builds("{:X}/{:X}".format, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    "regclass": st.sampled_from(["pg_class", "information_schema.tables"]), "regtype": st.sampled_from(["integer", "text[]"]), "xid8": st.integers(0, 2**63).map(str),
    "tsvector": st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(" ".join), "jsonpath": st.sampled_from(["$.a[*]", '$."x y" ? (@ > 1)']),
    "point": st.builds("({!r},{!r})".format, FLOATS, FLOATS), "circle": st.builds("<({},{}),{}>".format, st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 9)),
}
ARRAYS = ["integer", "text", "numeric", "timestamp with time zone", "uuid", "jsonb", "date", "boolean", "inet", "interval", "bytea", "double precision"]


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[str, str]:
    """A type, and an expression of it."""
    name = draw(st.sampled_from([*TYPED, *(f"{t}[]" for t in ARRAYS)]))
    quote = psycopg.sql.quote
    if not name.endswith("[]"):
        return name, f"{quote(draw(TYPED[name]))}::{name}"
    items = draw(st.lists(st.none() | TYPED[name[:-2]], max_size=4))
    return name, f"ARRAY[{', '.join('NULL' if i is None else f'{quote(i)}::{name[:-2]}' for i in items)}]::{name}"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(typed_values(), min_size=1, max_size=12))
@example([("double precision", "'-0'::double precision"), ("real", "'-0'::real"), ("integer", "(-2147483648)::integer"), ("money", "'-1.50'::money")])
def test_a_substituted_literal_is_the_value_for_every_type(session: psycopg.Connection[Any], values: list[tuple[str, str]]) -> None:
    """As an operand, within a literal that is cast, and in a row set: the same text and the same type."""
    expressions = [e for _, e in values]
    n = run(session, "SELECT " + ", ".join(f"{e} AS c{i}" for i, e in enumerate(expressions)))
    expected = one(session, "SELECT " + ", ".join(f"({e})::text, pg_typeof({e})::text" for e in expressions))
    operands = one(session, fill("SELECT " + ", ".join(f"($n.c{i})::text, pg_typeof($n.c{i})::text" for i in range(len(values))), n=n))
    assert tuple("text" if t == "unknown" else t for t in operands) == tuple("text" if t == "character varying" else t for t in expected)
    assert one(session, fill("SELECT " + ", ".join(f"('$n.c{i}'::{t})::text" for i, (t, _) in enumerate(values)), n=n)) == expected[::2]
    listed = one(session, fill("SELECT " + ", ".join(f"c{i}::text, pg_typeof(c{i})::text" for i in range(len(values))) + " FROM $n.*", n=n))
    assert listed == expected
