"""Installs, upgrades and removes the database side of dfproxy: the schemas `df` and `duroxide`.

The files of `engine/schema` run in the order of their numbers, each once, each in a transaction of its own under an
advisory lock. `duroxide.migrations` says which have run. A file that was released is not edited; changes are new files.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

import asyncpg
import structlog

from proxy.wire.tls_options import for_asyncpg

__all__ = ["MigrationError", "MigrationResult", "UnfinishedWorkflowsError", "migrate", "schema_version", "uninstall"]

#: Serialises installers, upgraders and uninstallers of one database. An arbitrary number of our own.
LOCK = 0x6466_7072_6F78_7901
OLDEST_SERVER = 15
#: Seconds that a migration waits for a table that a transaction uses, with everybody else who wants that table behind
#: it; and those until it tries again, in which they have their turn.
_PATIENCE: float = 2
_PAUSE: float = 3
_FILE = re.compile(r"([0-9]{4})_([a-z_]+)\.sql")
_LEDGER = """
CREATE TABLE duroxide.migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
#: Who uses our tables, the oldest transaction first. Of other roles not everybody may see more than this.
_HOLDERS = """
SELECT array_agg(u.pid ORDER BY u.xact_start) AS pids
  FROM (SELECT DISTINCT l.pid, a.xact_start
          FROM pg_locks l JOIN pg_class c ON c.oid = l.relation LEFT JOIN pg_stat_activity a ON a.pid = l.pid
         WHERE c.relnamespace = to_regnamespace('duroxide') AND l.granted AND l.pid <> pg_backend_pid()
           AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())) u
"""
#: What df.explain draws with, for databases whose encoding lacks it.
_PLAIN = str.maketrans("✓✗⏳○⊘→║├└─│↻—", "+x~o->||`-|@-")
#: By catalog, since neither USAGE nor SELECT may be granted to who asks.
_INSTALLED = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'duroxide' AND c.relname = 'migrations' AND c.relkind = 'r')
"""
_STAMP = """
INSERT INTO duroxide.settings (name, value) VALUES ('dfproxy_version', $1)
ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value WHERE settings.value <> EXCLUDED.value
"""
_DROP_EXECUTORS = """
SELECT r.rolname, format('REVOKE ALL ON DATABASE %I FROM %I; DROP ROLE %I', current_database(), r.rolname, r.rolname)
                  AS statements
  FROM duroxide.executors e JOIN pg_roles r ON r.oid = e.executor
"""
#: Objects elsewhere that would go, or break, with our schemas.
_DEPENDENTS = """
WITH ours AS (
    SELECT 'pg_proc'::regclass AS class, p.oid FROM pg_proc p
     WHERE p.pronamespace IN ('df'::regnamespace, 'duroxide'::regnamespace)
    UNION ALL
    SELECT 'pg_class'::regclass, c.oid FROM pg_class c
     WHERE c.relnamespace IN ('df'::regnamespace, 'duroxide'::regnamespace)
)
SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid)
  FROM pg_depend d
  JOIN ours o ON o.class = d.refclassid AND o.oid = d.refobjid
 CROSS JOIN LATERAL pg_identify_object_as_address(d.classid, d.objid, d.objsubid) AS a
 WHERE d.deptype = 'n' AND NOT a.object_names && ARRAY['df', 'duroxide']
 ORDER BY 1
"""

log = structlog.get_logger(__name__)


class MigrationError(RuntimeError):
    """The schemas can't be installed, upgraded or removed; the text says why and what to do."""


class UnfinishedWorkflowsError(MigrationError):
    """Removing the schemas would lose workflows that have not ended."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of engine/schema."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What `migrate` did. `version` is the schema's version now; `applied` the versions that ran, oldest first."""

    version: int
    applied: tuple[int, ...]
    installed: bool

    @property
    def changed(self) -> bool:
        return bool(self.applied)


def migrations() -> list[Migration]:
    """The files that this release knows, in order."""
    found = []
    for entry in resources.files("engine").joinpath("schema").iterdir():
        if match := _FILE.fullmatch(entry.name):
            found.append(Migration(int(match[1]), match[2], entry.read_text(encoding="utf-8")))
    return sorted(found, key=lambda m: m.version)


