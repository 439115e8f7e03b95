"""The session of polls by itself: what it tells before the commit, and every way in which that may go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import psycopg
import pytest

from engine.control import ControlConnection
from engine.errors import ConnectionLostError, ServerError
from engine.target import Target
from tests.fix_postgres import Database

TEXT = 25
#: What the server does with a row when the transaction that has put it in commits.
AT_COMMIT = """
CREATE TABLE t (what text);
CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN EXECUTE NEW.what; RETURN NULL; END';
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION at_commit();
"""
PUT = "INSERT INTO t VALUES ($1) RETURNING what, NULL"


@contextlib.asynccontextmanager
async def session(database: Database) -> AsyncIterator[ControlConnection]:
    with psycopg.connect(database.dsn(), autocommit=True) as c:
        c.execute(AT_COMMIT)
    connection = await ControlConnection.connect(
        Target.from_dsn(database.dsn()), {"application_name": "test:control"}, timeout=20)
    try:
        await connection.prepare("put", PUT, [TEXT])
        yield connection
    finally:
        connection.abort()


def rows(database: Database) -> int:
    with psycopg.connect(database.dsn(), autocommit=True) as c:
        return len(c.execute("SELECT FROM t").fetchall())


async def test_rows_are_told_before_they_are_committed(database: Database) -> None:
    async with session(database) as s:
        began = time.monotonic()
        told, committed = await s.ask("put", ["SELECT pg_sleep(1)"])
        assert time.monotonic() - began < 0.9
        assert told == [[b"SELECT pg_sleep(1)", None]]
        assert not committed.done()
        assert rows(database) == 0
        await committed
        assert time.monotonic() - began >= 1
        assert rows(database) == 1
        _, committed = await s.ask("put", ["SELECT 1"])
        await committed
        assert rows(database) == 2


async def test_a_commit_that_fails(database: Database) -> None:
    async with session(database) as s:
        told, committed = await s.ask("put", ["SELECT 1 / 0"])
        assert len(told) == 1
        with pytest.raises(ServerError, match="division by zero"):
            await committed
        assert rows(database) == 0
        _, committed = await s.ask("put", ["SELECT 1"])
        await committed
        assert rows(database) == 1


async def test_a_session_that_is_lost_before_the_commit_is_answered(database: Database) -> None:
    async with session(database) as s:
        _, committed = await s.ask("put", ["SELECT pg_terminate_backend(pg_backend_pid())"])
        with pytest.raises(ConnectionLostError, match="terminating connection"):
            await committed
        assert not s.usable
        with pytest.raises(ConnectionLostError):
            await s.ask("put", ["SELECT 1"])


async def test_a_question_that_fails_is_answered_at_once(database: Database) -> None:
    async with session(database) as s, asyncio.timeout(10):
        await s.prepare("divide", "SELECT 1 / $1::text::int", [TEXT])
        with pytest.raises(ServerError, match="division by zero"):
            await s.ask("divide", ["0"])
        assert (await s.ask("divide", ["1"]))[0] == [[b"1"]]
        with pytest.raises(ServerError, match="nothing"):
            await s.prepare("bad", "SELECT nothing", [])
        with pytest.raises(ServerError, match="does not exist"):
            await s.ask("unknown", [])
        await s.prepare("end", "SELECT pg_terminate_backend(pg_backend_pid())", [])
        with pytest.raises(ConnectionLostError, match="terminating connection"):
            await s.ask("end", [])


async def test_who_is_cancelled_does_not_cancel_it_for_others(database: Database) -> None:
    async with session(database) as s:
        _, committed = await s.ask("put", ["SELECT pg_sleep(0.5)"])
        others = [asyncio.ensure_future(asyncio.shield(committed)) for _ in range(2)]
        await asyncio.sleep(0)
        others[0].cancel()
        await others[1]
        assert others[0].cancelled()
        # Nor does it harm a question that nobody waits for any more.
        asked = asyncio.ensure_future(s.ask("put", ["SELECT 1"]))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        _, committed = await s.ask("put", ["SELECT 1"])
        await committed
        assert rows(database) == 3
