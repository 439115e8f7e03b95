"""Prints a table with a column for each measure and a line for each engine."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import psutil
import psycopg

from bench import flows
from bench.measure import median
from bench.others.program import AT_A_TIME, HOUR, rows_of
from bench.stage import PASSWORD, SERVICE, Stage, stage

#: For the throughput: seconds of warming up, and of counting.
WARM, COUNTED = 3, 10
ALONE, PARKED, IDLE = 30, 5_000, 10
#: Workflows during which the engine is killed three times.
KILLED, KILLS = 300, 3
LOGIN = "engine"
HITS = "SELECT COALESCE(sum(n), 0) FROM hits"


class _OverError(Exception):
    """An engine's program was ended in the middle of an order."""


class Engine(ABC):
    """An engine in a database of its own."""

    def __init__(self, made: Stage, name: str, *, many: int) -> None:
        self.stage, self.name = made, name
        self.many = many  #: workflows that are more than it can do while they are counted
        self.database = f"other_{name}"
        with made.admin("postgres") as c:
            c.execute(f"CREATE DATABASE {self.database} OWNER {LOGIN}")
            c.execute(f"GRANT CREATE ON DATABASE {self.database} TO {SERVICE}")
        self.uri = made.uri(LOGIN, self.database)
        with psycopg.connect(self.uri, autocommit=True) as c:
            c.execute(flows.TABLES.partition("CREATE TABLE checkpoints")[0])

    @abstractmethod
    def run(self) -> contextlib.AbstractContextManager[psutil.Process]:
        """The process that does the work; it is ended at the end."""

    @abstractmethod
    def start(self, first: int, count: int) -> None:
        """Starts workflows with these numbers."""

    @abstractmethod
    def park(self, count: int) -> None:
        """Starts workflows that sleep for an hour."""

    @abstractmethod
    def one(self, number: int) -> None:
        """Starts one and waits for its end as its users would."""

    # -- what is measured --

    def ask(self, query: str) -> float:
        """One figure from its database."""
        with self.stage.admin(self.database) as c:
            row = c.execute(query).fetchone()
            return float(str(row and row[0]))

    def until(self, hits: float, seconds: float) -> float:
        """Waits for so many UPDATEs, as long as one comes every so many seconds; how many there are."""
        found, at = self.ask(HITS), time.monotonic()
        while found < hits and time.monotonic() - at < seconds:
            time.sleep(0.05)
            if (now := self.ask(HITS)) > found:
                found, at = now, time.monotonic()
        return found

    def measure(self) -> Iterator[str]:
        """The figures, in the order of the table."""
        commits = f"SELECT xact_commit FROM pg_stat_database WHERE datname = '{self.database}'"
        with self.run():
            for number in range(5):
                self.one(number)
            alone = []
            for number in range(5, 5 + ALONE):
                began = time.perf_counter()
                self.one(number)
                alone.append(time.perf_counter() - began)
        # Some take longer to start workflows than to run them: they are counted while they do both.
        with ThreadPoolExecutor(1) as pool:
            with self.run():
                starting = pool.submit(self.start, 1_000, self.many)
                time.sleep(WARM)
                began, hits, committed = time.monotonic(), self.ask(HITS), self.ask(commits)
                time.sleep(COUNTED)
                hits, took = self.ask(HITS) - hits, time.monotonic() - began
                committed = self.ask(commits) - committed
            if (fault := starting.exception()) is not None and not isinstance(fault, _OverError):
                raise fault
        yield f"{hits / took:,.0f}"
        yield f"{committed / hits * 3:.0f}"
        yield f"{median(alone) * 1000:.1f}"
        self.clean()
        with self.run():
            self.park(PARKED)
            yield f"{self.idle() * 100:.1f}"
        self.clean()
        yield self.killed()

    def idle(self) -> float:
        """Cores that the server is busy with: the least in a minute, as some take a while to put all to sleep."""
        least = float("inf")
        for _ in range(6):
            spent = self.stage.server_cpu()
            time.sleep(IDLE)
            least = min(least, (self.stage.server_cpu() - spent) / IDLE)
        return least

    def killed(self) -> str:
        """UPDATEs too many, and too few, after three kill -9."""
        expected = self.ask(HITS) + 3 * KILLED
        with self.run():
            self.start(500_000, KILLED)
        for _ in range(KILLS):
            with self.run() as process:
                self.until(self.ask(HITS) + random.randint(5, 100), 60)
                process.kill()
        with self.run():
            found = self.until(expected, 90)
            time.sleep(2)  # what comes twice may come late
            found = self.ask(HITS)
        return f"{found - expected:+.0f}"

    @abstractmethod
    def clean(self) -> None:
        """Forgets all workflows."""