async def schema_version(conn: asyncpg.Connection[Any]) -> int | None:
    """The version of the schemas in this database, or None if dfproxy is not installed (or its ledger not readable)."""
    readable = await conn.fetchval(
        "SELECT CASE WHEN pg_catalog.to_regclass('duroxide.migrations') IS NOT NULL"
        " THEN pg_catalog.has_table_privilege('duroxide.migrations', 'SELECT') END"
    )
    if not readable:
        return None
    version: int | None = await conn.fetchval("SELECT pg_catalog.max(version) FROM duroxide.migrations")
    return version


async def migrate(dsn: str) -> MigrationResult:
    """Brings the schemas of the database at `dsn` (a libpq URI) to this release's version; safe to run concurrently.

    Waits for transactions that use tables which are to be changed, for as long as it takes, but holds up nobody else
    for more than a moment. Raises MigrationError where that can't be done: server older than 15, a standby, no CREATE
    privilege, schemas named `df` or `duroxide` that are not ours or belong to another role, an installation by a newer
    release, or from other files. asyncpg's errors pass through where the server can't be reached.
    """
    conn = await _connect(dsn)
    try:
        async with conn.transaction():
            await _check_server(conn)
            unicode = await conn.fetchval("SELECT current_setting('server_encoding') = 'UTF8'")
        known = migrations()
        applied: list[int] = []
        while True:
            try:
                step = await _advance(conn, known, unicode)
            except asyncpg.LockNotAvailableError:
                log.warning("an upgrade of the schemas waits for transactions that use them",
                            processes=await conn.fetchval(_HOLDERS))
                await asyncio.sleep(_PAUSE)
                continue
            if step is None:
                return MigrationResult(known[-1].version, tuple(applied), known[0].version in applied)
            applied.append(step)
    finally:
        await conn.close()


async def _advance(conn: asyncpg.Connection[Any], known: list[Migration], unicode: bool) -> int | None:
    """Applies the next migration and returns its version; None: there is none to be applied any more.

    Raises asyncpg.LockNotAvailableError where a table that it changes is in use.
    """
    async with conn.transaction():
        await _prepare(conn)
        if not await conn.fetchval(_INSTALLED):
            await _create(conn)
        else:
            await _become_owner(conn)
        done = {r["version"]: r["checksum"]
                for r in await conn.fetch("SELECT version, checksum FROM duroxide.migrations")}
        _check_ledger(done, known)
        step = next((m for m in known if m.version not in done), None)
        if step is None:
            await conn.execute(_STAMP, metadata.version("dfproxy"))
            return None
        await conn.execute(f"SET LOCAL lock_timeout = '{_PATIENCE}s'")
        await conn.execute(step.sql if unicode else step.sql.translate(_PLAIN))
        await conn.execute("INSERT INTO duroxide.migrations (version, name, checksum) VALUES ($1, $2, $3)",
                           step.version, step.name, step.checksum)
    return step.version


async def uninstall(dsn: str, *, force: bool = False) -> None:
    """Removes both schemas with everything in them, and the executor logins that nothing else needs.

    Does nothing where dfproxy is not installed. Raises UnfinishedWorkflowsError while workflows are unfinished and
    MigrationError where objects in other schemas depend on ours, both unless `force`; MigrationError also where the
    schemas belong to somebody else. Executor logins that can't be dropped are logged.
    """
    conn = await _connect(dsn)
    try:
        async with conn.transaction():
            await _prepare(conn)
            if not await conn.fetchval(_INSTALLED):
                return
            await _become_owner(conn)
            if not force:
                await _check_unused(conn)
            executors = await conn.fetch(_DROP_EXECUTORS)
            await conn.execute("DROP SCHEMA df CASCADE; DROP SCHEMA duroxide CASCADE")
        for row in executors:
            try:
                async with conn.transaction():
                    await conn.execute(row["statements"])
            except (asyncpg.InsufficientPrivilegeError, asyncpg.DependentObjectsStillExistError) as e:
                # Another database that dfproxy serves may use it too.
                log.warning("executor login left in place", role=row["rolname"], reason=str(e))
    finally:
        await conn.close()


