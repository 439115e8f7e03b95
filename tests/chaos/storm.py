"""The storm: workers as processes behind a bad network, clients that start, signal and cancel, and what befalls them all.

Everything random comes from one seed; what the machine's timing adds can't be repeated, the workload can.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal as unix
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql as pgsql

from engine.migrate import migrate
from proxy.embedded import Cluster
from tests.chaos.audit import Findings, audit
from tests.chaos.wires import Wires
from tests.chaos.workload import Workload, describe, signals_of
from tests.engine.fix_graphs import Tree, flatten, seq, sql
from tests.engine.fix_http_server import http_server
from tests.fix_postgres import running_cluster, versions

DATABASE, OTHER, OWNER, APP = "storm", "elsewhere", "owner", "app"

PROGRAM = """
import asyncio, signal, sys
from engine.http.policy import HostList, HttpPolicy
from engine.settings import EngineSettings
from engine.worker import Worker

def show():
    # What every task waits for.
    for task in asyncio.all_tasks():
        coroutine, chain = task.get_coro(), []
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
            chain.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame else repr(coroutine))
            coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
        print("task", task.get_name(), " > ".join(chain), flush=True)

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, show)
    http = HttpPolicy(allow=HostList.parse(["127.0.0.1"]), max_parallel_per_host=100)
    await Worker(EngineSettings(dsn=sys.argv[1], http=http, **eval(sys.argv[2]))).run()

