"""Runs one SQL step: a slot in the budget, a session as the right role, the statement, its result as JSON text.

A step ends in one of the outcomes below. `Ready` still holds its session with the transaction open: whoever gets it
must commit it, or end its lease. Faults of the infrastructure are retried here and never reach the workflow; nothing
was committed when they happen. Cancelling the task that runs a step cancels the statement on the server.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import structlog
from msgspec import Struct

from dsl.compiler import compile_sql, mentions_dsl
from dsl.values import TYPES_SQL, Column, StaleTypeError, TypeCatalog, describe, encode_rows
from engine.connection import StepConnection, StepResult
from engine.errors import ConnectionLostError, NotBegunError, ResultTooLargeError, ServerError, StepRefusedError
from engine.identity import Identities, Identity, IdentityError
from engine.model import Step, StepError
from engine.settings import EngineSettings
from engine.slots import Backlog, Slots
from engine.store import Store, is_infrastructure
from engine.target import Target
from proxy.wire.auth import AuthenticationError

log = structlog.get_logger("dfproxy.engine")

#: Errors that say nothing against a statement: it may succeed next time.
_TRANSIENT_STATES = frozenset({"40001", "40P01"})
_TRANSIENT_CLASSES = ("53",)
_READ_ONLY = "25006"
#: "can't run inside a transaction block", "invalid transaction termination" (from CALL).
_OUTSIDE_STATES = frozenset({"25001", "2D000"})
#: What a server says to a login that it will accept later: starting up, shutting down, too many clients.
_LATER_CLASSES = ("53", "57P", "08", "58")
_POOLER_REFUSES = ("no such ", "unsupported startup parameter")
_BAD_LOGIN = frozenset({"28P01", "28000"})
#: Longest pause in seconds before the next try to reach a server that is away.
AWAY = 1.0
#: Seconds that a workflow may keep its session from step to step while other steps wait for a place.
SHARE = 0.05
#: Seconds after which a step no longer waits for the commit of another workflow's that it was sent behind.
PATIENCE = 1.0
#: Logins that a step tries, each for as long as `connect_timeout`, of a server that answers others meanwhile.
LOGINS = 2
_NO_TYPES = TypeCatalog()
#: Encoding more than this many bytes happens in a thread.
_THREAD_BYTES = 256 * 1024


class Outcome(Struct):
    """How a step ended; `started_at` is database time."""

    started_at: datetime


class Ready(Outcome):
    """The statement has run in `lease.connection`, in a transaction that waits for the checkpoint."""

    text: str
    columns: tuple[Column, ...]
    meta: dict[str, object]
    lease: SessionLease


class Committed(Outcome):
    """An at-least-once step that has taken effect; its checkpoint is still to be written."""

    text: str
    columns: tuple[Column, ...] | None
    meta: dict[str, object]


class Failed(Outcome):
    """The step failed; its transaction was rolled back."""

    error: StepError


class TransientError(Exception):
    """An infrastructure fault. `suspect`: the session was lost while the step ran, maybe because of the step. `away`:
    there was no session to be had, which concerns every step alike. `hung`: this login was not answered in time, though
    the server answers others.
    """

    def __init__(self, message: str, *, suspect: bool = False, away: bool = False, hung: bool = False) -> None:
        super().__init__(message)
        self.suspect = suspect
        self.away = away
        self.hung = hung


class Job(Struct, frozen=True):
    """A step to run, and what the runner must know about its instance.

    `record_started` writes the `started` checkpoint of an at-least-once step.
    """

    instance_id: str
    submitted_by: int
    database: str | None
    step: Step
    record_started: Callable[[datetime], Awaitable[None]]


class Begun(Struct, frozen=True):
    """A step that went to the server with the commit of another one, in that one's session, `at` that time of the
    database.
    """

    lease: SessionLease
    sql: str
    at: datetime

    @property
    def then(self) -> tuple[str | None, str]:
        """As `StepConnection.finish` wants it."""
        return self.lease.key[0].role_sql, self.sql


class Wish(Struct, frozen=True):
    """What a step that waits for a place could begin with in a session of that kind."""

    key: PoolKey
    sql: str


class SessionLease:
    """A session in use, with its slot in the budget. Ends with `release`, once."""

    __slots__ = ("_ended", "_former", "_pool", "connection", "key", "since")

    def __init__(self, pool: SessionPool, key: PoolKey, connection: StepConnection,
                 former: SessionLease | None = None) -> None:
        self._pool: SessionPool | None = pool  # None: it has ended, or was passed on
        self._ended = False
        self._former = former
        self.key = key
        self.connection = connection
        self.since = asyncio.get_running_loop().time()

    @property
    def is_held(self) -> bool:
        """Whether it has neither ended nor been passed on."""
        return self._pool is not None

    def pass_on(self) -> SessionLease:
        """For another workflow, whose step goes to the server behind this one's commit. From now on it is for that one
        to end the lease; what this one still does to it has no effect.
        """
        assert self._pool is not None
        heir = SessionLease(self._pool, self.key, self.connection, self)
        self._pool = self._former = None  # what it began behind is long over; a chain of them would never end
        return heir

    def give_back(self) -> None:
        """Undoes `pass_on` while the commit is still under way; the session can't be used once that is over."""
        former = self._former
        if former is None or former._ended:  # who has passed it on does not wait for the commit any more
            self.drop()
            return
        self.connection.desert()
        former._pool, self._pool = self._pool, None

    def release(self) -> None:
        """Gives session and slot back; a session that can't be used again is dropped. No effect the second time."""
        self._ended = True
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.put_back(self)

    async def rollback(self) -> None:
        """Rolls back and releases; a session that can't do even that is dropped. No effect if it has ended."""
        if self._pool is None:
            self._ended = True
            return
        try:
            await self.connection.rollback()
        except (ServerError, ConnectionLostError):
            self.connection.abort()
        finally:
            self.release()

    def drop(self) -> None:
        """Closes the session hard (the server rolls back) and frees the slot. No effect if it has ended."""
        if self._pool is not None:
            self.connection.abort()
        self.release()

    def shed(self) -> None:
        """Ends the lease of a step that was sent behind another workflow's commit, and is not wanted any more."""
        if self._pool is not None and self.connection.is_behind:
            self.give_back()
        else:
            self.drop()


