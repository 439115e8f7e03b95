"""From the settings that a person gives to those of the parts: proxy, engine, and the table that SQL functions read."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg
import structlog
from pydantic import SecretStr

import proxy
from engine import migrate
from engine.http.policy import HostList, HttpPolicy
from engine.http.secrets import ensure_key
from engine.http.transport import trust
from engine.settings import EngineSettings
from proxy import dsn, faults
from proxy.settings import Settings, SettingsError
from proxy.tls import ServerTls, ServerTlsFiles, UpstreamTls
from proxy.upstream import Upstream
from proxy.wire.tls_options import for_asyncpg

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


def check_tls(settings: Settings) -> None:
    """Reads every certificate and key once, before anything is started. Raises TlsConfigError."""
    files = tls_files(settings)
    if files is not None:
        ServerTls(files)
    if settings.upstream is not None:
        UpstreamTls(Upstream.parse(settings.dsn).tls)


def tls_files(settings: Settings) -> ServerTlsFiles | None:
    """What clients are shown; None: there is no TLS for clients."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return ServerTlsFiles(
        str(settings.tls_cert), str(settings.tls_key),
        str(settings.tls_client_ca) if settings.tls_client_ca is not None else None, settings.tls_min_version)


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
        retention_days=settings.retention_days,
        retention_max_instances=settings.retention_max_instances or None,
        reconcile_interval=settings.reconcile_interval,
        enable_superuser_instances=settings.enable_superuser_instances,
        require_login=settings.require_login,
        allow_set_role=settings.allow_set_role,
        http=http_policy(settings),
    )


def http_policy(settings: Settings) -> HttpPolicy:
    """What workflows may call. Raises SettingsError for a file of authorities that can't be used."""
    if settings.http_ca_file is not None:
        try:
            trust(settings.http_ca_file)
        except OSError as e:  # also what ssl raises
            raise SettingsError(f"http_ca_file: can't use {settings.http_ca_file}: {e.strerror or e}") from e
    return HttpPolicy(
        enabled=settings.http_enabled,
        allow=HostList.parse(settings.http_allow),
        deny=HostList.parse(settings.http_deny),
        allow_plain=settings.http_allow_plain,
        max_request_bytes=settings.http_max_request_bytes,
        max_response_bytes=settings.http_max_response_bytes,
        max_timeout=settings.http_max_timeout,
        max_parallel=settings.http_max_parallel,
        max_parallel_per_host=settings.http_max_parallel_per_host,
        ca_file=settings.http_ca_file,
    )


async def connect(uri: str, *, user: str | None = None, password: str | None = None) -> asyncpg.Connection:
    """A session for a look or a small change. Raises what asyncpg raises."""
    uri, tls = for_asyncpg(uri)
    return await asyncpg.connect(
        uri, **tls, user=user, password=password, timeout=15, statement_cache_size=0,
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


async def with_shared_secret(settings: Settings, databases: tuple[str, ...]) -> Settings:
    """The same settings, with a secret for all databases of the server.

    Roles belong to the whole server, and so do executor logins: each database with a secret of its own would set
    passwords that the others do not know. The first database's secret serves all.
    """
    if settings.secret is not None or len(databases) < 2:
        return settings
    connection = await connect(settings.dsn)
    try:
        async with connection.transaction():  # with a pooler in between, statements alone may go astray
            secret = await connection.fetchval("SELECT value FROM duroxide.secret")
    finally:
        await connection.close()
    return settings.model_copy(update={"secret": hide(secret)})


async def make_keys(settings: Settings, databases: tuple[str, ...]) -> None:
    """Makes sure that secret variables can be sealed in each database. Call with the secret that workers will have."""
    for name in databases:
        connection = await connect(dsn.with_database(settings.dsn, name))
        try:
            await ensure_key(connection, settings.secret.get_secret_value() if settings.secret else None)
        finally:
            await connection.close()


async def _mirror(uri: str, settings: Settings) -> None:
    """Writes the settings that SQL functions need to duroxide.settings."""
    values = {
        "enable_superuser_instances": "on" if settings.enable_superuser_instances else "off",
        "require_login": "on" if settings.require_login else "off",
        "list_instances_max_limit": str(settings.list_instances_max_limit),
        "max_new_transaction_starts": str(settings.max_new_transaction_starts),
        "new_transaction_start_timeout": f"{settings.new_transaction_start_timeout:g}",
    }
    connection = await connect(uri)
    try:
        async with connection.transaction():
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
        if settings.tls_cert is None:
            warnings.append(f"listening on {host} without TLS: queries, results and some logins pass in clear")
        elif not settings.tls_required and settings.tls_client_ca is None:
            warnings.append(f"listening on {host}, and clients may come without TLS: tls_required refuses them")
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
