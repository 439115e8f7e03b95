"""`python -m bench.bloat [WORKFLOWS [SECONDS [STEPS]]]`: dead rows and sizes after a million workflows.

Workflows of three UPDATE steps (or of one), a thousand under way at any time, default autovacuum. A tenth of the number
is kept by retention, so that the tables stop growing early on: what grows after that is bloat. Stops after SECONDS, and
says how many there were.
"""

from __future__ import annotations

import asyncio
import sys
import time

import psycopg

from bench import flows
from bench.parking import say
from bench.rounds import table
from bench.stage import SERVICE, Stage, stage
from engine.migrate import migrate

CHUNK, UNDER_WAY = 500, 1_500


def size(s: Stage) -> dict[str, int]:
    """KB of each table with its indexes."""
    with s.admin() as c:
        rows = c.execute("SELECT relname, pg_total_relation_size(relid) / 1024 FROM pg_stat_user_tables "
                         "WHERE schemaname = 'duroxide' AND relname IN ('history', 'queue', 'instances')").fetchall()
    return {str(name): int(str(kilobytes)) for name, kilobytes in rows}


#: Workflows of one step.
ONE = """
SELECT count(df.start('UPDATE hits SET n = n + 1 WHERE id = ' || n % 10000 + 1)) FROM generate_series(1, {count}) n"""


def run(s: Stage, count: int, seconds: float, steps: int) -> None:
    """Starts workflows as others end, and prints sizes after each tenth."""
    began = time.monotonic()
    started, tenth = 0, count // 10
    sizes: list[dict[str, int]] = []
    print(f"{'ended':>12}{'after s':>10}{'instances KB':>14}{'history KB':>12}{'queue KB':>10}")
    with psycopg.connect(s.uri(), autocommit=True) as c, s.admin() as admin:
        while True:
            row = admin.execute("SELECT count(*) FROM duroxide.queue").fetchone()
            left = int(str(row and row[0]))
            if (started - left) >= tenth * (len(sizes) + 1):
                sizes.append(size(s))
                print(f"{started - left:>12,}{time.monotonic() - began:>10.0f}{sizes[-1]['instances']:>14}"
                      f"{sizes[-1]['history']:>12}{sizes[-1]['queue']:>10}", flush=True)
            over = started >= count or time.monotonic() - began > seconds
            if over and left == 0:
                break
            if not over and left < UNDER_WAY:
                c.execute((flows.START if steps == 3 else ONE).format(count=CHUNK))
                started += CHUNK
            else:
                time.sleep(0.02)
        took = time.monotonic() - began
        effects = admin.execute("SELECT sum(n) FROM hits").fetchone()
        say("workflows", f"{started:,}", f"{count:,}")
        say("steps a second", f"{steps * started / took:.0f}")
        say("effects", f"{effects and effects[0]}", f"{steps * started}")
    table(s)
    if len(sizes) > 4:
        for name in ("instances", "history", "queue"):
            say(f"{name}: size at the end beside that after a third",
                f"{sizes[-1][name] / sizes[len(sizes) // 3][name]:.2f}", "1")


def main() -> None:
    """Runs on a server with its default settings."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 86400.0
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    if steps not in (1, 3):
        raise SystemExit("workflows of 1 step or of 3 steps")
    with stage() as s:
        asyncio.run(migrate(s.uri(SERVICE)))
        flows.prepare(s)
        with s.dfproxy(command="worker", retention_max_instances=max(1000, count // 10), reconcile_interval=5):
            run(s, count, seconds, steps)


if __name__ == "__main__":
    main()