async def _connect(dsn: str) -> asyncpg.Connection[Any]:
    uri, tls = for_asyncpg(dsn)
    connection: asyncpg.Connection[Any] = await asyncpg.connect(uri, **tls, statement_cache_size=0)
    return connection


async def _check_server(conn: asyncpg.Connection[Any]) -> None:
    major = int(await conn.fetchval("SELECT current_setting('server_version_num')::int / 10000"))
    if major < OLDEST_SERVER:
        raise MigrationError(f"the server is PostgreSQL {major}; dfproxy needs {OLDEST_SERVER} or later")
    if await conn.fetchval("SELECT pg_is_in_recovery()"):
        raise MigrationError("the server is a standby, which is read-only; point dfproxy at the primary"
                             " (target_session_attrs=read-write)")


async def _prepare(conn: asyncpg.Connection[Any]) -> None:
    """Takes the lock, and makes the rest of the transaction independent of the role's defaults."""
    await conn.execute("""
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE;
        SET LOCAL search_path = pg_catalog, pg_temp;
        SET LOCAL statement_timeout = 0;
        SET LOCAL lock_timeout = 0;
        SET LOCAL idle_in_transaction_session_timeout = 0;
        SET LOCAL check_function_bodies = on;
        SET LOCAL standard_conforming_strings = on;
        SET LOCAL client_min_messages = warning;
        SET LOCAL default_tablespace = '';
        SET LOCAL default_table_access_method = heap;
    """)
    await conn.execute("SELECT pg_catalog.pg_advisory_xact_lock($1)", LOCK)


async def _create(conn: asyncpg.Connection[Any]) -> None:
    """Makes the two schemas and the ledger. Raises MigrationError where they can't be ours."""
    for name in ("df", "duroxide"):
        if await conn.fetchval("SELECT to_regnamespace($1) IS NOT NULL", name):
            raise MigrationError(
                f"this database has a schema {name} that dfproxy did not make (pg_durable, or a schema of your own?);"
                " rename or drop it, or serve another database"
            )
    try:
        async with conn.transaction():
            await conn.execute("CREATE SCHEMA df; CREATE SCHEMA duroxide")
    except asyncpg.InsufficientPrivilegeError as e:
        who, database = await conn.fetchrow("SELECT quote_ident(current_user), quote_ident(current_database())")
        raise MigrationError(f"{e}; run: GRANT CREATE ON DATABASE {database} TO {who}") from e
    await conn.execute(_LEDGER)


async def _become_owner(conn: asyncpg.Connection[Any]) -> None:
    """Acts as the role that owns the schemas for this transaction: everything must belong to one role."""
    owner, same, may = await conn.fetchrow(
        "SELECT pg_get_userbyid(nspowner), pg_get_userbyid(nspowner) = current_user,"
        " pg_has_role(current_user, nspowner, 'MEMBER') FROM pg_namespace WHERE nspname = 'duroxide'"
    )
    if same:
        return
    if not may:
        raise MigrationError(f"the schemas of dfproxy belong to role {owner}; connect as it, or as a member of it")
    await conn.execute("SELECT set_config('role', $1, true)", owner)


def _check_ledger(done: dict[int, str], known: list[Migration]) -> None:
    """Raises MigrationError where the database was set up by a newer release, or from other files."""
    newest = known[-1].version
    if done and max(done) > newest:
        raise MigrationError(f"this database was set up by a newer dfproxy (schema version {max(done)}, this release"
                             f" has {newest}); upgrade dfproxy")
    for m in known:
        if done.get(m.version, m.checksum) != m.checksum:
            raise MigrationError(f"migration {m.version:04}_{m.name} was applied from a file with other contents;"
                                 " this database was set up by another build of dfproxy")


async def _check_unused(conn: asyncpg.Connection[Any]) -> None:
    unfinished = await conn.fetchval("SELECT count(*) FROM duroxide.instances WHERE status IN ('pending', 'running')")
    if unfinished:
        raise UnfinishedWorkflowsError(f"{unfinished} workflows have not ended; cancel them, or remove with --force")
    dependents = [r[0] for r in await conn.fetch(_DEPENDENTS)]
    if dependents:
        raise MigrationError(f"these depend on the schemas of dfproxy: {', '.join(dependents[:10])};"
                             " drop them first, or remove with --force")