PoolKey = tuple[Identity, str | None]


class SessionPool:
    """Sessions for steps: at most `max_user_connections` in all, idle ones kept for the same identity and database."""

    def __init__(self, settings: EngineSettings, identities: Identities, *, pooled: bool = False) -> None:
        self._settings = settings
        self._identities = identities
        self._pooled = pooled  # by somebody else, between here and the server
        self._target = Target.from_dsn(settings.dsn)
        self._backlog = Backlog(asyncio.get_running_loop())
        self.slots: Slots[Wish, Begun] = Slots(settings.max_user_connections, settings.execution_acquire_timeout,
                                               self._backlog, lambda begun: begun.lease.shed())
        self._passed: deque[tuple[float, SessionLease]] = deque()  # when, to whom
        self._watch: asyncio.TimerHandle | None = None  # while there are any
        self._idle: dict[PoolKey, deque[StepConnection]] = {}
        self._idle_count = 0

    @property
    def database(self) -> str:
        """The home database's name."""
        return self._target.database

    async def take_slot(self, wish: Wish | None = None) -> Begun | None:
        """Waits for a place in the budget. Raises TimeoutError. A `lease` takes it over; otherwise `free_slot`. If a
        wish was granted, the step has begun already.
        """
        return await self.slots.take(wish)

    def pass_on(self, lease: SessionLease, sql: str, at: datetime) -> Begun:
        """Hands a session over to whoever has the next wish."""
        begun = Begun(lease.pass_on(), sql, at)
        self.slots.hand_over(begun)
        loop = asyncio.get_running_loop()
        self._passed.append((loop.time(), begun.lease))
        if self._watch is None:
            self._watch = loop.call_later(PATIENCE, self._look)
        return begun

    def _look(self) -> None:
        """Lets steps go elsewhere that have been behind another workflow's commit for too long."""
        loop = asyncio.get_running_loop()
        self._watch = None
        while self._passed:
            at, lease = self._passed[0]
            if at + PATIENCE > loop.time():
                self._watch = loop.call_at(at + PATIENCE, self._look)
                return
            self._passed.popleft()
            if lease.is_held and lease.connection.is_behind:
                lease.connection.desert()

    def free_slot(self) -> None:
        """Gives a place back that no lease has taken over."""
        self.slots.free()

    async def lease(self, identity: Identity, database: str | None) -> SessionLease:
        """A session for a slot that was taken. Raises what StepConnection.connect raises, and IdentityError."""
        key = (identity, database)
        idle = self._idle.get(key)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if connection.usable:
                return SessionLease(self, key, connection)
            connection.abort()
        while self.slots.in_use + self._idle_count > self._settings.max_user_connections and self._evict():
            pass
        return SessionLease(self, key, await self._connect(identity, database))

    async def _connect(self, identity: Identity, database: str | None) -> StepConnection:
        try:
            return await self._dial(identity, database)
        except (ServerError, AuthenticationError) as e:
            bad = isinstance(e, AuthenticationError) or e.sqlstate in _BAD_LOGIN
            if identity.mode != "executor" or not bad:
                raise
            # The secret changed, or the executor was made anew.
            await self._identities.set_password(identity)
        return await self._dial(identity, database)

    async def _dial(self, identity: Identity, database: str | None) -> StepConnection:
        target = self._target
        if identity.login is not None:
            target = target.to(user=identity.login, password=identity.password, database=database)
        else:
            target = target.to(user=target.user, password=target.password, database=database)
        parameters = dict(identity.parameters) | self._session_parameters()
        if self._pooled:
            for name in _OF_SOCKETS:
                del parameters[name]

        async def connect() -> StepConnection:
            return await StepConnection.connect(
                target, parameters, timeout=self._settings.connect_timeout, pooled=self._pooled,
                max_rows=self._settings.max_result_rows, max_bytes=self._settings.max_result_bytes,
                on_answer=self._backlog.note)

        try:
            return await connect()
        except ServerError as e:
            if _CHECK_INTERVAL not in e.message:
                raise
            # A server on a platform that can't look for vanished clients while a statement runs.
            del parameters[_CHECK_INTERVAL]
            return await connect()

    def _session_parameters(self) -> dict[str, str]:
        """SURFACE 5.2; and what makes the server notice soon that a worker is gone, whose locks block its successor."""
        return {
            "application_name": "dfproxy:step",
            "client_encoding": "UTF8",
            "TimeZone": "UTC",
            "DateStyle": "ISO, MDY",
            "IntervalStyle": "iso_8601",
            "bytea_output": "hex",
            "extra_float_digits": "2",
            "standard_conforming_strings": "on",  # what dsl.literals writes is safe only so
            "df.in_workflow": "true",
            "idle_in_transaction_session_timeout": str(int(self._settings.lease * 1000)),
            _CHECK_INTERVAL: "2000",
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
        }

    def put_back(self, lease: SessionLease) -> None:
        """Takes a session out of use."""
        self.free_slot()
        connection = lease.connection
        if not connection.usable:
            connection.abort()
            return
        connection.used_at = time.monotonic()
        self._idle.setdefault(lease.key, deque()).append(connection)
        self._idle_count += 1

    def _evict(self) -> bool:
        """Closes the session that has been idle longest."""
        oldest: deque[StepConnection] | None = None
        for idle in self._idle.values():
            if idle and (oldest is None or idle[0].used_at < oldest[0].used_at):
                oldest = idle
        if oldest is None:
            return False
        oldest.popleft().close()
        self._idle_count -= 1
        return True

    def close_idle(self, seconds: float) -> None:
        """Closes sessions that have been idle for longer."""
        limit = time.monotonic() - seconds
        for key, idle in list(self._idle.items()):
            while idle and (idle[0].used_at < limit or not idle[0].usable):
                idle.popleft().close()
                self._idle_count -= 1
            if not idle:
                del self._idle[key]


