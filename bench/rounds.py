"""`python -m bench.rounds [ROUNDS]`: an endless loop of one SQL step; what is left behind after 100,000 rounds."""

from __future__ import annotations

import asyncio
import sys
import time

import psycopg

from bench.parking import say
from bench.stage import APP, SERVICE, Program, Stage, stage
from engine.migrate import migrate

#: Rows of everything that one instance can leave.
ROWS = """
SELECT (SELECT count(*) FROM duroxide.history), (SELECT count(*) FROM duroxide.queue),
       (SELECT count(*) FROM duroxide.signals), df_round
  FROM (SELECT COALESCE(max((meta->>'round')::bigint), 1) AS df_round FROM duroxide.history WHERE event = 'round') r
"""
SIZES = """
SELECT relname, n_live_tup, n_dead_tup, pg_relation_size(relid) / 1024, pg_indexes_size(relid) / 1024,
       round(100.0 * n_tup_hot_upd / NULLIF(n_tup_upd, 0)), autovacuum_count
  FROM pg_stat_user_tables
 WHERE schemaname = 'duroxide' AND relname IN ('history', 'queue', 'instances', 'signals', 'workers')
 ORDER BY 1
"""


def table(s: Stage) -> None:
    """What the server knows of its tables."""
    print(f"{'':12}{'live':>10}{'dead':>10}{'heap KB':>10}{'index KB':>10}{'HOT %':>8}{'vacuums':>9}")
    with s.admin() as c:
        c.execute("SELECT pg_stat_force_next_flush()")
        for name, live, dead, heap, index, hot, vacuums in c.execute(SIZES).fetchall():
            print(f"{name!s:12}{live:>10}{dead:>10}{heap:>10}{index:>10}{'' if hot is None else hot!s:>8}{vacuums:>9}")


def run(s: Stage, worker: Program, rounds: int) -> None:
    """Watches the loop until it has made so many rounds."""
    most = 0
    began = time.monotonic()
    with psycopg.connect(s.uri(), autocommit=True) as c, s.admin() as admin:
        c.execute("CREATE TABLE hits (id int PRIMARY KEY, n bigint) WITH (fillfactor = 50)")
        c.execute("INSERT INTO hits VALUES (1, 0)")
        row = c.execute("SELECT df.start(df.loop('UPDATE hits SET n = n + 1 WHERE id = 1'), 'endless')").fetchone()
        assert row is not None
        cpu, number = worker.cpu(), 0
        while number < rounds:
            time.sleep(0.5)
            history, queue, signals, number = admin.execute(ROWS).fetchone() or (0, 0, 0, 0)  # type: ignore[assignment]
            most = max(most, history + queue + signals)  # type: ignore[operator]
        took = time.monotonic() - began
        c.execute("SELECT df.cancel(%s)", row)
        c.execute("SELECT df.await_instance(%s)", row)
        while admin.execute("SELECT count(*) FROM duroxide.queue").fetchone() != (0,):
            time.sleep(0.05)
        done = c.execute("SELECT n FROM hits").fetchone()
        recorded = admin.execute("SELECT COALESCE(max((meta->>'round')::bigint), 1) FROM duroxide.history "
                                 "WHERE event = 'round'").fetchone()
        assert done is not None
        assert recorded is not None
        left = admin.execute("SELECT count(*) FROM duroxide.history").fetchone()
        say(f"{number:,} rounds (s)", f"{took:.0f}")
        say("rounds a second", f"{number / took:.0f}")
        say("CPU of the worker for each (ms)", f"{(worker.cpu() - cpu) / number * 1000:.2f}")
        say("most rows at any moment, in all tables", f"{most}", "11 rounds and a few")
        say("rows of history at the end", f"{left and left[0]}")
        say("rounds recorded as finished, and effects", f"{int(str(recorded[0])) - 1}, {done[0]}", "equal")
        say("memory of the worker (MB)", f"{worker.memory() / 2**20:.0f}", "below 200")
    table(s)


def main() -> None:
    """Runs one loop on a server with its default settings."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with stage() as s:
        asyncio.run(migrate(s.uri(SERVICE)))
        s.grant()
        with s.admin() as c:
            c.execute(f"GRANT CREATE ON SCHEMA public TO {APP}")
        with s.dfproxy(command="worker") as worker:
            run(s, worker, rounds)


if __name__ == "__main__":
    main()
