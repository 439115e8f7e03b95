"""Who steps run as, on every version, with a service role that is no superuser."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import sql as pgsql

from engine import identity
from engine.identity import Identities, derive_password, scram_verifier
from engine.migrate import migrate
from tests.engine.fix_graphs import seq, sql
from tests.engine.helpers import Client, ended, install, running_worker
from tests.fix_postgres import Database, fresh_database, running_cluster, versions


def make_role(database: Database, name: str, *options: str) -> None:
    """A submitter that may connect without a password, and may start workflows; without an executor login."""
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        role = pgsql.Identifier(name)
        c.execute(pgsql.SQL("CREATE ROLE {} {}").format(role, pgsql.SQL(" ".join(options))))
        c.execute(pgsql.SQL("GRANT USAGE ON SCHEMA duroxide TO {}").format(role))
        c.execute(pgsql.SQL("GRANT SELECT, INSERT ON duroxide.instances TO {}").format(role))
        c.execute(pgsql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))


def grant_usage(database: Database, name: str) -> None:
    """df.grant_usage as the administrator runs it."""
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        c.execute("SELECT df.grant_usage(%s)", (name,))


@pytest.fixture
def role(database: Database) -> str:
    """A submitter with an executor login, with a name that needs quoting."""
    name = f"Ann O'Neil \"{database.name}\""
    return name


async def prepared(database: Database, name: str) -> None:
    await install(database)
    make_role(database, name, "LOGIN")
    await asyncio.to_thread(grant_usage, database, name)


async def test_steps_run_on_executor_logins(database: Database, role: str) -> None:
    await prepared(database, role)
    with Client(database, role) as c:
        tree = seq(sql("CREATE TABLE public.mine (n int)"), sql("RESET ROLE"),
                   sql("SELECT current_user::text AS c, session_user::text AS s, current_setting('is_superuser') AS su"))
        instance = c.start(tree)
        async with running_worker(database):
            [(status, output)] = await ended(c, instance)
        assert status == "completed"
        [(oid,)] = c.rows("SELECT oid FROM pg_roles WHERE rolname = %s", role)
        assert f'"s":"dfx_{oid}"' in (output or "")
        assert '"su":"off"' in (output or "")
        assert c.one("SELECT tableowner FROM pg_tables WHERE tablename = 'mine'") == role


FORBIDDEN = [
    "SET ROLE {owner}",
    "SELECT * FROM duroxide.secret",
    "SELECT token FROM duroxide.queue",
    "UPDATE duroxide.queue SET owner = NULL",
    "SELECT duroxide.claim(gen_random_uuid(), 100)",
    "INSERT INTO duroxide.history (instance_id, execution, node, event) VALUES ('00000000', '', 0, 'completed')",
    "SET SESSION AUTHORIZATION {owner}",
    "ALTER TABLE duroxide.instances DISABLE ROW LEVEL SECURITY",
]


async def test_what_a_step_may_not_do(database: Database, role: str) -> None:
    await prepared(database, role)
    with Client(database, role) as c:
        instances = []
        for step in FORBIDDEN:
            text = step.format(owner=database.owner)
            # RESET ROLE and the attempt in one step, as an attacker would.
            instances += [c.start(sql(text)),
                          c.start(sql(f"DO $x$ BEGIN RESET ROLE; EXECUTE $y$ {text} $y$; END $x$"))]
        async with running_worker(database):
            for status, output in await ended(c, *instances):
                assert status == "failed"
                assert "permission denied" in (output or "") or "must be owner" in (output or ""), output


async def test_a_step_without_a_token_can_t_write_checkpoints(database: Database, role: str) -> None:
    await prepared(database, role)
    with Client(database, role) as c:
        instance = c.start(sql(
            "DO $x$ BEGIN RESET ROLE; PERFORM duroxide.checkpoint('00000000', gen_random_uuid(), '[]'); END $x$"))
        async with running_worker(database):
            [(status, output)] = await ended(c, instance)
        assert status == "failed"
        assert "lease on instance 00000000 lost" in (output or "")


async def test_role_and_database_defaults_apply(database: Database, role: str) -> None:
    await prepared(database, role)
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        who, where = pgsql.Identifier(role), pgsql.Identifier(database.name)
        c.execute("CREATE SCHEMA theirs")
        for statement in ("ALTER ROLE {r} SET search_path = theirs, public", "ALTER ROLE {r} SET my.tenant = 'a=b c'",
                          "ALTER ROLE {r} IN DATABASE {d} SET statement_timeout = '77s'",
                          "ALTER ROLE {r} SET statement_timeout = '1s'", "ALTER ROLE {r} SET log_min_messages = 'panic'",
                          "ALTER DATABASE {d} SET lock_timeout = '55s'", "ALTER ROLE {r} SET TimeZone = 'Asia/Tokyo'"):
            c.execute(pgsql.SQL(statement).format(r=who, d=where))  # type: ignore[arg-type]
    names = ("search_path", "my.tenant", "statement_timeout", "lock_timeout", "TimeZone", "df.in_workflow")
    step = "SELECT concat_ws(';'," + ",".join(f"current_setting('{n}')" for n in names) + ") AS s"
    with Client(database, role) as c:
        instance = c.start(seq(sql("RESET ALL"), sql(step)))
        async with running_worker(database, max_user_connections=1):
            assert await ended(c, instance) == [
                ("completed", '{"rows":[{"s":"theirs, public;a=b c;77s;55s;UTC;true"}],"row_count":1}')]


async def test_no_executor_no_run(database: Database) -> None:
    await install(database)
    name = f"plain_{database.name}"
    make_role(database, name, "LOGIN")
    with Client(database, name) as c:
        instance = c.start(sql("SELECT 1"))
        async with running_worker(database):
            [(status, output)] = await ended(c, instance)
        assert status == "failed"
        assert output == f'Instance {instance}: role "{name}" has no executor login to run steps with; ' \
                         f"an administrator can make one: SELECT df.grant_usage('{name}')"


async def test_plain_set_role_where_it_is_allowed(database: Database) -> None:
    await install(database)
    name = f"plain_{database.name}"
    make_role(database, name, "LOGIN")
    with psycopg.connect(database.superuser_dsn, autocommit=True) as admin:
        admin.execute(pgsql.SQL("GRANT {} TO {}").format(pgsql.Identifier(name), pgsql.Identifier(database.owner)))
    with Client(database, name) as c:
        instance = c.start(sql("SELECT current_user::text AS c, session_user::text AS s"))
        async with running_worker(database, allow_set_role=True):
            assert await ended(c, instance) == [
                ("completed", f'{{"rows":[{{"c":"{name}","s":"{database.owner}"}}],"row_count":1}}')]


async def test_many_that_begin_at_once_look_once(database18: Database, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await prepared(database18, role)
    looks = []
    whole = Identities._look_up

    async def look_up(self, oid, *rest):  # type: ignore[no-untyped-def]
        looks.append(oid)
        return await whole(self, oid, *rest)

    monkeypatch.setattr(Identities, "_look_up", look_up)
    monkeypatch.setattr(identity, "CACHE", 3600.0)
    with Client(database18, role) as c:
        instances = [c.start(sql("SELECT 1")) for _ in range(50)]
        async with running_worker(database18):
            assert {s for s, _ in await ended(c, *instances)} == {"completed"}
    assert len(looks) == 1


async def test_superusers_and_nologin_roles(database: Database) -> None:
    await install(database)
    name = f"nologin_{database.name}"
    make_role(database, name, "NOLOGIN")
    await asyncio.to_thread(grant_usage, database, name)
    with Client(database, "postgres") as c:
        as_superuser = c.start(sql("SELECT 1 AS n"))
        c.execute(f"SET ROLE {name}")
        first = c.start(sql("SELECT current_user::text AS c"))
        async with running_worker(database):
            outcomes = await ended(c, first)
            assert outcomes == [("completed", f'{{"rows":[{{"c":"{name}"}}],"row_count":1}}')]
            c.execute("RESET ROLE")
            assert await ended(c, as_superuser) == [
                ("failed", f'pg_durable blocked instance {as_superuser}: submitted_by role "postgres" is a superuser, '
                           "but pg_durable.enable_superuser_instances is off")]
        c.execute(f"SET ROLE {name}")
        second = c.start(sql("SELECT 1"))
        async with running_worker(database, require_login=True):
            [(status, output)] = await ended(c, second)
        assert (status, "LOGIN" in (output or "")) == ("failed", True)


async def test_a_dropped_role_fails_its_instances(database: Database) -> None:
    await install(database)
    name = f"gone_{database.name}"
    make_role(database, name, "LOGIN")
    with Client(database, name) as c:
        instance = c.start(sql("SELECT 1"))
    with psycopg.connect(database.superuser_dsn, autocommit=True) as admin:
        admin.execute(pgsql.SQL("DROP OWNED BY {}").format(pgsql.Identifier(name)))
        admin.execute(pgsql.SQL("DROP ROLE {}").format(pgsql.Identifier(name)))
    with Client(database) as c:
        async with running_worker(database):
            assert await ended(c, instance) == [
                ("failed", f"Instance {instance}: submitted_by role no longer exists in pg_roles")]


@pytest.mark.parametrize("version", versions())
async def test_executors_log_in_with_derived_passwords(version: int) -> None:
    """The server asks executors for SCRAM; the passwords are set by the worker, and again when the secret changes."""
    hba = ["local all all trust", "host all postgres,app,owner 127.0.0.1/32 trust",
           "host all all 127.0.0.1/32 scram-sha-256"]
    with running_cluster(version, hba=hba) as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE owner LOGIN CREATEROLE")
            c.execute("CREATE DATABASE home OWNER owner")
        database = Database(cluster, "home", "owner", version)
        await migrate(database.dsn())
        make_role(database, "app", "LOGIN")
        await asyncio.to_thread(grant_usage, database, "app")
        with Client(database, "app") as c:
            for given in (None, "from the settings", "another secret"):
                instance = c.start(sql("SELECT session_user LIKE 'dfx%' AS yes"))
                async with running_worker(database, secret=given):
                    assert await ended(c, instance) == [
                        ("completed", '{"rows":[{"yes":true}],"row_count":1}')]
        with Client(database, "postgres") as c:
            assert c.rows("SELECT password_set FROM duroxide.executors") == [(True,)]
            assert c.one("SELECT rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname LIKE 'dfx%'") is True


async def test_who_may_not_set_the_password_is_told() -> None:
    version = versions()[0]
    hba = ["local all all trust", "host all postgres,app,owner 127.0.0.1/32 trust",
           "host all all 127.0.0.1/32 scram-sha-256"]
    with running_cluster(version, hba=hba) as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE owner LOGIN NOCREATEROLE")
            c.execute("CREATE DATABASE home OWNER owner")
        database = Database(cluster, "home", "owner", version)
        await migrate(database.dsn())
        make_role(database, "app", "LOGIN")
        await asyncio.to_thread(grant_usage, database, "app")
        with Client(database, "app") as c:
            instance = c.start(sql("SELECT 1"))
            async with running_worker(database):
                [(status, output)] = await ended(c, instance)
        assert status == "failed"
        assert "the service role may not set the password of" in (output or "")


def test_derived_passwords() -> None:
    assert derive_password("s", "dfx_1") == derive_password("s", "dfx_1")
    assert len({derive_password(s, e) for s in "ab" for e in ("dfx_1", "dfx_2")}) == 4
    assert scram_verifier("x") != scram_verifier("x")


async def test_a_verifier_is_what_the_server_expects(database18: Database) -> None:
    """The same form as the server's own; that it logs in is tested above."""
    with fresh_database(database18.cluster, database18.version) as d, Client(d, "postgres") as c:
        c.execute(f"CREATE ROLE verified_{d.name} PASSWORD '{scram_verifier('secret')}'")
        stored = c.one("SELECT rolpassword FROM pg_authid WHERE rolname = %s", f"verified_{d.name}")
        assert stored.startswith("SCRAM-SHA-256$4096:")
