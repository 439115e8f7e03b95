"""The real command, as a subprocess, in front of a real PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from proxy.embedded import Cluster
from tests.fix_postgres import Database, free_port, fresh_database, versions

READY = re.compile(r"dfproxy ready on (\S+):(\d+)")


class Proxy:
    """One `dfproxy serve` process (or tree); `kill` and `start` again at will, on the same port."""

    def __init__(self, upstream: str, *options: str, home: Path | None = None) -> None:
        self.upstream = upstream
        self.options = options
        self.port = free_port()
        self.home = home or Path(tempfile.mkdtemp(prefix="dfproxy-home-"))
        self.log = self.home / "dfproxy.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits for its ready line. Raises AssertionError with its output if it ends instead."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DFPROXY_"))}
        environment |= {"HOME": str(self.home), "PYTHONUNBUFFERED": "1", "DFPROXY_UPSTREAM": self.upstream}
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy.cli", "serve", "--listen", f"127.0.0.1:{self.port}", *self.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.home, start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with self.log.open("rb") as log:
                log.seek(offset)
                text = log.read().decode()
            if READY.search(text):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"dfproxy did not become ready:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILLs it and everything that it started."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERMs it and returns its exit status."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def dsn(self, user: str, database: str) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"


@contextlib.contextmanager
def running_proxy(upstream: str, *options: str) -> Iterator[Proxy]:
    """A proxy that is stopped at the end, however the test ended."""
    proxy = Proxy(upstream, *options)
    proxy.start()
    try:
        yield proxy
    finally:
        if proxy.process is not None and proxy.process.poll() is None:
            proxy.kill()


class Through:
    """A database as seen through a proxy."""

    def __init__(self, proxy: Proxy, database: Database) -> None:
        self.proxy = proxy
        self.database = database
        self.dsn = proxy.dsn(database.owner, database.name)

    def connect(self, **arguments: object) -> psycopg.Connection:
        return psycopg.connect(self.dsn, autocommit=True, **arguments)  # type: ignore[arg-type]

    def psql(self, *arguments: str, script: str | None = None, check: bool = True,
             timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs psql, unaligned and without a start-up file, with a script on its standard input."""
        done = subprocess.run(
            [str(self.database.cluster.bin_dir / "psql"), "-X", "-A", "-t", *arguments, self.dsn],
            input=script or "", capture_output=True, text=True, timeout=timeout, check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def wait(self, instance: str, timeout: float = 60) -> str:
        """Waits for an instance's end from a session of its own, and returns its status."""
        with self.connect() as c:
            row = c.execute("SELECT df.await_instance(%s, %s)", (instance, int(timeout))).fetchone()
            assert row is not None
            return str(row[0])


@contextlib.contextmanager
def through_a_proxy(cluster: Cluster, version: int, *options: str) -> Iterator[Through]:
    """A proxy of one's own in front of a fresh database, for tests that kill or stop it, or set something."""
    with fresh_database(cluster, version) as database, running_proxy(database.dsn(), *options) as proxy:
        yield Through(proxy, database)


@pytest.fixture(scope="session")
def _kept(_all_clusters: dict[int, Cluster]) -> Iterator[Callable[[int], Through]]:
    """One proxy in front of one database for each version: starting them takes longer than most tests."""
    made: dict[int, Through] = {}
    with contextlib.ExitStack() as stack:

        def get(version: int) -> Through:
            if version not in made:
                made[version] = stack.enter_context(through_a_proxy(
                    _all_clusters[version], version, "--set", "new_transaction_start_timeout=10"))  # machines are busy
            return made[version]

        yield get


#: Takes away what a test has left: workflows, variables, and everything in schema public.
_CLEAN = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'dfproxy:step' AND state <> 'idle';
DELETE FROM duroxide.vars;
DROP SCHEMA public CASCADE;
CREATE SCHEMA public AUTHORIZATION pg_database_owner;
GRANT USAGE ON SCHEMA public TO PUBLIC;
"""


def _cleaned(through: Through) -> Iterator[Through]:
    yield through
    assert through.proxy.process is not None
    assert through.proxy.process.poll() is None, f"the proxy that tests share has ended:\n{through.proxy.log.read_text()[-4000:]}"
    with psycopg.connect(through.database.superuser_dsn, autocommit=True) as c:
        c.execute("SET client_min_messages = warning")
        # One transaction each: to delete several while the worker ends several could be a deadlock.
        for (instance,) in c.execute("SELECT id FROM duroxide.instances").fetchall():
            c.execute("SELECT df.delete_instance(%s, force => true)", [instance])
        for statement in _CLEAN.split(";"):
            c.execute(statement)  # type: ignore[call-overload]


@pytest.fixture
def through(_kept: Callable[[int], Through], pg_version: int) -> Iterator[Through]:
    """A proxy in front of a database with nothing of one's own in it, on each version of PostgreSQL."""
    yield from _cleaned(_kept(pg_version))


@pytest.fixture
def through18(_kept: Callable[[int], Through]) -> Iterator[Through]:
    """The same on the newest version only."""
    yield from _cleaned(_kept(versions()[0]))
