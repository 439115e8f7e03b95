"""`python -m bench.parking [INSTANCES]`: what a million waiting workflows cost, and how soon 10,000 of them run.

A third sleeps, a third waits for a schedule, a third for a signal. The rows are put there as a worker leaves them when
it parks (tests/engine/test_parking.py sees that it does); those that become due have been parked by the worker itself.
"""

from __future__ import annotations

import asyncio
import sys
import time

import psycopg

from bench.stage import APP, DATABASE, SERVICE, Program, Stage, stage
from engine.migrate import migrate

IDLE = 30
CHUNK = 100_000
GRAPHS = (
    '[{"id":"00000001","type":"SLEEP","query":"31536000"}]',
    '[{"id":"00000001","type":"WAIT_SCHEDULE","query":"{\\"cron_expr\\":\\"0 0 1 1 *\\"}"}]',
    '[{"id":"00000001","type":"SIGNAL","query":"{\\"signal_name\\":\\"go\\",\\"timeout_seconds\\":null}"}]',
)
FILL = """
INSERT INTO duroxide.instances (id, graph, submitted_by)
SELECT lpad(to_hex(n), 8, '0'), (%(graphs)s::jsonb[])[n %% 3 + 1], %(role)s::regrole
  FROM generate_series(%(first)s::int, %(last)s::int) n
"""
PARK = """
UPDATE duroxide.queue q SET claims = 1, started_at = now(),
       wake_at = CASE i.graph->0->>'type' WHEN 'SIGNAL' THEN 'infinity' ELSE now() + interval '1 year' END
  FROM duroxide.instances i WHERE i.id = q.instance_id AND q.claims = 0
"""
WAITING = """
INSERT INTO duroxide.history (instance_id, execution, node, event, meta, started_at)
SELECT q.instance_id, '', 0, 'waiting',
       CASE WHEN isfinite(q.wake_at) THEN jsonb_build_object('wake_at', q.wake_at) END, now()
  FROM duroxide.queue q WHERE q.instance_id BETWEEN %(low)s AND %(high)s
"""
START = """
SELECT count(df.start(df.seq(df.sleep(86400), 'INSERT INTO ran SELECT ''{sys_instance_id}'''), 'due'))
  FROM generate_series(1, %s)
"""
#: Moves the wake-up of those that the worker has parked to one moment.
DUE = """
WITH moment AS (SELECT date_trunc('second', clock_timestamp()) + interval '15 s' AS at), woken AS (
    UPDATE duroxide.queue q SET wake_at = m.at FROM duroxide.instances i, moment m
     WHERE i.id = q.instance_id AND i.label = 'due' AND q.owner IS NULL RETURNING q.instance_id
), told AS (
    UPDATE duroxide.history h SET meta = jsonb_build_object('wake_at', m.at) FROM woken w, moment m
     WHERE h.instance_id = w.instance_id AND h.event = 'waiting'
)
SELECT m.at, (SELECT count(*) FROM woken) FROM moment m
"""
LATE = """
SELECT count(*), percentile_cont(ARRAY[0, 0.5, 1]) WITHIN GROUP (ORDER BY extract(epoch FROM r.at - %s)) FROM ran r
"""


def say(what: str, figure: str, reach: str = "") -> None:
    """One line: the figure, and what is aimed at."""
    print(f"{what:<58}{figure:>18}   {reach}", flush=True)


def fill(s: Stage, count: int) -> None:
    """Puts the parked instances there."""
    with s.admin() as c:
        c.execute("SET synchronous_commit = off")
        for first in range(1, count + 1, CHUNK):
            last = min(first + CHUNK - 1, count)
            c.execute(FILL, {"graphs": list(GRAPHS), "role": APP, "first": first, "last": last})
            c.execute(PARK)
            c.execute(WAITING, {"low": f"{first:08x}", "high": f"{last:08x}"})
        c.execute("VACUUM ANALYZE")


def transactions(s: Stage) -> int:
    """Committed in the database so far, as far as sessions have reported them; asked from another database."""
    with s.admin("postgres") as c:
        row = c.execute("SELECT xact_commit FROM pg_stat_database WHERE datname = %s", (DATABASE,)).fetchone()
    assert row is not None
    return int(str(row[0]))


def idle(s: Stage, worker: Program) -> None:
    """What the worker and the server do while nothing is due."""
    time.sleep(15)  # sessions report what they did up to ten seconds late
    began, before, cpu, server = time.monotonic(), transactions(s), worker.cpu(), s.server_cpu()
    time.sleep(IDLE)
    took = time.monotonic() - began
    rate = (transactions(s) - before) / took
    say("memory of the worker (MB)", f"{worker.memory() / 2**20:.0f}", "below 200")
    # Heartbeats ride on polls; autovacuum looks in once a minute.
    say("transactions a second while idle", f"{rate:.2f}", "1, and autovacuum's")
    say("CPU of the worker while idle (% of a core)", f"{(worker.cpu() - cpu) / took * 100:.2f}", "not to be noticed")
    say("CPU of the server while idle (% of a core)", f"{(s.server_cpu() - server) / took * 100:.2f}",
        "not to be noticed")


def due_at_once(s: Stage, worker: Program, count: int) -> None:
    """So many wake in the same second; each runs a step of an ordinary role."""
    with psycopg.connect(s.uri(), autocommit=True) as c:
        c.execute("CREATE TABLE ran (instance text, at timestamptz DEFAULT clock_timestamp())")
        began = time.monotonic()
        c.execute(START, (count,))
    with s.admin() as c:
        parked = ("SELECT count(*) FROM duroxide.queue q JOIN duroxide.instances i ON i.id = q.instance_id "
                  "WHERE i.label = 'due' AND q.owner IS NULL AND q.claims > 0")
        while c.execute(parked).fetchone() != (count,):
            time.sleep(0.2)
        say(f"{count:,} started, and parked by the worker (s)", f"{time.monotonic() - began:.1f}")
        moment, woken = c.execute(DUE).fetchone() or (None, 0)
        assert woken == count
        cpu = worker.cpu()
        while c.execute("SELECT count(*) FROM ran").fetchone() != (count,):
            time.sleep(0.5)
        found = c.execute(LATE, (moment,)).fetchone()
        assert found is not None
        first, middle, last = found[1]  # type: ignore[misc]
        say(f"{count:,} due in the same second: the first ran after (s)", f"{first:.2f}", "0.05 when idle")
        say("... half of them after (s)", f"{middle:.2f}")
        say("... the last one after (s)", f"{last:.2f}", "10")
        say("... CPU of the worker for each (ms)", f"{(worker.cpu() - cpu) / count * 1000:.2f}")
        say("... memory of the worker afterwards (MB)", f"{worker.memory() / 2**20:.0f}", "below 200")


def main() -> None:
    """Fills, looks at an idle worker, wakes some."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with stage() as s:
        asyncio.run(migrate(s.uri(SERVICE)))
        s.grant()
        began = time.monotonic()
        fill(s, count)
        with s.admin() as c:
            size = c.execute("SELECT pg_size_pretty(pg_database_size(current_database()))").fetchone()
        say(f"{count:,} parked instances, filled in (s)", f"{time.monotonic() - began:.0f}", str(size and size[0]))
        with s.dfproxy(command="worker") as worker:
            say("memory of a worker that has just begun (MB)", f"{worker.memory() / 2**20:.0f}")
            idle(s, worker)
            due_at_once(s, worker, min(10_000, count))
            idle(s, worker)


if __name__ == "__main__":
    main()
