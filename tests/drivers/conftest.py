"""Every driver's tests run twice, on the newest and the oldest version: directly, and through the proxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from psycopg import sql

from engine.migrate import migrate
from proxy.embedded import Cluster
from proxy.rewriter import Rewriter
from tests.fix_postgres import Database, fresh_database
from tests.proxy.proxies import RunningProxy, fastpath_at, running_proxy


@dataclass(frozen=True)
class Endpoint:
    """Where a driver connects to. Every role may log in without a password."""

    proxied: bool
    host: str
    port: int
    user: str
    database: str

    @property
    def uri(self) -> str:
        return f"postgresql://{self.user}@{self.host}:{self.port}/{self.database}"

    def url(self, dialect: str) -> str:
        """For SQLAlchemy."""
        return self.uri.replace("postgresql:", f"postgresql+{dialect}:")


@pytest.fixture(scope="session")
def _served(cluster: Cluster, pg_version: int) -> Iterator[tuple[Database, RunningProxy]]:
    with fresh_database(cluster, pg_version) as database:
        asyncio.run(migrate(database.dsn()))
        with running_proxy(database.dsn(), rewriter=Rewriter(), fastpath=fastpath_at(pg_version)) as proxy:
            yield database, proxy


@pytest.fixture(params=["direct", "proxied"])
def endpoint(request: pytest.FixtureRequest, _served: tuple[Database, RunningProxy]) -> Iterator[Endpoint]:
    """A database whose schema `public` is empty, by either way."""
    database, proxy = _served
    proxied = request.param == "proxied"
    with psycopg.connect(database.dsn(), autocommit=True) as c:
        c.execute("DROP SCHEMA IF EXISTS scratch CASCADE")
        c.execute("CREATE SCHEMA scratch")
        c.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} SET search_path = scratch").format(
            sql.Identifier(database.owner), sql.Identifier(database.name)))
    port = proxy.port if proxied else database.cluster.port
    assert port is not None
    with contextlib.nullcontext(Endpoint(proxied, "127.0.0.1", port, database.owner, database.name)) as found:
        yield found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that download a driver (marked `slow`) run when asked for: `pytest -m slow tests/drivers`."""
    if config.getoption("-m") or any("::" in argument for argument in config.args):
        return
    fetching = [i for i in items if i.path.parent == config.rootpath / "tests" / "drivers" and i.get_closest_marker("slow")]
    if fetching:
        config.hook.pytest_deselected(items=fetching)
        items[:] = [i for i in items if i not in fetching]
