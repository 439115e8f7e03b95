"""Pass-through: `pgbench -S` through dfproxy, PgBouncer and an echo relay, in front of the same server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from bench.measure import interleaved, median, middle_ratio
from bench.stage import NO_PGBOUNCER, Program, Run, Stage
from bench.table import Reach, Row

MODES = ("simple", "extended", "prepared")
#: Clients, and transactions of each in one run.
CLIENTS = {1: 4000, 8: 3000, 32: 1200}
#: Transactions of each client in the short run before it, which is subtracted: log-ins, and what server sessions with
#: empty caches cost at first. PgBouncer keeps its own from run to run; those of the others are new each time.
BEGINNING = 100
REPEATS = 5


@dataclass(frozen=True)
class Steady:
    """Microseconds of CPU time a transaction, and transactions a second, once a run is under way."""

    cpu: float
    tps: float


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows, cell by cell."""
    stage.accounts()
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(stage.dfproxy())
        twice = stack.enter_context(stage.dfproxy("dfproxy of two processes", "--processes", "2"))
        echo = stack.enter_context(stage.echo())
        bouncer = stack.enter_context(stage.pgbouncer())
        programs = [echo, ours, twice, *([bouncer] if bouncer is not None else [])]
        for mode in MODES:
            for clients in CLIENTS:
                yield from _cell(stage, programs, mode, clients)


def _cell(stage: Stage, programs: list[Program], mode: str, clients: int) -> Iterator[Row]:
    def one(program: Program, transactions: int = CLIENTS[clients]) -> Run:
        return stage.pgbench(program, "-S", "-M", mode, clients=clients, transactions=transactions)

    def pair(program: Program) -> Steady:
        beginning = one(program, BEGINNING)
        whole = one(program)
        return Steady(whole.beyond(beginning), whole.rate_beyond(beginning))

    taken = interleaved(REPEATS, [lambda p=p: pair(p) for p in programs])  # type: ignore[misc]
    found = {p.name: runs for p, runs in zip(programs, taken, strict=True)} | {"direct": [pair(stage.direct)]}
    tps = {name: median([r.tps for r in runs]) for name, runs in found.items()}
    cpu = {name: median([r.cpu for r in runs]) for name, runs in found.items() if name != "direct"}
    where = f"{mode}, {clients} client{'s' if clients > 1 else ''}"
    details = {"tps": tps, "cpu": cpu}
    bouncer = found.get("PgBouncer")
    note = "" if bouncer else NO_PGBOUNCER
    for name, what, reach in (("dfproxy", "", 0.9), ("dfproxy of two processes", ", 2 processes", 1.0)):
        # The ratio is that of neighbours; the yardstick shown is scaled to it.
        ratio = middle_ratio([r.tps for r in found[name]], [r.tps for r in bouncer]) if bouncer else None
        yield Row(f"-S {where}{what}", "tps", tps[name], "PgBouncer", tps[name] / ratio if ratio else None,
                  Reach(reach), note, details if not what else {})
    yield Row(f"-S {where}", "us CPU", cpu["dfproxy"], "echo relay", cpu["echo relay"], Reach(1.3, most=True),
              (f"PgBouncer {cpu['PgBouncer']:.1f} us CPU; " if bouncer else "")
              + f"echo relay {tps['echo relay']:,.0f} tps, direct {tps['direct']:,.0f}")
