"""`df.start(transaction_mode => 'new')`: takes the request off the wire and starts the workflow (engine/schema/0008).

A session gives every notice to its `Requests`, which recognises the pieces of a request and puts them together. The
`Launcher` of the session's database verifies the seal (nobody can ask for another role), starts the workflow on a
connection of the submitter, and lets the waiting backend know, all by advisory locks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import asyncpg
import structlog
from pydantic import BaseModel, ValidationError

from engine.errors import ConnectionLostError, ServerError
from engine.identity import Identities, IdentityError
from engine.runner import SessionPool
from engine.settings import EngineSettings
from engine.store import Store, is_infrastructure
from proxy.wire.auth import AuthenticationError
from proxy.wire.backend import error_fields

log = structlog.get_logger("dfproxy.launch")

#: SQLSTATE of a request. With severity INFO, which no client_min_messages holds back.
REQUEST: Final = "DF002"
_REQUEST_FIELD: Final = b"CDF002\0"
_MARKER: Final = re.compile(r"dfproxy:start=([0-9]{1,6})/([0-9]{1,6})")
#: Characters of a whole request, in base64. Beyond that it is no request of ours.
_MAX_REQUEST: Final = 128 * 1024 * 1024
#: Requests that may wait; each waiting backend has one, and there are fewer slots than this.
_MAX_WAITING: Final = 1000
#: Seconds after which a request is not acted on any more, whatever its sender says.
_TOO_OLD: Final = 120.0
#: Of an error, what fits into the statement that carries it: pg_stat_activity shows 1024 bytes.
_MAX_MESSAGE, _MAX_HINT, _MAX_ERROR = 300, 150, 620
#: Longest wait of one statement, and how long a backend may take to hear the answer. Milliseconds.
_STATEMENT_TIMEOUT, _HEARING_TIMEOUT = 30_000, 10_000


class Request(BaseModel):
    """What duroxide.try_launch asks for. `role` is the OID of who called df.start, `key` the lock that it holds."""

    id: str
    fut: str | None
    label: str | None
    database: str | None
    role: int
    key: int
    at: float


@dataclass(frozen=True, slots=True)
class Sealed:
    """A request as it came: its bytes, and the seal that has to fit."""

    raw: bytes
    seal: str


class Requests:
    """Finds requests among the notices of one session."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._size = 0

    def take(self, payload: bytes) -> tuple[bool, Sealed | None]:
        """Whether a NoticeResponse is (part of) a request, which the client does not get; the request if complete."""
        if _REQUEST_FIELD not in payload:
            return False, None
        fields = error_fields(payload)
        place = _MARKER.fullmatch(fields.get("n", ""))
        if fields.get("V") != "INFO" or fields.get("C") != REQUEST or place is None:
            return False, None
        number, count, piece = int(place[1]), int(place[2]), fields.get("d", "")
        if number == 1:
            self._pieces, self._size = [], 0
        self._size += len(piece)
        if number != len(self._pieces) + 1 or number > count or self._size > _MAX_REQUEST:
            self._pieces, self._size = [], 0
            return False, None
        self._pieces.append(piece)
        if number < count:
            return True, None
        text, self._pieces, self._size = "".join(self._pieces), [], 0
        try:
            return True, Sealed(base64.b64decode(text, validate=True), fields.get("t", ""))
        except (binascii.Error, ValueError):
            return False, None


