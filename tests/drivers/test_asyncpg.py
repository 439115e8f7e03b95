"""asyncpg, which speaks the protocol by itself, in binary."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import ipaddress
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.drivers.conftest import Endpoint


@pytest.fixture
async def connection(endpoint: Endpoint) -> AsyncIterator[Any]:
    c = await asyncpg.connect(endpoint.uri)
    yield c
    await c.close()


async def test_connects_with_settings(endpoint: Endpoint) -> None:
    c = await asyncpg.connect(endpoint.uri, server_settings={"application_name": "an app", "search_path": "scratch"}, ssl="prefer")
    assert await c.fetchval("SHOW application_name") == "an app"
    assert c.get_settings().client_encoding == "UTF8"
    await c.close()


async def test_types(connection: Any) -> None:
    await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    for type_, value in (
        ("int2", -5), ("int4", 5), ("int8", 2**60), ("float4", 1.5), ("float8", float("-inf")), ("numeric", decimal.Decimal("-1.50")),
        ("bool", True), ("text", "ü € 😀"), ("varchar", ""), ("bytea", b"\0\xff"), ("date", dt.date(2024, 2, 29)), ("time", dt.time(1, 2, 3)),
        ("timestamp", dt.datetime(2024, 2, 29, 1)), ("timestamptz", dt.datetime(2024, 2, 29, tzinfo=dt.UTC)), ("interval", dt.timedelta(days=1, seconds=2)),
        ("uuid", uuid.UUID(int=7)), ("jsonb", {"a": [1, None]}), ("inet", ipaddress.ip_interface("10.0.0.1/8")), ("int4[]", [1, None, 3]),
        ("text[]", ["a", "b,c"]), ("bit(4)", asyncpg.BitString("1010")), ("int4range", asyncpg.Range(1, 5)), ("point", asyncpg.Point(1, 2)),
    ):  # fmt: skip
        assert await connection.fetchval(f"SELECT $1::{type_}", value) == value
        assert await connection.fetchval(f"SELECT $1::{type_}", None) is None


async def test_types_of_one_s_own(connection: Any) -> None:
    """Makes asyncpg look types up in the catalogue, by a query of its own."""
    await connection.execute("CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE pair AS (a int, b mood); CREATE DOMAIN positive AS int CHECK (VALUE > 0)")
    assert await connection.fetchval("SELECT $1::pair", (1, "ok")) == (1, "ok")
    assert await connection.fetchval("SELECT ARRAY[$1::pair]", (1, None)) == [(1, None)]
    assert await connection.fetchval("SELECT $1::positive", 5) == 5
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.fetchval("SELECT $1::positive", -5)


async def test_transactions(connection: Any) -> None:
    await connection.execute("CREATE TABLE t (n int)")
    async with connection.transaction(isolation="serializable"):
        await connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with connection.transaction():
                await connection.execute("INSERT INTO t VALUES (2)")
                await connection.fetch("SELECT 1/0")
        assert connection.is_in_transaction()
    with pytest.raises(KeyError):
        async with connection.transaction():
            await connection.execute("INSERT INTO t VALUES (3)")
            raise KeyError
    assert not connection.is_in_transaction()
    assert await connection.fetch("SELECT n FROM t") == [(1,)]


async def test_prepared_statements(connection: Any) -> None:
    statement = await connection.prepare("SELECT $1::int + 1 AS n, $2::text AS t")
    assert [p.name for p in statement.get_parameters()] == ["int4", "text"]
    assert [a.name for a in statement.get_attributes()] == ["n", "t"]
    for n in range(20):
        assert await statement.fetchrow(n, "x") == (n + 1, "x")
    assert await statement.executemany([(n, "x") for n in range(100)]) is None
    await connection.execute("CREATE TABLE p (a int)")
    assert await connection.fetch("SELECT * FROM p") == []
    await connection.execute("ALTER TABLE p ADD COLUMN b int")
    assert await connection.fetch("SELECT * FROM p") == []
    await connection.execute("DISCARD ALL")
    with pytest.raises(asyncpg.InvalidSQLStatementNameError):
        await statement.fetch(1, "x")


async def test_cursors(connection: Any) -> None:
    async with connection.transaction():
        assert [r[0] async for r in connection.cursor("SELECT generate_series(1, 200)", prefetch=7)] == list(range(1, 201))
        cursor = await connection.cursor("SELECT generate_series(1, 10)")
        await cursor.forward(3)
        assert await cursor.fetch(2) == [(4,), (5,)]


async def test_many_rows_in_and_out(connection: Any) -> None:
    await connection.execute("CREATE TABLE m (n int, v text)")
    await connection.executemany("INSERT INTO m VALUES ($1, $2)", [(n, "x" * (n % 300)) for n in range(5000)])
    rows = await connection.fetch("SELECT * FROM m ORDER BY n")
    assert [r["n"] for r in rows] == list(range(5000))
    with pytest.raises(asyncpg.DataError):
        await connection.executemany("INSERT INTO m VALUES ($1, $2)", [(1, "a"), ("x", "b")])
    assert await connection.fetchmany("SELECT $1::int", [(1,), (2,)]) == [(1,), (2,)]
    big = "y" * 10_000_000
    assert await connection.fetchval("SELECT $1::text", big) == big


async def test_copy(connection: Any) -> None:
    await connection.execute("CREATE TABLE c (n int, v text)")
    assert await connection.copy_records_to_table("c", records=[(n, f"v{n}") for n in range(5000)]) == "COPY 5000"
    out = bytearray()

    async def take(data: bytes) -> None:
        out.extend(data)

    assert await connection.copy_from_query("SELECT * FROM c WHERE n < $1 ORDER BY n", 100, output=take, format="csv") == "COPY 100"
    assert out.decode().splitlines() == [f"{n},v{n}" for n in range(100)]

    async def chunks() -> AsyncIterator[bytes]:
        yield b"1,a\n"
        yield b"x,b\n"

    with pytest.raises(asyncpg.InvalidTextRepresentationError):
        await connection.copy_to_table("c", source=chunks(), format="csv")
    assert await connection.fetchval("SELECT count(*) FROM c") == 5000


async def test_notifications(endpoint: Endpoint, connection: Any) -> None:
    got: asyncio.Queue[tuple[int, str, str]] = asyncio.Queue()
    await connection.add_listener("news", lambda _, pid, channel, payload: got.put_nowait((pid, channel, payload)))
    other = await asyncpg.connect(endpoint.uri)
    try:
        await other.execute("SELECT pg_notify('news', 'ü')")
        assert await asyncio.wait_for(got.get(), 20) == (other.get_server_pid(), "news", "ü")
    finally:
        await other.close()


async def test_notices(connection: Any) -> None:
    seen: list[tuple[str, str]] = []
    connection.add_log_listener(lambda _, m: seen.append((m.severity, m.message)))
    await connection.execute("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$")
    await asyncio.sleep(0)
    assert seen == [("NOTICE", "one"), ("WARNING", "two")]


async def asleep(observer: Any, pid: int) -> None:
    """Returns when the session's backend executes pg_sleep."""
    while not await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'", pid):
        await asyncio.sleep(0.01)


