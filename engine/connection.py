"""A step's session with PostgreSQL: the wire codec in the client role.

`StepConnection` pipelines: everything up to a step's result leaves in one write, and everything from there to COMMIT,
with the clean-up of the session behind it, in a second one. No statement of a write runs after one that failed: a step
never runs outside the transaction that its BEGIN should have opened. The first write ends with a Sync. The second ends
with a Query that commits and cleans up, and that the server skips too after an error; it then waits for a Sync, and
gets one when the error has come.

Where the workflow's next step is known by then, it goes into the second write (`finish` with `then`): behind the
COMMIT, which then is a message of its own, so that an error before it or in it makes the server skip all up to the Sync
at the end, and behind the Query that cleans up. That Query is answered at once: that a step is committed is known
before the next one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from engine.target import Target
from proxy.wire import backend, build
from proxy.wire.auth import AuthenticationError, ClientAuth
from proxy.wire.backend import ColumnDescription
from proxy.wire.frames import PASS, WHOLE, Frame, FrameSplitter, ProtocolError
from proxy.wire.messages import ANSWER_NO, ANSWER_SSL, Backend, TransactionStatus
from proxy.wire.tls import ALPN, server_end_point
from proxy.wire.tls_options import SslMode, TlsConfigError

__all__ = [
    "ConnectionLostError", "ResultTooLargeError", "ServerError", "StepConnection", "StepRefusedError", "StepResult",
    "Target",
]


class ServerError(Exception):
    """An ErrorResponse. `fields` are keyed by the protocol's one-letter codes."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields
        super().__init__(self.message)

    @property
    def message(self) -> str:
        return self.fields.get("M", "unknown error")

    @property
    def sqlstate(self) -> str:
        return self.fields.get("C", "XX000")

    @property
    def fatal(self) -> bool:
        """Whether the session ended with it."""
        return self.fields.get("V", self.fields.get("S")) in ("FATAL", "PANIC")


class ConnectionLostError(Exception):
    """The session ended without an answer; `cause_fields` are those of the server's last words, if it had any."""

    def __init__(self, message: str, error: ServerError | None = None) -> None:
        super().__init__(message)
        self.error = error


class _TlsError(ConnectionLostError):
    """No TLS with this host; without it there may be a connection."""


class ResultTooLargeError(Exception):
    """A result exceeds a limit; the message names the limit. The connection must be closed."""


class StepRefusedError(Exception):
    """A statement that no step may contain; its transaction must be rolled back."""

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


@dataclass(slots=True)
class StepResult:
    """What a statement returned, in text format; `columns` None: it returns no rows."""

    columns: list[ColumnDescription] | None
    rows: list[list[bytes | None]]
    tag: str


#: Parameter types of duroxide.checkpoint. Given by OID: a cast in the text would look type names up in a search_path
#: that the step may have changed, and pg_temp comes first in it.
CHECKPOINT_TYPES = (25, 2950, 3802, 25, 1016, 1009, 3802, 1184, 3802)
CHECKPOINT = "SELECT duroxide.checkpoint($1, $2, $3, $4, $5, $6, $7, $8, $9)"
#: The same for duroxide.step_done.
STEP_DONE_TYPES = (25, 2950, 25, 23, 25, 3802, 3802, 1184, 16)
STEP_DONE = "CALL duroxide.step_done($1, $2, $3, $4, $5, $6, $7, $8, $9)"

#: Everything that a step can leave behind in a session: DISCARD ALL without DISCARD PLANS, which would make the next
#: checkpoint plan its statements anew.
RESET = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; DEALLOCATE ALL; UNLISTEN *; "
    "SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)


#: The same inside of a transaction, for sessions through a pooler: what comes after COMMIT may reach another server
#: session. Other sessions' prepared statements, which a pooler keeps there, stay.
TIDY = (
    "CLOSE ALL",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET ALL",
    "DO $$ DECLARE n pg_catalog.text; BEGIN FOR n IN SELECT s.name FROM pg_catalog.pg_prepared_statements s "
    "WHERE s.from_sql LOOP EXECUTE pg_catalog.format('DEALLOCATE %I', n); END LOOP; END $$",
    "UNLISTEN *",
    "SELECT pg_catalog.pg_advisory_unlock_all()",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
)
#: Settings of one transaction: names and values as text[].
LOCAL = "SELECT pg_catalog.count(pg_catalog.set_config(s.n, s.v, true)) FROM unnest($1, $2) AS s(n, v)"
#: What a pooler takes in the startup packet; everything else is set in each transaction.
_POOLER_TAKES = frozenset({"application_name", "client_encoding"})


