"""The states of a connection as tables, the same for whoever looks: the client, the server, or a relay between them.

Two machines. `Startup` runs from the first packet to the first ReadyForQuery. `Conversation` runs from then on: it
knows which requests the server has yet to answer, in order, and therefore what a reply is about. What decides a state
stands in the tables.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Final, Generic, NamedTuple, TypeVar

from proxy.wire.frames import ProtocolError, StartupPacket
from proxy.wire.messages import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    REQUEST_MAJOR,
    SSL_REQUEST,
    Authentication,
    Backend,
    Frontend,
)

# --- from the first packet to the first ReadyForQuery ---


class Phase(Enum):
    """Where a connection stands before its first ReadyForQuery, and after it (READY)."""

    FIRST_PACKET = "the client sends a startup packet"
    SSL_ANSWER = "the server answers SSLRequest with one byte"
    GSS_ANSWER = "the server answers GSSENCRequest with one byte"
    AUTHENTICATION = "the server asks, or is satisfied"
    PASSWORD = "the client answers the server's request"
    INITIALISING = "the server sends its parameters and the cancel key"
    READY = "requests and replies"
    CANCELLING = "a CancelRequest was sent; the server acts on it and closes"
    CLOSED = "over"


class Event(Enum):
    """What happens before the first ReadyForQuery, named after messages where it is one."""

    SSL_REQUEST = "SSLRequest"
    GSSENC_REQUEST = "GSSENCRequest"
    CANCEL_REQUEST = "CancelRequest"
    STARTUP_MESSAGE = "StartupMessage"
    REFUSAL = "N"
    ACCEPTANCE = "S or G"
    AUTHENTICATION_OK = "AuthenticationOk"
    #: A request that the client must answer: cleartext, MD5, SASL, SASLContinue, GSS, SSPI, …
    AUTHENTICATION_REQUEST = "Authentication…"
    AUTHENTICATION_FINAL = "AuthenticationSASLFinal"
    PASSWORD_MESSAGE = "PasswordMessage, SASLInitialResponse, SASLResponse, GSSResponse"
    NEGOTIATE_PROTOCOL_VERSION = "NegotiateProtocolVersion"
    PARAMETER_STATUS = "ParameterStatus"
    BACKEND_KEY_DATA = "BackendKeyData"
    NOTICE_RESPONSE = "NoticeResponse"
    ERROR_RESPONSE = "ErrorResponse"
    READY_FOR_QUERY = "ReadyForQuery"


#: (phase, event) -> next phase; what is missing is a violation of the protocol.
STARTUP_TABLE: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (Phase.FIRST_PACKET, Event.SSL_REQUEST): Phase.SSL_ANSWER,
    (Phase.FIRST_PACKET, Event.GSSENC_REQUEST): Phase.GSS_ANSWER,
    (Phase.FIRST_PACKET, Event.CANCEL_REQUEST): Phase.CANCELLING,
    (Phase.FIRST_PACKET, Event.STARTUP_MESSAGE): Phase.AUTHENTICATION,
    # An accepted request starts a handshake; the packets that follow it are a new FIRST_PACKET inside.
    (Phase.SSL_ANSWER, Event.REFUSAL): Phase.FIRST_PACKET,
    (Phase.SSL_ANSWER, Event.ACCEPTANCE): Phase.FIRST_PACKET,
    (Phase.SSL_ANSWER, Event.ERROR_RESPONSE): Phase.CLOSED,
    (Phase.GSS_ANSWER, Event.REFUSAL): Phase.FIRST_PACKET,
    (Phase.GSS_ANSWER, Event.ACCEPTANCE): Phase.FIRST_PACKET,
    (Phase.GSS_ANSWER, Event.ERROR_RESPONSE): Phase.CLOSED,
    (Phase.AUTHENTICATION, Event.NEGOTIATE_PROTOCOL_VERSION): Phase.AUTHENTICATION,
    (Phase.AUTHENTICATION, Event.NOTICE_RESPONSE): Phase.AUTHENTICATION,
    (Phase.AUTHENTICATION, Event.AUTHENTICATION_REQUEST): Phase.PASSWORD,
    (Phase.AUTHENTICATION, Event.AUTHENTICATION_FINAL): Phase.AUTHENTICATION,
    (Phase.AUTHENTICATION, Event.AUTHENTICATION_OK): Phase.INITIALISING,
    (Phase.AUTHENTICATION, Event.ERROR_RESPONSE): Phase.CLOSED,
    (Phase.PASSWORD, Event.PASSWORD_MESSAGE): Phase.AUTHENTICATION,
    # GSS: the server's last token needs no answer.
    (Phase.PASSWORD, Event.AUTHENTICATION_OK): Phase.INITIALISING,
    # A server may give up while it waits (authentication_timeout, shutdown).
    (Phase.PASSWORD, Event.NOTICE_RESPONSE): Phase.PASSWORD,
    (Phase.PASSWORD, Event.ERROR_RESPONSE): Phase.CLOSED,
    (Phase.INITIALISING, Event.PARAMETER_STATUS): Phase.INITIALISING,
    (Phase.INITIALISING, Event.BACKEND_KEY_DATA): Phase.INITIALISING,
    (Phase.INITIALISING, Event.NEGOTIATE_PROTOCOL_VERSION): Phase.INITIALISING,
    (Phase.INITIALISING, Event.NOTICE_RESPONSE): Phase.INITIALISING,
    (Phase.INITIALISING, Event.ERROR_RESPONSE): Phase.CLOSED,
    (Phase.INITIALISING, Event.READY_FOR_QUERY): Phase.READY,
}

_PACKETS: Final = {
    SSL_REQUEST: Event.SSL_REQUEST,
    GSSENC_REQUEST: Event.GSSENC_REQUEST,
    CANCEL_REQUEST: Event.CANCEL_REQUEST,
}
_SERVER_EVENTS: Final = {
    Backend.NEGOTIATE_PROTOCOL_VERSION: Event.NEGOTIATE_PROTOCOL_VERSION,
    Backend.PARAMETER_STATUS: Event.PARAMETER_STATUS,
    Backend.BACKEND_KEY_DATA: Event.BACKEND_KEY_DATA,
    Backend.NOTICE_RESPONSE: Event.NOTICE_RESPONSE,
    Backend.ERROR_RESPONSE: Event.ERROR_RESPONSE,
    Backend.READY_FOR_QUERY: Event.READY_FOR_QUERY,
}


def packet_event(packet: StartupPacket) -> Event:
    """What a first packet is. Raises ProtocolError for a request that PostgreSQL doesn't know."""
    if packet.major != REQUEST_MAJOR:
        return Event.STARTUP_MESSAGE
    try:
        return _PACKETS[packet.code]
    except KeyError:
        raise ProtocolError(f"the request {packet.major}.{packet.code & 0xFFFF} is unknown") from None


