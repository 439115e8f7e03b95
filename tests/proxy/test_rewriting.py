"""Statements that mention df: what the server gets, where its errors point, and when the engine is woken."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import psycopg
import pytest

from engine import migrate
from proxy.rewriter import CACHE_LIMIT, INLINE_LIMIT, Dialect, Rewriter
from proxy.session import Session
from proxy.wire import backend, build
from proxy.wire.frames import Frame, FrameParser
from proxy.wire.messages import Backend, TransactionStatus
from proxy.wire.plain import SYNC, bound_alone, plain_request
from tests.fix_postgres import Database
from tests.proxy.proxies import REFUSED, RunningProxy, compile_stub, mentions_stub, running_proxy
from tests.proxy.test_adversity import eventually


@pytest.fixture
def connection(database18: Database, proxied18: RunningProxy) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(proxied18.dsn(database18), autocommit=True) as c:
        yield c


class Wire:
    """A session that sends what it is told, message by message."""

    def __init__(self, proxy: RunningProxy, database: Database, **parameters: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=30)
        self.parser = FrameParser()
        self.send(build.startup({"user": database.owner, "database": database.name, **parameters}))
        self.until_ready()

    def send(self, *messages: bytes) -> None:
        self.socket.sendall(b"".join(messages))

    def until_ready(self, times: int = 1) -> list[Frame]:
        got: list[Frame] = []
        while True:
            while (frame := self.parser.next_frame()) is not None:
                got.append(frame)
                times -= frame.type == Backend.READY_FOR_QUERY
                if times == 0:
                    return got
            data = self.socket.recv(65536)
            assert data, f"closed after {got}"
            self.parser.feed(data)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def positions(frames: list[Frame]) -> list[str | None]:
    messages = (Backend.ERROR_RESPONSE, Backend.NOTICE_RESPONSE)
    return [backend.error_fields(f.payload).get("P") for f in frames if f.type in messages]


# --- what is sent ---


def test_simple_and_extended(connection: psycopg.Connection[Any]) -> None:
    assert connection.execute("SELECT df.one(), df.text()").fetchone() == (1, "in the place of df.text()")
    assert connection.execute("SELECT df.one() + %s", (41,)).fetchone() == (42,)
    for _ in range(10):
        assert connection.execute("SELECT df.one() + %s", (41,), prepare=True).fetchone() == (42,)
    cursor = connection.execute("SELECT df.one(); SELECT 2; SELECT df.text()")
    assert cursor.fetchall() == [(1,)]


async def test_prepared_by_asyncpg(database18: Database, proxied18: RunningProxy) -> None:
    c = await asyncpg.connect(proxied18.dsn(database18))
    try:
        assert await c.fetchval("SELECT df.text() || $1", "!") == "in the place of df.text()!"
    finally:
        await c.close()


def test_what_the_compiler_leaves_alone_and_what_it_stumbles_over_goes_on_as_it_came(
    connection: psycopg.Connection[Any],
) -> None:
    assert connection.execute("SELECT 'df.unknown'").fetchone() == ("df.unknown",)
    assert connection.execute("SELECT 'df.bug()'").fetchone() == ("df.bug()",)
    assert connection.execute("SELECT 'df.bug()', %s", (1,)).fetchone() == ("df.bug()", 1)


@pytest.mark.parametrize("size", [10, CACHE_LIMIT, INLINE_LIMIT + 1, 3_000_000])
def test_statements_of_any_size(database18: Database, proxied18: RunningProxy, size: int) -> None:
    filler = "x" * size
    with Wire(proxied18, database18) as wire:
        # A pipeline: what follows a large statement waits for it, and nothing overtakes.
        for n in range(4):
            wire.send(build.query(f"SELECT df.one() + {n} /* {filler} */"), build.query(f"SELECT {n}"))
        rows = [f.payload[6:] for f in wire.until_ready(8) if f.type == Backend.DATA_ROW]
        assert rows == [b"1", b"0", b"2", b"1", b"3", b"2", b"4", b"3"]
        wire.send(build.parse("", f"SELECT df.one() /* {filler} */"), build.bind("", ""), build.execute(), build.sync())
        assert [f.payload[6:] for f in wire.until_ready() if f.type == Backend.DATA_ROW] == [b"1"]


def test_statements_beyond_the_limit_pass_untouched(database18: Database) -> None:
    with running_proxy(database18.dsn(), max_rewrite=1000) as proxy, psycopg.connect(proxy.dsn(database18)) as c:
        assert c.execute("SELECT df.one()").fetchone() == (1,)
        assert c.execute(f"SELECT 'df.one()' /* {'x' * 1000} */").fetchone() == ("df.one()",)
        assert c.execute(f"SELECT 'df.one()', %s /* {'x' * 1000} */", (1,)).fetchone() == ("df.one()", 1)


def test_client_encodings(database18: Database, proxied18: RunningProxy) -> None:
    for encoding, text in (("LATIN1", "é"), ("WIN1251", "ж"), ("SJIS", "表"), ("EUC_JP", "日本"), ("UTF8", "😀")):
        with psycopg.connect(proxied18.dsn(database18), autocommit=True, client_encoding=encoding) as c:
            assert c.execute(f"SELECT '{text}', df.text(), '{text}'").fetchone() == (
                text, "in the place of df.text()", text
            )
            with pytest.raises(psycopg.errors.UndefinedColumn) as caught:
                c.execute(f"SELECT '{text}', df.text(), '{text}', nope")
            assert caught.value.diag.statement_position == str(len(f"SELECT '{text}', df.text(), '{text}', ") + 1)


def test_a_session_may_change_its_encoding(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SET client_encoding = 'LATIN1'")
    assert connection.execute("SELECT 'é', df.one()").fetchone() == ("é", 1)


def test_standard_conforming_strings_are_told_to_the_compiler(database18: Database) -> None:
    told: list[bool] = []

    def compile_(sql: str, *, standard_conforming_strings: bool) -> None:
        told.append(standard_conforming_strings)

    rewriter = Rewriter(mentions=mentions_stub, compile_=compile_)
    with running_proxy(database18.dsn(), rewriter=rewriter) as proxy, psycopg.connect(proxy.dsn(database18)) as c:
        c.execute("SELECT 'df.'")
        c.execute("SET standard_conforming_strings = off")
        c.execute("SELECT 'df.'")
        c.rollback()
        c.execute("SELECT 'df. '")
    assert told == [True, False, True]


def test_each_text_is_compiled_once() -> None:
    seen: list[str] = []

    def compile_(sql: str, *, standard_conforming_strings: bool) -> None:
        seen.append(sql)

    rewriter = Rewriter(mentions=mentions_stub, compile_=compile_)
    for _ in range(3):
        rewriter.rewrite(b"SELECT df.a", Dialect())
        rewriter.rewrite(b"SELECT df.a", Dialect("cp1252"))
        assert rewriter.rewrite(b"SELECT 1", Dialect()) is None
    assert len(seen) == 2
    rewriter.close()


@pytest.mark.parametrize(
    ("statement", "codec"),
    [(b"SELECT df.one(), '\xff'", "utf_8"), (b"SELECT df.one()", None), (b"SELECT df.one() \xfa\x54", "cp932")],
)
def test_statements_that_cannot_be_read_exactly_are_left_alone(statement: bytes, codec: str | None) -> None:
    rewriter = Rewriter(mentions=mentions_stub, compile_=compile_stub)
    rewritten = rewriter.rewrite(statement, Dialect(codec))
    assert rewritten is not None
    assert rewritten.text is None
    rewriter.close()


def test_what_the_compiler_adds_fits_every_encoding() -> None:
    class Smile:
        sql = "SELECT '\u263a'"

        def source_position(self, position: int) -> int:
            return position

    rewriter = Rewriter(mentions=mentions_stub, compile_=lambda sql, *, standard_conforming_strings: Smile())
    rewritten = rewriter.rewrite(b"df.x", Dialect("iso8859_1"))
    assert rewritten is not None
    assert rewritten.text == b"SELECT '?'"
    rewriter.close()


# --- where errors point ---


def test_positions_are_those_of_the_text_that_the_client_sent(connection: psycopg.Connection[Any]) -> None:
    for statement in (
        "SELECT df.one(), df.text(), nope",
        "SELECT nope, df.one()",
        "SELECT df.one(),\n       df.text(),\n    'ü', nope, df.one()",
        "SELECT 1; SELECT df.one(), df.text(), nope",
    ):
        with pytest.raises(psycopg.errors.UndefinedColumn) as caught:
            connection.execute(statement)
        assert caught.value.diag.statement_position == str(statement.index("nope") + 1), statement


def test_positions_in_the_extended_protocol(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.UndefinedColumn) as caught:
        connection.execute("SELECT df.text(), %s, nope", (1,))
    assert caught.value.diag.statement_position == str("SELECT df.text(), $1, nope".index("nope") + 1)


def test_each_error_is_mapped_by_its_own_statement(database18: Database, proxied18: RunningProxy) -> None:
    with Wire(proxied18, database18) as wire:
        wire.send(
            build.query("SELECT nope"),  # 8, not rewritten
            build.query("SELECT df.text(), nope"),  # 19
            build.query("SELECT 1"),
            build.parse("", "SELECT df.one(), nope"),  # 18
            build.bind("", ""),
            build.execute(),
            build.sync(),
            build.parse("", "SELECT 'no df', nope"),  # 17, not rewritten
            build.sync(),
            build.parse("", "SELECT df.one(), df.one(), $1::int, nope"),  # 37
            build.describe_statement(""),
            build.sync(),
            build.query("SELECT nope"),  # 8
        )
        assert positions(wire.until_ready(7)) == ["8", "19", "18", "17", "37", "8"]


def test_a_prepared_statement_may_fail_later(database18: Database, proxied18: RunningProxy) -> None:
    with Wire(proxied18, database18) as wire:
        wire.send(build.query("CREATE TEMP TABLE t (a int)"))
        statement = "SELECT df.text(), a FROM t"
        wire.send(build.parse("s", statement), build.sync())
        assert positions(wire.until_ready(2)) == []
        # Bind analyses the statement again, and finds a column that is no longer there.
        wire.send(build.query("ALTER TABLE t RENAME a TO b"), build.bind("", "s"), build.execute(), build.sync())
        assert positions(wire.until_ready(2)) == [str(statement.index("a FROM") + 1)]
        wire.send(build.close_statement("s"), build.parse("s", "SELECT a FROM t"), build.sync())
        assert positions(wire.until_ready()) == ["8"]


def test_the_private_marker_becomes_a_position(connection: psycopg.Connection[Any]) -> None:
    for statement in (f"SELECT {REFUSED}", f"SELECT 'ü' || 1, {REFUSED}"):
        with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
            connection.execute(statement)
        diagnosis = caught.value.diag
        assert diagnosis.statement_position == str(statement.index(REFUSED) + 1)
        assert (diagnosis.message_primary, diagnosis.message_hint) == ("df.refused() is refused", "leave it")
        assert diagnosis.constraint_name is diagnosis.context is diagnosis.source_file is diagnosis.source_line is None
        assert diagnosis.source_function is None


def test_the_marker_of_a_function_that_was_compiled_earlier_points_nowhere(connection: psycopg.Connection[Any]) -> None:
    raised: list[list[str | None]] = []  # a notice lives only as long as its handler

    def heard(notice: psycopg.errors.Diagnostic) -> None:
        raised.append(
            [notice.message_primary, notice.constraint_name, notice.statement_position, notice.context, notice.source_file]
        )

    connection.add_notice_handler(heard)
    connection.execute(
        "DO $$ BEGIN RAISE WARNING 'read me' USING CONSTRAINT = 'dfproxy:position=7'; END $$"
    )
    assert raised == [["read me", None, None, None, None]]


def test_constraint_names_of_others_stay(connection: psycopg.Connection[Any]) -> None:
    connection.execute('CREATE TABLE t (a int CONSTRAINT "see dfproxy:position=7" CHECK (a > 0))')
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        connection.execute("INSERT INTO t VALUES (0)")
    assert caught.value.diag.constraint_name == "see dfproxy:position=7"
    assert caught.value.diag.source_function


# --- when the engine is woken ---


@pytest.mark.parametrize(("statement", "looks"), [
    ("SELECT df.result('0a0b0c0d')", True), ("SELECT DF . Status($1)", False), ("SELECT DF .status($1), df.result($2)", True),
    ("SELECT * FROM df.instances", True), ("SELECT df.start('SELECT 1')", False), ("SELECT df.result(df.start('SELECT 1'))", False),
    ("SELECT df.result('a' ~> 'b')", False), ('SELECT df."result"(\'a\')', False), ("SELECT df.results('a')", False),
    ("SELECT df.signal('a', 'b')", False), ("SELECT '~>'", False), ("DELETE FROM df . instances", False),
])
def test_what_only_looks_at_workflows(statement: str, looks: bool) -> None:
    rewritten = Rewriter().rewrite(statement.encode(), Dialect())
    assert rewritten is not None
    assert rewritten.looks is looks


def test_a_commit_after_a_mention_wakes(database18: Database, proxied18: RunningProxy) -> None:
    def woken() -> int:
        n = len(proxied18.commits)
        proxied18.commits.clear()
        return n

    with psycopg.connect(proxied18.dsn(database18), autocommit=True) as c:
        c.execute("SELECT 1")
        assert woken() == 0
        c.execute("SELECT df.one()")
        assert woken() == 1
        c.execute("SELECT 1")
        assert woken() == 0
        c.execute("SELECT 'df.nothing to compile'")
        assert woken() == 1
        # Clients that wait for a workflow ask again and again: worth a look now and then.
        for n in range(3):
            proxied18.guessed.clear()
            c.execute("SELECT 'df.result()', %s", (n,), prepare=n > 0)
            assert (woken(), bool(proxied18.guessed)) == (0, True)
        c.execute("SELECT 'df.result()', 'df.start()'")
        assert woken() == 1
        with c.transaction():
            c.execute("SELECT df.one() + %s", (1,))
            c.execute("SELECT 1")
            assert woken() == 0
        assert woken() == 1
        for n in range(3):
            c.execute("SELECT df.one() + %s", (n,), prepare=True)
            assert woken() == 1
        with c.pipeline():
            c.execute("SELECT df.one() + %s", (1,), prepare=True)
            c.execute("SELECT 2")
        assert woken() >= 1


def test_a_wake_up_is_not_lost_to_an_earlier_reply(database18: Database, proxied18: RunningProxy) -> None:
    with Wire(proxied18, database18) as wire, psycopg.connect(database18.dsn(), autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(1)")
        # The reply to the first statement says idle while the second, which matters, still waits.
        wire.send(build.query("SELECT 1"), build.query("SELECT df.one(), pg_advisory_lock(1)"), build.query("SELECT 2"))
        frames = wire.until_ready(1)
        assert frames[-1].payload[0] == TransactionStatus.IDLE
        assert proxied18.commits == []
        other.execute("SELECT pg_advisory_unlock(1)")
        wire.until_ready(2)
        assert len(proxied18.commits) == 1


def test_executing_a_prepared_statement_that_mentions_df_wakes(database18: Database, proxied18: RunningProxy) -> None:
    with Wire(proxied18, database18) as wire:
        wire.send(build.parse("s", "SELECT df.one()"), build.parse("o", "SELECT 1"), build.sync())
        wire.until_ready()
        assert proxied18.commits == []
        wire.send(build.bind("", "o"), build.execute(), build.sync())
        wire.until_ready()
        assert proxied18.commits == []
        wire.send(build.bind("p", "s"), build.execute("p"), build.sync())
        wire.until_ready()
        assert len(proxied18.commits) == 1


def alone(statement: str, *parameters: str) -> bytes:
    """What drivers send to execute a prepared statement."""
    return build.bind("", statement, [p.encode() for p in parameters]) + build.describe_portal("") + build.execute() + build.sync()


def test_what_is_about_one_prepared_statement_is_sent_on_in_one_piece(
    database18: Database, proxied18: RunningProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is known for what it is: errors point where they should, what is committed wakes."""
    looked: list[int] = []
    forward = Session._forward

    def counted(self: Session, items: Iterator[Any]) -> None:
        looked.append(1)
        forward(self, items)

    monkeypatch.setattr(Session, "_forward", counted)

    def done() -> tuple[int, int]:
        found = len(looked), len(proxied18.commits)
        looked.clear()
        proxied18.commits.clear()
        return found

    with Wire(proxied18, database18) as wire:
        statement = "SELECT df.text(), a FROM t"
        wire.send(build.query("CREATE TEMP TABLE t (a int)"))
        wire.until_ready()
        wire.send(build.parse("s", "SELECT df.one() / $1::int"), build.parse("o", "SELECT 1 / $1::int"), build.parse("t", statement),
                  build.sync())
        assert positions(wire.until_ready()) == []
        done()
        for name, commits in (("s", 1), ("o", 0), ("s", 1)):
            wire.send(alone(name, "1"))
            assert [f.type for f in wire.until_ready()] == list(b"2TDCZ")
            assert done() == (0, commits)
            wire.send(alone(name, "0"))
            assert [f.type for f in wire.until_ready()][-2:] == list(b"EZ")
            assert done() == (0, 0)
        wire.send(build.query("ALTER TABLE t RENAME a TO b"))
        wire.until_ready()
        wire.send(alone("t"))
        assert positions(wire.until_ready()) == [str(statement.index("a FROM") + 1)]
        assert done() == (0, 0)
        # The portal outlives its batch in a transaction.
        wire.send(build.query("BEGIN"))
        wire.until_ready()
        wire.send(build.bind("", "s", [b"1"]), build.sync())
        wire.until_ready()
        wire.send(build.execute(), build.sync())
        wire.until_ready()
        assert done()[1] == 0
        wire.send(build.query("COMMIT"))
        wire.until_ready()
        assert done()[1] == 1


