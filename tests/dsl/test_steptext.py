"""Doubts about the text of steps: found where they are due, and never where PostgreSQL's own grammar has none."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from dsl import steptext
from dsl.compiler import MAX_DOUBTS, compile_sql
from tests.fix_postgres import Database

CORPUS = Path(__file__).parent.parent / "differential" / "corpus"

WRONG = {
    "SELEC 1": 'no statement begins with "SELEC"',
    "my_function": 'no statement begins with "my_function"',
    "SELECT 'a": "a quote or a comment in it is not closed",
    "SELECT (1": 'a "(" in it is not closed',
    "SELECT 1)": 'a ")" in it closes nothing',
    "SELECT FROM WHERE": 'it seems to be wrong near "WHERE"',
    "SELECT * FROM t WHERE": "it seems to be",
    "UPDATE SET x = 1": "it seems to be",
    "DELETE t WHERE id = $n AND": "it seems to be",
    "INSERT INTO t (a, b VALUES (1, 2)": 'a "(" in it is not closed',
}
RIGHT = [
    "", "  ", "VACUUM (ANALYZE) t", "NOTIFY c, 'x'", "DO $$ BEGIN END $$", "CALL p(1)", "(SELECT 1)", "TABLE t", "VALUES (1)",
    "SELECT", "SELECT FROM t", "SELECT * FROM $batch.*", "UPDATE t SET a = $n.x WHERE id = ANY($batch) AND b IN ($c.d)",
    "SELECT 'Hello $user.name', E'\\'$x', $$ $y $$", "SELECT $a?, $b.c?, $b.\"any column\"", "-- note\nSELECT 1 /* ( */",
    "$batch.done", " $n? ", "SELECT {columns} FORM {table}", "SELEKT {x}", "WITH a AS (SELECT 1) UPDATE t SET x = 1 FROM a RETURNING *;",
    "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = EXCLUDED.b WHERE t.b IS DISTINCT FROM EXCLUDED.b",
    "INSERT INTO t (a) SELECT x FROM u CROSS JOIN f(1) p ON CONFLICT (a) DO NOTHING",
    "INSERT INTO t SELECT * FROM u NATURAL JOIN v ON CONFLICT (a) DO UPDATE SET b = 1",
    "SELECT count(*) FILTER (WHERE x), array_agg(a ORDER BY b) FROM t GROUP BY ROLLUP (c) FOR UPDATE SKIP LOCKED",
    "SELECT x::int[], (y).z, a->>'b', c @> '{}' FROM t, LATERAL jsonb_each(d) AS e(k, v) WHERE NOT EXISTS (SELECT FROM u)",
    "SELECT '" + "x" * 5000 + "' FORM", "SELECT " + "(" * 500 + "1" + ")" * 500,
]


@pytest.mark.parametrize("text", WRONG)
def test_doubts(text: str) -> None:
    assert (steptext.fault(text) or "").startswith(WRONG[text])


@pytest.mark.parametrize("text", RIGHT, ids=lambda t: t[:40])
def test_no_doubts(text: str) -> None:
    assert steptext.fault(text) is None


def statements() -> list[str]:
    """What other tests send to PostgreSQL, and the steps of the documentation."""
    found = [s.strip() for path in sorted(CORPUS.glob("*.sql")) for s in re.split(r"\n\s*\n", re.sub(r"(?m)^##.*$", "", path.read_text()))]
    return [s for s in found if s]


def test_what_postgresql_can_parse_is_not_doubted(database18: Database) -> None:
    """PL/pgSQL checks the grammar of the statements in a block without running them."""
    doubted = []
    parsed = 0
    with psycopg.connect(database18.dsn(), autocommit=True) as c:
        for statement in statements():
            if ";" in statement or steptext.fault(statement) is None:
                continue
            try:
                c.execute(sql.SQL("DO {}").format(sql.Literal(f"BEGIN RETURN; EXECUTE 'x'; {statement}; END")))
            except (psycopg.errors.SyntaxError, psycopg.errors.UndefinedObject):
                continue
            except psycopg.Error:
                pass
            doubted.append(statement)
        parsed = sum(steptext.fault(s) is None for s in statements())
    assert doubted == []
    assert parsed > 200


def test_what_postgresql_wrote_itself_is_not_doubted(database: Database) -> None:
    """Its views, and the bodies of its SQL functions."""
    with psycopg.connect(database.dsn()) as c:
        c.execute("SET search_path = ''")
        texts = [r[0] for r in c.execute("""
            SELECT pg_get_viewdef(oid) FROM pg_class WHERE relkind = 'v' UNION ALL
            SELECT prosrc FROM pg_proc p JOIN pg_language l ON l.oid = prolang WHERE lanname = 'sql' AND prosrc <> ''""")]
    assert len(texts) > 100
    assert {t: steptext.fault(t) for t in texts if steptext.fault(t)} == {}


@pytest.mark.parametrize(("source", "steps"), [
    ("SELECT df.start(¦'SELEC 1')", 1),
    ("SELECT df.start('SELECT 1' ~> ¦'SELEC 2' |=> 'x')", 1),
    ("SELECT df.start(df.if('SELECT true', df.sql(¦'SELEC 1'), @> (¦'SELEC 2' & 'SELECT 3')))", 2),
    ("SELECT df.start(df.seq(VARIADIC ARRAY['SELEC 1']))", 0),
    ("SELECT df.start('SELEC ' || x ~> 'SELECT ' || y)", 0),
    ("SELECT df.start(CASE WHEN x THEN 'SELEC' ELSE 'a' END ~> $1)", 0),
    ("SELECT df.start('{\"node_type\":\"SQL\"}' ~> 'SELECT df.start(''a'' ~> ''b'')')", 0),
    ("SELECT df.start('SELECT 1', 'SELEC')", 0),
    ("SELECT df.seq('SELEC 1', 'SELEC 2')", 0),
    ("SELECT df.start('SELEC 1' ~> 5)", 0),
    ("SELECT df.start(" + " ~> ".join(["¦'SELEC 1'"] * 3 + ["'SELEC 1'"] * 5) + ")", MAX_DOUBTS),
])
def test_where_the_compiler_warns(source: str, steps: int) -> None:
    plain = source.replace("¦", "")
    places = [m.start() - i + 1 for i, m in enumerate(re.finditer("¦", source))]
    compiled = compile_sql(plain)
    warnings = [] if compiled is None else [w for w in compiled.warnings if "does not look like" in w.message]
    assert [w.position for w in warnings] == places
    assert len(places) == steps


def test_the_shape_is_remembered_and_not_the_values() -> None:
    steptext._fault.cache_clear()
    for n in range(100):
        assert steptext.fault(f"UPDATE orders SET note = 'no. {n}' WHERE id = {n}") is None
    assert steptext._fault.cache_info().misses == 1
