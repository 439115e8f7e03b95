"""The fast path: that it decides as Python does, is really used, and hands over at any moment without losing a byte."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl.compiler import mentions_dsl
from proxy import fastpath
from proxy.fastpath import COMPILED
from proxy.session import _PLAIN, Session
from proxy.wire import build
from proxy.wire.frames import FrameParser, FrameSplitter
from proxy.wire.messages import Backend
from proxy.wire.plain import SYNC, bound_alone, plain_request, texts
from tests.fix_postgres import Database
from tests.proxy.proxies import FASTPATH, RunningProxy, running_proxy
from tests.proxy.test_adversity import backends, eventually, read_until, serves, start
from tests.proxy.test_wire_frames import pieces

if COMPILED:
    from proxy import _fastpath

needs_compiler = pytest.mark.skipif(
    not COMPILED or not FASTPATH, reason="proxy._fastpath was not built: there was no C compiler at installation, or no epoll; or it is switched off")

READY = int(Backend.READY_FOR_QUERY)

# --- what it decides ---

#: Texts around everything that is searched for.
TEXTS = st.lists(st.sampled_from(
    ["~>", "~", ">", "|=>", "|", "=>", "?>", "!>", "@>", "@", "d", "f", "D", "F", "df", "DF", ".", '"', " ", "\t", "x", "_", "$", "9",
     "é", "pg_durable", "PG_Durable", "pg_", "durable", "select", ",", "(", "->>", ">=", "#>", "<@", "1"]), max_size=8).map("".join)
NAMES = st.sampled_from([b"", b"a", b"df", b"name"])


@st.composite
def batches(draw: st.DrawFn) -> bytes:
    parts = []
    for kind in draw(st.lists(st.sampled_from("PBDECHS"), max_size=4)):
        body = b""
        if kind == "P":
            body = draw(NAMES) + b"\0" + draw(TEXTS).encode() + b"\0\0\0"
        elif kind != "S":
            usual = {"B": b"\0" + draw(NAMES) + b"\0\0\0", "D": b"P\0", "E": b"\0\0\0\0\0"}.get(kind, b"")
            body = draw(st.one_of(st.just(usual), st.binary(max_size=12)))
        parts.append(build.message(ord(kind), body))
    return b"".join(parts) + (build.sync() if draw(st.booleans()) else b"")


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """What a client may send, whole, cut, or wrong."""
    data = draw(st.one_of(TEXTS.map(lambda t: build.query(t.encode())), batches(), st.binary(max_size=30)))
    match draw(st.sampled_from(["whole", "whole", "cut", "more", "length"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "more":
            return data + draw(st.binary(min_size=1, max_size=6))
        case "length" if len(data) >= 5:
            return data[:1] + draw(st.sampled_from([0, 3, 4, 5, 6, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "big") + data[5:]
    return data


@needs_compiler
@given(requests())
def test_requests_are_told_apart_as_python_does(data: bytes) -> None:
    type_, suspect = _fastpath.plain_request(data)
    assert type_ == plain_request(data)
    if type_ and not suspect:
        assert not any(mentions_dsl(text) for text in texts(data))


@needs_compiler
@given(st.one_of(requests(), batches()))
def test_what_a_batch_is_about_is_read_as_python_does(data: bytes) -> None:
    if plain_request(data) == SYNC:
        assert _fastpath.bound(data) == bound_alone(data)


@needs_compiler
@pytest.mark.parametrize("text", ["SELECT 1", "SELECT pdf.a FROM pdf", "SELECT a->>'b' > 1, a >= 2", "SELECT 'df'", "SELECT x.df", "SELECT $1"])
def test_what_is_not_ours_is_not_suspected(text: str) -> None:
    assert _fastpath.plain_request(build.query(text.encode())) == (ord("Q"), False)


@needs_compiler
@pytest.mark.parametrize("text", ["df.a()", "DF .a()", 'SELECT "df".a()', "SELECT\ndf.a()", "'a' ~> 'b'", "'a'|=>'x'", "@> 'a'", "PG_DURABLE", "pg_durable"])
def test_what_may_be_ours_is_suspected(text: str) -> None:
    """At the very start and the very end of a text, too: before it there is a length, and it may look like a letter."""
    assert mentions_dsl(text.encode())
    for padding in range(0, 300, 3):
        for statement in (text + " " * padding, " " * padding + text):
            assert _fastpath.plain_request(build.query(statement.encode())) == (ord("Q"), True), statement


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    parts = [build.message(ord(t), draw(st.binary(max_size=20))) for t in draw(st.lists(st.sampled_from("12DCnTtSENAZ"), max_size=6))]
    return b"".join(parts) + (build.message(READY, b"I") if draw(st.booleans()) else b"")


@needs_compiler
@given(replies(), st.lists(st.integers(0, 200)))
def test_replies_are_skimmed_as_python_does(reply: bytes, cuts: list[int]) -> None:
    reference = FrameSplitter(_PLAIN, max_length=1000)
    remaining = 0
    for piece in pieces(reply, cuts):
        last = reference.skim(piece, READY)
        found, remaining, tail = _fastpath.skimmed(piece, _PLAIN, 1004, remaining)
        if tail:  # Python gives up here
            assert (found, last) == (0, -1)
            assert tail < 5
            return
        assert found == last
        if last < 0:
            return
        assert remaining == reference._remaining
    assert _fastpath.skimmed(struct.pack(">BI", ord("D"), 1005), _PLAIN, 1004, 0)[0] == -1  # too long, like this
    assert _fastpath.skimmed(struct.pack(">BI", ord("D"), 3), _PLAIN, 1004, 0)[0] == -1


# --- that it is used ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What came to be looked at in Python."""
    seen: list[bytes] = []
    for name in ("_to_server", "_to_client"):
        original = getattr(Session, name)

        def spy(self: Session, data: bytes, original: object = original) -> None:
            seen.append(data)
            original(self, data)  # type: ignore[operator]

        monkeypatch.setattr(Session, name, spy)
    return seen