def _statement(sql: str) -> bytes:
    return build.parse("", sql) + build.bind("", "") + build.execute("")


def _array(items: Sequence[str]) -> bytes:
    quoted = (item.replace("\\", "\\\\").replace('"', '\\"') for item in items)
    return ("{" + ",".join(f'"{item}"' for item in quoted) + "}").encode()


def _local(parameters: Mapping[str, str]) -> bytes:
    """Sets them until the end of the transaction."""
    return build.parse("", LOCAL, (1009, 1009)) + build.bind(
        "", "", [_array(list(parameters)), _array(list(parameters.values()))]) + build.execute("")


_BEGIN = _statement("BEGIN")
_COMMIT = _statement("COMMIT")
#: Deferred constraints and triggers fire here, as the submitter and before the checkpoint, where they can still fail
#: the step. Left to COMMIT they would run as the executor (before PostgreSQL 18) and fail what is already recorded.
_CONSTRAINTS = _statement("SET CONSTRAINTS ALL IMMEDIATE")
_LEAVE_ROLE = _statement("SET ROLE NONE")
_SYNC = build.sync()
_RESET = build.query(RESET)
#: One message and one answer. COMMIT is first, and what follows runs only if it succeeds: before that an advisory lock
#: of the step must not be given back, since nobody sees yet what it protected.
_COMMIT_RESET = build.query("COMMIT; " + RESET)
_ROLLBACK = build.query("ROLLBACK")
_TIDY = b"".join(_statement(sql) for sql in TIDY)
_TIDY_FAILED = build.query("; ".join(("ROLLBACK AND CHAIN", *TIDY, "COMMIT")))
_TIDY_IDLE = build.query("; ".join(("BEGIN", *TIDY, "COMMIT")))
_CHECKPOINT = build.parse("", CHECKPOINT, CHECKPOINT_TYPES)
_STEP_DONE = build.parse("", STEP_DONE, STEP_DONE_TYPES)
_RUN = build.bind("", "") + build.describe_portal("") + build.execute("")
_EXECUTE = build.execute("")

_IN_TRANSACTION = int(TransactionStatus.IN_TRANSACTION)
_IDLE = int(TransactionStatus.IDLE)
_COMMAND_COMPLETE = int(Backend.COMMAND_COMPLETE)
_DATA_ROW = int(Backend.DATA_ROW)
_READY = int(Backend.READY_FOR_QUERY)
_ROW_DESCRIPTION = int(Backend.ROW_DESCRIPTION)
_NO_DATA = int(Backend.NO_DATA)
_ERROR = int(Backend.ERROR_RESPONSE)


_NO_COPY = ("COPY from STDIN and to STDOUT need a client; a step has none", "0A000")
#: What a session looks at; everything else (ParseComplete, notices, notifications…) is skipped unread.
_LOOK_AT = (
    Backend.COMMAND_COMPLETE, Backend.DATA_ROW, Backend.READY_FOR_QUERY, Backend.ROW_DESCRIPTION, Backend.NO_DATA,
    Backend.ERROR_RESPONSE, Backend.PARAMETER_STATUS, Backend.EMPTY_QUERY_RESPONSE, Backend.COPY_IN_RESPONSE,
    Backend.COPY_OUT_RESPONSE, Backend.AUTHENTICATION, Backend.BACKEND_KEY_DATA,
)


class _Exchange:
    """What is written up to one ReadyForQuery, and the answers to it."""

    __slots__ = ("ahead", "columns", "committed", "copy", "described", "error", "future", "next", "resync", "rows",
                 "size", "status", "tag", "tags")

    def __init__(self, future: asyncio.Future[_Exchange] | None, *, resync: bool = False, ahead: int = 0) -> None:
        self.future = future
        self.ahead = ahead  # how many statements are in front of the COMMIT, if it has one and a reset behind it
        self.committed = False  # that COMMIT has succeeded
        self.next: _Exchange | None = None  # what was sent behind it, and is skipped unless it commits
        self.resync = resync  # a Sync is needed after CopyFail: COPY FROM swallows the one sent
        self.described = False
        self.columns: list[ColumnDescription] | None = None
        self.rows: list[list[bytes | None]] = []
        self.size = 0
        self.tags: list[str] = []
        self.tag: str | None = None  # of the statement that was described
        self.error: ServerError | None = None
        self.copy = False
        self.status = 0


