"""`dfproxy doctor`: looks at a server and an installation as a worker would, and says what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import asyncpg
from rich.console import Console
from rich.table import Table

from engine import migrate
from engine.identity import derive_password, scram_verifier
from proxy import dsn, faults, wiring
from proxy.fastpath import COMPILED
from proxy.process import FAILED
from proxy.settings import Settings

OLDEST_SERVER = 15
#: Seconds that this machine's clock and the server's may differ before logs of both are hard to read together.
CLOCK_TOLERANCE = 2.0


class Level(StrEnum):
    """How bad a finding is. Only `PROBLEM` makes the command fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What one check saw, and what to do about it (empty where nothing is to be done)."""

    check: str
    level: Level
    seen: str
    todo: str = ""


Check = Callable[[asyncpg.Connection, Settings], Awaitable[list[Finding]]]


async def server_version(connection: asyncpg.Connection, _: Settings) -> list[Finding]:
    """PostgreSQL 15 or later, and writable."""
    name = "server"
    version, standby = await connection.fetchrow(
        "SELECT current_setting('server_version'), pg_is_in_recovery()")
    if int(connection.get_server_version().major) < OLDEST_SERVER:
        return [Finding(name, Level.PROBLEM, f"PostgreSQL {version}", f"use PostgreSQL {OLDEST_SERVER} or later")]
    if standby:
        return [Finding(name, Level.PROBLEM, f"PostgreSQL {version}, a standby: read-only",
                        "name the primary, or all hosts with ?target_session_attrs=read-write")]
    return [Finding(name, Level.OK, f"PostgreSQL {version}")]


async def privileges(connection: asyncpg.Connection, _: Settings) -> list[Finding]:
    """CREATE on the database, CREATEROLE for executor logins, and no superuser."""
    row = await connection.fetchrow("""
        SELECT current_user AS me, current_database() AS db, rolsuper, rolcreaterole,
               has_database_privilege(current_database(), 'CREATE') AS may_create,
               quote_ident(current_user) AS me_sql, quote_ident(current_database()) AS db_sql
          FROM pg_roles WHERE rolname = current_user""")
    name = "privileges"
    found = []
    if row["rolsuper"]:
        found.append(Finding(name, Level.PROBLEM, f"{row['me']} is a superuser",
                             "log in as a role with NOSUPERUSER CREATEROLE: see docs/security.md"))
    if not row["may_create"]:
        found.append(Finding(name, Level.PROBLEM, f"{row['me']} may not create schemas in {row['db']}",
                             f"GRANT CREATE ON DATABASE {row['db_sql']} TO {row['me_sql']}"))
    if not row["rolcreaterole"] and not row["rolsuper"]:
        found.append(Finding(name, Level.NOTE, f"{row['me']} has no CREATEROLE: it runs its own workflows only",
                             f"ALTER ROLE {row['me_sql']} CREATEROLE, for executor logins"))
    return found or [Finding(name, Level.OK, f"{row['me']}: CREATE on {row['db']}, CREATEROLE, no superuser")]


async def schemas(connection: asyncpg.Connection, _: Settings) -> list[Finding]:
    """The installed schema version is the one of this dfproxy."""
    name = "schemas"
    installed, newest = await migrate.schema_version(connection), migrate.migrations()[-1].version
    if installed is None:
        return [Finding(name, Level.PROBLEM, "not installed", "run `dfproxy init`, or start `dfproxy serve`")]
    if installed < newest:
        return [Finding(name, Level.PROBLEM, f"version {installed}; this dfproxy has {newest}",
                        "run `dfproxy init`, or start this version's `dfproxy serve`")]
    if installed > newest:
        return [Finding(name, Level.PROBLEM, f"version {installed} is newer than this dfproxy ({newest})",
                        "upgrade dfproxy")]
    return [Finding(name, Level.OK, f"version {installed}")]


async def workers(connection: asyncpg.Connection, _: Settings) -> list[Finding]:
    """At least one worker shows signs of life."""
    name = "workers"
    rows = await connection.fetch("""
        SELECT name, version, clock_timestamp() - heartbeat_at < lease AS alive,
               extract(epoch FROM clock_timestamp() - heartbeat_at)::int AS age
          FROM duroxide.workers ORDER BY heartbeat_at DESC""")
    alive = [f"{r['name']} ({r['version']}, {max(0, r['age'])} s ago)" for r in rows if r["alive"]]
    if alive:
        return [Finding(name, Level.OK, f"{len(alive)} alive: {', '.join(alive[:5])}")]
    waiting = await connection.fetchval("SELECT count(*) FROM duroxide.queue")
    return [Finding(name, Level.PROBLEM, f"none alive; {waiting} workflows wait",
                    "start `dfproxy serve` or `dfproxy worker`")]


async def executors(connection: asyncpg.Connection, settings: Settings) -> list[Finding]:
    """Each executor login exists, is a member of its role alone, is ours to administer, and lets us in."""
    name = "executor logins"
    rows = await connection.fetch("""
        SELECT coalesce(r.rolname, e.role::text) AS role, x.rolname AS executor, r.oid IS NOT NULL AS role_exists,
               coalesce(x.rolcanlogin, false) AS can_login, coalesce(x.rolsuper, false) AS super,
               EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = e.role AND m.member = e.executor) AS member,
               (SELECT string_agg(m.roleid::regrole::text, ', ') FROM pg_auth_members m
                 WHERE m.member = e.executor AND m.roleid <> e.role) AS others,
               current_setting('server_version_num')::int < 160000
               OR EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = e.executor AND m.admin_option
                             AND m.member = (SELECT oid FROM pg_roles WHERE rolname = current_user)) AS ours,
               quote_ident(x.rolname) AS executor_sql, quote_literal(r.rolname) AS role_sql,
               quote_ident(current_user) AS me_sql
          FROM duroxide.executors e
          LEFT JOIN pg_roles r ON r.oid = e.role LEFT JOIN pg_roles x ON x.oid = e.executor
         ORDER BY 1""")
    found = []
    for r in rows:
        grant = f"SELECT df.grant_usage({r['role_sql']}), or run `dfproxy init`"
        if not r["role_exists"]:
            found.append(Finding(name, Level.NOTE, f"role {r['role']} is gone", "run `dfproxy init` to tidy up"))
        elif r["executor"] is None:
            found.append(Finding(name, Level.PROBLEM, f"the login of {r['role']} is gone", grant))
        elif r["super"] or r["others"]:
            more = "is a superuser" if r["super"] else f"is a member of {r['others']} too"
            found.append(Finding(name, Level.PROBLEM, f"{r['executor']} {more}",
                                 f"take that from {r['executor_sql']}: it may be no more than {r['role']} is"))
        elif not r["can_login"] or not r["member"]:
            what = "may not log in" if not r["can_login"] else f"is no member of {r['role']}"
            found.append(Finding(name, Level.PROBLEM, f"{r['executor']} {what}", grant))
        elif not r["ours"]:
            found.append(Finding(name, Level.PROBLEM, f"{r['executor']} can't get a password from us",
                                 f"GRANT {r['executor_sql']} TO {r['me_sql']} WITH ADMIN OPTION"))
        else:
            found += await _login(connection, settings, r["role"], r["executor"])
    missing = await connection.fetch("""
        SELECT DISTINCT r.rolname AS role, quote_literal(r.rolname) AS role_sql
          FROM duroxide.queue q JOIN duroxide.instances i ON i.id = q.instance_id
          JOIN pg_roles r ON r.oid = i.submitted_by
         WHERE r.rolname <> current_user
           AND NOT EXISTS (SELECT FROM duroxide.executors e WHERE e.role = i.submitted_by) ORDER BY 1""")
    found += [Finding(name, Level.PROBLEM, f"{r['role']} has workflows, and no executor login",
                      f"SELECT df.grant_usage({r['role_sql']})") for r in missing]
    return found or [Finding(name, Level.OK, f"{len(rows)} checked" if rows else "none needed yet")]


async def _login(connection: asyncpg.Connection, settings: Settings, role: str, executor: str) -> list[Finding]:
    try:
        password = await _password(connection, settings, executor)
        session = await wiring.connect(settings.dsn, user=executor, password=password)
    except asyncpg.InvalidPasswordError:
        return [Finding("executor logins", Level.NOTE, f"{executor} (for {role}) has another password",
                        "a worker sets it at the next step; `dfproxy init` does now")]
    except (asyncpg.PostgresError, OSError) as e:
        return [Finding("executor logins", Level.PROBLEM, f"{executor} (for {role}) can't log in: {e}",
                        "let it in by pg_hba.conf (or the like), with scram-sha-256")]
    await session.close()
    return []


async def _password(connection: asyncpg.Connection, settings: Settings, executor: str) -> str:
    secret = settings.secret.get_secret_value() if settings.secret else await connection.fetchval(
        "SELECT value FROM duroxide.secret")
    return derive_password(secret, executor)


async def repair(connection: asyncpg.Connection, settings: Settings) -> list[str]:
    """Mends executor logins as far as the service role may: forgets those of roles that are gone, makes missing ones
    anew, and sets passwords. Returns lines that say what was done, and what is left for somebody with more rights.
    """
    gone = await connection.fetch("""
        DELETE FROM duroxide.executors e WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = e.role)
        RETURNING e.executor::text AS executor""")
    lines = [f"forgot {row['executor']}, the executor login of a role that is gone" for row in gone]
    rows = await connection.fetch("""
        SELECT r.rolname AS role, x.rolname AS executor, coalesce(x.rolcanlogin, false)
               AND EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = e.role AND m.member = e.executor) AS whole
          FROM duroxide.executors e JOIN pg_roles r ON r.oid = e.role LEFT JOIN pg_roles x ON x.oid = e.executor""")
    for row in rows:
        try:
            if not row["whole"]:
                await connection.execute("SELECT df.grant_usage($1::text)", row["role"])
                lines.append(f"made the executor login of {row['role']} anew")
            elif not any(f.level is Level.NOTE for f in
                         await _login(connection, settings, row["role"], row["executor"])):
                continue  # it lets us in, or something else than the password is wrong
            await _set_password(connection, settings, row["role"])
            lines.append(f"set the password of {row['role']}'s executor login")
        except asyncpg.InsufficientPrivilegeError as e:
            lines.append(f"could not mend the executor login of {row['role']}: {e}")
    return lines + [f"still to do: {f.seen}: {f.todo}" for f in await executors(connection, settings)
                    if f.level is Level.PROBLEM]


async def _set_password(connection: asyncpg.Connection, settings: Settings, role: str) -> None:
    executor = await connection.fetchval("""
        SELECT x.rolname FROM duroxide.executors e JOIN pg_roles x ON x.oid = e.executor
          JOIN pg_roles r ON r.oid = e.role WHERE r.rolname = $1""", role)
    verifier = await asyncio.to_thread(scram_verifier, await _password(connection, settings, executor))
    async with connection.transaction():
        await connection.execute(await connection.fetchval(
            "SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)", executor, verifier))
        await connection.execute("""
            UPDATE duroxide.executors SET password_set = true
             WHERE executor = (SELECT oid FROM pg_roles WHERE rolname = $1)""", executor)


async def pooler(connection: asyncpg.Connection, settings: Settings) -> list[Finding]:
    """No transaction pooler between: clients' sessions would be mixed, and cancelling would miss its target."""
    name = "pooler"
    if connection.get_server_pid() == await connection.fetchval("SELECT pg_backend_pid()"):
        return [Finding(name, Level.OK, "none in between")]
    # Somebody answers in the server's place. Does a session keep its server connection while another one works?
    try:
        async with asyncio.timeout(5), _session(settings) as other:
            await connection.execute("SET dfproxy.probe = 'here'")  # a setting that no pooler knows of and carries over
            async with other.transaction():
                await other.execute("SELECT 1")
                same = await connection.fetchval("SELECT current_setting('dfproxy.probe', true)") == "here"
    except TimeoutError:
        same = False  # the other's transaction holds the only server connection
    if same:
        return [Finding(name, Level.NOTE, "a pooler in session mode, it seems",
                        "name the server itself: cancelling statements is surer")]
    return [Finding(name, Level.PROBLEM, "a pooler in transaction mode",
                    "name the server itself in --upstream: a client's session must be one server session")]


