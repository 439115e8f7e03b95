"""`make bench`: how fast dfproxy is beside the server itself, in one run on one machine.

Everything embedded and temporary. Ratios are medians of interleaved repeats; absolute figures tell of the machine.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

import proxy
from proxy.demo import Served
from proxy.local import APP_ROLE, DATABASE, LocalServer

SECONDS = 4
REPEATS = 3
CLIENTS = 8
WORKFLOWS = 500

STATE = """
CREATE TABLE hits (id int PRIMARY KEY, n int NOT NULL DEFAULT 0);
INSERT INTO hits SELECT n FROM generate_series(1, 1000) n;
CREATE TABLE checkpoints (instance int, node int, result text, at timestamptz DEFAULT now());
"""
#: One step's transaction, as the engine runs it, without an engine.
STEP = """\\set id random(1, 1000)
BEGIN;
UPDATE hits SET n = n + 1 WHERE id = :id;
INSERT INTO checkpoints (instance, node, result) VALUES (:id, 1, '{"rows":[],"row_count":0}');
COMMIT;
"""
START = """SELECT df.start(df.seq(df.seq('UPDATE hits SET n = n + 1 WHERE id = ' || n %% 1000 + 1,
                                        'UPDATE hits SET n = n + 1 WHERE id = ' || (n + 333) %% 1000 + 1),
                                 'UPDATE hits SET n = n + 1 WHERE id = ' || (n + 666) %% 1000 + 1))
             FROM generate_series(1, %s) n"""


def pgbench(local: LocalServer, uri: str, *arguments: str) -> float:
    """Transactions a second of a pgbench run."""
    out = subprocess.run([str(local.cluster.bin_dir / "pgbench"), "-n", "-T", str(SECONDS), "-c", str(CLIENTS),
                          "-j", "2", *arguments, uri], capture_output=True, text=True, check=True).stdout
    found = re.search(r"tps = ([\d.]+)", out)
    assert found is not None, out
    return float(found[1])


def interleaved(*measures: Callable[[], float]) -> list[float]:
    """The median of each measure, taken in turns so that a slow moment of the machine hits all."""
    rounds = [[measure() for measure in measures] for _ in range(REPEATS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def steps_a_second(uri: str) -> float:
    """Three-step workflows, all started in one statement, to the end of the last one."""
    with psycopg.connect(uri, autocommit=True) as c:
        began = time.monotonic()
        c.execute(START, (WORKFLOWS,))
        left = "SELECT count(*) FROM df.instances WHERE status IN ('pending', 'running')"
        while c.execute(left).fetchone() != (0,):
            time.sleep(0.02)
        return 3 * WORKFLOWS / (time.monotonic() - began)


def run(local: LocalServer, folder: Path) -> None:
    """Measures and prints the table."""
    served = Served(local.upstream, folder)
    served.start()
    try:
        asyncio.run(local.grant())
        through = local.app_uri("127.0.0.1", served.port)
        # The socket that the proxy itself uses: what is left when the proxy is taken away.
        password = through.split(":", 2)[2].partition("@")[0]
        direct = f"postgresql://{APP_ROLE}:{password}@/{DATABASE}?host={local.cluster.socket_dir}&port=5432"
        with psycopg.connect(through, autocommit=True) as c:
            c.execute(STATE)
        subprocess.run([str(local.cluster.bin_dir / "pgbench"), "-i", "-q", through], check=True, capture_output=True)
        script = folder / "step.sql"
        script.write_text(STEP)
        print(f"dfproxy {proxy.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs, "
              f"PostgreSQL {local.version}; {CLIENTS} clients, {REPEATS} x {SECONDS} s")
        print(f"{'what':<44}{'dfproxy':>10}{'yardstick':>12}{'ratio':>8}")
        for name, mode in (("pgbench -S, simple", "simple"), ("pgbench -S, prepared", "prepared")):
            ours, theirs = interleaved(lambda m=mode: pgbench(local, through, "-S", "-M", m),  # type: ignore[misc]
                                       lambda m=mode: pgbench(local, direct, "-S", "-M", m))  # type: ignore[misc]
            print(f"{name + ' (tps; direct)':<44}{ours:>10,.0f}{theirs:>12,.0f}{ours / theirs:>8.2f}")
        ours, theirs = interleaved(lambda: steps_a_second(through),
                                   lambda: pgbench(local, direct, "-M", "prepared", "-f", str(script)))
        print(f"{'steps (1/s; such transactions by pgbench)':<44}{ours:>10,.0f}{theirs:>12,.0f}{ours / theirs:>8.2f}")
    finally:
        served.stop()


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="dfproxy-bench-") as name:
        folder = Path(name)
        os.chmod(folder, 0o711)
        local = LocalServer(folder / "data")
        try:
            await local.start()
            await asyncio.to_thread(run, local, folder)
        finally:
            await local.stop()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
