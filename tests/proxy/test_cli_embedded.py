"""`dfproxy serve` without a server of one's own: a newcomer's first minute, and what crashes leave behind. And the demo."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from proxy.embedded import Cluster, bin_dir
from tests.proxy.test_cli import call, one_sentence, running, wait_until

TABLE = "CREATE TABLE documents (id int PRIMARY KEY, processed boolean NOT NULL DEFAULT false)"
WORKFLOW = """SELECT df.start('SELECT id FROM documents WHERE NOT processed' |=> 'batch'
                              ~> 'UPDATE documents SET processed = true WHERE id = ANY($batch)')"""


def cluster(home: Path) -> Cluster:
    """The embedded server under a home folder, as another process sees it."""
    (found,) = home.rglob("pg18")
    return Cluster(found, bin_dir(18))


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty home. Not in pytest's folder: that is closed, again at each run, to the user that PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="dfproxy-home-", ignore_cleanup_errors=True) as name:
        yield Path(name)
        for data in Path(name).rglob("PG_VERSION"):
            Cluster(data.parent, bin_dir(18)).stop("immediate")


def run_workflow(uri: str, count: int) -> None:
    with psycopg.connect(uri, autocommit=True) as c:
        c.execute("INSERT INTO documents SELECT coalesce(max(id), 0) + n FROM generate_series(1, %s) n,"
                  " (SELECT max(id) AS id FROM documents) d GROUP BY n", (count,))
        row = c.execute(WORKFLOW).fetchone()
        assert c.execute("SELECT df.await_instance(%s, 60)", row).fetchone() == ("completed",)
        assert c.execute("SELECT count(*) FROM documents WHERE NOT processed").fetchone() == (0,)


def test_a_newcomer_with_an_empty_home_and_crashes_later(home: Path) -> None:
    with running(home, "serve", "--listen", "127.0.0.1:0", real=True) as it:
        with psycopg.connect(it.uri, autocommit=True) as c:
            c.execute(TABLE)
            c.execute("CREATE EXTENSION IF NOT EXISTS vector")
            assert c.execute("SELECT '[1,2]'::vector <-> '[1,3]'").fetchone() == (1.0,)
        run_workflow(it.uri, 10)
        pg = cluster(home)
        first = pg.pid()
        assert first is not None

        # PostgreSQL is killed under a running dfproxy: it comes back by itself, and workflows run again.
        pg.kill()
        wait_until(lambda: pg.pid() not in (None, first), "PostgreSQL was not started again")

        def served() -> bool:
            try:
                run_workflow(it.uri, 10)
            except psycopg.OperationalError:
                return False  # it may still be recovering
            return True

        wait_until(served, "no workflow runs after PostgreSQL was killed")
        survivor = pg.pid()
        it.process.kill()
        it.process.wait()
    # dfproxy was killed: PostgreSQL still runs, and the next start finds it.
    assert pg.pid() == survivor
    with running(home, "serve", "--listen", "127.0.0.1:0") as it:
        assert pg.pid() == survivor
        run_workflow(it.uri, 10)

        said = one_sentence(call(home, "serve", "--listen", "127.0.0.1:0"), 1)
        assert f"another dfproxy (process {it.process.pid}) uses the data folder" in said
        assert pg.pid() == survivor

        assert it.stop() == 0
    assert pg.pid() is None


def test_nobody_gets_in_without_a_password(home: Path) -> None:
    with running(home, "serve", "--no-engine", "--listen", "127.0.0.1:0") as it:
        for user in ("app", "postgres", "dfproxy"):
            with pytest.raises(psycopg.OperationalError, match="assword"):
                psycopg.connect(f"postgresql://{user}@127.0.0.1:{it.port}/app", password="guess")
        (kept,) = home.rglob("credentials.json")
        assert kept.stat().st_mode & 0o077 == 0
        assert it.stop(signal.SIGINT) == 0


def test_an_initdb_that_was_killed_is_begun_again(home: Path) -> None:
    data = home / "data"
    (data / "pg18.new").mkdir(parents=True)
    (data / "pg18.new" / "PG_VERSION").write_text("18\n")
    with running(home, "serve", "--no-engine", "--listen", "127.0.0.1:0", "--data-dir", str(data)) as it:
        with psycopg.connect(it.uri) as c:
            assert c.execute("SELECT current_user::text").fetchone() == ("app",)
        assert it.stop() == 0


def test_a_stale_pid_file_is_no_server(home: Path) -> None:
    with running(home, "serve", "--no-engine", "--listen", "127.0.0.1:0") as it:
        assert it.stop() == 0
    pg = cluster(home)
    # What a power cut leaves: the file of a process whose number another one has by now.
    (pg.data_dir / "postmaster.pid").write_text(f"{os.getpid()}\n{pg.data_dir}\n")
    assert pg.pid() is None
    (pg.data_dir / "postmaster.pid").unlink()


def test_the_demo(home: Path) -> None:
    done = call(home, "demo", timeout=110, TMPDIR=str(home))
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "kill -9" in done.stdout
    for line in ("documents processed: 10,000", "log rows: 10,000", "documents logged twice or never: 0"):
        assert f"✓ {line}" in done.stdout
    assert "Each document exactly once" in done.stdout
    # It leaves no process behind.
    wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or ())],
               "the demo left processes behind")
