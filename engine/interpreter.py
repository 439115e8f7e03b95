"""The interpreter: a pure walk of a workflow's graph over its checkpoints.

State and events go in, decisions come out (`Changes` to record, `Step`s to run, a time to wake at). It does no I/O
and has no clock: every call is told the time. Recovery is the ordinary walk: a leaf that has a checkpoint yields it,
the first without one runs. There is nothing to replay in order, hence nothing that a change of code could make
non-deterministic.

Each node that is under way has a *frame*; frames form a tree through `parent`. A frame is started once, may be told the
outcomes of its children, and ends with one outcome. All calls between frames go through a queue, so that depth of
nesting is not depth of recursion. A policy around nodes (retry, timeout, catch) is one more frame class.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from dsl.cron import next_fire
from dsl.graph import Graph, GraphError, Node, NodeType
from dsl.substitute import SubstitutionError, break_result, step_sql
from dsl.truth import is_true
from dsl.values import Result
from engine.http.variables import PlainVariables
from engine.model import Changes, Checkpoint, Finish, Inputs, Key, Signal, Step, StepError

__all__ = ["Changes", "Checkpoint", "Finish", "Interpreter", "Key", "Signal", "Step", "StepError"]

#: A round that neither ran a step nor waited this long is padded to it (SURFACE Part I "Running").
PACE = timedelta(seconds=1)
BREAK_OUTSIDE = "df.break() was called outside of a loop. df.break() may only be used inside df.loop()."

#: JSON: [execution, node] of a leaf's checkpoint, or {"join": [ref, ...]}.
Ref = list[Any] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Value:
    """A node's result, and where it is recorded."""

    result: Result
    ref: Ref


@dataclass(frozen=True, slots=True)
class Done:
    value: Value


@dataclass(frozen=True, slots=True)
class Failed:
    error: StepError

    def behind(self, prefix: str) -> Failed:
        """The same failure as its parent reports it."""
        return Failed(replace(self.error, message=prefix + self.error.message))


@dataclass(frozen=True, slots=True)
class Broke:
    """A df.break on its way to the nearest loop."""

    value: Value


Outcome = Done | Failed | Broke


class Scope:
    """Named results. A JOIN or RACE branch has a scope of its own, whose names its parent takes over at the end."""

    __slots__ = ("names", "parent")

    def __init__(self, parent: Scope | None) -> None:
        self.parent = parent
        self.names: dict[str, Value] = {}

    def visible(self) -> dict[str, Result]:
        """Every name in sight, the innermost binding winning."""
        chain = []
        scope: Scope | None = self
        while scope is not None:
            chain.append(scope)
            scope = scope.parent
        return {name: value.result for s in reversed(chain) for name, value in s.names.items()}


class Arm:
    """One branch of a RACE: `lost` once another has won. Everything below asks it before acting."""

    __slots__ = ("lost", "parent")

    def __init__(self, parent: Arm | None) -> None:
        self.parent = parent
        self.lost = False

    def is_lost(self) -> bool:
        arm: Arm | None = self
        while arm is not None:
            if arm.lost:
                return True
            arm = arm.parent
        return False


class Frame:
    """A node under way. `slot` is what its parent knows it by."""

    __slots__ = ("arm", "execution", "loop", "node", "parent", "scope", "slot", "started_at")

    def __init__(self, node: Node, execution: str, parent: Frame | None, slot: int, scope: Scope,
                 arm: Arm | None) -> None:
        self.node = node
        self.execution = execution
        self.parent = parent
        self.slot = slot
        self.scope = scope
        self.arm = arm
        self.loop: LoopFrame | None = None
        if parent is not None:
            self.loop = parent if isinstance(parent, LoopFrame) else parent.loop
        self.started_at: datetime | None = None

    @property
    def key(self) -> Key:
        return (self.execution, self.node.index)

    def start(self, run: Interpreter) -> None:
        """Begins; may end at once."""
        raise NotImplementedError

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        """Hears how the child in `slot` ended."""
        raise NotImplementedError

    def timer(self, run: Interpreter) -> None:
        """The time that it asked to be woken at has come."""
        raise NotImplementedError


