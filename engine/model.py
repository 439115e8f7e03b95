"""The plain values that interpreter, store and runners exchange: no behaviour, no I/O.

They are structs of msgspec, here and wherever values are made for each step: a frozen dataclass of eight fields takes
several times as long to make.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from msgspec import Struct, field
from msgspec.structs import force_setattr

from dsl.graph import Node, NodeType
from dsl.values import Column, Result

#: Where a result belongs: (execution path, node index). See docs/architecture.md, "Checkpoints".
Key = tuple[str, int]

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(text: str) -> str:
    """A text for people, with what neither PostgreSQL nor a log can hold replaced."""
    return _UNSTORABLE.sub("\ufffd", text)


class StepError(Struct, frozen=True):
    """Why a node failed: the fields of a PostgreSQL error, or a message of the engine's own.

    What a PostgreSQL text can't hold is replaced: an error that can't be recorded would be met again for ever.
    """

    message: str
    sqlstate: str | None = None
    detail: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        for name in ("message", "detail", "hint"):
            text = getattr(self, name)
            if text is not None:
                force_setattr(self, name, storable(text))


class Checkpoint(Struct, frozen=True):
    """One row of duroxide.history."""

    execution: str
    node: int
    event: str
    result: str | None = None
    columns: tuple[Column, ...] | None = None
    error: StepError | None = None
    meta: Mapping[str, Any] | None = None
    started_at: datetime | None = None


class Signal(Struct, frozen=True):
    """One entry of an instance's inbox; `data` is JSON text."""

    seq: int
    name: str
    data: str | None


class Finish(Struct, frozen=True):
    """The end of an instance: terminal status, its output (result or error text), and the error's fields."""

    status: str
    output: str | None
    error: StepError | None = None


class Changes(Struct):
    """What one event made true, to be recorded in one checkpoint. Falsy when there is nothing to record."""

    rows: list[Checkpoint] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)
    prune: list[str] = field(default_factory=list)
    keep: list[Key] = field(default_factory=list)
    finish: Finish | None = None

    def __bool__(self) -> bool:
        return bool(self.rows or self.consumed or self.prune or self.finish)


class Inputs(Struct, frozen=True):
    """What references in a step's text may name."""

    instance_id: str
    label: str | None
    variables: Mapping[str, str]
    results: Mapping[str, Result]

    def __repr__(self) -> str:
        """Without values: this may get into a log."""
        return f"Inputs(instance_id={self.instance_id!r}, label={self.label!r})"


class Step(Struct, frozen=True):
    """Work for a runner: a leaf that acts on the world.

    `text`: the SQL after substitution, or an HTTP step's config before it; `inputs` then says what to put in (None: the
    config is ready). `meta`: what a `started` checkpoint of this step must hold. `attempts`: how often an at-least-once
    step has begun already, without anybody knowing the outcome; 0: it never did.
    """

    key: Key
    node: Node
    kind: NodeType
    text: str
    inputs: Inputs | None = None
    meta: Mapping[str, Any] | None = None
    attempts: int = 0