class StepConnection(asyncio.Protocol):
    """One session. Made by `connect`; not for concurrent use, except `cancel` and `abort`.

    `local`: None where the session is a server session. Behind a pooler, the settings that each transaction begins
    with; nothing is then relied upon, or left behind, outside of a transaction.
    """

    def __init__(self, target: Target, *, max_rows: int, max_bytes: int,
                 local: Mapping[str, str] | None = None) -> None:
        self.target = target
        self.pooled = local is not None
        self._local = _local(local) if local else b""
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.parameters: dict[str, str] = {}
        self.status = 0
        self.used_at = 0.0  #: for the pool: loop time of the last use
        self.closed = False
        self.address: tuple[str, int] = target.hosts[0]
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._modes = bytearray(256)
        for type_ in _LOOK_AT:
            self._modes[type_] = WHOLE
        self._splitter = FrameSplitter(self._modes, max_length=max_bytes + 65536)
        self._role: tuple[str, bytes] = ("", b"")
        self._begun: _Exchange | None = None
        self._exchanges: deque[_Exchange] = deque()
        self._unsent: list[bytes] = []
        self._auth = ClientAuth(target.user, target.password)
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._tls_answer: asyncio.Future[bytes] | None = None
        self._secured = False
        self._pid = 0
        self._key = b""
        self._last_words: ServerError | None = None
        self._reset_fault: ServerError | None = None

    # -- making one --------------------------------------------------------------------------------------------

    @classmethod
    async def connect(cls, target: Target, parameters: Mapping[str, str], *, timeout: float, pooled: bool = False,
                      max_rows: int = 100_000, max_bytes: int = 16 * 2**20) -> StepConnection:
        """Connects and logs in, trying each host in turn. `parameters` go into the startup packet, or (`pooled`) into
        each transaction.

        Raises TimeoutError after `timeout` seconds in all, ServerError if the server refuses, AuthenticationError,
        ConnectionLostError if no host answers.
        """
        local = None
        if pooled:
            local = {name: value for name, value in parameters.items() if name not in _POOLER_TAKES}
            parameters = {name: value for name, value in parameters.items() if name in _POOLER_TAKES}
        fault: Exception = ConnectionLostError("no host given")
        async with asyncio.timeout(timeout):
            for address in target.hosts:
                tls = target.wants_tls(address[0])
                while True:
                    connection = cls(target, max_rows=max_rows, max_bytes=max_bytes, local=local)
                    try:
                        await connection._dial(address, parameters, tls=tls)
                    except _TlsError as e:
                        connection.abort()
                        fault = e
                        if target.tls.mode is SslMode.PREFER:
                            tls = False
                            continue
                        break
                    except (OSError, ConnectionLostError, ServerError) as e:
                        connection.abort()
                        fault = e if not isinstance(e, OSError) else ConnectionLostError(str(e))
                        break
                    except BaseException:
                        connection.abort()
                        raise
                    if connection.parameters.get("in_hot_standby") != "on":
                        return connection
                    # Workflows write: whatever the DSN says, a standby won't do.
                    connection.abort()
                    fault = ConnectionLostError(f"{address[0]}:{address[1]} is a standby")
                    break
        raise fault

    async def _dial(self, address: tuple[str, int], parameters: Mapping[str, str], *, tls: bool) -> None:
        host, port = self.address = address
        loop = self._loop
        if host.startswith("/"):
            await loop.create_unix_connection(lambda: self, f"{host}/.s.PGSQL.{port}")
        else:
            await loop.create_connection(lambda: self, host, port)
            if tls:
                await self._start_tls(host)
        assert self._transport is not None
        self._transport.write(build.startup(
            {"user": self.target.user, "database": self.target.database, **parameters}))
        await self._started

    async def _start_tls(self, host: str) -> None:
        """Raises _TlsError, or returns without TLS where the server has none and none is needed."""
        assert self._transport is not None
        tls = self.target.tls
        try:
            context = self.target.context()
        except TlsConfigError as e:
            raise ConnectionLostError(str(e)) from e
        if tls.negotiation == "postgres":
            self._tls_answer = self._loop.create_future()
            self._transport.write(build.ssl_request())
            answer = await self._tls_answer
            self._tls_answer = None
            if answer == ANSWER_NO and tls.mode is SslMode.PREFER:
                return
            if answer != ANSWER_SSL:
                raise _TlsError(f"the server does not offer TLS, which sslmode={tls.mode.value} asks for")
        try:
            transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)
        except ssl.SSLCertVerificationError as e:
            raise _TlsError(f"the server's certificate is not accepted: {e.verify_message}") from e
        except OSError as e:  # ssl.SSLError is one
            raise _TlsError(f"TLS: {e}") from e
        if transport is None:
            raise _TlsError("the server closed the connection during the TLS handshake")
        self._transport = transport
        secured = transport.get_extra_info("ssl_object")
        if tls.negotiation == "direct" and secured.selected_alpn_protocol() != ALPN:
            raise _TlsError("the server did not agree on PostgreSQL's protocol (ALPN)")
        with contextlib.suppress(ValueError):  # a certificate that OpenSSL can read, and we can't: nothing to bind to
            self._auth.channel_binding = server_end_point(secured.getpeercert(binary_form=True))
        self._secured = True

    # -- a step ------------------------------------------------------------------------------------------------

    async def begin_and_run(self, role_sql: str | None, sql: str) -> StepResult:
        """BEGIN, SET LOCAL ROLE, the step, deferred constraints. `role_sql`: a quoted identifier; None: stay the login.

        The transaction stays open. Raises ServerError (the transaction is then failed: `rollback`),
        ConnectionLostError, ResultTooLargeError, or StepRefusedError for what no step may do.
        """
        if self._reset_fault is not None:
            raise ConnectionLostError(f"the session could not be reset: {self._reset_fault}")
        return await self._ran(self._send(self._step(role_sql, sql)))

    async def run_begun(self) -> StepResult:
        """The result of the step that `finish` has sent as `then`, once. Raises as `begin_and_run` does."""
        assert self._begun is not None
        exchange, self._begun = self._begun, None
        return await self._ran(exchange)

    def _step(self, role_sql: str | None, sql: str) -> list[bytes]:
        role = b""
        if role_sql is not None:
            if self._role[0] != role_sql:
                self._role = (role_sql, _statement(f"SET LOCAL ROLE {role_sql}"))
            role = self._role[1]
        return [_BEGIN, self._local, role, build.parse("", sql), _RUN, _CONSTRAINTS, _SYNC]

    async def _ran(self, exchange: _Exchange) -> StepResult:
        await self._wait(exchange)
        # Only known now: the answer to the reset came before the answers to this.
        if self._reset_fault is not None:
            raise ConnectionLostError(f"the session could not be reset: {self._reset_fault}")
        result = self._result(exchange)
        if exchange.status != _IN_TRANSACTION or result.tag in ("COMMIT", "ROLLBACK", "PREPARE TRANSACTION"):
            raise StepRefusedError(
                "a step can't end its transaction: COMMIT, ROLLBACK and PREPARE TRANSACTION are the engine's", "2D000")
        return result

    async def finish(self, arguments: Sequence[str | None], then: tuple[str | None, str] | None = None, *,
                     brief: bool = False) -> None:
        """SET ROLE NONE, duroxide.checkpoint(`arguments` in their text form), COMMIT, and the reset behind it. `brief`:
        duroxide.step_done instead.

        `then`: what `begin_and_run` would be given next; it begins at once, and `run_begun` gives its result. Not for a
        session through a pooler. Raises ServerError (rolled back, if `rollback` follows; `then` has not begun), or
        ConnectionLostError: then nobody knows.
        """
        values = [None if a is None else a.encode() for a in arguments]
        tidy = _TIDY if self.pooled else b""
        record = _STEP_DONE if brief else _CHECKPOINT
        await self._commit([_LEAVE_ROLE, tidy, record, build.bind("", "", values), _EXECUTE], 2, then)

    async def commit(self) -> None:
        """COMMIT without a checkpoint, for steps in another database. Raises as `finish` does."""
        await self._commit([_LEAVE_ROLE, _TIDY if self.pooled else b""], 1)

    async def _commit(self, parts: list[bytes], statements: int, then: tuple[str | None, str] | None = None) -> None:
        """COMMIT, and the reset behind it, after these parts; so many statements, where the session is not pooled."""
        if self.pooled:
            exchange = await self._exchange([*parts, _COMMIT, _SYNC])
            committed = exchange.error is None and exchange.tags[-1:] == ["COMMIT"]
        else:
            if then is None:
                exchange = self._send([*parts, _COMMIT_RESET], ahead=statements)
            else:
                following = _Exchange(self._loop.create_future())
                exchange = self._send([*parts, _COMMIT, _RESET, *self._step(*then)], ahead=statements, then=following)
                self._begun = following
            await self._wait(exchange)
            committed = exchange.committed
            if committed and (exchange.error is not None or exchange.status != _IDLE):
                self._reset_fault = exchange.error or ServerError({"M": "the session is not idle"})
        if not committed:
            raise exchange.error or ServerError(
                {"C": "25P02", "M": "the transaction was rolled back instead of committed"})

    async def run_outside(self, role_sql: str | None, sql: str) -> StepResult:
        """Runs a statement outside of a transaction block (at least once). Raises as `begin_and_run` does.

        Behind a pooler it must be one that leaves nothing in the session, and the login's own.
        """
        if role_sql is not None:
            # By itself, and checked: the statement must not run as the login if this fails.
            await self.execute(f"SET ROLE {role_sql}")
        exchange = await self._exchange([build.parse("", sql), _RUN, _SYNC], resync=True)
        self._send_reset()
        return self._result(exchange)

    async def execute(self, sql: str) -> None:
        """A simple Query whose rows nobody wants. Raises ServerError, ConnectionLostError."""
        exchange = await self._exchange([build.query(sql)])
        if exchange.error is not None:
            raise exchange.error

    async def fetch(self, sql: str, parameters: Sequence[str | None]) -> list[list[bytes | None]]:
        """Rows of a query of the engine's own, in text format. Raises ServerError, ConnectionLostError."""
        values = [None if p is None else p.encode() for p in parameters]
        exchange = await self._exchange([build.parse("", sql), build.bind("", "", values), build.describe_portal(""),
                                         build.execute(""), _SYNC])
        return self._result(exchange).rows

    async def rollback(self) -> None:
        """ROLLBACK, and the reset behind it. Raises ServerError, ConnectionLostError."""
        if self.pooled:
            # In one transaction with the clean-up: a rollback leaves locks and prepared statements behind.
            await self._tidy()
            return
        exchange = self._send([_ROLLBACK])
        self._send_reset()
        await self._wait(exchange)
        # The refusal of an earlier reset in the failed transaction is made good by this one, whose answer is
        # still to come.
        self._reset_fault = None
        if exchange.error is not None:
            raise exchange.error

    async def _tidy(self) -> None:
        exchange = await self._exchange([_TIDY_IDLE if self.status == _IDLE else _TIDY_FAILED])
        if exchange.error is not None:
            raise exchange.error

    async def cancel(self, timeout: float = 2.0) -> None:
        """Asks the server to cancel what runs, and waits until it ended or `timeout` is over; never raises for I/O.

        The session can't be used afterwards (a cancel request may hit late): `abort` it.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._request_cancel()
                if not self.closed:
                    # Answered once the statement has ended, however it did.
                    await self._wait(self._send([_SYNC]))
        except (OSError, TimeoutError, ConnectionLostError):
            return

    async def _request_cancel(self) -> None:
        if self.closed or not self._pid:
            return
        host, port = self.address
        if host.startswith("/"):
            reader, writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            reader, writer = await asyncio.open_connection(host, port)
        try:
            if self._secured:
                await self._secure_cancel(reader, writer, host)
            writer.write(build.cancel_request(self._pid, self._key))
            await writer.drain()
            # The server closes once it has passed the signal on.
            await reader.read(1)
        finally:
            writer.close()

    async def _secure_cancel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        """TLS for a cancel request, as the session itself has it. Raises OSError where that can't be had."""
        if self.target.tls.negotiation == "postgres":
            writer.write(build.ssl_request())
            if await reader.read(1) != ANSWER_SSL:
                raise ConnectionRefusedError("no TLS for a cancel request")
        await writer.start_tls(self.target.context(), server_hostname=host)

    def close(self) -> None:
        """Terminates the session politely."""
        if self._transport is not None and not self.closed:
            self._flush()
            self._transport.write(build.terminate())
            self._transport.close()
        self.closed = True

    def abort(self) -> None:
        """Drops the connection; the server rolls back."""
        if self._transport is not None:
            self._transport.abort()
        self.closed = True

    @property
    def usable(self) -> bool:
        """Whether a step may start on it."""
        return not self.closed and self._reset_fault is None and self._transport is not None \
            and not self._transport.is_closing()

    # -- inside ------------------------------------------------------------------------------------------------

    def _result(self, exchange: _Exchange) -> StepResult:
        if exchange.copy:
            raise StepRefusedError(*_NO_COPY)
        if exchange.error is not None:
            raise exchange.error
        if self.parameters.get("client_encoding", "UTF8") != "UTF8":
            raise StepRefusedError("a step can't change client_encoding", "0A000")
        return StepResult(exchange.columns, exchange.rows, exchange.tag or "")

    def _send(self, parts: list[bytes], *, resync: bool = False, ahead: int = 0,
              then: _Exchange | None = None) -> _Exchange:
        if self.closed or self._transport is None:
            raise self._lost()
        exchange = _Exchange(self._loop.create_future(), resync=resync, ahead=ahead)
        self._enqueue(exchange)
        if then is not None:
            exchange.next = then
            self._enqueue(then)
        self._write(parts)
        return exchange

    def _write(self, parts: list[bytes]) -> None:
        """Writes, after everything else that can be done at this moment.

        Whoever is written to is woken, and may take the processor at once: with many sessions the worker would wait for
        it after every write, while all the others wait for the worker.
        """
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += parts

    def _flush(self) -> None:
        data = b"".join(self._unsent)
        self._unsent.clear()
        if data and not self.closed and self._transport is not None:
            self._transport.write(data)

    def _send_reset(self) -> None:
        if self.pooled or self.closed or self._transport is None:
            return
        self._enqueue(_Exchange(None))
        self._write([_RESET])

    def _enqueue(self, exchange: _Exchange) -> None:
        self._exchanges.append(exchange)
        if len(self._exchanges) == 1:
            self._attend(exchange)

    def _attend(self, exchange: _Exchange) -> None:
        """Nobody reads what a reset's statements answer, unless it is an error."""
        mode = PASS if exchange.future is None or exchange.committed else WHOLE
        self._modes[_COMMAND_COMPLETE] = self._modes[_DATA_ROW] = self._modes[_ROW_DESCRIPTION] = mode

    async def _wait(self, exchange: _Exchange) -> None:
        assert exchange.future is not None
        await exchange.future

    async def _exchange(self, parts: list[bytes], *, resync: bool = False) -> _Exchange:
        exchange = self._send(parts, resync=resync)
        await self._wait(exchange)
        return exchange

    def _lost(self, reason: str = "connection lost") -> ConnectionLostError:
        error = self._last_words
        return ConnectionLostError(error.message if error is not None else reason, error)

    # -- asyncio.Protocol --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        lost = self._lost(str(exc) if exc else "the server closed the connection")
        if not self._started.done():
            self._started.set_exception(lost)
            self._started.exception()  # the dialler may have given up already
        if self._tls_answer is not None and not self._tls_answer.done():
            self._tls_answer.set_exception(lost)
        while self._exchanges:
            exchange = self._exchanges.popleft()
            future = exchange.future
            if future is not None and not future.done():
                # Servers end a session that sends statements where they expect COPY's data.
                future.set_exception(StepRefusedError(*_NO_COPY) if exchange.copy else lost)
                future.exception()

    def data_received(self, data: bytes) -> None:
        if self._tls_answer is not None and not self._tls_answer.done():
            # Anything behind the one byte was not protected by the handshake (CVE-2021-23222).
            self._tls_answer.set_result(bytes(data))
            return
        try:
            for item in self._splitter.feed(data):
                if type(item) is not Frame:
                    continue
                if self._started.done():
                    self._receive(item[0], item[1])
                else:
                    self._receive_startup(item[0], item[1])
        except ProtocolError as e:
            self._fail(e)
        except AuthenticationError as e:
            if not self._started.done():
                self._started.set_exception(e)
            self.abort()

    def _fail(self, fault: ProtocolError) -> None:
        """The stream can't be read on: a row beyond every limit, or not PostgreSQL at all."""
        exchange = self._exchanges[0] if self._exchanges else None
        if exchange is not None and exchange.columns is not None and exchange.future is not None \
                and not exchange.future.done():
            exchange.future.set_exception(self._too_large(exchange, bytes_=True))
        elif not self._started.done():
            self._started.set_exception(ConnectionLostError(str(fault)))
        self.abort()

    def _receive_startup(self, type_: int, payload: bytes) -> None:
        match type_:
            case Backend.AUTHENTICATION:
                answer = self._auth.respond(payload)
                if answer is not None and self._transport is not None:
                    self._flush()
                    self._transport.write(answer)
            case Backend.PARAMETER_STATUS:
                name, value = backend.parameter_status(payload)
                self.parameters[name] = value
            case Backend.BACKEND_KEY_DATA:
                self._pid, self._key = backend.backend_key_data(payload)
            case Backend.ERROR_RESPONSE:
                self._started.set_exception(ServerError(backend.error_fields(payload)))
                self.abort()
            case Backend.READY_FOR_QUERY:
                self._started.set_result(None)
            case _:  # NoticeResponse, NegotiateProtocolVersion
                pass

    def _receive(self, type_: int, payload: bytes) -> None:
        exchange = self._exchanges[0] if self._exchanges else None
        if type_ == _ERROR:
            error = ServerError(backend.error_fields(payload))
            if error.fatal:
                self._last_words = error
            elif exchange is not None and exchange.error is None:
                exchange.error = error
                if len(exchange.tags) < exchange.ahead and exchange.next is None and self._transport is not None:
                    self._flush()
                    self._transport.write(_SYNC)
            return
        if type_ == Backend.PARAMETER_STATUS:
            name, value = backend.parameter_status(payload)
            self.parameters[name] = value
            return
        if exchange is None:
            return  # notices and notifications between statements
        if type_ == _COMMAND_COMPLETE:
            tag = backend.command_tag(payload)
            exchange.tags.append(tag)
            if exchange.ahead and tag == "COMMIT" and len(exchange.tags) == exchange.ahead + 1:
                exchange.committed = True
                self._attend(exchange)
            if exchange.described and exchange.tag is None:
                exchange.tag = tag
        elif type_ == _DATA_ROW:
            if exchange.columns is not None and exchange.tag is None:
                self._receive_row(exchange, payload)
        elif type_ == _READY:
            self._exchanges.popleft()
            if exchange.next is not None and exchange.error is not None and not exchange.committed:
                self._exchanges.popleft()  # skipped, up to the Sync that this answers
            if self._exchanges:
                self._attend(self._exchanges[0])
            self.status = exchange.status = backend.transaction_status(payload)
            if exchange.future is None:
                if exchange.error is not None or exchange.status != _IDLE:
                    self._reset_fault = exchange.error or ServerError({"M": "the session is not idle"})
            elif not exchange.future.done():
                exchange.future.set_result(exchange)
        elif type_ == _ROW_DESCRIPTION:
            if exchange.tag is None and not exchange.described:
                exchange.described = True
                exchange.columns = backend.row_description(payload)
        elif type_ == _NO_DATA:
            exchange.described = True
        elif type_ == Backend.EMPTY_QUERY_RESPONSE:
            exchange.tags.append("")
            if exchange.described and exchange.tag is None:
                exchange.tag = ""
        elif type_ == Backend.COPY_OUT_RESPONSE:
            exchange.copy = True
        elif type_ == Backend.COPY_IN_RESPONSE:
            exchange.copy = True
            assert self._transport is not None
            self._flush()
            self._transport.write(build.copy_fail("no client") + (_SYNC if exchange.resync else b""))

    def _receive_row(self, exchange: _Exchange, payload: bytes) -> None:
        if exchange.future is not None and exchange.future.done():
            return  # given up: too large, or the waiter was cancelled
        if not exchange.described:
            return  # of a statement of the engine's own
        exchange.size += len(payload)
        if exchange.size > self.max_bytes or len(exchange.rows) >= self.max_rows:
            fault = self._too_large(exchange, bytes_=exchange.size > self.max_bytes)
            exchange.rows = []
            if exchange.future is not None:
                exchange.future.set_exception(fault)
            return
        exchange.rows.append(backend.data_row(payload))

    def _too_large(self, exchange: _Exchange, *, bytes_: bool) -> ResultTooLargeError:
        if bytes_:
            return ResultTooLargeError(f"the result is larger than max_result_bytes ({self.max_bytes})")
        return ResultTooLargeError(f"the result has more rows than max_result_rows ({self.max_rows})")
