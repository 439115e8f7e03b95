"""What Appendix B of the specification asks for and no other test does, through the proxy on each version."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.e2e.fix_dfproxy import Through, through_a_proxy
from tests.fix_postgres import Cluster, versions


@pytest.fixture
def c(through: Through) -> Iterator[psycopg.Connection[Any]]:
    with through.connect() as connection:
        yield connection


@pytest.fixture
def c18(through18: Through) -> Iterator[psycopg.Connection[Any]]:
    with through18.connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def quick(cluster18: Cluster) -> Iterator[Through]:
    """A proxy whose worker sends heartbeats often."""
    with through_a_proxy(cluster18, versions()[0], "--set", "lease=3") as through:
        yield through


def one(c: psycopg.Connection[Any], query: str, *arguments: object) -> Any:
    row = c.execute(query, arguments).fetchone()
    assert row is not None
    return row[0]


def ended(c: psycopg.Connection[Any], instance: str) -> Any:
    """The result of an instance that must complete."""
    assert one(c, "SELECT df.await_instance(%s, 60)", instance) == "completed", one(c, "SELECT df.error(%s)", instance)
    return json.loads(one(c, "SELECT df.result(%s)", instance))


def test_b3_a_chain_of_200_steps(c18: psycopg.Connection[Any]) -> None:
    chain = " ~> ".join(f"'SELECT {n} AS n'" for n in range(200))
    assert ended(c18, one(c18, f"SELECT df.start({chain})"))["rows"] == [{"n": 199}]


def test_b3_a_join_of_1001_branches(c18: psycopg.Connection[Any]) -> None:
    instance = one(c18, "SELECT df.start(df.join(VARIADIC (SELECT array_agg('SELECT ' || n ORDER BY n) FROM generate_series(1, 1001) n)))")
    assert len(ended(c18, instance)) == 1001
    assert one(c18, "SELECT count(*) FROM df.nodes WHERE instance_id = %s", instance) == 1002


def test_b4_functions_and_operators_give_the_same_text(c: psycopg.Connection[Any]) -> None:
    pairs = {
        "'SELECT 1' ~> 'SELECT 2' ~> 'SELECT 3'": "df.seq(df.seq('SELECT 1', 'SELECT 2'), 'SELECT 3')",
        "('SELECT 1' |=> 'a') & ('SELECT 2' |=> 'b')": "df.join(df.as('SELECT 1', 'a'), df.as('SELECT 2', 'b'))",
        "@> ('SELECT 1' ~> df.break('x')) | df.sleep(5)": "df.race(df.loop(df.seq('SELECT 1', df.break('x'))), df.sleep(5))",
        "'SELECT true' ?> 'SELECT 1' !> ('SELECT 2' ~> 'SELECT 3')": "df.if('SELECT true', 'SELECT 1', df.seq('SELECT 2', 'SELECT 3'))",
    }
    for operators, functions in pairs.items():
        assert one(c, f"SELECT ({operators}) = ({functions})") is True, operators


@pytest.mark.parametrize(("payload", "data"), [
    ("'{\"a\": [1]}'", {"a": [1]}), ("'hello'", "hello"), ("'42'", 42), ("'null'", None), ("'\"x\"'", "x"), ("''", ""),
])
def test_b10_payloads(c: psycopg.Connection[Any], payload: str, data: Any) -> None:
    instance = one(c, "SELECT df.start(df.wait_for_signal('go'))")
    c.execute(f"SELECT df.signal(%s, 'go', {payload})", (instance,))
    assert ended(c, instance) == {"signal_name": "go", "timed_out": False, "data": data}


def test_b10_a_signal_in_a_race_and_into_a_branch(c: psycopg.Connection[Any]) -> None:
    raced = one(c, "SELECT df.start(df.wait_for_signal('go') | df.sleep(600))")
    late = one(c, "SELECT df.start(df.wait_for_signal('go') | df.sleep(0))")
    both = one(c, "SELECT df.start(df.wait_for_signal('go') & df.wait_for_signal('go'))")
    c.execute("SELECT df.signal(%s, 'go', '1')", (raced,))
    for payload in ("1", "2"):
        c.execute("SELECT df.signal(%s, 'go', %s)", (both, payload))
    assert ended(c, raced)["data"] == 1
    assert ended(c, late) == {"slept": True, "seconds": 0}
    assert [branch["data"] for branch in ended(c, both)] == [1, 2]


def test_b11_cancelled_says_every_function(c: psycopg.Connection[Any]) -> None:
    instance = one(c, "SELECT df.start(df.sleep(600), 'cancel-me')")
    c.execute("SELECT df.cancel(%s, 'why')", (instance,))
    assert one(c, "SELECT df.await_instance(%s)", instance) == "cancelled"
    assert one(c, "SELECT df.status(%s)", instance) == "cancelled"
    assert one(c, "SELECT status FROM df.instance_info(%s)", instance) == "cancelled"
    assert one(c, "SELECT output FROM df.list_instances('cancelled', 10, 'cancel-me')") == "canceled: why"
    assert one(c, "SELECT df.cancel(%s)", instance) == f"Instance {instance} cancelled: Cancelled by user"
    assert one(c, "SELECT output FROM df.instances WHERE id = %s", instance) == "canceled: why"


def test_b12_a_schedule_is_computed_when_its_step_runs(c: psycopg.Connection[Any]) -> None:
    instance = one(c, "SELECT df.start(df.sleep(1) ~> df.wait_for_schedule('* * * * *'))")
    deadline = time.monotonic() + 60
    row = None
    while row is None and time.monotonic() < deadline:
        row = c.execute("""
            SELECT (h.meta->>'wake_at')::timestamptz > i.created_at + interval '1 s'
                   AND date_trunc('minute', (h.meta->>'wake_at')::timestamptz) = (h.meta->>'wake_at')::timestamptz
              FROM duroxide.history h JOIN duroxide.instances i ON i.id = h.instance_id
             WHERE i.id = %s AND h.node = 2 AND h.meta ? 'wake_at'""", (instance,)).fetchone()
        time.sleep(0.02)
    assert row == (True,)
    c.execute("SELECT df.cancel(%s)", (instance,))


def test_b21_the_extension_can_be_created_again(c: psycopg.Connection[Any]) -> None:
    c.execute("CREATE EXTENSION IF NOT EXISTS pg_durable")
    c.execute("CREATE EXTENSION pg_durable")
    with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
        c.execute("DROP EXTENSION pg_durable CASCADE")
    assert "dfproxy uninstall" in (caught.value.diag.message_hint or "")
    assert one(c, "SELECT sentinel FROM duroxide._worker_ready") is True


def test_b21_the_heartbeat_moves(quick: Through) -> None:
    with quick.connect() as c:
        seen: set[Any] = set()  # a machine that is busy may have the worker register anew
        deadline = time.monotonic() + 60
        while len(seen - {None}) < 2:
            assert time.monotonic() < deadline
            seen.add(one(c, "SELECT max(last_seen_at) FROM df._worker_epoch"))
            time.sleep(0.1)


def test_a_deleted_workflow_stops_running(quick: Through) -> None:
    with quick.connect() as c:
        c.execute("CREATE TABLE IF NOT EXISTS deleted (n int)")
        instance = one(c, "SELECT df.start('INSERT INTO deleted SELECT 1 FROM pg_sleep(600)')")
        running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dfproxy:step' AND query LIKE 'INSERT INTO deleted%%' AND state = 'active'"
        deadline = time.monotonic() + 60
        while one(c, running) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        c.execute("SELECT df.delete_instance(%s, force => true)", (instance,))
        while one(c, running) > 0:  # at the latest when the worker next compares notes with the database, once a lease
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert one(c, "SELECT count(*) FROM deleted") == 0
        assert one(c, "SELECT df.status(%s)", instance) is None
