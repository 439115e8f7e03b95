"""Roles: who sees and may do what (SURFACE 1.7, 1.8, 4.5, 8.3, 8.4), and the executor logins (docs/security.md)."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.engine.fix_surface import Connection, Player, completed, done, refused, value
from tests.fix_postgres import Database

_counter = itertools.count(1)


class Roles:
    """Roles of one test, gone at its end. `owner` made them, so that it may hand them to executors."""

    def __init__(self, surface: Database) -> None:
        self.surface = surface
        self.names: list[str] = []
        self.owner = psycopg.connect(surface.dsn(), autocommit=True)
        self.root = psycopg.connect(surface.superuser_dsn, autocommit=True)

    def create(self, name: str, options: str = "LOGIN", *, by: Connection | None = None) -> str:
        name = f"{name}{os.getpid()}_{next(_counter)}"
        (by or self.owner).execute(sql.SQL("CREATE ROLE {} {}").format(sql.Identifier(name), sql.SQL(options)))  # type: ignore[arg-type]
        self.names.append(name)
        return name

    def granted(self, name: str = "app", *, include_http: bool = False, with_grant: bool = False, options: str = "LOGIN") -> str:
        role = self.create(name, options)
        self.owner.execute("SELECT df.grant_usage(%s, %s, %s)", (role, include_http, with_grant))
        return role

    @contextlib.contextmanager
    def session(self, role: str) -> Iterator[Connection]:
        with psycopg.connect(self.surface.superuser_dsn, user=role, autocommit=True) as c:
            yield c

    def executor(self, role: str) -> str:
        return f"dfx_{value(self.root, 'SELECT oid FROM pg_roles WHERE rolname = %s', role)}"

    def close(self) -> None:
        self.owner.close()
        executors = [self.executor(n) for n in self.names if self.root.execute("SELECT FROM pg_roles WHERE rolname = %s", (n,)).rowcount]
        for name in [*executors, *self.names]:
            if self.root.execute("SELECT FROM pg_roles WHERE rolname = %s", (name,)).rowcount:
                self.root.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))
        self.root.close()


@pytest.fixture
def roles(surface: Database) -> Iterator[Roles]:
    r = Roles(surface)
    try:
        yield r
    finally:
        r.close()


def notices_of(c: Connection, query: str, *arguments: Any) -> list[tuple[str | None, str | None, str | None]]:
    """The notices that a statement raises."""
    notices: list[tuple[str | None, str | None, str | None]] = []

    def keep(d: psycopg.errors.Diagnostic) -> None:
        notices.append((d.severity, d.message_primary, d.message_hint))

    c.add_notice_handler(keep)
    try:
        c.execute(query, arguments)
    finally:
        c.remove_notice_handler(keep)
    return notices


def test_without_a_grant_nothing_can_be_used(roles: Roles) -> None:
    with roles.session(roles.create("nobody")) as c:
        error = refused(c, "SELECT df.start('SELECT 1')")
        assert (error.sqlstate, error.message) == ("42501", "permission denied for schema df")
        assert refused(c, "SELECT * FROM duroxide.instances").sqlstate == "42501"
        assert value(c, "SELECT sentinel FROM duroxide._worker_ready") is True
        assert refused(c, "SELECT duroxide.error('42601', 'no', NULL, NULL, 1)").sqlstate == "42601"


def test_a_granted_role_does_all_of_it_and_sees_its_own(roles: Roles) -> None:
    app, other = roles.granted(), roles.granted("Other \"Role\" ")
    player = Player(roles.owner)
    with roles.session(app) as a, roles.session(other) as b:
        mine = value(a, "SELECT df.start(df.seq('SELECT 1', 'SELECT 2'), 'l')")
        theirs = value(b, "SELECT df.start('SELECT 1')")
        assert value(b, "SELECT submitted_by::text FROM df.instances") == '"' + other.replace('"', '""') + '"'
        assert value(a, "SELECT submitted_by::text FROM df.instances") == app
        player.claim()
        player.checkpoint(mine, done(1))
        assert a.execute("SELECT id, status FROM df.instances").fetchall() == [(mine, "running")]
        assert a.execute("SELECT status FROM df.nodes").fetchall() == [("running",), ("completed",), ("running",)]
        assert value(a, "SELECT df.status(%s)", mine) == "running"
        assert "SELECT 2 ⏳" in value(a, "SELECT df.explain(%s)", mine)
        assert [r[0] for r in a.execute("SELECT instance_id FROM df.list_instances()")] == [mine]
        assert value(a, "SELECT df.signal(%s, 'go')", mine) == "OK"
        assert value(a, "SELECT event_count FROM df.instance_executions(%s)", mine) == 1
        # What the other sees of it: nothing, and not that it is there.
        assert value(b, "SELECT df.status(%s)", mine) is None
        assert value(b, "SELECT df.result(%s)", mine) is None
        for call in ("instance_info", "instance_nodes", "instance_executions"):
            assert b.execute(f"SELECT * FROM df.{call}(%s)", (mine,)).fetchall() == []
        assert value(b, "SELECT df.explain(%s)", mine) == f"Instance '{mine}' not found"
        for call in ("df.signal(%s, 'go')", "df.cancel(%s)"):
            assert refused(b, f"SELECT {call}", mine).message == f"Instance not found or access denied: {mine}"
        assert refused(b, "SELECT df.await_instance(%s)", mine).message == f"Instance not found: {mine}"
        assert b.execute("SELECT * FROM duroxide.history").fetchall() == []
        player.checkpoint(mine, done(2, "7"), finish=completed("7"))
        assert value(a, "SELECT df.result(%s)", mine) == "7"
        assert value(a, "SELECT df.cancel(%s)", mine).startswith("Instance")
        assert value(roles.owner, "SELECT count(*) FROM df.instances") == 2
        assert value(roles.root, "SELECT count(*) FROM df.nodes") == 4
        assert value(b, "SELECT df.cancel(%s)", theirs) == f"Instance {theirs} cancelled: Cancelled by user"
        assert value(b, "SELECT df.status(%s)", theirs) == "cancelled"


def test_variables_are_ones_own_even_for_the_owner(roles: Roles) -> None:
    app = roles.granted()
    roles.owner.execute("SELECT df.setvar('v', 'owner')")
    with roles.session(app) as a:
        assert value(a, "SELECT df.getvar('v')") is None
        a.execute("SELECT df.setvar('v', 'app')")
        a.execute("UPDATE df.vars SET value = value || '!'")
        a.execute("INSERT INTO df.vars (name, value) VALUES ('w', '1')")
        instance = value(a, "SELECT df.start('SELECT {w}')")
        assert value(a, "SELECT vars FROM duroxide.instances WHERE id = %s", instance) == {"v": "app!", "w": "1"}
        assert refused(a, f"INSERT INTO df.vars VALUES ('x', '1', '{roles.surface.owner}')").sqlstate == "42501"
    assert value(roles.owner, "SELECT df.getvar('v')") == "owner"
    assert value(roles.root, "SELECT count(*) FROM df.vars") == 3
    roles.owner.execute("SELECT df.clearvars()")
    assert value(roles.root, "SELECT count(*) FROM df.vars") == 2


FORGERIES = [
    "INSERT INTO duroxide.instances (id, graph, submitted_by) VALUES ('00000001', '[]', 'pg_monitor')",
    "INSERT INTO duroxide.instances (id, graph, status) VALUES ('00000001', '[]', 'completed')",
    "INSERT INTO duroxide.instances (id, graph, created_at) VALUES ('00000001', '[]', '2000-01-01')",
    "UPDATE duroxide.instances SET status = 'completed'",
    "UPDATE df.instances SET status = 'completed'",
    "UPDATE duroxide.instances SET graph = '[]'",
    "DELETE FROM df.instances",
    "INSERT INTO duroxide.queue (instance_id) VALUES ('00000001')",
    "UPDATE duroxide.queue SET wake_at = now()",
    "SELECT token FROM duroxide.queue",
    "SELECT * FROM duroxide.queue",
    "INSERT INTO duroxide.history (instance_id, execution, node, event) VALUES ('00000001', '', 0, 'completed')",
    "DELETE FROM duroxide.history",
    "INSERT INTO duroxide.signals (instance_id, name, seen) VALUES ('00000001', 'x', true)",
    "DELETE FROM duroxide.signals",
    "SELECT * FROM duroxide.secret",
    "SELECT * FROM duroxide.executors",
    "SELECT * FROM duroxide.workers",
    "SELECT * FROM df._worker_epoch",
    "INSERT INTO duroxide.settings VALUES ('enable_superuser_instances', 'on')",
    "SELECT duroxide.claim(gen_random_uuid(), 1)",
    "SELECT duroxide.release(gen_random_uuid(), '{}')",
    "SELECT duroxide.inbox(gen_random_uuid(), NULL)",
    "SELECT duroxide.heartbeat(gen_random_uuid())",
    "SELECT duroxide.checkpoint('00000001', gen_random_uuid(), '[]')",
    "SELECT duroxide.register_executor(10)",
    "SELECT duroxide.forget_executor(10)",
    "SELECT df.grant_usage('public')",
    "SELECT df.revoke_usage('public')",
    "SELECT * FROM df.metrics()",
    "SELECT df.http('http://x')",
    "CREATE TABLE duroxide.mine ()",
    "CREATE TABLE df.mine ()",
]


def test_what_a_granted_role_may_not_do(roles: Roles) -> None:
    with roles.session(roles.granted()) as c:
        c.execute("SELECT df.start('SELECT 1')")
        for statement in FORGERIES:
            # 55000: the view takes no writes at all
            assert refused(c, statement).sqlstate == ("55000" if statement.split()[1:3] in (["df.instances", "SET"], ["FROM", "df.instances"])
                                                      else "42501"), statement


def test_a_signal_for_anothers_instance_cannot_be_inserted_by_hand(roles: Roles) -> None:
    instance = value(roles.owner, "SELECT df.start('SELECT 1')")
    with roles.session(roles.granted()) as c:
        for kind in ("signal", "cancel"):
            assert refused(c, "INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (%s, %s, 'x')", instance, kind).sqlstate == "42501"
    assert value(roles.owner, "SELECT df.status(%s)", instance) == "pending"


def test_identity_under_set_role_and_security_definer(roles: Roles) -> None:
    app, member = roles.granted(), roles.granted("member")
    roles.root.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(app), sql.Identifier(member)))
    with roles.session(member) as c:
        own = value(c, "SELECT df.start('SELECT 1')")
        c.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(app)))
        other = value(c, "SELECT df.start('SELECT 1')")
        assert value(c, "SELECT df.status(%s)", own) is None
        assert value(c, "SELECT df.status(%s)", other) == "pending"
        c.execute("RESET ROLE")
        assert value(c, "SELECT df.status(%s)", other) is None
        assert value(c, "SELECT df.status(%s)", own) == "pending"
    roles.root.execute(sql.SQL("""CREATE SCHEMA extra AUTHORIZATION {0}; SET ROLE {0};
        CREATE FUNCTION extra.submit() RETURNS text LANGUAGE sql SECURITY DEFINER AS $$ SELECT df.start('SELECT 1') $$;
        GRANT USAGE ON SCHEMA extra TO PUBLIC; RESET ROLE""").format(sql.Identifier(app)))
    with roles.session(member) as c:
        instance = value(c, "SELECT extra.submit()")
    assert value(roles.owner, "SELECT submitted_by::text FROM df.instances WHERE id = %s", instance) == app
    roles.root.execute("DROP SCHEMA extra CASCADE")


def test_grant_and_revoke_messages_and_effects(roles: Roles) -> None:
    app = roles.create("app")
    notices = notices_of(roles.owner, "SELECT df.grant_usage(%s)", app)
    assert [(s, m) for s, m, _ in notices] == [("NOTICE", f'pg_durable: granted df usage privileges to "{app}"')]
    roles.owner.execute("SELECT df.grant_usage(%s, include_http => true)", (app,))
    roles.owner.execute("SELECT df.grant_usage(%s)", (app,))
    with roles.session(app) as c:
        assert "HTTP" in value(c, "SELECT df.http('http://x')")
        assert "HTTP_MULTIPART" in value(c, "SELECT df.http_multipart('http://x', parts => '[{}]')")
        c.execute("SELECT df.start('SELECT 1')")
    me, executor = roles.surface.owner, roles.executor(app)
    said = ("NOTICE", f'pg_durable: revoked df usage privileges granted by "{me}" from "{app}"', None)
    # Its workflow goes on, and so needs its login.
    notices = notices_of(roles.owner, "SELECT df.revoke_usage(%s)", app)
    assert notices == [("NOTICE", f"executor login {executor} is kept: workflows of role {app} have not ended", "Revoke again once they have."), said]
    assert value(roles.root, "SELECT count(*) FROM pg_roles WHERE rolname = %s", executor) == 1
    roles.owner.execute("SELECT df.cancel(id) FROM df.instances")
    assert notices_of(roles.owner, "SELECT df.revoke_usage(%s)", app) == [said]
    assert value(roles.root, "SELECT count(*) FROM pg_roles WHERE rolname = %s", executor) == 0
    with roles.session(app) as c:
        assert refused(c, "SELECT df.http('http://x')").sqlstate == "42501"
        assert refused(c, "SELECT df.start('SELECT 1')").sqlstate == "42501"
        assert refused(c, "SELECT count(*) FROM duroxide.instances").sqlstate == "42501"
    left = roles.root.execute("""
        SELECT objid::regclass::text FROM pg_shdepend WHERE refobjid = %s::regrole AND dbid = (SELECT oid FROM pg_database
         WHERE datname = current_database()) AND deptype = 'a'""", (f'"{app}"',)).fetchall()
    assert left == []


def test_unknown_roles_and_public(roles: Roles) -> None:
    for call in ("grant_usage", "revoke_usage"):
        for name in ("no such role", "PUBLIC"):
            error = refused(roles.owner, f"SELECT df.{call}(%s)", name)
            assert (error.sqlstate, error.message) == ("42704", f'role "{name}" does not exist')
    assert refused(roles.owner, "SELECT df.grant_usage('public', false, true)").sqlstate == "0LP01"
    roles.owner.execute("SELECT df.grant_usage('public')")
    with roles.session(roles.create("anybody")) as c:
        assert len(value(c, "SELECT df.start('SELECT 1')")) == 8
    roles.owner.execute("SELECT df.revoke_usage('public')")
    with roles.session(roles.names[-1]) as c:
        assert refused(c, "SELECT df.start('SELECT 1')").sqlstate == "42501"


def test_a_delegated_admin(roles: Roles) -> None:
    admin = roles.granted("admin", with_grant=True, options="LOGIN CREATEROLE")
    with roles.session(admin) as a:
        app = roles.create("app", by=a)
        assert a.execute("SELECT * FROM df.metrics()").rowcount == 1
        assert notices_of(a, "SELECT df.grant_usage(%s)", app)[0][0] == "NOTICE"
        error = refused(a, "SELECT df.grant_usage(%s, include_http => true)", app)
        assert error.sqlstate == "42501"
        with roles.session(app) as c:
            assert len(value(c, "SELECT df.start('SELECT 1')")) == 8
        executor = roles.executor(app)
        # Though the admin made it, the owner administers it.
        assert value(roles.root, """SELECT count(*) FROM pg_auth_members m WHERE m.roleid = %s::regrole AND m.admin_option
                                       AND m.member = %s::regrole""", executor, roles.surface.owner) == 1
        a.execute("SELECT df.revoke_usage(%s)", (app,))
        with roles.session(app) as c:
            assert refused(c, "SELECT df.start('SELECT 1')").sqlstate == "42501"
    roles.owner.execute("SELECT df.revoke_usage(%s)", (admin,))


def test_an_admin_who_did_not_grant_takes_nothing_away(roles: Roles) -> None:
    admin = roles.granted("admin", with_grant=True, options="LOGIN CREATEROLE")
    app = roles.granted()
    with roles.session(admin) as a:
        a.execute("SELECT df.revoke_usage(%s)", (app,))
    assert value(roles.owner, "SELECT count(*) FROM duroxide.executors WHERE role = %s::regrole", app) == 1
    assert value(roles.root, "SELECT count(*) FROM pg_roles WHERE rolname = %s", roles.executor(app)) == 1
    with roles.session(app) as c:
        assert len(value(c, "SELECT df.start('SELECT 1')")) == 8


# Executor logins ---------------------------------------------------------------------------------------------------


def test_the_executor_of_a_role(roles: Roles) -> None:
    app = roles.granted()
    executor = roles.executor(app)
    row = roles.root.execute("""
        SELECT rolcanlogin, rolinherit, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls,
               ARRAY(SELECT m.roleid::regrole::text FROM pg_auth_members m WHERE m.member = r.oid)
          FROM pg_roles r WHERE rolname = %s""", (executor,)).fetchone()
    assert row == (True, False, False, False, False, False, [app])
    assert roles.owner.execute("SELECT role::text, executor::text, password_set FROM duroxide.executors").fetchall() == [(app, executor, False)]
    roles.owner.execute("UPDATE duroxide.executors SET password_set = true")
    roles.owner.execute("SELECT df.grant_usage(%s)", (app,))
    assert value(roles.owner, "SELECT password_set FROM duroxide.executors") is True
    roles.owner.execute("SELECT df.revoke_usage(%s)", (app,))
    assert value(roles.root, "SELECT count(*) FROM pg_roles WHERE rolname = %s", executor) == 0
    assert value(roles.owner, "SELECT count(*) FROM duroxide.executors") == 0


def test_a_step_as_the_executor_runs_it(roles: Roles) -> None:
    """The transaction of a step: the role's rights for the step, the executor's for the checkpoint, no others."""
    app = roles.granted()
    roles.root.execute(sql.SQL("CREATE TABLE public.things (n int); GRANT INSERT ON public.things TO {}").format(sql.Identifier(app)))
    player = Player(roles.owner)
    with roles.session(app) as c:
        instance = value(c, "SELECT df.start('INSERT INTO public.things VALUES (1)')")
        assert player.claim() == [instance]
        assert refused(c, "SELECT token FROM duroxide.queue").sqlstate == "42501"
    as_role = sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(app))
    checkpoint = "SELECT duroxide.checkpoint(%s, %s, '[]', p_finish => '{\"status\": \"completed\", \"output\": \"1\"}')"
    with roles.session(roles.executor(app)) as x:
        assert refused(x, "INSERT INTO public.things VALUES (2)").sqlstate == "42501"
        assert refused(x, "SELECT * FROM duroxide.queue").sqlstate == "42501"
        assert refused(x, "SELECT df.start('SELECT 1')").sqlstate == "42501"
        assert refused(x, "CREATE ROLE worse").sqlstate == "42501"
        assert refused(x, sql.SQL("SET ROLE {}").format(sql.Identifier(roles.surface.owner)).as_string(x)).sqlstate == "42501"
        with x.transaction():
            x.execute(as_role)
            assert value(x, "SELECT current_user") == app
            x.execute("INSERT INTO public.things VALUES (1)")
            assert refused(x, checkpoint, instance, player.tokens[instance]).sqlstate == "42501"
            assert refused(x, "CALL duroxide.step_done(%s, %s, '', 0, '1', NULL, NULL, NULL, false)", instance,
                           player.tokens[instance]).sqlstate == "42501"
            x.execute("RESET ROLE")
            assert refused(x, checkpoint, instance, player.worker).sqlstate == "DF001"
            step_done = "CALL duroxide.step_done(%s, %s, '', 0, '1', NULL, NULL, NULL, false)"
            assert refused(x, step_done, instance, player.worker).sqlstate == "DF001"
            x.execute(step_done, (instance, player.tokens[instance]))
            x.execute(checkpoint, (instance, player.tokens[instance]))
    assert value(roles.owner, "SELECT df.status(%s)", instance) == "completed"
    assert value(roles.root, "SELECT n FROM public.things") == 1


def test_the_owner_needs_no_executor_and_nologin_roles_have_one(roles: Roles) -> None:
    roles.owner.execute("SELECT df.grant_usage(%s)", (roles.surface.owner,))
    assert value(roles.owner, "SELECT count(*) FROM duroxide.executors") == 0
    roles.granted("batch", options="NOLOGIN")
    assert value(roles.owner, "SELECT count(*) FROM duroxide.executors") == 1


def test_a_grant_that_lacks_a_right_is_made_and_names_what_is_missing(roles: Roles) -> None:
    roles.root.execute(sql.SQL("ALTER ROLE {} NOCREATEROLE").format(sql.Identifier(roles.surface.owner)))
    app = roles.create("app", by=roles.root)
    warning, granted = notices_of(roles.owner, "SELECT df.grant_usage(%s)", app)
    assert warning[0] == "WARNING"
    assert f"ALTER ROLE {roles.surface.owner} CREATEROLE" in (warning[2] or "")
    assert granted[0] == "NOTICE"
    with roles.session(app) as c:
        assert len(value(c, "SELECT df.start('SELECT 1')")) == 8
    roles.root.execute(sql.SQL("ALTER ROLE {} CREATEROLE").format(sql.Identifier(roles.surface.owner)))
    notices = notices_of(roles.owner, "SELECT df.grant_usage(%s)", app)
    if roles.surface.version >= 16:
        assert f"GRANT {app} TO {roles.surface.owner} WITH ADMIN OPTION" in (notices[0][2] or "")
        roles.root.execute(sql.SQL("GRANT {} TO {} WITH ADMIN OPTION").format(sql.Identifier(app), sql.Identifier(roles.surface.owner)))
        notices = notices_of(roles.owner, "SELECT df.grant_usage(%s)", app)
    assert [n[0] for n in notices] == ["NOTICE"]
    assert value(roles.owner, "SELECT count(*) FROM duroxide.executors") == 1


def test_a_superuser_makes_executors_that_the_owner_administers(roles: Roles) -> None:
    app = roles.create("app", by=roles.root)
    roles.root.execute("SELECT df.grant_usage(%s)", (app,))
    executor = roles.executor(app)
    roles.owner.execute(sql.SQL("ALTER ROLE {} PASSWORD 'x'").format(sql.Identifier(executor)))
    with roles.session(executor) as x:
        assert value(x, "SELECT current_user") == executor
    roles.root.execute("SELECT df.revoke_usage(%s)", (app,))
    assert value(roles.root, "SELECT count(*) FROM pg_roles WHERE rolname = %s", executor) == 0


def test_an_executor_with_other_rights_is_not_accepted(roles: Roles) -> None:
    app, powerful = roles.create("app"), roles.create("powerful")
    executor = roles.executor(app)
    roles.root.execute(sql.SQL("CREATE ROLE {} LOGIN NOINHERIT IN ROLE {}, {}").format(
        sql.Identifier(executor), sql.Identifier(app), sql.Identifier(powerful)))
    error = refused(roles.root, "SELECT df.grant_usage(%s)", app)
    assert (error.sqlstate, error.message) == ("42501", f"role {executor} is not a sound executor login for role {app}")
    roles.root.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(executor)))


def test_names_are_pinned_against_the_callers_search_path(roles: Roles) -> None:
    """A role can't make the owner's or a superuser's calls run its own functions or operators."""
    app = roles.granted()
    roles.root.execute(sql.SQL("CREATE SCHEMA trap AUTHORIZATION {}").format(sql.Identifier(app)))
    with roles.session(app) as c:
        c.execute("""
            CREATE TABLE trap.log (who name);
            CREATE FUNCTION trap.sprung(text, text) RETURNS text LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'sprung by %', current_user; END $$;
            CREATE OPERATOR trap.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.sprung);
            CREATE OPERATOR trap.~ (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.sprung);
            CREATE FUNCTION trap.lower(text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'sprung'; END $$;
            GRANT USAGE ON SCHEMA trap TO PUBLIC""")
    roles.owner.execute("SET search_path = trap, pg_catalog")
    instance = value(roles.owner, "SELECT df.start(df.seq(df.as('a', 'x'), df.if('b', df.sleep(1), df.break('c'))), 'l')")
    for call in ("df.status(%s)", "df.explain(%s)", "df.signal(%s, 'a')", "df.cancel(%s)", "df.result(%s)", "df.error(%s)"):
        roles.owner.execute(f"SELECT {call}", (instance,))
    for call in ("list_instances()", "instance_nodes(%(i)s)", "instance_executions(%(i)s)", "metrics()", "instance_info(%(i)s)"):
        roles.owner.execute(f"SELECT * FROM df.{call}", {"i": instance})
    roles.owner.execute("SELECT * FROM df.nodes; SELECT * FROM df.instances; SELECT df.grant_usage('public'); SELECT df.revoke_usage('public')")
    roles.root.execute("DROP SCHEMA trap CASCADE")
