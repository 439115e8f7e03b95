"""pg8000: a driver in Python alone, which uses the unnamed statement and text formats."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import uuid
from collections.abc import Iterator

import pg8000.dbapi
import pg8000.native
import pytest

from tests.drivers.conftest import Endpoint


@pytest.fixture
def native(endpoint: Endpoint) -> Iterator[pg8000.native.Connection]:
    c = pg8000.native.Connection(endpoint.user, host=endpoint.host, port=endpoint.port, database=endpoint.database, timeout=30)
    yield c
    c.close()


def test_types(native: pg8000.native.Connection) -> None:
    for type_, value in (
        ("int", 5), ("int8", 2**60), ("float8", 1.5), ("numeric", decimal.Decimal("-1.50")), ("bool", True), ("text", "ü € 😀"), ("bytea", b"\0\xff"),
        ("date", dt.date(2024, 2, 29)), ("timestamp", dt.datetime(2024, 2, 29, 1)), ("timestamptz", dt.datetime(2024, 2, 29, tzinfo=dt.UTC)),
        ("uuid", uuid.UUID(int=7)), ("jsonb", {"a": [1, None]}), ("int[]", [1, None, 3]), ("text[]", ["a", "b,c"]), ("int", None),
    ):  # fmt: skip
        assert native.run(f"SELECT CAST(:v AS {type_})", v=value) == [[value]]


def test_transactions_and_errors(native: pg8000.native.Connection) -> None:
    native.run("CREATE TABLE t (n int PRIMARY KEY)")
    native.run("BEGIN")
    native.run("INSERT INTO t VALUES (1)")
    with pytest.raises(pg8000.native.DatabaseError) as e:
        native.run("INSERT INTO t VALUES (1)")
    assert e.value.args[0]["C"] == "23505"
    assert e.value.args[0]["n"] == "t_pkey"
    with pytest.raises(pg8000.native.DatabaseError) as aborted:
        native.run("SELECT 1")
    assert aborted.value.args[0]["C"] == "25P02"
    native.run("ROLLBACK")
    assert native.run("SELECT count(*) FROM t") == [[0]]


def test_prepared(native: pg8000.native.Connection) -> None:
    statement = native.prepare("SELECT :n + 1, CAST(:t AS text)")
    for n in range(10):
        assert statement.run(n=n, t="x") == [[n + 1, "x"]]
    statement.close()


def test_copy(native: pg8000.native.Connection) -> None:
    native.run("CREATE TABLE c (n int, v text)")
    native.run("COPY c FROM STDIN", stream=io.StringIO("".join(f"{n}\tv{n}\n" for n in range(3000))))
    out = io.StringIO()
    native.run("COPY (SELECT * FROM c ORDER BY n) TO STDOUT", stream=out)
    assert out.getvalue() == "".join(f"{n}\tv{n}\n" for n in range(3000))
    with pytest.raises(pg8000.native.DatabaseError):
        native.run("COPY c FROM STDIN", stream=io.StringIO("x\ty\n"))
    assert native.run("SELECT count(*) FROM c") == [[3000]]


def test_notifications_notices_and_parameters(native: pg8000.native.Connection) -> None:
    native.run("LISTEN news")
    native.run("NOTIFY news, 'hello'")
    native.run("SELECT 1")
    assert [tuple(n)[1:] for n in native.notifications] == [("news", "hello")]
    native.run("DO $$ BEGIN RAISE NOTICE 'one'; END $$")
    assert native.notices[-1][b"M"] == b"one"
    native.run("SET application_name = 'changed'")
    assert native.parameter_statuses["application_name"] in (b"changed", "changed")


def test_dbapi(endpoint: Endpoint) -> None:
    c = pg8000.dbapi.connect(endpoint.user, host=endpoint.host, port=endpoint.port, database=endpoint.database)
    try:
        cursor = c.cursor()
        cursor.execute("CREATE TABLE d (n int, v text)")
        cursor.executemany("INSERT INTO d VALUES (%s, %s)", [(n, f"v{n}") for n in range(200)])
        assert cursor.rowcount == 200
        c.commit()
        cursor.execute("SELECT n FROM d ORDER BY n")
        assert cursor.fetchmany(2) == ([0], [1])
        c.rollback()
        c.tpc_begin((1, "g", "b"))
        cursor.execute("SELECT 1")
        c.tpc_rollback()
    finally:
        c.close()


def test_workflow_pieces_as_parameters(endpoint: Endpoint, native: pg8000.native.Connection) -> None:
    text = "SELECT df.start(:a ~> :b |=> 'x')" if endpoint.proxied else "SELECT df.start(df.as(df.seq(:a, :b), 'x'))"
    assert len({native.run(text, a=f"SELECT {n}", b="SELECT 2")[0][0] for n in range(5)}) == 5
