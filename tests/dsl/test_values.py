"""dsl.values and dsl.types: what PostgreSQL prints, as the engine's JSON, for every type."""

from __future__ import annotations

import json
import struct
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsl.types import Kind, TypeCatalog
from dsl.values import (
    Column,
    Number,
    Result,
    ResultKind,
    StaleTypeError,
    compact,
    describe,
    encode_rows,
    json_string,
    parse_json,
)
from tests.dsl.fix_results import TYPES, connect, load, run
from tests.fix_postgres import Database

#: Expression, the JSON text of its value (SURFACE 6.6 and Part I "Values"), the column's type if it isn't what follows ::
VALUES: list[tuple[str, str]] = [
    ("true", "true"), ("false", "false"), ("NULL::integer", "null"),
    ("(-32768)::smallint", "-32768"), ("2147483647", "2147483647"), ("9223372036854775807", "9223372036854775807"),
    ("(-9223372036854775808)::bigint", "-9223372036854775808"),
    ("3.14::float8", "3.14"), ("'NaN'::float8", "null"), ("'Infinity'::float8", "null"), ("'-inf'::float8", "null"),
    ("1e300::float8", "1e+300"), ("5e-324::float8", "5e-324"), ("'-0'::float8", "-0"), ("0.1::float8", "0.1"),
    ("3.14::float4", "3.14"), ("'NaN'::float4", "null"), ("1e-45::float4", "1e-45"), ("16777216::float4", "1.6777216e+07"),
    ("1.50::numeric", '"1.50"'), ("100.00::numeric(10,2)", '"100.00"'), ("'NaN'::numeric", '"NaN"'),
    ("'Infinity'::numeric", '"Infinity"'), ("1e40::numeric", '"1' + "0" * 40 + '"'), ("-0.0010::numeric", '"-0.0010"'),
    ("'a\"b\\c'||chr(10)||chr(1)||'é😀'::text", '"a\\"b\\\\c\\n\\u0001é😀"'), ("''::text", '""'),
    ("'x'::varchar(5)", '"x"'), ("'x'::char(3)", '"x  "'), ("'n'::name", '"n"'), ("'c'::\"char\"", '"c"'),
    ("'untyped'", '"untyped"'),
    ("'\\xDEAD00'::bytea", '"\\\\xdead00"'), ("''::bytea", '"\\\\x"'),
    ("'2024-06-15'::date", '"2024-06-15"'), ("'infinity'::date", '"infinity"'), ("'0044-03-15 BC'::date", '"0044-03-15 BC"'),
    ("'2024-06-15 12:30'::timestamp", '"2024-06-15T12:30:00"'),
    ("'2024-06-15 12:30:00.5'::timestamp", '"2024-06-15T12:30:00.500"'),
    ("'2024-06-15 12:30:00.1234'::timestamp", '"2024-06-15T12:30:00.123400"'),
    ("'2024-06-15 12:30:00.000001'::timestamp", '"2024-06-15T12:30:00.000001"'),
    ("'-infinity'::timestamp", '"-infinity"'),
    ("'2024-06-15 12:30+02'::timestamptz", '"2024-06-15T10:30:00+00:00"'),
    ("'2024-06-15 12:30:00.25+00'::timestamptz", '"2024-06-15T12:30:00.250+00:00"'),
    ("'infinity'::timestamptz", '"infinity"'),
    ("'0044-03-15 12:00+00 BC'::timestamptz", '"0044-03-15T12:00:00+00:00 BC"'),
    ("'12024-06-15 12:00+00'::timestamptz", '"12024-06-15T12:00:00+00:00"'),
    ("'12:30'::time", '"12:30:00"'), ("'12:30+02'::timetz", '"12:30:00+02"'),
    ("'1 year 2 days 03:04:05.5'::interval", '"P1Y2DT3H4M5.5S"'), ("'-1 day'::interval", '"P-1D"'),
    ("'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid", '"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"'),
    ("'{\"b\": 1.10,  \"a\":[1e2]}'::json", '{"b": 1.10,  "a":[1e2]}'), ("'{\"b\":1.10,\"a\":null}'::jsonb", '{"a": null, "b": 1.10}'),
    ("'null'::jsonb", "null"), ("'\"s\"'::jsonb", '"s"'), ("pg_sleep(0)", "null"),
    ("'{}'::int[]", "[]"), ("'{1,NULL,3}'::int[]", "[1,null,3]"), ("'{{1,2},{3,4}}'::int[]", "[[1,2],[3,4]]"),
    ("'[0:1]={7,8}'::int[]", "[7,8]"), ("'[-1:0][2:3]={{1,2},{3,4}}'::int[]", "[[1,2],[3,4]]"),
    ("ARRAY['a','','NULL',NULL,'{x,y}','q\"\\','b c','é']", '["a","","NULL",null,"{x,y}","q\\"\\\\","b c","é"]'),
    ("ARRAY[1.50,NULL]::numeric[]", '["1.50",null]'), ("ARRAY[true,false]", "[true,false]"),
    ("ARRAY['NaN','1.5']::float8[]", "[null,1.5]"),
    ("ARRAY['{\"a\": [1, 2]}','null','\"x\"']::jsonb[]", '[{"a": [1, 2]},null,"x"]'),
    ("ARRAY['2024-06-15 12:30+00']::timestamptz[]", '["2024-06-15T12:30:00+00:00"]'),
    ("ARRAY['(1,2),(0,0)']::box[]", '["(1,2),(0,0)"]'), ("'{(1,2),(0,0);(3,4),(1,1)}'::box[]", '["(1,2),(0,0)","(3,4),(1,1)"]'),
    ("'1 2'::int2vector", '"1 2"'), ("42::oid", '"42"'), ("'pg_class'::regclass", '"pg_class"'),
    ("'[1,5)'::int4range", '"[1,5)"'), ("'{[1,5)}'::int4multirange", '"{[1,5)}"'),
    ("'10.0.0.1/8'::inet", '"10.0.0.1/8"'), ("B'101'", '"101"'), ("'(1,2)'::point", '"(1,2)"'),
    ("ROW(1,'a')", '"(1,a)"'), ("'a b'::tsvector", '"\'a\' \'b\'"'), ("'0/16'::pg_lsn", '"0/16"'),
    # Of users.
    ("'o''k'::mood", '"o\'k"'), ("ARRAY['sad','ha\"ppy','back\\slash']::mood[]", '["sad","ha\\"ppy","back\\\\slash"]'),
    ("5::posint", "5"), ("'{1,2}'::posints", "[1,2]"), ("'[1.5,2]'::floatrange", '"[1.5,2]"'),
    ("ROW()::nothing", "{}"),
    ("""ROW('Main "St", (x)\\',7,'{a,NULL,"b c"}','{"k": [1]}','2024-06-15 12:00+00')::"Odd schema"."Addr ess\"""",
     '{"street":"Main \\"St\\", (x)\\\\","no.":7,"tags":["a",null,"b c"],"extra":{"k": [1]},'
     '"at":"2024-06-15T12:00:00+00:00"}'),
    ('ROW(NULL,NULL,NULL,NULL,NULL)::"Odd schema"."Addr ess"',
     '{"street":null,"no.":null,"tags":null,"extra":null,"at":null}'),
    ("""ROW('',1,'{}','null',NULL)::home""", '{"street":"","no.":1,"tags":[],"extra":null,"at":null}'),
    ("""ROW('Ann',ROW('s',1,NULL,NULL,NULL),ARRAY[ROW('"',2,'{x}','[]',NULL)::"Odd schema"."Addr ess",NULL])::person""",
     '{"name":"Ann","home":{"street":"s","no.":1,"tags":null,"extra":null,"at":null},'
     '"others":[{"street":"\\"","no.":2,"tags":["x"],"extra":[],"at":null},null]}'),
]


