"""One client's connection, from its first byte to its last.

The client's leg is there first. A startup packet makes the session dial the upstream and send the packet on as it came;
from then on both directions are relayed, and this module is what looks at them on their way:

* client to server: Query and Parse are given to the rewriter; the other messages are only noted, so that it is known
  what the server's replies are about
* server to client: parameters, the cancel key, errors and notices, and ReadyForQuery
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from proxy import unserved
from proxy.authentication import Authenticator, AuthMode, Legs, RefusalError, Step
from proxy.encodings import codec
from proxy.hosts import Hosts
from proxy.launch import Launcher, Requests
from proxy.relay import Hold, Leg, Relay
from proxy.replies import client_view
from proxy.rewriter import INLINE_LIMIT, Dialect, Rewriter, Statement
from proxy.tls import ServerTls, UpstreamTls, channel_binding
from proxy.upstream import Address, DialError, Upstream
from proxy.wire import backend, build
from proxy.wire.frames import (
    NOTE,
    PASS,
    PEEK,
    WHOLE,
    Frame,
    FrameSplitter,
    Item,
    Peek,
    ProtocolError,
    StartupPacket,
    StartupParser,
)
from proxy.wire.messages import (
    ANSWER_NO,
    ANSWER_SSL,
    MAX_AUTH_MESSAGE,
    MAX_MESSAGE,
    PROTOCOL_3_0,
    Authentication,
    Backend,
    Frontend,
    TransactionStatus,
)
from proxy.wire.plain import QUERY as _QUERY
from proxy.wire.plain import SYNC, bound_alone, plain_request, texts
from proxy.wire.proxy_header import ProxyHeader
from proxy.wire.states import (
    ASKING,
    BATCH,
    TELLING,
    TELLING_PLAIN,
    Conversation,
    Event,
    Phase,
    Startup,
    packet_event,
    server_event,
)
from proxy.wire.tls import ALPN, TlsStream, common_name

if TYPE_CHECKING:
    from proxy._fastpath import Board, Exchange

log = structlog.get_logger("dfproxy.session")

#: Errors and notices above this size pass unread. Payload bytes.
_MAX_DIAGNOSIS: Final = 1024 * 1024
#: Prepared statements and portals that mention df and are remembered for one session; beyond that the oldest are
#: forgotten, which costs their errors the position, and their commits the instant wake-up.
_MAX_REMEMBERED: Final = 10_000
#: Seconds that a CancelRequest may take on its way to the server.
_CANCEL_TIMEOUT: Final = 10.0
#: Seconds in which a connection that is being closed may take what was written to it.
_LINGER: Final = 10.0

#: For the log, when a client hangs up instead of giving its password in clear.
_ASKED_IN_VAIN: Final = (
    "with require_auth or channel_binding=require it can't give it in clear: set auth=relay here and"
    " channel_binding=disable there, or use the server's own certificate as tls_cert"
)

Key = tuple[int, bytes]

# Plain integers for what runs on every message: looking up a member of an enumeration takes as long as the rest of it.
_PARSE: Final = int(Frontend.PARSE)
_EXECUTE: Final = int(Frontend.EXECUTE)
_PASSWORD: Final = int(Frontend.PASSWORD)
_READY_FOR_QUERY: Final = int(Backend.READY_FOR_QUERY)
_BETWEEN_TRANSACTIONS: Final = int(TransactionStatus.IDLE)


class Host(Protocol):
    """What a session needs from the server that it belongs to."""

    upstream: Upstream
    upstream_tls: UpstreamTls
    hosts: Hosts
    #: TLS for clients; None: there is none.
    tls: ServerTls | None
    tls_required: bool
    auth: AuthMode
    rewriter: Rewriter
    #: Cancel keys of live sessions, and where their server is.
    keys: dict[Key, Address]
    #: What connections are lent to between requests; None: everything goes through this module.
    board: Board | None
    draining: bool
    #: While draining: no session begins another transaction.
    impatient: bool
    #: One for each cancel request that may be on its way.
    cancels: asyncio.Semaphore
    #: By database: those that serve df.start(transaction_mode => 'new').
    launchers: Mapping[str, Launcher]

    def admit(self, session: Session, /) -> bool:
        """Whether this client, too, may be served."""

    def forwards(self, leg: Leg, /) -> bool:
        """Whether the client is a load balancer, which begins with a PROXY header."""

    def committed(self) -> None:
        """A transaction in which df was mentioned may have been committed."""

    def perhaps_committed(self) -> None:
        """A session that has mentioned df is between transactions again; the last one may have called it unseen."""


@dataclass(frozen=True)
class Limits:
    """Bounds for one session. Seconds and bytes."""

    startup_timeout: float = 60.0
    write_buffer: int = 256 * 1024
    max_rewrite: int = 64 * 1024 * 1024


class _End(Enum):
    """What the client wants instead of a session."""

    CLOSED = "closed"


class _Handshake(Enum):
    """The client wants TLS first."""

    ASKED = "after SSLRequest"
    DIRECT = "from the first byte"


class Session:
    """Serves one client leg: `run` until both connections are gone."""

    def __init__(self, host: Host, limits: Limits, client: Leg) -> None:
        self._host = host
        self._limits = limits
        self._client = client
        self._server: Leg | None = None
        self._relay: Relay | None = None
        self._task: asyncio.Task[None] | None = None
        self._address: Address | None = None
        self._key: Key | None = None
        self._log = log.bind(client=client.peer)
        loop = asyncio.get_running_loop()
        self._deadline = asyncio.timeout(limits.startup_timeout)

        self._startup = Startup()
        self._packets = StartupParser()
        self._header = ProxyHeader() if host.forwards(client) else None
        self._stirred = loop.time()  # kept up to date while the proxy drains
        self._first: asyncio.Future[StartupPacket | _End | _Handshake] = loop.create_future()
        self._client_name: bytes | None = None  # in its certificate
        self._own_binding: bytes | None = None  # of the certificate that it was shown
        self._authenticator: Authenticator | None = None
        self._questions: asyncio.Queue[bytes] = asyncio.Queue(1)  # of the server, that take long to answer

        self._conversation: Conversation[Statement] = Conversation(started=False)
        self._statements: dict[bytes, Statement] = {}
        self._portals: dict[bytes, Statement] = {}
        self._touched = False  # df was mentioned since the last moment between transactions
        self._concerned = False  # df was mentioned at all
        self._status: int | None = None
        self._ready = False  # the first ReadyForQuery has come
        self._quiet = False  # what `_settled` said when the last reply ended; nothing has come since
        self._parameters = {"client_encoding": "UTF8", "server_encoding": "UTF8", "standard_conforming_strings": "on"}
        self._codec: str | None = "utf_8"  # of the client's texts
        self._dialect = Dialect()

        self._asked_of = bytearray(256)  # what to do with each type of message from the client
        self._up = FrameSplitter(self._asked_of, max_length=MAX_AUTH_MESSAGE, max_whole=limits.max_rewrite)
        for type_ in ASKING:
            self._asked_of[type_] = NOTE
        self._asked_of[Frontend.QUERY] = self._asked_of[Frontend.PARSE] = WHOLE
        self._asked_of[Frontend.PASSWORD] = WHOLE
        self._down = FrameSplitter(_STARTING, max_length=MAX_MESSAGE, max_whole=_MAX_DIAGNOSIS)

        self._launcher: Launcher | None = None  # of the session's database
        self._unserved: str | None = None  # the hint for a database without workflows
        self._requests = Requests()

        self._exchange: Exchange | None = None  # while both connections are lent
        self._lendable = True  # that was not tried yet

        self._work: asyncio.Queue[tuple[Frame, bytes, bytes]] = asyncio.Queue(1)
        self._unread: list[Iterator[Item]] = []  # what the client sent, while a large statement is being compiled

        client.on_data = self._on_first_bytes
        client.on_eof = client.on_lost = self._on_gone_early

    # --- life ---

    async def run(self) -> None:
        """Serves the client to its end. Every failure of this client or its server ends here."""
        self._task = asyncio.current_task()
        try:
            async with self._deadline:
                await self._serve()
        except TimeoutError:
            self._log.info("the client or the server took too long to authenticate")
        except ProtocolError as e:
            # Whoever this is does not speak the protocol: there is no way to answer.
            self._log.info("malformed bytes", sender="client", reason=str(e))
        except OSError as e:  # of the client's TLS handshake
            self._log.info("the client's connection failed", reason=str(e))
        except RefusalError as e:
            self._turn_away(e)
        except DialError as e:
            self._log.warning("no upstream", reason=str(e))
            self._refuse(
                "08006",
                f"dfproxy can't reach PostgreSQL: {e}",
                hint="Check that the server runs and accepts connections from dfproxy's host, and dfproxy's setting"
                " \"upstream\".",
            )
        finally:
            self._task = None
            if self._authenticator is not None and self._authenticator.asking:
                # Its library refuses, if it was told to insist on SCRAM or channel binding, and we can't tell it more.
                self._log.info("the client left when it was asked for its password", advice=_ASKED_IN_VAIN)
            if self._key is not None and self._host.keys.get(self._key) == self._address:
                del self._host.keys[self._key]
            await self._close()

    async def _close(self) -> None:
        legs = [leg for leg in (self._client, self._server) if leg is not None]
        self._client.part()
        if self._server is not None:
            self._server.close()
        _, pending = await asyncio.wait([leg.lost for leg in legs], timeout=_LINGER)
        if pending:
            self.abort()
            await asyncio.wait(pending)

    def abort(self) -> None:
        """Cuts both connections at once; `run` returns soon after."""
        self._client.abort()
        if self._server is not None:
            self._server.abort()
        elif self._task is not None:
            self._task.cancel()

    @property
    def established(self) -> bool:
        """Whether the client has its connection to the server."""
        return self._relay is not None

    @property
    def idle(self) -> bool:
        """Whether the session is between transactions with nothing on its way."""
        return (
            self._status == _BETWEEN_TRANSACTIONS
            and self._conversation.idle
            and self._up.at_boundary
            and self._down.at_boundary
            and not self._unread
        )

    def stir(self) -> None:
        """Notes that something happened."""
        self._client.recall()
        self._stirred = asyncio.get_running_loop().time()
        self._quiet = False

    def quiet_since(self, time: float) -> bool:
        """Whether the session has nothing to do, and had nothing since a moment of the loop's clock.

        One that is not established has nothing to do as soon as nobody says anything.
        """
        return self._stirred <= time and (self.idle or not self._ready)

    def dismiss(self) -> None:
        """Ends the session, and says why. One that is not idle loses its transaction."""
        self._client.recall()
        idle = self.idle or not self._ready
        self._refuse("57P01", "terminating connection because dfproxy is shutting down", hint="Connect again.")
        if self._server is not None:
            if idle:
                self._server.write([build.terminate()])
            self._server.close()

    def _turn_away(self, refusal: RefusalError) -> None:
        """Ends the session before it has begun, and says why."""
        self._log.info("refused", reason=refusal.message)
        self._refuse(refusal.sqlstate, refusal.message, hint=refusal.hint)
        if self._server is not None:
            self._server.close()

    def _refuse(self, sqlstate: str, text: str, *, hint: str | None = None) -> None:
        """Ends the client's connection with an error, where the client can still understand one."""
        if self._down.at_boundary:
            self._client.write([build.error_response("FATAL", sqlstate, text, hint=hint)])
        self._client.part()

    async def _serve(self) -> None:
        packet = await self._first_packet()
        if packet is None:
            return
        if self._startup.phase is Phase.CANCELLING:
            await self._cancel(packet)
            return
        if packet.major != PROTOCOL_3_0 >> 16:
            version = f"{packet.major}.{packet.code & 0xFFFF}"
            self._refuse("0A000", f"unsupported frontend protocol {version}: dfproxy supports 3.0 and later")
            return
        self._check_protection()
        if not self._host.admit(self):
            raise RefusalError(
                "53300", "sorry, too many clients already: dfproxy's limit is reached",
                hint="Close connections that are not in use, or raise max_client_connections of dfproxy.")
        server, self._address = await self._host.hosts.dial(self._make_server)
        self._server = server
        self._choose_database(_database(packet))
        self._authenticator = Authenticator(self._host.auth, self._legs(server), _user(packet))
        self._relay = Relay(self._client, server, self._to_server, self._to_client)
        server.write([packet.raw])
        if rest := self._packets.take_rest():
            self._to_server(rest)
        self._client.release(Hold.STARTUP)
        async with asyncio.TaskGroup() as group:
            working = (group.create_task(self._compile_large()), group.create_task(self._answer_slowly()))
            await self._relay.finished()
            for task in working:
                task.cancel()

    def _choose_database(self, database: str) -> None:
        """What there is in the session's database. A proxy without a worker does not know, and takes all as served."""
        served = self._host.launchers
        self._launcher = served.get(database)
        if served and self._launcher is None:
            self._unserved = unserved.hint(database, served)
            self._dialect = Dialect(codec=None)  # nothing is compiled

    def _make_server(self) -> Leg:
        return Leg(self._limits.write_buffer)

    # --- before there is a server ---

    def _on_first_bytes(self, data: bytes) -> None:
        if self._host.draining:
            self.stir()
        if self._first.done():
            self._packets.feed(data)
            return
        try:
            if self._header is not None:
                rest = self._header.feed(data)
                if rest is None:
                    return
                if self._header.peer is not None:
                    self._log = self._log.bind(client=self._header.peer)
                self._header, data = None, rest
            self._packets.feed(data)
            self._read_packets()
        except ProtocolError as e:
            self._first.set_exception(e)

    def _read_packets(self) -> None:
        if self._packets.is_tls and self._client.tls is None:
            self._client.hold(Hold.STARTUP)
            self._first.set_result(_Handshake.DIRECT)
            return
        while (packet := self._packets.next_packet()) is not None:
            event = packet_event(packet)
            phase = self._startup.advance(event)
            if phase is Phase.SSL_ANSWER and self._host.tls is not None and self._client.tls is None:
                self._startup.advance(Event.ACCEPTANCE)
                self._client.hold(Hold.STARTUP)
                self._first.set_result(_Handshake.ASKED)
                return
            if phase in (Phase.SSL_ANSWER, Phase.GSS_ANSWER):
                self._client.write([ANSWER_NO])
                self._startup.advance(Event.REFUSAL)
                continue
            # Nothing more is read until the server is there to take it.
            self._client.hold(Hold.STARTUP)
            self._first.set_result(packet)
            return

    async def _first_packet(self) -> StartupPacket | None:
        """The packet that says what the client wants, inside of TLS if it wants that first; None: it has gone.

        Raises OSError where the handshake fails, ProtocolError.
        """
        while True:
            first = await self._first
            if isinstance(first, StartupPacket):
                return first
            if isinstance(first, _End):
                return None
            self._first = asyncio.get_running_loop().create_future()
            await self._handshake(first)

    async def _handshake(self, how: _Handshake) -> None:
        tls = self._host.tls
        if tls is None:
            raise ProtocolError("the client starts TLS, which dfproxy was given no certificate for")
        received = self._packets.take_rest()
        if how is _Handshake.ASKED:
            if received:
                # Whoever put them there could have put words into the client's mouth (CVE-2021-23214).
                raise ProtocolError("bytes came between SSLRequest and its answer")
            self._client.write([ANSWER_SSL])
        # What is held back now is the application's data; the handshake itself has to be read.
        self._client.release(Hold.STARTUP)
        stream = await self._client.secure(tls.context, server_side=True, received=received)
        if how is _Handshake.DIRECT and stream.alpn != ALPN:
            raise ProtocolError(f"TLS was started without agreeing on {ALPN} (ALPN)")
        self._own_binding = tls.binding
        self._client_name = _certified_name(tls, stream)
        self._client.release(Hold.SECURED)

    def _check_protection(self) -> None:
        """Raises RefusalError if the client has not done what it takes to be let through to the server."""
        tls = self._host.tls
        if tls is None:
            return
        if self._client.tls is None and (self._host.tls_required or tls.asks_certificate):
            raise RefusalError("28000", "dfproxy accepts encrypted connections only", "Connect with sslmode=require.")
        if tls.asks_certificate and self._client.tls is not None and self._client.tls.peer_certificate is None:
            raise RefusalError(
                "28000", "connection requires a valid client certificate", "Connect with sslcert and sslkey.")

    def _legs(self, server: Leg) -> Legs:
        """What authentication has to know of the two connections."""
        certificate = server.tls.peer_certificate if server.tls is not None else None
        return Legs(
            client_tls=self._client.tls is not None,
            server_tls=server.tls is not None,
            binding=channel_binding(certificate),
            own_binding=self._own_binding,
            certificate_sent=server.tls is not None and self._host.upstream.tls.certificate is not None,
            client_name=self._client_name,
        )

    def _on_gone_early(self) -> None:
        if not self._first.done():
            self._first.set_result(_End.CLOSED)

    async def _cancel(self, packet: StartupPacket) -> None:
        """Forwards a CancelRequest as it came, and closes when the server has acted on it (it closes)."""
        async with self._host.cancels:
            await self._forward_cancel(packet)

    async def _forward_cancel(self, packet: StartupPacket) -> None:
        key = (int.from_bytes(packet.payload[:4], "big"), packet.payload[4:])
        known = self._host.keys.get(key)
        # A key that nobody here knows may be another process's session: the server that it is for will know.
        for address in (known,) if known is not None else self._host.upstream.addresses:
            try:
                leg = await self._host.upstream_tls.connect(address, Leg, _CANCEL_TIMEOUT)
            except OSError as e:  # TimeoutError is one
                self._log.warning("a cancel request did not reach the server", server=str(address), reason=str(e))
                continue
            self._server = leg
            leg.on_eof = leg.close
            leg.write([packet.raw])
            await asyncio.wait([leg.lost], timeout=_CANCEL_TIMEOUT)
            leg.abort()
            await leg.lost

    # --- client to server ---

    def _to_server(self, data: bytes) -> None:
        if self._quiet and self._passes(data):
            return
        self._quiet = False
        if self._host.draining:
            if self._host.impatient and self.idle:
                # The answer to a request that the server never gets. A client that hears of its end in between may
                # take it for a notice, as libpq does, and be at a loss for a reason later.
                self.dismiss()
                return
            self.stir()
        if self._unread:
            self._unread.append(self._up.feed(data))
            return
        if self._ready:
            self._down.modes = _READY
        self._forward(self._up.feed(data))

    def _passes(self, data: bytes) -> bool:
        """Sends on a request that stands alone, which is most of what clients send.

        That is one Query, or one batch of the extended protocol up to its Sync that prepares nothing of ours, in a
        session that has nothing on its way. Where some prepared statement mentions df, the batch must be about one
        statement alone, whichever. False: it has to be looked at message by message.
        """
        if len(data) > INLINE_LIMIT:
            return False
        type_ = plain_request(data)
        if not type_:
            return False
        rewriter = self._host.rewriter
        statement: Statement | None = None
        if rewriter.might(data):
            if type_ == _QUERY:
                if data.find(0, 5) != len(data) - 1 or len(data) - 5 > self._limits.max_rewrite:
                    return False
                statement = rewriter.rewrite(data[5:-1], self._dialect)
                if statement is not None:
                    self._concerned = True
                    if statement.text is not None:
                        data = build.query(statement.text)
            elif any(rewriter.mentions(text) for text in texts(data)):
                return False
        if type_ == SYNC and (self._statements or self._portals):
            name = bound_alone(data)
            if name is None:
                return False
            statement = self._statements.get(name)
            if statement is not self._portals.get(b""):
                self._bound(statement)
        self._sent_alone(type_, statement)
        assert self._server is not None
        self._server.send(data)
        return True

    def _bound(self, statement: Statement | None) -> None:
        """From now on this is what the unnamed portal is about."""
        self._remember(self._portals, b"", statement)

    def _sent_alone(self, type_: int, statement: Statement | None = None) -> None:
        self._quiet = False
        self._conversation.sent_alone(BATCH if type_ == SYNC else type_, statement)
        self._down.modes = _PLAIN

    def _settled(self) -> bool:
        """Whether the next request may go straight on, if it has nothing of interest: nothing else is on its way."""
        return (
            self._ready and not self._unread and not self._host.draining and self._conversation.idle
            and self._up.at_boundary
        )

    def _forward(self, items: Iterator[Item]) -> None:
        """Sends on what the client sent, up to a statement that is too large to compile here and now."""
        out: list[bytes | memoryview] = []
        try:
            for item in items:
                if isinstance(item, int):
                    self._noted(item)
                elif isinstance(item, Frame):
                    if item.type == _PASSWORD:
                        out.append(self._answered(item.payload))
                        if self._authenticator is not None and self._authenticator.answering:
                            # What comes after the password is not for the conversation that follows.
                            self._client.hold(Hold.BUSY)
                            self._unread.append(items)
                            break
                        continue
                    name, statement = _split(item)
                    if statement is not None and len(statement) > INLINE_LIMIT:
                        self._client.hold(Hold.BUSY)
                        self._unread.append(items)
                        self._work.put_nowait((item, name, statement))
                        break
                    rewritten = self._host.rewriter.rewrite(statement, self._dialect) if statement is not None else None
                    out.append(self._rewritten(item, name, rewritten))
                elif isinstance(item, Peek):
                    self._peeked(item)
                else:
                    out.append(item)
        except ProtocolError as e:
            self._malformed("client", e)
        except RefusalError as e:
            self._turn_away(e)
        if out and self._server is not None:
            self._server.write(out)

    def _go_on(self) -> None:
        """Goes on with what the client sent while something else had to be done first."""
        unread, self._unread = self._unread, []
        while unread and not self._unread:
            self._forward(unread.pop(0))
        self._unread += unread
        if not self._unread:
            self._client.release(Hold.BUSY)

    async def _compile_large(self) -> None:
        """Compiles large statements, one at a time; what the client sent after one waits for it."""
        while True:
            frame, name, statement = await self._work.get()
            rewritten = await self._host.rewriter.rewrite_large(statement, self._dialect)
            if self._server is not None:
                self._server.write([self._rewritten(frame, name, rewritten)])
            del frame, statement
            self._go_on()

    def _rewritten(self, frame: Frame, name: bytes, statement: Statement | None) -> bytes:
        """The message to send for a Query or Parse, which is noted and, if it mentions df, remembered."""
        self._conversation.sent(frame.type, statement)
        if statement is not None:
            self._concerned = True
        if frame.type == _PARSE:
            self._remember(self._statements, name, statement)
        if statement is None or statement.text is None:
            return frame.encode()
        if frame.type == _QUERY:
            return build.query(statement.text)
        rest = frame.payload[frame.payload.index(b"\0", len(name) + 1) + 1 :]
        return build.message(Frontend.PARSE, name + b"\0" + statement.text + b"\0" + rest)

    def _noted(self, type_: int) -> None:
        # A Query or Parse that comes here was too long to be looked at.
        self._conversation.sent(type_)

    def _peeked(self, peek: Peek) -> None:
        """A message that names a statement or portal, in a session in which some of them mention df."""
        statement: Statement | None = None
        match peek.type:
            case Frontend.BIND:
                portal, _, rest = peek.start.partition(b"\0")
                name, end, _ = rest.partition(b"\0")
                statement = self._statements.get(name) if end else None
                self._remember(self._portals, portal, statement)
            case Frontend.EXECUTE:
                statement = self._portals.get(peek.start.partition(b"\0")[0])
            case Frontend.DESCRIBE | Frontend.CLOSE:
                names = self._statements if peek.start[:1] == b"S" else self._portals
                name = peek.start[1:].partition(b"\0")[0]
                statement = names.get(name)
                if peek.type == Frontend.CLOSE:
                    self._remember(names, name, None)
        self._conversation.sent(peek.type, statement)

    def _remember(self, names: dict[bytes, Statement], name: bytes, statement: Statement | None) -> None:
        if statement is None:
            if names:
                names.pop(name, None)
            return
        names.pop(name, None)
        names[name] = statement
        if len(names) > _MAX_REMEMBERED:
            del names[next(iter(names))]
        for type_ in (Frontend.BIND, Frontend.EXECUTE, Frontend.DESCRIBE, Frontend.CLOSE):
            self._asked_of[type_] = PEEK

    # --- server to client ---

    def _to_client(self, data: bytes) -> None:
        if self._down.modes is _PLAIN and (last := self._down.skim(data, _READY_FOR_QUERY)) >= 0:
            self._client.send(data)
            if last:
                done = self._conversation.finished()
                self._between(data[-1], done.tag if done is not None else None)
                self._quiet = not self._host.draining
            if self._host.draining:
                self.stir()
            return
        out: list[bytes | memoryview] = []
        try:
            for item in self._down.feed(data):
                if isinstance(item, int):
                    self._told(item)
                elif isinstance(item, Frame):
                    out.append(self._read(item))
                elif not isinstance(item, Peek):
                    out.append(item)
        except ProtocolError as e:
            self._client.write(out)
            self._malformed("server", e)
            return
        except RefusalError as e:
            self._turn_away(e)
            return
        if out:
            self._client.write(out)
        if self._host.draining:
            self.stir()
        elif self._lendable and self._quiet:
            self._lend()

    def _told(self, type_: int) -> None:
        if not self._ready:
            self._advance(server_event(type_))
            return
        done = self._conversation.received(type_)
        if done is not None and done.tag is not None and done.type == _EXECUTE and not done.tag.looks:
            self._touched = True
        if not self._conversation.plain:
            self._down.modes = _READY

    def _read(self, frame: Frame) -> bytes:
        """What the client gets for a message of the server that is read."""
        payload = frame.payload
        if frame.type == _READY_FOR_QUERY:
            done = self._conversation.received(_READY_FOR_QUERY)
            self._between(backend.transaction_status(payload), done.tag if done is not None else None)
            if self._ready:
                self._quiet = self._settled()
                return frame.encode()
        match frame.type:
            case Backend.AUTHENTICATION:
                return self._asked(payload)
            case Backend.NOTICE_RESPONSE if self._ready and self._launches(payload):
                return b""
            case Backend.ERROR_RESPONSE | Backend.NOTICE_RESPONSE:
                payload = self._diagnosed(payload)
                if frame.type == Backend.ERROR_RESPONSE:
                    self._conversation.received(frame.type)
            case Backend.PARAMETER_STATUS:
                self._parameter(payload)
            case Backend.BACKEND_KEY_DATA:
                self._registered(payload)
        if not self._ready and self._advance(server_event(frame.type)) is Phase.READY:
            self._ready = True
            self._down.modes = _READY
            self._quiet = self._settled()
        return frame.encode() if payload is frame.payload else build.message(frame.type, payload)

    def _advance(self, event: Event) -> Phase:
        # A client that sends requests before it knows whether it may is the server's business; so is one that never
        # asks.
        if event is Event.PASSWORD_MESSAGE and self._startup.phase is not Phase.PASSWORD:
            return self._startup.phase
        return self._startup.advance(event)

    # --- the fast path ---

    def _lend(self) -> None:
        """Lets requests that nothing has to be done about pass without this module (proxy/fastpath.py)."""
        board, server = self._host.board, self._server
        self._lendable = False
        if board is None or server is None:
            return
        from proxy._fastpath import Exchange

        exchange = Exchange(
            board, _PLAIN, MAX_MESSAGE, INLINE_LIMIT, self._statements, self._portals, self._from_client,
            self._from_server, self._bound, self._between)
        try:
            if not self._client.lend(exchange.client, self._recalled):
                return
            self._exchange = exchange
            if not server.lend(exchange.server, self._recalled):
                self._client.recall()
                return
        except OSError as e:
            self._log.warning("no descriptors left for the fast path", reason=str(e))
            self._client.recall()
            return
        self._open_exchange()

    def _open_exchange(self) -> None:
        if self._exchange is not None and self._quiet and self._down.at_boundary:
            self._exchange.open(self._status or 0, self._concerned)

    def _leave(self) -> None:
        """Takes up what has passed without this module."""
        if self._exchange is None:
            return
        left = self._exchange.leave()
        if left is None:
            return
        type_, statement, self._status = left
        if type_:
            self._sent_alone(type_, statement)
            self._down.go_on(self._exchange.remaining, self._exchange.take_tail())

    def _recalled(self) -> None:
        """One leg's connection is not lent any more; then the other's is not, either."""
        if self._exchange is None:
            return
        self._leave()
        exchange, self._exchange = self._exchange, None
        self._client.recall()
        if self._server is not None:
            self._server.recall()
        exchange.go_on()

    def _from_client(self, data: bytes) -> None:
        self._leave()
        self._to_server(data)
        self._open_exchange()

    def _from_server(self, data: bytes) -> None:
        self._leave()
        self._to_client(data)
        self._open_exchange()

    # --- authentication ---

    def _asked(self, payload: bytes) -> bytes:
        """What the client gets for an Authentication message of the server. Raises RefusalError."""
        assert self._authenticator is not None
        code = backend.authentication_code(payload)
        self._advance(server_event(Backend.AUTHENTICATION, code))
        if self._authenticator.is_slow(payload):
            # The server waits for the answer: there is nothing else to come from it, one question at a time.
            try:
                self._questions.put_nowait(payload)
            except asyncio.QueueFull:
                raise ProtocolError("a question while the last one is not answered") from None
            return b""
        step = self._authenticator.request(payload)
        self._answer(step)
        if code == Authentication.OK:
            self._deadline.reschedule(None)
            self._up.max_length = MAX_MESSAGE
            self._asked_of[Frontend.PASSWORD] = PASS
            if self._unread:
                self._go_on()
        return step.to_client

    def _answered(self, payload: bytes) -> bytes:
        """What the server gets for a message of the client that answers it. Raises RefusalError, ProtocolError."""
        assert self._authenticator is not None
        step = self._authenticator.answer(payload)
        self._advance(Event.PASSWORD_MESSAGE)
        return step.to_server

    def _answer(self, step: Step) -> None:
        """Sends what the proxy itself has to say to the server."""
        if step.to_server and self._server is not None:
            self._advance(Event.PASSWORD_MESSAGE)
            self._server.write([step.to_server])

    async def _answer_slowly(self) -> None:
        """Answers, one at a time and not on the event loop, what takes long: the key derivation of SCRAM."""
        assert self._authenticator is not None
        while True:
            payload = await self._questions.get()
            try:
                self._answer(await asyncio.to_thread(self._authenticator.request, payload))
            except ProtocolError as e:
                self._malformed("server", e)
            except RefusalError as e:
                self._turn_away(e)

    def _registered(self, payload: bytes) -> None:
        assert self._address is not None
        self._key = backend.backend_key_data(payload)
        self._host.keys[self._key] = self._address

    def _parameter(self, payload: bytes) -> None:
        name, value = backend.parameter_status(payload)
        if name == "in_hot_standby" and self._address is not None:
            if not self._host.hosts.reported(self._address, value == "on") and not self._ready:
                raise RefusalError(
                    "57P03", f"the server at {self._address} is {'a' if value == 'on' else 'no'} standby, and dfproxy's"
                    f" upstream says target_session_attrs={self._host.upstream.wanted.value}",
                    hint="Connect again: dfproxy will look for another host.")
        elif name in self._parameters:
            self._parameters[name] = value
            self._codec = codec(self._parameters["client_encoding"], self._parameters["server_encoding"])
            self._dialect = Dialect(
                self._codec if self._unserved is None else None,
                self._parameters["standard_conforming_strings"] == "on",
            )

    def _diagnosed(self, payload: bytes) -> bytes:
        request = self._conversation.current
        compiled = request.tag.compiled if request is not None and request.tag is not None else None
        try:
            changed = client_view(payload, compiled)
        except ProtocolError:
            raise
        except Exception:
            # A bug of ours in a position must not cost the client the message.
            log.exception("an error's position could not be mapped")
            return payload
        if self._unserved is not None and request is not None and request.tag is not None:
            changed = unserved.with_hint(payload, self._unserved, self._codec)
        return payload if changed is None else changed

    def _launches(self, payload: bytes) -> bool:
        """Whether a notice is a request for the launcher, which then has it; the client does not get it."""
        if self._launcher is None:
            return False
        taken, request = self._requests.take(payload)
        if request is not None:
            self._launcher.request(request)
        return taken

    def _between(self, status: int, statement: Statement | None) -> None:
        """ReadyForQuery: the reply to a request, or to a batch, is complete; `statement` is what it was about."""
        self._status = status
        if statement is not None and not statement.looks:
            self._touched = True
        if status == _BETWEEN_TRANSACTIONS and self._concerned:
            if self._touched:
                self._touched = False
                self._host.committed()
            else:
                self._host.perhaps_committed()

    def _malformed(self, who: str, error: ProtocolError) -> None:
        self._log.info("malformed bytes", sender=who, reason=str(error))
        self._refuse("08P01", f"dfproxy got malformed bytes from the {who}: {error}")
        if self._server is not None:
            self._server.close()


