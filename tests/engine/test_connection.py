"""A step's session by itself: connecting, authentication, TLS, cancelling, and what the other end can do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest

from engine.connection import StepConnection
from engine.errors import ConnectionLostError, ResultTooLargeError, ServerError, StepRefusedError
from engine.target import Target
from proxy.embedded import SYSTEM_USER
from proxy.wire.auth import AuthenticationError
from proxy.wire.tls_options import SslMode
from tests.engine.helpers import until
from tests.fix_postgres import DEBIAN_15, Database, running_cluster, versions


@contextlib.asynccontextmanager
async def session(dsn: str, **limits: int) -> AsyncIterator[StepConnection]:
    connection = await StepConnection.connect(Target.from_dsn(dsn), {"application_name": "test:step"}, timeout=20,
                                              **limits)
    try:
        yield connection
    finally:
        connection.close()


def test_dsn() -> None:
    target = Target.from_dsn("postgresql://me:p%40ss@[::1]:1,a:2,c/db?target_session_attrs=read-write&sslmode=require")
    assert target.hosts == (("::1", 1), ("a", 2), ("c", 5432))
    assert (target.user, target.password, target.database, target.tls.mode) == ("me", "p@ss", "db", SslMode.REQUIRE)
    assert "p@ss" not in repr(target)
    socket = Target.from_dsn("postgresql://me@/db?host=/tmp/x&port=99")
    assert (socket.hosts, socket.wants_tls("/tmp/x"), socket.wants_tls("x")) == ((("/tmp/x", 99),), False, True)
    assert Target.from_dsn("postgres://me@h").database == "me"
    with pytest.raises(ValueError, match="postgresql://"):
        Target.from_dsn("host=h dbname=d")
    with pytest.raises(ValueError, match="different number"):
        Target.from_dsn("postgresql://a,b,c/db?port=1,2")


async def test_unix_socket_run_commit_rollback(database: Database) -> None:
    dsn = f"postgresql://{database.owner}@/{database.name}?host={database.cluster.socket_dir}" \
          f"&port={database.cluster.port}"
    async with session(dsn) as s:
        result = await s.begin_and_run(None, "CREATE TABLE t AS SELECT 1 AS n")
        assert (result.tag, result.columns, result.rows) == ("SELECT 1", None, [])
        await s.commit()
        result = await s.begin_and_run(f'"{database.owner}"', "UPDATE t SET n = n + 1 RETURNING n, NULL AS x")
        assert [c.name for c in result.columns or ()] == ["n", "x"]
        assert (result.tag, result.rows) == ("UPDATE 1", [[b"2", None]])
        await s.rollback()
        assert (await s.begin_and_run(None, "SELECT n FROM t")).rows == [[b"1"]]
        await s.rollback()
        with pytest.raises(ServerError, match="division by zero") as caught:
            await s.begin_and_run(None, "SELECT 1/0")
        assert (caught.value.sqlstate, caught.value.fatal) == ("22012", False)
        await s.rollback()
        assert s.usable
        assert await s.fetch("SELECT $1::text || 'x', NULL", ["é"]) == [["éx".encode(), None]]


async def test_a_commit_that_fails(database18: Database) -> None:
    """Before COMMIT, where the server waits for a Sync; at COMMIT; and where the session is lost."""
    serializable = {"default_transaction_isolation": "serializable"}
    with psycopg.connect(database18.dsn(), autocommit=True) as c, psycopg.connect(database18.dsn()) as other:
        c.execute("CREATE TABLE t AS SELECT 1 AS n")
        c.execute("CREATE TABLE u AS SELECT 1 AS n")
        c.execute("CREATE SCHEMA duroxide")
        c.execute("CREATE FUNCTION duroxide.checkpoint(text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb)"
                  " RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'not yours' USING ERRCODE = 'DF001'; END $$")
        s = await StepConnection.connect(Target.from_dsn(database18.dsn()), serializable, timeout=20)
        try:
            await s.begin_and_run(None, "UPDATE t SET n = 2")
            with pytest.raises(ServerError, match="not yours"):
                await s.finish(["00000000", *[None] * 8])
            await s.rollback()
            assert (await s.begin_and_run(None, "SELECT n FROM t")).rows == [[b"1"]]
            await s.rollback()

            other.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            other.execute("SELECT n FROM t")
            await s.begin_and_run(None, "UPDATE t SET n = (SELECT n + 1 FROM u)")
            other.execute("UPDATE u SET n = 5")
            other.commit()
            with pytest.raises(ServerError) as caught:
                await s.commit()
            assert caught.value.sqlstate == "40001"
            await s.rollback()
            assert s.usable
            assert c.execute("SELECT n FROM t").fetchone() == (1,)

            await s.begin_and_run(None, "UPDATE t SET n = 7")
            c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'")
            with pytest.raises((ConnectionLostError, ServerError)):
                await s.commit()
            assert not s.usable
            assert c.execute("SELECT n FROM t").fetchone() == (1,)
        finally:
            s.close()


#: What a step leaves behind, and how the next one would see it.
LEFT = "SELECT pg_advisory_lock(42), set_config('search_path', 'nowhere', false)"
SEEN = "SELECT current_setting('search_path'), (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() " \
       "AND locktype = 'advisory'), nextval('public.ran')"


async def test_the_next_step_goes_with_the_commit(database18: Database) -> None:
    """It finds a clean session, and runs only where the commit has succeeded: sequences tell, which no rollback undoes."""
    serializable = {"default_transaction_isolation": "serializable"}
    nothing: list[str | None] = ["00000000", *[None] * 8]
    with psycopg.connect(database18.dsn(), autocommit=True) as c, psycopg.connect(database18.dsn()) as other:
        c.execute("CREATE TABLE t AS SELECT 1 AS n")
        c.execute("CREATE TABLE u AS SELECT 1 AS n")
        c.execute("CREATE SEQUENCE public.ran")
        c.execute("CREATE SCHEMA duroxide")
        c.execute("CREATE FUNCTION duroxide.checkpoint(i text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb)"
                  " RETURNS void LANGUAGE plpgsql AS $$ BEGIN IF i = '' THEN RAISE 'not yours' USING ERRCODE = 'DF001';"
                  " END IF; END $$")
        s = await StepConnection.connect(Target.from_dsn(database18.dsn()), serializable, timeout=20)
        try:
            await s.begin_and_run(None, LEFT)
            for n in (1, 2):
                await s.finish(nothing, (None, SEEN))
                assert c.execute("SELECT pg_try_advisory_lock(42), pg_advisory_unlock(42)").fetchone() == (True, True)
                wanted = [[b'"$user", public', b"0", str(n).encode()]]
                await until(lambda: s.begun_result() is not None)
                here = s.begun_result()
                assert here is not None
                assert here.rows == (await s.run_begun()).rows == wanted
                assert s.begun_result() is None
            await s.finish(nothing)
            assert s.usable

            # The checkpoint is refused; the next step's role can't be had; the next step itself fails.
            await s.begin_and_run(None, "UPDATE t SET n = 2")
            with pytest.raises(ServerError, match="not yours"):
                await s.finish(["", *[None] * 8], (None, SEEN))
            await s.rollback()
            for role, step, words in ((None, "SELECT 1/0", "division by zero"), ('"postgres"', SEEN, "permission denied")):
                await s.begin_and_run(None, "UPDATE t SET n = n + 1")
                await s.finish(nothing, (role, step))
                with pytest.raises(ServerError, match=words):
                    await s.run_begun()
                assert s.begun_result() is None
                await s.rollback()
            assert c.execute("SELECT n FROM t").fetchone() == (3,)

            # An error that is here already is for run_begun to tell.
            await s.begin_and_run(None, "SELECT 1")
            await s.finish(nothing, (None, "SELECT 1/0"))
            await until(lambda: not s._replies.exchanges)
            assert s.begun_result() is None
            with pytest.raises(ServerError, match="division by zero"):
                await s.run_begun()
            await s.rollback()

            # The commit fails.
            other.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            other.execute("SELECT n FROM t")
            await s.begin_and_run(None, "UPDATE t SET n = (SELECT n + 1 FROM u)")
            other.execute("UPDATE u SET n = 5")
            other.commit()
            with pytest.raises(ServerError) as caught:
                await s.finish(nothing, (None, SEEN))
            assert caught.value.sqlstate == "40001"
            await s.rollback()
            assert s.usable
            assert c.execute("SELECT n, last_value FROM t, public.ran").fetchone() == (3, 2)
            assert (await s.begin_and_run(None, SEEN)).rows == [[b'"$user", public', b"0", b"3"]]
            await s.rollback()
        finally:
            s.close()


async def test_a_commit_frees_what_the_step_left(database18: Database) -> None:
    """Locks, settings, temporary tables and statements go with it; the next step starts like in a new session."""
    with psycopg.connect(database18.dsn(), autocommit=True) as c:
        async with session(database18.dsn()) as s:
            await s.begin_and_run(None, "SELECT pg_advisory_lock(42), set_config('search_path', 'nowhere', false)")
            assert c.execute("SELECT pg_try_advisory_lock(42)").fetchone() == (False,)
            await s.commit()
            assert c.execute("SELECT pg_try_advisory_lock(42)").fetchone() == (True,)
            shown = await s.begin_and_run(None, "SELECT current_setting('search_path')")
            assert shown.rows == [[b'"$user", public']]
            await s.rollback()


async def test_the_step_does_not_run_where_its_role_is_refused(database18: Database) -> None:
    with psycopg.connect(database18.superuser_dsn, autocommit=True) as c:
        c.execute("CREATE TABLE public.traces (n int)")
        c.execute("GRANT ALL ON public.traces TO public")
        async with session(database18.dsn()) as s:
            for role in ("postgres", "nobody_at_all"):
                with pytest.raises(ServerError):
                    await s.begin_and_run(f'"{role}"', "INSERT INTO public.traces VALUES (1)")
                await s.rollback()
                with pytest.raises(ServerError):
                    await s.run_outside(f'"{role}"', "INSERT INTO public.traces VALUES (1)")
        assert c.execute("SELECT count(*) FROM public.traces").fetchone() == (0,)


async def test_what_no_server_accepts(database18: Database) -> None:
    with pytest.raises(ServerError) as caught:
        async with session(database18.cluster.dsn(user=database18.owner, database="missing")):
            pass
    assert (caught.value.sqlstate, caught.value.fatal) == ("3D000", True)
    with pytest.raises(ConnectionLostError):
        async with session(f"postgresql://x@127.0.0.1:1/{database18.name}"):
            pass
    # Of several hosts the first that answers serves.
    port = database18.cluster.port
    async with session(f"postgresql://{database18.owner}@127.0.0.1:1,127.0.0.1:{port}/{database18.name}") as s:
        assert s.address == ("127.0.0.1", port)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"R\x00\x00\x00\x08\x00\x00\x00\x63"])
async def test_something_else_listens_there(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises((ConnectionLostError, AuthenticationError)):
            async with session(f"postgresql://x@127.0.0.1:{port}/x?sslmode=disable"):
                pass


async def test_nobody_answers() -> None:
    release = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TimeoutError):
            await StepConnection.connect(Target.from_dsn(f"postgresql://x@127.0.0.1:{port}/x"), {}, timeout=0.1)
        release.set()


async def test_cancel_and_abort(database18: Database) -> None:
    async with session(database18.dsn()) as s:
        task = asyncio.create_task(s.begin_and_run(None, "SELECT pg_sleep(1000)"))
        with psycopg.connect(database18.dsn(), autocommit=True) as c:
            active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%(1000)' AND state = 'active'"
            await until(lambda: c.execute(active).fetchone() == (1,))
            await s.cancel(timeout=30)
            with pytest.raises(ServerError) as caught:
                await task
            assert caught.value.sqlstate == "57014"
            s.abort()
            assert not s.usable
            with pytest.raises(ConnectionLostError):
                await s.begin_and_run(None, "SELECT 1")
            await s.cancel()


async def test_a_request_to_cancel_that_is_lost_is_repeated(database18: Database) -> None:
    """Here: because the statement has taken it for its own."""
    stubborn = "DO $$ BEGIN PERFORM pg_sleep(1001); EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(1002); END $$"
    async with session(database18.dsn()) as s:
        task = asyncio.create_task(s.begin_and_run(None, stubborn))
        with psycopg.connect(database18.dsn(), autocommit=True) as c:
            active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO %(1001)%' AND wait_event = 'PgSleep'"
            await until(lambda: c.execute(active).fetchone() == (1,))
        await s.cancel(timeout=30)
        assert task.done()
        with pytest.raises(ServerError, match="canceling statement"):
            await task


async def test_the_server_ends_the_session(database18: Database) -> None:
    async with session(database18.dsn()) as s:
        task = asyncio.create_task(s.begin_and_run(None, "SELECT pg_sleep(1000)"))
        with psycopg.connect(database18.superuser_dsn, autocommit=True) as c:
            kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity " \
                   "WHERE application_name = 'test:step' AND state = 'active' AND datname = current_database()"
            await until(lambda: c.execute(kill).fetchone() is not None)
        with pytest.raises(ConnectionLostError, match="terminating connection") as caught:
            await task
        assert caught.value.error is not None
        assert caught.value.error.sqlstate == "57P01"
        assert not s.usable


async def test_limits(database18: Database) -> None:
    async with session(database18.dsn(), max_rows=10) as s:
        assert len((await s.begin_and_run(None, "SELECT generate_series(1, 10)")).rows) == 10
        await s.rollback()
        with pytest.raises(ResultTooLargeError, match=r"max_result_rows \(10\)"):
            await s.begin_and_run(None, "SELECT generate_series(1, 1000000)")
        await s.cancel()
    for size in (1001, 100_000, 10_000_000):  # one row that can be parsed, and two that are not even read
        async with session(database18.dsn(), max_bytes=1000) as s:
            with pytest.raises(ResultTooLargeError, match=r"max_result_bytes \(1000\)"):
                await s.begin_and_run(None, f"SELECT repeat('x', {size})")


async def test_copy_is_refused_and_the_session_survives_outside_of_transactions(database18: Database) -> None:
    async with session(database18.dsn()) as s:
        await s.execute("CREATE TABLE t (n int)")
        for statement in ("COPY t FROM STDIN", "COPY t TO STDOUT"):
            with pytest.raises(StepRefusedError, match="COPY"):
                await s.run_outside(None, statement)
            assert (await s.run_outside(None, "SELECT 1")).rows == [[b"1"]]


async def test_a_standby_is_passed_over() -> None:
    version = versions()[0]
    with running_cluster(version, hba=["local all all trust", "host all all 127.0.0.1/32 trust",
                                       "host replication all 127.0.0.1/32 trust"]) as primary, \
            running_cluster(version) as standby:
        port, data = standby.port, standby.data_dir
        standby.stop("immediate")
        for entry in data.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        primary.run("pg_basebackup", "-D", str(data), "-d", primary.dsn(), "-R", "-X", "stream")
        standby.start()
        both = f"postgresql://postgres@127.0.0.1:{port},127.0.0.1:{primary.port}/postgres"
        async with session(both) as s:
            assert s.address == ("127.0.0.1", primary.port)
        with pytest.raises(ConnectionLostError, match="is a standby"):
            async with session(f"postgresql://postgres@127.0.0.1:{port}/postgres"):
                pass


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of localhost's own, its key beside it."""
    file = tmp_path / "server.crt"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", str(tmp_path / "server.key"), "-out", str(file)], check=True, capture_output=True)
    return file