def test_every_type_as_json(database: Database) -> None:
    with connect(database.dsn()) as c:
        c.execute(TYPES)
        catalog = TypeCatalog()
        wrong = []
        for expression, expected in VALUES:
            result = run(c, f"SELECT {expression} AS v", catalog)
            json.loads(result.text)
            if result.text != f'{{"rows":[{{"v":{expected}}}],"row_count":1}}':
                wrong.append((expression, expected, result.text))
        assert not wrong


def test_type_names_are_the_servers(database: Database) -> None:
    """Every built-in type and array, as format_type() writes it; nothing that a server has is missing."""
    catalog = TypeCatalog()
    with connect(database.dsn()) as c:
        rows = c.execute("""SELECT t.oid, format_type(t.oid, -1), t.typinput = 'array_in'::regproc, t.typelem, t.typdelim::text,
                                   t.typtype::text
                              FROM pg_type t WHERE t.typnamespace = 'pg_catalog'::regnamespace
                               AND t.typtype IN ('b', 'r', 'm') AND t.typrelid = 0
                               AND NOT EXISTS (SELECT FROM pg_type e WHERE e.oid = t.typelem AND e.typtype = 'c')""").fetchall()
    assert len(rows) > 150
    for oid, name, is_array, element, delimiter, kind in rows:
        info = catalog.get(oid)
        assert info is not None, (oid, name)
        assert catalog.format_type(oid) == name
        assert (info.kind is Kind.ARRAY) == is_array
        if is_array:
            assert info.element == element
        else:
            assert info.delimiter == delimiter
            assert (info.kind is Kind.RANGE) == (kind in "rm")


