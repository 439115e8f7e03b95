"""The state in the database, as one worker sees it: every statement that reads or writes schema `duroxide`.

One connection for the heartbeat and one for the poll, so that neither waits behind a checkpoint, and a pool for the
rest. Values travel as text, so that nothing depends on codecs or on infinity in Python.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import uuid4

import asyncpg
import structlog
from msgspec import Struct

from dsl.values import TYPES_SQL, Column, TypeCatalog
from engine.control import ControlConnection
from engine.errors import ConnectionLostError, ServerError
from engine.model import Changes, Checkpoint, Key, Signal, StepError
from engine.processes import Life, is_dead
from engine.recorder import Arguments, Recorder
from engine.settings import EngineSettings
from engine.target import Target
from proxy.wire.tls_options import TlsConfigError, for_asyncpg

log = structlog.get_logger("dfproxy.engine")

#: OID of the type.
TEXT = 25
#: Of a row that a poll may get: a thousand signals with what they carry.
MOST_BYTES = 2**30

LEASE_LOST = "DF001"
_POOLED = "DF004"
#: asyncpg's errors and the system's, where the database or the way to it is at fault and a later try may succeed.
_INFRASTRUCTURE_CLASSES = ("08", "53", "57P", "58")
_INFRASTRUCTURE_STATES = frozenset({"40001", "40P01", "55P03", "25006", "57014", "25P03"})
#: What a transaction pooler does to prepared statements.
_POOLER_STATES = frozenset({"26000", "42P05"})


class LeaseLostError(Exception):
    """Another worker has the instance, or it is no longer there."""


def is_infrastructure(error: BaseException) -> bool:
    """Whether a fault of a control connection will pass by itself."""
    if isinstance(error, asyncpg.PostgresError | ServerError):
        state = error.sqlstate or ""
        return state.startswith(_INFRASTRUCTURE_CLASSES) or state in _INFRASTRUCTURE_STATES
    # InterfaceError: asyncpg's word for a connection or pool that is closed or busy being closed.
    # TlsConfigError: a file that is being replaced.
    return isinstance(error, OSError | TimeoutError | ConnectionLostError | asyncpg.InterfaceError
                      | asyncpg.InternalClientError | TlsConfigError)


class Claim(Struct, frozen=True):
    """An instance that was just claimed. `loaded`: as `Store.load` gives it, where the claim has brought it along."""

    instance_id: str
    token: str
    fresh: bool
    crashes: int
    loaded: LoadedInstance | None = None


class InboxEntry(Struct, frozen=True):
    """A signal, or a request to cancel (`name` is then the reason)."""

    instance_id: str
    seq: int
    kind: str
    name: str
    data: str | None

    @property
    def signal(self) -> Signal:
        return Signal(self.seq, self.name, self.data)


class Poll(Struct, frozen=True):
    """What one poll found. `next_due`: when the next parked instance is due, database time. `overdue`: some are due
    that were not claimed, since the limit was 0. `looked`: it has read the inbox, and what is due next.
    """

    claims: list[Claim]
    inbox: list[InboxEntry]
    next_due: datetime | None
    committed: asyncio.Future[None]  #: for several to wait for, with a shield
    overdue: bool = False
    alive: bool = True  #: as `Store.heartbeat` gives it, where the poll was one as well
    looked: bool = True
    handled: list[int] = []  #: what the inbox will not tell again


class LoadedInstance(Struct, frozen=True):
    """An instance as the database has it; `graph` is the JSON text."""

    instance_id: str
    token: str
    crashes: int
    label: str | None
    graph: str
    variables: dict[str, str]
    database: str | None
    submitted_by: int
    inbox: list[InboxEntry]
    checkpoints: list[Checkpoint]


#: In front of whatever may meet a row that somebody's open transaction has locked (a cancel, a delete): such a caller
#: must hold up neither the worker nor other instances. Local to the statement, since a pooler may be in between.
_SOON = "set_config('lock_timeout', '1000', true)"

_CLAIM = """(SELECT jsonb_agg(jsonb_build_array(c.instance_id, c.token, c.fresh, c.crashes, NULL))
          FROM duroxide.claim($1::text::uuid, $2::text::int4) c)"""
#: $5: where something is claimed, the inbox and what is due next are left for the poll after this one. All is text.
POLL = f"""
SELECT {_SOON},
       CASE WHEN $4::text::bool THEN duroxide.heartbeat($1::text::uuid) END::text,
       t.taken::text,
       CASE WHEN t.taken IS NULL OR NOT $5::text::bool THEN
           (SELECT jsonb_agg(jsonb_build_array(s.instance_id, s.seq, s.kind, s.name, s.data) ORDER BY s.seq)
              FROM duroxide.inbox($1::text::uuid, $3::text::bigint[]) s)::text END,
       CASE WHEN t.taken IS NULL OR NOT $5::text::bool THEN extract(epoch FROM duroxide.next_due())::float8 END::text,
       CASE WHEN $2::text::int4 <= 0 THEN duroxide.overdue() END::text,
       extract(epoch FROM clock_timestamp())::float8::text
  FROM (SELECT duroxide.take($1::text::uuid, $2::text::int4) AS taken OFFSET 0) AS t
