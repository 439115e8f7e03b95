"""Steps that try to be more than their submitter, or to leave something behind, on executor logins of every version.

The owner of the schemas is NOSUPERUSER CREATEROLE, as everywhere in these tests. After each attempt the same session runs
a look around, in another workflow and in the same one: it must see what it saw before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql as pgsql

from tests.engine.fix_graphs import Tree, seq, sql
from tests.engine.helpers import Client, ended, install, running_worker
from tests.engine.test_identity import grant_usage, make_role
from tests.fix_postgres import Database, fresh_database, running_cluster, versions

DENIED = "permission denied"
#: Everything about a session that a step could notice.
LOOK = """
SELECT current_user::text AS cu, session_user::text AS su, current_setting('role') AS role, current_schemas(false)::text AS schemas,
       (SELECT count(*) FROM pg_class WHERE relpersistence = 't' AND pg_table_is_visible(oid)) AS temporary,
       (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory') AS locks,
       (SELECT count(*) FROM pg_prepared_statements WHERE from_sql) AS prepared,
       (SELECT count(*) FROM pg_listening_channels()) AS channels,
       (SELECT count(*) FROM pg_cursors WHERE name <> '') AS cursors,
       (SELECT md5(string_agg(name || '=' || setting, ';' ORDER BY name)) FROM pg_settings
         WHERE source = 'session' OR name IN ('search_path', 'TimeZone', 'DateStyle', 'work_mem', 'session_replication_role',
                                              'default_transaction_read_only', 'statement_timeout')) AS settings,
       current_setting('df.in_workflow') AS workflow,
       (SELECT count(*) FROM pg_prepared_xacts) AS prepared_transactions
"""
WRITE = "INSERT INTO duroxide.history (instance_id, execution, node, event, result) VALUES ('{i}', '', 0, 'completed', '42')"
#: What is tried, and what the failure says; None: it succeeds, and gains nothing. {owner} is the service role, {me} the role
#: itself; each is a statement.
HOSTILE: list[tuple[str, str | None]] = [
    # Another role
    ("RESET ROLE", None),
    ("SET ROLE NONE", None),
    ("SET ROLE {owner}", DENIED),
    ("SET ROLE {me}", None),
    ("SET SESSION AUTHORIZATION {owner}", DENIED),
    ("SET LOCAL SESSION AUTHORIZATION {owner}", DENIED),
    ("SELECT set_config('role', '{owner_name}', false)", DENIED),
    ("SELECT set_config('role', 'none', true)", None),
    ("SELECT set_config('session_authorization', '{owner_name}', false)", DENIED),
    ("DO $x$ BEGIN RESET ROLE; EXECUTE 'SET ROLE {owner}'; END $x$", DENIED),
    ("DO $x$ BEGIN RESET SESSION AUTHORIZATION; EXECUTE 'SET ROLE {owner}'; END $x$", DENIED),
    ("GRANT {owner} TO {me}", "denied|must have admin option"),
    ("DO $x$ BEGIN RESET ROLE; GRANT {owner} TO {me}; END $x$", "denied|must have admin option"),
    ("ALTER ROLE {me} SUPERUSER", "denied|must be superuser"),
    ("CREATE ROLE hostile_{owner_name} SUPERUSER", "denied|must be superuser"),
    # State that is not the step's
    ("DO $x$ BEGIN {write}; END $x$", DENIED),
    ("DO $x$ BEGIN RESET ROLE; {write}; END $x$", DENIED),
    ("DO $x$ BEGIN RESET ROLE; UPDATE duroxide.queue SET wake_at = 'infinity'; END $x$", DENIED),
    ("DO $x$ BEGIN RESET ROLE; PERFORM token FROM duroxide.queue; END $x$", DENIED),
    ("UPDATE duroxide.instances SET output = 'mine', status = 'completed'", DENIED),
    ("DO $x$ BEGIN PERFORM duroxide.checkpoint('00000000', gen_random_uuid(), '[]'); END $x$", DENIED),
    ("DO $x$ BEGIN RESET ROLE; PERFORM duroxide.checkpoint((SELECT id FROM duroxide.instances LIMIT 1), gen_random_uuid(), '[]'); END $x$", DENIED),
    ("DO $x$ BEGIN RESET ROLE; PERFORM duroxide.checkpoint('00000000', gen_random_uuid(), '[]'); END $x$", "lease on instance 00000000 lost"),
    ("DO $x$ BEGIN RESET ROLE; PERFORM duroxide.checkpoints('[]'); END $x$", DENIED),
    ("CALL duroxide.step_done('00000000', gen_random_uuid(), '', 0, '1', NULL, NULL, NULL, true)", DENIED),
    ("DO $x$ BEGIN RESET ROLE; CALL duroxide.step_done('00000000', gen_random_uuid(), '', 0, '1', NULL, NULL, NULL, true); END $x$",
     "lease on instance 00000000 lost"),
    ("CREATE OR REPLACE FUNCTION public.definer() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $x$ BEGIN {write}; END $x$", None),
    ("SELECT public.definer()", DENIED),
    ("CREATE OR REPLACE FUNCTION public.definer() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $x$ BEGIN "
     "EXECUTE 'SET ROLE {owner}'; END $x$", None),
    ("SELECT public.definer()", "cannot set parameter|" + DENIED),
    ("CREATE TRIGGER mine AFTER INSERT ON duroxide.history EXECUTE FUNCTION public.definer()", DENIED),
    ("CREATE FUNCTION duroxide.checkpoint(text) RETURNS void LANGUAGE sql AS ''", DENIED),
    # The transaction
    ("COMMIT", "can't end its transaction"),
    ("ROLLBACK", "can't end its transaction"),
    ("COMMIT AND CHAIN", "can't end its transaction"),
    ("/* now */ prepare -- it\n TRANSACTION 'mine'", "can't end its transaction"),
    ("SAVEPOINT a", None),
    ("SET TRANSACTION READ ONLY", None),
    ("SET CONSTRAINTS ALL DEFERRED", None),
    ("DO $x$ BEGIN COMMIT; END $x$", None),  # outside of a transaction block, at least once
    # What is found first, and by which name
    ("SET search_path = pg_temp, public", None),
    ("CREATE TEMP TABLE history AS SELECT 1 AS instance_id", None),
    ("CREATE TEMP TABLE pg_class AS SELECT 1 AS oid", None),
    ("CREATE TYPE pg_temp.jsonb AS (a int)", None),
    ("DO $x$ BEGIN CREATE DOMAIN pg_temp.text AS pg_catalog.int4; SET search_path = pg_temp; END $x$", None),
    ("DO $x$ BEGIN CREATE FUNCTION pg_temp.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS 'SELECT 1 / 0'; "
     "SET search_path = pg_temp, pg_catalog; END $x$", None),
    # What stays in a session
    ("SET statement_timeout = '10s'", None),
    ("SET session_replication_role = replica", DENIED),
    ("SELECT set_config('df.in_workflow', 'false', false)", None),
    ("SET default_transaction_read_only = on", None),
    ("SET client_encoding = 'LATIN1'", "can't change client_encoding"),
    ("SET standard_conforming_strings = off", None),
    ("SELECT pg_advisory_lock(1), pg_advisory_lock_shared(2)", None),
    ("PREPARE mine AS SELECT 1", None),
    ("DECLARE mine CURSOR WITH HOLD FOR SELECT 1", None),
    ("DO $x$ BEGIN LISTEN mine; NOTIFY mine, 'hello'; END $x$", None),
    ("DO $x$ BEGIN PERFORM pg_advisory_lock(7); EXECUTE 'PREPARE mine AS SELECT 1'; RAISE 'no'; END $x$", "no"),
    ("DISCARD ALL", None),  # outside of a transaction block
    # The session itself
    ("SELECT pg_terminate_backend(pg_backend_pid())", "denied|must be a member|the connection was lost"),
    ("DO $x$ BEGIN RESET ROLE; PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(10); END $x$", "the connection was lost"),
    ("DO $x$ BEGIN RESET ROLE; PERFORM pg_cancel_backend(pg_backend_pid()); PERFORM pg_sleep(10); END $x$", "canceling statement"),
    ("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'dfproxy:control'", DENIED + "|must be a member|NULL"),
    ("COPY (SELECT 1) TO PROGRAM 'true'", DENIED + "|must be superuser"),
    ("LOAD 'auto_explain'", "access to library|" + DENIED),
]


@pytest.fixture(scope="module", params=versions(), ids=lambda v: f"pg{v}")
def hostile(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A server that allows prepared transactions."""
    with running_cluster(request.param, settings={"max_prepared_transactions": "5"}) as cluster, \
            fresh_database(cluster, request.param) as database:
        yield database


async def test_the_next_step_does_not_notice(hostile: Database) -> None:
    await install(hostile)
    name = f'Mallory "{hostile.name}"'
    make_role(hostile, name, "LOGIN")
    await asyncio.to_thread(grant_usage, hostile, name)
    quoted = {"owner": pgsql.Identifier(hostile.owner).as_string(), "me": pgsql.Identifier(name).as_string(),
              "owner_name": hostile.owner}
    with Client(hostile, name) as c, Client(hostile) as owner:
        victim = owner.start(sql("SELECT pg_sleep(0)"))
        async with running_worker(hostile, max_user_connections=1, max_crashes=2, retry_min=0.01) as worker:

            async def run(step: str | Tree) -> tuple[str, str | None]:
                instance = c.start(sql(step) if isinstance(step, str) else step)
                worker.wake()
                return (await ended(c, instance))[0]

            before = await run(LOOK)
            assert before[0] == "completed", before
            for step, words in HOSTILE:
                text = step.replace("{write}", WRITE.replace("{i}", victim))
                for key, value in quoted.items():
                    text = text.replace("{" + key + "}", value)
                status, output = await run(text)
                if words is None:
                    assert status == "completed", (step, output)
                    # Nor does the next one of the same workflow, which goes to the server together with the commit.
                    assert await run(LOOK) == before, step
                    assert await run(seq(sql(text), sql(LOOK))) == before, step
                elif status == "completed":
                    assert "NULL" in words, (step, output)
                else:
                    assert status == "failed", step
                    assert any(w in (output or "") for w in words.split("|")), (step, output)
                assert await run(LOOK) == before, step
            assert worker.statistics.bugs == 0
        # Nothing of it has reached what is not Mallory's.
        assert owner.outcome(victim)[0] == "completed"
        assert owner.history(victim) == [("", 0, "completed", '{"rows":[{"pg_sleep":null}],"row_count":1}')]
        with psycopg.connect(hostile.superuser_dsn, autocommit=True) as admin:
            assert admin.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone() == (0,)
            assert admin.execute("SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = %s", (name,)).fetchone() == (False,)
            admin.execute(pgsql.SQL("DROP OWNED BY {0}; DROP FUNCTION IF EXISTS public.definer()").format(pgsql.Identifier(name)))