@pytest.mark.parametrize(("batch", "name"), [
    (alone("s"), b"s"), (alone(""), b""), (alone("s", "1", "\0"), b"s"),
    (build.bind("", "s") + build.flush() + build.execute("", 5) + build.execute() + build.sync(), b"s"),
    (build.bind("", "s") + build.sync(), b"s"),
    (build.bind("p", "s") + build.execute("p") + build.sync(), None),
    (build.bind("", "s") + build.execute("p") + build.sync(), None),
    (build.bind("", "s") + build.describe_statement("s") + build.execute() + build.sync(), None),
    (build.bind("", "s") + build.describe_portal("p") + build.execute() + build.sync(), None),
    (build.parse("s", "SELECT 1") + build.bind("", "s") + build.execute() + build.sync(), None),
    (build.bind("", "s") + build.execute() + build.bind("", "t") + build.execute() + build.sync(), None),
    (build.bind("", "s") + build.execute() + build.close_statement("s") + build.sync(), None),
    (build.execute() + build.sync(), None), (build.sync(), None),
    (build.message(ord("B"), b"") + build.sync(), None), (build.message(ord("B"), b"\0s") + build.sync(), None),
    (build.bind("", "s") + build.message(ord("E"), b"") + build.sync(), None),
    (build.bind("", "s") + build.message(ord("D"), b"") + build.sync(), None),
])
def test_which_statement_a_batch_is_about(batch: bytes, name: bytes | None) -> None:
    assert plain_request(batch) == SYNC
    assert bound_alone(batch) == name


