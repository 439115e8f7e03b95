"""A short storm in every test run, and proof that its audit would notice broken promises."""

from __future__ import annotations

import os
import random
import signal as unix
import time

import psycopg
import pytest

from tests.chaos.audit import audit
from tests.chaos.storm import FENCES, SCENE, Plan, storm, unfenced
from tests.chaos.workload import Workload, expected, nodes, signals_of
from tests.engine.fix_graphs import Tree, race, seq, sleep, sql
from tests.engine.helpers import Client, ended, install, running_worker, until, worker_process
from tests.fix_postgres import Database


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_storm_breaks_no_promise() -> None:
    report = await storm(Plan(seconds=20, seed=int(time.time())))
    assert report.findings.workflows > 20
    assert report.faults
    assert report.findings.broken == 0, "\n".join([*report.lines(), report.log])


async def _scene(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        c.execute(SCENE.replace("GRANT INSERT ON public.effects TO app;", ""))


def _effect(place: str, gate: str = "true") -> Tree:
    query = f"INSERT INTO public.effects (instance, place) SELECT '{{sys_instance_id}}', '{place}' " \
            f"FROM (SELECT {gate}) AS gate"
    return sql(query) | {"place": place, "loops": []}


async def test_the_audit_sees_what_is_lost_doubled_wrong_and_stuck(database18: Database) -> None:
    await _scene(database18)
    tree = seq(_effect("p1"), race(_effect("p2"), seq(sleep(60), _effect("p3"))), _effect("p4"))
    with Client(database18) as c:
        instances = [c.start(tree) for _ in range(5)]
        async with running_worker(database18):
            await ended(c, *instances)
        workflows = dict.fromkeys(instances, tree)
        found = audit(database18.dsn(), workflows, {}, None)
        assert (found.broken, found.completed, found.effects) == (0, 5, 15)
        lost, doubled, wrong, stuck, surprised = instances
        c.execute("DELETE FROM effects WHERE instance = %s AND place = 'p4'", lost)
        c.execute("INSERT INTO effects SELECT * FROM effects WHERE instance = %s AND place = 'p1'", doubled)
        c.execute("UPDATE duroxide.instances SET status = 'failed' WHERE id = %s", wrong)
        c.execute("UPDATE duroxide.instances SET status = 'running' WHERE id = %s", stuck)
        c.execute("INSERT INTO effects (instance, place) VALUES (%s, 'p9')", surprised)
        found = audit(database18.dsn(), {**workflows, "00000000": tree}, {}, None)
    # One more is lost: a start that committed, and whose instance is not there.
    assert (found.lost, found.doubled, found.wrong, found.stuck, found.uncalled) == (2, 1, 1, 1, 1)


async def test_the_audit_sees_what_was_called(database18: Database) -> None:
    await _scene(database18)
    with Client(database18) as c:
        instance = c.start(_effect("p1"))
        async with running_worker(database18):
            await ended(c, instance)
    call = {"type": "HTTP", "place": "h2", "loops": []}
    tree = seq(_effect("p1"), call, call | {"place": "h3"})
    first, second = (f"{instance} h2", "k2"), (f"{instance} h3", "k3")

    def look(*arrived: tuple[str, str]) -> tuple[int, int, int]:
        found = audit(database18.dsn(), {instance: tree}, {}, None, arrived)
        return found.lost, found.wrong, found.repeated

    assert look(first, second) == (0, 0, 0)
    assert look(first, second, second) == (0, 0, 1)
    assert look(first) == (1, 0, 0)
    assert look(first, second, (second[0], "k4")) == (0, 1, 1)
    assert look(first, (second[0], "k2")) == (0, 1, 0)


@pytest.mark.parametrize("fenced", [True, False])
async def test_the_audit_notices_a_broken_fence(database18: Database, fenced: bool) -> None:
    """A worker is frozen in a step and replaced; then it wakes and commits what it had done, if it is let.

    Its lease is long, so that it doesn't give up by itself before it has tried. Who goes on when is up to locks:
    1 is for who comes first, who then waits for 11; who comes second waits for 12, and who has got to p2 for 13.
    """
    await _scene(database18)
    tree = seq(_effect("p1", "CASE WHEN pg_catalog.pg_try_advisory_xact_lock(1) THEN pg_catalog.pg_advisory_xact_lock(11) "
                             "ELSE pg_catalog.pg_advisory_xact_lock(12) END"),
               _effect("p2", "pg_catalog.pg_advisory_xact_lock_shared(13)"))
    sessions = "FROM pg_stat_activity WHERE application_name = 'dfproxy:step' AND datname = current_database()"
    waiting = f"SELECT count(*) {sessions} AND wait_event_type = 'Lock'"
    with Client(database18) as c:
        if not fenced:
            for (body,) in c.rows(FENCES):
                c.connection.execute(unfenced(body))
        for gate in (11, 12, 13):
            c.execute("SELECT pg_advisory_lock(%s)", gate)
        instance = c.start(tree)
        with worker_process(database18, lease=1800.0) as frozen:
            await until(lambda: c.one(waiting) == 1)
            os.kill(frozen.pid, unix.SIGSTOP)
            async with running_worker(database18, lease=3600.0) as other:
                c.execute("UPDATE duroxide.workers SET heartbeat_at = '-infinity' WHERE lease < interval '1 hour'")
                with psycopg.connect(database18.dsn(), autocommit=True) as reaper:
                    reaper.execute("SELECT duroxide.heartbeat(gen_random_uuid())")
                other.wake()
                await until(lambda: c.one(waiting) == 2)
                c.execute("SELECT pg_advisory_unlock(11)")
                # The frozen one's statement has ended, and waits in its transaction for the worker to go on.
                [(pid, xid)] = await until(lambda: c.rows(
                    f"SELECT pid, backend_xid::text {sessions} AND state = 'idle in transaction'"))
                os.kill(frozen.pid, unix.SIGCONT)
                await until(lambda: not c.rows(f"SELECT {sessions} AND pid = %s AND backend_xid::text = %s", pid, xid))
                c.execute("SELECT pg_advisory_unlock(12)")
                await until(lambda: c.one("SELECT count(*) FROM effects WHERE place = 'p1'") >= (1 if fenced else 2))
                c.execute("SELECT pg_advisory_unlock(13)")
                await ended(c, instance)
        found = audit(database18.dsn(), {instance: tree}, {}, None)
    assert found.lost == 0
    assert (found.doubled > 0) is not fenced, "\n".join(found.lines())


def test_workloads_hold_every_kind_of_node() -> None:
    kinds: dict[str, int] = {}
    for seed in range(100):
        tree = Workload(random.Random(seed), schedules=True).workflow()
        for node in nodes(tree):
            kinds[node["type"]] = kinds.get(node["type"], 0) + 1
        want = expected(tree, {})
        assert want.required
        assert not want.required & want.optional
        assert all(payloads == [str(n) for n in range(1, len(payloads) + 1)] for payloads in signals_of(tree).values())
    assert set(kinds) == {"SQL", "THEN", "IF", "JOIN", "RACE", "LOOP", "BREAK", "SLEEP", "SIGNAL", "HTTP", "WAIT_SCHEDULE"}