class _RefusedError(Exception):
    """A start that PostgreSQL, or the way there, refused; as JSON for the backend that waits."""

    def __init__(self, message: str, sqlstate: str, detail: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.detail = detail
        self.hint = hint

    def encoded(self) -> str:
        """Base64 of the JSON, short enough to be read from pg_stat_activity."""
        error = {"message": str(self)[:_MAX_MESSAGE], "sqlstate": self.sqlstate, "hint": (self.hint or "")[:_MAX_HINT],
                 "detail": (self.detail or "")[:_MAX_HINT]}
        for member in ("detail", "hint", "message"):
            raw = json.dumps({k: v for k, v in error.items() if v}, ensure_ascii=False).encode()
            if len(raw) <= _MAX_ERROR:
                break
            error[member] = error[member][:50] if member == "message" else ""
        return base64.b64encode(json.dumps({k: v for k, v in error.items() if v}, ensure_ascii=False).encode()).decode()


class Launcher:
    """Starts workflows of one database in transactions of their own; `run` it in a task.

    At most `limit` at a time. `on_start` is called after each. Connections are made when they are first needed.
    """

    def __init__(self, settings: EngineSettings, limit: int, on_start: Callable[[], None]) -> None:
        # Each start may need two at a time; and two more, which the store sets aside for a worker.
        self._settings = replace(settings, max_control_connections=2 * limit + 2, max_user_connections=limit)
        self._limit = limit
        self._on_start = on_start
        self._waiting: asyncio.Queue[Sealed] = asyncio.Queue(_MAX_WAITING)
        self._store: Store | None = None
        self._opening = asyncio.Lock()
        self._secret = b""
        self._identities: Identities | None = None
        self._pool: SessionPool | None = None

    def request(self, sealed: Sealed) -> None:
        """Takes a request on; what comes of it only its sender hears. To be called in the loop that `run` runs in."""
        try:
            self._waiting.put_nowait(sealed)
        except asyncio.QueueFull:
            log.warning("too many starts in transactions of their own are waiting; one is dropped")

    async def run(self) -> None:
        """Serves requests until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._limit):
                    group.create_task(self._serve())
                while True:
                    await asyncio.sleep(self._settings.idle_connection)
                    if self._pool is not None:
                        self._pool.close_idle(self._settings.idle_connection)
        finally:
            if self._pool is not None:
                self._pool.close_idle(-1)
            if self._store is not None:
                await self._store.close()

    async def _serve(self) -> None:
        while True:
            sealed = await self._waiting.get()
            try:
                await self._handle(sealed)
            except Exception as e:
                if is_infrastructure(e):
                    log.warning("a start in a transaction of its own failed", reason=str(e) or type(e).__name__)
                else:
                    log.exception("a start in a transaction of its own met a bug")

    async def _open(self) -> tuple[Store, Identities, SessionPool]:
        async with self._opening:
            if self._store is None or self._identities is None or self._pool is None:
                store = Store(self._settings, statement_cache_size=0)
                try:
                    await store.open()
                    self._secret = (await store.fetch("SELECT value FROM duroxide.secret"))[0]["value"].encode()
                except BaseException:
                    await store.close()
                    raise
                self._identities = Identities(self._settings, store)
                self._pool = SessionPool(self._settings, self._identities)
                self._store = store
            return self._store, self._identities, self._pool

    async def _handle(self, sealed: Sealed) -> None:
        store, identities, pool = await self._open()
        try:
            request = Request.model_validate_json(sealed.raw)
        except ValidationError:
            log.warning("a request that dfproxy's functions did not make is ignored")
            return
        if not hmac.compare_digest(seal(self._secret, request.role, sealed.raw).encode(), sealed.seal.encode()):
            log.warning("a request with a wrong seal is ignored", role=request.role)
            return
        async with store.transaction() as c:
            # In this order: a caller that gives up takes key + 1 before it lets the key go.
            mine = await c.fetchval("SELECT pg_catalog.pg_try_advisory_xact_lock($1::bigint + 1)", request.key)
            if not mine or not await c.fetchval(
                    "SELECT duroxide.launch_awaited($1) AND extract(epoch FROM clock_timestamp()) - $2 < $3",
                    request.key, request.at, _TOO_OLD):
                log.warning("a start in a transaction of its own is not waited for any more", instance=request.id)
                return
            refusal: _RefusedError | None = None
            try:
                await self._start(request, identities, pool)
            except _RefusedError as e:
                refusal = e
            await self._answer(c, request, refusal)

    async def _start(self, request: Request, identities: Identities, pool: SessionPool) -> None:
        """Calls duroxide.submit as the submitter, and commits. Raises _RefusedError."""
        try:
            identity = await identities.resolve(request.role, request.id)
            await pool.take_slot()
            try:
                lease = await pool.lease(identity, None)
            except BaseException:
                pool.free_slot()
                raise
        except IdentityError as e:
            raise _RefusedError(str(e), e.sqlstate, None, e.hint) from e
        except (ServerError, AuthenticationError, ConnectionLostError, OSError) as e:
            raise _unreachable(e, identities, request) from e
        connection = lease.connection
        try:
            await connection.begin_and_run(
                identity.role_sql, f"SELECT pg_catalog.set_config('lock_timeout', '{_STATEMENT_TIMEOUT}', true), "
                                   f"pg_catalog.set_config('statement_timeout', '{_STATEMENT_TIMEOUT}', true)")
            await connection.fetch("SELECT duroxide.submit($1, $2, $3, $4)",
                                   [request.id, request.fut, request.label, request.database])
            await connection.commit()
        except ServerError as e:
            await lease.rollback()
            raise _RefusedError(e.message, e.sqlstate, e.fields.get("D"), e.fields.get("H")) from e
        except ConnectionLostError as e:
            lease.drop()
            raise _RefusedError(str(e), "08006") from e
        except BaseException:
            lease.drop()
            raise
        lease.release()
        self._on_start()

    async def _answer(self, c: asyncpg.Connection[Any], request: Request, refusal: _RefusedError | None) -> None:
        """Waits for the key, which is the answer; returns once the backend has heard it, or is gone."""
        lock = "pg_advisory_xact_lock_shared" if refusal is None else "pg_advisory_xact_lock"
        text = "" if refusal is None else refusal.encoded()
        await c.execute(f"SET LOCAL lock_timeout = {_HEARING_TIMEOUT}")
        try:
            # A number and base64: nothing in it needs quoting. As text, since its text is the message.
            await c.execute(f"SELECT pg_catalog.{lock}({request.key}), '{text}'")
        except asyncpg.LockNotAvailableError:
            log.warning("nobody heard that a workflow was started, or not", instance=request.id,
                        started=refusal is None)
            raise


def seal(secret: bytes, role: int, request: bytes) -> str:
    """What view duroxide.launch_seal makes of a request, for the role with that OID."""
    digest = hashlib.sha256(request).hexdigest()
    inner = hashlib.sha256(secret + f"|launch|{role}|{digest}".encode()).digest()
    return hashlib.sha256(secret + inner).hexdigest()


def _unreachable(error: Exception, identities: Identities, request: Request) -> _RefusedError:
    """SURFACE 5.2's words for a connection that could not be made."""
    identities.forget(request.role)
    if isinstance(error, TimeoutError):
        return _RefusedError("no connection was to be had in time", "08001")
    if isinstance(error, ServerError):
        return _RefusedError(f"Failed to connect. Error: {error.message}", error.sqlstate, error.fields.get("D"),
                             error.fields.get("H"))
    return _RefusedError(f"Failed to connect. Error: {error}", "08001")
