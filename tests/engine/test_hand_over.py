"""A session that goes to another workflow's step with the commit of the last one: nobody waits for it, nobody is harmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psycopg
import pytest

from engine import runner
from engine.connection import StepConnection
from engine.errors import ConnectionLostError, NotBegunError, ServerError
from engine.runner import Begun, SessionLease, SessionPool
from engine.slots import Slots
from engine.target import Target
from engine.worker import Worker
from tests.engine.fix_graphs import seq, sql
from tests.engine.helpers import Client, ended, install, running_worker, until
from tests.engine.test_identity import prepared
from tests.fix_postgres import Database

NOTHING: list[str | None] = ["00000000", *[None] * 8]
#: A checkpoint that refuses one instance, and waits for a lock with another one.
CHECKPOINT = """
CREATE SCHEMA duroxide;
CREATE FUNCTION duroxide.checkpoint(i text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF i = 'refused' THEN
        RAISE 'not yours' USING ERRCODE = 'DF001';
    ELSIF i = 'waits' THEN
        PERFORM pg_advisory_xact_lock(1);
    END IF;
END $$;
CREATE TABLE t AS SELECT 1 AS n;
CREATE SEQUENCE ran;
"""
#: Leaves a lock and a setting behind; and what the next one sees of them. The sequence tells what no rollback undoes.
LEAVES = "SELECT pg_advisory_lock(42), set_config('search_path', 'nowhere', false)"
SEES = ("SELECT current_setting('search_path'), (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() "
        "AND locktype = 'advisory'), nextval('public.ran'), current_user")


@asynccontextmanager
async def session(database: Database) -> AsyncIterator[StepConnection]:
    """A step's session as the superuser, with the checkpoint from above."""
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        c.execute(CHECKPOINT)
    s = await StepConnection.connect(Target.from_dsn(database.superuser_dsn), {"application_name": "test:step"}, timeout=20)
    try:
        yield s
    finally:
        s.close()


@contextmanager
def held_lock(database: Database) -> Iterator[psycopg.Connection]:
    """Somebody holds what the checkpoint of `waits` waits for."""
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        c.execute("SELECT pg_advisory_lock(1)")
        yield c


async def waits_for_lock(c: psycopg.Connection) -> None:
    """Until somebody waits for the lock."""
    await until(lambda: c.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone() == (1,))


async def test_it_finds_a_clean_session(database: Database) -> None:
    async with session(database) as s:
        await s.begin_and_run(None, LEAVES)
        await s.finish(NOTHING, (f'"{database.owner}"', SEES.replace("nextval('public.ran')", "1")), foreign=True)
        assert not s.is_behind
        assert (await s.run_begun()).rows == [[b'"$user", public', b"0", b"1", database.owner.encode()]]
        await s.finish(NOTHING)
        assert s.usable


async def test_it_has_not_begun_where_the_commit_fails(database: Database) -> None:
    """Whoever has sent the commit hears why; the other one that it may go elsewhere. It rolls back, and did not run."""
    async with session(database) as s:
        await s.begin_and_run(None, "UPDATE t SET n = n + 1")
        finish = asyncio.create_task(s.finish(["refused", *[None] * 8], (None, SEES), foreign=True))
        await asyncio.sleep(0)
        with pytest.raises(NotBegunError):
            await s.run_begun()
        with pytest.raises(ServerError, match="not yours"):
            await finish
        await s.rollback()
        result = await s.begin_and_run(None, "SELECT (SELECT n FROM t), (SELECT is_called FROM ran)")
        assert result.rows == [[b"1", b"f"]]
        await s.rollback()
        # And if there never was anything to send it with.
        with pytest.raises(NotBegunError):
            await s.run_begun()


async def test_a_session_that_is_lost_in_the_commit(database: Database) -> None:
    with held_lock(database) as c:
        async with session(database) as s:
            await s.begin_and_run(None, "SELECT 1")
            finish = asyncio.create_task(s.finish(["waits", *[None] * 8], (None, SEES), foreign=True))
            await waits_for_lock(c)
            begun = asyncio.create_task(s.run_begun())
            c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'test:step'")
            with pytest.raises(ConnectionLostError, match="terminating connection"):
                await finish
            with pytest.raises(NotBegunError):
                await begun
            assert not s.is_behind


async def test_it_need_not_wait_for_the_commit(database: Database) -> None:
    """It goes elsewhere; the commit ends undisturbed; the session is not used again."""
    with held_lock(database) as c:
        async with session(database) as s:
            await s.begin_and_run(None, "UPDATE t SET n = 2")
            finish = asyncio.create_task(s.finish(["waits", *[None] * 8], (None, SEES), foreign=True))
            begun = asyncio.create_task(s.run_begun())
            await waits_for_lock(c)
            assert s.is_behind
            s.desert()
            with pytest.raises(NotBegunError):
                await begun
            assert not finish.done()
            c.execute("SELECT pg_advisory_unlock(1)")
            await finish
            assert not s.is_behind
            assert not s.usable
            assert c.execute("SELECT n FROM t").fetchone() == (2,)


async def test_to_cancel_it_does_not_hit_the_commit(database: Database) -> None:
    with held_lock(database) as c:
        async with session(database) as s:
            await s.begin_and_run(None, "UPDATE t SET n = 2")
            finish = asyncio.create_task(s.finish(["waits", *[None] * 8], (None, "SELECT pg_sleep(3600)"), foreign=True))
            begun = asyncio.create_task(s.run_begun())
            await waits_for_lock(c)
            cancel = asyncio.create_task(s.cancel(60))
            await asyncio.sleep(0.2)
            assert not cancel.done()
            c.execute("SELECT pg_advisory_unlock(1)")
            await finish
            with pytest.raises(ServerError, match="canceling statement"):
                await begun
            await cancel
            assert c.execute("SELECT n FROM t").fetchone() == (2,)
            # Nor does it wait for ever.
            await s.rollback()
            c.execute("SELECT pg_advisory_lock(1)")
            await s.begin_and_run(None, "UPDATE t SET n = 3")
            finish = asyncio.create_task(s.finish(["waits", *[None] * 8], (None, SEES), foreign=True))
            await waits_for_lock(c)
            await s.cancel(0.1)
            c.execute("SELECT pg_advisory_unlock(1)")
            await finish
            assert c.execute("SELECT n FROM t").fetchone() == (3,)


# -- places --------------------------------------------------------------------------------------------------------


async def test_a_place_is_handed_over_in_order() -> None:
    slots: Slots[str, str] = Slots(1, 60)
    assert slots.next_wish() is None
    assert await slots.take("own") is None
    tasks = [asyncio.create_task(slots.take(wish)) for wish in ("gives up", "first", None)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    assert slots.next_wish() == "first"
    slots.hand_over("session")
    assert (await tasks[1], slots.in_use, slots.next_wish()) == ("session", 1, None)
    slots.free()
    assert (await tasks[2], slots.in_use) == (None, 1)


async def test_what_came_too_late_is_taken_back() -> None:
    shed: list[str] = []
    slots: Slots[str, str] = Slots(1, 60, shed=shed.append)
    await slots.take()
    task = asyncio.create_task(slots.take("wish"))
    await asyncio.sleep(0)
    slots.hand_over("session")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (shed, slots.in_use) == (["session"], 1)  # whoever sheds it frees the place


async def test_no_place_is_handed_over_while_there_are_too_many() -> None:
    slots: Slots[str, str] = Slots(2, 60)
    await slots.take()
    await slots.take()
    task = asyncio.create_task(slots.take("wish"))
    await asyncio.sleep(0)
    slots.room = 1.0
    assert slots.next_wish() is None
    slots.free()
    assert slots.next_wish() == "wish"
    slots.hand_over("session")
    await task


class Session:
    """What a lease needs of a session."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.is_behind = True

    def desert(self) -> None:
        self.said.append("desert")

    def abort(self) -> None:
        self.said.append("abort")


class Pool:
    """What a lease needs of a pool."""

    def __init__(self) -> None:
        self.back: list[SessionLease] = []

    def put_back(self, lease: SessionLease) -> None:
        self.back.append(lease)


def leases() -> tuple[SessionLease, SessionLease, Session, Pool]:
    """One that was passed on, and the one that it was passed on to."""
    pool, connection = Pool(), Session()
    first = SessionLease(pool, None, connection)  # type: ignore[arg-type]
    return first, first.pass_on(), connection, pool


async def test_a_lease_that_was_passed_on_ends_once() -> None:
    first, second, connection, pool = leases()
    first.release()
    first.drop()
    await first.rollback()
    assert (connection.said, pool.back, first.is_held, second.is_held) == ([], [], False, True)
    second.release()
    second.drop()
    assert (connection.said, pool.back, second.is_held) == ([], [second], False)


@pytest.mark.parametrize("waits", [True, False])
async def test_a_lease_that_is_given_back_ends_once(waits: bool) -> None:
    """By whoever has passed it on; if that one does not wait any more, at once."""
    first, second, connection, pool = leases()
    if not waits:
        first.drop()
    second.shed()
    second.shed()
    assert not second.is_held
    if waits:
        assert (connection.said, pool.back, first.is_held) == (["desert"], [], True)
        first.release()
    assert (connection.said, pool.back) == ((["desert"], [first]) if waits else (["abort"], [second]))


async def test_a_session_that_goes_on_and_on_leaves_nothing_behind() -> None:
    first, second, _, _ = leases()
    third = second.pass_on()
    assert (third._former, second._former, first._former) == (second, None, None)


async def test_a_lease_that_stands_behind_nothing_is_dropped() -> None:
    _, second, connection, pool = leases()
    connection.is_behind = False
    second.shed()
    assert (connection.said, pool.back) == (["abort"], [second])


# -- workflows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Begun]:
    """What was handed over, as it happens."""
    seen: list[Begun] = []
    original = SessionPool.pass_on

    def pass_on(self: SessionPool, *arguments: object) -> Begun:
        seen.append(original(self, *arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(SessionPool, "pass_on", pass_on)
    return seen


async def start_together(c: Client, worker: Worker, *trees: object) -> list[str]:
    """Starts them in one transaction, so that one poll finds them all."""
    with c.connection.transaction():
        ids = [c.start(tree) for tree in trees]  # type: ignore[arg-type]
    worker.wake()
    return ids


async def test_many_workflows_share_few_sessions(database: Database, passed: list[Begun]) -> None:
    await install(database)
    with Client(database) as c:
        c.execute("CREATE TABLE runs (n int, pid int)")
        async with running_worker(database, max_user_connections=2) as worker:
            ids = await start_together(c, worker, *(
                seq(sql(f"INSERT INTO runs VALUES ({n}, pg_backend_pid())"), sql(f"INSERT INTO runs VALUES ({n}, 0)"))
                for n in range(100)))
            assert {status for status, _ in await ended(c, *ids)} == {"completed"}
        assert c.rows("SELECT count(*), count(DISTINCT n), count(DISTINCT pid) FROM runs") == [(200, 100, 3)]
        assert c.one("SELECT count(*) FROM duroxide.history WHERE event = 'completed'") == 200
        assert len(passed) > 50


async def test_a_failing_commit_takes_nobody_along(database18: Database, passed: list[Begun]) -> None:
    """Every other workflow's commit is refused by a trigger; those in the same session go on."""
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE TABLE runs (n int)")
        c.execute("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                  " IF (SELECT i.label FROM duroxide.instances i WHERE i.id = NEW.instance_id) = 'bad' THEN RAISE 'refused'; END IF;"
                  " RETURN NULL; END $$")
        c.execute("CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON duroxide.history DEFERRABLE INITIALLY DEFERRED"
                  " FOR EACH ROW WHEN (NEW.event = 'completed') EXECUTE FUNCTION refuse()")
        async with running_worker(database18, max_user_connections=1) as worker:
            with c.connection.transaction():
                ids = [c.start(sql(f"INSERT INTO runs VALUES ({n})"), label="bad" if n % 2 else "good") for n in range(20)]
            worker.wake()
            found = await ended(c, *ids)
        assert [status for status, _ in found] == ["completed", "failed"] * 10
        assert all("refused" in str(output) for status, output in found if status == "failed")
        assert c.rows("SELECT array_agg(n ORDER BY n) FROM runs") == [(list(range(0, 20, 2)),)]
        assert len(passed) >= 15


@pytest.mark.parametrize("how", ["waits", "cancelled"])
async def test_a_commit_that_hangs_holds_up_nobody_else(database18: Database, passed: list[Begun], how: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody keeps the first workflow's row locked. Whatever stands behind its commit runs elsewhere, or is cancelled
    without harm to it.
    """
    monkeypatch.setattr(runner, "PATIENCE", 0.3 if how == "waits" else 3600.0)
    cancels: list[StepConnection] = []
    cancel = StepConnection.cancel

    async def noted(self: StepConnection, timeout: float = 30.0) -> None:
        cancels.append(self)
        await cancel(self, timeout)

    monkeypatch.setattr(StepConnection, "cancel", noted)
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        c.execute("CREATE TABLE runs (n int)")
        c.execute("CREATE TABLE first_gate ()")
        c.execute("CREATE TABLE second_gate ()")
        async with running_worker(database18, max_user_connections=2) as worker, asyncio.timeout(60):
            with psycopg.connect(database18.dsn()) as first, psycopg.connect(database18.dsn()) as second, \
                    psycopg.connect(database18.dsn()) as keeper:
                first.execute("LOCK TABLE first_gate")
                second.execute("LOCK TABLE second_gate")
                # Two are let in first, each to a session; the others wait for a place, and then for the second gate.
                step = "INSERT INTO runs SELECT {} FROM (SELECT count(*) FROM {}_gate) g"
                waiting = "SELECT count(*) FROM pg_locks WHERE relation = %s::regclass AND NOT granted"
                hung, other_one = await start_together(c, worker, *(sql(step.format(n, "first")) for n in range(2)))
                await until(lambda: c.one(waiting, "first_gate") == 2)
                rest = [other_one, *await start_together(c, worker, *(sql(step.format(n, "second")) for n in range(2, 5)))]
                await until(lambda: len(worker._held) == 5)
                keeper.execute("SELECT FROM duroxide.instances WHERE id = %s FOR UPDATE", (hung,))
                await asyncio.sleep(0.2)  # they queue up for a place
                first.rollback()
                await until(lambda: c.one(waiting, "second_gate") == 1)
                if how == "cancelled":
                    [behind] = await until(lambda: [b for b in passed if b.lease.is_held and b.lease.connection.is_behind])
                second.rollback()
                if how == "waits":
                    assert {status for status, _ in await ended(other, *rest)} == {"completed"}
                    assert other.outcome(hung)[0] in ("pending", "running")
                else:
                    await until(lambda: other.one("SELECT count(*) FROM runs") == 3)  # in the other session
                    number = int(behind.sql.split("SELECT ")[1].split()[0])
                    other.execute("SELECT df.cancel(%s, 'enough')", rest[number - 1])
                    await until(lambda: cancels)
                    await asyncio.sleep(0.2)  # a request would have come by now
                keeper.rollback()
            found = dict(zip([hung, *rest], await ended(other, hung, *rest), strict=True))
            assert found[hung][0] == "completed"
            assert sorted(status for status, _ in found.values()) == (
                ["completed"] * 5 if how == "waits" else ["cancelled", *["completed"] * 4])
        runs = {row[0] for row in other.rows("SELECT n FROM runs")}
        assert runs == ({0, 1, 2, 3, 4} if how == "waits" else {0, 1, 2, 3, 4} - {number})
        assert other.one("SELECT count(*) FROM runs") == len(runs)


async def test_each_role_has_its_own_sessions(database18: Database, passed: list[Begun]) -> None:
    """A session is only handed over to a step of the same role."""
    guest = f"guest of {database18.name}"
    await prepared(database18, guest)
    with Client(database18) as c, Client(database18, guest) as g:
        c.execute("CREATE TABLE runs (n int, who name DEFAULT current_user)")
        c.execute("GRANT INSERT ON runs TO PUBLIC")
        async with running_worker(database18, max_user_connections=1) as worker:
            with c.connection.transaction(), g.connection.transaction():
                ids = [(g if n % 4 == 0 else c).start(sql(f"INSERT INTO runs VALUES ({n})")) for n in range(40)]
            worker.wake()
            assert {status for status, _ in await ended(c, *ids)} == {"completed"}
        right = "SELECT count(*), bool_and(who = CASE WHEN n %% 4 = 0 THEN %s ELSE %s END) FROM runs"
        assert c.rows(right, guest, database18.owner) == [(40, True)]
        assert passed
