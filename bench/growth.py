"""What does not get dearer: steps with a million finished workflows in the tables, with a million parked ones, and in a
graph of ten thousand nodes.

Each case is a database of its own on the same server, filled with rows as workflows leave them behind, so that the
cases are measured in turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import psycopg

from bench import flows
from bench.measure import interleaved, median, middle_ratio
from bench.stage import Program, Stage, make_database
from bench.table import Reach, Row

MILLION, FEW = 1_000_000, 1_000
WORKFLOWS, REPEATS = 1000, 5
#: Those of each case that are not counted: its sessions have nothing in their caches.
BEGINNING = 600
#: In which the load while idle is looked at. In some the server cleans up behind those that ran (autovacuum).
SECONDS = 7
#: Nodes in the big graph; how many small ones before it and after it.
NODES, GRAPHS = 10_000, 15

GRAPH = ("""'[{"id":"00000001","type":"THEN","left":1,"right":2},{"id":"00000002","type":"SQL","query":"SELECT 1"},"""
         """{"id":"00000003","type":"SQL","query":"SELECT 2"}]'""")
#: Finished workflows of two steps.
FINISHED = f"""
INSERT INTO duroxide.instances (id, graph, submitted_by, status, output, created_at, updated_at, started_at, ended_at)
SELECT lpad(to_hex(n), 8, '0'), {GRAPH}, 'app'::regrole, 'completed', '{{"rows":[],"row_count":0}}',
       now() - n * interval '1 s', now(), now(), now() FROM generate_series(1, %(count)s) n;
INSERT INTO duroxide.history (instance_id, execution, node, event, result)
SELECT lpad(to_hex(n), 8, '0'), '', m, 'completed', '{{"rows":[{{"a":1}}],"row_count":1}}'
  FROM generate_series(1, %(count)s) n, generate_series(1, 2) m"""
#: Workflows that wait for a signal.
PARKED = f"""
INSERT INTO duroxide.instances (id, graph, submitted_by, status, created_at)
SELECT lpad(to_hex(n), 8, '0'), {GRAPH}, 'app'::regrole, 'running', now() - n * interval '1 s'
  FROM generate_series(1, %(count)s) n;
INSERT INTO duroxide.queue (instance_id, wake_at, claims, started_at)
SELECT lpad(to_hex(n), 8, '0'), 'infinity', 1, now() FROM generate_series(1, %(count)s) n"""


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    names = ("small", "finished", "parked")
    for name in names:
        make_database(stage, name)
    with stage.dfproxy("worker", "--databases", "finished,parked", command="worker", database="small"):
        for name in names:
            flows.prepare(stage, name)
    for name, fill, count in (("small", FINISHED, FEW), ("finished", FINISHED, MILLION), ("parked", PARKED, MILLION)):
        with stage.admin(name) as c:
            # Rows as they would be; the triggers that a start fires would queue what has ended.
            c.execute("SET session_replication_role = replica")
            for statement in fill.split(";\n"):
                c.execute(statement.replace("%(count)s", str(count)))
            c.execute("VACUUM ANALYZE")
    stage.checkpoint()
    with stage.dfproxy("worker", "--databases", "finished,parked", database="small") as worker:
        for name in names:
            flows.rate(stage, BEGINNING, name)
        few, finished, parked = interleaved(REPEATS, [
            lambda n=name: flows.rate(stage, WORKFLOWS, n) for name in names])  # type: ignore[misc]
        for what, rates in (("steps, 1,000,000 finished", finished), ("steps, 1,000,000 parked", parked)):
            ratio = middle_ratio(rates, few)
            yield Row(what, "1/s", median(rates), "1,000 finished", median(rates) / ratio, Reach(0.9), "",
                      {"ours": rates, "few": few})
        own, server = zip(*(_idle(stage, worker) for _ in range(SECONDS)), strict=True)
        yield Row("idle with 1,000,000 parked", "% CPU of PostgreSQL", median(server),
                  note=f"worker {median(own):.1f}%, with three databases", details={"server": server})
        yield from _graphs(stage, replace(worker, database="small"))


def _idle(stage: Stage, worker: Program) -> tuple[float, float]:
    """CPU time of the worker, and of the server, in percent of a second in which nothing is asked of them."""
    cpu, server = worker.cpu(), stage.server_cpu()
    time.sleep(1)
    return (worker.cpu() - cpu) * 100, (stage.server_cpu() - server) * 100


def _graphs(stage: Stage, proxy: Program) -> Iterator[Row]:
    """A graph of 10,000 nodes against graphs of ten; one step at a time in both."""
    with psycopg.connect(proxy.uri, autocommit=True) as c, stage.admin("small") as admin:
        def per_node(nodes: int) -> float:
            # A chain has as many THENs, but one, as steps.
            row = c.execute("SELECT df.start(df.seq(VARIADIC array_fill('SELECT 1'::text, ARRAY[%s])))",
                            (nodes // 2,)).fetchone()
            assert row is not None
            found = None
            while found is None:
                time.sleep(0.01)
                found = admin.execute("SELECT extract(epoch FROM ended_at - started_at)::float8 FROM duroxide.instances"
                                      " WHERE id = %s AND status = 'completed'", row).fetchone()
            return float(str(found[0])) / nodes * 1e6

        small = [per_node(10) for _ in range(GRAPHS)]
        big = per_node(NODES)
        small += [per_node(10) for _ in range(GRAPHS)]
    yield Row(f"a node of a graph of {NODES:,}", "us", big, "graph of 10", median(small), Reach(1.1, most=True))