@needs_compiler
def test_plain_statements_do_not_come_to_python(calls: list[bytes], database18: Database, proxied18: RunningProxy) -> None:
    with psycopg.connect(proxied18.dsn(database18), autocommit=True) as c:
        calls.clear()
        for n in range(20):
            assert c.execute("SELECT %s::int + 1", [n]).fetchone() == (n + 1,)
            assert c.execute("SELECT 'a' > 'b', count(*) FROM generate_series(1, 100000)").fetchone() == (False, 100000)
        assert len(c.execute("SELECT repeat('x', 1000) FROM generate_series(1, 10000)").fetchall()) == 10000
        c.execute("SELECT %s::text", ["prepared"], prepare=True)
        assert calls == []
        c.prepare_threshold = None
        assert c.execute("SELECT df.one()").fetchone() == (1,)
        assert len(calls) >= 2  # there and back
        calls.clear()
        assert c.execute("SELECT 3").fetchone() == (3,)
        assert calls == []
        with pytest.raises(psycopg.errors.DivisionByZero):
            c.execute("SELECT 1 / 0")
        assert 1 <= len(calls) <= 2  # errors are read
        calls.clear()
        c.execute("SELECT 4")
        assert calls == []


@needs_compiler
def test_prepared_statements_of_ours_do_not_come_to_python(calls: list[bytes], database18: Database, proxied18: RunningProxy) -> None:
    """Once they are prepared, that is; and the proxy still knows which of them may have committed something of ours."""
    with start(proxied18, database18) as s:
        def done(*messages: bytes) -> list[int]:
            s.sendall(b"".join(messages) + build.sync())
            return [f.type for f in read_until(s, READY)]

        def run(name: str) -> list[int]:
            return done(build.bind("", name), build.execute())

        done(build.parse("ours", "SELECT df.one()"), build.parse("other", "SELECT 1"), build.parse("bad", "SELECT df.one(), 1 / $1::int"))
        run("ours")
        eventually(lambda: len(proxied18.commits) == 1)
        for name, committed in (("ours", 1), ("ours", 1), ("other", 0), ("other", 0), ("ours", 1)):
            calls.clear()
            told = len(proxied18.commits)
            assert ord("D") in run(name)
            eventually(lambda told=told, committed=committed: len(proxied18.commits) == told + committed)
            assert calls == []
        assert len(proxied18.commits) == 4  # nor was any told late
        with_zero = build.message(ord("B"), b"\0bad\0" + struct.pack(">HHI1sH", 0, 1, 1, b"0", 0))
        told = len(proxied18.commits)
        assert ord("E") in done(with_zero, build.execute())
        assert ord("D") in run("other")
        assert len(proxied18.commits) == told
        calls.clear()
        assert ord("D") in done(build.bind("", "ours"), build.execute(), build.bind("", "other"), build.execute())
        assert calls  # two statements in one batch: which of them a reply is about has to be followed
        eventually(lambda: len(proxied18.commits) == told + 1)
        calls.clear()
        run("ours")
        assert calls == []


def test_without_it_everything_comes_to_python(calls: list[bytes], database18: Database) -> None:
    with running_proxy(database18.dsn(), fastpath=False) as proxy, psycopg.connect(proxy.dsn(database18), autocommit=True) as c:
        calls.clear()
        assert c.execute("SELECT 1").fetchone() == (1,)
        assert len(calls) >= 2


