"""Nodes that do something by themselves: steps, waits, BREAK."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dsl.cron import next_fire
from dsl.graph import GraphError, NodeType
from dsl.substitute import SubstitutionError, break_result, step_sql
from dsl.values import Result
from engine.frames.base import Broke, Done, Failed, Frame, Value
from engine.http.variables import PlainVariables
from engine.model import Checkpoint, Inputs, Signal, Step, StepError

if TYPE_CHECKING:
    from engine.interpreter import Interpreter


class LeafFrame(Frame):
    """A node that does something by itself. Its outcome is a checkpoint."""

    __slots__ = ()

    def start(self, run: Interpreter) -> None:
        row = run.recorded(self)
        self.started_at = (row.started_at if row is not None else None) or run.now
        if self.loop is not None:
            self.loop.began_by(self.started_at)
        if row is not None and row.event == "completed":
            self.succeed(run, row.result or "null", row, row.columns)
        elif row is not None and row.event == "failed":
            run.end(self, Failed(row.error or StepError("unknown error")))
        else:
            try:
                self.act(run, row)
            except (SubstitutionError, GraphError, ValueError) as e:
                self.fail(run, StepError(str(e), "22023"))

    def act(self, run: Interpreter, row: Checkpoint | None) -> None:
        """Begins to do it; `row` is a `waiting` or `started` checkpoint of an earlier attempt."""
        raise NotImplementedError

    def complete(self, run: Interpreter, text: str, **row: Any) -> None:
        """Records and reports success."""
        run.record(self, "completed", result=text, started_at=self.started_at, **row)
        self.succeed(run, text, None, row.get("columns"))

    def succeed(self, run: Interpreter, text: str, row: Checkpoint | None, columns: Any) -> None:
        """Reports success that is recorded (`row` where it was read from the history)."""
        run.end(self, Done(Value(Result(text, columns), list(self.key))))

    def fail(self, run: Interpreter, error: StepError) -> None:
        """Records and reports failure."""
        run.record(self, "failed", error=error, started_at=self.started_at)
        run.end(self, Failed(error))


class StepFrame(LeafFrame):
    """SQL and HTTP: a runner does it."""

    __slots__ = ()

    def act(self, run: Interpreter, row: Checkpoint | None) -> None:
        text = self.node.query or ""
        meta = (row.meta if row is not None else None) or {}
        attempts = int(meta.get("attempt", 0))
        if "request" in meta:
            # `SELECT df.http(...)`, whose statement has run: what it asked for is not asked for anew.
            request = meta["request"]
            step = Step(self.key, self.node, NodeType(request["type"]), request["query"], meta={"request": request},
                        attempts=attempts)
        elif self.node.type is NodeType.SQL:
            text = step_sql(text, variables=PlainVariables(run.variables), instance_id=run.instance_id,
                            label=run.label, results=self.scope.visible())
            step = Step(self.key, self.node, self.node.type, text, attempts=attempts)
        else:
            # Filled in by the runner, which can open secret variables.
            inputs = Inputs(run.instance_id, run.label, run.variables, self.scope.visible())
            step = Step(self.key, self.node, self.node.type, text, inputs, attempts=attempts)
        run.steps.append(step)
        run.active[self.key] = self

    def succeed(self, run: Interpreter, text: str, row: Checkpoint | None, columns: Any) -> None:
        if self.loop is not None:
            self.loop.mark_worked()
        super().succeed(run, text, row, columns)


class SleepFrame(LeafFrame):
    """SLEEP: a durable timer."""

    __slots__ = ()

    def act(self, run: Interpreter, row: Checkpoint | None) -> None:
        seconds = self.node.sleep_seconds
        due = waited_until(row)
        if due is None and seconds == 0:
            self.timer(run)
            return
        if due is None:
            due = run.now + timedelta(seconds=seconds)
            run.record(self, "waiting", meta={"wake_at": due.isoformat()}, started_at=run.now)
        run.wake_at(self, due)

    def timer(self, run: Interpreter) -> None:
        self.complete(run, f'{{"slept": true, "seconds": {self.node.sleep_seconds}}}')


class ScheduleFrame(LeafFrame):
    """WAIT_SCHEDULE: till the next tick, computed when it is reached (SURFACE 5.7)."""

    __slots__ = ()

    def act(self, run: Interpreter, row: Checkpoint | None) -> None:
        expression, zone = self.node.cron
        due = waited_until(row)
        if due is None:
            due = next_fire(expression, zone, run.now)
            run.record(self, "waiting", meta={"wake_at": due.isoformat()}, started_at=run.now)
        run.wake_at(self, due)

    def timer(self, run: Interpreter) -> None:
        self.complete(run, '{"scheduled": true}')


class SignalFrame(LeafFrame):
    """SIGNAL: takes the oldest entry of that name from the inbox, or waits for one (SURFACE Part I "Running")."""

    __slots__ = ()

    def act(self, run: Interpreter, row: Checkpoint | None) -> None:
        name, timeout = self.node.signal
        signal = run.take_signal(name)
        if signal is not None:
            self.receive(run, signal)
            return
        due = waited_until(row)
        if row is None:
            due = run.now + timedelta(seconds=timeout) if timeout is not None else None
            meta = {"wake_at": due.isoformat()} if due is not None else None
            run.record(self, "waiting", meta=meta, started_at=run.now)
        run.waits.setdefault(name, []).append(self)
        if due is not None:
            run.wake_at(self, due)

    def receive(self, run: Interpreter, signal: Signal) -> None:
        """The awaited signal came."""
        run.forget_wait(self)
        run.changes.consumed.append(signal.seq)
        name = json.dumps(signal.name, ensure_ascii=False)
        self.complete(run, f'{{"signal_name":{name},"timed_out":false,"data":{signal.data or "null"}}}')

    def timer(self, run: Interpreter) -> None:
        run.forget_wait(self)
        name = json.dumps(self.node.signal[0], ensure_ascii=False)
        self.complete(run, f'{{"signal_name":{name},"timed_out":true,"data":null}}')


class BreakFrame(LeafFrame):
    """BREAK: ends the nearest loop with a value."""

    __slots__ = ()

    def act(self, run: Interpreter, row: Checkpoint | None) -> None:
        text = break_result(self.node.break_value, variables=PlainVariables(run.variables),
                            instance_id=run.instance_id, label=run.label, results=self.scope.visible())
        self.complete(run, text)

    def succeed(self, run: Interpreter, text: str, row: Checkpoint | None, columns: Any) -> None:
        run.end(self, Broke(Value(Result(text), list(self.key))))


def waited_until(row: Checkpoint | None) -> datetime | None:
    """The wake time that a `waiting` checkpoint recorded."""
    if row is None or row.meta is None or "wake_at" not in row.meta:
        return None
    return datetime.fromisoformat(row.meta["wake_at"])