def test_a_session_that_has_mentioned_df_wakes_now_and_then(database18: Database) -> None:
    with running_proxy(database18.dsn(), guesses=True) as proxy, Wire(proxy, database18) as wire:
        for _ in range(20):
            wire.send(build.query("SELECT 1"))
            wire.until_ready()
        assert proxy.commits == []  # nothing here has ever to do with workflows
        wire.send(build.query("PREPARE p AS SELECT df.one()"))
        wire.until_ready()
        eventually(lambda: len(proxy.commits) == 1)
        wire.send(build.query("EXECUTE p"))
        wire.until_ready()
        eventually(lambda: len(proxy.commits) == 2)
        # Not within a transaction, which nobody else can see, and not for each of many.
        wire.send(build.query("BEGIN"), build.query("EXECUTE p"))
        wire.until_ready(2)
        seen, began = len(proxy.commits), time.monotonic()
        time.sleep(0.3)
        assert len(proxy.commits) == seen
        began = time.monotonic()
        for _ in range(200):
            wire.send(build.query("COMMIT; EXECUTE p"))
            wire.until_ready()
        eventually(lambda: len(proxy.commits) > seen)
        assert len(proxy.commits) - seen <= (time.monotonic() - began) / 0.1 + 2


# --- with the real compiler: what functions raise that were compiled when they were created ---