@needs_compiler
def test_transactions_are_still_followed(database18: Database) -> None:
    """A session that has mentioned df tells of every transaction that ends, though what ends it is nothing of ours."""
    with running_proxy(database18.dsn()) as proxy, psycopg.connect(proxy.dsn(database18), autocommit=True) as c:
        c.execute("SELECT df.one()")
        eventually(lambda: len(proxy.commits) == 1)
        told = len(proxy.guessed)
        c.execute("SELECT 1")
        eventually(lambda: len(proxy.guessed) == told + 1)
        c.execute("BEGIN")
        c.execute("SELECT 1")
        assert proxy.call(lambda: [s.idle for s in proxy.server._sessions]) == [False]
        assert len(proxy.guessed) == told + 1
        c.execute("COMMIT")
        eventually(lambda: len(proxy.guessed) == told + 2)
        assert proxy.call(lambda: [s.idle for s in proxy.server._sessions]) == [True]


# --- handing over ---


@pytest.fixture(params=[pytest.param("thread", marks=needs_compiler), pytest.param("loop", marks=needs_compiler), "python"])
def either(request: pytest.FixtureRequest, database18: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningProxy]:
    """A proxy whose thread has a session after one plain request, one whose thread never has any, and one without the fast path."""
    monkeypatch.setattr(fastpath, "CALM", 1 if request.param == "thread" else 1_000_000)
    with running_proxy(database18.dsn(), fastpath=request.param != "python") as proxy:
        yield proxy


def given(proxy: RunningProxy) -> list[bool]:
    """Whether the thread has them, session by session."""
    return proxy.call(lambda: [s._exchange is not None and s._exchange.given for s in proxy.server._sessions])


def warm(proxy: RunningProxy, database: Database) -> socket.socket:
    """A session that the thread has already, if it is to have any."""
    s = start(proxy, database)
    s.sendall(SMALL)
    read_until(s, READY)
    if proxy.server.board is not None and fastpath.CALM == 1:
        eventually(lambda: all(given(proxy)))
    return s


BIG = build.query(b"SELECT repeat('x', 100000) FROM generate_series(1, 50)")
SMALL = build.query(b"SELECT 1")
BATCH = build.parse("", "SELECT 2") + build.bind("", "") + build.execute() + build.sync()
OURS = build.query(b"SELECT df.text()")
SET = build.query(b"SET client_encoding = latin1")


@pytest.mark.parametrize("sent", [
    [BIG + SMALL], [BIG, SMALL], [BIG, BATCH + OURS, SMALL], [SMALL[:7], SMALL[7:] + BATCH[:20], BATCH[20:] + BIG], [OURS, BIG, OURS],
    [BATCH, BATCH, SET, OURS], [SMALL, SMALL + SMALL, SMALL[:3], SMALL[3:]],
], ids=lambda sent: "-".join(str(len(piece)) for piece in sent))
def test_requests_in_any_pieces_at_any_time(database18: Database, either: RunningProxy, sent: list[bytes]) -> None:
    """Several requests at once, and requests that come while a reply is on its way, in the middle of its messages."""
    with warm(either, database18) as s:
        for piece in sent:
            s.sendall(piece)
            select.select([s], [], [], 0.2)  # the reply has begun, where there is one
        wanted = b"".join(sent)
        rows = wanted.count(b"SELECT") + 49 * wanted.count(b"repeat")
        parser, got = FrameParser(), []
        while sum(f.type == READY for f in got) < wanted.count(b"SELECT") + wanted.count(b"SET client"):
            parser.feed(s.recv(65536))
            while (frame := parser.next_frame()) is not None:
                got.append(frame)
        assert parser.buffered == 0
        assert sum(f.type == ord("D") for f in got) == rows
        assert not [f for f in got if f.type == ord("E")]
        assert sum(b"in the place of" in f.payload for f in got) == wanted.count(b"df.text")


def test_notifications_come_between_requests(database18: Database, either: RunningProxy) -> None:
    with psycopg.connect(either.dsn(database18), autocommit=True) as listening, psycopg.connect(
            either.dsn(database18), autocommit=True) as telling:
        listening.execute("LISTEN news")
        listening.execute("SELECT 1")
        for n in range(3):
            telling.execute("SELECT pg_notify('news', %s)", [str(n)])
            assert [note.payload for note in listening.notifies(timeout=30, stop_after=1)] == [str(n)]
            assert listening.execute("SELECT %s::int", [n]).fetchone() == (n,)


