"""How figures are taken: in turns, so that a slow moment of the machine hits all, and the median of each counts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleaved(repeats: int, measures: Sequence[Callable[[], T]]) -> list[list[T]]:
    """What each measure gave, taken in turns."""
    rounds = [[measure() for measure in measures] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def middle_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of figures that were taken one after the other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