def _modes(otherwise: int, *, note: Iterable[int] = (), whole: Iterable[int] = ()) -> bytes:
    """What to do with each type of message."""
    modes = bytearray((otherwise,)) * 256
    for type_ in note:
        modes[type_] = NOTE
    for type_ in whole:
        modes[type_] = WHOLE
    return bytes(modes)


_DIAGNOSES: Final = (Backend.ERROR_RESPONSE, Backend.NOTICE_RESPONSE, Backend.PARAMETER_STATUS, Backend.READY_FOR_QUERY)
#: Before the session is ready every message is looked at: there are few, and their order is fixed.
_STARTING: Final = _modes(NOTE, whole=(*_DIAGNOSES, Backend.AUTHENTICATION, Backend.BACKEND_KEY_DATA))
#: After that: what tells where the conversation stands, and while that is plain, the little that can change it.
_READY: Final = _modes(PASS, note=TELLING, whole=_DIAGNOSES)
_PLAIN: Final = _modes(PASS, note=TELLING_PLAIN, whole=_DIAGNOSES)


def _split(frame: Frame) -> tuple[bytes, bytes | None]:
    """Name (of a Parse) and statement; no statement where the message is malformed, which the server will say."""
    if frame.type == _QUERY:
        end = frame.payload.find(b"\0")
        return b"", frame.payload[:end] if end == len(frame.payload) - 1 and end >= 0 else None
    name, found, rest = frame.payload.partition(b"\0")
    statement, terminated, _ = rest.partition(b"\0")
    return name, statement if found and terminated else None


def _user(packet: StartupPacket) -> bytes:
    """The user in a StartupMessage; empty where it is malformed, which the server will say."""
    try:
        return packet.parameters().get("user", "").encode("utf-8", "surrogateescape")
    except ProtocolError:
        return b""


def _database(packet: StartupPacket) -> str:
    """The database in a StartupMessage; empty where it is malformed, which the server will say."""
    try:
        parameters = packet.parameters()
    except ProtocolError:
        return ""
    return parameters.get("database") or parameters.get("user", "")


def _certified_name(tls: ServerTls, stream: TlsStream) -> bytes | None:
    """The common name in the client's certificate, where one was asked for and given (it is verified then)."""
    certificate = stream.peer_certificate if tls.asks_certificate else None
    if certificate is None:
        return None
    try:
        name = common_name(certificate)
    except ValueError as e:
        raise ProtocolError(f"the client's certificate can't be read: {e}") from e
    return name.encode() if name is not None else None
