"""A short storm in every test run, and proof that its audit would notice broken promises."""

from __future__ import annotations

import asyncio
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


def _effect(place: str, pause: float = 0) -> Tree:
    query = f"INSERT INTO public.effects (instance, place) SELECT '{{sys_instance_id}}', '{place}' " \
            f"FROM (SELECT pg_catalog.pg_sleep({pause})) AS pause"
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
    """A worker is frozen in a step and replaced; then it wakes and commits what it had done, if it is let."""
    await _scene(database18)
    tree = seq(_effect("p1", 1.5), _effect("p2"))
    with Client(database18) as c:
        if not fenced:
            for (body,) in c.rows(FENCES):
                c.connection.execute(unfenced(body))
        instance = c.start(tree)
        running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dfproxy:step' AND state = 'active' " \
                  "AND datname = current_database()"
        with worker_process(database18, lease=2.0) as frozen:
            await until(lambda: c.one(running) == 1)
            os.kill(frozen.pid, unix.SIGSTOP)
            async with running_worker(database18, lease=3600.0) as other:
                c.execute("UPDATE duroxide.workers SET heartbeat_at = '-infinity' WHERE lease < interval '1 hour'")
                with psycopg.connect(database18.dsn(), autocommit=True) as reaper:
                    reaper.execute("SELECT duroxide.heartbeat(gen_random_uuid())")
                other.wake()
                await until(lambda: c.one(running) == 2)
                # The frozen one's statement has ended, and waits in its transaction for the worker to go on.
                await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' "
                                          "AND application_name = 'dfproxy:step' AND datname = current_database()") >= 1)
                os.kill(frozen.pid, unix.SIGCONT)
                await ended(c, instance)
                await asyncio.sleep(0)
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
