"""What a server's answers mean to a step's session: the same however they are cut, and whether they were met before."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ResultTooLargeError, ServerError, StepRefusedError
from engine.replies import Exchange, Known, Replies
from proxy.wire import build
from proxy.wire.frames import ProtocolError
from proxy.wire.messages import Backend

COLUMN = build.message(Backend.ROW_DESCRIPTION, b"\0\1n\0" + b"\0" * 4 + b"\0\1" + b"\0\0\0\x17" + b"\0\4" + b"\xff" * 4 + b"\0\0")
NO_DATA = build.message(Backend.NO_DATA)
PARSED = build.message(Backend.PARSE_COMPLETE)
ERROR = build.error_response("ERROR", "22012", "division by zero")
NOTICE = build.message(Backend.NOTICE_RESPONSE, b"SNOTICE\0\0")
TAGS = ("UPDATE 1", "COMMIT", "CALL", "SET", "SELECT 1")
ANSWERS = [PARSED, NO_DATA, COLUMN, build.data_row([b"1"]), ERROR, NOTICE, build.parameter_status("TimeZone", "UTC"),
           build.message(Backend.EMPTY_QUERY_RESPONSE), *(build.command_complete(t) for t in TAGS)]


class Never(dict):  # type: ignore[type-arg]
    """A memory that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Asked:
    """An exchange, and what the server says to it."""

    ahead: int
    reset: bool
    chained: bool
    answers: tuple[bytes, ...]
    status: str

    def said(self) -> bytes:
        return b"".join(self.answers) + build.ready_for_query(ord(self.status))


#: Few answers and much repetition, so that replies are met again.
asked = st.builds(
    Asked, st.sampled_from([0, 0, 1, 2]), st.booleans(), st.booleans(),
    st.one_of(st.lists(st.sampled_from(ANSWERS), max_size=6).map(tuple),
              st.sampled_from([(PARSED, *map(build.command_complete, ("SET", "CALL", "COMMIT"))),
                               (PARSED, NO_DATA, build.command_complete("UPDATE 1"))])),
    st.sampled_from("ITE"))
dialogues = st.lists(asked, min_size=1, max_size=4)


def talk(dialogue: list[Asked], cuts: list[int], known: Known) -> list[object]:
    """One session; what each exchange was told, what had to be written at once, and what the session is left as."""
    loop = asyncio.new_event_loop()
    try:
        replies = Replies(max_rows=2, max_bytes=1000, known=known)
        exchanges: list[Exchange] = []
        for a in dialogue:
            exchange = Exchange(None if a.reset else loop.create_future(), ahead=a.ahead)
            if a.chained and exchanges:
                exchanges[-1].next = exchange
            exchanges.append(exchange)
            replies.expect(exchange)
        stream = b"".join(a.said() for a in dialogue)
        urgent = b""
        at = sorted({0, len(stream), *(c % (len(stream) + 1) for c in cuts)})
        for start, end in itertools.pairwise(at):
            urgent += replies.feed(stream[start:end])
        told = []
        for e in exchanges:
            fault = None
            if e.future is not None and e.future.done():
                fault = str(e.future.exception())
            told.append((e.future is not None and e.future.done(), fault, e.tags, e.tag, e.columns, e.rows, e.committed,
                         e.status, str(e.error)))
        return [told, urgent, replies.status, replies.parameters, str(replies.reset_fault), len(replies.exchanges)]
    finally:
        loop.close()


@given(st.lists(st.tuples(dialogues, st.lists(st.integers(0, 10**4), max_size=4)), min_size=1, max_size=6))
def test_a_reply_means_the_same_as_before(sessions: list[tuple[list[Asked], list[int]]]) -> None:
    known: Known = {}
    for dialogue, cuts in sessions * 2:
        assert talk(dialogue, cuts, known) == talk(dialogue, [], Never()) == talk(dialogue, cuts, Never())


