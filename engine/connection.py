"""A step's session with PostgreSQL: the wire codec in the client role.

`StepConnection` pipelines: everything up to a step's result leaves in one write, and everything from there to COMMIT,
with the clean-up of the session behind it, in a second one. No statement of a write runs after one that failed: a step
never runs outside the transaction that its BEGIN should have opened. The first write ends with a Sync. The second ends
with a Query that commits and cleans up, and that the server skips too after an error; it then waits for a Sync, and
gets one when the error has come.

Where the workflow's next step is known by then, it goes into the second write (`finish` with `then`): behind the
COMMIT, which then is a message of its own, so that an error before it or in it makes the server skip all up to the Sync
at the end, and behind the Query that cleans up. That Query is answered at once: that a step is committed is known
before the next one ends. It may be the first step of another workflow, which has waited for a session (`foreign`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Self, cast

from msgspec import Struct

from engine.errors import ConnectionLostError, NotBegunError, ServerError, StepRefusedError
from engine.replies import NO_COPY, Exchange, Replies
from engine.target import Target
from proxy.wire import backend, build
from proxy.wire.auth import AuthenticationError, ClientAuth
from proxy.wire.backend import ColumnDescription
from proxy.wire.frames import ProtocolError
from proxy.wire.messages import ANSWER_NO, ANSWER_SSL, Backend, TransactionStatus
from proxy.wire.tls import ALPN, server_end_point
from proxy.wire.tls_options import SslMode, TlsConfigError

__all__ = ["RESET", "STEP_DONE", "STEP_DONE_TYPES", "StepConnection", "StepResult"]


class _TlsError(ConnectionLostError):
    """No TLS with this host; without it there may be a connection."""


class StepResult(Struct):
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

#: Seconds between two requests to cancel the same statement.
AGAIN = 0.2

_IN_TRANSACTION = int(TransactionStatus.IN_TRANSACTION)
_IDLE = int(TransactionStatus.IDLE)


class StepConnection(asyncio.Protocol):
    """One session. Made by `connect`; not for concurrent use, except `cancel` and `abort`.

    `local`: None where the session is a server session. Behind a pooler, the settings that each transaction begins
    with; nothing is then relied upon, or left behind, outside of a transaction.
    """

    def __init__(self, target: Target, *, max_rows: int, max_bytes: int,
                 local: Mapping[str, str] | None = None, on_answer: Callable[[], None] = lambda: None) -> None:
        self.target = target
        self.pooled = local is not None
        self._local = _local(local) if local else b""
        self._on_answer = on_answer
        self.used_at = 0.0  #: for the pool: loop time of the last use
        self.closed = False
        self.address: tuple[str, int] = target.hosts[0]
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._replies = Replies(max_rows=max_rows, max_bytes=max_bytes)
        self._role: tuple[str, bytes] = ("", b"")
        self._begun: Exchange | None = None
        self._predecessor: Exchange | None = None  # another workflow's commit, behind which a step was sent
        self._unsent: list[bytes] = []
        self._auth = ClientAuth(target.user, target.password)
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._tls_answer: asyncio.Future[bytes] | None = None
        self._secured = False
        self._pid = 0
        self._key = b""

    # -- making one --------------------------------------------------------------------------------------------

    @classmethod
    async def connect(cls, target: Target, parameters: Mapping[str, str], *, timeout: float, pooled: bool = False,
                      max_rows: int = 100_000, max_bytes: int = 16 * 2**20,
                      on_answer: Callable[[], None] = lambda: None) -> Self:
        """Connects and logs in, trying each host in turn. `parameters` go into the startup packet, or (`pooled`) into
        each transaction. `on_answer` is called whenever the server has answered something.

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
                    connection = cls(target, max_rows=max_rows, max_bytes=max_bytes, local=local,
                                     on_answer=on_answer)
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
                    if connection._replies.parameters.get("in_hot_standby") != "on":
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
        if self._replies.reset_fault is not None:
            raise ConnectionLostError(f"the session could not be reset: {self._replies.reset_fault}")
        return await self._ran(self._send(self._step(role_sql, sql)))

    async def run_begun(self) -> StepResult:
        """The result of the step that `finish` has sent as `then`, once. Raises as `begin_and_run` does, and
        NotBegunError.
        """
        exchange, self._begun = self._begun, None
        if exchange is None:
            raise NotBegunError
        return await self._ran(exchange)

    def begun_result(self) -> StepResult | None:
        """What `run_begun` would give, if that is here already and no error."""
        exchange = self._begun
        if exchange is None or exchange.future is None or not exchange.future.done() \
                or exchange.future.exception() is not None:
            return None
        try:
            return self._checked(exchange)
        except (ServerError, StepRefusedError, ConnectionLostError):
            return None

    def _step(self, role_sql: str | None, sql: str) -> list[bytes]:
        role = b""
        if role_sql is not None:
            if self._role[0] != role_sql:
                self._role = (role_sql, _statement(f"SET LOCAL ROLE {role_sql}"))
            role = self._role[1]
        return [_BEGIN, self._local, role, build.parse("", sql), _RUN, _CONSTRAINTS, _SYNC]

    async def _ran(self, exchange: Exchange) -> StepResult:
        await self._wait(exchange)
        return self._checked(exchange)

    def _checked(self, exchange: Exchange) -> StepResult:
        # Only known now: the answer to the reset came before the answers to this.
        if self._replies.reset_fault is not None:
            raise ConnectionLostError(f"the session could not be reset: {self._replies.reset_fault}")
        result = self._result(exchange)
        if exchange.status != _IN_TRANSACTION or result.tag in ("COMMIT", "ROLLBACK", "PREPARE TRANSACTION"):
            raise StepRefusedError(
                "a step can't end its transaction: COMMIT, ROLLBACK and PREPARE TRANSACTION are the engine's", "2D000")
        return result

    async def finish(self, arguments: Sequence[str | None], then: tuple[str | None, str] | None = None, *,
                     brief: bool = False, foreign: bool = False) -> None:
        """SET ROLE NONE, duroxide.checkpoint(`arguments` in their text form), COMMIT, and the reset behind it. `brief`:
        duroxide.step_done instead.

        `then`: what `begin_and_run` would be given next; it begins at once, and `run_begun` gives its result. Not for a
        session through a pooler. `foreign`: that is another workflow's. Raises ServerError (rolled back, if `rollback`
        follows; `then` has not begun), or ConnectionLostError: then nobody knows.
        """
        values = [None if a is None else a.encode() for a in arguments]
        tidy = _TIDY if self.pooled else b""
        record = _STEP_DONE if brief else _CHECKPOINT
        await self._commit([_LEAVE_ROLE, tidy, record, build.bind("", "", values), _EXECUTE], 2, then,
                           foreign=foreign)

    async def commit(self) -> None:
        """COMMIT without a checkpoint, for steps in another database. Raises as `finish` does."""
        await self._commit([_LEAVE_ROLE, _TIDY if self.pooled else b""], 1)

    async def _commit(self, parts: list[bytes], statements: int, then: tuple[str | None, str] | None = None, *,
                      foreign: bool = False) -> None:
        """COMMIT, and the reset behind it, after these parts; so many statements, where the session is not pooled."""
        self._begun = self._predecessor = None
        if self.pooled:
            exchange = await self._exchange([*parts, _COMMIT, _SYNC])
            committed = exchange.error is None and exchange.tags[-1:] == ["COMMIT"]
        else:
            if then is None:
                exchange = self._send([*parts, _COMMIT_RESET], ahead=statements)
            else:
                following = Exchange(self._loop.create_future())
                exchange = self._send([*parts, _COMMIT, _RESET, *self._step(*then)], ahead=statements, then=following)
                self._begun = following
                if foreign:
                    self._predecessor = exchange
            await self._wait(exchange)
            committed = exchange.committed
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
        self._replies.reset_fault = None
        if exchange.error is not None:
            raise exchange.error

    async def _tidy(self) -> None:
        exchange = await self._exchange([_TIDY_IDLE if self._replies.status == _IDLE else _TIDY_FAILED])
        if exchange.error is not None:
            raise exchange.error

    async def cancel(self, timeout: float = 2.0) -> None:
        """Asks the server to cancel what runs, and waits until it ended or `timeout` is over; never raises for I/O.

        It asks again and again: a request that arrives while the server reads the next message of a pipeline is lost.
        The session can't be used afterwards (a cancel request may hit late): `abort` it.
        """
        try:
            async with asyncio.timeout(timeout):
                if self.is_behind and self._predecessor is not None and self._predecessor.future is not None:
                    # The request would hit the other workflow's commit.
                    await asyncio.wait([self._predecessor.future])
                # Answered once the statement has ended, however it did.
                ended = self._send([_SYNC]).future
                assert ended is not None
                while not ended.done():
                    await self._request_cancel()
                    await asyncio.wait([ended], timeout=AGAIN)
                await ended
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

    @property
    def is_behind(self) -> bool:
        """Whether the step that was sent as `foreign` still waits for the commit before it."""
        return self._predecessor is not None and self._predecessor.status == 0 and not self.closed

    def desert(self) -> None:
        """Lets the step that `is_behind` go elsewhere: `run_begun` raises NotBegunError. What was sent stays sent, so
        that the session can't be used any more, once the commit has been answered.
        """
        if self._predecessor is not None and self._predecessor.next is not None:
            self._predecessor.next.fail(NotBegunError())
            self._replies.reset_fault = ServerError({"M": "a step that was sent here is not wanted any more"})

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
        return not self.closed and self._replies.reset_fault is None and self._transport is not None \
            and not self._transport.is_closing()

    # -- inside ------------------------------------------------------------------------------------------------

    def _result(self, exchange: Exchange) -> StepResult:
        if exchange.copy:
            raise StepRefusedError(*NO_COPY)
        if exchange.error is not None:
            raise exchange.error
        if self._replies.parameters.get("client_encoding", "UTF8") != "UTF8":
            raise StepRefusedError("a step can't change client_encoding", "0A000")
        return StepResult(exchange.columns, exchange.rows, exchange.tag or "")

    def _send(self, parts: list[bytes], *, resync: bool = False, ahead: int = 0,
              then: Exchange | None = None) -> Exchange:
        if self.closed or self._transport is None:
            raise self._lost()
        exchange = Exchange(self._loop.create_future(), resync=resync, ahead=ahead)
        self._replies.expect(exchange)
        if then is not None:
            exchange.next = then
            self._replies.expect(then)
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

    def _write_now(self, data: bytes) -> None:
        """Writes without delay, behind what is to be written."""
        self._flush()
        if not self.closed and self._transport is not None:
            self._transport.write(data)

    def _send_reset(self) -> None:
        if self.pooled or self.closed or self._transport is None:
            return
        self._replies.expect(Exchange(None))
        self._write([_RESET])

    async def _wait(self, exchange: Exchange) -> None:
        assert exchange.future is not None
        await exchange.future

    async def _exchange(self, parts: list[bytes], *, resync: bool = False) -> Exchange:
        exchange = self._send(parts, resync=resync)
        await self._wait(exchange)
        return exchange

    def _lost(self, reason: str = "connection lost") -> ConnectionLostError:
        error = self._replies.last_words
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
        self._replies.lost(lost)

    def data_received(self, data: bytes) -> None:
        if self._tls_answer is not None and not self._tls_answer.done():
            # Anything behind the one byte was not protected by the handshake (CVE-2021-23222).
            self._tls_answer.set_result(bytes(data))
            return
        try:
            if self._started.done():
                self._on_answer()
                urgent = self._replies.feed(data)
                if urgent:
                    self._write_now(urgent)
                return
            for type_, payload in self._replies.frames(data):
                self._receive_startup(type_, payload)
        except ProtocolError as e:
            self._fail(e)
        except AuthenticationError as e:
            if not self._started.done():
                self._started.set_exception(e)
            self.abort()

    def _fail(self, fault: ProtocolError) -> None:
        """The stream can't be read on: a row beyond every limit, or not PostgreSQL at all."""
        if not self._replies.unreadable() and not self._started.done():
            self._started.set_exception(ConnectionLostError(str(fault)))
        self.abort()

    def _receive_startup(self, type_: int, payload: bytes) -> None:
        match type_:
            case Backend.AUTHENTICATION:
                answer = self._auth.respond(payload)
                if answer is not None:
                    self._write_now(answer)
            case Backend.PARAMETER_STATUS:
                name, value = backend.parameter_status(payload)
                self._replies.parameters[name] = value
            case Backend.BACKEND_KEY_DATA:
                self._pid, self._key = backend.backend_key_data(payload)
            case Backend.ERROR_RESPONSE:
                self._started.set_exception(ServerError(backend.error_fields(payload)))
                self.abort()
            case Backend.READY_FOR_QUERY:
                self._started.set_result(None)
            case _:  # NoticeResponse, NegotiateProtocolVersion
                pass
