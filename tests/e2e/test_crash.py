"""kill -9, again and again: nothing is lost, no SQL step is done twice, nobody has to help."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import psycopg
import pytest

from proxy.embedded import Cluster
from tests.e2e.fix_dfproxy import Proxy, Through, running_proxy, through_a_proxy
from tests.fix_postgres import fresh_database, running_cluster, versions

DOCUMENTS = 10_000
SETUP = f"""
CREATE TABLE documents (id int PRIMARY KEY, processed boolean NOT NULL DEFAULT false);
CREATE TABLE log (document int NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
INSERT INTO documents SELECT generate_series(1, {DOCUMENTS});
"""
START = """
SELECT df.start(df.loop(
    'WITH batch AS (UPDATE documents SET processed = true
                     WHERE id IN (SELECT id FROM documents WHERE NOT processed ORDER BY id LIMIT 100) RETURNING id)
     INSERT INTO log SELECT id FROM batch RETURNING document' |=> 'done'
    ~> 'SELECT pg_sleep(0.02)',
    'SELECT count(*) > 0 FROM documents WHERE NOT processed'), 'crash')
"""
AUDIT = """
SELECT (SELECT count(*) FROM documents WHERE processed), (SELECT count(*) FROM log), (SELECT count(DISTINCT document) FROM log)
"""


@pytest.fixture
def through18(cluster18: Cluster) -> Iterator[Through]:
    """A proxy of the test's own, to be killed."""
    with through_a_proxy(cluster18, versions()[0]) as through:
        yield through


def run_to_end(dsn: str, instance: str, seconds: float = 90) -> str:
    """Polls from outside the proxy, reconnecting, until the instance has ended."""
    deadline = time.monotonic() + seconds
    status = "unknown"
    while time.monotonic() < deadline:
        try:
            with psycopg.connect(dsn, autocommit=True, connect_timeout=2) as c:
                while time.monotonic() < deadline:
                    row = c.execute("SELECT df.status(%s)", (instance,)).fetchone()
                    assert row is not None
                    status = row[0]
                    if status not in ("pending", "running"):
                        return status
                    time.sleep(0.1)
        except psycopg.OperationalError:
            time.sleep(0.1)
    return status


def progress(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as c:
        row = c.execute("SELECT count(*) FROM log").fetchone()
        assert row is not None
        return int(row[0])


@pytest.mark.timeout(180)
def test_the_proxy_is_killed_five_times(through18: Through) -> None:
    through18.psql(script=SETUP)
    with through18.connect() as c:
        row = c.execute(START).fetchone()
    assert row is not None
    direct = through18.database.dsn()
    chance = random.Random(20261120)
    seen = -1
    for _ in range(5):
        time.sleep(chance.uniform(0.1, 0.6))
        through18.proxy.kill()
        now = progress(direct)
        assert now < DOCUMENTS, "the work ended before the kills did: nothing was tested"
        assert now >= seen
        seen = now
        through18.proxy.start()
    assert run_to_end(direct, row[0]) == "completed"
    with psycopg.connect(direct) as c:
        assert c.execute(AUDIT).fetchone() == (DOCUMENTS, DOCUMENTS, DOCUMENTS)


@pytest.mark.timeout(180)
def test_postgresql_itself_is_killed() -> None:
    version = versions()[0]
    with (
        running_cluster(version, durable=True) as cluster,
        fresh_database(cluster, version) as database,
        running_proxy(database.dsn(), "--set", "lease=3") as proxy,
    ):
        through = Through(proxy, database)
        through.psql(script=SETUP)
        with through.connect() as c:
            row = c.execute(START).fetchone()
        assert row is not None
        for _ in range(3):
            time.sleep(0.5)
            cluster.kill()
            cluster.start()
        assert proxy.process is not None
        assert run_to_end(database.dsn(), row[0]) == "completed"
        assert proxy.process.poll() is None, "dfproxy itself must survive a crash of PostgreSQL"
        assert through.psql(script="SELECT 1").stdout.strip() == "1"
        with psycopg.connect(database.dsn()) as c:
            assert c.execute(AUDIT).fetchone() == (DOCUMENTS, DOCUMENTS, DOCUMENTS)


def test_two_proxies_share_the_work_and_one_takes_over(through18: Through) -> None:
    database = through18.database
    through18.psql(script="CREATE TABLE hits (n int)")
    second = Proxy(database.dsn(), "--set", "lease=2")
    second.start()
    try:
        with through18.connect() as c:
            ids = [r[0] for r in c.execute("""
                SELECT df.start('INSERT INTO hits VALUES (' || n || ')' ~> 'SELECT pg_sleep(0.3)'
                                ~> ('INSERT INTO hits VALUES (' || n + 1000 || ')')) FROM generate_series(1, 30) n""").fetchall()]
            time.sleep(0.4)
            second.kill()
            for instance in ids:
                assert run_to_end(database.dsn(), instance) == "completed", \
                    c.execute("SELECT df.error(%s)", (instance,)).fetchone()
            assert c.execute("SELECT count(*), count(DISTINCT n) FROM hits").fetchone() == (60, 60)
    finally:
        if second.process is not None and second.process.poll() is None:
            second.kill()


def test_sigterm_ends_it_with_status_0_and_gives_its_work_back(through18: Through) -> None:
    through18.psql(script="CREATE TABLE hits (n int)")
    with through18.connect() as c:
        row = c.execute("SELECT df.start('SELECT pg_sleep(0.2)' ~> 'INSERT INTO hits VALUES (1)')").fetchone()
    assert row is not None
    assert through18.proxy.stop() == 0
    with psycopg.connect(through18.database.dsn()) as c:
        assert c.execute("SELECT count(*) FROM duroxide.queue WHERE owner IS NOT NULL").fetchone() == (0,)
    through18.proxy.start()
    assert through18.wait(row[0]) == "completed"