_CHECK_INTERVAL = "client_connection_check_interval"
#: About the server's own connection, which is a pooler's where there is one.
_OF_SOCKETS = (_CHECK_INTERVAL, "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")


class Runner:
    """Runs steps of one worker."""

    def __init__(self, settings: EngineSettings, store: Store, identities: Identities) -> None:
        self._settings = settings
        self._store = store
        self._identities = identities
        self.pool = SessionPool(settings, identities, pooled=store.pooled)
        self._catalogs: dict[str, tuple[float, TypeCatalog]] = {}

    def following(self, instance_id: str, step: Step, lease: SessionLease) -> Begun | None:
        """A SQL step as what may begin with the commit of the one in `lease`, which is of the same workflow; None: it
        must take its own way.

        A session is kept from step to step for `SHARE` seconds, then only while no other step waits for its place.
        """
        identity, database = lease.key
        if lease.connection.pooled or database is not None or step.attempts:
            return None
        if self.pool.slots.waiting and asyncio.get_running_loop().time() - lease.since > SHARE:
            return None
        if self._identities.known(identity.oid) is not identity:
            return None  # it is time to ask again who that is
        sql = self._compile(step, instance_id)
        return None if _unfit(sql) else Begun(lease, sql, self._store.clock.now())

    def pass_on(self, lease: SessionLease) -> Begun | None:
        """Hands the session in `lease` over, with the commit that is about to be sent, to the workflow whose step has
        waited longest for a place, if that step runs in the same kind of session. Whoever it is waits for neither a
        place nor this commit. None: it is to be released.
        """
        wish = self.pool.slots.next_wish()
        if wish is None or wish.key != lease.key or self._identities.known(wish.key[0].oid) != wish.key[0]:
            return None
        return self.pool.pass_on(lease, wish.sql, self._store.clock.now())

    def _wish(self, job: Job, sql: str) -> Wish | None:
        """What may be handed over to a step together with its place."""
        if job.database is not None or self._store.pooled:
            return None
        identity = self._identities.known(job.submitted_by)
        return None if identity is None else Wish((identity, None), sql)

    def ended(self, begun: Begun) -> Ready | None:
        """The outcome of a step that has begun, if it is known already and is that it has run; otherwise `run` it."""
        result = begun.lease.connection.begun_result()
        encoded = None if result is None else self._encode_now(None, result)
        if result is None or encoded is None:
            return None
        return Ready(begun.at, *encoded, meta={"tag": result.tag}, lease=begun.lease)

    async def run(self, job: Job, begun: Begun | None = None) -> Outcome:
        """Runs a step to an outcome; `begun`: its first attempt is under way. Raises only LeaseLostError (from
        `record_started`), CancelledError, and bugs.
        """
        if begun is None:
            started, sql = self._store.clock.now(), self._compile(job.step, job.instance_id)
        else:
            started, sql = begun.at, begun.sql
        if (unfit := _unfit(sql)) is not None:
            return Failed(started, unfit)
        # A step here that was begun at least once was found then to need no transaction block.
        outside = job.database is None and job.step.attempts > 0
        suspects = hung = 0
        attempt = 0
        while True:
            try:
                if begun is None:
                    return await self._attempt(job, sql, started, outside=outside)
                lease, begun = begun.lease, None
                return await self._use(job, sql, started, lease.key[0], lease, begun=True)
            except _OutsideError:
                outside = True
                continue
            except NotBegunError:
                continue
            except TransientError as e:
                suspects += e.suspect
                if suspects >= self._settings.max_crashes:
                    message = f"the connection was lost {suspects} times while this step ran: {e}"
                    return Failed(started, StepError(message, "08006"))
                hung += e.hung
                if hung >= LOGINS:
                    return Failed(started, StepError(str(e), "08001"))
                fault: Exception = e
            except Exception as e:
                if not is_infrastructure(e):
                    raise
                fault = e
            attempt += 1
            pause = back_off(self._settings, attempt)
            if isinstance(fault, TransientError) and fault.away:
                # The poll says so too, once for all; and nothing is gained by coming back late.
                level, pause = "debug", min(pause, AWAY)
            else:
                level = "warning"
            getattr(log, level)("step will be tried again", instance=job.instance_id, node=job.step.node.id,
                                attempt=attempt, reason=str(fault) or type(fault).__name__)
            await asyncio.sleep(pause)

    def _compile(self, step: Step, instance_id: str) -> str:
        """The DSL inside a step's text becomes plain calls, as it would in a client's statement."""
        text = step.text
        if not mentions_dsl(text.encode("utf-8", "surrogatepass")):
            return text
        try:
            compiled = compile_sql(text, standard_conforming_strings=True)
        except Exception:
            log.exception("the compiler failed on a step; it runs as it is", instance=instance_id)
            return text
        return text if compiled is None else compiled.sql

    async def _attempt(self, job: Job, sql: str, started: datetime, *, outside: bool) -> Outcome:
        try:
            begun = await self.pool.take_slot(None if outside else self._wish(job, sql))
        except TimeoutError:
            limit, wait = self._settings.max_user_connections, self._settings.execution_acquire_timeout
            return Failed(started, StepError(
                f"pg_durable: connection limit reached (max_user_connections={limit}). "
                f"Timed out after {wait:g}s waiting for an available execution slot.", "53300"))
        if begun is not None:
            return await self._use(job, sql, begun.at, begun.lease.key[0], begun.lease, begun=True)
        try:
            identity = await self._identities.resolve(job.submitted_by, job.instance_id, job.database)
            lease = await self._connect(identity, job.database)
        except BaseException as e:
            self.pool.free_slot()
            if isinstance(e, IdentityError):
                return Failed(started, StepError(str(e), e.sqlstate, None, e.hint))
            if isinstance(e, _FailedError):
                return Failed(started, e.error)
            raise
        return await self._use(job, sql, started, identity, lease, outside=outside)

    async def _use(self, job: Job, sql: str, started: datetime, identity: Identity, lease: SessionLease, *,
                   outside: bool = False, begun: bool = False) -> Outcome:
        """An attempt in this session, which is released, or is the outcome's."""
        try:
            if outside or job.database is not None:
                return await self._at_least_once(job, sql, started, identity, lease, outside=outside)
            return await self._transaction(job, sql, started, identity, lease, begun=begun)
        except asyncio.CancelledError:
            try:
                if lease.is_held:
                    await lease.connection.cancel()
            finally:
                lease.drop()
            raise
        except BaseException:
            lease.drop()
            raise

    async def _connect(self, identity: Identity, database: str | None) -> SessionLease:
        """Raises _FailedError for what is the workflow's own trouble, TransientError for what will pass."""
        name = database or self.pool.database
        try:
            return await self.pool.lease(identity, database)
        except TimeoutError as e:
            # A server that is away is waited for; one that answers others but not this login is the step's trouble,
            # unless it was only this connection that was lost on its way.
            if time.monotonic() - self._store.last_contact > self._settings.lease:
                raise TransientError("the server does not answer", away=True) from e
            raise TransientError(f"Connection to database '{name}' as '{identity.user}' timed out after "
                                 f"{self._settings.connect_timeout:g}s", hung=True) from e
        except ConnectionLostError as e:
            raise TransientError(str(e), away=True) from e
        except ServerError as e:
            self._identities.forget(identity.oid)
            if e.sqlstate.startswith(_LATER_CLASSES) and not self._refused_for_good(e):
                raise TransientError(e.message, away=True) from e
            raise _FailedError(StepError(
                f"Failed to connect to database '{name}' as '{identity.user}'. Error: {e.message}", e.sqlstate,
                e.fields.get("D"), e.fields.get("H"))) from e
        except AuthenticationError as e:
            raise _FailedError(StepError(
                f"Failed to connect to database '{name}' as '{identity.user}'. Error: {e}", "28000")) from e

    def _refused_for_good(self, error: ServerError) -> bool:
        """Of class 08: a server has one error for startup packets that it never accepts; PgBouncer, for nearly all."""
        return error.sqlstate == "08P01" and (not self._store.pooled or error.message.startswith(_POOLER_REFUSES))

    async def _transaction(self, job: Job, sql: str, started: datetime, identity: Identity, lease: SessionLease, *,
                           begun: bool) -> Outcome:
        result = await self._run(
            job, lease, identity,
            lambda c: c.run_begun() if begun else c.begin_and_run(identity.role_sql, sql), started)
        if isinstance(result, Outcome):
            return result
        encoded = await self._encode(job, lease, result)
        if isinstance(encoded, StepError):
            await lease.rollback()
            return Failed(started, encoded)
        return Ready(started, *encoded, meta={"tag": result.tag}, lease=lease)

    async def _at_least_once(self, job: Job, sql: str, started: datetime, identity: Identity, lease: SessionLease,
                             *, outside: bool) -> Outcome:
        await job.record_started(started)
        if outside:
            result = await self._run(job, lease, identity, lambda c: c.run_outside(identity.role_sql, sql), started)
        else:
            result = await self._run(job, lease, identity, lambda c: c.begin_and_run(identity.role_sql, sql), started)
        if isinstance(result, Outcome):
            return result
        encoded = await self._encode(job, lease, result)
        if not outside:
            if isinstance(encoded, StepError):
                await lease.rollback()
                return Failed(started, encoded)
            try:
                await lease.connection.commit()
            except ServerError as e:
                await lease.rollback()
                if is_transient(e):
                    raise TransientError(e.message) from e
                return Failed(started, step_error(e))
            except ConnectionLostError as e:
                raise TransientError(str(e)) from e
        lease.release()
        if isinstance(encoded, StepError):
            return Failed(started, encoded)
        return Committed(started, *encoded, meta={"tag": result.tag, "at_least_once": True})

    async def _run(self, job: Job, lease: SessionLease, identity: Identity,
                   statement: Callable[[StepConnection], Awaitable[StepResult]],
                   started: datetime) -> StepResult | Outcome:
        """The statement's result, or the outcome if it failed; then the session is released."""
        try:
            return await statement(lease.connection)
        except ServerError as e:
            await lease.rollback()
            if e.sqlstate == "22023" and "does not exist" in e.message and identity.role_sql is not None:
                # The role may have been dropped, or renamed, since it was looked up.
                self._identities.forget(identity.oid)
                try:
                    if await self._identities.resolve(identity.oid, job.instance_id, job.database) != identity:
                        raise TransientError(e.message) from e
                except IdentityError as gone:
                    return Failed(started, StepError(str(gone), gone.sqlstate, None, gone.hint))
            if e.sqlstate == _READ_ONLY and lease.connection.pooled and await self._in_recovery():
                raise TransientError("the server is a standby") from e
            if e.sqlstate in _OUTSIDE_STATES and e.fields.get("V", e.fields.get("S")) == "ERROR":
                # The role would have to stay with the session, and so does what a procedure sets.
                if lease.connection.pooled and (identity.role_sql is not None or e.sqlstate != "25001"):
                    return Failed(started, StepError(
                        "SQL execution failed: this statement can't run in a transaction block, and through a pooler "
                        f"in transaction mode steps run in nothing else: {e.message}", "0A000", None,
                        "Let `upstream` name the server itself."))
                raise _OutsideError from e
            if is_transient(e):
                raise TransientError(e.message) from e
            return Failed(started, step_error(e))
        except StepRefusedError as e:
            await lease.rollback()
            return Failed(started, StepError(f"SQL execution failed: {e}", e.sqlstate))
        except ResultTooLargeError as e:
            await lease.connection.cancel()
            lease.drop()
            return Failed(started, StepError(f"SQL execution failed: {e}", "54000"))
        except NotBegunError:
            if lease.connection.is_behind:
                lease.give_back()
            else:
                await lease.rollback()
            raise
        except ConnectionLostError as e:
            lease.drop()
            raise TransientError(str(e), suspect=True) from e

    async def _in_recovery(self) -> bool:
        """Whether a pooler has led us to a standby; without one a session would have said so itself."""
        [row] = await self._store.fetch("SELECT pg_catalog.pg_is_in_recovery()")
        return bool(row[0])

    # -- results -----------------------------------------------------------------------------------------------

    async def _encode(self, job: Job, lease: SessionLease,
                      result: StepResult) -> tuple[str, tuple[Column, ...]] | StepError:
        """The result as JSON text and columns; StepError if its bytes can't be understood."""
        if (now := self._encode_now(job.database, result)) is not None:
            return now
        fields, oids = _fields(result)
        try:
            for _ in range(3):
                catalog = await self._types(job, lease, oids)
                columns = describe(fields, catalog)
                try:
                    if _is_large(result):
                        return await asyncio.to_thread(encode_rows, columns, result.rows, catalog), columns
                    return encode_rows(columns, result.rows, catalog), columns
                except StaleTypeError as e:
                    catalog.forget(e.oid)
        except ValueError as e:
            return StepError(f"SQL execution failed: the result can't be read: {e}", "22P02")
        return StepError("SQL execution failed: a type of the result changes all the time", "XX000")

    def _encode_now(self, database: str | None, result: StepResult) -> tuple[str, tuple[Column, ...]] | None:
        """The same for what is small and needs no question to the database; None where it isn't, or something is wrong.
        """
        if not result.columns:
            return encode_rows((), result.rows, _NO_TYPES), ()
        fields, oids = _fields(result)
        if database is not None or _is_large(result) or (catalog := self._store.known_types(oids)) is None:
            return None
        columns = describe(fields, catalog)
        try:
            return encode_rows(columns, result.rows, catalog), columns
        except ValueError:  # StaleTypeError is one
            return None

    async def _types(self, job: Job, lease: SessionLease, oids: Sequence[int]) -> TypeCatalog:
        if job.database is None:
            return await self._store.types(oids)
        # OIDs are those of that database, where only the step's own session is.
        at, catalog = self._catalogs.get(job.database, (0.0, None))
        if catalog is None or time.monotonic() - at > 60:
            catalog = TypeCatalog()
            self._catalogs[job.database] = (time.monotonic(), catalog)
        if unknown := catalog.unknown(oids):
            try:
                rows = await lease.connection.fetch(TYPES_SQL, ["{" + ",".join(map(str, unknown)) + "}"])
            except (ServerError, ConnectionLostError) as e:
                raise TransientError(str(e)) from e
            catalog.load((rows[0][0] or b"[]").decode(), unknown)
        return catalog


