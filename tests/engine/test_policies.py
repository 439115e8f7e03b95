"""Policies around nodes need no change of the interpreter: retry, timeout and catch as frames of the test's own.

They stand in for node types that there are (LOOP has one child, JOIN two), and must survive a worker's loss at any moment.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from dsl.graph import NodeType
from engine.frames import FRAMES
from engine.frames.base import Arm, Failed, Frame, Outcome
from engine.interpreter import Finish, Interpreter, StepError
from engine.model import Key
from tests.engine.fix_graphs import Tree, join, loop, seq, sleep, sql
from tests.engine.test_interpreter import START, World


class RetryFrame(Frame):
    """Up to three attempts, with a back-off that doubles."""

    __slots__ = ("attempt",)

    def start(self, run: Interpreter) -> None:
        row = run.recorded(self, "round")
        self.attempt = int((row.meta or {})["round"]) if row is not None else 1
        if row is None:
            self._try(run)
        else:
            run.wake_at(self, datetime.fromisoformat((row.meta or {})["began"]))

    def _try(self, run: Interpreter) -> None:
        run.start_child(self, self.node.left, 0, execution=f"{self.execution}/{self.node.index}:{self.attempt}")

    def timer(self, run: Interpreter) -> None:
        self._try(run)

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        if not isinstance(outcome, Failed) or self.attempt == 3:
            run.end(self, outcome)
            return
        due = run.now + timedelta(seconds=2 ** self.attempt)
        self.attempt += 1
        run.record(self, "round", meta={"round": self.attempt, "began": due.isoformat()})
        run.wake_at(self, due)


class TimeoutFrame(Frame):
    """Ten seconds for its child."""

    __slots__ = ("inner",)

    def start(self, run: Interpreter) -> None:
        row = run.recorded(self)
        if row is not None and row.event == "failed":
            run.end(self, Failed(row.error or StepError("?")))
            return
        due = datetime.fromisoformat((row.meta or {})["wake_at"]) if row is not None else run.now + timedelta(seconds=10)
        if row is None:
            run.record(self, "waiting", meta={"wake_at": due.isoformat()})
        self.inner = Arm(self.arm)
        run.wake_at(self, due)
        run.start_child(self, self.node.left, 0, arm=self.inner)

    def timer(self, run: Interpreter) -> None:
        self.inner.lost = True
        run.abort_lost()
        error = StepError("too late", "57014")
        run.record(self, "failed", error=error)
        run.end(self, Failed(error))

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        run.forget_timer(self)
        run.end(self, outcome)


class CatchFrame(Frame):
    """Its right child instead of a left one that fails."""

    __slots__ = ()

    def start(self, run: Interpreter) -> None:
        run.start_child(self, self.node.left, 0)

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        if slot == 0 and isinstance(outcome, Failed):
            run.start_child(self, self.node.right, 1)
        else:
            run.end(self, outcome)


class Moody(World):
    """`third time` fails twice; memory is lost after each event if `forgetful`."""

    def __init__(self, tree: Tree, *, forgetful: bool) -> None:
        self.tries = 0
        super().__init__(tree)
        self.forgetful = forgetful

    def result(self, key: Key, text: str) -> str | StepError:
        if text == "third time":
            self.tries += 1
            return '"well"' if self.tries == 3 else StepError("not yet")
        return super().result(key, text)

    def run_on(self) -> Finish:
        while self.finish is None:
            self.step()
            if self.forgetful and self.finish is None:
                self.load()
        return self.finish


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> dict[NodeType, type[Frame]]:
    monkeypatch.setitem(FRAMES, NodeType.JOIN, CatchFrame)
    return FRAMES


@pytest.mark.parametrize("forgetful", [False, True])
def test_retry(policies: dict[NodeType, Any], monkeypatch: pytest.MonkeyPatch, forgetful: bool) -> None:
    monkeypatch.setitem(policies, NodeType.LOOP, RetryFrame)
    world = Moody(seq(loop(seq(sql("first"), sql("third time"))), sql("after")), forgetful=forgetful)
    assert world.run_on().status == "completed"
    assert world.now - START == timedelta(seconds=2 + 4)
    assert [text for _, text in world.effects] == ["first"] * 3 + ["third time", "after"]
    assert Moody(loop(sql("fail")), forgetful=forgetful).run_on() == Finish("failed", "boom", StepError("boom", "P0001"))


@pytest.mark.parametrize("forgetful", [False, True])
def test_catch_a_timeout(policies: dict[NodeType, Any], monkeypatch: pytest.MonkeyPatch, forgetful: bool) -> None:
    monkeypatch.setitem(policies, NodeType.LOOP, TimeoutFrame)
    for seconds, done in ((5, ["before", "within"]), (15, ["before", "instead"])):
        world = Moody(join(loop(seq(sql("before"), seq(sleep(seconds), sql("within")))), sql("instead")), forgetful=forgetful)
        assert world.run_on().status == "completed"
        assert [text for _, text in world.effects] == done
        assert world.now - START == timedelta(seconds=min(seconds, 10))
