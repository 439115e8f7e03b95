"""A proxy before a fresh database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fix_postgres import Database
from tests.proxy.fix_tls import files, plain_cluster, proxy_pair, tls_cluster
from tests.proxy.proxies import RunningProxy, fastpath_at, running_proxy

__all__ = ["files", "plain_cluster", "proxied", "proxied18", "proxy_pair", "tls_cluster"]


@pytest.fixture
def proxied(database: Database) -> Iterator[RunningProxy]:
    """A proxy before the fresh database of each version."""
    with running_proxy(database.dsn(), fastpath=fastpath_at(database.version)) as proxy:
        yield proxy


@pytest.fixture
def proxied18(database18: Database) -> Iterator[RunningProxy]:
    """A proxy before the fresh database of the newest version."""
    with running_proxy(database18.dsn()) as proxy:
        yield proxy
