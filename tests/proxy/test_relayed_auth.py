"""Every authentication method through the proxy, with clients that know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

import asyncpg
import pg8000.dbapi
import psycopg
import pytest

from proxy.embedded import Cluster
from tests.fix_postgres import edges, running_cluster
from tests.proxy.proxies import RunningProxy, running_proxy
from tests.proxy.test_wire_auth import HBA, METHODS, PASSWORD

ROLES = [method.partition("-")[0] for method in METHODS]


@pytest.fixture(scope="module", params=edges(), ids=lambda v: f"pg{v}")
def guarded(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with running_cluster(request.param, hba=HBA) as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            for role in ROLES:
                c.execute(f"SET password_encryption = '{'md5' if role == 'md5' else 'scram-sha-256'}'")
                c.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(psycopg.sql.Identifier(role), PASSWORD))
        yield cluster


@pytest.fixture
def proxied_guard(guarded: Cluster) -> Iterator[RunningProxy]:
    with running_proxy(guarded.dsn()) as proxy:
        yield proxy


@pytest.mark.parametrize("role", ROLES)
def test_psycopg(proxied_guard: RunningProxy, role: str) -> None:
    # `prefer` asks for encryption first, in both ways that libpq knows.
    for extra in ({"sslmode": "disable"}, {"sslmode": "prefer"}):
        with psycopg.connect(
            host="127.0.0.1", port=proxied_guard.port, user=role, password=PASSWORD, dbname="postgres", **extra
        ) as c:
            assert c.execute("SELECT current_user").fetchone() == (role,)


@pytest.mark.parametrize("role", ROLES)
async def test_asyncpg(proxied_guard: RunningProxy, role: str) -> None:
    c = await asyncpg.connect(
        host="127.0.0.1", port=proxied_guard.port, user=role, password=PASSWORD, database="postgres"
    )
    assert await c.fetchval("SELECT current_user") == role
    await c.close()


@pytest.mark.parametrize("role", ROLES)
def test_pg8000(proxied_guard: RunningProxy, role: str) -> None:
    c = pg8000.dbapi.connect(role, host="127.0.0.1", port=proxied_guard.port, password=PASSWORD, database="postgres")
    c.close()


@pytest.mark.parametrize("role", ROLES[1:])
def test_a_wrong_password_is_the_servers_own_refusal(proxied_guard: RunningProxy, role: str) -> None:
    with pytest.raises(psycopg.OperationalError, match=f'password authentication failed for user "{role}"'):
        psycopg.connect(host="127.0.0.1", port=proxied_guard.port, user=role, password="wrong", dbname="postgres")


def test_what_the_server_refuses_is_told_in_its_words(proxied_guard: RunningProxy) -> None:
    with pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'):
        psycopg.connect(host="127.0.0.1", port=proxied_guard.port, user="trust", dbname="nowhere")


def test_encryption_that_is_required_takes_a_certificate(proxied_guard: RunningProxy) -> None:
    with pytest.raises(psycopg.OperationalError, match="server does not support SSL"):
        psycopg.connect(host="127.0.0.1", port=proxied_guard.port, user="trust", dbname="postgres", sslmode="require")


