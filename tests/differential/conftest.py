"""One scene for each version of PostgreSQL, kept for the whole run: a database with fixed tables, and a proxy before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from engine.migrate import migrate
from proxy.embedded import Cluster
from proxy.rewriter import Rewriter
from tests.differential.runner import PLAYGROUND, Scene
from tests.differential.wireclient import Address
from tests.fix_postgres import Database, fresh_database, versions
from tests.proxy.proxies import RunningProxy, fastpath_at, running_proxy


@dataclass
class Stage:
    """A scene, and the proxy through which it can also be reached."""

    scene: Scene
    proxy: RunningProxy
    database: Database
    version: int

    @property
    def proxied(self) -> Address:
        return "127.0.0.1", self.proxy.port


@contextlib.contextmanager
def _set_up(cluster: Cluster, version: int) -> Iterator[Stage]:
    with fresh_database(cluster, version) as database:
        asyncio.run(migrate(database.dsn()))
        with psycopg.connect(database.superuser_dsn, autocommit=True) as admin:
            admin.execute((Path(__file__).parent / "scene.sql").read_text())
            role = sql.Identifier(database.owner)
            admin.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(role))
            admin.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} SET search_path = {}, public").format(
                role, sql.Identifier(database.name), sql.Identifier(PLAYGROUND)))
            admin.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(role))
            with running_proxy(database.dsn(), rewriter=Rewriter(), fastpath=fastpath_at(version)) as proxy:
                address = ("127.0.0.1", cluster.port or 0)
                yield Stage(Scene(address, database.owner, database.name, admin), proxy, database, version)


@pytest.fixture(scope="session")
def stages(_all_clusters: dict[int, Cluster]) -> Iterator[Callable[[int], Stage]]:
    """Sets up the stage of a version when it is first asked for: scene.sql, dfproxy's schemas, a proxy before them."""
    made: dict[int, Stage] = {}
    with contextlib.ExitStack() as stack:

        def get(version: int) -> Stage:
            if version not in made:
                made[version] = stack.enter_context(_set_up(_all_clusters[version], version))
            return made[version]

        yield get


@pytest.fixture
def stage(stages: Callable[[int], Stage], pg_version: int) -> Stage:
    """The stage of each version."""
    return stages(pg_version)


@pytest.fixture
def stage18(stages: Callable[[int], Stage]) -> Stage:
    """The stage of the newest version."""
    return stages(versions()[0])