def _fields(result: StepResult) -> tuple[list[tuple[str, int, int]], list[int]]:
    """Columns as `describe` wants them, and the OIDs of their types."""
    fields = [(c.name, c.type_oid, c.type_modifier) for c in result.columns or ()]
    return fields, [oid for _, oid, _ in fields]


def _is_large(result: StepResult) -> bool:
    return len(result.rows) > 100 and sum(len(v) for row in result.rows for v in row if v is not None) > _THREAD_BYTES


class _OutsideError(Exception):
    """The statement wants to run outside of a transaction block."""


class _FailedError(Exception):
    """A step's error, found before its statement ran."""

    def __init__(self, error: StepError) -> None:
        super().__init__(error.message)
        self.error = error


#: Behind comments, of which those in /* */ may be nested: what can't be told from the inside of one is let through here
#: only if it is no statement.
_INSIDE = r"[^*/]|\*(?!/)|/(?!\*)"
_BLANK = rf"(?>\s|--[^\n\r]*+|/\*(?>(?:{_INSIDE}|/\*(?>(?:{_INSIDE})*)\*/)*)\*/)"
_PREPARE_TRANSACTION = re.compile(rf"(?>{_BLANK}*)PREPARE(?>{_BLANK}+)TRANSACTION\b", re.IGNORECASE)


