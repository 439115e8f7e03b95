"""What the server answers to a step's session, read sans-IO.

Requests go out in *exchanges*, each of which one ReadyForQuery ends; `Replies` knows which are under way, and tells
each what came of it. Most replies are the same few hundred bytes, step after step: what a reply without rows means for
the exchanges under way is remembered by its bytes, and read only once.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from engine.errors import NotBegunError, ResultTooLargeError, ServerError, StepRefusedError
from proxy.wire import backend, build
from proxy.wire.backend import ColumnDescription
from proxy.wire.frames import PASS, WHOLE, Frame, FrameSplitter
from proxy.wire.messages import Backend, TransactionStatus

__all__ = ["NO_COPY", "Exchange", "Replies"]

_IDLE = int(TransactionStatus.IDLE)
_COMMAND_COMPLETE = int(Backend.COMMAND_COMPLETE)
_DATA_ROW = int(Backend.DATA_ROW)
_READY = int(Backend.READY_FOR_QUERY)
_ROW_DESCRIPTION = int(Backend.ROW_DESCRIPTION)
_NO_DATA = int(Backend.NO_DATA)
_ERROR = int(Backend.ERROR_RESPONSE)
_PARAMETER_STATUS = int(Backend.PARAMETER_STATUS)
_HEADER = struct.Struct(">BI")
_SYNC = build.sync()

NO_COPY = ("COPY from STDIN and to STDOUT need a client; a step has none", "0A000")
#: What a session looks at; everything else (ParseComplete, notices, notifications…) is skipped unread.
_LOOK_AT = (
    Backend.COMMAND_COMPLETE, Backend.DATA_ROW, Backend.READY_FOR_QUERY, Backend.ROW_DESCRIPTION, Backend.NO_DATA,
    Backend.ERROR_RESPONSE, Backend.PARAMETER_STATUS, Backend.EMPTY_QUERY_RESPONSE, Backend.COPY_IN_RESPONSE,
    Backend.COPY_OUT_RESPONSE, Backend.AUTHENTICATION, Backend.BACKEND_KEY_DATA,
)
#: Of these, what says nothing but how an exchange goes on.
_PLAIN = frozenset({_COMMAND_COMPLETE, _READY, _NO_DATA})
#: The longest reply that is remembered, in bytes, and how many are.
_KNOWN_BYTES, _KNOWN_REPLIES = 1024, 256


class Exchange:
    """What is written up to one ReadyForQuery, and the answers to it. `future` None: a reset, whose answers nobody
    reads unless one is an error.

    `resync`: a Sync is needed after CopyFail, since COPY FROM swallows the one sent. `ahead`: how many statements are
    in front of the COMMIT, if it has one and a reset behind it. `next`: what was sent behind it, and is skipped unless
    it commits. `told`: done once the statement that was described has ended, if anybody wants to know that so early.
    """

    __slots__ = ("ahead", "begun", "columns", "committed", "copy", "described", "error", "future", "next", "resync",
                 "rows", "shape", "size", "status", "tag", "tags", "told")

    def __init__(self, future: asyncio.Future[None] | None, *, resync: bool = False, ahead: int = 0) -> None:
        self.future = future
        self.told: asyncio.Future[None] | None = None
        self.ahead = ahead
        self.committed = False  # the COMMIT of `ahead` has succeeded
        self.next: Exchange | None = None
        self.resync = resync
        self.begun = False  # some of its answers have been read
        self.shape = ahead * 2 + (future is None)  # what an answer's meaning depends on, while nothing goes wrong
        self.described = False
        self.columns: list[ColumnDescription] | None = None
        self.rows: list[list[bytes | None]] = []
        self.size = 0
        self.tags: list[str] = []
        self.tag: str | None = None  # of the statement that was described
        self.error: ServerError | None = None
        self.copy = False
        self.status = 0  # TransactionStatus at its end; 0: it has not ended

    def fail(self, reason: Exception) -> None:
        """Tells whoever waits for it, if it has not been told."""
        if self.future is not None and not self.future.done():
            self.future.set_exception(reason)
            self.future.exception()  # maybe nobody does


class _Ended(NamedTuple):
    """How an exchange of that shape ends."""

    shape: int
    tags: list[str]
    tag: str | None
    committed: bool
    status: int


#: Statements of the same kind return the same columns.
_columns = lru_cache(_KNOWN_REPLIES)(backend.row_description)

#: What replies mean: by the shape of the exchange in front, and their bytes.
Known = dict[tuple[int, bytes], list[_Ended]]
_known: Known = {}


class Replies:
    """Reads one session's answers. Raises nothing but ProtocolError; after that, nothing can be read any more."""

    def __init__(self, *, max_rows: int, max_bytes: int, known: Known = _known) -> None:
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.exchanges: deque[Exchange] = deque()  #: under way, the one in front first
        self.parameters: dict[str, str] = {}
        self.status = 0  #: the last TransactionStatus
        self.last_words: ServerError | None = None  #: that ended the session
        self.reset_fault: ServerError | None = None  #: why the session can't be used any more
        self._known = known
        self._plain = True
        self._ended_at = 0  # behind the last ReadyForQuery among the bytes that are being read
        self._modes = bytearray(256)
        for type_ in _LOOK_AT:
            self._modes[type_] = WHOLE
        self._splitter = FrameSplitter(self._modes, max_length=max_bytes + 65536)

    def expect(self, exchange: Exchange) -> None:
        """What comes is the answer to this, once those before it have ended."""
        self.exchanges.append(exchange)
        if len(self.exchanges) == 1:
            self._attend(exchange)

    def frames(self, data: bytes) -> Iterator[Frame]:
        """The messages in these bytes that a session looks at, for `receive`."""
        for item in self._splitter.feed(data):
            if type(item) is Frame:
                yield item

    def feed(self, data: bytes) -> bytes:
        """Reads bytes from the server; returns what must be written at once. Raises ProtocolError."""
        exchanges, splitter = self.exchanges, self._splitter
        before = None
        if exchanges and not exchanges[0].begun and len(data) <= _KNOWN_BYTES and splitter.at_boundary:
            known = self._known.get((exchanges[0].shape, data))
            if known is not None and self._again(known):
                return b""
            before = list(exchanges)
            self._plain = True
        urgent, at = self._whole_ones(data) if splitter.at_boundary else (b"", 0)
        if at < len(data):
            for type_, payload in self.frames(data[at:] if at else data):
                urgent += self.receive(type_, payload)
        if before is not None and self._plain and self._ended_at == len(data):
            self._remember(data, before)
        return urgent

    def _whole_ones(self, data: bytes) -> tuple[bytes, int]:
        """Takes the messages in front that are here from end to end, which most are: what the splitter would find, in
        fewer steps. Returns what must be written at once, and where the rest begins.
        """
        size, at, urgent = len(data), 0, b""
        self._ended_at = 0
        modes, unpack, most = self._modes, _HEADER.unpack_from, self._splitter.max_length + 4
        while size - at >= 5:
            type_, length = unpack(data, at)
            end = at + 1 + length
            if end > size or not 4 <= length <= most:
                break
            if modes[type_]:
                urgent += self.receive(type_, data[at + 5 : end])
            at = end
            if type_ == _READY:
                self._ended_at = end
        return urgent, at

    def _again(self, known: list[_Ended]) -> bool:
        """Ends exchanges as a reply did before, if they are those that it answers."""
        exchanges = self.exchanges
        if len(known) > 1 and [e.shape for e in exchanges][:len(known)] != [e.shape for e in known]:
            return False
        for _, tags, tag, committed, status in known:
            exchange = exchanges[0]
            exchange.tags, exchange.tag, exchange.committed = tags, tag, committed
            self._end(exchange, status)
        return True

    def _remember(self, data: bytes, before: list[Exchange]) -> None:
        """A plain reply that has ended some of the exchanges `before`, and holds nothing for those behind them (also
        nothing that is skipped: what is behind them the next time may look at it).
        """
        ended = before[:len(before) - len(self.exchanges)]
        if not ended:
            return
        if len(self._known) >= _KNOWN_REPLIES:
            self._known.clear()
        self._known[before[0].shape, data] = [_Ended(e.shape, e.tags, e.tag, e.committed, e.status) for e in ended]

    def receive(self, type_: int, payload: bytes) -> bytes:
        """Takes one message; returns what must be written at once. Raises ProtocolError."""
        exchange = self.exchanges[0] if self.exchanges else None
        if type_ not in _PLAIN:
            self._plain = False
        if exchange is not None:
            exchange.begun = True
        if type_ == _ERROR:
            return self._receive_error(exchange, payload)
        if type_ == _PARAMETER_STATUS:
            name, value = backend.parameter_status(payload)
            self.parameters[name] = value
        elif exchange is None:
            pass  # notices and notifications between statements
        elif type_ == _COMMAND_COMPLETE:
            tag = backend.command_tag(payload)
            exchange.tags.append(tag)
            if exchange.ahead and tag == "COMMIT" and len(exchange.tags) == exchange.ahead + 1:
                exchange.committed = True
                self._attend(exchange)
            if exchange.described and exchange.tag is None:
                exchange.tag = tag
                if exchange.told is not None and not exchange.told.done():
                    exchange.told.set_result(None)
        elif type_ == _DATA_ROW:
            if exchange.columns is not None and exchange.tag is None:
                self._receive_row(exchange, payload)
        elif type_ == _READY:
            self._end(exchange, backend.transaction_status(payload))
        elif type_ == _ROW_DESCRIPTION:
            if exchange.tag is None and not exchange.described:
                exchange.described = True
                exchange.columns = _columns(payload) if len(payload) <= _KNOWN_BYTES \
                    else backend.row_description(payload)
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
            return build.copy_fail("no client") + (_SYNC if exchange.resync else b"")
        return b""

    def lost(self, reason: Exception) -> None:
        """The session is over: nothing that is under way will be answered."""
        behind = None
        while self.exchanges:
            exchange = self.exchanges.popleft()
            if exchange is behind:
                exchange.fail(NotBegunError())
                continue
            # Servers end a session that sends statements where they expect COPY's data.
            exchange.fail(StepRefusedError(*NO_COPY) if exchange.copy else reason)
            behind = None if exchange.committed else exchange.next

    def unreadable(self) -> bool:
        """The stream can't be read on. True: the result that came is too large, and whoever waits for it knows now."""
        exchange = self.exchanges[0] if self.exchanges else None
        if exchange is None or exchange.columns is None or exchange.future is None or exchange.future.done():
            return False
        exchange.future.set_exception(self._too_large(bytes_=True))
        return True

    # -- inside ------------------------------------------------------------------------------------------------

    def _attend(self, exchange: Exchange) -> None:
        """Nobody reads what a reset's statements answer, unless it is an error."""
        mode = PASS if exchange.future is None or exchange.committed else WHOLE
        self._modes[_COMMAND_COMPLETE] = self._modes[_DATA_ROW] = self._modes[_ROW_DESCRIPTION] = mode

    def _end(self, exchange: Exchange, status: int) -> None:
        """The exchange in front is over."""
        exchanges = self.exchanges
        exchanges.popleft()
        skipped = None
        if exchange.next is not None and exchange.error is not None and not exchange.committed:
            skipped = exchanges.popleft()  # up to the Sync that this answers
        if exchanges:
            self._attend(exchanges[0])
        self.status = exchange.status = status
        if (exchange.future is None or exchange.committed) and (exchange.error is not None or status != _IDLE):
            self.reset_fault = exchange.error or ServerError({"M": "the session is not idle"})
        if exchange.future is not None and not exchange.future.done():
            exchange.future.set_result(None)
        if skipped is not None:
            skipped.fail(NotBegunError())

    def _receive_error(self, exchange: Exchange | None, payload: bytes) -> bytes:
        error = ServerError(backend.error_fields(payload))
        if error.fatal:
            self.last_words = error
        elif exchange is not None and exchange.error is None:
            exchange.error = error
            if len(exchange.tags) < exchange.ahead and exchange.next is None:
                return _SYNC
        return b""

    def _receive_row(self, exchange: Exchange, payload: bytes) -> None:
        if exchange.future is not None and exchange.future.done():
            return  # given up: too large, or the waiter was cancelled
        if not exchange.described:
            return  # of a statement of the engine's own
        exchange.size += len(payload)
        if exchange.size > self.max_bytes or len(exchange.rows) >= self.max_rows:
            fault = self._too_large(bytes_=exchange.size > self.max_bytes)
            exchange.rows = []
            if exchange.future is not None:
                exchange.future.set_exception(fault)
            return
        exchange.rows.append(backend.data_row(payload))

    def _too_large(self, *, bytes_: bool) -> ResultTooLargeError:
        if bytes_:
            return ResultTooLargeError(f"the result is larger than max_result_bytes ({self.max_bytes})")
        return ResultTooLargeError(f"the result has more rows than max_result_rows ({self.max_rows})")
