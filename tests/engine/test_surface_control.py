"""Starting, steering and asking (SURFACE 1.1, 1.3, 1.4, 3.5 to 3.7)."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dsl.graph import Graph
from tests.engine.fix_surface import Connection, Player, completed, done, refused, value
from tests.fix_postgres import Database


def node(node_type: str, **members: Any) -> dict[str, Any]:
    return {"node_type": node_type, **members}


S = node("SQL", query="SELECT 1")


def test_start_writes_one_row_and_queues_it(df: Connection) -> None:
    df.execute("SELECT df.setvar('v', 'one'), df.setvar('w', '2')")
    df.execute("INSERT INTO df.vars (name, value) VALUES ('empty', NULL)")
    instance = value(df, "SELECT df.start(df.seq(df.as('SELECT {w}', 'a'), 'SELECT $a'), 'my label')")
    assert re.fullmatch("[0-9a-f]{8}", instance)
    row = df.execute("SELECT label, vars, database, submitted_by::text, status, graph FROM duroxide.instances WHERE id = %s",
                     (instance,)).fetchone()
    assert row is not None
    assert row[:5] == ("my label", {"v": "one", "w": "2"}, None, df.info.user, "pending")
    assert [{k: v for k, v in n.items() if k != "id"} for n in row[5]] == [
        {"type": "THEN", "left": 1, "right": 2}, {"type": "SQL", "query": "SELECT {w}", "name": "a"}, {"type": "SQL", "query": "SELECT $a"}]
    assert value(df, "SELECT count(*) FROM duroxide.queue WHERE instance_id = %s AND owner IS NULL", instance) == 1
    shown = df.execute("SELECT id, root_node, status, completed_at, output, error, started_at, ended_at FROM df.instances").fetchone()
    assert shown == (instance, row[5][0]["id"], "pending", None, None, None, None, None)


def test_the_graph_is_what_the_engine_accepts(df: Connection) -> None:
    text = value(df, """SELECT df.seq(df.join('a', df.as(df.race('b', df.sleep(1)), 'r'), 'c', 'd'),
        df.loop(df.if(df.seq('x', 'y'), df.break('v'), df.if_rows('r', 'p', 'q')), 'again', true),
        df.wait_for_schedule('@daily'), df.wait_for_signal('s', 3), df.http('http://x'))""")
    graph = Graph.from_json(value(df, "SELECT duroxide.flatten(%s::jsonb, 5)", text))
    assert len({n.id for n in graph.nodes}) == len(graph.nodes)
    loop = next(n for n in graph.nodes if n.type == "LOOP")
    assert loop.continue_on_failure
    assert loop.condition is not None
    assert graph.nodes[loop.condition].query == "again"
    join = next(n for n in graph.nodes if n.type == "JOIN")
    assert [graph.nodes[i].query for i in join.extras] == ["c", "d"]


def test_rolled_back_it_never_was(df: Connection) -> None:
    with df.transaction(force_rollback=True):
        instance = value(df, "SELECT df.start('SELECT 1')")
    assert value(df, "SELECT df.status(%s)", instance) is None
    assert value(df, "SELECT count(*) FROM duroxide.queue") == 0


def test_ids_are_random_and_node_ids_differ_between_instances(df: Connection) -> None:
    df.execute("SELECT df.start(df.seq('a', 'b')) FROM generate_series(1, 300)")
    assert value(df, "SELECT count(DISTINCT id) FROM duroxide.instances") == 300
    assert value(df, "SELECT count(DISTINCT root_node) FROM df.instances") == 300


def test_a_taken_id_is_replaced(df: Connection) -> None:
    """With ids of only 12 random bits, of which all, then half are taken."""
    df.execute("""
        INSERT INTO duroxide.instances (id, graph)
        SELECT lpad(to_hex(i), 8, '0'), '[]' FROM generate_series(0, 4095) i""")
    before = value(df, "SELECT count(*) FROM duroxide.instances")
    for function in ("submit", "start"):
        source = value(df, "SELECT pg_get_functiondef(%s::regproc)", f"duroxide.{function}")
        df.execute(source.replace("left(v_random, 8)", "'00000' || left(v_random, 3)"))
    for start in ("df.start('SELECT 1')", "duroxide.submit(NULL, 'SELECT 1', NULL, NULL)"):
        error = refused(df, f"SELECT {start}")
        assert (error.message, error.sqlstate) == ("Failed to create instance", "55000")
    df.execute("DELETE FROM duroxide.instances WHERE id >= '00000800'; DELETE FROM duroxide.queue WHERE instance_id >= '00000800'")
    assert value(df, "SELECT count(*) FROM (SELECT df.start('SELECT 1') FROM generate_series(1, 5)) s") == 5
    assert value(df, "SELECT count(*) FROM duroxide.instances") == before - 2048 + 5


STRICT = {
    "OK": ("22023", "Invalid durable function: df.setvar cannot be used as a workflow step. Call df.setvar before df.start()."),
    " OK\n": ("22023", "Invalid durable function: df.setvar cannot be used as a workflow step."),
    "completed": ("22023", "Invalid durable function: df.await_instance cannot be used as a workflow step. "
                           "Call df.await_instance before df.start()."),
    "0123abcd": ("22023", "Invalid durable function: df.start cannot be used as a workflow step."),
    "Instance 0123abcd cancelled: no": ("22023", "Invalid durable function: df.cancel cannot be used as a workflow step."),
    "Triggered run for all pending instances": ("22023", "Invalid durable function: df.run cannot be used as a workflow step."),
    json.dumps(node("sql", query="x")): ("22023", "Invalid durable function: Unknown node_type 'sql'. Valid types: SQL, THEN, IF, JOIN, LOOP, "
                                                  "BREAK, RACE, SLEEP, WAIT_SCHEDULE, HTTP, HTTP_MULTIPART, SIGNAL"),
    json.dumps(node("THEN", left_node=1)): ("22023", "Invalid durable function: Malformed Durofut JSON with node_type 'THEN': "),
    json.dumps({"condition": "a", "_partial_if": True, "then_branch": "b"}): ("42601", "Invalid durable function: a ?> without its !>"),
}


@pytest.mark.parametrize("text", STRICT)
def test_what_the_strict_decoding_refuses(df: Connection, text: str) -> None:
    sqlstate, fragment = STRICT[text]
    error = refused(df, "SELECT df.start(%s)", text)
    assert error.message.startswith(fragment)
    assert error.sqlstate == sqlstate
    assert error.hint


@pytest.mark.parametrize("text", ["SELECT 'OK'", "ok", "OK;", "", "{stmt}", "{\"a\": 1}", "[1]", "-- completed", "0123ABCD", "VACUUM"])
def test_what_only_resembles_a_mistake_is_sql(df: Connection, text: str) -> None:
    instance = value(df, "SELECT df.start(df.seq(%s, %s))", text, text)
    queries = [r[0] for r in df.execute("SELECT query FROM df.nodes WHERE instance_id = %s AND node_type = 'SQL'", (instance,))]
    assert queries == [text, text]


TYPES = "Valid types: SQL, THEN, IF, JOIN, LOOP, BREAK, RACE, SLEEP, WAIT_SCHEDULE, HTTP, HTTP_MULTIPART, SIGNAL"
GRAPHS: dict[str, tuple[dict[str, Any], str, str, str | None]] = {
    "unknown": (node("THEN", left_node=S, right_node=node("NOPE")), "root.right: Unknown node_type 'NOPE'. " + TYPES, "22023", "nodes_node_type_chk"),
    "unknown, wrapped": (node("THEN", left_node=node("SQL", query='{"node_type":"NOPE"}'), right_node=S),
                         "root.left: Unknown node_type 'NOPE'. " + TYPES, "22023", None),
    "helper": (node("THEN", left_node=S, right_node=node("SQL", query="OK")),
               "root.right: df.setvar cannot be used as a workflow step. Call df.setvar before df.start().", "22023", None),
    "first in pre-order": (node("THEN", left_node=node("LOOP", left_node=node("X")), right_node=node("Y")),
                           "root.left.left: Unknown node_type 'X'.", "22023", "nodes_node_type_chk"),
    "condition path": (node("THEN", left_node=node("IF", left_node=S, right_node=S, condition_node=node("X")), right_node=S),
                       "root.left.condition_node: Unknown node_type 'X'.", "22023", "nodes_node_type_chk"),
    "extras path": (node("JOIN", left_node=S, right_node=S, extra_nodes=[S, node("LOOP", left_node=node("X"))]),
                    "root.extra_nodes[1].left: Unknown node_type 'X'.", "22023", "nodes_node_type_chk"),
    "condition": (node("SQL", query="x", condition_node=S), "root: condition_node is not valid for SQL nodes", "22023", None),
    "extras": (node("RACE", left_node=S, right_node=S, extra_nodes=[S]), "root: extra_nodes is not valid for RACE nodes", "22023", None),
    "embedded IF": (node("IF", left_node=S, right_node=S, query='{"condition_node":"x"}'),
                    "root: condition_node in IF must be a first-class Durofut field, not embedded in query", "22023", None),
    "embedded LOOP": (node("LOOP", left_node=S, query='{"condition_node":"x"}'),
                      "root: condition_node in LOOP must be a first-class Durofut field, not embedded in query", "22023", None),
    "embedded JOIN": (node("JOIN", left_node=S, right_node=S, query='{"extra_nodes":[]}'),
                      "root: extra_nodes in JOIN must be a first-class Durofut field, not embedded in query", "22023", None),
    "config": (node("IF", left_node=S, right_node=S, query="x"), "root: query in IF must be valid JSON config: ", "22023", None),
    "config object": (node("LOOP", left_node=S, query="[]"), "root: query in LOOP must be a JSON config object", "22023", None),
    "child": (node("LOOP", left_node=node("THEN", left_node=S, right_node=3)), "root.left: failed to deserialize Durofut child: ", "22023", None),
    "child without type": (node("LOOP", left_node={"query": "x"}), "root.left: failed to deserialize Durofut child: ", "22023", None),
    "missing left": (node("THEN", right_node=S), "root: THEN needs left_node", "23514", "nodes_structure_chk"),
    "missing right": (node("RACE", left_node=S), "root: RACE needs right_node", "23514", "nodes_structure_chk"),
    "missing condition": (node("IF", left_node=S, right_node=S), "root: IF needs condition_node", "23514", "nodes_structure_chk"),
    "leaf with child": (node("SLEEP", query="1", left_node=S), "root: SLEEP takes no children", "23514", "nodes_structure_chk"),
    "leaf without query": (node("LOOP", left_node=node("BREAK")), "root.left: BREAK needs a query", "23514", "nodes_structure_chk"),
    "loop with right": (node("LOOP", left_node=S, right_node=S), "root: LOOP takes no right_node", "23514", "nodes_structure_chk"),
    "then with query": (node("THEN", left_node=S, right_node=S, query="x"), "root: THEN takes no query", "23514", "nodes_structure_chk"),
    "name": (node("LOOP", left_node=node("SQL", query="x", result_name="1")), "root.left: result name '1' is not a valid identifier",
             "23514", "nodes_result_name_chk"),
    "name of a chain": (node("THEN", left_node=S, right_node=S, result_name="a b"), "root: result name 'a b' is not a valid identifier",
                        "23514", "nodes_result_name_chk"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_the_first_fault_of_a_graph_is_named_with_its_path(df: Connection, case: str) -> None:
    graph, fragment, sqlstate, constraint = GRAPHS[case]
    error = refused(df, "SELECT df.start(%s)", json.dumps(graph))
    assert error.message.startswith("Invalid durable function graph: " + fragment)
    assert (error.sqlstate, error.constraint or None) == (sqlstate, constraint)
    assert value(df, "SELECT df.explain(%s)", json.dumps(graph)) == error.message


def deep(levels: int) -> str:
    """A chain that leans to the left; its last step is `levels` below the root."""
    return '{"node_type":"THEN","left_node":' * levels + json.dumps(S) + (',"right_node":' + json.dumps(S) + "}") * levels


def test_the_limit_of_nesting(df: Connection) -> None:
    instance = value(df, "SELECT df.start(%s)", deep(256))
    assert value(df, "SELECT count(*) FROM df.nodes WHERE instance_id = %s", instance) == 513
    error = refused(df, "SELECT df.start(%s)", deep(257))
    assert error.sqlstate == "54001"
    assert error.message == ("Invalid durable function graph: root" + ".left" * 257 + ": Graph exceeds maximum nesting depth of 256. "
                             "Simplify the workflow or break it into multiple instances.")


def test_the_limit_of_nodes(df: Connection) -> None:
    join = "SELECT df.start(df.join(VARIADIC ARRAY(SELECT 'SELECT ' || i FROM generate_series(1, %s) i)))"
    instance = value(df, join, 9_999)
    assert value(df, "SELECT jsonb_array_length(graph) FROM duroxide.instances WHERE id = %s", instance) == 10_000
    Graph.from_json(value(df, "SELECT graph FROM duroxide.instances WHERE id = %s", instance))
    error = refused(df, join, 10_000)
    assert error.sqlstate == "54000"
    assert "Workflow exceeds maximum node count of 10000. Simplify the workflow or break it into multiple instances." in error.message


def test_the_checks_of_start_in_their_order(df: Connection) -> None:
    bad = "SELECT df.start(%s, database => 'no such database', transaction_mode => %s)"
    error = refused(df, bad, '{"node_type":"NOPE"}', "other")
    assert (error.sqlstate, error.message) == (
        "22023", "invalid transaction_mode \"other\" for df.start(): expected 'caller' or 'new'")
    assert "Unknown node_type" in refused(df, bad, '{"node_type":"NOPE"}', "CALLER").message
    graph = json.dumps(node("THEN", left_node=S))
    error = refused(df, bad, graph, "caller")
    assert (error.sqlstate, error.message) == ("3D000", 'database "no such database" does not exist')
    df.execute("INSERT INTO duroxide.settings VALUES ('require_login', 'on')")
    df.execute("CREATE ROLE surface_nologin; SELECT df.grant_usage('surface_nologin')")
    df.execute("GRANT surface_nologin TO CURRENT_USER")
    with df.transaction(force_rollback=True):
        df.execute("SET LOCAL ROLE surface_nologin")
        error = refused(df, "SELECT df.start(%s)", graph)
        assert (error.sqlstate, error.message) == ("42501", 'current_user "surface_nologin" does not have LOGIN privilege.')
    df.execute("UPDATE duroxide.settings SET value = 'off' WHERE name = 'require_login'; SET LOCAL ROLE surface_nologin")
    assert "needs right_node" in refused(df, "SELECT df.start(%s)", graph).message
    instance = value(df, "SELECT df.start('SELECT 1')")
    assert value(df, "SELECT submitted_by::text FROM df.instances WHERE id = %s", instance) == "surface_nologin"
    assert refused(df, "SELECT df.start(NULL)").sqlstate == "22004"
    assert refused(df, "SELECT df.start('SELECT 1', transaction_mode => NULL)").sqlstate == "22023"
    df.execute("RESET ROLE; INSERT INTO duroxide.settings VALUES ('new_transaction_start_timeout', '0.1')")
    assert refused(df, "SELECT df.start('SELECT 1', transaction_mode => 'New')").sqlstate == "55000"


def test_superusers_are_refused_unless_the_setting_allows_them(shared_surface: Database) -> None:
    with psycopg.connect(shared_surface.superuser_dsn) as c:
        error = refused(c, "SELECT df.start('SELECT 1')")
        assert error.sqlstate == "42501"
        assert error.message.startswith('pg_durable: superuser instances are disabled. current_user "postgres" is a superuser, but '
                                        "pg_durable.enable_superuser_instances is off.")
        c.execute("INSERT INTO duroxide.settings VALUES ('enable_superuser_instances', 'on')")
        assert len(value(c, "SELECT df.start('SELECT 1')")) == 8
        c.rollback()


def test_variables(df: Connection) -> None:
    assert value(df, "SELECT df.setvar('a', 'one')") == "OK"
    assert value(df, "SELECT df.setvar('a', 'two')") == "OK"
    assert value(df, "SELECT df.getvar('a')") == "two"
    assert value(df, "SELECT df.getvar('b')") is None
    assert value(df, "SELECT df.unsetvar('b')") == "OK"
    assert value(df, "SELECT df.unsetvar('a')") == "OK"
    assert value(df, "SELECT df.getvar('a')") is None
    df.execute("SELECT df.setvar('a', ''), df.setvar('not an identifier', '1')")
    assert value(df, "SELECT count(*) FROM df.vars WHERE owner = quote_ident(current_user)::regrole") == 2
    assert value(df, "SELECT df.clearvars()") == "OK"
    assert value(df, "SELECT count(*) FROM df.vars") == 0


IN_STEP = {
    "df.setvar('a', 'b')": "df.setvar() cannot be called inside a workflow - set variables before starting the workflow",
    "df.unsetvar('a')": "df.unsetvar() cannot be called inside a workflow - manage variables before starting the workflow",
    "df.clearvars()": "df.clearvars() cannot be called inside a workflow - manage variables before starting the workflow",
    "df.await_instance('00000000')": "df.await_instance() cannot be called inside a workflow",
    "df.wait_for_completion('00000000')": "df.await_instance() cannot be called inside a workflow",
}


def test_what_a_step_may_not_call(df: Connection) -> None:
    df.execute("SET LOCAL df.in_workflow = 'true'")
    for call, message in IN_STEP.items():
        error = refused(df, f"SELECT {call}")
        assert (error.sqlstate, error.message) == ("55000", message)
    assert value(df, "SELECT df.getvar('a')") is None
    assert len(value(df, "SELECT df.start('SELECT 1')")) == 8


def test_a_life_in_statuses(df: Connection, player: Player) -> None:
    instance = value(df, "SELECT df.start(df.as('SELECT 1', 'a'), 'l')")
    assert value(df, "SELECT df.status(%s)", instance) == "pending"
    assert player.claim() == [instance]
    assert value(df, "SELECT df.status(%s)", instance) == "running"
    assert value(df, "SELECT started_at IS NOT NULL AND ended_at IS NULL FROM df.instances WHERE id = %s", instance)
    assert value(df, "SELECT df.result(%s)", instance) is None
    output = '{"rows":[{"answer":42}],"row_count":1}'
    player.checkpoint(instance, done(0, output), finish=completed(output))
    assert value(df, "SELECT df.status(%s)", instance) == "completed"
    assert value(df, "SELECT df.await_instance(%s)", instance) == "completed"
    assert value(df, "SELECT df.result(%s)", instance) == '{"rows": [{"answer": 42}], "row_count": 1}'
    assert value(df, "SELECT df.error(%s)", instance) is None
    row = df.execute("SELECT output, completed_at = ended_at, updated_at >= created_at, error FROM df.instances").fetchone()
    assert row == (output, True, True, None)
    assert value(df, "SELECT count(*) FROM duroxide.queue") == 0


def test_a_result_that_jsonb_cannot_hold_is_shown_as_a_string(df: Connection, player: Player, begin: Callable[[str], str]) -> None:
    instance = begin("'SELECT 1'")
    player.checkpoint(instance, done(0, '"\\u0000"'), finish=completed('"\\u0000"'))
    assert json.loads(value(df, "SELECT df.result(%s)", instance)) == '"\\u0000"'
    assert value(df, "SELECT status FROM df.nodes WHERE instance_id = %s", instance) == "completed"


def test_a_failure(df: Connection, player: Player, begin: Callable[[str], str]) -> None:
    instance = begin("'SELECT 1/0'")
    error = {"message": "SQL execution failed: error returned from database: division by zero", "sqlstate": "22012",
             "detail": "d", "hint": "h"}
    player.checkpoint(instance, {"execution": "", "node": 0, "event": "failed", "error": error},
                      finish={"status": "failed", "output": error["message"], "error": error})
    assert value(df, "SELECT df.status(%s)", instance) == "failed"
    assert value(df, "SELECT df.await_instance(%s)", instance) == "failed"
    assert value(df, "SELECT df.result(%s)", instance) is None
    assert value(df, "SELECT df.error(%s)", instance) == error["message"]
    text = error["message"] + "\nSQLSTATE: 22012\nDETAIL: d\nHINT: h"
    row = df.execute("SELECT output, error, completed_at, ended_at IS NOT NULL FROM df.instances").fetchone()
    assert row == (error["message"], text, None, True)
    row = df.execute("SELECT status, result, error FROM df.nodes").fetchone()
    assert row == ("failed", error["message"], text)


def test_awaiting_what_is_not_there_or_never_ends(df: Connection) -> None:
    error = refused(df, "SELECT df.await_instance('00000000', 5)")
    assert (error.sqlstate, error.message) == ("02000", "Instance not found: 00000000")
    assert refused(df, "SELECT df.await_instance('00000000', 0)").message == "Timeout must be positive"
    instance = value(df, "SELECT df.start('SELECT 1')")
    error = refused(df, "SELECT df.await_instance(%s, 1)", instance)
    assert error.sqlstate == "55000"
    assert error.message == (f"Timeout after 1s waiting for instance {instance} (status: pending). Check if background worker is running.")
    assert error.hint is not None


def test_await_says_when_it_waits_for_its_own_transaction(shared_surface: Database) -> None:
    with psycopg.connect(shared_surface.dsn()) as c:
        c.execute("SELECT set_config('test.id', df.start('SELECT 1'), true)")
        with pytest.raises(psycopg.Error) as caught:
            c.execute("SELECT df.await_instance(current_setting('test.id'), 1)")
        assert "started in this transaction" in (caught.value.diag.message_hint or "")
        c.rollback()


def test_await_sees_what_another_session_commits(surface: Database) -> None:
    with psycopg.connect(surface.dsn(), autocommit=True) as caller, psycopg.connect(surface.dsn(), autocommit=True) as worker:
        instance = value(caller, "SELECT df.start('SELECT 1')")
        player = Player(worker)
        assert player.claim() == [instance]
        results: list[str] = []
        thread = threading.Thread(target=lambda: results.append(value(caller, "SELECT df.await_instance(%s, 60)", instance)))
        thread.start()
        time.sleep(0.05)
        player.checkpoint(instance, done(0), finish=completed())
        thread.join(60)
        assert results == ["completed"]


def test_the_old_name_of_await_warns(df: Connection, player: Player, begin: Callable[[str], str]) -> None:
    instance = begin("'SELECT 1'")
    player.checkpoint(instance, done(0), finish=completed())
    notices: list[tuple[str | None, str | None]] = []
    df.add_notice_handler(lambda n: notices.append((n.severity, n.message_primary)))
    assert value(df, "SELECT df.wait_for_completion(%s)", instance) == "completed"
    assert notices == [("WARNING", "df.wait_for_completion() is deprecated; use df.await_instance() instead")]


def test_cancel(df: Connection, player: Player) -> None:
    waits = value(df, "SELECT df.start(df.sleep(1000))")
    assert value(df, "SELECT df.cancel(%s)", waits) == f"Instance {waits} cancelled: Cancelled by user"
    assert value(df, "SELECT df.status(%s)", waits) == "cancelled"
    row = df.execute("SELECT output, completed_at, ended_at IS NOT NULL FROM df.instances").fetchone()
    assert row == ("canceled: Cancelled by user", None, True)
    assert player.claim() == [waits]  # the worker still hears of it, and cleans up
    player.checkpoint(waits, finish={"status": "cancelled", "output": "canceled: Cancelled by user"})
    assert value(df, "SELECT (SELECT count(*) FROM duroxide.queue) + (SELECT count(*) FROM duroxide.signals)") == 0
    assert value(df, "SELECT df.cancel(%s, reason => 'again')", waits) == f"Instance {waits} cancelled: again"
    assert value(df, "SELECT output FROM df.instances") == "canceled: Cancelled by user"
    error = refused(df, "SELECT df.cancel('00000000')")
    assert (error.sqlstate, error.message) == ("02000", "Instance not found or access denied: 00000000")


def test_a_cancel_that_is_rolled_back_did_not_happen(df: Connection) -> None:
    instance = value(df, "SELECT df.start('SELECT 1')")
    with df.transaction(force_rollback=True):
        df.execute("SELECT df.cancel(%s)", (instance,))
    assert value(df, "SELECT df.status(%s)", instance) == "pending"
    assert value(df, "SELECT count(*) FROM duroxide.signals") == 0


SIGNALS = {"{}": "{}", "hello": '"hello"', "42": "42", '{"a": [1]}': '{"a": [1]}', "": '""', "tr": '"tr"', 'say "x"': '"say \\"x\\""'}


@pytest.mark.parametrize("data", SIGNALS)
def test_signal_payloads(df: Connection, data: str) -> None:
    instance = value(df, "SELECT df.start(df.wait_for_signal('go'))")
    assert value(df, "SELECT df.signal(%s, 'go', %s)", instance, data) == "OK"
    assert df.execute("SELECT kind, name, data FROM duroxide.signals").fetchall() == [("signal", "go", SIGNALS[data])]


def test_signals_that_cannot_be_sent(df: Connection, player: Player, begin: Callable[[str], str]) -> None:
    assert refused(df, "SELECT df.signal('', 'go')").message == "Instance ID cannot be empty"
    instance = begin("'SELECT 1'")
    assert refused(df, "SELECT df.signal(%s, '')", instance).message == "Signal name cannot be empty"
    error = refused(df, "SELECT df.signal('00000000', 'go')")
    assert (error.sqlstate, error.message) == ("02000", "Instance not found or access denied: 00000000")
    player.checkpoint(instance, done(0), finish=completed())
    notices: list[str | None] = []
    df.add_notice_handler(lambda n: notices.append(n.severity))
    assert value(df, "SELECT df.signal(%s, 'go')", instance) == "OK"
    assert notices == ["NOTICE"]
    assert value(df, "SELECT count(*) FROM duroxide.signals") == 0


def test_a_signal_wakes_a_parked_instance(df: Connection, player: Player, begin: Callable[[str], str]) -> None:
    instance = begin("df.wait_for_signal('go')")
    player.checkpoint(instance, {"execution": "", "node": 0, "event": "waiting"}, p_park="infinity")
    assert player.claim() == []
    df.execute("SELECT df.signal(%s, 'go', '7')", (instance,))
    assert player.claim() == [instance]


def test_a_lost_lease_writes_nothing(df: Connection, player: Player, begin: Callable[[str], str]) -> None:
    instance = begin("'SELECT 1'")
    df.execute("SELECT duroxide.release(%s, %s)", (player.worker, [instance]))
    with pytest.raises(psycopg.Error) as caught, df.transaction():
        player.checkpoint(instance, done(0), finish=completed())
    assert caught.value.diag.sqlstate == "DF001"
    assert value(df, "SELECT df.status(%s)", instance) == "running"


def test_version_and_place(df: Connection) -> None:
    assert re.match(r"0\.2\.6 \(dfproxy \d+\.\d+", value(df, "SELECT df.version()"))
    assert value(df, "SELECT df.target_database()") == df.info.dbname
    assert value(df, "SELECT df.duroxide_schema()") == "duroxide"
    assert value(df, "SELECT df.run()") == "Triggered run for all pending instances"
    assert value(df, "SELECT df.run('x')") == "Triggered run for instance: x"


def test_starts_from_anywhere_sql_works(df: Connection) -> None:
    df.execute("CREATE TEMP TABLE orders AS SELECT generate_series(1, 5) AS id")
    df.execute("CREATE TEMP TABLE jobs AS SELECT id, df.start('UPDATE orders SET id = ' || id) AS job FROM orders")
    assert value(df, "SELECT count(DISTINCT job) FROM jobs") == 5
    df.execute("DO $$ BEGIN PERFORM df.setvar('a', 'b'); PERFORM df.start(df.seq('SELECT 1', 'SELECT 2')); END $$")
    assert value(df, "WITH s AS (SELECT df.start('SELECT 1') AS id) SELECT count(*) FROM s") == 1
    assert value(df, "SELECT count(*) FROM df.instances") == 7