asyncio.run(main())
"""

#: What proves a lease before it writes.
FENCES = "SELECT pg_get_functiondef(p.oid) FROM pg_proc p WHERE p.pronamespace = 'duroxide'::regnamespace " \
         "AND p.proname IN ('checkpoint', 'step_done') ORDER BY p.proname"


def unfenced(body: str) -> str:
    """A function that proves a lease, broken: it writes whatever the token, and over what is recorded already."""
    if "PROCEDURE duroxide.step_done" in body:
        for insert in ("p_meta, p_started)", "AND q.token = p_token FOR UPDATE"):
            body = body.replace(
                f"{insert};", f"{insert} ON CONFLICT (instance_id, execution, node) DO UPDATE SET event = EXCLUDED.event;")
    return body.replace("AND q.token = p_token", "")


SCENE = """
CREATE TABLE public.effects (instance text, place text, payload text, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE public.cancels (instance text);
CREATE TABLE public.sent (instance text, name text, n int);
GRANT INSERT ON public.effects TO app;
"""


STUCK = """
SELECT q.instance_id, i.status, q.wake_at::text, isfinite(q.wake_at) AND q.wake_at < now() AS late, left(q.owner::text, 8) AS owner,
       (SELECT w.name || ' ' || (clock_timestamp() - w.heartbeat_at)::text FROM duroxide.workers w WHERE w.id = q.owner) AS worker,
       (SELECT string_agg(h.execution || '#' || h.node || ' ' || h.event, ', ' ORDER BY h.ended_at DESC)
          FROM duroxide.history h WHERE h.instance_id = q.instance_id) AS history,
       (SELECT string_agg(n.at - 1 || ' ' || concat_ws(' ', n.node->>'type', n.node->>'name', n.node->>'left', n.node->>'right',
                                                       n.node->>'condition', n.node->>'extras', left(n.node->>'query', 99)), e'\n')
          FROM jsonb_array_elements(i.graph) WITH ORDINALITY AS n(node, at)) AS graph,
       (SELECT string_agg(s.kind || ' ' || s.name || ' ' || s.seen, ', ') FROM duroxide.signals s
         WHERE s.instance_id = q.instance_id) AS signals
  FROM duroxide.queue q JOIN duroxide.instances i ON i.id = q.instance_id ORDER BY q.wake_at LIMIT 10
"""


@dataclass
class Plan:
    """How hard it blows."""

    seconds: float = 20.0
    seed: int = 0
    workers: int = 3
    lease: float = 2.0
    rate: float = 12.0  #: workflows started a second
    calm: float = 20.0  #: once the storm is over: seconds without any progress after which what is left is stuck
    restarts: bool = True
    schedules: bool = False  #: workflows may wait for a full minute, and so must the calm
    fence: bool = True  #: False: break the fencing, to see that the audit notices


@dataclass
class Report:
    """What befell whom, and what the audit found."""

    plan: Plan
    findings: Findings
    faults: Counter[str]
    nodes: Counter[str]
    seconds: float
    log: str
    notes: list[str]

    def lines(self) -> list[str]:
        """For people."""
        return [f"seed {self.plan.seed}, {self.plan.workers} workers, lease {self.plan.lease:g} s, {self.seconds:.0f} s in all",
                "faults: " + ", ".join(f"{k} {v}" for k, v in sorted(self.faults.items())),
                "nodes:  " + ", ".join(f"{k} {v}" for k, v in sorted(self.nodes.items())),
                *self.findings.lines(), *self.notes]


@dataclass
class Storm:
    """One run; `run` is all that is called from outside."""

    plan: Plan
    cluster: Cluster
    folder: Path
    faults: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    workflows: dict[str, Tree] = field(default_factory=dict)
    elsewhere: dict[str, int] = field(default_factory=dict)
    over: bool = False
    notes: list[str] = field(default_factory=list)  #: what is known of those that are stuck

    def __post_init__(self) -> None:
        self.rng = random.Random(self.plan.seed)
        self.wires = Wires(self.cluster.port or 0)
        self.processes: list[asyncio.subprocess.Process | None] = [None] * self.plan.workers
        self.server_lock = asyncio.Lock()

    def dsn(self, user: str = OWNER, database: str = DATABASE, port: int | None = None) -> str:
        return f"postgresql://{user}@127.0.0.1:{port or self.cluster.port}/{database}"

    async def run(self) -> Report:
        """The scene, the storm, the calm, the audit."""
        began = time.monotonic()
        await self._scene()
        async with http_server() as self.server, self.wires.running(), self._workers():
            end = time.monotonic() + self.plan.seconds
            async with asyncio.TaskGroup() as group:
                group.create_task(self._client(end))
                group.create_task(self._weather(end))
            self.over = True
            await self._calm()
        arrived = [(r.headers["x-place"], r.headers["idempotency-key"]) for r in self.server.requests]
        findings = await asyncio.to_thread(audit, self.dsn(), self.workflows, self.elsewhere, self.dsn(database=OTHER), arrived)
        return Report(self.plan, findings, self.faults, self.nodes, time.monotonic() - began,
                      "\n".join(p.read_text() for p in sorted(self.folder.glob("*.log"))), self.notes)

    # -- scene -------------------------------------------------------------------------------------------------

    async def _scene(self) -> None:
        with psycopg.connect(self.cluster.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE owner LOGIN CREATEROLE")
            c.execute("CREATE DATABASE storm OWNER owner")
            c.execute("CREATE DATABASE elsewhere OWNER owner")
        with psycopg.connect(self.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE app LOGIN")
        await migrate(self.dsn())
        with psycopg.connect(self.dsn(), autocommit=True) as c:
            c.execute(SCENE)
            c.execute("SELECT df.grant_usage('app', include_http => true)")
            if not self.plan.fence:
                bodies = [body for (body,) in c.execute(FENCES).fetchall()]
                assert [body.count("AND q.token = p_token") for body in bodies] == [1, 2]
                for body in bodies:
                    c.execute(unfenced(body))
        with psycopg.connect(self.dsn(database=OTHER), autocommit=True) as c:
            c.execute("CREATE TABLE public.effects (instance text)")

    # -- workers -----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _workers(self) -> AsyncIterator[None]:
        for n in range(self.plan.workers):
            await self._spawn(n)
        try:
            yield
        finally:
            for n in range(self.plan.workers):
                await self._kill(n)

    async def _spawn(self, n: int) -> None:
        # With few connections steps wait for a place, and sessions go from workflow to workflow.
        settings = {"lease": self.plan.lease, "retry_max": 1.0, "max_crashes": 100_000,
                    "max_user_connections": (1, 2, 5)[n % 3],
                    "execution_acquire_timeout": 600.0, "claim_batch": 20, "connect_timeout": 10.0}
        with (self.folder / f"worker{n}.log").open("ab") as log:
            self.processes[n] = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, self.dsn(port=self.wires.port), repr(settings), stdout=log, stderr=log)

    async def _kill(self, n: int) -> None:
        process, self.processes[n] = self.processes[n], None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # -- weather -----------------------------------------------------------------------------------------------

    async def _weather(self, end: float) -> None:
        kinds: list[tuple[int, Callable[[], Any]]] = [
            (4, self._crash), (4, self._freeze), (4, self._terminate), (2, self._cut_all), (4, self._cut_some),
            (4, self._mute), (2, self._stall), (1, self._refuse)]
        if self.plan.restarts:
            kinds.append((1, self._restart))
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                [(_, fault)] = self.rng.choices(kinds, [weight for weight, _ in kinds])
                group.create_task(fault())
                await asyncio.sleep(self.rng.uniform(0.1, 1.0))

    def _some(self) -> list[Any]:
        wires = list(self.wires.open)
        return self.rng.sample(wires, min(len(wires), self.rng.randint(1, 4)))

    async def _crash(self) -> None:
        n = self.rng.randrange(self.plan.workers)
        if self.processes[n] is None:
            return
        self.faults["SIGKILL"] += 1
        await self._kill(n)
        await asyncio.sleep(self.rng.uniform(0, 1))
        await self._spawn(n)

    async def _freeze(self) -> None:
        """Mostly for longer than the lease."""
        process = self.rng.choice(self.processes)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.faults["SIGSTOP"] += 1
            process.send_signal(unix.SIGSTOP)
            await asyncio.sleep(self.plan.lease * self.rng.choice([0.3, 1.2, 1.5, 1.5, 2.0]))
            process.send_signal(unix.SIGCONT)

    async def _terminate(self) -> None:
        which = self.rng.choice(["dfproxy:step", "dfproxy:step", "dfproxy:control"])
        query = ("SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity WHERE application_name = %s "
                 "ORDER BY random() LIMIT %s) AS chosen")
        with contextlib.suppress(psycopg.Error):
            async with await psycopg.AsyncConnection.connect(self.cluster.dsn(), connect_timeout=5) as c:
                await c.execute(query, (which, self.rng.randint(1, 5)))
                self.faults["pg_terminate_backend"] += 1

    async def _cut_all(self) -> None:
        self.faults["all connections cut"] += 1
        for wire in list(self.wires.open):
            wire.cut()

    async def _cut_some(self) -> None:
        self.faults["connections cut"] += 1
        for wire in self._some():
            wire.cut()

    async def _mute(self) -> None:
        self.faults["answers lost"] += 1
        await self.wires.mute(self._some(), self.rng.uniform(0.01, 0.5))

    async def _stall(self) -> None:
        self.faults["network stalled"] += 1
        await self.wires.stall(list(self.wires.open), self.plan.lease * self.rng.uniform(0.2, 1.5))

    async def _refuse(self) -> None:
        self.faults["connections refused"] += 1
        await self.wires.refuse(self.rng.uniform(0.2, 1.5))

    async def _restart(self) -> None:
        async with self.server_lock:
            self.faults["server restarts"] += 1
            await asyncio.to_thread(self.cluster.stop, "immediate")
            await asyncio.sleep(self.rng.uniform(0, 1))
            await asyncio.to_thread(self.cluster.start)

    # -- clients -----------------------------------------------------------------------------------------------

    async def _client(self, end: float) -> None:
        """Starts workflows at the planned rate, and what goes with each in a task of its own."""
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                group.create_task(self._one(random.Random(self.rng.random())))
                await asyncio.sleep(self.rng.expovariate(self.plan.rate))

    async def _transact(self, user: str, done: str, *statements: tuple[Any, ...], rollback: bool = False) -> None:
        """Runs statements in one transaction until it certainly committed; `done` asks whether it did."""
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(self.dsn(user), connect_timeout=10) as c:
                    if (await (await c.execute(done.encode())).fetchone()) is not None:
                        return
                    for query, *parameters in statements:
                        await c.execute(query, parameters or None)
                    if rollback:
                        await c.rollback()
                return
            except psycopg.OperationalError:
                await asyncio.sleep(0.2)

    async def _one(self, rng: random.Random) -> None:
        instance = f"{rng.getrandbits(32):08x}"
        user = rng.choice([OWNER, APP])
        there = pgsql.SQL("SELECT FROM duroxide.instances WHERE id = {}").format(instance).as_string()
        insert = "INSERT INTO duroxide.instances (id, label, graph, vars, database) VALUES (%s, 'storm', %s, '{}', %s)"
        if rng.random() < 0.05:
            tree = seq(*[sql("INSERT INTO public.effects VALUES ('{sys_instance_id}')")] * 3)
            await self._transact(OWNER, there, (insert, instance, json.dumps(flatten(tree)), OTHER))
            self.elsewhere[instance] = 3
            return
        tree = Workload(rng, endpoint=self.server.url(""), schedules=self.plan.schedules).workflow()
        start = (insert, instance, json.dumps(flatten(tree)), None)
        if rng.random() < 0.05:
            await self._transact(user, there, start, rollback=True)
            return
        signals = [(name, n) for name, payloads in signals_of(tree).items() for n, _ in enumerate(payloads, 1)]
        early = signals if rng.random() < 0.3 else []
        await self._transact(user, there, start, *[self._signal(instance, name, n) for name, n in early])
        self.workflows[instance] = tree
        self.nodes.update(describe(tree))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._cancel(rng, instance, user))
            for name, n in signals[len(early):]:
                if not self.over:
                    await asyncio.sleep(rng.choice([0, 0.1, 0.5]))
                sent = pgsql.SQL("SELECT FROM public.sent WHERE instance = {} AND name = {} AND n = {}").format(
                    instance, name, n).as_string()
                await self._transact(OWNER, sent, self._signal(instance, name, n),
                                     ("INSERT INTO public.sent VALUES (%s, %s, %s)", instance, name, n))

    def _signal(self, instance: str, name: str, n: int) -> tuple[Any, ...]:
        return ("SELECT df.signal(%s, %s, %s)", instance, name, str(n))

    async def _cancel(self, rng: random.Random, instance: str, user: str) -> None:
        """Some are cancelled, some only nearly."""
        if rng.random() > 0.15:
            return
        await asyncio.sleep(rng.uniform(0, 3))
        asked = pgsql.SQL("SELECT FROM public.cancels WHERE instance = {}").format(instance).as_string()
        await self._transact(OWNER, asked, ("SELECT df.cancel(%s, 'enough')", instance),
                             ("INSERT INTO public.cancels VALUES (%s)", instance), rollback=rng.random() < 0.3)

    # -- calm --------------------------------------------------------------------------------------------------

    async def _calm(self) -> None:
        """Waits until every workflow has ended, or nothing more can be hoped for."""
        for n, process in enumerate(self.processes):
            if process is None or process.returncode is not None:
                await self._spawn(n)
        seen, since = None, time.monotonic()
        while time.monotonic() < since + self.plan.calm:
            async with await psycopg.AsyncConnection.connect(self.dsn()) as c:
                found = await (await c.execute(
                    "SELECT (SELECT count(*) FROM duroxide.queue), (SELECT count(*) FROM duroxide.history)")).fetchone()
            if found is not None and found[0] == 0:
                return
            if found != seen:
                seen, since = found, time.monotonic()
            await asyncio.sleep(0.2)
        with psycopg.connect(self.dsn()) as c:
            rows = c.execute(STUCK).fetchall()
        self.notes += [" | ".join(map(str, row)) for row in rows]
        for process in self.processes:
            if process is not None and process.returncode is None:
                process.send_signal(unix.SIGUSR1)
        await asyncio.sleep(1)


async def storm(plan: Plan) -> Report:
    """Runs one storm on a server of its own."""
    with running_cluster(versions()[0], durable=True) as cluster, tempfile.TemporaryDirectory() as folder:
        return await Storm(plan, cluster, Path(folder)).run()


__all__ = ["Plan", "Report", "storm"]