def test_a_client_that_does_not_read_is_not_read_for(database18: Database, either: RunningProxy) -> None:
    """The server is held when the client's side is full, others go on, and in the end every byte is there."""
    with warm(either, database18) as s:
        s.sendall(build.query(b"SELECT repeat('x', 1000000) FROM generate_series(1, 100)"))
        eventually(lambda: either.call(lambda: any(
            leg._holds for session in either.server._sessions for leg in (session._client, session._server) if leg is not None)))
        assert serves(either, database18)
        got = read_until(s, Backend.READY_FOR_QUERY)
        assert sum(len(f.payload) for f in got if f.type == ord("D")) == 100 * 1000006
        s.sendall(SMALL)
        read_until(s, Backend.READY_FOR_QUERY)


def test_a_server_that_does_not_read_is_not_fed(either: RunningProxy, database18: Database) -> None:
    """A COPY that the server is slow to take, after plain requests."""
    with psycopg.connect(either.dsn(database18), autocommit=True) as c:
        c.execute("CREATE TABLE slow (a text)")
        c.execute("CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END'")
        c.execute("CREATE TRIGGER wait BEFORE INSERT ON slow FOR EACH ROW EXECUTE FUNCTION wait()")
        with c.cursor() as cursor, cursor.copy("COPY slow FROM STDIN") as copy:
            for _ in range(20):
                copy.write("y" * 1_000_000 + "\n")
        assert c.execute("SELECT count(*), sum(length(a)) FROM slow").fetchone() == (20, 20_000_000)


