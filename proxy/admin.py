"""`dfproxy init` and `dfproxy uninstall`."""

from __future__ import annotations

from collections.abc import Sequence

from engine import migrate
from proxy import doctor, dsn, wiring
from proxy.settings import Settings


async def init(settings: Settings, grants: Sequence[str] = ()) -> int:
    """Installs or upgrades the schemas, lets the roles of `grants` use df.*, and repairs executor logins."""
    databases = await wiring.install(settings)
    settings = await wiring.with_shared_secret(settings, databases)
    await wiring.make_keys(settings, databases)
    for name in databases:
        uri = dsn.with_database(settings.dsn, name)
        connection = await wiring.connect(uri)
        try:
            version = await migrate.schema_version(connection)
            print(f"{dsn.show(uri)}: schemas at version {version}")
            for role in grants:
                await connection.execute("SELECT df.grant_usage($1::text)", role)
                print(f"  {role} may use df.*")
            here = settings.model_copy(update={"upstream": wiring.hide(uri)})
            for line in await doctor.repair(connection, here):
                print(f"  {line}")
        finally:
            await connection.close()
    return 0


async def uninstall(settings: Settings, *, force: bool) -> int:
    """Removes both schemas. Raises MigrationError where unfinished workflows exist, unless `force`."""
    await migrate.uninstall(settings.dsn, force=force)
    print(f"{dsn.show(settings.dsn)}: df and duroxide are removed")
    return 0