def server_event(type_: int, authentication: int | None = None) -> Event:
    """What a regular message of the server is before READY; `authentication` is the code of an Authentication message.

    Raises ProtocolError for one that has no business there.
    """
    if type_ == Backend.AUTHENTICATION:
        if authentication == Authentication.OK:
            return Event.AUTHENTICATION_OK
        final = authentication == Authentication.SASL_FINAL
        return Event.AUTHENTICATION_FINAL if final else Event.AUTHENTICATION_REQUEST
    try:
        return _SERVER_EVENTS[Backend(type_)]
    except (KeyError, ValueError):
        raise ProtocolError(f"the server sends a message {chr(type_)!r} before it is ready") from None


class Startup:
    """The machine of `STARTUP_TABLE`. Each encryption request may be made once, as PostgreSQL has it."""

    def __init__(self) -> None:
        self.phase = Phase.FIRST_PACKET
        self._asked: set[Event] = set()

    def advance(self, event: Event) -> Phase:
        """Moves on and returns the new phase. Raises ProtocolError where the table has no such transition."""
        following = STARTUP_TABLE.get((self.phase, event))
        if following is None or event in self._asked:
            raise ProtocolError(f"{event.value} is out of place while {self.phase.value}")
        if event in (Event.SSL_REQUEST, Event.GSSENC_REQUEST):
            self._asked.add(event)
        self.phase = following
        return following


