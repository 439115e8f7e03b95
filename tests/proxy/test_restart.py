"""The command is replaced by a second one while clients come and go: none of them notices."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg

from tests.fix_postgres import Database, free_port
from tests.proxy.test_adversity import eventually
from tests.proxy.test_cli import Running, children, running
from tests.proxy.test_manners import Load

SHARED = ("--no-engine", "--set", "reuse_port=on", "--set", "drain_timeout=20")


@contextlib.contextmanager
def serving(folder: Path, database: Database, port: int, *options: str) -> Iterator[Running]:
    folder.mkdir()
    with running(folder, "serve", "--listen", f"127.0.0.1:{port}", *SHARED, *options,
                 DFPROXY_UPSTREAM=database.dsn()) as it:
        yield it


def test_a_restart_without_a_gap(tmp_path: Path, database18: Database) -> None:
    """With one process: test_manners.test_a_second_proxy_takes_over."""
    port = free_port()
    dsn = f"postgresql://{database18.owner}@127.0.0.1:{port}/{database18.name}"
    with contextlib.ExitStack() as stack:

        def another(n: int) -> Running:
            return stack.enter_context(serving(tmp_path / str(n), database18, port, "--processes", "2"))

        it = another(0)
        with Load(dsn) as load:
            for n in (1, 2):
                load.go_on()
                following = another(n)
                load.go_on(30)
                assert it.stop() == 0
                load.go_on(30)
                it = following
        assert load.failures == []
        assert load.lost <= 4  # two processes ended twice


def test_processes_and_a_unix_socket(tmp_path: Path, database18: Database) -> None:
    port = free_port()
    folder = tmp_path / "sockets"
    folder.mkdir()
    options = ("--processes", "2", "--set", f"socket_dir={folder}")
    with serving(tmp_path / "home", database18, port, *options) as it:
        dsn = f"postgresql://{database18.owner}@/{database18.name}?host={folder}&port={port}"
        with psycopg.connect(dsn) as c:
            assert c.execute("SELECT 1").fetchone() == (1,)
        # The one that has the socket makes it again when it is replaced.
        for pid in children(it.process.pid):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: connects(dsn), 60)
        assert it.stop() == 0
        assert list(folder.iterdir()) == []


def connects(dsn: str) -> bool:
    try:
        with psycopg.connect(dsn, connect_timeout=5) as c:
            return c.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def test_a_hangup_changes_nothing_for_clients(tmp_path: Path, database18: Database) -> None:
    with serving(tmp_path / "home", database18, free_port(), "--processes", "2") as it:
        with psycopg.connect(f"postgresql://{database18.owner}@127.0.0.1:{it.port}/{database18.name}") as c:
            c.execute("CREATE TEMP TABLE t AS SELECT 1 AS a")
            before = children(it.process.pid)
            it.process.send_signal(signal.SIGHUP)
            for _ in range(20):
                assert c.execute("SELECT a FROM t").fetchone() == (1,)
            assert children(it.process.pid) == before
        assert it.stop() == 0