def test_warnings_from_within_functions(database18: Database) -> None:
    asyncio.run(migrate.migrate(database18.dsn()))
    with running_proxy(database18.dsn(), rewriter=Rewriter()) as proxy, psycopg.connect(
            proxy.dsn(database18), autocommit=True) as c:
        heard: list[tuple[str, str | None, str | None]] = []
        c.add_notice_handler(lambda n: heard.append(
            (str(n.message_primary)[:12], n.statement_position, n.context)))
        surprising = "'SELECT 1' ~> 'SELECT 2' & 'SELECT 3'"
        c.execute(f"SELECT {surprising}")
        assert heard == [('"&" after "~', str(len("SELECT 'SELECT 1' ~> 'SELECT 2' &")), None)]
        heard.clear()

        c.execute(f"CREATE FUNCTION f(n int) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN {surprising} || n; END $$")
        assert heard == []
        for call in ("SELECT f(1)", f"SELECT f(1), {surprising}"):
            c.execute(call)
        nested = [h for h in heard if h[2] is not None]
        assert {h[1] for h in nested} == {None}
        assert all("function f(integer) line 1 at RETURN" in str(h[2]) for h in nested)
        assert len(nested) >= 2
        assert [h[1] for h in heard if h[2] is None] == [str(len("SELECT f(1), 'SELECT 1' ~> 'SELECT 2' &"))]
        heard.clear()

        do = f"DO $$ BEGIN\n PERFORM {surprising}; END $$"
        c.execute(do)
        assert {h[1] for h in heard} == {str(do.index("&") + 1)}
        assert all("inline_code_block line 2" in str(h[2]) for h in heard)
