"""Step throughput, commits and round trips for a step; one worker process, and two.

Workflows of three UPDATE steps, 32 at a time, against pgbench with 32 clients running the transaction that one
step is: as text that the server parses and plans each time, which is what it does with a step's, and prepared, which is
as fast as it goes. The worker and the server are separate processes, and both are counted.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench import flows
from bench.measure import interleaved, median, middle_ratio
from bench.slices import one_slice, stop
from bench.stage import DATABASE, Program, Stage, make_database
from bench.table import Reach, Row
from bench.turns import Counter

AT_A_TIME = 32
#: The ways in which pgbench sends its transactions.
MODES = ("simple", "prepared")
#: In a turn a worker runs so many workflows, and pgbench for so many seconds. The sessions of both stay open between
#: their turns, in which workers have nothing to do, and pgbench is stopped.
WORKFLOWS, SECONDS, TURNS = 1000, 0.5, 14
#: So many of each session are not counted on either side: at first it has nothing in its caches. (A worker's sessions
#: have run so many on average: it does not use all of them equally often.)
BEGINNING = 150
#: Of the run that is counted, not timed.
COUNTED = 500
#: The two workers' databases are the same server's, whose logins they share.
SECRET = "the same for all of the benchmark's databases"


@dataclass(frozen=True)
class Turn:
    """Steps a second; microseconds of CPU time of the worker, and of the server, for one."""

    rate: float
    own: float
    server: float


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    with contextlib.ExitStack() as stack:
        one, two = (_working(stage, stack, count) for count in (1, 2))
        simple, prepared = (_pgbench(stage, stack, mode) for mode in MODES)
        text, by_one, ready, by_two = interleaved(TURNS, [simple, one, prepared, two])
    for name, ours in (("one worker process", by_one), ("two worker processes", by_two)):
        rates = [turn.rate for turn in ours]
        note = (f"CPU a step: worker {median([t.own for t in ours]):.0f} us, PostgreSQL"
                f" {median([t.server for t in ours]):.0f} us; a transaction of pgbench's costs it")
        for mode, theirs in zip(MODES, (text, ready), strict=True):
            yardstick = [turn.rate for turn in theirs]
            yield Row(f"steps, {name}", "1/s", median(rates), f"pgbench, {mode}",
                      median(rates) / middle_ratio(rates, yardstick), Reach(0.5),
                      f"{note} {median([t.server for t in theirs]):.0f} us", {"ours": rates, "pgbench": yardstick})
    with _worker(stage):
        flows.prepare(stage)
    yield from _counted(stage)


def _working(stage: Stage, stack: contextlib.ExitStack, count: int) -> Callable[[], Turn]:
    """Workers that have run some workflows, in a database of their own; what they do in a turn."""
    database = f"steps_{count}"
    make_database(stage, database)
    programs = [stack.enter_context(_worker(stage, AT_A_TIME // count, database=database, secret=SECRET))
                for _ in range(count)]
    flows.prepare(stage, database)
    flows.rate(stage, AT_A_TIME * BEGINNING // 3, database)

    def turn() -> Turn:
        spent: list[tuple[float, float]] = []

        def look() -> None:
            spent.append((sum(p.cpu() for p in programs), stage.server_cpu()))

        rate = flows.rate(stage, WORKFLOWS, database, began=look)
        look()
        return Turn(rate, *((after - before) / WORKFLOWS / 3 * 1e6 for before, after in zip(*spent, strict=True)))

    return turn


def _pgbench(stage: Stage, stack: contextlib.ExitStack, mode: str) -> Callable[[], Turn]:
    """A yardstick that has run for a while, in a database of its own; what it does in a turn."""
    database = f"steps_{mode}"
    make_database(stage, database)
    flows.prepare_plain(stage, database)
    process = subprocess.Popen(
        [str(stage.cluster.bin_dir / "pgbench"), "-n", "-c", str(AT_A_TIME), "-j", "2", "-T", "3600", "-M", mode,
         "-f", flows.step_script(stage), stage.uri(flows.LOGIN, database)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)  # also while it is stopped
    deadline = time.monotonic() + 60
    while (done := flows.effects(stage, database)) < AT_A_TIME * BEGINNING:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"pgbench -M {mode} came to {done} transactions")
        time.sleep(0.1)
    stop([process.pid])
    done = flows.effects(stage, database)

    def turn() -> Turn:
        nonlocal done
        server = stage.server_cpu()
        start, end = one_slice([process.pid], SECONDS)
        server = stage.server_cpu() - server
        before, done = done, flows.effects(stage, database)  # what was under way in the last turn counts for this one
        return Turn((done - before) / (end - start), 0.0, server / (done - before) * 1e6)

    return turn


def _worker(stage: Stage, at_a_time: int = AT_A_TIME, port: int | None = None, database: str = DATABASE,
            **settings: object) -> contextlib.AbstractContextManager[Program]:
    return stage.dfproxy("worker", command="worker", upstream_port=port, database=database,
                         max_user_connections=at_a_time, **settings)


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
