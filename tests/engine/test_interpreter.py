"""The interpreter on plain values, with a clock and runners of the test's own."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.interpreter import Changes, Checkpoint, Finish, Interpreter, Key, Signal, StepError
from tests.engine.fix_graphs import (
    Tree,
    brk,
    graph,
    if_,
    join,
    loop,
    race,
    seq,
    signal,
    sleep,
    sql,
    then,
    trees,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


def rows(*values: object) -> str:
    """A SQL result with one column, v."""
    return json.dumps({"rows": [{"v": v} for v in values], "row_count": len(values)}, separators=(",", ":"))


class World:
    """A store, a clock and a runner, all in memory; knows how to lose everything but the store."""

    def __init__(self, tree: Tree, *, history_rounds: int = 10, variables: dict[str, str] | None = None) -> None:
        self.graph = graph(tree)
        self.rounds = history_rounds
        self.variables = variables or {}
        self.now = START
        self.history: dict[Key, Checkpoint] = {}
        self.inbox: list[Signal] = []
        self.finish: Finish | None = None
        self.effects: list[tuple[Key, str]] = []
        self.pending: dict[Key, str] = {}
        self.load()

    def load(self) -> None:
        """A worker takes the instance over: all that it knows is in the store."""
        self.pending = {}
        self.run = Interpreter(instance_id="0000abcd", label="l", graph=self.graph, variables=self.variables,
                               checkpoints=self.history.values(), signals=self.inbox, history_rounds=self.rounds)
        self.commit(self.run.begin(self.now))

    def commit(self, changes: Changes) -> None:
        assert self.finish is None or not changes
        for row in changes.rows:
            self.history[row.execution, row.node] = row
        self.inbox = [s for s in self.inbox if s.seq not in changes.consumed]
        for path in changes.prune:
            for key in list(self.history):
                if (key[0] == path or key[0].startswith(path + "/")) and key not in changes.keep:
                    del self.history[key]
        self.finish = changes.finish or self.finish
        self.pending.update({step.key: step.text for step in self.run.take_steps()})
        for key in self.run.take_aborts():
            self.pending.pop(key, None)

    def result(self, key: Key, text: str) -> str | StepError:
        """What the runner makes of a step: a pure function of place and text."""
        if text == "fail":
            return StepError("boom", "P0001")
        if text == "again":
            return rows(int(re.findall(r":(\d+)", key[0])[-1]) < 3)
        if m := re.fullmatch(r"value (.*)", text):
            return rows(json.loads(m[1].replace("'", '"')))  # what substitution quoted
        return rows(f"{key[0]}#{key[1]} {text}")

    def step(self, *, lose: bool = False) -> None:
        """One event: the first pending step ends, or time passes until the next timer. `lose`: it is never recorded."""
        if self.pending:
            key, text = min(self.pending.items())
            del self.pending[key]
            outcome = self.result(key, text)
            if isinstance(outcome, StepError):
                changes = self.run.step_failed(key, outcome, self.now, self.now)
            else:
                changes = self.run.step_completed(key, outcome, None, None, self.now, self.now)
                if not lose:
                    self.effects.append((key, text))
        else:
            wake = self.run.next_wake
            assert wake is not None, "stuck"
            self.now = max(self.now, wake)
            changes = self.run.timers_due(self.now)
        if not lose:
            self.commit(changes)

    def send(self, name: str, data: str = "1") -> None:
        s = Signal(len(self.inbox) + 100 + len(self.effects), name, data)
        self.inbox.append(s)
        self.commit(self.run.signal(s, self.now))

    def to_end(self, limit: int = 10_000) -> Finish:
        for _ in range(limit):
            if self.finish is not None:
                return self.finish
            self.step()
        raise AssertionError("no end")


def end(tree: Tree, **arguments: object) -> Finish:
    return World(tree, **arguments).to_end()  # type: ignore[arg-type]


def output(tree: Tree, **arguments: object) -> object:
    finish = end(tree, **arguments)
    assert finish.status == "completed", finish
    assert finish.output is not None
    return json.loads(finish.output)


def test_if_rows_without_its_name_fails_and_says_so_on_its_node() -> None:
    rows_of = {"type": "IF", "query": '{"condition_type":"result_has_rows","result_name":"nope"}',
               "left": sql("step"), "right": sql("step")}
    world = World(join(rows_of, sql("step")))
    assert world.to_end().output == "JOIN branch 1 failed: df.if_rows: result 'nope' not found"
    assert world.history["", 1].event == "failed"


def test_a_loop_whose_last_round_failed_has_no_result_before_and_after_a_restart() -> None:
    class LastFails(World):
        def result(self, key: Key, text: str) -> str | StepError:
            return StepError("boom") if text == "body" and key[0].endswith(":3") else super().result(key, text)

    world = LastFails(loop(sql("body"), sql("again"), go_on=True))
    while world.pending != {("/0:3", 2): "again"}:
        world.step()
    world.load()
    assert world.to_end().output == "null"
    assert LastFails(loop(sql("body"), sql("again"), go_on=True)).to_end().output == "null"


def test_a_sequence_yields_its_last_result() -> None:
    assert output(seq(sql("value 1"), sql("value 2"), sql("value 3"))) == {"rows": [{"v": 3}], "row_count": 1}


def test_a_failure_skips_what_follows_and_keeps_its_fields() -> None:
    world = World(seq(sql("value 1"), sql("fail"), sql("value 3")))
    assert world.to_end() == Finish("failed", "boom", StepError("boom", "P0001"))
    assert [text for _, text in world.effects] == ["value 1"]


@pytest.mark.parametrize(("condition", "chosen"), [("true", 1), ("false", 2), ("null", 2), ('"off"', 2), ("0", 2)])
def test_if_takes_one_branch_and_records_which(condition: str, chosen: int) -> None:
    world = World(if_(sql(f"value {condition}"), sql("value 1"), sql("value 2")))
    assert json.loads(world.to_end().output or "")["rows"] == [{"v": chosen}]
    assert world.history["", 0].event == "decided"
    assert world.history["", 0].result == ("then" if chosen == 1 else "else")


def test_names_flow_forward_and_out_of_branches() -> None:
    tree = seq(sql("value 7", "x"), join(sql("value 8", "y"), sql("value $x")), sql("value [$x, $y]"))
    assert output(tree)["rows"] == [{"v": [7, 8]}]  # type: ignore[index]


def test_a_join_hands_back_only_the_names_that_a_branch_bound() -> None:
    tree = seq(sql("value 1", "x"), join(sql("value 2", "x"), sql("value $x")), sql("value $x"))
    assert output(tree)["rows"] == [{"v": 2}]  # type: ignore[index]


def test_join_results_nest_and_keep_order() -> None:
    tree = join(join(sql("value 1"), sql("value 2")), sql("value 3"), sql("value 4"))
    first, *rest = output(tree)  # type: ignore[misc]
    assert [r["rows"][0]["v"] for r in first] == [1, 2]
    assert [r["rows"][0]["v"] for r in rest] == [3, 4]


def test_a_join_ends_all_branches_and_names_every_failure() -> None:
    world = World(join(sql("fail"), seq(sql("value 1"), sql("value 2")), sql("fail")))
    finish = world.to_end()
    assert finish.output == "JOIN branch 1 failed: boom; JOIN branch 3 failed: boom"
    assert finish.error is not None
    assert finish.error.sqlstate == "P0001"
    assert [text for _, text in world.effects] == ["value 1", "value 2"]


def test_a_race_drops_the_loser_and_records_the_winner() -> None:
    world = World(seq(race(seq(sleep(5), sql("late")), sql("value 1", "w")), sql("value $w")))
    assert json.loads(world.to_end().output or "")["rows"] == [{"v": 1}]
    assert world.history["", 1] == Checkpoint("", 1, "decided", result="2")
    assert world.now == START


def test_a_running_loser_is_aborted_and_what_it_reports_is_ignored() -> None:
    world = World(race(sql("value 1"), sql("value 2")))
    assert set(world.pending) == {("", 1), ("", 2)}
    world.step()
    assert world.finish is not None
    late = world.run.step_completed(("", 2), rows(2), None, None, world.now, world.now)
    assert not late


def test_a_quick_failure_wins_a_race() -> None:
    assert end(race(sql("fail"), sleep(3))).output == "RACE left branch failed: boom"


def test_loops_count_rounds_keep_names_and_return_the_last_body() -> None:
    world = World(seq(loop(sql("step", "x"), sql("again"), "l"), sql("value [$x, $l]")))
    assert json.loads(world.to_end().output or "")["rows"] == [{"v": ["/1:3#2 step", "/1:3#2 step"]}]
    assert world.history["", 1].event == "round"
    assert world.history["", 1].meta is not None
    assert world.history["", 1].meta["round"] == 3


def test_a_loop_of_sql_steps_is_not_paced_but_an_empty_one_is() -> None:
    busy, empty = World(loop(sql("step"), sql("again"))), World(loop(seq(sleep(0), sleep(0)), None))
    busy.to_end()
    assert busy.now == START
    for _ in range(5):
        empty.step()
    assert empty.now == START + 5 * timedelta(seconds=1)


def test_a_break_ends_the_nearest_loop_through_everything_between() -> None:
    inner = loop(join(seq(sql("step"), brk("x")), sql("step")))
    assert output(seq(loop(then(inner, brk()), None, "l"), sql("value 1")))
    assert output(loop(then(inner, brk("outer")))) == "outer"
    assert output(inner) == "x"


def test_a_break_outside_a_loop_fails() -> None:
    assert (end(seq(sql("step"), brk())).output or "").startswith("df.break() was called outside of a loop.")


def test_a_failing_round_fails_the_loop_or_is_survived() -> None:
    assert end(seq(sql("step"), loop(sql("fail")))).output == "Loop sub-orchestration failed: boom"
    assert end(loop(sql("fail"))).output == "boom"
    world = World(loop(sql("fail"), sql("again"), go_on=True))
    assert world.to_end().status == "completed"
    assert [text for _, text in world.effects] == ["again"] * 3
    assert world.now == START + 2 * PACE_OF_FAILURE


PACE_OF_FAILURE = timedelta(seconds=1)


def test_finished_rounds_are_pruned_but_names_survive_it() -> None:
    tree = loop(if_(sql("value null"), sql("step"), sql("step", "x")), None)
    world = World(then(sql("value 0", "first"), tree), history_rounds=3)
    for _ in range(400):
        world.step()
    assert world.run.running
    assert len(world.history) < 30
    world.load()
    assert world.run.running == set(world.pending)


def test_a_row_held_by_a_name_goes_when_the_name_is_bound_anew() -> None:
    class Rebinding(World):
        def result(self, key: Key, text: str) -> str | StepError:
            number = int(re.findall(r":(\d+)", key[0])[-1])
            return rows(number % 20 == 0) if text == "twentieth" else super().result(key, text)

    world = Rebinding(loop(if_(sql("twentieth"), sql("bind", "x"), sql("step"))), history_rounds=2)
    sizes = []
    for _ in range(1000):
        world.step()
        sizes.append(len(world.history))
    assert max(sizes) < 20
    world.load()
    assert world.pending


def test_a_wait_takes_the_oldest_signal_and_one_signal_wakes_one_wait() -> None:
    world = World(join(signal("go"), signal("go"), signal("stop", 5)))
    world.send("go", '{"n":1}')
    assert world.run.waiting_for == {"go", "stop"}
    world.send("go", "2")
    world.to_end()
    assert world.finish is not None
    data = [(r["data"], r["timed_out"]) for r in json.loads(world.finish.output or "")]
    assert data == [({"n": 1}, False), (2, False), (None, True)]
    assert world.now == START + timedelta(seconds=5)


def test_a_signal_sent_early_is_kept_for_its_wait() -> None:
    world = World(seq(sql("step"), signal("go"), signal("go")))
    world.send("go", "1")
    world.load()
    world.step()
    assert world.run.waiting_for == {"go"}
    world.send("go", "2")
    assert json.loads(world.to_end().output or "")["data"] == 2


def test_timers_go_on_from_where_they_were() -> None:
    world = World(seq(sleep(10), sql("step")))
    world.now += timedelta(seconds=7)
    world.load()
    assert world.run.next_wake == START + timedelta(seconds=10)


def test_cancel_stops_what_runs_and_says_so_on_its_nodes() -> None:
    world = World(join(sql("step"), sleep(60), signal("go"), seq(sql("step"), sql("never"))))
    changes = world.run.cancel("enough", world.now)
    assert changes.finish == Finish("cancelled", "canceled: enough", StepError("canceled: enough", "57014"))
    assert {(r.node, r.event) for r in changes.rows} == {(1, "failed"), (2, "failed"), (3, "failed"), (5, "failed")}
    assert len(world.run.take_aborts()) == 2


def test_hand_made_configuration_fails_its_node_alone() -> None:
    world = World(join({"type": "SLEEP", "query": "soon"}, sql("step")))
    finish = world.to_end()
    assert finish.status == "failed"
    assert (finish.output or "").startswith("JOIN branch 1 failed: ")
    assert len(world.effects) == 1


def test_nesting_is_not_recursion() -> None:
    tree = sql("step")
    for n in range(250):
        tree = then(tree, sql(f"value {n}"))
    assert output(tree)["rows"] == [{"v": 249}]  # type: ignore[index]


@settings(max_examples=300, deadline=None)
@given(trees(), st.data())
def test_losing_the_worker_at_any_moment_changes_nothing(tree: Tree, data: st.DataObject) -> None:
    """However often memory is lost, before or after a commit, the end, the effects and the history are the same."""
    quiet, stormy = World(tree, variables={"v": "1"}), World(tree, variables={"v": "1"})
    quiet.to_end()
    for _ in range(2000):
        if stormy.finish is not None:
            break
        crash = data.draw(st.sampled_from(["no", "no", "before", "after"]))
        stormy.step(lose=crash == "before")
        if crash != "no" and stormy.finish is None:
            stormy.load()
    assert stormy.finish == quiet.finish
    assert len(set(stormy.effects)) == len(stormy.effects), "a step took effect twice"
    assert sorted(stormy.effects) == sorted(quiet.effects)
    assert {k: (r.event, r.result) for k, r in stormy.history.items()} == \
        {k: (r.event, r.result) for k, r in quiet.history.items()}
