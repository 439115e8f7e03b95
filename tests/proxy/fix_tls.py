"""A server with TLS, logins by every method, and a proxy with a certificate in front of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

from proxy.embedded import Cluster
from proxy.tls import ServerTlsFiles
from tests.fix_certificates import Authority, Pair, postgres_owner
from tests.fix_postgres import edges, running_cluster, versions
from tests.proxy.proxies import RunningProxy, running_proxy

#: The only one among the servers of the tests whose binaries were built with OpenSSL: Debian's.
TLS_VERSION = 15
needs_tls_server = pytest.mark.skipif(
    TLS_VERSION not in versions(), reason="needs Debian's PostgreSQL 15: the embedded binaries are built without TLS")

METHODS = ("trust", "password", "md5", "scram")
PASSWORD = "pä ss'word"
HBA = [
    "local all all trust",
    "hostssl all bound 127.0.0.1/32 scram-sha-256",
    "hostssl all certified 127.0.0.1/32 cert",
    "hostssl all both 127.0.0.1/32 scram-sha-256 clientcert=verify-ca",
    "host all trust 127.0.0.1/32 trust",
    "host all password 127.0.0.1/32 password",
    "host all md5 127.0.0.1/32 md5",
    "host all scram 127.0.0.1/32 scram-sha-256",
    "host all all 127.0.0.1/32 trust",
]


def add_logins(cluster: Cluster) -> None:
    """Roles named after how they log in, all with PASSWORD."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as c:
        for role in (*METHODS, "certified", "both"):
            c.execute(f"SET password_encryption = '{'md5' if role == 'md5' else 'scram-sha-256'}'")
            c.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), PASSWORD))


def tls_settings(authority: Authority, pair: Pair) -> dict[str, str]:
    return {"ssl": "on", "ssl_cert_file": f"'{pair.cert}'", "ssl_key_file": f"'{pair.key}'",
            "ssl_ca_file": f"'{authority.file}'"}


@pytest.fixture(scope="session")
def tls_cluster(authority: Authority) -> Iterator[Cluster]:
    """A server that takes TLS and plain connections. Its certificate is for localhost."""
    pair = authority.issue("server", hosts=("localhost",), owner=postgres_owner())
    with running_cluster(TLS_VERSION, settings=tls_settings(authority, pair), hba=HBA) as cluster:
        add_logins(cluster)
        yield cluster


@pytest.fixture(scope="session", params=[v for v in edges() if v != TLS_VERSION], ids=lambda v: f"pg{v}")
def plain_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server without TLS."""
    with running_cluster(request.param, hba=[line for line in HBA if not line.startswith("hostssl")]) as cluster:
        add_logins(cluster)
        yield cluster


@pytest.fixture(scope="session")
def proxy_pair(authority: Authority) -> Pair:
    """The proxy's certificate: RSA, as most are."""
    return authority.issue("proxy", kind="rsa")


@pytest.fixture(scope="session")
def files(proxy_pair: Pair) -> ServerTlsFiles:
    return ServerTlsFiles(str(proxy_pair.cert), str(proxy_pair.key))


def upstream_dsn(cluster: Cluster, authority: Authority | None, **more: str) -> str:
    """Without an authority: a plain connection; with one: TLS with everything verified, unless `more` says otherwise."""
    options = {"sslmode": "disable"} if authority is None else {"sslmode": "verify-full", "sslrootcert": str(authority.file)}
    query = "&".join(f"{k}={v}" for k, v in {**options, **more}.items())
    return f"postgresql://postgres@localhost:{cluster.port}/postgres?hostaddr=127.0.0.1&{query}"


@dataclass(frozen=True)
class Login:
    """How a client gets in."""

    proxy: RunningProxy
    authority: Authority
    tls: bool

    def parameters(self, role: str, password: str = PASSWORD, **more: str) -> dict[str, Any]:
        """libpq's connection parameters."""
        options = {"sslmode": "verify-full", "sslrootcert": str(self.authority.file)} if self.tls else {"sslmode": "disable"}
        return {"host": "localhost", "hostaddr": "127.0.0.1", "port": str(self.proxy.port), "dbname": "postgres", "user": role,
                "password": password, "connect_timeout": "30", "gssencmode": "disable", **options, **more}

    def connect(self, role: str, password: str = PASSWORD, **more: str) -> psycopg.Connection[Any]:
        return psycopg.connect(**self.parameters(role, password, **more), autocommit=True)


@contextlib.contextmanager
def guarded_proxy(cluster: Cluster, authority: Authority, *, client_tls: bool, server_tls: bool, files: ServerTlsFiles | None,
                  upstream: dict[str, str] | None = None, **config: Any) -> Iterator[Login]:
    """A proxy in front of `cluster` with TLS on the legs that are named."""
    dsn = upstream_dsn(cluster, authority if server_tls else None, **(upstream or {}))
    with running_proxy(dsn, tls=files if client_tls else None, **config) as proxy:
        yield Login(proxy, authority, client_tls)