async def test_cancelling(endpoint: Endpoint, connection: Any) -> None:
    with pytest.raises(TimeoutError):
        await connection.fetch("SELECT pg_sleep(60)", timeout=0.3)
    assert await connection.fetchval("SELECT 1") == 1
    task = asyncio.ensure_future(connection.fetch("SELECT pg_sleep(60)"))
    observer = await asyncpg.connect(endpoint.uri)
    await asleep(observer, connection.get_server_pid())
    await observer.close()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await connection.fetchval("SELECT 2") == 2


async def test_errors(connection: Any) -> None:
    await connection.execute("CREATE TABLE e (id int PRIMARY KEY)")
    await connection.execute("INSERT INTO e VALUES (1)")
    with pytest.raises(asyncpg.UniqueViolationError) as unique:
        await connection.execute("INSERT INTO e VALUES ($1)", 1)
    assert unique.value.constraint_name == "e_pkey"
    assert unique.value.detail == "Key (id)=(1) already exists."
    with pytest.raises(asyncpg.UndefinedColumnError) as column:
        await connection.fetch("SELECT 1, nosuch")
    assert column.value.position == "11"
    assert await connection.fetchval("SELECT 1") == 1


async def test_pool(endpoint: Endpoint) -> None:
    """Its reset query between users, under load."""
    async with asyncpg.create_pool(endpoint.uri, min_size=2, max_size=8) as pool:
        values = await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(400)))
        assert values == list(range(400))


async def test_a_lost_session(endpoint: Endpoint, connection: Any) -> None:
    other = await asyncpg.connect(endpoint.uri)
    waiting = asyncio.ensure_future(other.fetch("SELECT pg_sleep(60)"))
    await asleep(connection, other.get_server_pid())
    await connection.fetch("SELECT pg_terminate_backend($1)", other.get_server_pid())
    with pytest.raises((asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError), match="due to administrator command"):
        await waiting
    assert other.is_closed()


async def test_workflow_pieces_as_parameters(endpoint: Endpoint, connection: Any) -> None:
    text = "SELECT df.start($1 ~> $2 |=> 'x', $3)" if endpoint.proxied else "SELECT df.start(df.as(df.seq($1, $2), 'x'), $3)"
    statement = await connection.prepare(text)
    assert len({await statement.fetchval(f"SELECT {n}", "SELECT 2", f"label {n}") for n in range(5)}) == 5
