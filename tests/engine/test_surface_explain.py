"""df.explain: the layout of SURFACE 9.6, to the letter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.fix_surface import Connection, Player, completed, decided, done, failed, refused, value

Begin = Callable[[str], str]

DRY = """\
SQL: SELECT 1 |=> 'a'
→ IF
    ? condition:
      └─SQL: SELECT $a > 0
    ✓ then:
      └─SQL: SELECT 10
      → SQL: SELECT 11
    ✗ else:
      └─SLEEP 5s
→ JOIN (2)
    ║ branch 1:
      ├─LOOP (infinite)
      │   ↻ body:
      │     └─WAIT '*/5 * * * *'
      │     → BREAK 'done'
    ║ branch 2:
      └─SIGNAL 'go' (30s)"""
WORKFLOW = """
df.seq(df.seq(df.as('SELECT 1', 'a'), df.if('SELECT $a > 0', df.seq('SELECT 10', 'SELECT 11'), df.sleep(5))),
       df.join(df.loop(df.seq(df.wait_for_schedule('*/5 * * * *'), df.break('done'))), df.wait_for_signal('go', 30)))
"""


def lines(text: str) -> list[str]:
    return [line.rstrip(" ") for line in text.split("\n")]


def test_the_example_of_a_dry_run(df: Connection) -> None:
    text = value(df, f"SELECT df.explain({WORKFLOW})")
    assert lines(text) == DRY.split("\n")
    width = max(len(line) for line in DRY.split("\n")) + 4
    assert {len(line) for line in text.split("\n")} == {width}


def test_an_expression_is_evaluated_and_nothing_is_started(df: Connection) -> None:
    assert lines(value(df, "SELECT df.explain(%s)", WORKFLOW)) == DRY.split("\n")
    assert value(df, "SELECT count(*) FROM duroxide.instances") == 0


def test_the_example_of_a_live_view(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.race('SELECT 1', df.sleep(30)), 'my-label'")
    output = '{"rows":[{"answer":42}],"row_count":1}'
    player.checkpoint(instance, done(1, output), decided(0, "1"), finish=completed(output))
    assert lines(value(df, "SELECT df.explain(%s)", f" {instance.upper()}\n")) == [
        f"Instance: {instance} (my-label)",
        "Status:   ✓ Completed",
        'Output:   {"rows":[{"answer":42}],"row_count":1}',
        "",
        "RACE ✓",
        "    ║ branch 1:",
        "      ├─SQL: SELECT 1 ✓",
        "    ║ branch 2:",
        "      └─SLEEP 30s ⊘",
    ]


def test_live_states(df: Connection, player: Player) -> None:
    instance = value(df, "SELECT df.start(df.seq('a', df.seq('b', 'c')))")

    def now() -> list[str]:
        return lines(value(df, "SELECT df.explain(%s)", instance))

    assert now() == [f"Instance: {instance}", "Status:   ○ pending", "", "SQL: a ○", "→ SQL: b ○", "→ SQL: c ○"]
    player.claim()
    player.checkpoint(instance, done(1))
    assert now() == [f"Instance: {instance}", "Status:   ⏳ Running", "", "SQL: a ✓", "→ SQL: b ⏳", "→ SQL: c ○"]
    with df.transaction(force_rollback=True):
        df.execute("SELECT df.cancel(%s, 'no')", (instance,))
        assert now() == [f"Instance: {instance}", "Status:   ✗ Failed", "Output:   canceled: no", "", "SQL: a ✓", "→ SQL: b ✗", "→ SQL: c ⊘"]
    message = "ä" * 70
    player.checkpoint(instance, failed(3, message), finish={"status": "failed", "output": message})
    assert now() == [f"Instance: {instance}", "Status:   ✗ Failed", "Output:   " + "ä" * 57 + "...", "", "SQL: a ✓", "→ SQL: b ✗",
                     "→ SQL: c ⊘"]


NODES = {
    "df.sql('SELECT ' || repeat('é', 44))": "SQL: SELECT " + "é" * 40 + "...",
    "df.sql('SELECT ' || repeat('é', 43))": "SQL: SELECT " + "é" * 43,
    "df.sql(E'SELECT 1\\n  FROM t')": "SQL: SELECT 1\n  FROM t",
    "df.wait_for_signal('go')": "SIGNAL 'go'",
    "df.wait_for_schedule('@daily', 'UTC')": "WAIT '@daily' (UTC)",
    "df.http('https://a.example/' || repeat('x', 40), 'get')": "HTTP GET https://a.example/" + "x" * 19 + "...",
    "df.http('https://a.example/')": "HTTP POST https://a.example/",
    "df.http_multipart('https://a.example/', 'put', '[{}]')": "HTTP_MULTIPART PUT https://a.example/",
    "df.break()": "BREAK",
    "df.break('a long value, a long value')": "BREAK 'a long value, a l...'",
    "df.as(df.join3('a', 'b', 'c'), 'j')": "JOIN (3) |=> 'j'\n    ║ branch 1:\n      ├─SQL: a\n    ║ branch 2:\n      ├─SQL: b\n"
                                           "    ║ branch 3:\n      └─SQL: c",
    "df.as(df.race('a', 'b'), 'r')": "RACE\n    ║ branch 1:\n      ├─SQL: a\n    ║ branch 2:\n      └─SQL: b",
    "df.as(df.seq('a', 'b'), 't')": "SQL: a\n→ SQL: b",
    "df.as(df.loop('a', 'b'), 'l')": "LOOP (while) |=> 'l'\n    ↻ body:\n      └─SQL: a\n    ? while:\n      └─SQL: b",
    "df.if_rows('r', 'a', 'b')": "IF\n    ✓ then:\n      └─SQL: a\n    ✗ else:\n      └─SQL: b",
    "df.join(df.seq(df.loop('a'), 'b'), df.loop('c'))":
        "JOIN (2)\n    ║ branch 1:\n      ├─LOOP (infinite)\n          ↻ body:\n            └─SQL: a\n      → SQL: b\n"
        "    ║ branch 2:\n      └─LOOP (infinite)\n          ↻ body:\n            └─SQL: c",
    "df.join(df.join('a', 'b'), 'c')":
        "JOIN (2)\n    ║ branch 1:\n      ├─JOIN (2)\n      │   ║ branch 1:\n      │     ├─SQL: a\n      │   ║ branch 2:\n      │     └─SQL: b\n"
        "    ║ branch 2:\n      └─SQL: c",
}


@pytest.mark.parametrize("expression", NODES)
def test_each_kind_of_node(df: Connection, expression: str) -> None:
    assert lines(value(df, f"SELECT df.explain({expression})")) == NODES[expression].split("\n")


ANSWERS = {
    "select 1": "SQL: select 1",
    "WITH\nx AS (SELECT 1) SELECT": "SQL: WITH\nx AS (SELECT 1) SELECT",
    "drop table x": "SQL: drop table x",
    "nonsense": "Cannot explain input: not a valid Durofut JSON, instance ID, SQL statement, or DSL expression.\n"
                "Hint: DSL expressions use df.*() functions and operators like ~>, |=>, &, |.",
    "'SELECT 1' & 'SELECT 2'": "Cannot explain input: not a valid Durofut JSON, instance ID, SQL statement, or DSL expression.\n"
                               "Hint: DSL expressions use df.*() functions and operators like ~>, |=>, &, |.",
    "00000000": "Instance '00000000' not found",
    "DEADBEEF": "Instance 'deadbeef' not found",
    "df.getvar('no')": "Expression returned NULL",
    "df.version()": None,
    '{"node_type":"THEN","left_node":1}': "Failed to parse Durofut JSON: Malformed Durofut JSON with node_type 'THEN': "
                                          "Durofut children must be JSON objects",
    '{"node_type":"THEN"}': "Invalid durable function graph: root: THEN needs left_node",
}


@pytest.mark.parametrize("text", ANSWERS)
def test_answers(df: Connection, text: str) -> None:
    expected = ANSWERS[text]
    answer = value(df, "SELECT df.explain(%s)", text)
    if expected is None:
        assert answer.startswith("Failed to parse Durofut JSON: ")
    else:
        assert lines(answer) == expected.split("\n")


def test_errors_of_the_expression_are_the_servers_own(df: Connection) -> None:
    assert refused(df, "SELECT df.explain('SELECT df.sql(1)')").sqlstate == "42601"
    assert refused(df, "SELECT df.explain('df.sleep(-1)')").sqlstate == "22023"
    assert refused(df, "SELECT df.explain('df.nothing()')").sqlstate == "42883"


def test_operators_that_the_proxy_did_not_see(df: Connection) -> None:
    error = refused(df, "SELECT df.explain(%s)", "'a' ~> 'b'")
    assert (error.sqlstate, error.message) == ("42883", "operator does not exist: unknown ~> unknown")
    assert "df.seq" in (error.hint or "")
    assert "df.seq" not in (refused(df, "SELECT df.explain(%s)", "df.nothing()").hint or "")


def test_the_expression_is_evaluated_under_the_callers_search_path(df: Connection) -> None:
    df.execute("CREATE SCHEMA mine; CREATE FUNCTION mine.step_of_mine() RETURNS text LANGUAGE sql AS $$SELECT 'x'::text$$")
    df.execute("SET LOCAL search_path = mine")
    assert lines(value(df, "SELECT df.explain('df.sql(step_of_mine())')")) == ["SQL: x"]
    assert value(df, "SELECT current_setting('search_path')") == "mine"


def test_the_deepest_graph_is_drawn_and_one_level_more_is_not(df: Connection) -> None:
    def nested(levels: int) -> str:
        return '{"node_type":"LOOP","left_node":' * levels + '{"node_type":"SQL","query":"x"}' + "}" * levels

    assert len(lines(value(df, "SELECT df.explain(%s)", nested(256)))) == 2 * 256 + 1
    answer = value(df, "SELECT df.explain(%s)", nested(257))
    assert answer.startswith("Invalid durable function graph: root.left.left")
    assert "Graph exceeds maximum nesting depth of 256." in answer


def test_a_big_graph_is_drawn(df: Connection) -> None:
    text = value(df, "SELECT df.explain(df.join(VARIADIC ARRAY(SELECT 'SELECT ' || i FROM generate_series(1, 9999) i)))")
    assert text.count("\n") == 2 * 9999
