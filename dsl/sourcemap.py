"""Edits to a text, and the way back from a position in the edited text to the original."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

#: Order of edits that touch the same offset: what closes there, what opens there, what replaces the token there.
CLOSE, OPEN, REPLACE = range(3)


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters [start, end) become `text`; an error inside `text` is reported at `anchor` (all 0-based)."""

    start: int
    end: int
    text: str
    anchor: int
    rank: int
    order: int

    @property
    def key(self) -> tuple[int, int, int]:
        """Sort key. Of several openings the one made last is the outermost, so it comes first."""
        return self.start, self.rank, -self.order if self.rank == OPEN else self.order


class SourceMap:
    """Positions of a rewritten text in the text that it was made from."""

    __slots__ = ("_anchors", "_length", "_out_ends", "_out_starts", "_source_ends")

    def __init__(self, length: int) -> None:
        self._length = length
        self._out_starts: list[int] = []
        self._out_ends: list[int] = []
        self._source_ends: list[int] = []
        self._anchors: list[int] = []

    def add(self, out_start: int, out_end: int, source_end: int, anchor: int) -> None:
        """Record that [out_start, out_end) of the rewritten text replaced what ended at `source_end`."""
        self._out_starts.append(out_start)
        self._out_ends.append(out_end)
        self._source_ends.append(source_end)
        self._anchors.append(anchor)

    def source_position(self, position: int) -> int:
        """1-based position in the rewritten text -> 1-based position in the source (clamped to it)."""
        offset = max(position - 1, 0)
        index = bisect_right(self._out_starts, offset) - 1
        if index < 0:
            source = offset
        elif offset < self._out_ends[index]:
            source = self._anchors[index]
        else:
            source = offset - self._out_ends[index] + self._source_ends[index]
        return min(source, self._length) + 1


def apply(source: str, edits: Iterable[Edit]) -> tuple[str, SourceMap]:
    """The text with all edits made, and its map. Edits must not overlap."""
    parts: list[str] = []
    result = SourceMap(len(source))
    position = size = 0
    for edit in sorted(edits, key=lambda e: e.key):
        parts.append(source[position : edit.start])
        size += edit.start - position
        parts.append(edit.text)
        result.add(size, size + len(edit.text), edit.end, edit.anchor)
        size += len(edit.text)
        position = edit.end
    parts.append(source[position:])
    return "".join(parts), result
