"""New connections: `pgbench -C -S`, which logs in (SCRAM) for every transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.measure import interleaved, median
from bench.stage import NO_PGBOUNCER, Program, Run, Stage
from bench.table import Reach, Row

CLIENTS, TRANSACTIONS, REPEATS = 4, 60, 3


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    stage.accounts()
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(stage.dfproxy("dfproxy", "--no-engine"))
        # One connection of the server for each of a client, as dfproxy promises; and the default, which hands one
        # server connection from client to client.
        same = stack.enter_context(stage.pgbouncer("PgBouncer", server_lifetime=0))
        pooled = stack.enter_context(stage.pgbouncer("PgBouncer that pools"))
        programs = [stage.direct, ours, *(p for p in (same, pooled) if p is not None)]

        def one(program: Program) -> Run:
            return stage.pgbench(program, "-S", "-C", clients=CLIENTS, transactions=TRANSACTIONS)

        taken = interleaved(REPEATS, [lambda p=p: one(p) for p in programs])  # type: ignore[misc]
    runs = {p.name: r for p, r in zip(programs, taken, strict=True)}
    rate = {name: median([r.tps for r in found]) for name, found in runs.items()}
    cpu = {name: median([r.microseconds for r in found]) for name, found in runs.items() if name != "direct"}
    details = {"tps": rate, "cpu": cpu}
    note = (f"direct {rate['direct']:,.0f}; CPU a connection: dfproxy {cpu['dfproxy']:,.0f} us"
            + (f", PgBouncer {cpu['PgBouncer']:,.0f} us" if same is not None else f"; {NO_PGBOUNCER}"))
    yield Row("new connections", "1/s", rate["dfproxy"], "PgBouncer, server_lifetime=0", rate.get("PgBouncer"),
              Reach(0.7), note, details)
    yield Row("new connections", "1/s", rate["dfproxy"], "PgBouncer that pools", rate.get("PgBouncer that pools"))
