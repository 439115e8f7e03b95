"""The interpreter: a pure walk of a workflow's graph over its checkpoints.

State and events go in, decisions come out (`Changes` to record, `Step`s to run, a time to wake at). It does no I/O
and has no clock: every call is told the time. Recovery is the ordinary walk: a leaf that has a checkpoint yields it,
the first without one runs. There is nothing to replay in order, hence nothing that a change of code could make
non-deterministic.

Each node that is under way has a *frame*; frames form a tree through `parent`. A frame is started once, may be told the
outcomes of its children, and ends with one outcome. All calls between frames go through a queue, so that depth of
nesting is not depth of recursion. A policy around nodes (retry, timeout, catch) is one more class of frames
(engine/frames/base.py).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from dsl.graph import Graph, GraphError
from dsl.values import Result
from engine.frames import FRAMES
from engine.frames.base import Arm, Broke, Done, Failed, Frame, Outcome, Ref, Scope, Timer, Value, joined
from engine.frames.leaves import LeafFrame, SignalFrame
from engine.model import Changes, Checkpoint, Finish, Key, Signal, Step, StepError

__all__ = ["Changes", "Checkpoint", "Finish", "Interpreter", "Key", "Signal", "Step", "StepError"]

BREAK_OUTSIDE = "df.break() was called outside of a loop. df.break() may only be used inside df.loop()."


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
        self.forget_timer(frame)

    def forget_timer(self, frame: Frame) -> None:
        """Takes a frame off the timers."""
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