# --- from then on ---

#: The startup packet as a request: ReadyForQuery ends its reply too.
STARTUP: Final = 0
#: A whole batch of the extended protocol with its Sync, as one request. Its reply is not looked at message by message.
BATCH: Final = 1
_Z: Final = frozenset({int(Backend.READY_FOR_QUERY)})

#: Which messages of the server end the reply to a request. A message of the client that is not here has no reply.
REPLY_ENDS: Final[Mapping[int, frozenset[int]]] = {
    STARTUP: _Z,
    BATCH: _Z,
    Frontend.QUERY: _Z,
    Frontend.FUNCTION_CALL: _Z,
    Frontend.SYNC: _Z,
    Frontend.PARSE: frozenset({int(Backend.PARSE_COMPLETE)}),
    Frontend.BIND: frozenset({int(Backend.BIND_COMPLETE)}),
    Frontend.CLOSE: frozenset({int(Backend.CLOSE_COMPLETE)}),
    Frontend.DESCRIBE: frozenset({int(Backend.ROW_DESCRIPTION), int(Backend.NO_DATA)}),
    Frontend.EXECUTE: frozenset(
        {int(Backend.COMMAND_COMPLETE), int(Backend.EMPTY_QUERY_RESPONSE), int(Backend.PORTAL_SUSPENDED)}
    ),
}
#: Requests that a server skips, unanswered, between an error in the extended protocol and the next Sync: all but Sync.
_EXTENDED: Final = frozenset(
    int(t) for t in (Frontend.PARSE, Frontend.BIND, Frontend.CLOSE, Frontend.DESCRIBE, Frontend.EXECUTE)
)
_COPY_ENDS: Final = frozenset({int(Frontend.COPY_DONE), int(Frontend.COPY_FAIL)})
_COPY_STARTS: Final = frozenset({int(Backend.COPY_IN_RESPONSE), int(Backend.COPY_BOTH_RESPONSE)})
#: What `Conversation.received` has to be told; everything else of the server changes nothing.
TELLING: Final = (
    frozenset(t for ends in REPLY_ENDS.values() for t in ends) | _COPY_STARTS | {int(Backend.ERROR_RESPONSE)}
)
#: What `Conversation.sent` has to be told.
ASKING: Final = frozenset(REPLY_ENDS) - {STARTUP, BATCH} | _COPY_ENDS
#: What it has to be told while it is `plain`.
TELLING_PLAIN: Final = _Z | _COPY_STARTS | {int(Backend.ERROR_RESPONSE)}

Tag = TypeVar("Tag")


class Request(NamedTuple, Generic[Tag]):
    """A message of the client that is to be answered, with whatever the owner of the conversation attached to it."""

    type: int
    tag: Tag | None
    ends: frozenset[int]


