"""What a client feels: starts a second, and how long one workflow takes from its start to its result."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from bench import flows
from bench.measure import interleaved, median, middle_ratio
from bench.stage import Program, Stage
from bench.table import Reach, Row

GRAPH = ("'UPDATE hits SET n = n + 1 WHERE id = 17' ~> 'UPDATE hits SET n = n + 1 WHERE id = 2017'"
         " ~> 'UPDATE hits SET n = n + 1 WHERE id = 4017'")
#: The same bytes as one row with a primary key: id, graph, status, times.
PLAIN = """
CREATE TABLE plain (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, graph jsonb NOT NULL,
                    status text NOT NULL DEFAULT 'pending', created_at timestamptz NOT NULL DEFAULT now());
"""
#: Long runs, in which the first start of a connection (6 ms of CPU time: nothing is in its caches yet) hardly counts.
CLIENTS, STARTS, REPEATS = 8, 1000, 5
#: Workflows one after the other, and pgbench in between: where the scheduler puts its processes is half of its time.
TURNS, WORKFLOWS = 16, 25


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    with stage.dfproxy() as ours:
        flows.prepare(stage)
        yield from _latency(stage, ours)
    with stage.dfproxy("dfproxy", "--no-engine") as ours:  # what is started here stays pending
        yield from _starts(stage, ours)


def _starts(stage: Stage, ours: Program) -> Iterator[Row]:
    with psycopg.connect(stage.uri(), autocommit=True) as c, stage.admin() as admin:
        c.execute(PLAIN)
        instance = psycopg.connect(ours.uri, autocommit=True).execute(f"SELECT df.start({GRAPH})").fetchone()
        assert instance is not None
        graph = admin.execute("SELECT graph::text FROM duroxide.instances WHERE id = %s", instance).fetchone()
        assert graph is not None
    scripts: list[str] = []
    literal = str(graph[0]).replace("'", "''")
    for name, text in (("start", f"SELECT df.start({GRAPH});"),
                       ("insert", f"INSERT INTO plain (graph) VALUES ('{literal}');")):
        path = stage.folder / f"{name}.sql"
        path.write_text(text + "\n")
        scripts.append(str(path))

    def one(script: str) -> float:
        return stage.pgbench(ours, "-M", "prepared", "-f", script, clients=CLIENTS, transactions=STARTS).tps

    mine, theirs = interleaved(REPEATS, [lambda: one(scripts[0]), lambda: one(scripts[1])])
    with stage.admin() as admin:
        admin.execute("TRUNCATE duroxide.instances, duroxide.queue, duroxide.history, duroxide.signals")
    ratio = middle_ratio(mine, theirs)
    yield Row("starts of three steps", "1/s", median(mine), "INSERT, prepared", median(mine) / ratio, Reach(0.4),
              "both through the proxy", {"ours": mine, "insert": theirs})


def _latency(stage: Stage, ours: Program) -> Iterator[Row]:
    """One workflow at a time, from the start to its result; one step's transaction at a time by pgbench."""
    script = flows.step_script(stage)
    with psycopg.connect(ours.uri, autocommit=True) as c:
        _workflows(c, 20)  # the first waits for its steps' connection
        turns, yardsticks = interleaved(TURNS, [
            lambda: _workflows(c, WORKFLOWS), lambda: [3 * _transaction(stage, script) + _round_trip(c)]])
    times = sorted(time for turn in turns for time in turn)
    p50, p99 = median(times), times[int(len(times) * 0.99)]
    against = p50 / middle_ratio([median(turn) for turn in turns], [theirs for [theirs] in yardsticks])
    yield Row("one workflow of three steps, p50", "ms", p50, "3 transactions, 1 round trip", against,
              Reach(3.0, most=True), "", {"times": times, "yardstick": yardsticks})
    yield Row("one workflow of three steps, p99", "ms", p99, "the same", against, Reach(10.0, most=True, of="figure"),
              "the goal is for an idle machine, and a worker that has run a workflow of this role before")


def _workflows(c: psycopg.Connection[tuple[object, ...]], count: int) -> list[float]:
    """Milliseconds of each."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        instance = c.execute(f"SELECT df.start({GRAPH})").fetchone()
        assert instance is not None
        while c.execute("SELECT df.result(%s)", instance).fetchone() == (None,):
            time.sleep(0.0005)
        times.append((time.perf_counter() - began) * 1000)
    return times


def _round_trip(c: psycopg.Connection[tuple[object, ...]]) -> float:
    """Milliseconds of the smallest statement."""
    times = []
    for _ in range(200):
        began = time.perf_counter()
        c.execute("SELECT 1")
        times.append((time.perf_counter() - began) * 1000)
    return median(times)


def _transaction(stage: Stage, script: str) -> float:
    """The median of one client's transactions, in milliseconds, as pgbench logs them."""
    prefix = stage.folder / f"latency-{time.monotonic_ns()}"
    subprocess.run([str(stage.cluster.bin_dir / "pgbench"), "-n", "-c", "1", "-t", "200", "-M", "prepared", "-f",
                    script, "-l", f"--log-prefix={prefix}", stage.uri(flows.LOGIN)], check=True, capture_output=True)
    logs = list(Path(prefix.parent).glob(f"{prefix.name}.*"))
    return median([int(text.split()[2]) / 1000 for log in logs for text in log.read_text().splitlines()])