"""

#: Without what 0011 has brought.
POLL_BEFORE = POLL.replace("duroxide.take($1::text::uuid, $2::text::int4)", _CLAIM)

HEARTBEAT = f"SELECT {_SOON}, duroxide.heartbeat($1::text::uuid), extract(epoch FROM clock_timestamp())::float8"

LOAD = """
SELECT q.instance_id, q.token::text, q.crashes, i.id IS NOT NULL AS present, i.label, i.graph::text AS graph,
       i.vars::text AS vars, i.database, i.submitted_by::oid::int8 AS submitted_by,
       (SELECT jsonb_agg(jsonb_build_array(s.instance_id, s.seq, s.kind, s.name, s.data) ORDER BY s.seq)
          FROM duroxide.signals s WHERE s.instance_id = q.instance_id)::text AS inbox
  FROM duroxide.queue q LEFT JOIN duroxide.instances i ON i.id = q.instance_id
 WHERE q.instance_id = ANY ($1) AND q.owner = $2::text::uuid
"""

HISTORY = """
SELECT h.instance_id, h.execution, h.node, h.event, h.result, h.types::text AS types, h.error::text AS error,
       h.meta::text AS meta, h.started_at
  FROM duroxide.history h WHERE h.instance_id = ANY ($1)
"""

CHECKPOINT = f"""
SELECT {_SOON}, duroxide.checkpoint($1, $2::text::uuid, $3::text::jsonb, $4, $5::text::bigint[], $6::text::text[],
                           $7::text::jsonb, $8::text::timestamptz, $9::text::jsonb)
"""

CHECKPOINTS = f"SELECT c.c FROM (SELECT {_SOON}) AS s, LATERAL duroxide.checkpoints($1::text::jsonb) AS c"

#: Gives an instance back after an internal error, not before a pause; counted like a lost worker.
GIVE_BACK = """
UPDATE duroxide.queue SET owner = NULL, token = NULL, crashes = crashes + 1,
       wake_at = clock_timestamp() + make_interval(secs => least(300, power(2, least(crashes, 10))))
 WHERE instance_id = $1 AND token = $2::text::uuid
"""

#: Not yet where an older version has installed the schemas, and a newer one has not come by.
HAS_STEP_DONE = """
SELECT to_regprocedure('duroxide.step_done(text, uuid, text, integer, text, jsonb, jsonb, timestamptz, boolean)')
       IS NOT NULL
"""

#: Waits for whoever still holds the row's lock with the old token: a session of ours that we lost sight of, whose
#: checkpoint is either committed when this returns, or will be refused.
REFENCE = f"""
UPDATE duroxide.queue SET token = gen_random_uuid() FROM (SELECT {_SOON}) AS soon
 WHERE instance_id = $1 AND owner = $2::text::uuid
