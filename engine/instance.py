"""One instance in memory: feeds its interpreter, records what follows, starts and stops its steps.

Everything that can happen to an instance arrives in its mailbox and is handled by one task, one event at a time: that
makes "feed the interpreter, commit what it says, then act on it" atomic without a lock. Steps run in tasks of their
own, and hand in their outcome with their transaction still open; the commit happens here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from msgspec import Struct
from msgspec.structs import replace

from dsl.graph import Graph, GraphError, NodeType
from engine.errors import ConnectionLostError, ServerError
from engine.http.runner import HttpRunner
from engine.http.select import future_of, is_http_select
from engine.identity import Identities, IdentityError
from engine.interpreter import Interpreter
from engine.model import Changes, Checkpoint, Finish, Key, Step, StepError
from engine.runner import (
    AWAY,
    Begun,
    Committed,
    Failed,
    Job,
    Outcome,
    Ready,
    Runner,
    SessionLease,
    back_off,
    is_transient,
    step_error,
)
from engine.settings import EngineSettings
from engine.store import (
    LEASE_LOST,
    InboxEntry,
    LeaseLostError,
    LoadedInstance,
    Store,
    checkpoint_arguments,
    is_infrastructure,
    step_done_arguments,
)

log = structlog.get_logger("dfproxy.engine")

#: Seconds that an instance may stay in memory from step to step while others wait for its place.
TURN = 1.0
#: SQLSTATE of a checkpoint in a transaction that the step, or a default of its role, made read-only.
_READ_ONLY = "25006"


class StepEnded(Struct, frozen=True):
    """A step's task is over. An exception is a bug, or LeaseLostError."""

    key: Key
    outcome: Outcome | Exception


Event = StepEnded | InboxEntry


class _ReloadError(Exception):
    """What memory holds is ahead of the database: read the instance again. `failed`: the step that must fail then."""

    def __init__(self, reason: str, failed: tuple[Key, StepError] | None = None) -> None:
        super().__init__(reason)
        self.failed = failed


@dataclass(frozen=True)
class Surroundings:
    """What instances share. `leave` takes an instance off the worker's books; `is_stopping`: no new steps;
    `is_crowded`: others wait for a place in memory.
    """

    settings: EngineSettings
    store: Store
    identities: Identities
    runner: Runner
    http: HttpRunner
    leave: Callable[[HeldInstance], None]
    is_stopping: Callable[[], bool]
    is_crowded: Callable[[], bool]


