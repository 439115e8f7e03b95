"""The worker: claims due instances, runs each in a task, keeps its lease, and survives what happens to the database.

`run` is a loop of *lives*. In a life the worker is registered under one id; when it finds that it was given up (its
heartbeat came too late), it drops everything and begins a new life. A database that is away is waited for within one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import structlog

from engine.http.client import HttpClient
from engine.http.runner import HttpRunner
from engine.identity import Identities
from engine.instance import HeldInstance, Surroundings
from engine.retention import keep
from engine.runner import AWAY, Runner, back_off
from engine.settings import EngineSettings
from engine.store import Claim, LoadedInstance, Poll, Store, is_infrastructure

log = structlog.get_logger("dfproxy.engine")

#: Seconds that giving everything back may take when the worker stops.
FAREWELL = 2.0
#: Part of the lease after which a worker that could not renew it stops by itself, before others take over.
SURE = 0.9
#: Longest pause in seconds before the next try to begin a life.
LATE = 5.0


class _GivenUpError(Exception):
    """Others have taken this worker for dead, or will any moment: it could not renew its lease."""


class _PoolerError(Exception):
    """Prepared statements don't work here, so there is a pooler in between: connect anew."""


@dataclass
class Statistics:
    """What a worker did since it was made."""

    claimed: int = 0
    polls: int = 0
    bugs: int = 0
    lives: int = 0