class Ours(Engine):
    """`dfproxy worker`; workflows are started as its users start them, with SQL through a session of the server."""

    PARK = f"SELECT count(df.start(df.sleep({HOUR}))) FROM generate_series(1, %s)"

    @contextlib.contextmanager
    def run(self) -> Iterator[psutil.Process]:
        with self.stage.dfproxy("dfproxy", database=self.database, max_user_connections=AT_A_TIME) as program:
            self.stage.grant(self.database)
            with self.stage.admin(self.database) as c:
                c.execute("GRANT ALL ON hits TO app")
            uri = self.stage.uri(database=self.database, port=program.port)
            with psycopg.connect(uri, autocommit=True) as self.session:
                yield program.process

    def start(self, first: int, count: int) -> None:
        rows = [f"(n + {3333 * step}) % 10000 + 1" for step in range(3)]  # as rows_of
        steps = " ~> ".join(f"('UPDATE hits SET n = n + 1 WHERE id = ' || {row})" for row in rows)
        self.session.execute(f"SELECT count(df.start({steps})) FROM generate_series({first}, {first + count - 1}) n")

    def park(self, count: int) -> None:
        self.session.execute(self.PARK, (count,))

    def one(self, number: int) -> None:
        graph = " ~> ".join(f"'UPDATE hits SET n = n + 1 WHERE id = {row}'" for row in rows_of(number))
        [instance] = self.session.execute(f"SELECT df.start({graph})").fetchone() or (None,)
        self.session.execute("SELECT df.await_instance(%s)", (instance,))

    def clean(self) -> None:
        with self.stage.admin(self.database) as c:
            c.execute("TRUNCATE duroxide.instances, duroxide.queue, duroxide.history, duroxide.signals")


class Other(Engine):
    """One of the programs here."""

    @contextlib.contextmanager
    def run(self) -> Iterator[psutil.Process]:
        process = subprocess.Popen([sys.executable, "-m", f"bench.others.{self.name}_program", self.uri],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = process
        try:
            self._hear("ready")
            yield psutil.Process(process.pid)
        finally:
            process.kill()
            process.communicate()

    def _hear(self, word: str) -> None:
        assert self.process.stdout is not None
        for heard in self.process.stdout:
            if heard.strip() == word:
                return
        raise _OverError(f"the program of {self.name} has ended")

    def _order(self, *order: object) -> None:
        assert self.process.stdin is not None
        print(*order, file=self.process.stdin, flush=True)
        self._hear("done")

    def start(self, first: int, count: int) -> None:
        self._order("start", first, count)

    def park(self, count: int) -> None:
        self._order("park", 0, count)

    def one(self, number: int) -> None:
        self._order("one", number)

    def clean(self) -> None:
        schemas = "SELECT nspname FROM pg_namespace WHERE nspname IN ('engine', 'dbos')"
        with self.stage.admin(self.database) as c:
            for (name,) in c.execute(schemas).fetchall():
                c.execute(f'DROP SCHEMA "{name}" CASCADE')


def main(wanted: list[str]) -> None:
    """Prints them; of all engines, or of these."""
    with stage() as made:
        with made.admin("postgres") as c:
            c.execute(f"CREATE ROLE {LOGIN} LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
        engines: list[Engine] = []
        for name in wanted or ["dfproxy", "dbos", "duroxide"]:
            if name == "dfproxy":
                engines.append(Ours(made, name, many=30_000))
            elif find_spec(name) is not None:
                engines.append(Other(made, name, many=5_000))
            else:
                print(f"{name} is not installed")
        print(f"{'':12}{'steps/s':>10}{'commits a workflow':>20}{'one alone, ms':>15}{'5,000 parked, % CPU':>21}"
              f"{'UPDATEs off after 3 kill -9':>29}")
        for engine in engines:
            print(f"{engine.name:12}", end="", flush=True)
            for width, figure in zip((10, 20, 15, 21, 29), engine.measure(), strict=True):
                print(f"{figure:>{width}}", end="", flush=True)
            print()


if __name__ == "__main__":
    main(sys.argv[1:])