RETURNING token::text
"""

RETAIN = f"""
SELECT s.*, r.removed, r.reached FROM (SELECT {_SOON}) AS s, LATERAL duroxide.retain($1, $2::int4, $3, $4::int4) r
"""


#: json.dumps would make a new encoder at every call.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _error_json(error: StepError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"message": error.message, "sqlstate": error.sqlstate, "detail": error.detail, "hint": error.hint}


def _row_json(row: Checkpoint, *, big: bool) -> dict[str, Any]:
    item: dict[str, Any] = {"execution": row.execution, "node": row.node, "event": row.event}
    if big:
        item["big"] = True
    elif row.result is not None:
        item["result"] = row.result
    if row.columns is not None:
        item["types"] = [c.to_json() for c in row.columns]
    if row.error is not None:
        item["error"] = _error_json(row.error)
    if row.meta is not None:
        item["meta"] = dict(row.meta)
    if row.started_at is not None:
        item["started_at"] = row.started_at.isoformat()
    return item


def _text_array(items: Iterable[str]) -> str:
    quoted = (item.replace("\\", "\\\\").replace('"', '\\"') for item in items)
    return "{" + ",".join(f'"{item}"' for item in quoted) + "}"


def checkpoint_arguments(instance_id: str, token: str, changes: Changes, *, big: Key | None = None,
                         park: str | None = None) -> list[str | None]:
    """The nine arguments of duroxide.checkpoint, each in its text form.

    `big` names the row whose result goes as it is rather than inside the JSON; `park`: a timestamp, or `infinity`.
    """
    result: str | None = None
    rows = []
    for row in changes.rows:
        is_big = big is not None and (row.execution, row.node) == big and row.result is not None \
            and row.event == "completed"
        if is_big:
            result = row.result
        rows.append(_row_json(row, big=is_big))
    finish: dict[str, Any] | None = None
    if changes.finish is not None:
        finish = {"status": changes.finish.status}
        if result is not None and changes.finish.output == result:
            finish["output_is_result"] = True
        else:
            finish["output"] = changes.finish.output
        if changes.finish.error is not None:
            finish["error"] = _error_json(changes.finish.error)
    return [
        instance_id,
        token,
        _to_json(rows),
        result,
        "{" + ",".join(map(str, changes.consumed)) + "}" if changes.consumed else None,
        _text_array(changes.prune) if changes.prune else None,
        _to_json([list(key) for key in changes.keep]) if changes.keep else None,
        park,
        None if finish is None else _to_json(finish),
    ]


@lru_cache(256)
def _tag_json(tag: str) -> str:
    return _to_json({"tag": tag})


def _meta_json(meta: Mapping[str, Any] | None) -> str | None:
    if meta is None:
        return None
    return _tag_json(meta["tag"]) if len(meta) == 1 and "tag" in meta else _to_json(dict(meta))


@lru_cache(256)
def _types_json(columns: tuple[Column, ...] | None) -> str | None:
    if columns is None:
        return None
    return _to_json([c.to_json() for c in columns]) if columns else "[]"


def step_done_arguments(instance_id: str, token: str, changes: Changes, key: Key) -> list[str | None] | None:
    """The nine arguments of duroxide.step_done, where that can record `changes`: the leaf `key` is completed, and
    nothing else happened but that the instance may have ended with its result.
    """
    if len(changes.rows) != 1 or changes.consumed or changes.prune or changes.keep:
        return None
    [row], finish = changes.rows, changes.finish
    if row.event != "completed" or row.error is not None or (row.execution, row.node) != key:
        return None
    if finish is not None and (finish.status != "completed" or finish.error is not None or finish.output != row.result):
        return None
    return [
        instance_id,
        token,
        row.execution,
        str(row.node),
        row.result,
        _types_json(row.columns),
        _meta_json(row.meta),
        None if row.started_at is None else row.started_at.isoformat(),
        "f" if finish is None else "t",
    ]


def _variables(items: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in items.items() if value is not None}


def _claim(instance_id: str, token: str, fresh: bool, crashes: int, whole: list[Any] | None) -> Claim:
    if whole is None:
        return Claim(instance_id, token, fresh, crashes)
    label, graph, variables, database, submitted_by, inbox = whole
    return Claim(instance_id, token, fresh, crashes, LoadedInstance(
        instance_id, token, crashes, label, graph, _variables(variables), database, submitted_by,
        [InboxEntry(*item) for item in inbox or ()], []))


def _inbox(text: str | None) -> list[InboxEntry]:
    return [InboxEntry(*item) for item in json.loads(text)] if text else []


def _checkpoint(row: Any) -> Checkpoint:
    error = json.loads(row["error"]) if row["error"] else None
    types = json.loads(row["types"]) if row["types"] else None
    return Checkpoint(
        row["execution"], row["node"], row["event"], row["result"],
        None if types is None else tuple(Column.from_json(t) for t in types),
        None if error is None else StepError(error.get("message") or "", error.get("sqlstate"), error.get("detail"),
                                             error.get("hint")),
        json.loads(row["meta"]) if row["meta"] else None, row["started_at"])


class Clock:
    """Database time from the loop's monotonic clock and an offset that every poll and heartbeat measures."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._measured: tuple[float, float] | None = None  # when, and how sharply

    def now(self) -> datetime:
        """The database's present, in UTC."""
        return datetime.fromtimestamp(time.monotonic() + self._offset, UTC)

    def measure(self, sent: float, received: float, database: float) -> None:
        """Takes a reading: the monotonic clock before and after asking, and the answer (epoch seconds)."""
        sharpness = received - sent
        if self._measured is not None:
            when, best = self._measured
            # A blunt reading only replaces one that may have drifted away.
            if sharpness > 2 * best and received - when < 30:
                return
        self._measured = (received, sharpness)
        self._offset = database - (sent + received) / 2


