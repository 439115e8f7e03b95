"""THEN, IF, JOIN and RACE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from dsl.truth import is_true
from dsl.values import Result
from engine.frames.base import Arm, Broke, Done, Failed, Frame, Outcome, Scope, Value, joined
from engine.model import StepError

if TYPE_CHECKING:
    from engine.interpreter import Interpreter


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


def row_count(result: Result) -> int | None:
    """The number of rows of a SQL result; None for a result of another kind."""
    value = result.value
    return int(str(value["row_count"])) if isinstance(value, dict) and "row_count" in value else None
