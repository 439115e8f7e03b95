"""A model of several workers over one database: hypothesis claims, runs, commits, loses answers, leases and memory, sends
signals, cancels, parks, lets time pass, in any order. Interpreter, store and schema are the real ones.

What must hold at every moment: the effects in the database are exactly those of the steps that have a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, TypeVar

import asyncpg
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dsl.graph import Graph
from engine.interpreter import Interpreter
from engine.model import Changes, Key, StepError
from engine.settings import EngineSettings
from engine.store import LEASE_LOST, LeaseLostError, Store, checkpoint_arguments
from tests.engine.fix_graphs import brk, flatten, if_, join, loop, race, seq, signal, sleep, sql
from tests.engine.helpers import install, polled
from tests.fix_postgres import Database

T = TypeVar("T")

#: Of every kind of node. Fixed, so that what is drawn goes into the order of events.
TREES = [
    seq(sql("step", "a"), sql("step $a.v"), sql("step")),
    join(sql("step"), seq(sql("step"), sql("fail")), seq(sleep(1), sql("step"))),
    race(sql("step"), seq(sql("step"), sql("step"))),
    seq(race(signal("go"), seq(sleep(3), sql("step"))), sql("step")),
    loop(seq(sql("step", "x"), sql("step $x.v")), sql("again"), "l"),
    loop(join(sql("step"), sql("fail")), sql("again"), go_on=True),
    seq(signal("go", 5, "s"), sql("step {v}"), signal("go", 2), sql("step")),
    if_(sql("again in no loop"), sql("step"), seq(sleep(2), sql("step"))),
    loop(if_(sql("again"), seq(sql("step"), sleep(1)), brk("x"))),
    seq(join(signal("go", 3), signal("go", 4), sql("step")), sql("step")),
    loop(loop(race(sql("step"), sleep(1)), sql("again")), sql("again")),
    seq(sql("step"), sleep(0), sql("fail")),
]

CHECKPOINT = """SELECT duroxide.checkpoint($1, $2::text::uuid, $3::text::jsonb, $4, $5::text::bigint[], $6::text::text[],
                       $7::text::jsonb, $8::text::timestamptz, $9::text::jsonb)"""


class Holder:
    """An instance in a worker's memory. It may be a ghost: its lease gone, and it doesn't know."""

    def __init__(self, instance: str, token: str, run: Interpreter) -> None:
        self.instance = instance
        self.token = token
        self.run = run
        self.pending: dict[Key, str] = {}

    def look(self) -> None:
        self.pending.update({step.key: step.text for step in self.run.take_steps()})
        for key in self.run.take_aborts():
            self.pending.pop(key, None)


class Model(RuleBasedStateMachine):
    """Two workers at a time, any number one after the other."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stores: list[Store] = []
        self.held: list[dict[str, Holder]] = []
        self.ahead = timedelta(0)  # how much later than the server's clock it is in the model
        self.cancelled: set[str] = set()
        self.count = 0

    def do(self, awaitable: Awaitable[T]) -> T:
        async def wrapped() -> T:
            return await awaitable

        return self.runner.run(wrapped())

    @initialize(first=st.lists(st.integers(0, len(TREES) - 1), min_size=2, max_size=3))
    def open(self, first: list[int]) -> None:
        self.connection: asyncpg.Connection[Any] = self.do(asyncpg.connect(self.database.dsn()))
        self.do(self.connection.execute("TRUNCATE duroxide.instances, duroxide.queue, duroxide.history, "
                                        "duroxide.signals, duroxide.workers, public.effects"))
        for _ in range(2):
            self.held.append({})
            self.stores.append(self.do(self._worker()))
        for number in first:
            self.start(number)
        self.poll(0, 3, False)

    async def _worker(self) -> Store:
        store = Store(EngineSettings(dsn=self.database.dsn(), lease=3600.0, max_control_connections=3))
        await store.open()
        await store.register()
        return store

    def teardown(self) -> None:
        try:
            if self.stores:
                self.settle()
        finally:
            for store in self.stores:
                self.do(store.close())
            if self.stores:
                self.do(self.connection.close())
            self.runner.close()

    @property
    def now(self) -> datetime:
        return self.stores[0].clock.now() + self.ahead

    # -- what clients do ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.count < 6)
    @rule(tree=st.integers(0, len(TREES) - 1))
    def start(self, tree: int) -> None:
        self.count += 1
        self.do(self.connection.execute("INSERT INTO duroxide.instances (id, graph, vars) VALUES ($1, $2, '{\"v\":\"1\"}')",
                                        f"{self.count:08x}", json.dumps(flatten(TREES[tree]))))

    @rule(number=st.integers(0, 5), what=st.sampled_from(["go", "go", "early", "cancel"]))
    def call(self, number: int, what: str) -> None:
        """A client signals an instance, or cancels it."""
        instance = f"{number % self.count + 1:08x}"
        if what == "cancel":
            self.do(self.connection.fetchval("SELECT df.cancel($1)", instance))
            self.cancelled.add(instance)
        else:
            self.do(self.connection.fetchval("SELECT df.signal($1, $2)", instance, what))

    # -- what workers do ---------------------------------------------------------------------------------------

    @rule(worker=st.integers(0, 1), limit=st.integers(1, 3), lost=st.sampled_from([False, False, False, True]))
    def poll(self, worker: int, limit: int, lost: bool) -> None:
        """`lost`: the answer of the poll never arrives; what it claimed is found later as owned and not held."""
        store = self.stores[worker]
        handled = set(store._handled)
        found = self.do(polled(store, limit))
        if lost:
            store._handled |= handled
            return
        for claim in found.claims:
            self._load(worker, claim.instance_id)
        for entry in found.inbox:
            holder = self.held[worker].get(entry.instance_id)
            if holder is None:
                continue
            store.handled(entry.seq)
            if entry.seq in self.seen.get((worker, entry.instance_id), set()):
                continue
            self.seen[worker, entry.instance_id].add(entry.seq)
            changes = holder.run.cancel(entry.name, self.now) if entry.kind == "cancel" \
                else holder.run.signal(entry.signal, self.now)
            self._record(worker, holder, changes)

    def audit(self, worker: int) -> None:
        owned = self.do(self.stores[worker].owned())
        self.do(self.stores[worker].release([i for i in owned if i not in self.held[worker]]))

    def _load(self, worker: int, instance: str) -> None:
        store = self.stores[worker]
        loaded = self.do(store.load([instance], [instance])).get(instance)
        if loaded is None:
            self.held[worker].pop(instance, None)
            return
        run = Interpreter(instance_id=instance, label=None, graph=Graph.from_json(loaded.graph), variables=loaded.variables,
                          checkpoints=loaded.checkpoints, signals=[s.signal for s in loaded.inbox if s.kind == "signal"])
        holder = self.held[worker][instance] = Holder(instance, loaded.token, run)
        self.seen[worker, instance] = {entry.seq for entry in loaded.inbox}
        if not self._record(worker, holder, run.begin(self.now)):
            return
        for entry in loaded.inbox:
            if entry.kind == "cancel" and not run.finished and not self._record(worker, holder, run.cancel(entry.name, self.now)):
                return

    def _record(self, worker: int, holder: Holder, changes: Changes) -> bool:
        """False: the worker has lost the instance."""
        try:
            if changes:
                self.do(self.stores[worker].checkpoint(holder.instance, holder.token, changes))
        except LeaseLostError:
            del self.held[worker][holder.instance]
            return False
        holder.look()
        if holder.run.finished:
            del self.held[worker][holder.instance]
            return False
        return True

    @precondition(lambda self: any(h.pending for held in self.held for h in held.values()))
    @rule(fates=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["well", "well", "well", "answer lost", "connection lost"])),
                         min_size=1, max_size=4))
    def steps(self, fates: list[tuple[int, str]]) -> None:
        """Steps end, and their transactions commit or not; the worker may not hear which."""
        for number, fate in fates:
            able = [(n, h) for n, held in enumerate(self.held) for h in held.values() if h.pending]
            if able:
                self._step(*able[number % len(able)], fate)

    def _step(self, worker: int, holder: Holder, fate: str) -> None:
        key, text = min(holder.pending.items())
        del holder.pending[key]
        result = outcome(key, text)
        if isinstance(result, StepError):
            self._record(worker, holder, holder.run.step_failed(key, result, self.now, self.now))
            return
        changes = holder.run.step_completed(key, result, None, None, self.now, self.now)
        arguments = checkpoint_arguments(holder.instance, holder.token, changes, big=key)
        try:
            with suppress(InterruptedError):
                self.do(self._transaction(holder.instance, key, arguments, commit=fate != "connection lost"))
        except asyncpg.PostgresError as e:
            if e.sqlstate != LEASE_LOST:
                raise
            del self.held[worker][holder.instance]
            return
        if fate == "well":
            holder.look()
            if holder.run.finished:
                del self.held[worker][holder.instance]
            return
        try:
            self.do(self.stores[worker].refence(holder.instance))
        except LeaseLostError:
            del self.held[worker][holder.instance]
            return
        self._load(worker, holder.instance)

    async def _transaction(self, instance: str, key: Key, arguments: list[str | None], *, commit: bool) -> None:
        async with self.connection.transaction():
            await self.connection.execute("INSERT INTO public.effects VALUES ($1, $2, $3)", instance, *key)
            await self.connection.execute(CHECKPOINT, *arguments)
            if not commit:
                raise InterruptedError

    @rule(seconds=st.integers(0, 4))
    def timers_and_parks(self, seconds: int) -> None:
        self.time_passes(seconds)
        for worker in (0, 1):
            for holder in list(self.held[worker].values()):
                self._timer_or_park(worker, holder)

    def _timer_or_park(self, worker: int, holder: Holder) -> None:
        wake = holder.run.next_wake
        if wake is not None and wake <= self.now:
            self._record(worker, holder, holder.run.timers_due(self.now))
        elif not holder.run.running:
            assert wake is not None or holder.run.waiting_for
            # The queue knows only the server's clock.
            park = "infinity" if wake is None else (wake - self.ahead).isoformat()
            with suppress(LeaseLostError):
                self.do(self.stores[worker].checkpoint(holder.instance, holder.token, Changes(), park=park))
            del self.held[worker][holder.instance]

    def time_passes(self, seconds: int) -> None:
        self.ahead += timedelta(seconds=seconds)
        self.do(self.connection.execute("UPDATE duroxide.queue SET wake_at = wake_at - make_interval(secs => $1) "
                                        "WHERE isfinite(wake_at)", seconds))

    # -- what befalls workers ----------------------------------------------------------------------------------

    @rule(worker=st.integers(0, 1), what=st.sampled_from(["crash", "taken over", "taken over", "heartbeat", "audit"]))
    def misfortune(self, worker: int, what: str) -> None:
        match what:
            case "crash":
                self.crash(worker)
            case "taken over":
                self.taken_over(worker)
            case "heartbeat":
                self.heartbeat(worker)
            case _:
                self.audit(worker)

    def crash(self, worker: int) -> None:
        """The process is gone; a new one takes its place, and the old one's lease runs out."""
        self._expire(worker)
        self.held[worker] = {}
        self.do(self.stores[worker].close())
        self.do(asyncio.sleep(0))  # until its sockets are closed
        self.stores[worker] = self.do(self._worker())

    def taken_over(self, worker: int) -> None:
        """Its lease runs out and the other worker takes its instances; it goes on with what it remembers."""
        self._expire(worker)
        self.heartbeat(1 - worker)
        self.poll(1 - worker, 3, False)

    def heartbeat(self, worker: int) -> None:
        if not self.do(self.stores[worker].heartbeat()):
            self.held[worker] = {}
            self.do(self.stores[worker].register(self.stores[worker].worker_id))

    def _expire(self, worker: int) -> None:
        self.do(self.connection.execute("UPDATE duroxide.workers SET heartbeat_at = '-infinity' WHERE id = $1::text::uuid",
                                        self.stores[worker].worker_id))
        self.do(self.connection.fetchval("SELECT duroxide.heartbeat(gen_random_uuid())"))

    # -- what must hold ----------------------------------------------------------------------------------------

    @property
    def seen(self) -> dict[tuple[int, str], set[int]]:
        """What each worker's instances have taken in."""
        found: dict[tuple[int, str], set[int]] = self.__dict__.setdefault("_seen", {})
        return found

    @invariant()
    def effects_are_those_of_the_checkpoints(self) -> None:
        if not self.stores:
            return
        found = self.do(self.connection.fetch("SELECT instance, execution, node FROM public.effects ORDER BY 1, 2, 3"))
        recorded = self.do(self.connection.fetch("""
            SELECT h.instance_id, h.execution, h.node FROM duroxide.history h
              JOIN duroxide.instances i ON i.id = h.instance_id
             WHERE h.event = 'completed' AND i.graph->h.node->>'type' = 'SQL' ORDER BY 1, 2, 3"""))
        assert [tuple(r) for r in found] == [tuple(r) for r in recorded]

    @invariant()
    def nobody_owns_without_being_registered(self) -> None:
        if self.stores:
            assert self.do(self.connection.fetchval("SELECT count(*) FROM duroxide.queue q WHERE q.owner IS NOT NULL AND NOT "
                                                    "EXISTS (SELECT FROM duroxide.workers w WHERE w.id = q.owner)")) == 0

    def settle(self) -> None:
        """One worker alone, and time: everything must end, as one who looks on would say it must."""
        self.crash(0)
        self.crash(1)
        for _ in range(400):
            if not self.do(self.connection.fetchval("SELECT count(*) FROM duroxide.queue")):
                break
            self.poll(0, 10, False)
            for holder in list(self.held[0].values()):
                while holder.pending and self.held[0].get(holder.instance) is holder:
                    self._step(0, holder, "well")
                if self.held[0].get(holder.instance) is holder and not holder.run.finished:
                    self._timer_or_park(0, holder)
            self.time_passes(1)
        self.effects_are_those_of_the_checkpoints()
        left = self.do(self.connection.fetch("SELECT * FROM duroxide.queue"))
        assert not left, "stuck"
        for row in self.do(self.connection.fetch("SELECT id, status FROM duroxide.instances")):
            assert row["status"] in ("completed", "failed", "cancelled")
            assert row["status"] != "cancelled" or row["id"] in self.cancelled


