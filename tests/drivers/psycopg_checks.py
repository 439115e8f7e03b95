"""What psycopg must do, as a program: PSYCOPG_IMPL chooses the implementation, which one process can load once.

`python -m tests.drivers.psycopg_checks URI` prints the implementation and the name of each check that passed.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import ipaddress
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import errors, pq, sql
from psycopg.rows import dict_row, namedtuple_row
from psycopg.types.json import Jsonb
from psycopg.types.range import Range

CHECKS: list[Callable[[str], None]] = []


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    CHECKS.append(function)
    return function


def connect(uri: str, **arguments: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(uri, **{"autocommit": True, **arguments})


@check
def connects(uri: str) -> None:
    with connect(uri, application_name="checks") as c:
        assert c.execute("SELECT current_setting('application_name')").fetchone() == ("checks",)
        assert c.info.parameter_status("client_encoding") == "UTF8"
        assert c.info.server_version >= 150000
        assert c.info.backend_pid == c.execute("SELECT pg_backend_pid()").fetchone()[0]  # type: ignore[index]


@check
def types_make_the_round_trip(uri: str) -> None:
    values: list[tuple[str, Any]] = [
        ("int", None), ("bool", True), ("int", 1), ("int8", 2**40), ("int8", -(2**62)), ("float8", 1.5), ("float8", float("inf")),
        ("numeric", decimal.Decimal("1234567890.0123456789")), ("text", "text ü € 😀"), ("text", ""), ("bytea", b"\0\xff"), ("date", dt.date(2024, 2, 29)),
        ("time", dt.time(1, 2, 3, 4)), ("timestamp", dt.datetime(2024, 2, 29, 1, 2, 3)), ("timestamptz", dt.datetime(2024, 2, 29, tzinfo=dt.UTC)),
        ("interval", dt.timedelta(days=3, seconds=4)), ("uuid", uuid.UUID(int=5)), ("int[]", [1, 2, None]), ("text[]", ["a", "b,c"]),
        ("jsonb", Jsonb({"a": [1, None]})), ("int4range", Range(1, 5)), ("inet", ipaddress.ip_address("10.0.0.1")),
    ]  # fmt: skip
    with connect(uri) as c:
        for binary_in in ("%s", "%b", "%t"):
            for binary_out in (False, True):
                for type_, value in values:
                    got = c.execute(f"SELECT {binary_in}::{type_}", (value,), binary=binary_out).fetchone()  # type: ignore[arg-type]
                    assert got is not None
                    expected = value.obj if isinstance(value, Jsonb) else value
                    assert got[0] == expected, (binary_in, binary_out, value, got)


@check
def transactions(uri: str) -> None:
    with connect(uri, autocommit=False) as c:
        c.execute("CREATE TABLE t (n int)")
        c.commit()
        assert c.info.transaction_status == pq.TransactionStatus.IDLE
        with c.transaction():
            c.execute("INSERT INTO t VALUES (1)")
            assert c.info.transaction_status == pq.TransactionStatus.INTRANS
            with pytest.raises(errors.DivisionByZero), c.transaction():
                c.execute("INSERT INTO t VALUES (2)")
                c.execute("SELECT 1/0")
            c.execute("INSERT INTO t VALUES (3)")
        c.rollback()
        assert c.execute("SELECT n FROM t ORDER BY n").fetchall() == [(1,), (3,)]
        c.rollback()
        c.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        c.read_only = True
        assert c.execute("SHOW transaction_isolation").fetchone() == ("serializable",)
        with pytest.raises(errors.ReadOnlySqlTransaction):
            c.execute("INSERT INTO t VALUES (4)")
        assert c.info.transaction_status == pq.TransactionStatus.INERROR
        c.rollback()


@check
def two_phase_commit_is_refused_alike(uri: str) -> None:
    c = connect(uri, autocommit=False)
    c.tpc_begin(c.xid(1, "global", "branch"))
    c.execute("SELECT 1")
    with pytest.raises(psycopg.NotSupportedError, match="disabled"):  # max_prepared_transactions is 0
        c.tpc_prepare()
    c.close()


@check
def prepared_statements(uri: str) -> None:
    with connect(uri, prepare_threshold=2) as c:
        for n in range(10):
            assert c.execute("SELECT %s::int + 1", (n,)).fetchone() == (n + 1,)
        names = c.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
        assert names is not None
        assert names[0] >= 1
        c.execute("SELECT %s::text", ("x",), prepare=True)
        c.execute("DEALLOCATE ALL")
        c.execute("CREATE TABLE p (a int)")
        for _ in range(4):
            c.execute("SELECT * FROM p")
        with connect(uri) as other:  # the same connection would know, and prepare anew
            other.execute("ALTER TABLE p ADD COLUMN b int")
        with pytest.raises(errors.FeatureNotSupported, match="cached plan"):
            c.execute("SELECT * FROM p")


@check
def pipelines(uri: str) -> None:
    with connect(uri) as c:
        with c.pipeline() as p:
            cursors = [c.execute("SELECT %s::int", (n,)) for n in range(300)]
            p.sync()
            assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(300)]
        with pytest.raises(errors.DivisionByZero), c.pipeline():
            c.execute("SELECT 1")
            failed = c.execute("SELECT 1/0")
            c.execute("SELECT 3")
            failed.fetchone()
        with c.pipeline():
            c.execute("CREATE TABLE pp (n int)")
            c.cursor().executemany("INSERT INTO pp VALUES (%s)", [(n,) for n in range(500)])
        assert c.execute("SELECT count(*) FROM pp").fetchone() == (500,)


@check
def cursors(uri: str) -> None:
    with connect(uri, autocommit=False) as c:
        with c.cursor("server_side", scrollable=True) as cursor:
            cursor.itersize = 7
            cursor.execute("SELECT generate_series(1, 50)")
            assert [n for (n,) in cursor] == list(range(1, 51))
            cursor.scroll(-50)
            assert len(cursor.fetchmany(3)) == 3
        with c.cursor(row_factory=dict_row) as cursor:
            assert cursor.execute("SELECT 1 AS a, 2 AS b").fetchone() == {"a": 1, "b": 2}
        with c.cursor(row_factory=namedtuple_row) as cursor:
            assert cursor.execute("SELECT 1 AS a").fetchall()[0] == (1,)
        with c.cursor() as cursor:
            cursor.execute("SELECT 1; SELECT 2, 3")
            assert cursor.fetchall() == [(1,)]
            assert cursor.nextset()
            assert cursor.fetchall() == [(2, 3)]
            assert [d.name for d in cursor.description or ()] == ["?column?", "?column?"]
            assert list(cursor.stream("SELECT generate_series(1, 100)")) == [(n,) for n in range(1, 101)]


@check
def copy(uri: str) -> None:
    with connect(uri) as c, c.cursor() as cursor:
        cursor.execute("CREATE TABLE cp (n int, v text)")
        with cursor.copy("COPY cp FROM STDIN") as writing:
            for n in range(5000):
                writing.write_row((n, f"value\t{n}\\" if n % 2 else None))
        assert cursor.rowcount == 5000
        with cursor.copy("COPY (SELECT n, v FROM cp ORDER BY n) TO STDOUT") as reading:
            reading.set_types(["int4", "text"])
            rows = list(reading.rows())
        assert rows == [(n, f"value\t{n}\\" if n % 2 else None) for n in range(5000)]
        with cursor.copy("COPY cp FROM STDIN (FORMAT binary)") as writing:
            writing.set_types(["int4", "text"])
            writing.write_row((7, "binary"))
        with pytest.raises(errors.InvalidTextRepresentation) as e, cursor.copy("COPY cp FROM STDIN") as writing:
            writing.write("x\ty\n")
        assert e.value.diag.context is not None
        assert "COPY cp, line 1" in e.value.diag.context
        with pytest.raises(KeyError), cursor.copy("COPY cp FROM STDIN") as writing:
            writing.write_row((1, "x"))
            raise KeyError("the client's own")
        assert cursor.execute("SELECT count(*) FROM cp").fetchone() == (5001,)


@check
def notifications(uri: str) -> None:
    with connect(uri) as listener, connect(uri) as teller:
        listener.execute("LISTEN news")
        for n in range(3):
            teller.execute("SELECT pg_notify('news', %s)", (f"{n} ü",))
        got = list(listener.notifies(timeout=20, stop_after=3))
        assert [(n.channel, n.payload, n.pid) for n in got] == [("news", f"{k} ü", teller.info.backend_pid) for k in range(3)]


@check
def notices(uri: str) -> None:
    with connect(uri) as c:
        seen: list[tuple[str | None, str | None]] = []
        c.add_notice_handler(lambda d: seen.append((d.severity, d.message_primary)))
        c.execute("DO $$ BEGIN RAISE NOTICE 'n %', 1; RAISE WARNING 'w'; END $$")
        assert seen == [("NOTICE", "n 1"), ("WARNING", "w")]


def when_asleep(uri: str, pid: int) -> None:
    """Returns when the session's backend executes pg_sleep."""
    with connect(uri) as c:
        while c.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'", (pid,)).fetchone() is None:
            time.sleep(0.01)


