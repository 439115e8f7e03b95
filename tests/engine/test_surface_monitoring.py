"""Lists and figures (SURFACE 1.5, 9.1 to 9.3, 9.5, 9.7)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.fix_surface import Connection, Player, completed, done, loop_round, refused, value

Begin = Callable[[str], str]
FUNCTION = "pg_durable::orchestration::execute-function-graph"


def rows(c: Connection, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
    return c.execute(query, arguments).fetchall()


SIGNATURES = {
    "df.list_instances(text, integer)": "TABLE(instance_id text, label text, function_name text, status text, execution_count bigint, output text)",
    "df.list_instances(text, integer, text, text)": "TABLE(instance_id text, label text, function_name text, status text, execution_count bigint, "
        "output text, created_at timestamp with time zone, completed_at timestamp with time zone, next_cursor text)",
    "df.instance_info(text)": "TABLE(instance_id text, label text, function_name text, function_version text, current_execution_id bigint, "
        "status text, output text)",
    "df.instance_nodes(text)": "TABLE(node_id text, node_type text, query text, result_name text, left_node text, right_node text, status text, "
        "result text, status_details text, inferred_status text, inferred_status_from_ancestor_id text, updated_at timestamp with time zone)",
    "df.instance_nodes(text, integer)": "TABLE(execution_id bigint, node_id text, node_type text, query text, result_name text, left_node text, "
        "right_node text, status text, result text, updated_at timestamp with time zone)",
    "df.instance_executions(text, integer)": "TABLE(execution_id bigint, status text, event_count bigint, duration_ms bigint, output text)",
    "df.metrics()": "TABLE(total_instances bigint, running_instances bigint, completed_instances bigint, failed_instances bigint, "
        "total_executions bigint, total_events bigint)",
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_columns(df: Connection, function: str) -> None:
    assert value(df, "SELECT pg_get_function_result(%s::regprocedure)", function) == SIGNATURES[function]


ARGUMENTS = {
    "start": "fut text, label text DEFAULT NULL::text, database text DEFAULT NULL::text, transaction_mode text DEFAULT 'caller'::text",
    "signal": "instance_id text, signal_name text, signal_data text DEFAULT '{}'::text",
    "cancel": "instance_id text, reason text DEFAULT 'Cancelled by user'::text",
    "await_instance": "instance_id text, timeout_seconds integer DEFAULT 30",
    "loop": "body text, condition text DEFAULT NULL::text, continue_on_failure boolean DEFAULT false",
    "break": "value text DEFAULT NULL::text",
    "http": "url text, method text DEFAULT 'POST'::text, body text DEFAULT NULL::text, headers jsonb DEFAULT NULL::jsonb, "
            "timeout_seconds integer DEFAULT 30",
    "http_multipart": "url text, method text DEFAULT 'POST'::text, parts jsonb DEFAULT NULL::jsonb, headers jsonb DEFAULT NULL::jsonb, "
                      "timeout_seconds integer DEFAULT 30",
    "wait_for_signal": "name text, timeout_seconds integer DEFAULT NULL::integer",
    "wait_for_schedule": "cron_expr text, zone text DEFAULT NULL::text",
    "grant_usage": "p_role text, include_http boolean DEFAULT false, with_grant boolean DEFAULT false",
    "if": "condition text, then_branch text, else_branch text",
    "as": "fut text, name text",
    "step": "name text, fut text",
    "explain": "input text",
    "run": "instance_id text DEFAULT NULL::text",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_parameters(df: Connection, name: str) -> None:
    assert rows(df, "SELECT pg_get_function_arguments(oid) FROM pg_proc WHERE pronamespace = 'df'::regnamespace AND proname = %s",
                name) == [(ARGUMENTS[name],)]


def test_parameters_of_setvar(df: Connection) -> None:
    assert rows(df, "SELECT pg_get_function_arguments(oid) FROM pg_proc WHERE proname = 'setvar' AND pronamespace = 'df'::regnamespace "
                    "ORDER BY pronargs") == [("name text, value text",), ("name text, value text, secret boolean",)]


def test_info_and_nodes(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.as('SELECT 1', 'x'), 'l'")
    assert rows(df, "SELECT * FROM df.instance_info(%s)", instance) == [(instance, "l", FUNCTION, "1.0.0", 1, "running", None)]
    player.checkpoint(instance, done(0, '{"rows":[{"a":1}],"row_count":1}'), finish=completed("7"))
    assert rows(df, "SELECT status, output FROM df.instance_info(%s)", instance) == [("completed", "7")]
    (row,) = rows(df, "SELECT * FROM df.instance_nodes(%s)", instance)
    assert row[1:11] == ("SQL", "SELECT 1", "x", None, None, "completed", "7", f'{{"execution_id": "{instance}::1"}}', "completed", None)
    (row,) = rows(df, "SELECT * FROM df.instance_nodes(%s, 5)", instance)
    assert row[0] == 1
    assert row[2:9] == ("SQL", "SELECT 1", "x", None, None, "completed", "7")
    for call in ("df.instance_info('00000000')", "df.instance_nodes('00000000')", "df.instance_executions('00000000')",
                 "df.instance_info(NULL)"):
        assert rows(df, f"SELECT * FROM {call}") == []


def test_listing(df: Connection, player: Player) -> None:
    first = value(df, "SELECT df.start('a', 'x')")
    player.claim()
    player.checkpoint(first, done(0), finish=completed("1"))
    second = value(df, "SELECT df.start('b', 'y')")
    player.claim()
    third = value(df, "SELECT df.start('c', 'y')")
    everything = {r[0]: r[1:] for r in rows(df, "SELECT * FROM df.list_instances()")}
    assert everything == {first: ("x", FUNCTION, "completed", 1, "1"), second: ("y", FUNCTION, "running", 1, None),
                          third: ("y", FUNCTION, "pending", 1, None)}
    for status, instance in (("completed", first), ("running", second), ("pending", third)):
        assert rows(df, "SELECT instance_id FROM df.list_instances(%s)", status) == [(instance,)]
    assert rows(df, "SELECT instance_id FROM df.list_instances('nonsense')") == []
    assert rows(df, "SELECT instance_id, status FROM df.list_instances('running', 10, 'y')") == [(second, "running")]
    assert rows(df, "SELECT label FROM df.list_instances(NULL, 10, 'Y')") == []
    assert len(rows(df, "SELECT * FROM df.list_instances(status_filter => NULL, limit_count => 2)")) == 2


def test_limits_of_listing(df: Connection) -> None:
    for call in ("df.list_instances(NULL, 0)", "df.list_instances(NULL, -1, NULL)", "df.instance_executions('00000000', 0)"):
        error = refused(df, f"SELECT * FROM {call}")
        assert (error.sqlstate, error.message) == ("22023", "limit_count must be at least 1")
    error = refused(df, "SELECT * FROM df.list_instances(NULL, 1001)")
    assert error.message == "df.list_instances: limit_count (1001) exceeds pg_durable.list_instances_max_limit (1000)"
    assert "page" in (error.hint or "")
    assert refused(df, "SELECT * FROM df.list_instances(NULL, NULL)").sqlstate == "22004"
    df.execute("INSERT INTO duroxide.settings VALUES ('list_instances_max_limit', '5000')")
    assert rows(df, "SELECT * FROM df.list_instances(NULL, 5000)") == []


def test_paging_has_no_gaps_and_no_repeats(df: Connection) -> None:
    # Ties in created_at (one statement, one time) across page borders.
    for minute in range(5):
        df.execute("""INSERT INTO duroxide.instances (id, label, graph, created_at)
                      SELECT lpad(to_hex(%s * 1000 + i), 8, '0'), 'p', '[]', '2026-01-01 12:00:00.123456+02'::timestamptz + %s * interval '1 min'
                        FROM generate_series(1, 7) i""", (minute, minute))
    expected = [r[0] for r in rows(df, "SELECT id FROM duroxide.instances ORDER BY created_at DESC, id")]
    seen: list[str] = []
    cursor = None
    while True:
        page = rows(df, "SELECT instance_id, next_cursor FROM df.list_instances(NULL, 4, 'p', %s)", cursor)
        seen += [r[0] for r in page]
        assert len({r[1] for r in page}) == 1
        cursor = page[0][1]
        if cursor is None:
            break
        df.execute("INSERT INTO duroxide.instances (id, label, graph) VALUES (substr(gen_random_uuid()::text, 1, 8), 'p', '[]')")
    assert seen == expected
    assert bytes.fromhex(value(df, "SELECT next_cursor FROM df.list_instances(NULL, 1, 'p') LIMIT 1")).startswith(b"v1|20")


BAD_CURSORS = ["", "0", "zz", "00", "v1|2026", b"v2|2026-01-01T00:00:00.000000+00:00|00000000".hex(),
               b"v1|2026-99-01T00:00:00.000000+00:00|00000000".hex(), b"v1|2026-01-01T00:00:00.000000+00:00|xyz".hex(),
               b"v1|yesterday|00000000".hex(), b"\xff\xfe".hex(), "61" * 257]


@pytest.mark.parametrize("cursor", BAD_CURSORS)
def test_cursors_that_no_page_gave(df: Connection, cursor: str) -> None:
    error = refused(df, "SELECT * FROM df.list_instances(NULL, 1, NULL, %s)", cursor)
    assert (error.sqlstate, error.message) == ("22023", "df.list_instances: invalid after_cursor")


def test_executions_of_a_root_loop(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.loop('a', 'b'), 'l'")
    df.execute("UPDATE duroxide.instances SET vars = '{\"v\": \"1\"}'")
    player.checkpoint(instance, done(1, "1", "/0:1"), done(2, "1", "/0:1"), loop_round(0, 2))
    player.checkpoint(instance, done(1, "1", "/0:2"), done(2, "1", "/0:2"), loop_round(0, 3))
    player.checkpoint(instance, done(1, "1", "/0:3"))
    newest, second, first = rows(df, "SELECT * FROM df.instance_executions(%s)", instance)
    assert newest[:2] == (3, "Running")
    assert newest[3:] == (0, None)
    assert (second[:3], first[:3]) == ((2, "ContinuedAsNew", 2), (1, "ContinuedAsNew", 2))
    handed_on = json.loads(second[4])
    assert (handed_on["instance_id"], handed_on["label"], handed_on["vars"], handed_on["round"]) == (instance, "l", {"v": "1"}, 3)
    assert handed_on["graph"][0]["type"] == "LOOP"
    assert value(df, "SELECT current_execution_id FROM df.instance_info(%s)", instance) == 3
    assert value(df, "SELECT execution_count FROM df.list_instances()") == 3
    assert len(rows(df, "SELECT * FROM df.instance_executions(%s, 1)", instance)) == 1
    player.checkpoint(instance, done(2, "false", "/0:3"), finish=completed("9"))
    assert rows(df, "SELECT execution_id, status, output FROM df.instance_executions(%s, 1)", instance) == [(3, "Completed", "9")]


def test_executions_of_anything_else(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq('a', df.loop('b'))")
    player.checkpoint(instance, done(1), done(3, "1", "/2:1"), loop_round(2, 2))
    assert rows(df, "SELECT execution_id, status, event_count, output FROM df.instance_executions(%s)", instance) == [(1, "Running", 3, None)]
    df.execute("SELECT df.cancel(%s, 'no')", (instance,))
    assert rows(df, "SELECT status, output FROM df.instance_executions(%s)", instance) == [("Failed", "canceled: no")]


def test_metrics(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.loop('a', 'b')")
    player.checkpoint(instance, done(1, "1", "/0:1"), loop_round(0, 3))
    player.checkpoint(begin("'a'"), done(0), finish=completed())
    df.execute("SELECT df.cancel(%s)", (begin("'b'"),))
    assert rows(df, "SELECT * FROM df.metrics()") == [(3, 1, 1, 1, 5, 3)]