@contextlib.asynccontextmanager
async def _session(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    connection = await wiring.connect(settings.dsn)
    try:
        yield connection
    finally:
        await connection.close(timeout=2)


async def clock(connection: asyncpg.Connection, _: Settings) -> list[Finding]:
    """The clocks of this machine and of the server agree (the engine itself goes by the server's)."""
    before = time.time()
    server = (await connection.fetchval("SELECT clock_timestamp()")).timestamp()
    after = time.time()
    skew = server - after if server > after else min(0.0, server - before)
    if abs(skew) > CLOCK_TOLERANCE:
        return [Finding("clock", Level.NOTE, f"the server's is {skew:+.1f} s off this machine's",
                        "synchronise both (NTP); workflows go by the server's clock")]
    return [Finding("clock", Level.OK, f"{abs(skew):.1f} s apart")]


async def connections(connection: asyncpg.Connection, settings: Settings) -> list[Finding]:
    """The server has room for what a dfproxy with these settings takes for itself."""
    limit, used = await connection.fetchrow("""
        SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
               (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')""")
    wanted = settings.processes * (settings.max_user_connections + settings.max_control_connections)
    if wanted > limit:
        return [Finding("connections", Level.PROBLEM, f"up to {wanted} for the engine; the server has {limit}",
                        "lower max_user_connections or processes, or raise the server's max_connections")]
    return [Finding("connections", Level.OK, f"up to {wanted} for the engine; the server has {limit}, {used} in use")]


async def fast_path(_: asyncpg.Connection, settings: Settings) -> list[Finding]:
    """Whether plain requests are relayed by compiled code."""
    name = "fast path"
    if not settings.fastpath:
        return [Finding(name, Level.NOTE, "switched off (fastpath)")]
    if not COMPILED:
        return [Finding(name, Level.NOTE, "not built: Python relays everything",
                        "for a few microseconds less on each request, install dfproxy again where there"
                        " is a C compiler (Debian: apt-get install gcc python3-dev)")]
    return [Finding(name, Level.OK, "compiled")]


#: In this order; those of the second row need the schemas.
CHECKS: tuple[Check, ...] = (server_version, privileges, pooler, clock, connections, fast_path, schemas)
INSTALLED_CHECKS: tuple[Check, ...] = (workers, executors)


async def examine(settings: Settings) -> list[Finding]:
    """Runs every check on one database. A check that fails itself is a finding, too.

    Raises what connecting raises (proxy.faults explains it).
    """
    found: list[Finding] = []
    async with _session(settings) as connection:
        for check in CHECKS:
            found += await _guarded(check, connection, settings)
        if found[-1].level is Level.OK:
            for check in INSTALLED_CHECKS:
                found += await _guarded(check, connection, settings)
    return found


async def _guarded(check: Check, connection: asyncpg.Connection, settings: Settings) -> list[Finding]:
    try:
        return await check(connection, settings)
    except asyncpg.PostgresError as e:
        return [Finding(check.__name__, Level.PROBLEM, "could not be checked",
                        faults.explain(e, where=dsn.hosts(settings.dsn)) or str(e))]


async def doctor(settings: Settings) -> int:
    """Prints the table for each database; 1 where there is a problem."""
    settings.dsn  # noqa: B018 - says clearly that a server must be named
    console = Console(soft_wrap=False)
    colour = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}
    problems = 0
    databases = await wiring.databases(settings)
    with contextlib.suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):  # not installed: a finding
        settings = await wiring.with_shared_secret(settings, databases)
    for name in databases:
        here = settings.model_copy(update={"upstream": wiring.hide(dsn.with_database(settings.dsn, name))})
        table = Table("check", "", "found", "what to do", title=dsn.show(here.dsn), title_justify="left")
        for f in await examine(here):
            table.add_row(f.check, f"[{colour[f.level]}]{f.level}[/]", f.seen, f.todo)
            problems += f.level is Level.PROBLEM
        console.print(table)
    if problems:
        console.print(f"{problems} problem{'s' if problems > 1 else ''} found")
    return FAILED if problems else 0
