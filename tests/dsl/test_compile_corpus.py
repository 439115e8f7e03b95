"""The compiler, case by case: `corpus/*.txt` hold one case a line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsl.compiler import compile_sql, mentions_dsl, might_mention_dsl

CORPUS = Path(__file__).parent / "corpus"


def lines(name: str) -> list[str]:
    text = (CORPUS / name).read_text(encoding="utf-8").splitlines()
    return [line.replace("⏎", "\n") for line in text if line and not line.startswith("#")]


def cases(name: str) -> list[tuple[str, str]]:
    return [(a, b.strip()) for a, _, b in (line.partition(" ==>") for line in lines(name))]


NO_NAME = ' AS "?column?"'


@pytest.mark.parametrize(("source", "expected"), cases("compile.txt"))
def test_compiles(source: str, expected: str) -> None:
    compiled = compile_sql(source)
    assert compiled is not None
    assert compiled.error is None
    assert compiled.warnings == ()
    # Columns keep the name that an operator gives them: that is tested below.
    assert compiled.sql.replace(NO_NAME, "") == expected
    assert mentions_dsl(source.encode())
    assert might_mention_dsl(b"P\0\0\0\x40name\0" + source.encode() + b"\0\0\0S\0\0\0\x04")
    # What was compiled holds nothing that would be compiled again.
    assert compile_sql(compiled.sql) is None


@pytest.mark.parametrize("source", lines("untouched.txt"))
def test_untouched(source: str) -> None:
    assert compile_sql(source) is None


def split_mark(source: str) -> tuple[str, int]:
    position = source.find("¦") + 1
    return source.replace("¦", ""), position


@pytest.mark.parametrize(("marked", "expected"), cases("errors.txt"))
def test_errors(marked: str, expected: str) -> None:
    source, position = split_mark(marked)
    compiled = compile_sql(source)
    assert compiled is not None
    assert compiled.error is not None
    sqlstate, _, message = expected.partition(" ")
    assert compiled.error.sqlstate == sqlstate
    assert compiled.error.message.startswith(message)
    assert compiled.error.position == position
    assert f"dfproxy:position={position}'" in compiled.sql
    assert compiled.source_position(1) == compiled.source_position(99) == position
    assert mentions_dsl(source.encode())


@pytest.mark.parametrize(("marked", "expected"), cases("warnings.txt"))
def test_warnings(marked: str, expected: str) -> None:
    source, position = split_mark(marked)
    compiled = compile_sql(source)
    assert compiled is not None or not expected
    warnings = compiled.warnings if compiled is not None else ()
    if not expected:
        assert warnings == ()
        return
    message, _, hint = expected.partition(" ## ")
    assert warnings[0].message.startswith(message)
    assert hint in warnings[0].hint
    assert warnings[0].position == position
    assert compiled is not None
    assert "duroxide.warning(" in compiled.sql
    assert f", {position})" in compiled.sql


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (b"SELECT 1", False),
        (b"SELECT a & b | c", False),
        (b"SELECT * FROM pdf.pages", False),
        (b"SELECT adf.x", False),
        (b"SELECT df FROM t", False),
        (b"SELECT data @> '{}' FROM t WHERE (a) @> b AND f(x)@>y AND x[1] @> z AND \"q\" @> '1' AND c1 @> c2", False),
        (b"SELECT brand @> 'x', randall\n@> y", False),
        (b"", False),
        (b"SELECT df.start('x')", True),
        (b"select DF . start('x')", True),
        (b'select "df"."start"(1)', True),
        (b"select x from df.instances", True),
        (b"SELECT 'a'~>'b'", True),
        (b"SELECT @> 'b'", True),
        (b"select\n@> 'b'", True),
        (b"@> 'b'", True),
        (b"SELECT f(@> 'b')", True),
        (b"SELECT /* x */ @> 'b'", True),
        (b"x := @> 'b'", True),
        (b"CREATE EXTENSION PG_Durable", True),
        ("SELECT 'ä' ~> 'ö'".encode("latin-1"), True),
    ],
)
def test_byte_search(statement: bytes, expected: bool) -> None:
    assert mentions_dsl(statement) is expected


def test_extension_is_a_notice() -> None:
    source = "SELECT 1;\nCREATE EXTENSION IF NOT EXISTS\n pg_durable\n WITH SCHEMA public CASCADE;\nSELECT df.start('a' ~> 'b')"
    compiled = compile_sql(source)
    assert compiled is not None
    assert compiled.sql.startswith("SELECT 1;\nDO $dfproxy$ BEGIN IF")
    assert compiled.sql.endswith("END $dfproxy$\n\n;\nSELECT df.start(df.seq('a', 'b'))")
    assert compiled.sql.count("\n") == source.count("\n")


def test_error_keeps_the_parameters() -> None:
    compiled = compile_sql("SELECT df.start($3 ~> , $1)")
    assert compiled is not None
    assert compiled.sql == (
        "SELECT duroxide.error('42601', 'nothing stands on the right of \"~>\"', NULL, NULL, 20), "
        "$1::text, $2::text, $3::text"
    )


def test_error_text_fits_its_quotes() -> None:
    compiled = compile_sql("SELECT df.as('a', '$dfproxy$ '' \\'), $dfproxy1$x$dfproxy1$")
    assert compiled is not None
    assert compiled.sql.startswith("DO $dfproxy2$ BEGIN RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE =  E'df.as: ")
    assert "$dfproxy$ '' \\\\''" in compiled.sql


def test_backslashes_without_conforming_strings() -> None:
    source = r"SELECT df.start('a\'' ~> 'b')"
    compiled = compile_sql(source, standard_conforming_strings=False)
    assert compiled is not None
    assert compiled.sql == r"SELECT df.start(df.seq('a\'', 'b'))"
    assert compile_sql(source) is None  # here the literal does not end
    compiled = compile_sql(r"DO 'BEGIN PERFORM \'a\' ~> ''b''; END'", standard_conforming_strings=False)
    assert compiled is not None
    assert compiled.sql == r"DO 'BEGIN PERFORM df.seq(\'a\', ''b''); END'"


#: `«` marks where the name that PostgreSQL gives to the column of an operator has to be said.
@pytest.mark.parametrize("source", [
    "SELECT 'a' ~> 'b'«",
    "SELECT ALL 'a' ~> 'b'«, DISTINCT_ON, 'c' ~> 'd'« FROM t",
    "SELECT DISTINCT 'a' ~> 'b'« UNION SELECT 'c' ~> 'd'« INTERSECT SELECT 'e' ~> 'f'« ORDER BY 'g' ~> 'h', 'i' ~> 'j'",
    "SELECT @> 'a'«, ('a' ~> 'b')«, (('a' ~> 'b'))«, 'a' ~> 'b' || 'c'«",
    "SELECT 'a' ~> 'b' AS x, 'a' ~> 'b' x, 'a' ~> 'b' \"x\", 1 AS y",
    "SELECT 'a' ~> 'b' = 'c', NOT 'a' ~> 'b' = 'c', ('a' ~> 'b')::text, upper('a' ~> 'b'), 'a' ~> 'b' IS NULL",
    "SELECT df.start('a' ~> 'b'), df.seq('a', 'b'), df.seq('a' ~> 'b', 'c') || 'd'",
    "SELECT (SELECT 'a' ~> 'b'«), ARRAY(SELECT 'a' ~> 'b'« FROM t), EXISTS (SELECT 'a' ~> 'b'« WHERE true)",
    "SELECT CASE WHEN true THEN 'a' ~> 'b' END, row('a' ~> 'b', 1), ('a' ~> 'b', 1)",
    "SELECT count(*) FROM t, LATERAL f('a' ~> 'b'), u GROUP BY 'a' ~> 'b', 'c' ~> 'd'",
    "INSERT INTO t (a, b) VALUES ('a' ~> 'b', 'c' ~> 'd') RETURNING id, 'e' ~> 'f'«",
    "INSERT INTO t SELECT 'a' ~> 'b'« ON CONFLICT DO NOTHING",
    "UPDATE t SET a = 'a' ~> 'b', b = 'c' ~> 'd' RETURNING 'e' ~> 'f'«;",
    "WITH w AS (SELECT 'a' ~> 'b'«) SELECT * FROM w LIMIT 1",
    "CREATE TABLE t AS SELECT 'a' ~> 'b'« WITH NO DATA; VALUES ('a' ~> 'b', 'c' ~> 'd')",
    "DO $$ BEGIN FOR r IN SELECT 'a' ~> 'b'« LOOP RAISE NOTICE '%', 'a' ~> 'b'; END LOOP; END $$",
    "DO $$ BEGIN SELECT 'a' ~> 'b'« INTO x; y := 'a' ~> 'b'; PERFORM 1, 'a' ~> 'b'; RETURN QUERY SELECT 'a' ~> 'b'«; END $$",
    "DO $$ BEGIN IF EXISTS (SELECT 1) THEN RAISE NOTICE '%', 'a' ~> 'b'; END IF; END $$",
    "CREATE FUNCTION f() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT 'a' ~> 'b'«; END",
])
def test_columns_keep_their_names(source: str) -> None:
    compiled = compile_sql(source.replace("«", ""))
    assert compiled is not None
    assert compiled.error is None
    marked = [re.findall(r"(?<!')'\w'(?!')|«", text) for text in (source, compiled.sql.replace(NO_NAME, "«"))]
    # The quotes that texts of warnings hold are doubled, which leaves them out.
    assert marked[0] == marked[1]