@pytest.mark.skipif(not (DEBIAN_15 / "postgres").exists(), reason="the wheel's PostgreSQL is built without TLS")
async def test_tls_and_scram(certificate: Path) -> None:
    hba = ["local all all trust", "hostssl all pam 127.0.0.1/32 scram-sha-256", "hostssl all all 127.0.0.1/32 trust"]
    with running_cluster(15, hba=hba) as cluster:
        for file in (certificate, certificate.with_suffix(".key")):
            target = cluster.data_dir / file.name
            target.write_bytes(file.read_bytes())
            target.chmod(0o600)
            if os.geteuid() == 0:
                entry = pwd.getpwnam(SYSTEM_USER)
                os.chown(target, entry.pw_uid, entry.pw_gid)
        with psycopg.connect(f"host={cluster.socket_dir} port={cluster.port} user=postgres dbname=postgres",
                             autocommit=True) as c:
            c.execute("CREATE ROLE pam LOGIN PASSWORD 'sesame'")
            c.execute("ALTER SYSTEM SET ssl = on")
            c.execute("SELECT pg_reload_conf()")
            await until(lambda: c.execute("SELECT setting FROM pg_settings WHERE name = 'ssl'").fetchone() == ("on",))
        base = f"127.0.0.1:{cluster.port}/postgres"
        for query in ("", "?sslmode=require", f"?sslmode=verify-full&sslrootcert={certificate}"):
            async with session(f"postgresql://pam:sesame@{base}{query}") as s:
                assert await s.fetch("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", []) == [[b"t"]]
        with pytest.raises(ServerError, match="no encryption"):
            async with session(f"postgresql://pam:sesame@{base}?sslmode=disable"):
                pass
        with pytest.raises(ServerError) as caught:
            async with session(f"postgresql://pam:wrong@{base}"):
                pass
        assert caught.value.sqlstate == "28P01"
        with pytest.raises(ConnectionLostError, match=r"(?i)certificate"):
            async with session(f"postgresql://pam:sesame@{base}?sslrootcert=system"):
                pass