class Worker:
    """An engine for one database. `run` it in a task; `wake` says that something was committed; `stop` ends it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.statistics = Statistics()
        self.identity_report: str | None = None
        self._held: dict[str, HeldInstance] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._deadline = 0.0
        self._ended = asyncio.Event()
        self._started = False
        self._renewed = 0.0  # loop time
        self._crowded = False  # others are due, and there is no room for them
        self._pressed = False  # the last poll claimed nothing, since too many steps wait for a connection
        self._former: str | None = None  # who this worker was in its last life
        self._pooled = False
        self._instances: dict[str, asyncio.Task[None]] = {}

    @property
    def held(self) -> int:
        """Instances in memory."""
        return len(self._held)

    def wake(self) -> None:
        """Looks for work at once. To be called in the loop that `run` runs in."""
        self._wake.set()

    async def stop(self, grace: float = 10.0) -> None:
        """Takes no more work, gives running steps `grace` seconds, gives everything back, and ends `run`."""
        self._deadline = time.monotonic() + grace
        self._stopping = True
        for instance in list(self._held.values()):
            instance.poke()
        self._wake.set()
        if self._started:
            await self._ended.wait()

    async def run(self) -> None:
        """Works until `stop` or cancellation. Never ends because of the database."""
        self._started = True
        attempt = 0
        try:
            while not self._stopping:
                born = time.monotonic()
                try:
                    await self._live()
                except _GivenUpError:
                    log.warning("the lease is lost; the worker starts anew", worker=self.settings.worker_name)
                    continue
                except _PoolerError:
                    self._pooled = True
                    continue
                except Exception as e:
                    if is_infrastructure(e):
                        log.warning("the database is away", reason=str(e) or type(e).__name__)
                    else:
                        self.statistics.bugs += 1
                        log.exception("the worker failed and starts anew")
                attempt = 1 if time.monotonic() - born > 60 else attempt + 1
                await self._pause(min(back_off(self.settings, attempt), LATE))
        finally:
            self._ended.set()

    # -- one life ----------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        self.statistics.lives += 1
        store = Store(self.settings, pooled=self._pooled)
        registered = False
        try:
            await store.open()
            self._renewed = asyncio.get_running_loop().time()  # when the request left that the database granted
            await store.register(self._former)
            self._former = store.worker_id
            registered = True
            identities = Identities(self.settings, store)
            self.identity_report = await identities.report()
            runner = Runner(self.settings, store, identities)
            client = HttpClient(self.settings.http, agent=f"pg_durable/0.2.6 dfproxy/{self.settings.version}")
            http = HttpRunner(self.settings, store, identities, client)
            runner.pool.slots.on_room = self._on_room
            shared = Surroundings(self.settings, store, identities, runner, http, self._leave,
                                  lambda: self._stopping, lambda: self._crowded)
            log.info("worker ready", worker=self.settings.worker_name, identity=self.identity_report)
            try:
                async with asyncio.TaskGroup() as group:
                    beat = group.create_task(self._heartbeats(store, runner))
                    chores = [group.create_task(keep(self.settings, store))]
                    # As many as there are connections for it.
                    chores += [group.create_task(store.recorder.run())
                               for _ in range(max(1, self.settings.max_control_connections - 2))][:2]
                    await self._polls(shared, group)
                    for task in self._instances.values():
                        task.cancel()
                    for task in (beat, *chores):
                        task.cancel()
            finally:
                runner.pool.close_idle(-1)
                await client.aclose()
        except BaseExceptionGroup as errors:
            # Of several faults the one that says most about what to do next.
            raise _first(errors) from errors
        finally:
            self._held.clear()
            self._instances.clear()
            try:
                if registered:
                    await self._farewell(store)
            finally:
                await store.close()

    async def _farewell(self, store: Store) -> None:
        """Gives everything back. If that fails the lease will run out."""
        try:
            async with asyncio.timeout(FAREWELL):
                await store.unregister()
        except Exception as e:
            # Of the database's own words none matters more than why this life ends (the schemas may be gone).
            if not is_infrastructure(e) and not isinstance(e, asyncpg.PostgresError):
                raise
            log.warning("instances could not be given back; their lease will run out", reason=str(e))

    async def _heartbeats(self, store: Store, runner: Runner) -> None:
        """Renews the lease. Raises _GivenUpError as soon as it can no longer be sure of it: everything stops then."""
        interval = self.settings.lease / 3
        loop = asyncio.get_running_loop()
        while True:
            if (early := self._renewed + interval - loop.time()) > 0:
                await asyncio.sleep(early)
                continue  # a poll may have renewed it meanwhile
            sent = loop.time()
            if sent > self._renewed + self.settings.lease * SURE:
                raise _GivenUpError
            try:
                async with asyncio.timeout_at(self._renewed + self.settings.lease * SURE):
                    alive = await store.heartbeat()
            except Exception as e:
                if not is_infrastructure(e):
                    raise
                log.warning("heartbeat failed", reason=str(e) or type(e).__name__)
                await asyncio.sleep(min(1.0, interval / 3))
                continue
            self._alive(alive, sent, runner)

    def _alive(self, alive: bool, sent: float, runner: Runner) -> None:
        """A heartbeat that left at `sent` was answered. Raises _GivenUpError where it came too late."""
        if not alive:
            raise _GivenUpError
        self._renewed = max(self._renewed, sent)
        runner.pool.close_idle(self.settings.idle_connection)

    # -- finding work ------------------------------------------------------------------------------------------

    async def _polls(self, shared: Surroundings, group: asyncio.TaskGroup) -> None:
        settings, store = self.settings, shared.store
        pause = settings.poll_busy
        attempt = 0
        audit_at = time.monotonic() + settings.lease
        woken = False
        look_by: float | None = None  # loop time; None: nothing has been put off
        while True:
            self._wake.clear()
            if self._stopping and (not self._held or time.monotonic() >= self._deadline):
                return
            slots = shared.runner.pool.slots
            self._pressed = slots.waiting >= slots.crowd
            limit = 0 if self._stopping or self._pressed else \
                max(0, min(settings.claim_batch, settings.max_instances - len(self._held)))
            # While there is nothing else to do a heartbeat costs no query of its own.
            sent = asyncio.get_running_loop().time()
            beat = not self._held and sent > self._renewed + settings.lease / 4
            # Whoever has woken it waits for the claim; everything else may come a little later, but not ever later.
            brief = woken and (look_by is None or sent < look_by)
            try:
                found = await store.poll(limit, beat=beat, brief=brief)
                # Before anything else may fail: what is booked and never begun would be held for good. They get ready,
                # and go on once the claim has committed.
                self._enter(found, shared)
                self._begin(found, shared, group)
                await store.settle(found)
                if beat:
                    self._alive(found.alive, sent, shared.runner)
                for entry in found.inbox:
                    if (instance := self._held.get(entry.instance_id)) is not None:
                        instance.put(entry)
                if time.monotonic() >= audit_at:
                    audit_at = time.monotonic() + settings.lease
                    await self._audit(store)
                attempt = 0
            except Exception as e:
                if store.saw_pooler(e):
                    raise _PoolerError from e
                if not is_infrastructure(e):
                    raise
                attempt += 1
                audit_at = 0.0  # what it claimed may be ours without our knowing
                log.warning("poll failed", reason=str(e) or type(e).__name__)
                await self._pause(min(back_off(settings, attempt), AWAY))
                continue
            self.statistics.polls += 1
            self.statistics.claimed += len(found.claims)
            look_by = None if found.looked else look_by or sent + settings.poll_busy
            woken = False
            self._rotate(found.overdue and not self._stopping)
            if found.claims or found.inbox:
                pause = settings.poll_busy
                if len(found.claims) == limit:
                    continue
            wait = pause
            if found.next_due is not None:
                wait = min(wait, max(0.0, (found.next_due - store.clock.now()).total_seconds()))
            if self._stopping:
                wait = min(wait, max(0.0, self._deadline - time.monotonic()), 0.05)
            if woken := await self._pause(wait):
                pause = settings.poll_busy
            else:
                pause = min(pause * 2, settings.poll_held if self._held else settings.poll_idle)

    async def _pause(self, seconds: float) -> bool:
        """Sleeps until somebody wakes the worker (True) or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    def _enter(self, found: Poll, shared: Surroundings) -> None:
        """Books claimed instances before anything else can happen to them."""
        for claim in found.claims:
            stale = self._instances.pop(claim.instance_id, None)
            if stale is not None:
                # Given back without our knowing (the answer was lost), and claimed again: the old one has no lease.
                stale.cancel()
            self._held[claim.instance_id] = HeldInstance(claim.instance_id, shared, found.committed)

    def _rotate(self, crowded: bool) -> None:
        """`crowded`: others wait for a place. Whoever only waits then leaves memory, whoever had its turn queues up."""
        if crowded and not self._crowded:
            for instance in list(self._held.values()):
                instance.poke()
        self._crowded = crowded

    def _on_room(self) -> None:
        if self._pressed:
            self._wake.set()

    def _leave(self, instance: HeldInstance) -> None:
        if self._held.get(instance.instance_id) is instance:
            del self._held[instance.instance_id]
            if len(self._held) == self.settings.max_instances - 1 or (self._stopping and not self._held):
                self._wake.set()

    async def _audit(self, store: Store) -> None:
        """Compares what the database says we hold with what we run.

        What only the database knows is given back: a release whose failure could not be told apart. What only we know
        was deleted by somebody, or taken from us: it ends at once, not only at its next checkpoint.
        """
        held = dict(self._held)
        owned = set(await store.owned())
        for instance_id, instance in held.items():
            if instance_id not in owned and self._held.get(instance_id) is instance and instance_id in self._instances:
                log.info("an instance is not ours any more", instance=instance_id)
                self._instances[instance_id].cancel()
        lost = [i for i in owned if i not in self._held]
        if lost:
            log.warning("instances held without being run are given back", count=len(lost))
            await store.release(lost)

    # -- instances ---------------------------------------------------------------------------------------------

    def _begin(self, found: Poll, shared: Surroundings, group: asyncio.TaskGroup) -> None:
        """Starts a task for each claimed instance; those that did not come with the claim are read first."""
        missing = [c for c in found.claims if c.loaded is None]
        if missing:
            group.create_task(self._read(missing, found.committed, shared, group))
        for claim in found.claims:
            if claim.loaded is not None:
                self._start(self._held[claim.instance_id], claim.loaded, shared, group)

    async def _read(self, claims: Sequence[Claim], committed: asyncio.Future[None], shared: Surroundings,
                    group: asyncio.TaskGroup) -> None:
        """Reads a batch of claimed instances and starts a task for each; `committed`: the claim."""
        held = {c.instance_id: self._held[c.instance_id] for c in claims if c.instance_id in self._held}
        await asyncio.wait([committed])
        loaded = await self._load(claims, shared.store)
        for instance_id, instance in held.items():
            row = loaded.get(instance_id)
            if row is None or self._held.get(instance_id) is not instance:
                self._leave(instance)
                continue
            self._start(instance, row, shared, group)

    def _start(self, instance: HeldInstance, row: LoadedInstance, shared: Surroundings,
               group: asyncio.TaskGroup) -> None:
        self._instances[instance.instance_id] = group.create_task(self._hold(instance, row, shared.store))

    async def _load(self, claims: Sequence[Claim], store: Store) -> dict[str, LoadedInstance]:
        attempt = 0
        while True:
            try:
                return await store.load([c.instance_id for c in claims],
                                        [c.instance_id for c in claims if not c.fresh])
            except Exception as e:
                if not is_infrastructure(e):
                    raise
                attempt += 1
                log.warning("claimed instances can't be read yet", reason=str(e) or type(e).__name__)
                await asyncio.sleep(min(back_off(self.settings, attempt), AWAY))

    async def _hold(self, instance: HeldInstance, loaded: LoadedInstance, store: Store) -> None:
        """Runs one instance; whatever is wrong with it stays with it."""
        try:
            await instance.run(loaded)
        except Exception:
            self.statistics.bugs += 1
            log.exception("an instance met a bug; it is given back for a while", instance=instance.instance_id)
            await self._give_back(instance, store)
        finally:
            if self._instances.get(instance.instance_id) is asyncio.current_task():
                del self._instances[instance.instance_id]
            self._leave(instance)

    async def _give_back(self, instance: HeldInstance, store: Store) -> None:
        try:
            await store.give_back(instance.instance_id, instance.token)
        except Exception as e:
            if not is_infrastructure(e):
                raise
            log.warning("instance could not be given back", instance=instance.instance_id, reason=str(e))


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The fault to act on: being given up, else the first that is not a group."""
    flat: list[BaseException] = []
    todo: list[BaseException] = [errors]
    while todo:
        error = todo.pop(0)
        if isinstance(error, BaseExceptionGroup):
            todo += error.exceptions
        else:
            flat.append(error)
    for kind in (_GivenUpError, _PoolerError):
        for error in flat:
            if isinstance(error, kind):
                return error
    return flat[0]