def _unfit(sql: str) -> StepError | None:
    """What the protocol can't carry; substituted values may hold it."""
    try:
        sql.encode()
    except UnicodeEncodeError:
        return StepError("SQL execution failed: the statement holds half of a surrogate pair", "22021")
    if "\0" in sql:
        return StepError("SQL execution failed: the statement holds a zero byte", "22021")
    if _PREPARE_TRANSACTION.match(sql):
        # The others are noticed once they have done nothing; this one would keep what it did, and its locks, for ever.
        return StepError("SQL execution failed: a step can't end its transaction: COMMIT, ROLLBACK and PREPARE "
                         "TRANSACTION are the engine's", "2D000")
    return None


def is_transient(error: ServerError) -> bool:
    """Whether a statement's error will pass by itself; 08 and 57P count only when they end the session."""
    state = error.sqlstate
    return state in _TRANSIENT_STATES or state.startswith(_TRANSIENT_CLASSES) or (
        error.fatal and state.startswith(_LATER_CLASSES))


def step_error(error: ServerError) -> StepError:
    """SURFACE 5.2's failure text, with the fields that the original drops."""
    return StepError(f"SQL execution failed: error returned from database: {error.message}", error.sqlstate,
                     error.fields.get("D"), error.fields.get("H"))


def back_off(settings: EngineSettings, attempt: int) -> float:
    """Seconds before try number `attempt` + 1: exponential, with full jitter above half."""
    limit = min(settings.retry_max, settings.retry_min * 2 ** min(attempt - 1, 20))
    return float(limit * random.uniform(0.5, 1.0))
