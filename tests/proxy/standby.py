"""A primary and a standby that streams from it, for tests of failover."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from proxy.embedded import Cluster
from tests.fix_postgres import FAST, free_port, running_cluster, versions

HBA = ["local all all trust", "host all all 127.0.0.1/32 trust", "local replication all trust"]


@contextlib.contextmanager
def pair(hba: list[str] | None = None) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary and its hot standby, both running."""
    version = versions()[0]
    with running_cluster(version, hba=HBA, settings={"wal_level": "replica"}) as primary:
        folder = Path(tempfile.mkdtemp(prefix="dfproxy-standby-"))
        folder.chmod(0o777)  # pg_basebackup runs as the servers' user
        standby = Cluster(folder / "data", primary.bin_dir, port=free_port(), settings=FAST, hba=hba or HBA)
        try:
            primary.run("pg_basebackup", "-h", str(primary.socket_dir), "-p", str(primary.port), "-U", "postgres",
                        "-D", str(standby.data_dir), "-R", "-X", "stream", "-c", "fast", "--no-sync")
            if hba:
                primary.hba = hba + HBA[2:]
                primary.configure()
                primary.run("pg_ctl", "-D", str(primary.data_dir), "reload")
            standby.start()
            yield primary, standby
        finally:
            standby.stop("immediate")
            shutil.rmtree(folder, ignore_errors=True)


def promote(cluster: Cluster) -> None:
    """Makes a standby a primary, and returns when it is one."""
    cluster.run("pg_ctl", "-D", str(cluster.data_dir), "-w", "promote")


def demote(cluster: Cluster, source: Cluster) -> None:
    """Starts a primary that was stopped in order as a standby of another."""
    (cluster.data_dir / "standby.signal").touch()
    with (cluster.data_dir / "postgresql.auto.conf").open("a") as f:
        f.write(f"primary_conninfo = 'host={source.socket_dir} port={source.port} user=postgres'\n"
                "recovery_target_timeline = 'latest'\n")
    cluster.start()


def with_password(primary: Cluster, standby: Cluster, user: str, password: str) -> None:
    """Makes a role with a password, on both."""

    def local(cluster: Cluster) -> psycopg.Connection:
        return psycopg.connect(f"postgresql:///postgres?host={cluster.socket_dir}&port={cluster.port}&user=postgres",
                               autocommit=True)

    with local(primary) as c, local(standby) as there:
        c.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
        while there.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (user,)).fetchone() is None:
            time.sleep(0.01)