#: When, (place in the graph, serial number), who.
Timer = tuple[datetime, tuple[int, int], Frame]


class ThenFrame(Frame):
    """Left, then right; failure or break on the left skips the right (SURFACE 5.3)."""

    __slots__ = ()

    def start(self, run: Interpreter) -> None:
        run.start_child(self, self.node.left, 0)

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        if slot == 0 and isinstance(outcome, Done):
            run.start_child(self, self.node.right, 1)
        else:
            run.end(self, outcome)


class IfFrame(Frame):
    """Condition, then one branch (SURFACE 5.4). Slot 0 is the condition, 1 the chosen branch."""

    __slots__ = ()

    def start(self, run: Interpreter) -> None:
        if self.node.condition is not None:
            run.start_child(self, self.node.condition, 0)
            return
        name = self.node.if_rows_name or ""
        result = self.scope.visible().get(name)
        if result is None:
            self._fail(run, f"df.if_rows: result '{name}' not found")
        elif (count := row_count(result)) is None:
            self._fail(run, f"df.if_rows: result '{name}' is not a SQL result (missing row_count)")
        else:
            self._choose(run, count > 0)

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        if slot == 0 and isinstance(outcome, Done):
            self._choose(run, is_true(outcome.value.result))
        else:
            run.end(self, outcome)

    def _fail(self, run: Interpreter, message: str) -> None:
        error = StepError(message, "22023")
        run.record(self, "failed", error=error)
        run.end(self, Failed(error))

    def _choose(self, run: Interpreter, truth: bool) -> None:
        recorded = run.recorded(self, "decided")
        if recorded is not None:
            truth = recorded.result == "then"
        else:
            run.record(self, "decided", result="then" if truth else "else")
        run.start_child(self, self.node.left if truth else self.node.right, 1)


class JoinFrame(Frame):
    """All branches start together and all finish; then the outcome is formed in branch order (SURFACE 5.9)."""

    __slots__ = ("branches", "outcomes", "scopes")

    def start(self, run: Interpreter) -> None:
        self.branches = [i for i in (self.node.left, self.node.right, *self.node.extras) if i is not None]
        self.outcomes: dict[int, Outcome] = {}
        self.scopes = [Scope(self.scope) for _ in self.branches]
        for slot, index in enumerate(self.branches):
            run.start_child(self, index, slot, scope=self.scopes[slot])

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        self.outcomes[slot] = outcome
        if len(self.outcomes) < len(self.branches):
            return
        failures: list[StepError] = []
        values: list[Value] = []
        for n, scope in enumerate(self.scopes):
            match self.outcomes[n]:
                case Broke() as broke if not failures:
                    self.scope.names.update(scope.names)
                    run.end(self, broke)
                    return
                case Failed() as failed:
                    failures.append(failed.behind(f"JOIN branch {n + 1} failed: ").error)
                case Done(value):
                    values.append(value)
                    if not failures:
                        self.scope.names.update(scope.names)
        if failures:
            run.end(self, Failed(replace(failures[0], message="; ".join(e.message for e in failures))))
        else:
            run.end(self, Done(joined(values)))


class RaceFrame(Frame):
    """The first branch to finish decides, be it success, failure or break (SURFACE 5.10)."""

    __slots__ = ("arms", "over", "scopes")

    def start(self, run: Interpreter) -> None:
        branches = [i for i in (self.node.left, self.node.right, *self.node.extras) if i is not None]
        self.over = False
        self.scopes = [Scope(self.scope) for _ in branches]
        self.arms = [Arm(self.arm) for _ in branches]
        recorded = run.recorded(self, "decided")
        winner = int(recorded.result or "0") - 1 if recorded is not None else None
        for slot, index in enumerate(branches):
            # A race that is decided has checkpoints for all of its winner's path: the losers are not looked at.
            if winner is None or slot == winner:
                run.start_child(self, index, slot, scope=self.scopes[slot], arm=self.arms[slot])

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        if self.over:
            return
        self.over = True
        if run.recorded(self, "decided") is None:
            run.record(self, "decided", result=str(slot + 1))
        for n, arm in enumerate(self.arms):
            arm.lost = n != slot
        run.abort_lost()
        self.scope.names.update(self.scopes[slot].names)
        if isinstance(outcome, Failed):
            sides = ("left branch", "right branch")
            side = sides[slot] if len(self.arms) == 2 else f"branch {slot + 1}"
            outcome = outcome.behind(f"RACE {side} failed: ")
        run.end(self, outcome)