class Conversation(Generic[Tag]):
    """The client's requests that the server has not answered yet, oldest first.

    Follows the protocol as PostgreSQL's server does: an error in the extended protocol skips requests until Sync; a
    Sync that the server reads while it receives COPY data is ignored. Where the two sides' order can't be told from
    outside (a COPY that fails before the server has read a Sync sent ahead of the data) the next reply that fits puts
    it right.
    """

    def __init__(self, *, started: bool = True) -> None:
        """`started` False: the startup packet is the first request."""
        self._pending: deque[Request[Tag]] = deque()
        self._plain: dict[int, Request[Tag]] = {
            t: Request(t, None, REPLY_ENDS.get(t, frozenset())) for t in (*REPLY_ENDS, *_COPY_ENDS)
        }
        self._skipping = False  # the server skips what it reads until a Sync that was not sent yet
        self._copying = False  # the server receives COPY data whose end was not sent yet
        #: Whether all that is pending, if anything, is one Query or one BATCH: then only messages in TELLING_PLAIN
        #: matter.
        self.plain = started
        if not started:
            self._pending.append(self._plain[STARTUP])

    @property
    def idle(self) -> bool:
        """Whether every request has been answered."""
        return not self._pending and not self._skipping and not self._copying

    @property
    def current(self) -> Request[Tag] | None:
        """The request that the server works on, which an error or notice is about now; None between requests."""
        return next((r for r in self._pending if r.type not in _COPY_ENDS), None)

    def __len__(self) -> int:
        return len(self._pending)

    def sent_alone(self, type_: int, tag: Tag | None = None) -> None:
        """The client sent a Query, or a whole BATCH; to be called while the conversation is idle.

        `tag` is that of every request in it. A batch that fails has none when it is completed.
        """
        self._pending.append(self._plain[type_] if tag is None else Request(type_, tag, REPLY_ENDS[type_]))
        self.plain = True

    def sent(self, type_: int, tag: Tag | None = None) -> None:
        """The client sent a message of this type (one of ASKING; others are ignored)."""
        self.plain = False
        if type_ in _COPY_ENDS:
            if self._copying:
                self._copying = False
            elif self._pending and self._pending[-1].type not in _COPY_ENDS:
                self._pending.append(self._plain[type_])
            return
        if type_ not in REPLY_ENDS:
            return
        if self._skipping:
            if type_ != Frontend.SYNC:
                return
            self._skipping = False
        elif self._copying and type_ == Frontend.SYNC:
            return
        self._pending.append(self._plain[type_] if tag is None else Request(type_, tag, REPLY_ENDS[type_]))

    def received(self, type_: int) -> Request[Tag] | None:
        """The server sent a message of this type (one of TELLING; others are ignored).

        Returns the request that it completes.
        """
        pending = self._pending
        if pending and type_ in pending[0].ends:
            return pending.popleft()
        if type_ == Backend.READY_FOR_QUERY:
            return self._ready()
        if type_ == Backend.ERROR_RESPONSE:
            self._failed()
            return None
        if type_ in _COPY_STARTS:
            self._copy_starts()
            return None
        if type_ not in TELLING:
            return None
        while pending and pending[0].type in (Frontend.SYNC, *_COPY_ENDS):
            pending.popleft()  # this reply is not about them: they were ignored
        if pending and type_ in pending[0].ends:
            return pending.popleft()
        return None

    def _ready(self) -> Request[Tag] | None:
        pending = self._pending
        self._copying = False
        if not any(r.ends is _Z for r in pending):
            self._skipping = False
            return None
        while True:
            request = pending.popleft()
            if request.ends is _Z:
                return request

    def finished(self) -> Request[Tag] | None:
        """The server sent ReadyForQuery while the conversation was `plain`: the same as `received`, but quicker."""
        return self._pending.popleft() if self._pending else None

    def _failed(self) -> None:
        pending = self._pending
        current = self.current
        self._copying = False
        if current is not None and current.type == BATCH:
            pending[0] = self._plain[BATCH]
        if current is None or current.type not in _EXTENDED:
            return  # ReadyForQuery comes by itself, or this is about no request at all
        while pending and pending[0].type != Frontend.SYNC:
            pending.popleft()
        self._skipping = not pending

    def _copy_starts(self) -> None:
        pending = self._pending
        kept: list[Request[Tag]] = []
        while pending and pending[0].type in _COPY_ENDS:
            pending.popleft()
        if pending:
            request = pending.popleft()
            # The Sync that a batch ended with is ignored; what the client sends after the data ends the reply.
            if request.type == BATCH:
                request = Request(int(Frontend.EXECUTE), request.tag, REPLY_ENDS[Frontend.EXECUTE])
            kept.append(request)
        self._copying = True
        self.plain = False
        while pending:
            request = pending.popleft()
            if request.type in _COPY_ENDS:
                self._copying = False
                break
            if request.type != Frontend.SYNC:
                kept.append(request)
        pending.extendleft(reversed(kept))