@check
def cancelling(uri: str) -> None:
    with connect(uri) as c:
        pid = c.info.backend_pid
        for cancel in (c.cancel, c.cancel_safe):

            def when_it_runs(cancel: Callable[[], None] = cancel) -> None:
                when_asleep(uri, pid)
                cancel()

            other = threading.Thread(target=when_it_runs)
            other.start()
            with pytest.raises(errors.QueryCanceled):
                c.execute("SELECT pg_sleep(60)")
            other.join()
            assert c.execute("SELECT 1").fetchone() == (1,)


@check
def error_fields(uri: str) -> None:
    with connect(uri) as c:
        c.execute("CREATE TABLE e (id int PRIMARY KEY CHECK (id < 100), v text NOT NULL)")
        c.execute("INSERT INTO e VALUES (1, 'x')")
        for statement, state, field, value in (
            ("INSERT INTO e VALUES (1, 'y')", "23505", "constraint_name", "e_pkey"),
            ("INSERT INTO e VALUES (100, 'y')", "23514", "table_name", "e"),
            ("INSERT INTO e VALUES (2, NULL)", "23502", "column_name", "v"),
            ("SELECT nosuch FROM e", "42703", "statement_position", "8"),
            ("SELEC 1", "42601", "statement_position", "1"),
        ):
            with pytest.raises(psycopg.Error) as e:
                c.execute(statement)
            assert e.value.sqlstate == state
            assert getattr(e.value.diag, field) == value
        assert c.execute(sql.SQL("SELECT {}").format(sql.Literal("it's"))).fetchone() == ("it's",)