class Store:
    """One worker's access to the state. `open` first; every method may raise what `is_infrastructure` knows."""

    def __init__(self, settings: EngineSettings, *, statement_cache_size: int | None = None,
                 pooled: bool = False) -> None:
        self.settings = settings
        self.clock = Clock()
        self.worker_id = ""
        self.recorder = Recorder(self._write)
        self._handled: set[int] = set()
        self.catalog = TypeCatalog()
        self._cache_size = settings.statement_cache_size if statement_cache_size is None else statement_cache_size
        self.pooled = pooled  #: a pooler is in between: nothing outlives a transaction
        self._pool: asyncpg.Pool[Any] | None = None
        self._beat: asyncpg.Connection[Any] | None = None
        self._poll: ControlConnection | None = None
        self._poll_pooled: asyncpg.Connection[Any] | None = None
        self._catalog_at = time.monotonic()
        self.last_contact = 0.0  #: monotonic time of the last answer on a connection of its own
        self.has_step_done = False  #: duroxide.step_done and what came with it exist (0011)

    # -- life --------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        # Read anew each time: certificates are renewed while a worker runs.
        dsn, tls = for_asyncpg(self.settings.dsn)
        return {
            "dsn": dsn, **tls, "timeout": self.settings.connect_timeout,
            "statement_cache_size": 0 if self.pooled else self._cache_size, "max_cached_statement_lifetime": 0,
            "server_settings": {"application_name": "dfproxy:control"},
        }

    async def open(self) -> None:
        """Connects. Raises what asyncpg raises."""
        self._pool = await self._make_pool()
        if not self.pooled and self._cache_size and await self._behind_pooler():
            log.info("a connection pooler is in between: transactions are all that is relied upon")
            self.pooled = True
            self._pool.terminate()
            self._pool = await self._make_pool()

    async def _make_pool(self) -> asyncpg.Pool[Any]:
        return await asyncpg.create_pool(
            **self._options(), min_size=1, max_size=max(1, self.settings.max_control_connections - 2),
            command_timeout=60.0, reset=_no_reset)

    async def _behind_pooler(self) -> bool:
        """Whether somebody answers in the server's place: poolers give their clients keys of their own."""
        async with self._connection() as c:
            try:
                # One request, which leaves nothing behind: what is prepared here would be found by others there.
                await c.execute(f"DO $$ BEGIN IF pg_catalog.pg_backend_pid() <> {c.get_server_pid():d} THEN "
                                f"RAISE 'a pooler is in between' USING ERRCODE = '{_POOLED}'; END IF; END $$")
            except asyncpg.PostgresError as e:
                if e.sqlstate != _POOLED:
                    raise
                return True
        return False

    async def close(self) -> None:
        """Drops all connections at once."""
        for connection in (self._beat, self._poll_pooled):
            if connection is not None and not connection.is_closed():
                connection.terminate()
        if self._poll is not None:
            self._poll.abort()
        self._beat = self._poll = self._poll_pooled = None
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def _own(self, connection: asyncpg.Connection[Any] | None) -> asyncpg.Connection[Any]:
        """The connection, or a new one if it is lost."""
        if connection is not None and not connection.is_closed():
            return connection
        fresh: asyncpg.Connection[Any] = await asyncpg.connect(**self._options(), command_timeout=self._limit)
        return fresh

    @property
    def _limit(self) -> float:
        """Seconds that the answer to a heartbeat or a poll may take."""
        return max(1.0, self.settings.lease / 3)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        if self._pool is None:
            raise asyncpg.InterfaceError("the store is closed")
        async with self._pool.acquire(timeout=self.settings.connect_timeout) as connection, self._whole(connection):
            yield connection

    @asynccontextmanager
    async def _whole(self, connection: asyncpg.Connection[Any]) -> AsyncIterator[None]:
        """Behind a pooler everything is a transaction: one statement is two requests, to prepare and to run."""
        if not self.pooled:
            yield
            return
        async with connection.transaction():
            yield

    def saw_pooler(self, error: BaseException) -> bool:
        """Whether the error says that a transaction pooler is in between, which could not be told before."""
        return isinstance(error, asyncpg.PostgresError | ServerError) and error.sqlstate in _POOLER_STATES \
            and not self.pooled

    # -- worker ------------------------------------------------------------------------------------------------

    async def register(self, former: str | None = None) -> None:
        """Makes this worker known; frees at once what dead workers of this very machine held, and what it held itself
        under its `former` id, if it could not give that back.
        """
        life = Life.mine()
        self.worker_id = str(uuid4())
        async with self._connection() as c:
            if former is not None:
                await c.execute("SELECT duroxide.leave($1::text::uuid)", former)
            dead = [row["id"] for row in await c.fetch("SELECT id, name FROM duroxide.workers")
                    if is_dead(row["name"])]
            if dead:
                await c.execute("UPDATE duroxide.workers SET heartbeat_at = '-infinity' WHERE id = ANY ($1)", dead)
            self.has_step_done = bool(await c.fetchval(HAS_STEP_DONE))
            await c.execute(
                "INSERT INTO duroxide.workers (id, name, version, lease) VALUES ($1::text::uuid, $2, $3, $4)",
                self.worker_id, f"{self.settings.worker_name} {life or ''}".strip(), self.settings.version,
                timedelta(seconds=self.settings.lease))
        await self.heartbeat()

    async def unregister(self) -> None:
        """Gives everything back and leaves."""
        async with self._connection() as c:
            await c.execute("SELECT duroxide.leave($1::text::uuid)", self.worker_id)

    async def heartbeat(self) -> bool:
        """Renews the lease and frees what lost workers held. False: this worker was given up itself."""
        c = self._beat = await self._own(self._beat)
        sent = time.monotonic()
        try:
            async with self._whole(c):
                row = await c.fetchrow(HEARTBEAT, self.worker_id)
        except asyncpg.LockNotAvailableError:
            # Freeing a lost worker's instances met a lock; our own life sign must not wait for it.
            async with self._whole(c):
                row = await c.fetchrow(
                    "WITH alive AS (UPDATE duroxide.workers SET heartbeat_at = clock_timestamp() "
                    "WHERE id = $1::text::uuid RETURNING 1) "
                    "SELECT NULL, EXISTS (SELECT FROM alive), extract(epoch FROM clock_timestamp())::float8",
                    self.worker_id)
        assert row is not None
        self._contact(sent, row[2])
        return bool(row[1])

    def handled(self, seq: int) -> None:
        """An inbox entry has been taken in by the instance that holds it; the next poll will say so."""
        self._handled.add(seq)

    async def poll(self, limit: int, *, beat: bool = False, brief: bool = False) -> Poll:
        """Claims up to `limit` due instances and reads the inbox of those held, in one round trip. `beat`: renews the
        lease with it. `brief`: if it claims anything, it does no more than that.

        Nothing of it holds before `settle` has said so.
        """
        handled = list(self._handled)
        asked = [self.worker_id, str(limit), "{" + ",".join(map(str, handled)) + "}", str(beat), str(brief)]
        sent = time.monotonic()
        row: Sequence[str | None] | None
        if self.pooled:
            c = self._poll_pooled = await self._own(self._poll_pooled)
            async with self._whole(c):
                row = await c.fetchrow(self._poll_sql, *asked)
            committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            committed.set_result(None)
        else:
            async with self._in_time():
                session = await self._poll_session()
                sent = time.monotonic()
                [values], committed = await session.ask("poll", asked)
                row = [None if value is None else value.decode() for value in values]
        assert row is not None
        _, alive, claimed, inbox, next_due, overdue, now = row
        assert now is not None
        self._contact(sent, float(now))
        claims = [_claim(*item) for item in json.loads(claimed)] if claimed else []
        due = None if next_due is None else datetime.fromtimestamp(min(float(next_due), 253402300799.0), UTC)
        looked = not (brief and claims)
        return Poll(claims, _inbox(inbox), due, committed, overdue=overdue == "true", alive=alive != "false",
                    looked=looked, handled=handled if looked else [])

    async def settle(self, found: Poll) -> None:
        """Waits until a poll has committed. After an error nobody knows whether it has; its claims do not run."""
        if not found.committed.done():
            async with self._in_time():
                await asyncio.shield(found.committed)
        found.committed.result()
        self._handled.difference_update(found.handled)

    @property
    def _poll_sql(self) -> str:
        return POLL if self.has_step_done else POLL_BEFORE

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """The session of polls is dropped where it is not answered in time, or nobody waits for its answer any more."""
        try:
            async with asyncio.timeout(self._limit):
                yield
        except (TimeoutError, asyncio.CancelledError):
            if self._poll is not None:
                self._poll.abort()
            raise

    async def _poll_session(self) -> ControlConnection:
        """The session of polls, or a new one if it is lost."""
        if self._poll is None or not self._poll.usable:
            parameters = {"application_name": "dfproxy:control", "client_encoding": "UTF8"}
            session = await ControlConnection.connect(
                Target.from_dsn(self.settings.dsn), parameters, timeout=self.settings.connect_timeout,
                max_bytes=MOST_BYTES)
            try:
                await session.prepare("poll", self._poll_sql, [TEXT] * 5)
            except BaseException:
                session.abort()
                raise
            self._poll = session
        return self._poll

    def _contact(self, sent: float, database: float) -> None:
        self.last_contact = time.monotonic()
        self.clock.measure(sent, self.last_contact, database)

    # -- instances ---------------------------------------------------------------------------------------------

    async def load(self, ids: Sequence[str], with_history: Sequence[str]) -> dict[str, LoadedInstance]:
        """The instances among `ids` that this worker holds; checkpoints only of those in `with_history`."""
        async with self._connection() as c:
            rows = await c.fetch(LOAD, list(ids), self.worker_id)
            checkpoints: dict[str, list[Checkpoint]] = {}
            if with_history:
                for row in await c.fetch(HISTORY, list(with_history)):
                    checkpoints.setdefault(row["instance_id"], []).append(_checkpoint(row))
            orphans = [row["instance_id"] for row in rows if not row["present"]]
            if orphans:
                log.warning("queue rows without an instance", instances=orphans)
                await c.execute(
                    "DELETE FROM duroxide.queue q WHERE q.instance_id = ANY ($1) "
                    "AND NOT EXISTS (SELECT FROM duroxide.instances i WHERE i.id = q.instance_id)", orphans)
        return {
            row["instance_id"]: LoadedInstance(
                row["instance_id"], row["token"], row["crashes"], row["label"], row["graph"],
                _variables(json.loads(row["vars"])), row["database"], row["submitted_by"], _inbox(row["inbox"]),
                checkpoints.get(row["instance_id"], []))
            for row in rows if row["present"]
        }

    async def checkpoint(self, instance_id: str, token: str, changes: Changes, *, big: Key | None = None,
                         park: str | None = None) -> None:
        """Records `changes` by themselves. Raises LeaseLostError."""
        arguments = checkpoint_arguments(instance_id, token, changes, big=big, park=park)
        if arguments[3] is None:
            await self.recorder.record(arguments)
            return
        # A large result goes by itself.
        [fault] = await self._write([arguments])
        if fault is not None:
            raise fault

    async def _write(self, items: list[Arguments]) -> list[Exception | None]:
        """Writes checkpoints; what became of each."""
        if len(items) > 1:
            try:
                async with self._connection() as c:
                    lost = await c.fetchval(CHECKPOINTS, "[" + ",".join(map(_to_json, items)) + "]")
                return [LeaseLostError(item[0]) if place in lost else None for place, item in enumerate(items, 1)]
            except asyncpg.PostgresError:
                pass  # One of them met a lock, or a fault: nothing is written, and each goes by itself.
        return [await self._write_one(item) for item in items]

    async def _write_one(self, item: Arguments) -> Exception | None:
        try:
            async with self._connection() as c:
                await c.execute(CHECKPOINT, *item)
        except asyncpg.PostgresError as e:
            return LeaseLostError(item[0]) if e.sqlstate == LEASE_LOST else e
        except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError) as e:
            return e
        return None

    async def refence(self, instance_id: str) -> str:
        """A new token for an instance: from now on no lost session can record for it. Raises LeaseLostError."""
        async with self._connection() as c:
            fresh: str | None = await c.fetchval(REFENCE, instance_id, self.worker_id)
        if fresh is None:
            raise LeaseLostError(instance_id)
        return fresh

    async def release(self, ids: Sequence[str]) -> None:
        """Gives instances back, due at once."""
        async with self._connection() as c:
            await c.execute("SELECT duroxide.release($1::text::uuid, $2)", self.worker_id, list(ids))

    async def owned(self) -> list[str]:
        """Every instance that the database says this worker holds."""
        async with self._connection() as c:
            rows = await c.fetch("SELECT instance_id FROM duroxide.queue WHERE owner = $1::text::uuid", self.worker_id)
        return [row["instance_id"] for row in rows]

    async def give_back(self, instance_id: str, token: str) -> None:
        """Gives an instance back after an internal error, with a pause that grows."""
        async with self._connection() as c:
            await c.execute(GIVE_BACK, instance_id, token)

    async def retain(self, before: datetime, keep: int | None, after: datetime,
                     limit: int) -> tuple[int | None, datetime | None]:
        """Removes a batch of what ended before `before`, or is not among the last `keep`; how many (None: another
        worker is at it), and where the next batch begins (see 0009).
        """
        async with self._connection() as c:
            row = await c.fetchrow(RETAIN, before, keep, after, limit)
        assert row is not None
        return row[1], row[2]

    async def made_progress(self, instance_id: str, token: str) -> None:
        """Forgets earlier crashes: the instance got further this time."""
        async with self._connection() as c:
            await c.execute("UPDATE duroxide.queue SET crashes = 0 WHERE instance_id = $1 AND token = $2::text::uuid",
                            instance_id, token)

    # -- the rest ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        """A control connection in a transaction, for statements of the caller's own."""
        async with self._connection() as c, c.transaction():
            yield c

    async def fetch(self, sql: str, *parameters: object) -> list[Any]:
        """Rows of a query of the engine's own, on a control connection."""
        async with self._connection() as c:
            return list(await c.fetch(sql, *parameters))

    async def execute(self, sql: str, *parameters: object) -> None:
        """A statement of the engine's own, on a control connection."""
        async with self._connection() as c:
            await c.execute(sql, *parameters)

    def known_types(self, oids: Iterable[int]) -> TypeCatalog | None:
        """As `types`, if nothing has to be asked for."""
        catalog = self._fresh_catalog()
        return None if catalog.unknown(oids) else catalog

    def _fresh_catalog(self) -> TypeCatalog:
        if time.monotonic() - self._catalog_at > 60:
            self.catalog, self._catalog_at = TypeCatalog(), time.monotonic()
        return self.catalog

    async def types(self, oids: Iterable[int]) -> TypeCatalog:
        """The catalog of the home database, with `oids` in it. What was loaded is asked for anew once a minute."""
        catalog = self._fresh_catalog()
        if unknown := catalog.unknown(oids):
            async with self._connection() as c:
                text = await c.fetchval(TYPES_SQL, "{" + ",".join(map(str, unknown)) + "}")
            catalog.load(text, unknown)
        return catalog


async def _no_reset(connection: asyncpg.Connection[Any]) -> None:
    """asyncpg would reset a session with a round trip at each release; nothing here changes one."""
    await asyncio.sleep(0)
