"""`make bench`, or `python -m bench [GROUP ...]`: how fast dfproxy is beside yardsticks of the same run.

Everything is temporary. Ratios are medians of interleaved repeats; absolute figures tell of the machine.
docs/performance.md says how to read the table.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import proxy
from bench import bulk, connections, growth, http, passthrough, start, statements, steps
from bench.stage import Stage, stage
from bench.table import HEADER, Row, line, save

GROUPS: dict[str, Callable[[Stage], Iterator[Row]]] = {
    "passthrough": passthrough.run, "statements": statements.run, "bulk": bulk.run, "connections": connections.run,
    "steps": steps.run, "start": start.run, "growth": growth.run, "http": http.run,
}
RESULTS = Path(__file__).parent / "results" / "latest.json"


def machine(made: Stage) -> dict[str, Any]:
    """Where this is, and what runs."""
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "cpus": os.cpu_count(),
        "load": os.getloadavg()[0], "processor": _processor(), "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "uvloop": version("uvloop"), "postgresql": made.version,
        "dfproxy": proxy.__version__,
    }


def _processor() -> str:
    try:
        names = [text.partition(":")[2].strip() for text in Path("/proc/cpuinfo").read_text().splitlines()
                 if text.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main(wanted: list[str]) -> int:
    """Runs the groups, prints each row as soon as it is there, and keeps them all."""
    if unknown := [name for name in wanted if name not in GROUPS]:
        print(f"no such group: {', '.join(unknown)}; there are: {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    began = time.monotonic()
    found: dict[str, list[Row]] = {}
    with stage() as made:
        about = machine(made)
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        for name in wanted or list(GROUPS):
            print(f"\n{name}\n{HEADER}", flush=True)
            rows = found[name] = []
            made.checkpoint()
            for row in GROUPS[name](made):
                rows.append(row)
                print(line(row), flush=True)
    about["seconds"] = round(time.monotonic() - began)
    save(RESULTS, about, found)
    missed = [row for rows in found.values() for row in rows if row.met is False]
    print(f"\n{about['seconds']} s; {len(missed)} of {sum(row.met is not None for r in found.values() for row in r)}"
          f" figures short of their reach; all in {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