@check
def encodings(uri: str) -> None:
    with connect(uri, client_encoding="latin1") as c:
        assert c.execute("SELECT 'Größe', length('Größe'), convert_to(%s, 'UTF8')", ("ü",)).fetchone() == ("Größe", 5, "ü".encode())
        with pytest.raises(errors.UntranslatableCharacter):
            c.execute("SELECT chr(8364)")


@check
def a_lost_session(uri: str) -> None:
    with connect(uri) as admin, connect(uri) as c:
        admin.execute("SELECT pg_terminate_backend(%s)", (c.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            while True:
                c.execute("SELECT 1")
        assert c.closed


@check
def asynchronously(uri: str) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(uri, autocommit=True) as c:
            async with c.pipeline():
                all_ = [await c.execute("SELECT %s::int", (n,)) for n in range(50)]
                assert [await cursor.fetchone() for cursor in all_] == [(n,) for n in range(50)]
            task = asyncio.create_task(c.execute("SELECT pg_sleep(60)"))
            await asyncio.to_thread(when_asleep, uri, c.info.backend_pid)
            task.cancel()
            with pytest.raises((asyncio.CancelledError, errors.QueryCanceled)):
                await task
            cursor = await c.execute("SELECT 1")
            assert await cursor.fetchone() == (1,)

    asyncio.run(main())


@check
def low_level(uri: str) -> None:
    """libpq itself: single-row and chunked mode, describe, a trace of what a driver rarely does."""
    with connect(uri) as c:
        raw = c.pgconn
        assert raw.exec_(b"SELECT 1").get_value(0, 0) == b"1"
        assert raw.prepare(b"s", b"SELECT $1::int, $2::text").status == pq.ExecStatus.COMMAND_OK
        described = raw.describe_prepared(b"s")
        assert [described.param_type(n) for n in range(2)] == [23, 25]
        assert raw.exec_prepared(b"s", [b"1", None]).get_value(0, 1) is None
        assert raw.exec_(b"").status == pq.ExecStatus.EMPTY_QUERY
        raw.send_query(b"SELECT generate_series(1, 5)")
        raw.set_single_row_mode()
        count = 0
        while (result := raw.get_result()) is not None:
            count += result.status == pq.ExecStatus.SINGLE_TUPLE
        assert count == 5


def main(uri: str) -> None:
    print(pq.__impl__)
    with connect(uri) as c:
        for function in CHECKS:
            c.execute("DROP SCHEMA scratch CASCADE; CREATE SCHEMA scratch")
            function(uri)
            print("passed", function.__name__)


if __name__ == "__main__":
    main(sys.argv[1])
