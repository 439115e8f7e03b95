"""What a benchmark finds: rows with a figure, its yardstick of the same run, and how far it should reach."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reach:
    """How far a row should get: at least (or `most`: at most) `value`, said of the ratio or (`of`) of the figure."""

    value: float
    most: bool = False
    of: str = "ratio"

    def met(self, ratio: float | None, figure: float) -> bool | None:
        """Whether it is; None where there is nothing to compare."""
        got = ratio if self.of == "ratio" else figure
        if got is None:
            return None
        return got <= self.value if self.most else got >= self.value

    def __str__(self) -> str:
        sign = "<=" if self.most else ">="
        return f"{sign} {self.value:g}{'x' if self.of == 'ratio' else ''}"


@dataclass(frozen=True)
class Row:
    """One line of the table. `note` says why there is no figure, or what else is to be known."""

    what: str
    unit: str
    figure: float | None
    yardstick: str = ""
    against: float | None = None
    reach: Reach | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return self.figure / self.against if self.figure is not None and self.against else None

    @property
    def met(self) -> bool | None:
        return None if self.reach is None or self.figure is None else self.reach.met(self.ratio, self.figure)


def number(value: float | None) -> str:
    """A figure with as many digits as mean something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


HEADER = f"{'':66}{'dfproxy':>10} {'yardstick':>11} {'ratio':>7}  reach"


def line(row: Row) -> str:
    """A row as it is printed."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    verdict = {None: "", True: "yes", False: "NO"}[row.met]
    reach = f"{row.reach} {verdict}" if row.reach is not None else ""
    label = f"{row.what} ({row.unit}{'; ' + row.yardstick if row.yardstick else ''})"
    text = f"{label:66}{number(row.figure):>10} {number(row.against) if row.against else '':>11} {ratio:>7}  {reach}"
    return text.rstrip() + (f"\n    {row.note}" if row.note else "")


def save(path: Path, machine: dict[str, Any], groups: dict[str, list[Row]]) -> None:
    """Writes what was found as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {name: [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
             for name, rows in groups.items()}
    path.write_text(json.dumps({"machine": machine, "groups": found}, indent=1, default=str) + "\n")
