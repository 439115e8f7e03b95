"""df.start with transaction_mode => 'new' (SURFACE 1.3, 10.3; Appendix B 14): through the proxy, past it, and forged."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import time
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from tests.e2e.fix_dfproxy import Through, running_proxy
from tests.fix_postgres import Database

NEW = "SELECT df.start('INSERT INTO marks VALUES (1)', 'l', transaction_mode => 'new')"

_counter = itertools.count()


@pytest.fixture
def served(through: Through) -> Through:
    """A proxy in front of a database that has an empty table `marks`, and no workflow."""
    with through.connect() as c:
        c.execute("CREATE TABLE marks (n integer)")
    return through


@pytest.fixture
def served18(through18: Through) -> Through:
    """The same on the newest version only."""
    with through18.connect() as c:
        c.execute("CREATE TABLE marks (n integer)")
    return through18


def role(through: Through, suffix: str) -> str:
    """A role of the database that may use `df` and write to `marks`."""
    name = f"{through.database.name}_{suffix}_{next(_counter)}"
    with psycopg.connect(through.database.superuser_dsn, autocommit=True) as c:
        c.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        c.execute("SELECT df.grant_usage(%s)", (name,))
        c.execute(sql.SQL("GRANT ALL ON marks TO {}").format(sql.Identifier(name)))
    return name


def connect(through: Through, user: str) -> psycopg.Connection[Any]:
    return psycopg.connect(through.proxy.dsn(quote(user), through.database.name), autocommit=True)


def one(connection: psycopg.Connection[Any], query: str, *arguments: object) -> Any:
    row = connection.execute(query, arguments).fetchone()
    assert row is not None
    return row[0]


def marks(through: Through) -> int:
    with psycopg.connect(through.database.superuser_dsn) as c:
        return int(one(c, "SELECT count(*) FROM marks"))


def submitter(through: Through, instance: str) -> str:
    with psycopg.connect(through.database.superuser_dsn) as c:
        return str(one(c, "SELECT submitted_by::text FROM df.instances WHERE id = %s", instance))


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE, READ ONLY"])
def test_survives_the_callers_rollback_at_every_isolation_level(served: Through, isolation: str) -> None:
    notices: list[str] = []
    with served.connect() as c:
        c.add_notice_handler(lambda n: notices.append(str(n.message_primary)))
        c.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        c.execute("SELECT 1")  # takes the snapshot
        instance = one(c, NEW)
        assert c.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        c.execute("ROLLBACK")
        assert served.wait(instance) == "completed"
        assert one(c, "SELECT label FROM df.instances WHERE id = %s", instance) == "l"
        assert one(c, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()") == 0
    assert marks(served) == 1
    assert notices == []


def test_starts_before_the_caller_commits(served: Through) -> None:
    with served.connect() as c, c.transaction():
        instance = one(c, NEW)
        assert one(c, "SELECT df.await_instance(%s, 60)", instance) == "completed"


def test_from_do_blocks_functions_triggers_and_prepared_statements(served: Through) -> None:
    with served.connect() as c:
        c.execute("""
            CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                PERFORM df.start('INSERT INTO marks VALUES (2)' ~> 'SELECT 1', 'trigger', transaction_mode => 'NEW');
                RETURN NEW;
            END $$;
            CREATE TABLE orders (id integer);
            CREATE TRIGGER t AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION audit();
            CREATE FUNCTION f() RETURNS text LANGUAGE sql
                AS $$ SELECT df.start('INSERT INTO marks VALUES (3)', 'function', transaction_mode => 'new') $$;
        """)
        with pytest.raises(psycopg.errors.DivisionByZero):
            c.execute("INSERT INTO orders VALUES (1), (2); SELECT 1/0")
        with pytest.raises(psycopg.errors.RaiseException, match="after all"):
            c.execute("""DO $$ BEGIN
                PERFORM df.start('INSERT INTO marks VALUES (1)', 'block', transaction_mode => 'new');
                PERFORM f();
                RAISE 'after all';
            END $$""")
        for label in ("prepared", "again"):
            c.execute("SELECT df.start('INSERT INTO marks VALUES (' || %s::int || ')', %s, transaction_mode => %s)",
                      (4, label, "new"), prepare=True)
        c.execute("SELECT df.await_instance(instance_id, 60) FROM df.list_instances()")
        found = c.execute("SELECT label, status FROM df.instances ORDER BY label").fetchall()
    assert found == [(label, "completed") for label in ("again", "block", "function", "prepared", "trigger", "trigger")]
    assert marks(served) == 6


def test_only_committed_variables_are_seen(served: Through) -> None:
    with served.connect() as c, c.transaction():
        c.execute("SELECT df.setvar('n', '1')")
        instance = one(c, "SELECT df.start('SELECT ''{n}'' AS n', transaction_mode => 'new')")
        assert one(c, "SELECT df.await_instance(%s, 60)", instance) == "completed"
        assert json.loads(one(c, "SELECT df.result(%s)", instance))["rows"] == [{"n": "{n}"}]


def test_large_workflows(served18: Through) -> None:
    with served18.connect() as c:
        instance = one(c, "SELECT df.start(df.sql('SELECT length(''' || repeat('ü', 1500000) || ''') AS n'), transaction_mode => 'new')")
        assert served18.wait(instance) == "completed"
        assert json.loads(one(c, "SELECT df.result(%s)", instance))["rows"] == [{"n": 1500000}]


def test_the_identity_is_that_of_the_caller_where_it_calls(served: Through) -> None:
    app, owner = role(served, "app"), role(served, "Own er")
    with psycopg.connect(served.database.superuser_dsn, autocommit=True) as c:
        c.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(app), sql.Identifier(owner)))
        c.execute("CREATE FUNCTION definer() RETURNS text LANGUAGE sql SECURITY DEFINER AS $$"
                  " SELECT df.start('INSERT INTO marks VALUES (1)', transaction_mode => 'new') $$")
        c.execute(sql.SQL("ALTER FUNCTION definer() OWNER TO {}").format(sql.Identifier(owner)))
    with connect(served, app) as c:
        own, definer = one(c, NEW), one(c, "SELECT definer()")
        assert served.wait(own) == "completed"
        assert one(c, "SELECT df.status(%s)", definer) is None
    with connect(served, owner) as c:
        c.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(app)))
        switched = one(c, NEW)
        c.execute("RESET ROLE")
        assert one(c, "SELECT df.await_instance(%s, 60)", definer) == "completed"
    assert [submitter(served, i) for i in (own, switched)] == [app, app]
    assert submitter(served, definer) == f'"{owner}"'


def test_what_the_new_transaction_refuses_the_caller_hears(served18: Through) -> None:
    with served18.connect() as c:
        for call, state, message in (
            ("df.start('{\"node_type\":\"NO\"}', transaction_mode => 'new')", "22023",
             "df.start() on new transaction failed: Invalid durable function: Unknown node_type 'NO'"),
            ("df.start('SELECT 1', NULL, 'nowhere', 'new')", "3D000",
             'df.start() on new transaction failed: database "nowhere" does not exist'),
            ("df.start(NULL, transaction_mode => 'new')", "22004", "df.start() on new transaction failed: df.start: fut cannot be NULL"),
            ("df.start('SELECT 1', transaction_mode => lower('Later'))", "22023",
             "invalid transaction_mode \"later\" for df.start(): expected 'caller' or 'new'"),
        ):
            with pytest.raises(psycopg.Error) as caught:
                c.execute(f"SELECT {call}")
            assert caught.value.sqlstate == state
            assert caught.value.diag.message_primary is not None
            assert caught.value.diag.message_primary.startswith(message)
        assert one(c, "SELECT count(*) FROM df.instances") == 0
    with connect(served18, "postgres") as c, pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        c.execute("SELECT df.start('SELECT 1', transaction_mode => 'new')")
    assert caught.value.diag.message_primary is not None
    assert caught.value.diag.message_primary.startswith("df.start() on new transaction failed: ")


def test_a_role_without_a_login_of_its_steps_hears_what_to_do(served: Through) -> None:
    name = f"{served.database.name}_bare"
    with psycopg.connect(served.database.superuser_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        admin.execute("SELECT df.grant_usage('public')")
        try:
            with connect(served, name) as c, pytest.raises(psycopg.Error, match="has no executor login") as caught:
                c.execute("SELECT df.start('SELECT 1', transaction_mode => 'new')")
        finally:
            admin.execute("SELECT df.revoke_usage('public')")  # the proxy and its database are other tests' too
    assert "df.grant_usage" in (caught.value.diag.message_hint or "")


def test_a_step_is_refused(served: Through) -> None:
    with served.connect() as c:
        instance = one(c, "SELECT df.start('SELECT df.start(''SELECT 1'', transaction_mode => ''new'')')")
        assert served.wait(instance) == "failed"
        assert "cannot be called inside a workflow" in one(c, "SELECT df.error(%s)", instance)


def test_errors_leave_no_lock_behind_and_the_session_usable(served18: Through) -> None:
    with served18.connect() as c:
        c.execute("BEGIN")
        c.execute("SAVEPOINT s")
        with pytest.raises(psycopg.Error):
            c.execute("SELECT df.start('SELECT 1', NULL, 'nowhere', 'new')")
        c.execute("ROLLBACK TO s")
        assert one(c, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()") == 0
        instance = one(c, NEW)
        c.execute("COMMIT")
    assert served18.wait(instance) == "completed"


def test_past_the_proxy_nobody_answers(surface: Database) -> None:
    notices: list[str] = []
    with psycopg.connect(surface.dsn(), autocommit=True) as c:
        c.execute("INSERT INTO duroxide.settings VALUES ('new_transaction_start_timeout', '1')")
        c.add_notice_handler(lambda n: notices.append(f"{n.severity} {n.message_primary}"))
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
            c.execute("SELECT df.start('SELECT 1', transaction_mode => 'new')")
        assert caught.value.diag.message_primary == "df.start() on new transaction failed: no answer within 1s"
        assert "dfproxy serve" in (caught.value.diag.message_hint or "")
        assert one(c, "SELECT count(*) FROM df.instances") == 0
    assert notices == ["INFO asking dfproxy to start a workflow in a transaction of its own"]


def test_the_launch_limit(database18: Database) -> None:
    database = database18
    options = ("--set", "new_transaction_start_timeout=1", "--set", "max_new_transaction_starts=2")
    with running_proxy(database.dsn(), *options) as proxy:
        through = Through(proxy, database)
        with through.connect() as c, through.connect() as other:
            for slot in range(2):
                other.execute("SELECT pg_advisory_lock(1346982470, %s)", (slot,))
            with pytest.raises(psycopg.Error) as caught:
                c.execute("SELECT df.start('SELECT 1', transaction_mode => 'new')")
            assert caught.value.diag.message_primary == (
                "pg_durable: transaction_mode => 'new' launch limit reached (max_new_transaction_starts=2). "
                "Timed out after 1s waiting for a launch slot before opening the loopback session.")
            other.execute("SELECT pg_advisory_unlock(1346982470, 1)")
            instance = one(c, "SELECT df.start('SELECT 1', transaction_mode => 'new')")
            assert through.wait(instance) == "completed"


# -- forging -------------------------------------------------------------------------------------------------


def forge(connection: psycopg.Connection[Any], request: dict[str, Any], *, seal: str | None = None, severity: str = "INFO",
          state: str = "DF002", place: str = "1/1") -> list[str]:
    """Sends what duroxide.send_launch would, by the session's own means; returns the notices that the client saw.

    Holds the key meanwhile; without `seal`, with the one that the session's role can have.
    """
    raw = json.dumps(request).encode()
    seen: list[str] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        seen.append(str(notice.message_primary))

    connection.add_notice_handler(note)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (request["key"],))
        connection.execute("SELECT set_config('df.launch_digest', %s, true)", (hashlib.sha256(raw).hexdigest(),))
        own = one(connection, "SELECT seal FROM duroxide.launch_seal")
        connection.execute(sql.SQL(
            "DO $do$ BEGIN RAISE {} USING ERRCODE = {}, MESSAGE = 'forged', CONSTRAINT = {}, TABLE = {}, DATATYPE = {}; END $do$"
        ).format(sql.SQL(severity), state, f"dfproxy:start={place}", seal or own, base64.b64encode(raw).decode()))
        # Until the launcher has looked: it waits for the key, or is not interested.
        for _ in range(50):
            answer = one(connection, "SELECT duroxide.launch_answer(%s)", request["key"])
            if answer is not None and answer["state"] != "busy":
                break
            time.sleep(0.01)
    connection.remove_notice_handler(note)
    return seen


def request(connection: psycopg.Connection[Any], as_role: str, instance: str, key: int) -> dict[str, Any]:
    oid, now = connection.execute("SELECT %s::regrole::oid::int8, extract(epoch FROM clock_timestamp())::float8", (as_role,)).fetchone() or (0, 0)
    return {"id": instance, "fut": "INSERT INTO marks VALUES (1)", "label": None, "database": None, "role": oid, "key": key, "at": now}


def test_who_forges_a_request_starts_what_he_may_start_anyway(served18: Through) -> None:
    app, victim = role(served18, "app"), role(served18, "victim")
    with connect(served18, app) as c:
        assert forge(c, request(c, app, "0000000a", 100)) == []
        assert served18.wait("0000000a") == "completed"
        # For another role, with the only seal that he can have, with none, and with one that he saw for other contents.
        assert forge(c, request(c, victim, "0000000b", 102)) == []
        assert forge(c, request(c, victim, "0000000c", 104), seal="0" * 64) == []
        # What is no request passes on to the client.
        assert forge(c, request(c, app, "0000000d", 106), severity="NOTICE") == ["forged"]
        assert forge(c, request(c, app, "0000000e", 108), state="DF005") == ["forged"]
        assert forge(c, request(c, app, "0000000f", 110), place="2/3") == ["forged"]
        # A second time, and one that is old.
        assert forge(c, request(c, app, "0000000a", 112)) == []
        assert forge(c, request(c, app, "00000010", 114) | {"at": 1.0}) == []
        # Broken ones harm nobody.
        assert forge(c, {"key": 116}) == []
        assert forge(c, {**request(c, app, "no id", 118)}) == []
        instance = one(c, NEW)
        assert served18.wait(instance) == "completed"
    with psycopg.connect(served18.database.superuser_dsn) as c:
        found = c.execute("SELECT id, submitted_by::text FROM df.instances ORDER BY created_at").fetchall()
    assert found == [("0000000a", app), (instance, app)]
    assert marks(served18) == 2


def test_nobody_else_can_answer_or_see_the_secret(served: Through) -> None:
    app = role(served, "app")
    with connect(served, app) as c, connect(served, app) as liar:
        c.execute("SELECT pg_advisory_lock(200)")
        liar.execute("SET statement_timeout = '300ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            liar.execute("SELECT pg_advisory_lock_shared(200), duroxide.launch_answer(200)")
        liar.execute("SET statement_timeout = 0")
        liar.execute("SELECT pg_advisory_lock(201)")
        assert one(c, "SELECT duroxide.launch_answer(200)") is None
        for query in ("SELECT value FROM duroxide.secret", "SELECT s FROM duroxide.launch_seal v, duroxide.secret s"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                c.execute(query)
