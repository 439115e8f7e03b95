"""Fixtures: real PostgreSQL servers, one a version for the whole run, and a fresh database a test."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from proxy.embedded import Cluster, bin_dir

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
#: Durability is not what most tests are about; those that kill the server start their own with fsync on.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200",
        "log_min_messages": "log", "log_line_prefix": "'%m [%p] %a %u@%d '"}

#: Names a folder that lasts as long as the test run.
_FOLDER = "PYTEST_DFPROXY_FOLDER"


def versions() -> list[int]:
    """The major versions whose binaries are present (DFPROXY_TEST_VERSIONS=18,16 narrows them)."""
    wanted = os.environ.get("DFPROXY_TEST_VERSIONS")
    found = [18, 16] + ([15] if (DEBIAN_15 / "postgres").exists() else [])
    return [v for v in found if wanted is None or str(v) in wanted.split(",")]


def edges() -> list[int]:
    """The newest and the oldest of them, for tests in which what lies between can't matter: the protocol's.

    All that DFPROXY_TEST_VERSIONS names, where it is set.
    """
    found = versions()
    return found if "DFPROXY_TEST_VERSIONS" in os.environ else list(dict.fromkeys([found[0], found[-1]]))


#: Folders whose tests run on the `edges`.
_PROTOCOL = ("proxy", "differential", "drivers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, in the folders of the protocol's tests, the versions in the middle."""
    wanted = edges()
    folders = tuple(config.rootpath / "tests" / name for name in _PROTOCOL)

    def needed(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return parameters.get("pg_version", wanted[0]) in wanted or item.path.parent not in folders

    items[:] = [item for item in items if needed(item)]


def binaries(version: int) -> Path:
    return DEBIAN_15 if version == 15 else bin_dir(version)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def pytest_configure(config: pytest.Config) -> None:
    """Makes a folder for the whole run; the processes that share its tests get its name in their environment."""
    if _FOLDER not in os.environ:
        made = os.environ[_FOLDER] = tempfile.mkdtemp(prefix="dfproxy-tests-")
        Path(made).chmod(0o755)
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_FOLDER), ignore_errors=True))


def copy_of_a_new_one(version: int, cluster: Cluster) -> None:
    """Makes the data folder. initdb takes seconds, so it runs once a run and version, and what it made is copied."""
    if (shared := os.environ.get(_FOLDER)) is None:
        return  # outside of pytest: initdb runs when the server is started
    made = Path(shared) / f"pg{version}"
    with (Path(shared) / f"pg{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Cluster(made, binaries(version)).init()
    subprocess.run(["cp", "-a", str(made), str(cluster.data_dir)], check=True)


@contextlib.contextmanager
def running_cluster(version: int, *, settings: dict[str, str] | None = None, hba: list[str] | None = None,
                    durable: bool = False) -> Iterator[Cluster]:
    """A private server of its own, removed at the end. `durable` keeps fsync on."""
    folder = Path(tempfile.mkdtemp(prefix=f"dfproxy-pg{version}-"))
    folder.chmod(0o755)
    base = {k: v for k, v in FAST.items() if not (durable and k in ("fsync", "synchronous_commit", "full_page_writes"))}
    cluster = Cluster(folder / "data", binaries(version), port=free_port(), settings={**base, **(settings or {})},
                      **({"hba": hba} if hba else {}))
    try:
        copy_of_a_new_one(version, cluster)
        cluster.start()
        yield cluster
    finally:
        cluster.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Database:
    """A fresh database: its server, its name, and its owner (NOSUPERUSER CREATEROLE LOGIN)."""

    cluster: Cluster
    name: str
    owner: str
    version: int

    def dsn(self, user: str | None = None) -> str:
        """A URI; without `user`, for the owner. Every role may log in without a password."""
        return self.cluster.dsn(user=user or self.owner, database=self.name)

    @property
    def superuser_dsn(self) -> str:
        return self.cluster.dsn(database=self.name)


_counter = itertools.count(1)
_clusters: dict[int, Cluster] = {}


@pytest.fixture(scope="session")
def _all_clusters() -> Iterator[dict[int, Cluster]]:
    with contextlib.ExitStack() as stack:
        _clusters.clear()
        yield _Lazy(stack)
    _clusters.clear()


class _Lazy(dict[int, Cluster]):
    """Starts a server when its version is first asked for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def __missing__(self, version: int) -> Cluster:
        self[version] = cluster = self._stack.enter_context(running_cluster(version))
        return cluster


@pytest.fixture(scope="session", params=versions(), ids=lambda v: f"pg{v}")
def pg_version(request: pytest.FixtureRequest) -> int:
    """Parametrises a test over every PostgreSQL version that is present."""
    version: int = request.param
    return version


@pytest.fixture(scope="session")
def cluster(pg_version: int, _all_clusters: dict[int, Cluster]) -> Cluster:
    """A server of each version (so the test runs once for each)."""
    return _all_clusters[pg_version]


@pytest.fixture(scope="session")
def cluster18(_all_clusters: dict[int, Cluster]) -> Cluster:
    """The newest server only, for tests in which the version can't matter."""
    return _all_clusters[versions()[0]]


@contextlib.contextmanager
def fresh_database(cluster: Cluster, version: int) -> Iterator[Database]:
    """A database with an owner role of its own; both are dropped at the end."""
    n = next(_counter)
    name, owner = f"t{os.getpid()}_{n}", f"o{os.getpid()}_{n}"
    with psycopg.connect(cluster.dsn(), autocommit=True) as c:
        c.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEROLE NOSUPERUSER").format(sql.Identifier(owner)))
        c.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(owner)))
    try:
        yield Database(cluster, name, owner, version)
    finally:
        if cluster.pid() is not None:
            with psycopg.connect(cluster.dsn(), autocommit=True) as c:
                c.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database(cluster: Cluster, pg_version: int) -> Iterator[Database]:
    """A fresh database on each version."""
    with fresh_database(cluster, pg_version) as d:
        yield d


@pytest.fixture
def database18(cluster18: Cluster) -> Iterator[Database]:
    """A fresh database on the newest version."""
    with fresh_database(cluster18, versions()[0]) as d:
        yield d


@pytest.fixture(params=sorted({versions()[0], versions()[-1]}), ids=lambda v: f"pg{v}")
def database_ends(request: pytest.FixtureRequest, _all_clusters: dict[int, Cluster]) -> Iterator[Database]:
    """A fresh database on the newest and on the oldest version: memberships of roles changed once, with 16."""
    with fresh_database(_all_clusters[request.param], request.param) as d:
        yield d
