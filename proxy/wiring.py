"""From the settings that a person gives to those of the parts: proxy, engine, and the table that SQL functions read."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg
import structlog
from pydantic import SecretStr

import proxy
from engine import migrate
from engine.settings import EngineSettings
from proxy import dsn, faults
from proxy.server import ProxyConfig
from proxy.settings import Settings
from proxy.upstream import Upstream

log = structlog.get_logger("dfproxy")

EVERY = "*"

CONNECTABLE = """
SELECT datname FROM pg_database
 WHERE datallowconn AND NOT datistemplate AND has_database_privilege(datname, 'CONNECT') AND datname <> $1
 ORDER BY datname"""


def hide(value: str) -> SecretStr:
    """A text that `repr` and logs do not show."""
    return SecretStr(value)


def with_upstream(settings: Settings, upstream: str) -> Settings:
    """The same settings for another server."""
    return settings.model_copy(update={"upstream": hide(upstream)})


def proxy_config(settings: Settings, *, reuse_port: bool = False) -> ProxyConfig:
    """What the relay is told."""
    host, port = settings.address
    return ProxyConfig(
        host=host, port=port, upstream=Upstream.parse(settings.dsn), reuse_port=reuse_port,
        startup_timeout=settings.startup_timeout, drain_timeout=settings.drain_timeout,
        max_client_connections=settings.max_client_connections,
    )


def engine_settings(settings: Settings, database: str) -> EngineSettings:
    """What the worker of one database is told."""
    return EngineSettings(
        dsn=dsn.with_database(settings.dsn, database),
        secret=settings.secret.get_secret_value() if settings.secret else None,
        version=proxy.__version__,
        max_user_connections=settings.max_user_connections,
        max_control_connections=settings.max_control_connections,
        max_instances=settings.max_instances,
        execution_acquire_timeout=settings.execution_acquire_timeout,
        lease=settings.lease,
        max_result_bytes=settings.max_result_bytes,
        max_result_rows=settings.max_result_rows,
        loop_history_rounds=settings.loop_history_rounds,
        max_crashes=settings.max_crashes,
        enable_superuser_instances=settings.enable_superuser_instances,
        require_login=settings.require_login,
        allow_set_role=settings.allow_set_role,
    )


async def connect(uri: str, *, user: str | None = None, password: str | None = None) -> asyncpg.Connection:
    """A session for a look or a small change. Raises what asyncpg raises."""
    return await asyncpg.connect(
        uri, user=user, password=password, timeout=15, statement_cache_size=0,
        server_settings={"application_name": "dfproxy:admin"})


async def databases(settings: Settings) -> tuple[str, ...]:
    """The databases with workflows: the upstream's own first, then those of `databases` (`*`: every other one)."""
    home = dsn.database(settings.dsn)
    if EVERY not in settings.databases:
        return tuple(dict.fromkeys((home, *settings.databases)))
    connection = await connect(settings.dsn)
    try:
        others = [row["datname"] for row in await connection.fetch(CONNECTABLE, home)]
    finally:
        await connection.close()
    return (home, *others)


async def install(settings: Settings) -> tuple[str, ...]:
    """Installs or upgrades the schemas in every database with workflows, and mirrors the settings into them.

    Returns the databases. One that `*` found and that can't have the schemas is left out with a warning; one that was
    named raises (proxy.faults explains it).
    """
    done = []
    for name in await databases(settings):
        uri = dsn.with_database(settings.dsn, name)
        try:
            await migrate.migrate(uri)
            await _mirror(uri, settings)
        except (migrate.MigrationError, asyncpg.PostgresError) as e:
            if EVERY not in settings.databases or name == dsn.database(settings.dsn) or name in settings.databases:
                raise
            log.warning("no workflows in this database", database=name, reason=faults.explain(e, where=dsn.show(uri)))
        else:
            done.append(name)
    return tuple(done)


async def _mirror(uri: str, settings: Settings) -> None:
    """Writes the settings that SQL functions need to duroxide.settings."""
    values = {
        "enable_superuser_instances": "on" if settings.enable_superuser_instances else "off",
        "require_login": "on" if settings.require_login else "off",
        "list_instances_max_limit": str(settings.list_instances_max_limit),
    }
    connection = await connect(uri)
    try:
        await connection.execute("""
            INSERT INTO duroxide.settings AS s (name, value)
            SELECT * FROM unnest($1::text[], $2::text[])
            ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value WHERE s.value <> EXCLUDED.value""",
            list(values), list(values.values()))
    finally:
        await connection.close()


@dataclass(frozen=True)
class Report:
    """What the start-up banner says about the server."""

    server: str
    identity: str
    warnings: tuple[str, ...]


async def report(settings: Settings) -> Report:
    """Looks at the server once, for the banner; without a worker there is no login to look with."""
    warnings = []
    host, _ = settings.address
    if host not in ("127.0.0.1", "::1", "localhost"):
        warnings.append(f"listening on {host} without TLS: queries, results and some logins pass in clear")
    if settings.allow_set_role:
        warnings.append("allow_set_role is on: a step can leave its role with RESET ROLE")
    if not settings.engine:
        return Report("PostgreSQL", "", tuple(warnings))
    connection = await connect(settings.dsn)
    try:
        version, me, superuser, may = await connection.fetchrow(
            "SELECT current_setting('server_version'), current_user, rolsuper, rolcreaterole"
            "  FROM pg_roles WHERE rolname = current_user")
    finally:
        await connection.close()
    if superuser:
        warnings.append(f"the service role {me} is a superuser: give dfproxy a role with NOSUPERUSER CREATEROLE")
    return Report(f"PostgreSQL {version}", _identity(me, may or superuser, settings), tuple(warnings))


def _identity(me: str, may_create_roles: bool, settings: Settings) -> str:
    if may_create_roles:
        return f"steps run as executor logins (dfx_...); those of {me} itself on its own connections"
    if settings.allow_set_role:
        return f"steps run by SET ROLE from {me} where a role has no executor login"
    return f"steps of {me} only: without CREATEROLE there are no executor logins for other roles"