MODIFIED = ["numeric(10,2)", "numeric(5,0)", "numeric(3,-2)", "numeric(2,5)", "varchar(7)", "char(3)", "char", "bit(3)", "bit varying(9)",
            "time(3)", "timetz(0)", "timestamp(2)", "timestamptz(6)", "interval", "interval(3)", "interval year",
            "interval year to month", "interval day to second(2)", "interval hour to minute", "interval second(1)",
            "numeric(10,2)[]", "varchar(7)[]", "timestamptz(3)[]", "bit(2)[]", "interval day to hour[]"]


def test_modifiers(database: Database) -> None:
    catalog = TypeCatalog()
    with connect(database.dsn()) as c:
        c.execute(f"CREATE TABLE t ({', '.join(f'c{n} {t}' for n, t in enumerate(MODIFIED))})".encode())
        rows = c.execute("""SELECT atttypid, atttypmod, format_type(atttypid, atttypmod) FROM pg_attribute
                             WHERE attrelid = 't'::regclass AND attnum > 0""").fetchall()
        assert len(rows) == len(MODIFIED)
        for oid, modifier, name in rows:
            assert catalog.format_type(oid, modifier) == name
            c.execute(f"SELECT NULL::{catalog.format_type(oid, modifier)}".encode())


def test_user_types_are_written_with_their_schema(database18: Database) -> None:
    with connect(database18.dsn()) as c:
        c.execute(TYPES)
        result = run(c, """SELECT NULL::mood AS a, NULL::mood[] AS b, NULL::"Odd schema"."Addr ess" AS c, NULL::home AS d,
                                  NULL::posints AS e, ROW(1) AS f, NULL::person AS g""")
    assert result.columns is not None
    assert [(column.type, column.shape) for column in result.columns] == [
        ("public.mood", "s"), ("public.mood[]", "as"), ('"Odd schema"."Addr ess"', "c(ssasjs)"),
        ('"Odd schema"."Addr ess"', "c(ssasjs)"), ("public.posint[]", "as"), ("text", "s"),
        ("public.person", "c(sc(ssasjs)ac(ssasjs))")]


def test_one_look_up_brings_all_that_a_type_is_made_of(database18: Database) -> None:
    catalog = TypeCatalog()
    with connect(database18.dsn()) as c:
        c.execute(TYPES)
        (oid,) = c.execute("SELECT 'person[]'::regtype::oid").fetchone() or (0,)
        assert catalog.unknown([oid, 23, oid]) == [oid]
        load(c, catalog, [oid])
        assert catalog.unknown([oid]) == []


def test_a_type_that_is_gone_counts_as_text() -> None:
    catalog = TypeCatalog()
    catalog.load("[]", [99999])
    assert catalog.unknown([99999]) == []
    (column,) = describe([("a", 99999, -1)], catalog)
    assert column == Column("a", 99999, "text")
    assert encode_rows((column,), [[b"x"]], catalog) == '{"rows":[{"a":"x"}],"row_count":1}'