class LoopFrame(Frame):
    """Rounds of body and condition (SURFACE 5.5). Slot 0 is the body, 1 the condition."""

    __slots__ = ("began", "failed", "held", "last", "round", "worked")

    def start(self, run: Interpreter) -> None:
        self.round = 1
        self.began = run.now
        self.held: set[str] = set()
        self.last: Value | None = None
        self.worked = self.failed = False
        recorded = run.recorded(self, "round")
        if recorded is None:
            self._body(run)
            return
        meta = recorded.meta or {}
        self.round = int(meta["round"])
        self.began = datetime.fromisoformat(meta["began"])
        self.held = set(meta.get("held", ()))
        for name, ref in meta.get("names", {}).items():
            self.scope.names[name] = run.resolve(ref)
        if "paced" in meta:
            run.wake_at(self, self.began)
        else:
            self._body(run)

    def timer(self, run: Interpreter) -> None:
        self._body(run)

    def path(self, number: int) -> str:
        """The execution path of a round's nodes."""
        return f"{self.execution}/{self.node.index}:{number}"

    def mark_worked(self) -> None:
        """A SQL or HTTP step ran in this round: it needs no pace, nor do the rounds around it."""
        loop: LoopFrame | None = self
        while loop is not None and not loop.worked:
            loop.worked = True
            loop = loop.loop

    def began_by(self, moment: datetime) -> None:
        """A checkpoint shows that this round, and the ones around it, had begun by then (round 1 is not recorded)."""
        loop: LoopFrame | None = self
        while loop is not None and moment < loop.began:
            loop.began = moment
            loop = loop.loop

    def _body(self, run: Interpreter) -> None:
        self.worked = self.failed = False
        run.start_child(self, self.node.left, 0, execution=self.path(self.round))

    def child_ended(self, run: Interpreter, slot: int, outcome: Outcome) -> None:
        if isinstance(outcome, Broke):
            run.end(self, Done(outcome.value))
            return
        if isinstance(outcome, Failed) and not self.node.continue_on_failure:
            inline = self.parent is None or isinstance(self.parent, (JoinFrame, RaceFrame))
            run.end(self, outcome if inline else outcome.behind("Loop sub-orchestration failed: "))
            return
        self.failed = self.failed or isinstance(outcome, Failed)
        if slot == 0:
            # Of a failed round nothing is kept: what a worker remembers must not differ from what it could read again.
            self.last = outcome.value if isinstance(outcome, Done) else None
            if self.node.condition is not None:
                run.start_child(self, self.node.condition, 1, execution=self.path(self.round))
                return
        elif isinstance(outcome, Done) and not is_true(outcome.value.result):
            run.end(self, Done(self.last if self.last is not None else Value(Result("null"), list(self.key))))
            return
        self._next_round(run)

    def _next_round(self, run: Interpreter) -> None:
        # A failing round must not spin either.
        paced = (self.failed or not self.worked) and run.now - self.began < PACE
        due = self.began + PACE if paced else run.now
        names = {name: value.ref for name, value in self.scope.names.items()}
        referenced = {key for ref in names.values() for key in leaves(ref)}
        self._prune(run, referenced)
        self.round += 1
        self.began = due
        meta: dict[str, Any] = {"round": self.round, "began": due.isoformat(), "names": names}
        if paced:
            meta["paced"] = True
        if self.held:
            meta["held"] = sorted(self.held)
        run.record(self, "round", meta=meta)
        if paced:
            run.wake_at(self, due)
        else:
            self._body(run)

    def _prune(self, run: Interpreter, referenced: set[Key]) -> None:
        """Lets go of the round that leaves the window, and of older ones of which a name still held a row till now."""
        candidates = set(self.held)
        if (old := self.round - run.history_rounds) >= 1:
            candidates.add(self.path(old))
        self.held = {path for path in candidates if any(is_below(execution, path) for execution, _ in referenced)}
        # What a name holds stays, but the rest of its round goes: once, when the round leaves the window.
        again = self.held - ({self.path(old)} if old >= 1 else set())
        run.changes.prune += sorted(candidates - again)
        run.changes.keep += sorted(key for key in referenced if any(is_below(key[0], path) for path in candidates))


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


