"""LOOP: rounds, their pace, and what is kept of them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dsl.truth import is_true
from dsl.values import Result
from engine.frames.base import Broke, Done, Failed, Frame, Outcome, Value, leaves
from engine.frames.compounds import JoinFrame, RaceFrame
from engine.model import Key

if TYPE_CHECKING:
    from engine.interpreter import Interpreter

#: A round that neither ran a step nor waited this long is padded to it (SURFACE Part I "Running").
PACE = timedelta(seconds=1)


class LoopFrame(Frame):
    """Rounds of body and condition (SURFACE 5.5). Slot 0 is the body, 1 the condition."""

    __slots__ = ("began", "failed", "held", "last", "round", "worked")

    @property
    def inner_loop(self) -> LoopFrame:
        return self

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


def is_below(execution: str, path: str) -> bool:
    """Whether an execution path is that loop round, or nested in it."""
    return execution == path or execution.startswith(path + "/")