def test_a_composite_that_has_changed(database18: Database) -> None:
    """Noticed, also inside an array, and mended by forgetting and loading again."""
    catalog = TypeCatalog()
    with connect(database18.dsn()) as c:
        c.execute("CREATE TYPE pair AS (a int, b int)")
        statement = "SELECT ARRAY['(1,2)'::pair] AS v"
        assert run(c, statement, catalog).text == '{"rows":[{"v":[{"a":1,"b":2}]}],"row_count":1}'
        for change, statement, expected in [
            ("ALTER TYPE pair ADD ATTRIBUTE c text", "SELECT ARRAY['(1,2,x)'::pair] AS v", '{"a":1,"b":2,"c":"x"}'),
            ("ALTER TYPE pair DROP ATTRIBUTE a", "SELECT ARRAY['(2,x)'::pair] AS v", '{"b":2,"c":"x"}'),
        ]:
            c.execute(change.encode())
            with pytest.raises(StaleTypeError) as caught:
                run(c, statement, catalog)
            catalog.forget(caught.value.oid)
            assert run(c, statement, catalog).text == f'{{"rows":[{{"v":[{expected}]}}],"row_count":1}}'


def test_a_step_that_changes_the_time_zone(database18: Database) -> None:
    """The instant stays right, whatever zone the value was printed in."""
    with connect(database18.dsn()) as c:
        for zone, expected in [("Europe/Berlin", "2024-06-15T10:30:00.250+00:00"),
                               ("Asia/Kolkata", "2024-06-15T10:30:00.250+00:00"),
                               ("<+01>-01:02", "2024-06-15T10:30:00.250+00:00")]:
            c.execute("SELECT set_config('TimeZone', %s, false)", [zone])
            result = run(c, "SELECT '2024-06-15 10:30:00.25+00'::timestamptz AS v")
            assert result.text == f'{{"rows":[{{"v":"{expected}"}}],"row_count":1}}'
        c.execute("SET TimeZone = 'Asia/Kolkata'")
        last = run(c, "SELECT '0001-01-01 00:00:00+00'::timestamptz AS a, '0044-03-15 00:00+00 BC'::timestamptz AS b")
        assert c.execute("SELECT %s::timestamptz = '0044-03-15 00:00+00 BC'", [last.rows[0]["b"]]).fetchone() == (True,)


def test_rows_and_columns(database18: Database) -> None:
    with connect(database18.dsn()) as c:
        assert run(c, "SELECT 1 AS a WHERE false").text == '{"rows":[],"row_count":0}'
        assert run(c, "SELECT FROM generate_series(1,2)").text == '{"rows":[{},{}],"row_count":2}'
        assert run(c, "SELECT 1").text == '{"rows":[{"?column?":1}],"row_count":1}'
        assert run(c, "SELECT g AS \"%s%%\", 'x' AS \"q\"\"\\\" FROM generate_series(1,2) g").text == \
            '{"rows":[{"%s%%":1,"q\\"\\\\":"x"},{"%s%%":2,"q\\"\\\\":"x"}],"row_count":2}'
        assert run(c, "SELECT 1 AS a, 2 AS a, 3 AS b, 4 AS a").text == \
            '{"rows":[{"a":1,"a_2":2,"b":3,"a_3":4}],"row_count":1}'
        assert run(c, "SELECT 1 AS a, 2 AS a, 3 AS a_2, 4 AS a").text == \
            '{"rows":[{"a":1,"a_3":2,"a_2":3,"a_4":4}],"row_count":1}'
        result = run(c, "CREATE TABLE t (id int)")
        assert (result.text, result.columns) == ('{"rows":[],"row_count":0}', ())