def outcome(key: Key, text: str) -> str | StepError:
    """What a step yields: a pure function of its place and text."""
    if text == "fail":
        return StepError("boom", "P0001")
    value: object = f"{key} {text}"
    if text == "again":
        value = int(re.findall(r":(\d+)", key[0])[-1]) < 3
    return json.dumps({"rows": [{"v": value}], "row_count": 1})


def machine(database: Database) -> type[Model]:
    """The model of an installed database."""
    with psycopg.connect(database.dsn(), autocommit=True) as c:
        c.execute("CREATE TABLE public.effects (instance text, execution text COLLATE \"C\", node int)")
    return type("Machine", (Model,), {"database": database})


def check(database: Database, phases: tuple[Phase, ...], examples: int) -> None:
    """Runs the model."""
    run_state_machine_as_test(machine(database), settings=settings(
        max_examples=examples, stateful_step_count=30, deadline=None, phases=phases, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]))


@pytest.mark.slow
def test_any_order_of_events_keeps_effects_and_checkpoints_together(database18: Database) -> None:
    asyncio.run(install(database18))
    check(database18, (Phase.generate,), 20)


@pytest.mark.parametrize("fenced", [True, False])
def test_the_model_notices_a_broken_fence(database18: Database, fenced: bool) -> None:
    """A worker goes on after it was replaced. By hand: to find this order by chance takes a minute."""
    asyncio.run(install(database18))
    with psycopg.connect(database18.dsn(), autocommit=True) as c:
        if not fenced:
            [(body,)] = c.execute("SELECT pg_get_functiondef('duroxide.checkpoint'::regproc)").fetchall()
            assert "AND q.token = p_token" in body
            c.execute(body.replace("AND q.token = p_token", ""))
    model = machine(database18)()
    try:
        model.open([0, 0])
        ghosts = list(model.held[0].values())
        model.taken_over(0)
        for worker, holders in ((0, ghosts), (1, list(model.held[1].values()))):
            for holder in holders:
                model._step(worker, holder, "well")
        with contextlib.nullcontext() if fenced else pytest.raises(AssertionError):
            model.effects_are_those_of_the_checkpoints()
    finally:
        with contextlib.nullcontext() if fenced else pytest.raises(AssertionError):
            model.teardown()