class HeldInstance:
    """An instance whose lease this worker holds. `run` it once; `put` tells it what happened elsewhere. `claimed`: done
    once its claim has committed; before that it does nothing that anybody else can see.
    """

    def __init__(self, instance_id: str, shared: Surroundings, claimed: asyncio.Future[None]) -> None:
        self.instance_id = instance_id
        self._claimed = claimed
        self.token = ""
        self._shared = shared
        self._store = shared.store
        self._settings = shared.settings
        self._mailbox: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._tasks: dict[Key, asyncio.Task[None]] = {}  # until their outcome has been handled
        self._forced: dict[Key, Outcome] = {}  # of steps that must not run again after a reload
        self._seen: set[int] = set()
        self._crashes = 0
        self._attempt = 0
        self._turn = 0.0  # loop time at which it makes room, if others wait
        self._loaded: LoadedInstance
        self._group: asyncio.TaskGroup

    # -- from outside ------------------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Adds to the mailbox."""
        self._mailbox.append(event)
        self.poke()

    def poke(self) -> None:
        """Makes it look around."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def run(self, loaded: LoadedInstance) -> None:
        """Until the instance is finished, parked, given back or lost. Raises an ExceptionGroup on a bug."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                try:
                    await self._run(loaded)
                except LeaseLostError:
                    log.info("lease lost", instance=self.instance_id)
                finally:
                    for task in self._tasks.values():
                        task.cancel()
        finally:
            # Outcomes that nobody handled hold transactions open.
            for event in self._mailbox:
                if isinstance(event, StepEnded) and isinstance(event.outcome, Ready):
                    event.outcome.lease.drop()
            self._mailbox.clear()

    # -- life --------------------------------------------------------------------------------------------------

    async def _run(self, loaded: LoadedInstance) -> None:
        while True:
            try:
                await self._play(loaded)
                return
            except _ReloadError as e:
                self._attempt += 1
                if e.failed is not None:
                    self._forced[e.failed[0]] = Failed(self._store.clock.now(), e.failed[1])
                else:
                    log.warning("instance is read again", instance=self.instance_id, attempt=self._attempt,
                                reason=str(e))
                    await asyncio.sleep(back_off(self._settings, self._attempt))
            loaded = await self._reload()

    async def _reload(self) -> LoadedInstance:
        """Fences off sessions that were lost sight of, then reads the instance. Raises LeaseLostError."""
        await self._sure()
        while True:
            try:
                await self._store.refence(self.instance_id)
                found = await self._store.load([self.instance_id], [self.instance_id])
            except Exception as e:
                if not is_infrastructure(e):
                    raise
                self._attempt += 1
                await asyncio.sleep(min(back_off(self._settings, self._attempt), AWAY))
                continue
            if self.instance_id not in found:
                raise LeaseLostError(self.instance_id)
            return found[self.instance_id]

    async def _play(self, loaded: LoadedInstance) -> None:
        self._loaded = loaded
        self.token = loaded.token
        self._crashes = loaded.crashes
        if loaded.crashes >= self._settings.max_crashes:
            await self._give_up(StepError(
                f"the worker was lost {loaded.crashes} times while it ran this instance", "58000"))
            return
        try:
            await self._shared.identities.resolve(loaded.submitted_by, self.instance_id, loaded.database)
        except IdentityError as e:
            await self._give_up(StepError(str(e), e.sqlstate, None, e.hint))
            return
        except Exception as e:
            if is_infrastructure(e):
                raise _ReloadError(_text(e)) from e
            raise
        known = {s.seq: s for s in loaded.inbox}
        for event in self._mailbox:
            if isinstance(event, InboxEntry):
                known.setdefault(event.seq, event)
        self._mailbox = deque(e for e in self._mailbox if not isinstance(e, InboxEntry))
        self._seen = set(known)
        try:
            interpreter = Interpreter(
                instance_id=self.instance_id, label=loaded.label, graph=Graph.from_json(loaded.graph),
                variables=loaded.variables, checkpoints=loaded.checkpoints,
                signals=[s.signal for s in known.values() if s.kind == "signal"],
                history_rounds=self._settings.loop_history_rounds)
            changes = interpreter.begin(self._store.clock.now())
        except GraphError as e:
            await self._give_up(StepError(str(e), "22023"))
            return
        cancels = [s for s in known.values() if s.kind == "cancel"]
        if await self._record(interpreter, changes, may_park=not cancels):
            return
        for entry in cancels:
            if not interpreter.finished:
                await self._record(interpreter, interpreter.cancel(entry.name, self._store.clock.now()))
        for key in [k for k in self._tasks if k not in interpreter.running]:
            self._abort(key)
        await self._loop(interpreter)

    async def _loop(self, interpreter: Interpreter) -> None:
        self._turn = asyncio.get_running_loop().time() + TURN
        while not interpreter.finished:
            for key in interpreter.take_aborts():
                self._abort(key)
            stops = self._shared.is_stopping()
            if not self._tasks and not self._mailbox and (stops or self._had_its_turn()):
                await self._release()
                return
            if not stops:
                for step in interpreter.take_steps():
                    self._start(step)
            if not self._mailbox and not interpreter.running and await self._record(interpreter, Changes()):
                return
            event = await self._next_event(interpreter.next_wake)
            if await self._handle(interpreter, event):
                return
        for key in interpreter.take_aborts():
            self._abort(key)

    def _had_its_turn(self) -> bool:
        return self._shared.is_crowded() and asyncio.get_running_loop().time() > self._turn

    async def _next_event(self, due: datetime | None) -> Event | None:
        """The next event; None when `due` has come, or somebody poked."""
        if self._mailbox:
            return self._mailbox.popleft()
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = None
        if due is not None:
            # Never zero: the two clocks may disagree by a hair.
            pause = max(0.001, (due - self._store.clock.now()).total_seconds())
            timer = loop.call_later(min(pause, 3600), self.poke)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        return self._mailbox.popleft() if self._mailbox else None

    async def _handle(self, interpreter: Interpreter, event: Event | None) -> bool:
        """Feeds one event and records what follows. True: the instance has left this worker."""
        now = self._store.clock.now()
        match event:
            case None:
                return await self._record(interpreter, interpreter.timers_due(now))
            case StepEnded(key, outcome):
                self._tasks.pop(key, None)
                if isinstance(outcome, Exception):
                    raise outcome
                if key not in interpreter.running:
                    if isinstance(outcome, Ready):
                        await outcome.lease.rollback()
                    return False
                return await self._step_ended(interpreter, key, outcome, now)
            case InboxEntry():
                self._store.handled(event.seq)
                if event.seq in self._seen:
                    return False
                self._seen.add(event.seq)
                if event.kind == "cancel":
                    return await self._record(interpreter, interpreter.cancel(event.name, now))
                return await self._record(interpreter, interpreter.signal(event.signal, now))

    async def _step_ended(self, interpreter: Interpreter, key: Key, outcome: Outcome, now: datetime) -> bool:
        match outcome:
            case Ready():
                changes = interpreter.step_completed(key, outcome.text, outcome.columns, outcome.meta,
                                                     outcome.started_at, now)
                await self._finish(key, changes, outcome, interpreter)
                left = False
            case Committed():
                changes = interpreter.step_completed(key, outcome.text, outcome.columns, outcome.meta,
                                                     outcome.started_at, now)
                try:
                    left = await self._record(interpreter, changes, big=key)
                except _ReloadError:
                    # It has taken effect. What is not recorded yet must be, rather than done again.
                    self._forced[key] = outcome
                    raise
            case Failed(error=error):
                changes = interpreter.step_failed(key, error, outcome.started_at, now)
                left = await self._record(interpreter, changes)
            case _:
                raise TypeError(f"unknown outcome {outcome!r}")
        self._forced.pop(key, None)
        self._attempt = 0
        if self._crashes and not left and not interpreter.finished:
            self._crashes = 0
            await self._guard(self._store.made_progress(self.instance_id, self.token))
        return left

    # -- recording ---------------------------------------------------------------------------------------------

    async def _record(self, interpreter: Interpreter, changes: Changes, *, big: Key | None = None,
                      may_park: bool = True) -> bool:
        """Records on a control connection; parks the instance too where only long waits remain. True: it was parked."""
        if not may_park or interpreter.finished or interpreter.running or self._tasks or self._mailbox:
            if changes:
                await self._guard(self._store.checkpoint(self.instance_id, self.token, changes, big=big))
            return False
        wake = interpreter.next_wake
        if wake is None and not interpreter.waiting_for:
            raise RuntimeError("the interpreter neither runs nor waits for anything")
        patience = 0.0 if self._shared.is_crowded() else self._settings.park_after
        if wake is not None and wake - self._store.clock.now() <= timedelta(seconds=patience):
            return await self._record(interpreter, changes, big=big, may_park=False)
        # Whatever arrives in the mailbox from here on has not been handled: it will wake the instance again.
        park = "infinity" if wake is None else wake.isoformat()
        await self._guard(self._store.checkpoint(self.instance_id, self.token, changes, big=big, park=park))
        self._shared.leave(self)
        return True

    async def _finish(self, key: Key, changes: Changes, ready: Ready, interpreter: Interpreter | None = None) -> None:
        """Commits a step with its checkpoint. What `interpreter` wants to run next begins with it, if it may; otherwise
        what another workflow has waited with. Raises _ReloadError, LeaseLostError.
        """
        lease = ready.lease
        steps: list[Step] = []
        begun = None
        if interpreter is not None and not (self._mailbox or self._shared.is_stopping() or self._had_its_turn()):
            steps = interpreter.take_steps()
            begun = self._begin_next(steps, lease)
        heir = self._shared.runner.pass_on(lease) if begun is None else None
        following = begun or heir
        then = None if following is None else following.then
        try:
            arguments = step_done_arguments(self.instance_id, self.token, changes, key) \
                if self._store.has_step_done else None
            if arguments is not None:
                await lease.connection.finish(arguments, then, brief=True, foreign=heir is not None)
            else:
                await lease.connection.finish(
                    checkpoint_arguments(self.instance_id, self.token, changes, big=key), then,
                    foreign=heir is not None)
        except ServerError as e:
            await lease.rollback()
            if e.sqlstate == LEASE_LOST:
                raise LeaseLostError(self.instance_id) from e
            if e.sqlstate == _READ_ONLY:
                # The step could not change anything either, so its result may be recorded on its own.
                await self._guard(self._store.checkpoint(self.instance_id, self.token, changes, big=key))
                self._start_all(steps)
                return
            if is_transient(e):
                raise _ReloadError(e.message) from e
            raise _ReloadError(e.message, failed=(key, step_error(e))) from e
        except ConnectionLostError as e:
            lease.drop()
            raise _ReloadError(str(e)) from e
        except BaseException:
            lease.drop()
            raise
        if begun is None:
            lease.release()
        self._start_all(steps, begun)

    def _begin_next(self, steps: list[Step], lease: SessionLease) -> Begun | None:
        """What goes to the server with the commit of the step in `lease`: the first of `steps`, if that may."""
        if not steps or steps[0].kind is not NodeType.SQL:
            return None
        if steps[0].key in self._forced or steps[0].key in self._tasks:
            return None
        return self._shared.runner.following(self.instance_id, steps[0], lease)

    async def _guard(self, operation: Coroutine[None, None, None]) -> None:
        """Awaits a write. Raises _ReloadError where nobody knows whether it happened, LeaseLostError."""
        try:
            await self._sure()
        except BaseException:
            operation.close()
            raise
        try:
            await operation
        except Exception as e:
            if is_infrastructure(e):
                raise _ReloadError(_text(e)) from e
            raise

    async def _sure(self) -> None:
        """Waits until the claim has committed. Raises LeaseLostError if it has not, or nobody knows."""
        try:
            await asyncio.shield(self._claimed)
        except Exception as e:
            raise LeaseLostError(self.instance_id) from e

    async def _give_up(self, error: StepError) -> None:
        """Ends the instance as failed without walking it."""
        log.warning("instance failed", instance=self.instance_id, reason=error.message)
        changes = Changes(finish=Finish("failed", error.message, error))
        await self._guard(self._store.checkpoint(self.instance_id, self.token, changes))

    async def _release(self) -> None:
        await self._guard(self._store.release([self.instance_id]))

    # -- steps -------------------------------------------------------------------------------------------------

    def _start(self, step: Step, begun: Begun | None = None) -> None:
        key = step.key
        if key in self._tasks:
            return  # it has outlived a reload
        if key in self._forced:
            self._mailbox.append(StepEnded(key, self._forced[key]))
            return
        if begun is not None and not is_http_select(step.text) \
                and (ready := self._shared.runner.ended(begun)) is not None:
            # Its answer has come together with that of the commit before it.
            self._mailbox.append(StepEnded(key, ready))
            return
        task = self._tasks[key] = self._group.create_task(self._run_step(step, begun))
        if begun is not None:
            # A task that is cancelled before it begins never gets to give the session back.
            task.add_done_callback(lambda _: begun.lease.drop() if task.cancelled() else None)

    def _start_all(self, steps: list[Step], begun: Begun | None = None) -> None:
        """Starts what `take_steps` has given; the first has `begun`."""
        for step in steps:
            self._start(step, begun)
            begun = None

    async def _run_step(self, step: Step, begun: Begun | None = None) -> None:
        attempts = step.attempts
        if attempts:
            log.warning("step runs again: what became of it before is not known", instance=self.instance_id,
                        node=step.node.id, attempts=attempts)

        async def record_started(at: datetime) -> None:
            nonlocal attempts
            await self._store.checkpoint(self.instance_id, self.token, started(at, attempts + 1))
            attempts += 1

        def started(at: datetime, attempt: int) -> Changes:
            meta = {**(step.meta or {}), "at_least_once": True, "attempt": attempt}
            return Changes(rows=[Checkpoint(*step.key, "started", meta=meta, started_at=at)])

        job = Job(self.instance_id, self._loaded.submitted_by, self._loaded.database, step, record_started)
        outcome: Outcome | Exception
        try:
            await self._sure()
            if step.kind is not NodeType.SQL:
                outcome = await self._shared.http.run(job)
            else:
                outcome = await self._shared.runner.run(job, begun)
                if isinstance(outcome, Ready | Committed) and is_http_select(step.text) \
                        and (request := future_of(outcome.text)) is not None:
                    # The statement has said what to ask for. That commits with it: every attempt asks for the same.
                    step = replace(step, kind=NodeType(request["type"]), text=request["query"],
                                   meta={"request": request})
                    if isinstance(outcome, Ready):
                        await self._finish(step.key, started(outcome.started_at, 0), outcome)
                    outcome = await self._shared.http.run(replace(job, step=step))
            if isinstance(outcome, Committed):
                outcome.meta["attempt"] = attempts
        except Exception as e:  # noqa: BLE001 - the instance's own task raises it
            outcome = e
        self.put(StepEnded(step.key, outcome))

    def _abort(self, key: Key) -> None:
        """Stops a step whose outcome no longer matters."""
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