def test_columns_survive_the_checkpoint() -> None:
    columns = [Column("a", 23, "integer"), Column("b", 3807, "jsonb[]", "aj")]
    stored = json.loads(json.dumps([column.to_json() for column in columns]))
    assert stored[0] == {"name": "a", "oid": 23, "type": "integer"}
    assert [Column.from_json(item) for item in stored] == columns


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=finite, text=texts, octets=st.binary(max_size=20), array=st.lists(st.none() | texts, max_size=5))
@example(number=-0.0, text="", octets=b"", array=[])
def test_any_values_arrive_as_they_are(database18: Database, number: float, text: str, octets: bytes,
                                       array: list[str | None]) -> None:
    """float8 bit for bit, texts, nested arrays of texts with NULLs, bytes."""
    with connect(database18.dsn()) as c:
        with c.cursor() as cursor:
            cursor.execute("CREATE TEMP TABLE v (n float8, t text, a text[], b bytea)")
            cursor.execute("INSERT INTO v VALUES (%b, %b, %s::text[], %b)", [number, text, array, octets])
        result = run(c, "SELECT * FROM v")
    row = json.loads(result.text, parse_int=float)["rows"][0]  # as an int, -0 would have no sign
    assert struct.pack(">d", row["n"]) == struct.pack(">d", number)
    assert row["t"] == text
    assert row["a"] == array
    assert row["b"] == "\\x" + octets.hex()


def test_many_rows_take_linear_time(database18: Database) -> None:
    """The texts are checked, not the clock: 50,000 rows of the common types."""
    with connect(database18.dsn()) as c:
        result = run(c, "SELECT g AS id, 'row ' || g AS name, g * 1.5 AS n FROM generate_series(1, 50000) g")
    assert len(result.rows) == 50_000
    assert result.rows[-1] == {"id": Number("50000"), "name": "row 50000", "n": "75000.0"}


@pytest.mark.parametrize(("text", "kind"), [
    ('{"rows":[],"row_count":0}', ResultKind.ROWS), ('{"rows":1}', ResultKind.OBJECT), ("{}", ResultKind.OBJECT),
    ("[1]", ResultKind.OTHER), ("1.50", ResultKind.OTHER), ('"x"', ResultKind.OTHER), ("null", ResultKind.OTHER),
    ("true", ResultKind.OTHER), ("not JSON", ResultKind.TEXT), ("", ResultKind.TEXT), ("NaN", ResultKind.TEXT),
    ("{", ResultKind.TEXT)])
def test_kinds_of_results(text: str, kind: ResultKind) -> None:
    assert Result(text).kind is kind


def test_rows_that_are_no_objects_have_no_columns() -> None:
    assert Result('{"rows":[1,{"a":2}]}').rows == [{}, {"a": "2"}]


@pytest.mark.parametrize("text", [
    '{"b":1.50,"a":[1e400,-0,12345678901234567890123456789],"c":"é\\"\\n","d":{},"e":[],"f":[true,false,null]}',
    '"\\ud800"', "0.10"])
def test_compact_text_keeps_digits_and_order(text: str) -> None:
    assert compact(parse_json(text)) == text


def test_compact_drops_only_white_space() -> None:
    assert compact(parse_json('{ "a" : [ 1 , 2 ] }')) == '{"a":[1,2]}'


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(json_values)
def test_compact_is_json(value: Any) -> None:
    text = json.dumps(value)
    again = json.loads(compact(parse_json(text)))
    assert again == value
    assert isinstance(value, float) is isinstance(again, float)


@given(st.text())
def test_json_strings_are_utf_8_and_json(text: str) -> None:
    literal = json_string(text)
    literal.encode()
    assert json.loads(literal) == text


@pytest.mark.parametrize("text", ["NaN", "Infinity", "[-Infinity]", "", "{'a':1}", "01", "[1,]"])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_what_json_has_no_number_for() -> None:
    assert encode_rows([Column("v", 701, "double precision")], [[b"NaN"], [b"-Infinity"]], TypeCatalog()) == \
        '{"rows":[{"v":null},{"v":null}],"row_count":2}'


def test_the_server_really_prints_the_session_settings(database18: Database) -> None:
    """The fixture's session is what encode_rows asks for; otherwise the tests above would prove nothing."""
    with connect(database18.dsn()) as c:
        assert isinstance(c, psycopg.Connection)
        assert c.execute("SHOW IntervalStyle").fetchone() == ("iso_8601",)
        assert c.execute("SHOW TimeZone").fetchone() == ("UTC",)
