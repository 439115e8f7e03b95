"""What df.nodes and df.instance_nodes derive from graph and checkpoints (SURFACE 4.2, 4.6, 5.5 to 5.11, 9.4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.interpreter import Interpreter
from engine.model import Changes, Finish, StepError
from tests.engine.fix_graphs import flatten, graph, trees
from tests.engine.fix_surface import (
    Connection,
    Player,
    completed,
    decided,
    done,
    failed,
    loop_round,
    value,
    waiting,
)
from tests.fix_postgres import Database

Begin = Callable[[str], str]
ONE = '{"rows":[{"n":1}],"row_count":1}'
TWO = '{"rows":[{"n":2}],"row_count":1}'
EMPTY = '{"rows":[],"row_count":0}'


def states(c: Connection, instance: str) -> list[str]:
    """`status` of each node in pre-order, with `/inferred` where that differs."""
    rows = c.execute("SELECT status, inferred_status FROM duroxide.node_rows(%s) ORDER BY place", (instance,)).fetchall()
    return [s if s == i else f"{s}/{i}" for s, i in rows]


def column(c: Connection, instance: str, name: str) -> list[Any]:
    return [r[0] for r in c.execute(f"SELECT {name} FROM duroxide.node_rows(%s) ORDER BY place", (instance,)).fetchall()]


def results(c: Connection, instance: str) -> list[Any]:
    return column(c, instance, "result")


def test_a_sequence(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.as('a', 'x'), df.as(df.seq('b', 'c'), 'y'))")
    assert states(df, instance) == ["running", "running", "pending", "pending", "pending"]
    assert column(df, instance, "result_name") == [None, "x", "y", None, None]
    player.checkpoint(instance, done(1, ONE))
    assert states(df, instance) == ["running", "completed", "running", "running", "pending"]
    assert results(df, instance) == [None, json.loads(ONE), None, None, None]
    player.checkpoint(instance, done(3, ONE))
    player.checkpoint(instance, done(4, TWO), finish=completed(TWO))
    assert states(df, instance) == ["completed"] * 5
    assert results(df, instance) == [json.loads(r) for r in (TWO, ONE, TWO, ONE, TWO)]


def test_before_the_claim_everything_is_pending(df: Connection) -> None:
    instance = value(df, "SELECT df.start(df.seq('a', 'b'))")
    assert states(df, instance) == ["pending"] * 3
    assert column(df, instance, "status_details") == [None] * 3


def test_a_failed_sequence(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.seq('a', 'b'), 'c')")
    player.checkpoint(instance, failed(2, "no", sqlstate="22012"), finish={"status": "failed", "output": "no"})
    assert states(df, instance) == ["failed", "failed", "failed", "pending/skipped", "pending/skipped"]
    assert results(df, instance) == ["no", "no", "no", None, None]
    assert column(df, instance, "error") == ["no\nSQLSTATE: 22012"] * 3 + [None] * 2
    nodes = column(df, instance, "id")
    assert column(df, instance, "inferred_from")[3:] == [nodes[1], nodes[0]]


def test_branches_of_if(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.if('c', 't', 'e')")    # pre-order: IF, t, e, c
    assert states(df, instance) == ["running", "pending", "pending", "running"]
    player.checkpoint(instance, done(3, ONE), decided(0, "else"))
    assert states(df, instance) == ["running", "pending", "running", "completed"]
    player.checkpoint(instance, done(2, TWO), finish=completed(TWO))
    assert states(df, instance) == ["completed", "pending/skipped", "completed", "completed"]
    assert results(df, instance)[0] == json.loads(TWO)


def test_a_failed_condition(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.if('c', 't', 'e')")
    player.checkpoint(instance, failed(3, "no"), finish={"status": "failed", "output": "no"})
    assert states(df, instance) == ["failed", "pending/skipped", "pending/skipped", "failed"]


def test_if_rows_that_fails_by_itself(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq('a', df.if_rows('x', 't', 'e'))")
    text = "df.if_rows: result 'x' not found"
    player.checkpoint(instance, done(1, ONE), finish={"status": "failed", "output": text, "error": {"message": text}})
    assert states(df, instance) == ["failed", "completed", "failed", "pending/skipped", "pending/skipped"]
    assert results(df, instance)[2] == text


def test_join(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.join('a', df.join('b', 'c'), 'd')")    # JOIN, a, JOIN, b, c, d
    assert states(df, instance) == ["running"] * 6
    player.checkpoint(instance, done(1, ONE), done(3, TWO))
    assert states(df, instance) == ["running", "completed", "running", "completed", "running", "running"]
    player.checkpoint(instance, done(4, EMPTY))
    assert results(df, instance)[2] == [json.loads(TWO), json.loads(EMPTY)]
    player.checkpoint(instance, done(5, '"d"'), finish=completed("[]"))
    assert states(df, instance) == ["completed"] * 6


def test_join_reports_all_failures_by_position(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.join('a', df.join('b', 'c'), 'd'), 'e')")    # THEN, JOIN, a, JOIN, b, c, d, e
    player.checkpoint(instance, failed(6, "D", sqlstate="22012"), failed(5, "C", sqlstate="42P01"), done(2, ONE))
    assert states(df, instance) == ["running", "running", "completed", "running", "running", "failed", "failed", "pending"]
    message = "JOIN branch 2 failed: JOIN branch 2 failed: C; JOIN branch 3 failed: D"
    player.checkpoint(instance, done(4, ONE), finish={"status": "failed", "output": message})
    assert results(df, instance)[:2] == [message, message]
    assert results(df, instance)[3] == "JOIN branch 2 failed: C"
    assert column(df, instance, "error")[1] == message + "\nSQLSTATE: 42P01"
    assert states(df, instance)[-1] == "pending/skipped"


def test_race(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.race(df.seq('a', df.sleep(30)), 'b'), 'c')")    # THEN, RACE, THEN, a, SLEEP, b, c
    player.checkpoint(instance, done(3, ONE), waiting(4, wake_at="2100-01-01T00:00:00+00:00"))
    assert states(df, instance) == ["running", "running", "running", "completed", "running", "running", "pending"]
    player.checkpoint(instance, done(5, TWO), decided(1, "2"))
    assert states(df, instance) == ["running", "completed", "failed/skipped", "completed", "failed/skipped", "completed", "running"]
    assert results(df, instance)[1] == json.loads(TWO)
    assert results(df, instance)[4] == "canceled: lost a RACE"
    race = column(df, instance, "id")[1]
    assert [f for f in column(df, instance, "inferred_from") if f] == [race, race]


@pytest.mark.parametrize(("winner", "side"), [(1, "left"), (2, "right")])
def test_a_race_that_a_failure_decides(df: Connection, player: Player, begin: Begin, winner: int, side: str) -> None:
    instance = begin("df.join(df.race('a', 'b'), 'c')")    # JOIN, RACE, a, b, c
    player.checkpoint(instance, failed(1 + winner, "no"), decided(1, str(winner)))
    assert results(df, instance)[1] == f"RACE {side} branch failed: no"
    assert states(df, instance)[0] == "running"


def test_a_loop_in_its_rounds(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.loop(df.seq('a', 'b'), 'again')")    # LOOP, THEN, a, b, again
    first, second = "/0:1", "/0:2"
    nodes = column(df, instance, "id")
    player.checkpoint(instance, done(2, ONE, first))
    assert states(df, instance) == ["running", "running", "completed", "running", "pending"]
    player.checkpoint(instance, done(3, ONE, first))
    assert states(df, instance) == ["running", "completed", "completed", "completed", "running"]
    player.checkpoint(instance, done(4, ONE, first), loop_round(0, 2))
    # What the round before left behind is shown, and inferred to be pending.
    assert states(df, instance) == ["running", "running", "running", "completed/pending", "completed/pending"]
    assert column(df, instance, "inferred_from")[3:] == [nodes[1], nodes[0]]
    stamps = [d and d["execution_id"] for d in column(df, instance, "status_details")]
    assert stamps == [f"{instance}::{n}" for n in (2, 2, 2, 1, 1)]
    player.checkpoint(instance, done(2, TWO, second))
    player.checkpoint(instance, done(3, TWO, second))
    assert results(df, instance)[2:] == [json.loads(TWO), json.loads(TWO), None]
    player.checkpoint(instance, done(4, EMPTY, second), finish=completed(TWO))
    assert states(df, instance) == ["completed"] * 5
    assert results(df, instance)[0] == json.loads(TWO)


def test_a_paced_loop_has_not_reached_its_body(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.loop(df.sleep(0))")
    player.checkpoint(instance, done(1, "{}", "/0:1"), loop_round(0, 2, began="2100-01-01T00:00:00+00:00"))
    assert states(df, instance) == ["running", "completed/pending"]


def test_break(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.loop(df.seq(df.if('c', df.break('v'), 'e'), 'n')), 'z')")
    # THEN, LOOP, THEN, IF, BREAK, e, c, n, z
    path = "/1:1"
    player.checkpoint(instance, done(6, ONE, path), decided(3, "then", path), done(4, '"v"', path))
    assert states(df, instance) == ["running", "completed", "completed", "completed", "completed", "pending/skipped", "completed",
                                    "pending/skipped", "running"]
    assert results(df, instance)[1:5] == ["v"] * 4


def test_nested_loops(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.loop(df.seq('a', df.loop('b', 'more')))")    # LOOP, THEN, a, LOOP, b, more
    player.checkpoint(instance, done(2, ONE, "/0:1"), done(4, ONE, "/0:1/3:1"), done(5, ONE, "/0:1/3:1"), loop_round(3, 2, "/0:1"))
    assert states(df, instance) == ["running", "running", "completed", "running", "running", "completed/pending"]
    player.checkpoint(instance, done(4, TWO, "/0:1/3:2"), done(5, EMPTY, "/0:1/3:2"), loop_round(0, 2))
    # The inner loop has not been reached in the outer round 2: its children show what is left of 1.2.
    assert states(df, instance) == ["running", "running", "running", "pending", "completed/pending", "completed/pending"]
    inner = column(df, instance, "id")[3]
    assert column(df, instance, "status_details")[4] == {"execution_id": f"{instance}::1::{inner}::2"}
    player.checkpoint(instance, done(2, ONE, "/0:2"))
    assert states(df, instance) == ["running", "running", "completed", "running", "running", "completed/pending"]
    player.checkpoint(instance, done(4, ONE, "/0:2/3:1"), done(5, ONE, "/0:2/3:1"), loop_round(3, 11, "/0:2"))
    player.checkpoint(instance, done(4, TWO, "/0:2/3:11"))
    assert results(df, instance)[4] == json.loads(TWO)
    assert column(df, instance, "status_details")[4] == {"execution_id": f"{instance}::2::{inner}::11"}


@pytest.mark.parametrize(("around", "prefix"), [("df.seq('a', {})", "Loop sub-orchestration failed: "), ("{}", ""), ("df.join('a', {})", "")])
def test_a_failed_loop(df: Connection, player: Player, begin: Begin, around: str, prefix: str) -> None:
    instance = begin("df.join('other', " + around.format("df.loop('b')") + ")" if around != "{}" else "df.loop('b')")
    loop = column(df, instance, "node_type").index("LOOP")
    finish = None if loop else {"status": "failed", "output": "no"}
    before = [done(loop - 1)] if loop else []
    player.checkpoint(instance, *before, failed(loop + 1, "no", f"/{loop}:1"), finish=finish)
    assert results(df, instance)[loop] == prefix + "no"


def test_a_loop_that_goes_on_after_a_failure(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.loop('a', 'more', true), 'z')")    # THEN, LOOP, a, more, z
    player.checkpoint(instance, failed(2, "no", "/1:1"))
    assert states(df, instance) == ["running", "running", "failed", "running", "pending"]
    player.checkpoint(instance, done(3, ONE, "/1:1"), loop_round(1, 2))
    assert states(df, instance) == ["running", "running", "running", "completed/pending", "pending"]
    player.checkpoint(instance, failed(2, "no", "/1:2"), done(3, EMPTY, "/1:2"))
    assert states(df, instance) == ["running", "completed", "failed", "completed", "running"]


def test_cancellation(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq(df.join('a', df.wait_for_signal('s')), 'z')")    # THEN, JOIN, a, SIGNAL, z
    player.checkpoint(instance, done(2, ONE), waiting(3))
    df.execute("SELECT df.cancel(%s, 'enough')", (instance,))
    assert states(df, instance) == ["failed", "failed", "completed", "failed", "pending/skipped"]
    assert results(df, instance)[3] == "canceled: enough"
    player.checkpoint(instance, failed(3, "canceled: enough", sqlstate="57014"), finish={"status": "cancelled"})
    assert states(df, instance) == ["failed", "failed", "completed", "failed", "pending/skipped"]
    assert results(df, instance)[0] == "canceled: enough"


def test_cancelled_before_it_began(df: Connection) -> None:
    instance = value(df, "SELECT df.start('a')")
    df.execute("SELECT df.cancel(%s)", (instance,))
    assert states(df, instance) == ["pending"]


def test_refused_before_it_began(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq('a', 'b')")
    player.checkpoint(instance, finish={"status": "failed", "output": "submitted_by role no longer exists in pg_roles"})
    assert states(df, instance) == ["pending"] * 3


def test_the_query_of_compounds_refers_by_id(df: Connection, begin: Begin) -> None:
    instance = begin("df.join(df.if('c', 't', 'e'), df.loop('b', 'w', true), df.loop('x'), df.if_rows('r', 'y', 'n'))")
    rows = df.execute("SELECT id, node_type, query, left_node, right_node FROM duroxide.node_rows(%s) ORDER BY place", (instance,)).fetchall()
    ids = {r[2]: r[0] for r in rows if r[1] == "SQL"}
    join, *others = [r for r in rows if r[1] != "SQL"]
    condition, loop, endless, test = others
    assert json.loads(join[2]) == {"extra_nodes": [endless[0], test[0]]}
    assert condition[2:] == (f'{{"condition_node":"{ids["c"]}"}}', ids["t"], ids["e"])
    assert loop[2:] == (f'{{"continue_on_failure":true,"condition_node":"{ids["w"]}"}}', ids["b"], None)
    assert endless[2:] == (None, ids["x"], None)
    assert json.loads(test[2]) == {"condition_type": "result_has_rows", "result_name": "r"}


def test_stamps_of_branches(df: Connection, begin: Begin) -> None:
    instance = begin("df.join('a', df.race('b', df.seq(df.loop('c'), 'd')))")    # JOIN, a, RACE, b, THEN, LOOP, c, d
    ids = column(df, instance, "id")
    stamps = [d and d["execution_id"] for d in column(df, instance, "status_details")]
    race = f"{instance}::1::{ids[2]}::1"
    arm = f"{race}::{ids[4]}::1"
    loop = f"{arm}::{ids[5]}::1"
    assert stamps == [f"{instance}::1", f"{instance}::1::{ids[1]}::1", race, f"{race}::{ids[3]}::1", arm, loop, loop, None]


FORGED = ['{}', '"x"', '[]', '[1]', '[{"id":"00000000","type":"THEN","left":0,"right":0}]', '[{"id":"00000000","type":"THEN"}]',
          '[{"id":"00000000","type":"LOOP","left":7}]', '[{"id":"00000000","type":"SQL","left":"x"}]', '[{}]',
          '[{"id":"00000000","type":"JOIN","left":1,"right":2,"extras":[9]},{"id":"a","type":"SQL"},{"id":"b","type":"SQL"}]']


@pytest.mark.parametrize("graph_text", FORGED)
def test_a_forged_graph_has_no_nodes_and_harms_nobody(df: Connection, graph_text: str) -> None:
    df.execute("SELECT df.start('SELECT 1')")
    df.execute("INSERT INTO duroxide.instances (id, graph) VALUES ('f0f0f0f0', %s)", (graph_text,))
    assert value(df, "SELECT count(*) FROM df.nodes") == 1
    assert value(df, "SELECT count(*) FROM df.instances") == 2
    assert value(df, "SELECT df.explain('f0f0f0f0')") == "No nodes found for instance 'f0f0f0f0'"


def test_the_views_columns(df: Connection) -> None:
    """Names, order and types of SURFACE 4.1 to 4.4, then ours."""

    def columns(view: str) -> list[tuple[str, str]]:
        return df.execute("""SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute
                              WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum""", (view,)).fetchall()

    v, t, z, r = "character varying", "text", "timestamp with time zone", "regrole"
    assert columns("df.instances") == [
        ("id", v), ("label", t), ("root_node", v), ("status", t), ("submitted_by", r), ("database", t), ("created_at", z),
        ("updated_at", z), ("completed_at", z), ("output", t), ("error", t), ("started_at", z), ("ended_at", z)]
    assert columns("df.nodes") == [
        ("id", v), ("instance_id", v), ("node_type", t), ("query", t), ("result_name", t), ("left_node", v), ("right_node", v),
        ("status", t), ("result", "jsonb"), ("error", t), ("submitted_by", r), ("database", t), ("created_at", z),
        ("updated_at", z), ("status_details", "jsonb")]
    assert columns("df.vars") == [("name", t), ("value", t), ("owner", r)]
    assert columns("df._worker_epoch") == [("epoch_id", "uuid"), ("started_at", z), ("last_seen_at", z)]
    assert columns("duroxide._worker_ready") == [("sentinel", "boolean"), ("schema_version", "integer"), ("initialized_at", z)]


def test_an_instance_is_found_by_index(df: Connection) -> None:
    df.execute("INSERT INTO duroxide.instances (id, graph) SELECT lpad(to_hex(i), 8, '0'), '[]' FROM generate_series(1, 2000) i")
    df.execute("ANALYZE duroxide.instances")
    for view, name in (("df.instances", "id"), ("df.nodes", "instance_id")):
        plan = "\n".join(r[0] for r in df.execute(f"EXPLAIN SELECT * FROM {view} WHERE {name} = '00000007'"))
        assert "instances_pkey" in plan, plan


# Against the interpreter itself --------------------------------------------------------------------------------------

START = datetime(2030, 1, 1, tzinfo=UTC)


def write(player: Player, instance: str, changes: Changes) -> None:
    """Records what the interpreter decided, as the store does."""
    rows = [{"execution": r.execution, "node": r.node, "event": r.event, "result": r.result, "meta": r.meta,
             "error": None if r.error is None else {"message": r.error.message, "sqlstate": r.error.sqlstate}} for r in changes.rows]
    if changes:
        player.checkpoint(instance, *rows, p_prune=changes.prune or None, p_keep=json.dumps(changes.keep) if changes.keep else None)


def drive(player: Player, tree: dict[str, Any], choose: Callable[[int], int]) -> tuple[str, Finish | None]:
    """Runs a random workflow in a random order and returns its id and end; the instance's row is never told the end."""
    nodes = flatten(tree)
    instance = value(player.connection, "INSERT INTO duroxide.instances (id, graph) VALUES ('0a0a0a0a', %s) RETURNING id",
                     json.dumps(nodes))
    player.claim()
    run = Interpreter(instance_id=instance, label=None, graph=graph(tree), variables={}, checkpoints=[], signals=[])
    now, again, pending = START, 0, []
    changes = run.begin(now)
    for _ in range(60):
        finish = changes.finish
        write(player, instance, changes)
        if finish is not None:
            return instance, finish
        pending = [s for s in pending if s.key in run.running] + run.take_steps()
        run.take_aborts()
        if pending and choose(3):
            step = pending.pop(choose(len(pending)))
            now += timedelta(milliseconds=100)
            if step.text == "fail":
                changes = run.step_failed(step.key, StepError("no", "22012"), now, now)
            else:
                again += step.text == "again"
                result = EMPTY if step.text == "again" and again % 3 == 0 else ONE
                changes = run.step_completed(step.key, result, None, None, now, now)
        elif run.next_wake is not None:
            now = max(now, run.next_wake)
            changes = run.timers_due(now)
        else:
            changes = Changes()
    return instance, None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tree=trees(), data=st.data())
def test_the_derivation_agrees_with_the_interpreter(shared_surface: Database, tree: dict[str, Any], data: st.DataObject) -> None:
    """The root's derived end is the end that the interpreter came to, from the checkpoints alone."""
    with psycopg.connect(shared_surface.dsn()) as c:
        player = Player(c)
        instance, finish = drive(player, tree, lambda n: data.draw(st.integers(0, n - 1)))
        rows = c.execute("SELECT status, result, inferred_status FROM duroxide.node_rows(%s) ORDER BY place", (instance,)).fetchall()
        assert len(rows) == len(flatten(tree))
        status, result, inferred = rows[0]
        if finish is None:
            assert status == "running"
        elif finish.status == "completed":
            assert (status, result) == ("completed", json.loads(finish.output or ""))
        elif "outside of a loop" in (finish.output or ""):
            assert status == "completed"
        elif "df.if_rows" not in (finish.output or ""):
            assert (status, result) == ("failed", finish.output)
        assert inferred == status
        if finish is not None:
            assert "running" not in {r[2] for r in rows}
            assert "pending" not in {r[2] for r in rows}
        c.rollback()
