"""What frames have in common: outcomes, names in sight, the arms of races, and the frame itself.

A policy around nodes is one more subclass of `Frame`, with an entry in `FRAMES`. What it has to work with:

* retry: `start_child` again, with an execution path of its own for each attempt (as a loop's rounds have), so that
  checkpoints of different attempts don't meet; `wake_at` for the back-off; a checkpoint says which attempt it is;
* timeout: the child in an `Arm`, and `wake_at`; in `timer` the arm is `lost`, and `abort_lost` stops what runs in it;
* catch, compensation: `child_ended` is told of `Failed` and may start another child instead of passing it on;
* for-each: as JOIN, with an execution path for each row; child workflows: a leaf that a runner of its own does.

tests/engine/test_policies.py has the first three.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from dsl.graph import Node
from dsl.values import Result
from engine.model import Key, StepError

if TYPE_CHECKING:
    from engine.frames.loop import LoopFrame
    from engine.interpreter import Interpreter

#: JSON: [execution, node] of a leaf's checkpoint, or {"join": [ref, ...]}.
Ref = list[Any] | dict[str, Any]


class Value(Struct, frozen=True):
    """A node's result, and where it is recorded."""

    result: Result
    ref: Ref


class Done(Struct, frozen=True):
    value: Value


class Failed(Struct, frozen=True):
    error: StepError

    def behind(self, prefix: str) -> Failed:
        """The same failure as its parent reports it."""
        return Failed(replace(self.error, message=prefix + self.error.message))


class Broke(Struct, frozen=True):
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
        self.loop: LoopFrame | None = parent.inner_loop if parent is not None else None
        self.started_at: datetime | None = None

    @property
    def key(self) -> Key:
        return (self.execution, self.node.index)

    @property
    def inner_loop(self) -> LoopFrame | None:
        """The nearest loop around its children."""
        return self.loop

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


def joined(values: list[Value]) -> Value:
    """The array of several results, as a JOIN yields it."""
    return Value(Result("[" + ",".join(v.result.text for v in values) + "]"), {"join": [v.ref for v in values]})


def leaves(ref: Ref) -> list[Key]:
    """The checkpoints that a reference needs."""
    if isinstance(ref, dict):
        return [key for part in ref["join"] for key in leaves(part)]
    return [(ref[0], ref[1])]
