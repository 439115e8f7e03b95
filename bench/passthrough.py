"""Pass-through: `pgbench -S` through dfproxy, PgBouncer and an echo relay, in front of the same server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.measure import median, middle_ratio
from bench.slices import in_slices
from bench.stage import NO_PGBOUNCER, Program, Stage
from bench.table import Reach, Row

MODES = ("simple", "extended", "prepared")
CLIENTS = (1, 8, 32)
#: Slices of each program in a cell, and their seconds. One client is quick or slow depending on which cores the three
#: processes happen to be on, which changes rarely while they run: so more and shorter ones.
SLICES = {1: (40, 0.1)}
OTHERS = (16, 0.25)
#: What dfproxy is without its compiled code, and the cell in which that is measured.
PYTHON, BY_PYTHON = "dfproxy without compiled code", ("prepared", 8)


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows, cell by cell."""
    stage.accounts()
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(stage.dfproxy())
        twice = stack.enter_context(stage.dfproxy("dfproxy of two processes", "--processes", "2"))
        echo = stack.enter_context(stage.echo())
        bouncer = stack.enter_context(stage.pgbouncer())
        python = stack.enter_context(stage.dfproxy(PYTHON, fastpath="false"))
        programs = [echo, ours, twice, *([bouncer] if bouncer is not None else [])]
        for mode in MODES:
            for clients in CLIENTS:
                also = [python] if (mode, clients) == BY_PYTHON else []
                yield from _cell(stage, [*programs, *also], mode, clients)


def _cell(stage: Stage, programs: list[Program], mode: str, clients: int) -> Iterator[Row]:
    rounds, seconds = SLICES.get(clients, OTHERS)
    found = in_slices(stage, [*programs, stage.direct], "-S", "-M", mode,
                      clients=clients, rounds=rounds, seconds=seconds)
    tps = {name: median(share.tps) for name, share in found.items()}
    cpu = {name: share.cpu for name, share in found.items() if name != "direct"}
    where = f"{mode}, {clients} client{'s' if clients > 1 else ''}"
    details = {"tps": tps, "cpu": cpu}
    bouncer = found.get("PgBouncer")
    note = "" if bouncer else NO_PGBOUNCER
    for name, what, reach in (("dfproxy", "", 0.9), ("dfproxy of two processes", ", 2 processes", 1.0)):
        # The ratio is that of neighbours; the yardstick shown is scaled to it.
        ratio = middle_ratio(found[name].tps, bouncer.tps) if bouncer else None
        yield Row(f"-S {where}{what}", "tps", tps[name], "PgBouncer", tps[name] / ratio if ratio else None,
                  Reach(reach), note, details if not what else {})
    yield Row(f"-S {where}", "us CPU", cpu["dfproxy"], "echo relay", cpu["echo relay"], Reach(1.3, most=True),
              (f"PgBouncer {cpu['PgBouncer']:.1f} us CPU; " if bouncer else "")
              + f"echo relay {tps['echo relay']:,.0f} tps, direct {tps['direct']:,.0f}; outside of the kernel: "
              + ", ".join(f"{name} {found[name].outside:.1f} us" for name in ("dfproxy", "echo relay", "PgBouncer")
                          if name in found))
    if PYTHON in cpu:
        yield Row(f"-S {where}, without compiled code", "us CPU", cpu[PYTHON], "dfproxy", cpu["dfproxy"], None,
                  f"{tps[PYTHON]:,.0f} tps")
