"""The store's statements: leases, fences, the inbox, time, and what locks of others must not do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import Mock

import asyncpg
import pytest
from msgspec.structs import replace

from dsl.values import Column
from engine.connection import STEP_DONE
from engine.errors import ConnectionLostError
from engine.identity import Identities
from engine.instance import HeldInstance, Surroundings
from engine.model import Changes, Checkpoint, Finish, StepError
from engine.processes import Life, is_dead
from engine.store import (
    CHECKPOINT,
    Clock,
    LeaseLostError,
    LoadedInstance,
    Store,
    checkpoint_arguments,
    step_done_arguments,
)
from tests.engine.fix_graphs import seq, signal, sql
from tests.engine.helpers import Client, ended, install, polled, running_worker, settings, until
from tests.fix_postgres import Database


@asynccontextmanager
async def opened(database: Database, **changes: object) -> AsyncIterator[Store]:
    store = Store(settings(database, **changes))
    await store.open()
    try:
        await store.register()
        yield store
    finally:
        await store.close()


async def test_claim_load_checkpoint_finish(database: Database) -> None:
    await install(database)
    with Client(database) as c:
        instance = c.start(sql("SELECT 1"), label="Zürich")
        c.execute("UPDATE duroxide.instances SET vars = '{\"v\": \"1\"}'")
        async with opened(database) as store:
            [claim] = (await polled(store, 10)).claims
            assert (claim.instance_id, claim.fresh, claim.crashes) == (instance, True, 0)
            assert (await polled(store, 10)).claims == []
            loaded = (await store.load([instance], []))[instance]
            assert (loaded.label, loaded.variables, loaded.token) == ("Zürich", {"v": "1"}, claim.token)
            assert claim.loaded == loaded
            at = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
            error = StepError("m", "22012", "d", "h")
            rows = [Checkpoint("", 0, "completed", '{"rows":[]}', (), None, {"tag": "SELECT 0"}, at),
                    Checkpoint("/0:1", 1, "failed", error=error), Checkpoint("/0:2", 1, "waiting")]
            await store.checkpoint(instance, claim.token, Changes(rows=rows), big=("", 0))
            again = (await store.load([instance], [instance]))[instance]
            assert sorted(again.checkpoints, key=lambda r: r.execution) == rows
            await store.checkpoint(instance, claim.token, Changes(prune=["/0:1", "/0:2"], keep=[("/0:2", 1)]))
            assert [row[0] for row in c.history(instance)] == ["", "/0:2"]
            await store.checkpoint(instance, claim.token, Changes(finish=Finish("failed", "why", error)))
            assert c.rows("SELECT status, output, error->>'hint' FROM duroxide.instances") == [("failed", "why", "h")]
            with pytest.raises(LeaseLostError):
                await store.checkpoint(instance, claim.token, Changes(rows=rows))


async def test_step_done_records_what_a_checkpoint_would(database: Database) -> None:
    """In the middle, at the end, and after a cancel; and it refuses an old token, and what is recorded already."""
    await install(database)
    began = datetime(2026, 1, 2, tzinfo=UTC)
    rows = [Checkpoint("", 1, "completed", '{"n":1}', (Column("n", 23, "int4"),), None, {"tag": "SELECT 1"}, began),
            Checkpoint("", 3, "completed", '{"n":2}', (), None, None, None),
            Checkpoint("/1:2", 2, "completed", '{"x":"é"}', None, None, {"tag": "UPDATE 3"}, began)]
    with Client(database) as c:
        found = []
        pair = [c.start(seq(sql("SELECT 1"), signal("go"))) for _ in range(2)]
        async with opened(database) as store:
            assert store.has_step_done
            claims = {claim.instance_id: claim for claim in (await polled(store, 10)).claims}
            for instance in pair:
                c.execute("INSERT INTO duroxide.signals (instance_id, name) VALUES (%s, 'go')", instance)
            for instance, brief in zip(pair, (True, False), strict=True):
                token = claims[instance].token

                async def record(row: Checkpoint, finish: Finish | None = None, *, instance: str = instance,
                                 brief: bool = brief, token: str = token) -> None:
                    changes, key = Changes([row], finish=finish), (row.execution, row.node)
                    if brief:
                        arguments = step_done_arguments(instance, token, changes, key)
                        assert arguments is not None
                        casts = ["text", "uuid", "text", "int", "text", "jsonb", "jsonb", "timestamptz", "bool"]
                        call = STEP_DONE
                        for n, type_ in enumerate(casts, 1):
                            call = call.replace(f"${n}", f"${n}::text::{type_}")
                        async with store.transaction() as t:
                            await t.execute(call, *arguments)
                    else:
                        await store.execute(CHECKPOINT, *checkpoint_arguments(instance, token, changes, big=key))

                with pytest.raises(asyncpg.PostgresError) as caught:
                    await record(rows[0], token="00000000-0000-0000-0000-000000000000")
                assert caught.value.sqlstate == "DF001"
                seen = []
                for row in rows:
                    await record(row)
                    seen.append(c.rows("SELECT execution, node, event, result, types, error, meta, started_at FROM duroxide.history "
                                       "WHERE instance_id = %s ORDER BY 1, 2", instance))
                    seen.append(c.rows("SELECT status, output FROM duroxide.instances WHERE id = %s", instance))
                    seen.append(c.rows("SELECT owner, claims FROM duroxide.queue WHERE instance_id = %s", instance))
                last = replace(rows[2], node=5)
                await record(last, Finish("completed", '{"x":"é"}'))
                seen.append(c.rows("SELECT status, output, error, started_at IS NOT NULL, ended_at >= started_at, updated_at >= started_at "
                                   "FROM duroxide.instances WHERE id = %s", instance))
                seen.append(c.rows("SELECT FROM duroxide.queue WHERE instance_id = %s", instance))
                seen.append(c.rows("SELECT FROM duroxide.signals WHERE instance_id = %s", instance))
                with pytest.raises(asyncpg.PostgresError) as caught:
                    await record(last, Finish("completed", '{"x":"é"}'))
                assert caught.value.sqlstate == "DF001"
                found.append(seen)
            assert found[0] == found[1]
            assert found[0][-3:] == [[("completed", '{"x":"é"}', None, True, True, True)], [], []]

            # A step that ran twice must fail, rather than replace what it found the first time.
            instance = c.start(seq(sql("SELECT 1"), signal("go")))
            [claim] = (await polled(store, 10)).claims
            call = "CALL duroxide.step_done($1, $2::text::uuid, '', 1, $3, NULL, NULL, NULL, false)"
            await store.execute(call, instance, claim.token, "1")
            with pytest.raises(asyncpg.UniqueViolationError):
                await store.execute(call, instance, claim.token, "2")
            assert c.rows("SELECT result FROM duroxide.history WHERE instance_id = %s", instance) == [("1",)]

            # Whoever cancels first has the last word.
            instance = c.start(sql("SELECT 1"))
            [claim] = (await polled(store, 10)).claims
            c.execute("INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, 'cancel', 'enough')", instance)
            await store.execute("CALL duroxide.step_done($1, $2::text::uuid, '', 0, '1', NULL, NULL, NULL, true)",
                                instance, claim.token)
            assert c.outcome(instance) == ("cancelled", "canceled: enough")
            assert c.rows("SELECT FROM duroxide.queue WHERE instance_id = %s", instance) == []


async def test_a_claim_brings_what_is_new_and_small(database18: Database) -> None:
    """With what was sent to it; not where it has run before, where it is large, or where there are many."""
    await install(database18)
    with Client(database18) as c:
        async with opened(database18) as store:
            async def claims() -> dict[str, LoadedInstance | None]:
                return {claim.instance_id: claim.loaded for claim in (await polled(store, 100)).claims}

            signalled, plain = c.start(signal("go")), c.start(sql("SELECT 1"))
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '1')", signalled)
            found = await claims()
            assert found == await store.load([signalled, plain], [])
            assert [entry.name for entry in found[signalled].inbox] == ["go"]  # type: ignore[union-attr]
            await store.release([plain])
            large = c.start(sql("SELECT 1"))
            c.execute("UPDATE duroxide.instances SET graph = jsonb_build_array(graph->0 || jsonb_build_object('query', (SELECT "
                      "string_agg(md5(n::text), '') FROM generate_series(1, 2000) n))) WHERE id = %s", large)
            assert await claims() == {plain: None, large: None}
            many = [c.start(sql("SELECT 1")) for _ in range(11)]
            assert await claims() == dict.fromkeys(many)
            # Workers begin them all.
            await store.unregister()
        async with running_worker(database18):
            assert {status for status, _ in await ended(c, plain, large, *many)} == {"completed", "failed"}


async def test_a_claim_takes_what_it_may(database18: Database) -> None:
    """As many as there is room for, the first due first, signals or not; nothing that somebody has locked."""
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        first, locked, *rest = [c.start(signal("go")) for _ in range(6)]
        for place, instance in enumerate((first, locked, *rest)):
            c.execute("UPDATE duroxide.queue SET wake_at = now() - %s * interval '1 s' WHERE instance_id = %s", 9 - place,
                      instance)
        c.execute("INSERT INTO duroxide.signals (instance_id, name) VALUES (%s, 'go')", rest[3])
        other.execute("BEGIN")
        other.execute("SELECT FROM duroxide.queue WHERE instance_id = %s FOR UPDATE", locked)
        async with opened(database18) as store:
            async def claims(limit: int) -> set[str]:
                async with asyncio.timeout(20):
                    return {claim.instance_id for claim in (await polled(store, limit)).claims}

            assert await claims(0) == set()
            assert await claims(2) == {rest[3], first}
            assert c.one("SELECT seen FROM duroxide.signals") is True
            assert await claims(2) == {rest[0], rest[1]}
            assert await claims(10) == {rest[2]}
            other.execute("ROLLBACK")
            assert await claims(10) == {locked}
            [began] = c.rows("SELECT started_at, claims FROM duroxide.queue WHERE instance_id = %s", first)
            await store.release([first])
            assert await claims(10) == {first}
            assert c.rows("SELECT started_at, claims FROM duroxide.queue WHERE instance_id = %s", first) == [
                (began[0], began[1] + 1)]


async def test_a_new_fence_shuts_the_old_token_out(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(sql("SELECT 1"))
        async with opened(database18) as store:
            [claim] = (await polled(store, 10)).claims
            token = await store.refence(instance)
            with pytest.raises(LeaseLostError):
                await store.checkpoint(instance, claim.token, Changes(rows=[Checkpoint("", 0, "completed", "1")]))
            await store.checkpoint(instance, token, Changes(rows=[Checkpoint("", 0, "completed", "1")]))
            await store.release([instance])
            with pytest.raises(LeaseLostError):
                await store.refence(instance)


async def test_the_fence_waits_for_a_session_that_was_lost_sight_of(database18: Database) -> None:
    """A checkpoint that is under way with the old token commits before the fence returns; nobody runs the step twice."""
    await install(database18)
    with Client(database18) as c, Client(database18) as zombie:
        instance = c.start(sql("SELECT 1"))
        async with opened(database18) as store:
            [claim] = (await polled(store, 10)).claims
            zombie.execute("BEGIN")
            zombie.execute("SELECT duroxide.checkpoint(%s, %s, '[{\"execution\":\"\",\"node\":0,\"event\":\"completed\"}]')",
                           instance, claim.token)
            with pytest.raises(asyncpg.LockNotAvailableError):
                await store.refence(instance)
            zombie.execute("COMMIT")
            await store.refence(instance)
            assert len((await store.load([instance], [instance]))[instance].checkpoints) == 1


async def test_open_transactions_of_callers_hold_up_no_poll(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        held = c.start(signal("go"))
        async with opened(database18) as store:
            assert len((await polled(store, 10)).claims) == 1
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '1')", held)
            other.execute("BEGIN")
            other.execute("DELETE FROM duroxide.signals")
            [entry] = (await polled(store, 10)).inbox  # nothing was deleted yet
            store.handled(entry.seq)
            instance = c.start(sql("SELECT 1"))
            assert [claim.instance_id for claim in (await polled(store, 10)).claims] == [instance]
            other.execute("ROLLBACK")
            assert [again.name for again in (await polled(store, 10)).inbox] == ["go"]
            store.handled(entry.seq)
            assert (await polled(store, 10)).inbox == []


async def test_inbox_entries_are_told_until_they_are_handled(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(signal("go"))
        async with opened(database18) as store:
            [claim] = (await polled(store, 10)).claims
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '1')", instance)
            [entry] = (await polled(store, 10)).inbox
            assert (await polled(store, 10)).inbox == [entry]
            store.handled(entry.seq)
            assert (await polled(store, 10)).inbox == []
            assert (await store.load([instance], []))[instance].inbox == [entry]
            # Parked before it was handled: it is claimed for it at once.
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '2')", instance)
            await store.checkpoint(instance, claim.token, Changes(), park="infinity")
            assert [again.instance_id for again in (await polled(store, 10)).claims] == [instance]


async def test_a_brief_poll_that_claims_does_no_more(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(signal("go"))
        async with opened(database18) as store:
            await polled(store, 10)
            c.execute("INSERT INTO duroxide.signals (instance_id, name, data) VALUES (%s, 'go', '1')", instance)
            found = await polled(store, 10, brief=True)
            [entry] = found.inbox
            assert (found.claims, found.looked) == ([], True)
            store.handled(entry.seq)
            later, other = c.start(sql("SELECT 1")), c.start(sql("SELECT 1"))
            c.execute("UPDATE duroxide.queue SET wake_at = '2030-01-01T00:00:00Z' WHERE instance_id = %s", later)
            found = await polled(store, 10, brief=True)
            assert [claim.instance_id for claim in found.claims] == [other]
            assert (found.inbox, found.next_due, found.looked) == ([], None, False)
            assert c.one("SELECT NOT seen FROM duroxide.signals")
            c.start(sql("SELECT 1"))
            found = await polled(store, 10)
            assert (len(found.claims), found.inbox, found.looked) == (1, [], True)
            assert found.next_due == datetime(2030, 1, 1, tzinfo=UTC)
            assert c.one("SELECT seen FROM duroxide.signals")


async def test_who_is_cancelled_while_a_claim_commits_takes_nobody_along(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.execute("CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END'")
        c.execute("CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON duroxide.queue DEFERRABLE INITIALLY DEFERRED"
                  " FOR EACH ROW EXECUTE FUNCTION slow()")
        c.start(sql("SELECT 1"))
        async with opened(database18) as store:
            found = await store.poll(10)
            surroundings = Surroundings(store.settings, store, *[Mock()] * 6)
            first, second = (asyncio.ensure_future(HeldInstance(name, surroundings, found.committed)._sure())
                             for name in ("first", "second"))
            await asyncio.sleep(0)
            first.cancel()
            await second
            assert first.cancelled()
            c.start(sql("SELECT 1"))
            found = await store.poll(10)
            settling = asyncio.ensure_future(store.settle(found))
            await asyncio.sleep(0)
            settling.cancel()
            with pytest.raises(ConnectionLostError):  # nobody knows: the session was dropped
                await found.committed
            assert settling.cancelled()


async def test_a_claim_that_a_lost_worker_still_made_is_freed(database18: Database) -> None:
    """Its claim is under way while another worker takes it for dead."""
    await install(database18)
    with Client(database18) as c, Client(database18) as late:
        instance = c.start(sql("SELECT 1"))
        async with opened(database18, lease=1.0) as first, opened(database18, lease=3600.0) as second:
            c.execute("UPDATE duroxide.workers SET heartbeat_at = '-infinity' WHERE id::text = %s", first.worker_id)
            late.execute("BEGIN")
            assert late.one("SELECT count(*) FROM duroxide.claim(%s, 10)", first.worker_id) == 1
            await second.heartbeat()
            late.execute("COMMIT")
            assert (await polled(second, 10)).claims == []
            await second.heartbeat()
            assert [claim.instance_id for claim in (await polled(second, 10)).claims] == [instance]
            await second.release([instance])
            assert (await polled(first, 10)).claims == []  # it is registered no more


async def test_instances_of_a_worker_that_is_not_registered_are_freed(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.start(sql("SELECT 1"))
        async with opened(database18) as first, opened(database18) as second:
            assert len((await polled(first, 10)).claims) == 1
            c.execute("DELETE FROM duroxide.workers WHERE id::text = %s", first.worker_id)
            await second.heartbeat()
            assert len((await polled(second, 10)).claims) == 1


async def test_two_finishes_that_wait_for_a_caller_hold_up_nobody_else(database18: Database) -> None:
    """More blocked checkpoints than the pool has connections."""
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        held = [c.start(seq(sql("SELECT 1"), signal("go", 1))) for _ in range(6)]
        other.execute("BEGIN")
        for instance in held:
            other.execute("INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, 'cancel', 'x')", instance)
        async with running_worker(database18, retry_max=0.5):
            await until(lambda: all(len(c.history(i)) == 2 for i in held))
            await asyncio.sleep(1)  # into the blocked finishes
            instances = [c.start(seq(sql("SELECT 1"), signal("go", 1))) for _ in range(3)]
            assert {s for s, _ in await ended(c, *instances)} == {"completed"}
            other.execute("COMMIT")
            await until(lambda: c.one("SELECT count(*) FROM duroxide.queue") == 0)
        assert {c.outcome(i) for i in held} == {("cancelled", "canceled: x")}


async def test_poll_says_when_the_next_one_is_due(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        c.start(sql("SELECT 1"))
        c.execute("UPDATE duroxide.queue SET wake_at = '2030-01-01T00:00:00Z'")
        async with opened(database18) as store:
            found = await polled(store, 10)
            assert (found.claims, found.next_due) == ([], datetime(2030, 1, 1, tzinfo=UTC))
            c.execute("UPDATE duroxide.queue SET wake_at = 'infinity'")
            assert (await polled(store, 10)).next_due is None
            here = c.one("SELECT clock_timestamp()")
            assert abs(store.clock.now() - here) < timedelta(seconds=5)


async def test_lost_workers_are_reaped(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(sql("SELECT 1"))
        async with opened(database18, lease=1.0) as first, opened(database18, lease=3600.0) as second:
            assert len((await polled(first, 10)).claims) == 1
            assert (await polled(second, 10)).claims == []
            c.execute("UPDATE duroxide.workers SET heartbeat_at = pg_postmaster_start_time(), lease = '1 ms' "
                      "WHERE id::text = %s", first.worker_id)
            assert await second.heartbeat() is True
            assert await first.heartbeat() is False
            [claim] = (await polled(second, 10)).claims
            assert (claim.instance_id, claim.fresh, claim.crashes) == (instance, False, 1)
            assert await second.owned() == [instance]
            assert await first.owned() == []


async def test_an_instance_deleted_behind_the_worker_s_back(database18: Database) -> None:
    await install(database18)
    with Client(database18) as c:
        instance = c.start(sql("SELECT 1"))
        c.execute("ALTER TABLE duroxide.instances DISABLE TRIGGER on_delete; DELETE FROM duroxide.instances")
        async with opened(database18) as store:
            assert len((await polled(store, 10)).claims) == 1
            assert await store.load([instance], []) == {}
        assert c.one("SELECT count(*) FROM duroxide.queue") == 0


@pytest.mark.parametrize("how", ["step_done", "checkpoint", "checkpoints"])
async def test_a_delete_and_an_end_do_not_wait_for_each_other(database18: Database, how: str) -> None:
    """Both lock the instance before its place in the queue: in different orders that would be a deadlock."""
    await install(database18)
    with Client(database18) as c, Client(database18) as other:
        instance = c.start(sql("SELECT 1"))
        async with opened(database18) as store, asyncio.TaskGroup() as group:
            [claim] = (await polled(store, 10)).claims
            other.execute("BEGIN")
            other.execute("SELECT FROM duroxide.instances WHERE id = %s FOR UPDATE", instance)  # as a DELETE begins
            arguments = checkpoint_arguments(instance, claim.token, Changes(finish=Finish("completed", "1")))
            match how:
                case "step_done":
                    end = store.execute("CALL duroxide.step_done($1, $2::text::uuid, '', 0, '1', NULL, NULL, NULL, true)",
                                        instance, claim.token)
                case "checkpoint":
                    end = store.execute(CHECKPOINT, *arguments)
                case _:
                    end = store.execute("SELECT duroxide.checkpoints($1)", json.dumps([arguments]))

            async def refused() -> str:
                try:
                    await end
                except asyncpg.PostgresError as e:
                    return str(e.sqlstate)
                return ""

            task = group.create_task(refused())
            await until(lambda: c.one("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = "
                                      "current_database()") == 1)
            await asyncio.to_thread(other.execute, "DELETE FROM duroxide.instances WHERE id = %s", instance)
            other.execute("COMMIT")
            assert await task == ("" if how == "checkpoints" else "DF001")  # which says whose lease is lost in its answer
        assert c.one("SELECT count(*) FROM duroxide.history") == 0


async def test_identity_report(database18: Database) -> None:
    await install(database18)
    async with opened(database18) as store:
        report = await Identities(settings(database18), store).report()
        assert report == f"steps of {database18.owner} run as itself; 0 other role(s) through executor logins"


def test_checkpoint_arguments() -> None:
    changes = Changes(
        rows=[Checkpoint("", 1, "decided", "then"), Checkpoint("", 2, "completed", '{"x":"é"}')], consumed=[3, 4],
        prune=['/1:1"\\'], keep=[("", 1)], finish=Finish("completed", '{"x":"é"}'))
    assert checkpoint_arguments("id", "token", changes, big=("", 2), park="infinity") == [
        "id", "token",
        '[{"execution":"","node":1,"event":"decided","result":"then"},'
        '{"execution":"","node":2,"event":"completed","big":true}]',
        '{"x":"é"}', "{3,4}", '{"/1:1\\"\\\\"}', '[["",1]]', "infinity",
        '{"status":"completed","output_is_result":true}']
    assert checkpoint_arguments("id", "token", Changes()) == ["id", "token", "[]"] + [None] * 6


def test_what_step_done_can_record() -> None:
    began = datetime(2026, 1, 2, tzinfo=UTC)
    row = Checkpoint("/1:2", 2, "completed", '{"x":"é"}', (), meta={"tag": "UPDATE 3"}, started_at=began)
    known = ["id", "token", "/1:2", "2", '{"x":"é"}', "[]", '{"tag":"UPDATE 3"}', "2026-01-02T00:00:00+00:00"]
    ends = Finish("completed", '{"x":"é"}')

    def arguments(**changes: Any) -> list[str | None] | None:
        return step_done_arguments("id", "token", Changes(**{"rows": [row], **changes}), ("/1:2", 2))

    assert arguments() == [*known, "f"]
    assert arguments(finish=ends) == [*known, "t"]
    assert step_done_arguments("id", "token", Changes([Checkpoint("", 2, "completed", "1")]), ("", 2)) == [
        "id", "token", "", "2", "1", None, None, None, "f"]
    for other in (
        {"rows": [row, row]}, {"rows": []}, {"rows": [replace(row, event="started")]}, {"rows": [replace(row, node=3)]},
        {"rows": [replace(row, error=StepError("no"))]}, {"consumed": [1]}, {"prune": ["/1:1"]}, {"keep": [("", 1)]},
        {"finish": replace(ends, output="else")}, {"finish": replace(ends, status="failed")},
        {"finish": replace(ends, error=StepError("no"))},
    ):
        assert arguments(**other) is None, other


def test_clock_prefers_sharp_readings() -> None:
    clock = Clock()
    clock.measure(100.0, 100.002, 1000.0)
    sharp = clock._offset
    clock.measure(101.0, 103.0, 5000.0)
    assert clock._offset == sharp
    clock.measure(140.0, 141.0, 2000.5)
    assert clock._offset == 1860.0


def test_life_and_death() -> None:
    mine = Life.mine()
    assert mine is not None
    assert not is_dead(f"host:1 {mine}")
    assert is_dead(f"host:1 {Life(mine.place, mine.pid, '1')}")
    assert not is_dead(f"host:1 {Life('another machine', mine.pid, '1')}")
    assert not is_dead("host:1")


async def test_a_poll_can_be_a_heartbeat_too(database18: Database) -> None:
    await install(database18)
    store = Store(settings(database18))
    await store.open()
    await store.register()
    with Client(database18) as c:
        age = "SELECT clock_timestamp() - heartbeat_at > interval '1 hour' FROM duroxide.workers"
        c.execute("UPDATE duroxide.workers SET heartbeat_at = heartbeat_at - interval '2 hours'")
        assert (await polled(store, 10)).alive
        assert c.one(age) is True
        assert (await polled(store, 10, beat=True)).alive
        assert c.one(age) is False
        c.execute("DELETE FROM duroxide.workers")
        c.start(sql("SELECT 1"))
        found = await polled(store, 10, beat=True)
        assert (found.alive, found.claims) == (False, [])
    await store.close()