FRAMES: dict[NodeType, type[Frame]] = {
    NodeType.THEN: ThenFrame, NodeType.IF: IfFrame, NodeType.JOIN: JoinFrame, NodeType.RACE: RaceFrame,
    NodeType.LOOP: LoopFrame, NodeType.BREAK: BreakFrame, NodeType.SLEEP: SleepFrame,
    NodeType.WAIT_SCHEDULE: ScheduleFrame, NodeType.SIGNAL: SignalFrame, NodeType.SQL: StepFrame,
    NodeType.HTTP: StepFrame, NodeType.HTTP_MULTIPART: StepFrame,
}


class Interpreter:
    """One instance under way.

    Each event method returns the `Changes` that must be recorded. What `take_steps` hands out afterwards may begin only
    once they are committed. If a commit fails, the interpreter is ahead of the database: drop it and load the instance
    again. Attributes that frames use (`now`, `changes`, `steps`, `active`, `waits`) are not for callers.
    """

    def __init__(self, *, instance_id: str, label: str | None, graph: Graph, variables: Mapping[str, str],
                 checkpoints: Iterable[Checkpoint], signals: Iterable[Signal], history_rounds: int = 10) -> None:
        self.instance_id = instance_id
        self.label = label
        self.graph = graph
        self.variables = variables
        self.history_rounds = history_rounds
        self.now: datetime
        self.changes = Changes()
        self.steps: list[Step] = []
        self.active: dict[Key, Frame] = {}
        self.waits: dict[str, list[SignalFrame]] = {}
        self.finished = False
        self._history = {(c.execution, c.node): c for c in checkpoints}
        self._inbox: dict[str, deque[Signal]] = {}
        for signal in sorted(signals, key=lambda s: s.seq):
            self._inbox.setdefault(signal.name, deque()).append(signal)
        self._aborts: list[Key] = []
        self._timers: list[Timer] = []
        self._timed: dict[int, tuple[datetime, tuple[int, int]]] = {}
        self._tie = itertools.count()
        self._todo: deque[tuple[Frame, Frame | None, Outcome | None]] = deque()

    # -- events ------------------------------------------------------------------------------------------------

    def begin(self, now: datetime) -> Changes:
        """Walks from the root over the checkpoints; call once, first."""
        self.now = now
        root = self.graph.nodes[0]
        self._todo.append((FRAMES[root.type](root, "", None, 0, Scope(None), None), None, None))
        self._drain()
        self._fire_due()
        changes = self._settle()
        # The walk has taken what it needs into frames and names; results may be large.
        self._history.clear()
        return changes

    def step_completed(self, key: Key, result: str, columns: Any, meta: Mapping[str, Any] | None,
                       started_at: datetime, now: datetime) -> Changes:
        """A runner finished a step; `result` is the engine's JSON text. No effect on a step that was aborted."""
        self.now = now
        frame = self.active.pop(key, None)
        if isinstance(frame, LeafFrame):
            frame.started_at = started_at
            frame.complete(self, result, columns=columns, meta=meta)
        return self._settle()

    def step_failed(self, key: Key, error: StepError, started_at: datetime, now: datetime) -> Changes:
        """A runner gave a step up. No effect on a step that was aborted."""
        self.now = now
        frame = self.active.pop(key, None)
        if isinstance(frame, LeafFrame):
            frame.started_at = started_at
            frame.fail(self, error)
        return self._settle()

    def timers_due(self, now: datetime) -> Changes:
        """Fires every timer whose time has come, earliest first."""
        self.now = now
        self._fire_due()
        return self._settle()

    def signal(self, signal: Signal, now: datetime) -> Changes:
        """A signal arrived: it wakes the wait that has waited longest for its name, or stays in the inbox."""
        self.now = now
        waiting = self.waits.get(signal.name)
        if waiting:
            frame = waiting[0]
            frame.receive(self, signal)
        else:
            self._inbox.setdefault(signal.name, deque()).append(signal)
        return self._settle()

    def cancel(self, reason: str, now: datetime) -> Changes:
        """Ends the instance; whatever runs or waits is recorded as failed."""
        self.now = now
        error = StepError(f"canceled: {reason}", "57014")
        waiting = [entry[2] for entry in self._timers if self._is_current(entry)]
        waiting += [frame for frames in self.waits.values() for frame in frames]
        for frame in dict.fromkeys([*self.active.values(), *waiting]):
            if isinstance(frame, LeafFrame):
                self.record(frame, "failed", error=error, started_at=frame.started_at)
        self._aborts += self.active
        self.active.clear()
        self._finish(Finish("cancelled", error.message, error))
        return self._settle()

    # -- what follows ------------------------------------------------------------------------------------------

    def take_steps(self) -> list[Step]:
        """The steps that became runnable, each handed out once, in the order in which they were reached."""
        steps = [step for step in self.steps if step.key in self.active]
        self.steps = []
        return steps

    def take_aborts(self) -> list[Key]:
        """Steps handed out earlier that must stop: their race is lost, or the instance is cancelled."""
        aborts, self._aborts = self._aborts, []
        return aborts

    @property
    def running(self) -> frozenset[Key]:
        """Steps that are handed out, or about to be, and not yet reported on."""
        return frozenset(self.active)

    @property
    def next_wake(self) -> datetime | None:
        """When `timers_due` must be called next."""
        while self._timers and not self._is_current(self._timers[0]):
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    @property
    def waiting_for(self) -> frozenset[str]:
        """Names of signals that are awaited."""
        return frozenset(name for name, frames in self.waits.items() if frames)

    # -- for frames --------------------------------------------------------------------------------------------

    def start_child(self, parent: Frame, index: int | None, slot: int, *, execution: str | None = None,
                    scope: Scope | None = None, arm: Arm | None = None) -> None:
        """Starts a child; it inherits path, names and race arm unless told otherwise."""
        if index is None:
            raise GraphError(f"{parent.node.type} node {parent.node.id} lacks a child")
        node = self.graph.nodes[index]
        child = FRAMES[node.type](node, parent.execution if execution is None else execution, parent, slot,
                                  scope or parent.scope, arm or parent.arm)
        self._todo.append((child, None, None))

    def end(self, frame: Frame, outcome: Outcome) -> None:
        """Reports how a frame ended to its parent; binds its name first."""
        if isinstance(outcome, Done) and frame.node.name is not None:
            frame.scope.names[frame.node.name] = outcome.value
        if frame.parent is not None:
            # Before any start that is still queued: a race that is decided must not let its other branch begin.
            self._todo.appendleft((frame.parent, frame, outcome))
            return
        match outcome:
            case Done(value):
                self._finish(Finish("completed", value.result.text))
            case Failed(error):
                self._finish(Finish("failed", error.message, error))
            case Broke():
                self._finish(Finish("failed", BREAK_OUTSIDE, StepError(BREAK_OUTSIDE, "42601")))

    def record(self, frame: Frame, event: str, **fields: Any) -> None:
        """Adds a checkpoint to the current changes."""
        self.changes.rows.append(Checkpoint(frame.execution, frame.node.index, event, **fields))

    def recorded(self, frame: Frame, event: str | None = None) -> Checkpoint | None:
        """The frame's checkpoint from before `begin`, if there is one (of that kind)."""
        row = self._history.get(frame.key)
        return row if row is not None and event in (None, row.event) else None

    def resolve(self, ref: Ref) -> Value:
        """The value that a reference names. Raises GraphError if its checkpoint is missing."""
        if isinstance(ref, dict):
            return joined([self.resolve(part) for part in ref["join"]])
        row = self._history.get((ref[0], ref[1]))
        if row is None:
            raise GraphError(f"checkpoint {ref} of instance {self.instance_id} is missing")
        return Value(Result(row.result or "null", row.columns), ref)

    def wake_at(self, frame: Frame, due: datetime) -> None:
        """Asks for `frame.timer` at that time."""
        # Of two that are due together the one further left in the graph goes first, also after a restart.
        place = (frame.node.index, next(self._tie))
        self._timed[id(frame)] = (due, place)
        heapq.heappush(self._timers, (due, place, frame))

    def take_signal(self, name: str) -> Signal | None:
        """Takes the oldest entry of that name out of the inbox."""
        entries = self._inbox.get(name)
        return entries.popleft() if entries else None

    def forget_wait(self, frame: SignalFrame) -> None:
        """Takes a frame off the waits and timers."""
        frames = self.waits.get(frame.node.signal[0], [])
        if frame in frames:
            frames.remove(frame)
        self._timed.pop(id(frame), None)

    def abort_lost(self) -> None:
        """Drops whatever runs or waits in an arm that has lost."""
        for key, frame in list(self.active.items()):
            if frame.arm is not None and frame.arm.is_lost():
                del self.active[key]
                self._aborts.append(key)
        for frames in self.waits.values():
            frames[:] = [f for f in frames if f.arm is None or not f.arm.is_lost()]
        for entry in self._timers:
            if entry[2].arm is not None and entry[2].arm.is_lost():
                self._timed.pop(id(entry[2]), None)

    # -- inside ------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        while self._todo and not self.finished:
            frame, child, outcome = self._todo.popleft()
            if frame.arm is not None and frame.arm.is_lost():
                continue
            try:
                if child is None or outcome is None:
                    frame.start(self)
                else:
                    frame.child_ended(self, child.slot, outcome)
            except GraphError as e:  # hand-made configuration that only shows when it is reached
                self.end(frame, Failed(StepError(str(e), "22023")))

    def _fire_due(self) -> None:
        while self._timers and (self._timers[0][0] <= self.now or not self._is_current(self._timers[0])):
            entry = heapq.heappop(self._timers)
            if self._is_current(entry):
                frame = entry[2]
                del self._timed[id(frame)]
                frame.timer(self)
                self._drain()

    def _settle(self) -> Changes:
        self._drain()
        changes, self.changes = self.changes, Changes()
        return changes

    def _finish(self, finish: Finish) -> None:
        self.finished = True
        self.changes.finish = finish
        self.steps.clear()
        self._timers.clear()
        self._timed.clear()
        self.waits.clear()

    def _is_current(self, entry: Timer) -> bool:
        return self._timed.get(id(entry[2])) == entry[:2]


def joined(values: list[Value]) -> Value:
    """The array of several results, as a JOIN yields it."""
    return Value(Result("[" + ",".join(v.result.text for v in values) + "]"), {"join": [v.ref for v in values]})


def row_count(result: Result) -> int | None:
    """The number of rows of a SQL result; None for a result of another kind."""
    value = result.value
    return int(str(value["row_count"])) if isinstance(value, dict) and "row_count" in value else None


def leaves(ref: Ref) -> list[Key]:
    """The checkpoints that a reference needs."""
    if isinstance(ref, dict):
        return [key for part in ref["join"] for key in leaves(part)]
    return [(ref[0], ref[1])]


def is_below(execution: str, path: str) -> bool:
    """Whether an execution path is that loop round, or nested in it."""
    return execution == path or execution.startswith(path + "/")


def waited_until(row: Checkpoint | None) -> datetime | None:
    """The wake time that a `waiting` checkpoint recorded."""
    if row is None or row.meta is None or "wake_at" not in row.meta:
        return None
    return datetime.fromisoformat(row.meta["wake_at"])