@pytest.mark.parametrize("how", ["reset", "close", "shutdown"])
@pytest.mark.parametrize("when", ["idle", "reply", "transaction"])
def test_clients_that_go(database18: Database, either: RunningProxy, how: str, when: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whenever and however one goes, its server session ends, and no descriptor is left."""
    files = psutil.Process().num_fds()
    with warm(either, database18) as s:
        if when == "transaction":
            s.sendall(build.query(b"BEGIN"))
            read_until(s, Backend.READY_FOR_QUERY)
        elif when == "reply":
            s.sendall(build.query(b"SELECT repeat('x', 1000) FROM generate_series(1, 100000)"))
            s.recv(10)
        if how == "reset":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "shutdown":
            s.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while s.recv(1 << 20):
                    pass
    eventually(lambda: either.server.clients == 0 and backends(database18) == 0)
    eventually(lambda: psutil.Process().num_fds() <= files)
    assert serves(either, database18)
    assert "Traceback" not in capfd.readouterr().err


def test_servers_that_go(database18: Database, either: RunningProxy) -> None:
    files = psutil.Process().num_fds()
    with psycopg.connect(database18.cluster.dsn(), autocommit=True) as admin, warm(either, database18) as s:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database18.name])
        assert b"57P01" in read_until(s, Backend.ERROR_RESPONSE)[-1].payload
        while s.recv(65536):
            pass
    eventually(lambda: either.server.clients == 0)
    eventually(lambda: psutil.Process().num_fds() <= files)


def test_a_drain_takes_everything_back(database18: Database, either: RunningProxy) -> None:
    """Sessions between requests are dismissed; one in the middle of a long reply gets the rest of it first."""
    with warm(either, database18) as idle, warm(either, database18) as busy:
        busy.sendall(build.query(b"SELECT repeat('x', 1000000) FROM generate_series(1, 60)"))
        busy.recv(10, socket.MSG_PEEK)
        draining = threading.Thread(target=either.drain)
        draining.start()
        assert b"57P01" in read_until(idle, Backend.ERROR_RESPONSE)[-1].payload
        assert sum(f.type == ord("D") for f in read_until(busy, Backend.READY_FOR_QUERY)) == 60
        assert b"57P01" in read_until(busy, Backend.ERROR_RESPONSE)[-1].payload
        draining.join(30)
        assert not draining.is_alive()


@needs_compiler
def test_the_thread_has_what_is_plain_for_a_while(calls: list[bytes], database18: Database, proxied18: RunningProxy) -> None:
    """After a few plain requests; until there is something to be looked at; never where something may have to be told."""
    def plain(c: psycopg.Connection[tuple[object, ...]], times: int) -> None:
        for n in range(times):
            assert c.execute("SELECT %s::int", [n]).fetchone() == (n,)

    with psycopg.connect(proxied18.dsn(database18), autocommit=True, prepare_threshold=None) as c:
        plain(c, fastpath.CALM - 1)
        assert given(proxied18) == [False]
        plain(c, 1)
        eventually(lambda: given(proxied18) == [True])
        calls.clear()
        plain(c, 50)
        c.execute("BEGIN")
        plain(c, 3)
        assert (given(proxied18), calls) == ([True], [])
        # What it knows of the session is known to Python, too, when it comes back.
        with pytest.raises(psycopg.errors.DivisionByZero):
            c.execute("SELECT 1 / 0")
        assert proxied18.call(lambda: [s._status for s in proxied18.server._sessions]) == [ord("E")]
        assert given(proxied18) == [False]
        c.execute("ROLLBACK")
        plain(c, fastpath.CALM - 2)
        assert given(proxied18) == [False]
        plain(c, 1)
        eventually(lambda: given(proxied18) == [True])
        assert c.execute("SELECT df.one()").fetchone() == (1,)
        plain(c, 20)
        assert given(proxied18) == [False]


@needs_compiler
def test_who_is_dismissed_in_a_transaction_is_known_to_be(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """BEGIN has passed on the thread, unseen by Python; the drain leaves the transaction its time all the same."""
    monkeypatch.setattr(fastpath, "CALM", 1)
    with running_proxy(database18.dsn()) as proxy, warm(proxy, database18) as s:
        s.sendall(build.query(b"BEGIN"))
        read_until(s, READY)
        assert given(proxy) == [True]
        draining = threading.Thread(target=proxy.drain)
        draining.start()
        assert select.select([s], [], [], 1.5)[0] == []
        s.sendall(build.query(b"COMMIT"))
        assert ord("C") in [f.type for f in read_until(s, READY)]
        assert b"57P01" in read_until(s, Backend.ERROR_RESPONSE)[-1].payload
        draining.join(30)
        assert not draining.is_alive()


def test_many_sessions_at_once(database18: Database, either: RunningProxy) -> None:
    """Each does what comes to its mind, most of it plain, and gets its own answers."""
    def one(number: int) -> None:
        chance = random.Random(number)
        with psycopg.connect(either.dsn(database18), autocommit=True, prepare_threshold=None) as c:
            for n in range(300):
                match chance.choice(["plain"] * 12 + ["big", "error", "ours", "set", "pipeline", "notify", "copy"]):
                    case "plain":
                        assert c.execute("SELECT %s::int, %s::int", [number, n]).fetchone() == (number, n)
                    case "big":
                        size = chance.choice([100_000, 300_000, 2_000_000])
                        assert c.execute("SELECT %s::int, repeat('x', %s)", [n, size]).fetchone() == (n, "x" * size)
                    case "error":
                        with pytest.raises(psycopg.errors.DivisionByZero):
                            c.execute("SELECT 1 / 0")
                    case "ours" if number % 2:
                        assert c.execute("SELECT df.one(), %s::int", [n]).fetchone() == (1, n)
                    case "set":
                        c.execute(f"SET client_encoding = {chance.choice(['utf8', 'latin1'])}")
                        assert c.execute("SELECT 'é'").fetchone() == ("é",)
                    case "pipeline":
                        with c.pipeline():
                            cursors = [c.execute("SELECT %s::int", [i]) for i in range(5)]
                        assert [cursor.fetchone() for cursor in cursors] == [(i,) for i in range(5)]
                    case "notify":
                        c.execute(f"LISTEN n{number}")
                        c.execute(f"NOTIFY n{number}")
                        assert len(list(c.notifies(timeout=30, stop_after=1))) == 1
                    case "copy":
                        with c.cursor() as cursor, cursor.copy("COPY (SELECT generate_series(1, 1000)) TO STDOUT") as copy:
                            assert sum(1 for _ in copy.rows()) == 1000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(16)))
    eventually(lambda: either.server.clients == 0)


@needs_compiler
def test_without_descriptors_python_does_it(database18: Database, proxied18: RunningProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(fd: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", none_left)
    with psycopg.connect(proxied18.dsn(database18), autocommit=True) as c:
        assert c.execute("SELECT 1").fetchone() == (1,)
        assert proxied18.call(lambda: [s._exchange for s in proxied18.server._sessions]) == [None]


@needs_compiler
def test_a_bug_ends_one_session(
    database18: Database, proxied18: RunningProxy, monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Session._from_client

    def broken(self: Session, data: bytes) -> None:
        if b"boom" in data:
            raise RuntimeError("a bug")
        original(self, data)

    monkeypatch.setattr(Session, "_from_client", broken)
    with start(proxied18, database18) as s, psycopg.connect(proxied18.dsn(database18), autocommit=True) as other:
        s.sendall(build.query(b"SELECT 'boom df.'") * 2)
        with contextlib.suppress(ConnectionResetError):
            assert s.recv(100) == b""
        assert other.execute("SELECT 1").fetchone() == (1,)