def test_plain_replies_are_remembered_and_others_not() -> None:
    known: Known = {}
    plain = Asked(2, False, False, (PARSED, *map(build.command_complete, ("SET", "CALL", "COMMIT"))), "I")
    begun = Asked(0, False, False, (PARSED, NO_DATA, build.command_complete("UPDATE 1")), "T")
    first = talk([plain, begun], [], known)
    assert list(known) == [(4, plain.said() + begun.said())]
    assert talk([plain, begun], [], known) == first
    # The same bytes, and something else under way.
    for other in ([plain, Asked(0, True, False, begun.answers, "T")], [plain, Asked(1, False, False, begun.answers, "T")]):
        assert talk(other, [], known) == talk(other, [], Never())
    for answer in (ERROR, COLUMN, build.parameter_status("TimeZone", "UTC")):
        talk([Asked(0, False, False, (answer, build.command_complete("SET")), "I")], [], known)
    assert len(known) == 1
    # A part of the next answer has come with it.
    talk([plain, begun], [len(plain.said()) + len(PARSED) + 5], known)
    assert len(known) == 1
    # And one that nobody reads there, but somebody may when the same bytes come again.
    reset = Asked(0, True, False, (PARSED,), "I")
    tag = build.command_complete("COMMIT")
    cut = [len(reset.said()) + len(tag)]
    talk([reset, Asked(0, True, False, (tag, PARSED), "I")], cut, known)
    read = [reset, Asked(0, False, False, (tag, PARSED), "I")]
    assert talk(read, cut, known) == talk(read, cut, Never())


async def test_an_exchange_that_is_over_is_gone() -> None:
    """Without garbage collection, which costs more the more it has to look for."""
    loop = asyncio.get_running_loop()
    replies = Replies(max_rows=1, max_bytes=1000, known=Never())
    exchange = Exchange(loop.create_future(), ahead=1)
    assert exchange.future is not None
    future = weakref.ref(exchange.future)
    replies.expect(exchange)
    replies.feed(build.command_complete("SET") + build.command_complete("COMMIT") + build.ready_for_query(ord("I")))
    await exchange.future
    gc.disable()
    try:
        del exchange
        assert future() is None
    finally:
        gc.enable()


async def test_what_must_be_written_at_once() -> None:
    replies = Replies(max_rows=1, max_bytes=1000)
    loop = asyncio.get_running_loop()
    first = Exchange(loop.create_future(), ahead=1)
    replies.expect(first)
    assert replies.feed(ERROR) == build.sync()
    replies.feed(build.ready_for_query(ord("E")))
    assert isinstance(first.error, ServerError)
    assert (first.error.sqlstate, replies.status) == ("22012", ord("E"))
    copy = Exchange(loop.create_future(), resync=True)
    replies.expect(copy)
    assert replies.feed(build.message(Backend.COPY_IN_RESPONSE, b"\0\0\0")) == build.copy_fail("no client") + build.sync()
    replies.lost(ConnectionResetError("gone"))
    assert copy.future is not None
    with pytest.raises(StepRefusedError, match="COPY"):
        await copy.future
    assert not replies.exchanges


async def test_limits() -> None:
    loop = asyncio.get_running_loop()
    replies = Replies(max_rows=1, max_bytes=100)
    many, large = Exchange(loop.create_future()), Exchange(loop.create_future())
    replies.expect(many)
    replies.expect(large)
    replies.feed(COLUMN + build.data_row([b"1"]) * 2 + build.command_complete("SELECT 2") + build.ready_for_query(ord("T")))
    assert many.future is not None
    with pytest.raises(ResultTooLargeError, match="max_result_rows"):
        await many.future
    # Longer than any row may be: the stream can't be read on.
    with pytest.raises(ProtocolError):
        replies.feed(COLUMN + b"D\x7f\xff\xff\xff")
    assert replies.unreadable()
    assert large.future is not None
    with pytest.raises(ResultTooLargeError, match="max_result_bytes"):
        await large.future
    assert not replies.unreadable()
