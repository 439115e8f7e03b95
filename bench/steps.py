"""Step throughput, commits and round trips for a step; one worker process, and two.

2,000 workflows of three UPDATE steps, 32 at a time, against pgbench with 32 clients running the transaction that one
step is: as text that the server parses and plans each time, which is what it does with a step's, and prepared, which is
as fast as it goes. The worker and the server are separate processes, and both are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from bench import flows
from bench.measure import interleaved, median, middle_ratio
from bench.stage import DATABASE, Program, Run, Stage
from bench.table import Reach, Row
from bench.turns import Counter

WORKFLOWS, AT_A_TIME, REPEATS = 2000, 32, 5
#: The ways in which pgbench sends its transactions.
MODES = ("simple", "prepared")
#: By each client of the yardstick.
TRANSACTIONS = 500
#: So many of each session are not counted on either side: at first it has nothing in its caches. (A worker's sessions
#: have run so many on average: it does not use all of them equally often.)
BEGINNING = 150
#: Of the run that is counted, not timed.
COUNTED = 500


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    with _worker(stage):
        flows.prepare(stage)
    script = flows.step_script(stage)
    yardstick = replace(stage.direct, user=flows.LOGIN)

    def transactions(mode: str, each: int) -> Run:
        server = stage.server_cpu()
        run = stage.pgbench(yardstick, "-M", mode, "-f", script, clients=AT_A_TIME, transactions=each)
        return replace(run, cpu=stage.server_cpu() - server)

    def pgbench(mode: str) -> tuple[float, float]:
        beginning, whole = transactions(mode, BEGINNING), transactions(mode, TRANSACTIONS)
        return whole.rate_beyond(beginning), whole.beyond(beginning)

    def ours(workers: int) -> tuple[float, float, float]:
        with contextlib.ExitStack() as stack:
            programs: list[Program] = [stack.enter_context(_worker(stage, AT_A_TIME // workers))
                                       for _ in range(workers)]
            flows.rate(stage, AT_A_TIME * BEGINNING // 3)
            spent: list[float] = []

            def look() -> None:
                spent.extend((sum(p.cpu() for p in programs), stage.server_cpu()))

            rate = flows.rate(stage, WORKFLOWS, began=look)
            look()
            return rate, (spent[2] - spent[0]) / WORKFLOWS / 3 * 1e6, (spent[3] - spent[1]) / WORKFLOWS / 3 * 1e6

    simple, one, prepared, two = interleaved(REPEATS, [
        lambda: pgbench("simple"), lambda: ours(1), lambda: pgbench("prepared"), lambda: ours(2)])
    for name, runs in (("one worker process", one), ("two worker processes", two)):
        rates = [r[0] for r in runs]
        worker, server = (median([r[i] for r in runs]) for i in (1, 2))
        note = f"CPU a step: worker {worker:.0f} us, PostgreSQL {server:.0f} us"
        for mode, bench in zip(MODES, (simple, prepared), strict=True):
            tps = [r[0] for r in bench]
            yield Row(f"steps, {name}", "1/s", median(rates), f"pgbench, {mode}",
                      median(rates) / middle_ratio(rates, tps), Reach(0.5),
                      f"{note}; a transaction of pgbench's costs it {median([r[1] for r in bench]):.0f} us",
                      {"ours": runs, "pgbench": tps})
    yield from _counted(stage)


def _worker(stage: Stage, at_a_time: int = AT_A_TIME,
            port: int | None = None) -> contextlib.AbstractContextManager[Program]:
    return stage.dfproxy("worker", command="worker", upstream_port=port, max_user_connections=at_a_time)


def _counted(stage: Stage) -> Iterator[Row]:
    """Commits as the server counts them, and round trips of the sessions that run steps, seen from in between.

    A commit that writes has a transaction id. Those are counted; the server's own count has what only cleans a session
    up as well.
    """
    with Counter(stage.port) as counter, stage.admin() as c:
        def counts() -> tuple[int, int]:
            row = c.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, xact_commit FROM"
                            " pg_stat_database WHERE datname = %s", (DATABASE,)).fetchone()
            assert row is not None
            return int(str(row[0])), int(str(row[1]))

        with _worker(stage, port=counter.port):
            before, all_before = counts()
            flows.rate(stage, COUNTED)
            after, _ = counts()
        # Every session that counted has ended with the worker, and said what it did.
        steps = 3 * COUNTED
        writing, everything = after - before, counts()[1] - all_before
    yield Row("commits for a step", "that write, all sessions", writing / steps, "", None,
              Reach(1.1, most=True, of="figure"),
              f"with what finds the workflows and starts them; xact_commit, with what writes nothing:"
              f" {everything / steps:.2f}", {"xact_commit": everything / steps})
    yield Row("round trips for a step", "step sessions", counter.turns("dfproxy:step") / steps, "", None,
              Reach(2.05, most=True, of="figure"),
              f"other sessions of the worker: {counter.turns('dfproxy:control') / steps:.2f} for a step")
