"""The fast path's thread by itself, between sockets: what it relays, and how it gives back what it does not."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import psutil
import pytest

from proxy.fastpath import COMPILED
from proxy.session import _PLAIN
from proxy.wire import build
from proxy.wire.messages import Backend
from tests.proxy.test_adversity import eventually

if TYPE_CHECKING:
    from proxy._fastpath import Board
if COMPILED:
    from proxy import _fastpath

pytestmark = pytest.mark.skipif(not COMPILED, reason="proxy._fastpath was not built: there was no C compiler at installation, or no epoll")

QUERY = build.query(b"SELECT 1")
OURS = build.query(b"SELECT df.one()")
BATCH = build.parse("", "SELECT 2") + build.bind("", "") + build.execute() + build.sync()
REPLY = build.message(ord("D"), b"a row") + build.message(ord("C"), b"SELECT 1\0") + build.message(Backend.READY_FOR_QUERY, b"T")
IDLE = ord("I")


class Leg:
    """A leg and its transport, which write nothing: what is to be done by them is noted."""

    def __init__(self) -> None:
        self.written = b""
        self.events: list[str] = []

    def get_write_buffer_size(self) -> int:
        return len(self.written)

    def send(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.events.append("abort")

    def recall(self) -> None:
        self.events.append("recall")

    def failed(self, error: Exception) -> None:
        self.events.append(repr(error))


class Desk:
    """An Exchange between two pairs of sockets, with small buffers. The thread has it after one request."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.client, self.near = socket.socketpair()
        self.far, self.server = socket.socketpair()
        self.client.settimeout(30)
        self.server.settimeout(30)
        for s in (self.near, self.far):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.legs = Leg(), Leg()
        self.broken = False
        self.requests: list[bytes] = []
        self.replies: list[bytes] = []
        self.exchange = _fastpath.Exchange(
            board, _PLAIN, 1 << 20, 1 << 16, {}, {}, self.asked, self.replies.append, lambda _: None, lambda *_: None)
        for end, leg, s in zip((self.exchange.client, self.exchange.server), self.legs, (self.near, self.far), strict=True):
            end.start(leg, leg, s.fileno())  # type: ignore[arg-type]
            end.resume()

    def asked(self, data: bytes) -> None:
        if self.broken:
            raise RuntimeError("a bug")
        self.requests.append(data)

    def begin(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Has the thread get it; `meanwhile` is called when the event loop knows of the reply, and has not read it."""
        self.exchange.open(IDLE, False)
        self.client.sendall(QUERY)
        look(self.board)
        assert receive(self.server, len(QUERY)) == QUERY
        self.server.sendall(build.message(Backend.READY_FOR_QUERY, b"I"))
        assert select.select([self.board.fileno()], [], [], 30)[0]
        meanwhile()
        look(self.board)
        assert receive(self.client, 6)[-1] == IDLE

    def stop(self) -> None:
        self.exchange.client.stop()
        self.exchange.server.stop()

    def close(self) -> None:
        self.stop()
        for s in (self.client, self.near, self.far, self.server):
            s.close()


def receive(s: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = s.recv(size - len(data))
        assert more
        data += more
    return data


def look(board: Board) -> None:
    """What the event loop does when the board is readable."""
    assert select.select([board.fileno()], [], [], 30)[0]
    board.ready()


def read_by_now(s: socket.socket) -> None:
    """Returns when the other end has read everything."""
    eventually(lambda: not select.select([s], [], [], 0)[0])


@pytest.fixture
def board() -> Iterator[Board]:
    board = _fastpath.Board(1)
    yield board
    board.close()


@pytest.fixture
def desk(board: Board) -> Iterator[Desk]:
    desk = Desk(board)
    desk.begin()
    assert desk.exchange.given
    yield desk
    desk.close()


def test_requests_and_replies_go_on(desk: Desk) -> None:
    """With the event loop doing nothing; the replies in pieces, some of which end in a header."""
    for request in (QUERY, BATCH, QUERY):
        desk.client.sendall(request)
        assert receive(desk.server, len(request)) == request
        for start, end in itertools.pairwise((0, 3, 12, 14, len(REPLY))):
            desk.server.sendall(REPLY[start:end])
            read_by_now(desk.far)
        assert receive(desk.client, len(REPLY)) == REPLY
    assert desk.exchange.given
    assert not select.select([desk.board.fileno()], [], [], 0)[0]
    assert desk.exchange.leave() == (0, None, ord("T"))
    assert not desk.exchange.given
    assert desk.exchange.leave() is None


@pytest.mark.parametrize("request_", [OURS, QUERY + QUERY, QUERY[:-3], build.query(b"x" * 70_000), b"X\0\0\0\4"],
                         ids=["ours", "two", "a part", "long", "other"])
def test_what_is_not_plain_is_given_back(desk: Desk, request_: bytes) -> None:
    desk.client.sendall(request_)
    look(desk.board)
    while len(b"".join(desk.requests)) < len(request_):
        look(desk.board)
    assert b"".join(desk.requests) == request_
    assert not desk.exchange.given
    assert not select.select([desk.server], [], [], 0)[0]


@pytest.mark.parametrize("asked", [True, False])
def test_replies_to_be_read_are_given_back(desk: Desk, asked: bool) -> None:
    """An error; or a notification that nothing has asked for."""
    message = build.message(ord("E") if asked else ord("A"), b"news") + build.message(Backend.READY_FOR_QUERY, b"I")
    if asked:
        desk.client.sendall(QUERY)
        assert receive(desk.server, len(QUERY)) == QUERY
    desk.server.sendall(message)
    look(desk.board)
    assert desk.replies == [message]
    assert desk.exchange.leave() == (ord("Q") if asked else 0, None, IDLE)


def test_what_the_server_has_no_room_for_is_left_to_its_transport(desk: Desk) -> None:
    request = build.query(b"SELECT '" + b"x" * 60_000 + b"'")
    desk.client.sendall(request)
    look(desk.board)
    assert not desk.exchange.given
    left = desk.legs[1].written
    assert 0 < len(left) < len(request)
    assert receive(desk.server, len(request) - len(left)) + left == request
    assert desk.exchange.leave() == (ord("Q"), None, IDLE)


def test_what_the_client_has_no_room_for_is_left_to_its_transport(desk: Desk) -> None:
    """The rest of the reply follows it there, and the thread does not get the session while any of it is waiting."""
    reply = build.message(ord("D"), b"y" * 600_000) + REPLY  # more than the thread reads at once
    desk.client.sendall(QUERY)
    assert receive(desk.server, len(QUERY)) == QUERY
    sending = threading.Thread(target=desk.server.sendall, args=(reply,))
    sending.start()
    while not desk.legs[0].written.endswith(REPLY):
        look(desk.board)
    sending.join(30)
    left = desk.legs[0].written
    assert not desk.exchange.given
    assert receive(desk.client, len(reply) - len(left)) + left == reply
    assert desk.exchange.leave() == (0, None, ord("T"))


@pytest.mark.parametrize("client", [True, False])
def test_an_end_is_left_to_the_transport(desk: Desk, client: bool) -> None:
    """With what was said before it, even if nothing was read of it yet."""
    if client:
        desk.client.sendall(OURS)
        desk.client.shutdown(socket.SHUT_WR)
    else:
        desk.server.sendall(REPLY)
        desk.server.shutdown(socket.SHUT_WR)
    leg = desk.legs[0 if client else 1]
    while not leg.events:
        look(desk.board)
    assert leg.events == ["recall"]
    assert (desk.requests, desk.replies) == (([OURS], []) if client else ([], [REPLY]))


def test_what_comes_while_it_is_given_is_the_threads(board: Board) -> None:
    """The event loop has heard of it in the same call; it must not read what belongs to somebody else by now."""
    desk = Desk(board)
    try:
        desk.begin(lambda: desk.client.sendall(OURS))
        assert not (desk.requests and desk.exchange.given)
        while not desk.requests:
            look(board)
        assert (desk.requests, desk.exchange.given) == ([OURS], False)
    finally:
        desk.close()


def test_its_end(board: Board) -> None:
    """Nothing is left of a board that is closed."""
    before = psutil.Process().num_fds(), threading.active_count()
    for _ in range(3):
        other = _fastpath.Board(1)
        assert threading.active_count() == before[1] + 1
        other.close()
        del other
    assert (psutil.Process().num_fds(), threading.active_count()) == before


def test_a_request_and_an_end_that_are_there_already(board: Board) -> None:
    """The thread hears of both at once, when it gets the session, and the event loop in the call in which it gives it."""
    desk = Desk(board)

    def ask_and_go() -> None:
        desk.client.sendall(QUERY)
        desk.client.shutdown(socket.SHUT_WR)

    try:
        desk.begin(ask_and_go)
        while not desk.legs[0].events:
            look(board)
        assert receive(desk.server, len(QUERY)) == QUERY
        assert (desk.requests, desk.legs[0].events) == ([], ["recall"])
    finally:
        desk.close()


def test_both_connections_end_when_one_fails(desk: Desk) -> None:
    """Here: because its descriptor, on which the thread waits, is no socket any more."""
    kept, (end, other) = os.dup(desk.near.fileno()), os.pipe()
    os.dup2(end, desk.near.fileno())
    desk.client.sendall(QUERY)
    look(desk.board)
    assert [leg.events for leg in desk.legs] == [["abort"], ["abort"]]
    for fd in (kept, end, other):
        os.close(fd)


def test_it_can_be_taken_in_the_middle_of_a_header(desk: Desk) -> None:
    desk.client.sendall(QUERY)
    assert receive(desk.server, len(QUERY)) == QUERY
    desk.server.sendall(REPLY[:12])
    read_by_now(desk.far)
    desk.stop()
    assert desk.exchange.leave() == (ord("Q"), None, IDLE)
    assert receive(desk.client, 10) + desk.exchange.take_tail() == REPLY[:12]
    desk.exchange.go_on()
    assert desk.replies == []


def test_what_was_given_back_is_there_when_it_is_taken(desk: Desk) -> None:
    """The session takes its connections back before the event loop has looked at what the thread has left."""
    desk.client.sendall(OURS)
    assert select.select([desk.board.fileno()], [], [], 30)[0]
    desk.stop()
    assert desk.exchange.leave() == (0, None, IDLE)
    assert desk.requests == []
    desk.exchange.go_on()
    desk.exchange.go_on()
    desk.board.ready()
    assert desk.requests == [OURS]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3), 2)))
def test_several_are_given_back_and_some_are_taken(board: Board, order: tuple[int, int]) -> None:
    """Then another one is given back, and the event loop looks at last."""
    desks = [Desk(board) for _ in range(4)]
    last = desks[3]
    try:
        for desk in desks:
            desk.begin()
        for number, desk in enumerate(desks[:3]):
            desk.client.sendall(build.query(b"SELECT df.one() -- %d" % number))
            eventually(lambda desk=desk: not desk.exchange.given)
        for number in order:
            desks[number].stop()
            assert desks[number].exchange.leave() == (0, None, IDLE)
            desks[number].exchange.go_on()
        last.client.sendall(build.query(b"SELECT df.one() -- 3"))
        eventually(lambda: not last.exchange.given)
        look(board)
        assert [desk.requests for desk in desks] == [[build.query(b"SELECT df.one() -- %d" % n)] for n in range(4)]
    finally:
        for desk in desks:
            desk.close()


def test_a_bug_ends_one_session(board: Board, desk: Desk) -> None:
    other = Desk(board)
    try:
        other.begin()
        desk.broken = True
        for each in (desk, other):
            each.client.sendall(OURS)
            eventually(lambda each=each: not each.exchange.given)
        look(board)
        assert desk.legs[0].events == ["RuntimeError('a bug')"]
        assert (other.requests, other.legs[0].events) == ([OURS], [])
    finally:
        other.close()
