"""PostgreSQL's own programs through the proxy: dump and restore, benchmark, physical and logical replication."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy.embedded import Cluster
from proxy.rewriter import Rewriter
from tests.differential.conftest import Stage
from tests.differential.wireclient import PATIENCE
from tests.fix_postgres import running_cluster, versions
from tests.proxy.proxies import RunningProxy, running_proxy


def run(cluster: Cluster, program: str, *arguments: str, text: str | None = None) -> str:
    """What a program prints. Its stderr is shown if it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    done = subprocess.run([str(cluster.bin_dir / program), *arguments], input=text, capture_output=True, text=True,
                          timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def uris(stage: Stage, user: str = "postgres") -> tuple[str, str]:
    """The database directly and through the proxy."""
    return tuple(f"postgresql://{user}@127.0.0.1:{port}/{stage.scene.database}"
                 for port in (stage.scene.address[1], stage.proxied[1]))  # type: ignore[return-value]


def test_dump_and_restore(stage: Stage, tmp_path: Path) -> None:
    cluster, scene = stage.database.cluster, stage.scene
    scene.clear()
    scene.admin.execute("""
        CREATE TABLE play.wide AS SELECT n, repeat('x', n % 3000) AS v, ARRAY[n, NULL] AS a FROM generate_series(1, 3000) n;
        CREATE VIEW play.alike AS SELECT df.start, df.id & 1 AS bit FROM public.documents df;
        CREATE FUNCTION play.mentions() RETURNS text LANGUAGE sql AS $$ SELECT 'df.start(''a'' ~> ''b'')' $$""")
    direct, proxied = uris(stage)
    dumps = [run(cluster, "pg_dump", "--restrict-key=key", "-d", uri) if _has_restrict_key(cluster) else run(cluster, "pg_dump", "-d", uri)
             for uri in (direct, proxied)]  # fmt: skip
    assert len(dumps[0]) > 100_000
    assert dumps[0] == dumps[1]
    parallel = tmp_path / "parallel"
    run(cluster, "pg_dump", "-Fd", "-j2", "-f", str(parallel), "-d", proxied)
    other = f"{scene.database}_restored"
    scene.admin.execute(f'DROP DATABASE IF EXISTS "{other}"')
    try:
        for how in ("psql", "pg_restore"):
            scene.admin.execute(f'CREATE DATABASE "{other}"')
            target = proxied.rpartition("/")[0] + "/" + other
            if how == "psql":
                run(cluster, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target, text=dumps[1])
            else:
                run(cluster, "pg_restore", "-j2", "-d", target, str(parallel))
            again = run(cluster, "pg_dump", *(["--restrict-key=key"] if _has_restrict_key(cluster) else []), "-d", target)
            # Rows of many widths need not lie in the order in which they were written.
            assert sorted(again.splitlines()) == sorted(dumps[0].splitlines())
            scene.admin.execute(f'DROP DATABASE "{other}" WITH (FORCE)')
    finally:
        scene.admin.execute(f'DROP DATABASE IF EXISTS "{other}" WITH (FORCE)')


def _has_restrict_key(cluster: Cluster) -> bool:
    """Versions of late 2025 put a random key into each dump unless they are given one."""
    return "--restrict-key" in run(cluster, "pg_dump", "--help")


@pytest.fixture
def bench(stage: Stage) -> Iterator[str]:
    """A database for pgbench, by its address through the proxy."""
    scene, (direct, proxied) = stage.scene, uris(stage)
    name = f"{scene.database}_bench"
    scene.admin.execute(f'CREATE DATABASE "{name}"')
    try:
        run(stage.database.cluster, "pgbench", "-i", "-q", "-s", "1", direct.rpartition("/")[0] + "/" + name)
        yield proxied.rpartition("/")[0] + "/" + name
    finally:
        scene.admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
def test_pgbench(stage: Stage, bench: str, mode: str) -> None:
    cluster = stage.database.cluster
    out = run(cluster, "pgbench", "-n", "-M", mode, "-c", "8", "-j", "2", "-t", "50", bench)
    assert "number of transactions actually processed: 400/400" in out
    assert "number of failed transactions: 0" in out
    run(cluster, "pgbench", "-n", "-S", "-M", mode, "-c", "8", "-t", "100", bench)
    with psycopg.connect(bench) as c:
        sums = c.execute("SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(delta) FROM pgbench_history), (SELECT count(*) FROM pgbench_history)").fetchone()
    assert sums is not None
    assert sums[0] == sums[1]
    assert sums[2] == 400


def test_pgbench_pipelines_and_reconnects(stage: Stage, bench: str, tmp_path: Path) -> None:
    cluster = stage.database.cluster
    script = tmp_path / "pipeline.sql"
    script.write_text("\\startpipeline\n" + "".join(f"SELECT {n};\n" for n in range(20)) + "\\endpipeline\n")
    out = run(cluster, "pgbench", "-n", "-M", "prepared", "-c", "4", "-t", "50", "-f", str(script), bench)
    assert "number of transactions actually processed: 200/200" in out
    out = run(cluster, "pgbench", "-n", "-S", "-C", "-c", "4", "-t", "25", bench)
    assert "number of transactions actually processed: 100/100" in out


@pytest.fixture(scope="module", params=versions(), ids=lambda v: f"pg{v}")
def replicated(request: pytest.FixtureRequest) -> Iterator[tuple[Cluster, RunningProxy]]:
    """A server that others may replicate from."""
    hba = ["local all all trust", "host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust"]
    with (running_cluster(request.param, settings={"wal_level": "logical"}, hba=hba) as cluster,
          running_proxy(cluster.dsn(), rewriter=Rewriter()) as proxy):
        yield cluster, proxy


def test_a_base_backup_is_whole(replicated: tuple[Cluster, RunningProxy], tmp_path: Path) -> None:
    cluster, proxy = replicated
    with psycopg.connect(cluster.dsn(), autocommit=True) as c:
        c.execute("DROP TABLE IF EXISTS backed_up")
        c.execute("CREATE TABLE backed_up AS SELECT n, repeat('x', 500) AS v FROM generate_series(1, 5000) n")
    copy, out = tmp_path / "copy", tmp_path / "tar"
    server = ("-h", "127.0.0.1", "-p", str(proxy.port), "-U", "postgres")
    run(cluster, "pg_basebackup", *server, "-D", str(copy), "-X", "stream", "-c", "fast", "--progress", "--manifest-checksums=SHA256")
    manifest = json.loads((copy / "backup_manifest").read_text())
    for file in manifest["Files"]:
        assert hashlib.sha256((copy / file["Path"]).read_bytes()).hexdigest() == file["Checksum"], file["Path"]
    assert len(manifest["Files"]) > 900
    first = manifest["WAL-Ranges"][0]
    assert any(f.stat().st_size == 16 << 20 for f in (copy / "pg_wal").iterdir() if f.is_file()), first
    run(cluster, "pg_basebackup", *server, "-D", str(out), "-Ft", "-X", "fetch", "-c", "fast", "-z")
    assert (out / "base.tar.gz").stat().st_size > 1_000_000


def test_wal_is_received(replicated: tuple[Cluster, RunningProxy], tmp_path: Path) -> None:
    cluster, proxy = replicated
    receiving = subprocess.Popen([str(cluster.bin_dir / "pg_receivewal"), "-h", "127.0.0.1", "-p", str(proxy.port), "-U", "postgres",
                                  "-D", str(tmp_path), "--synchronous"], stderr=subprocess.PIPE)  # fmt: skip
    try:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            _until(c, "SELECT 1 FROM pg_stat_replication WHERE application_name = 'pg_receivewal' AND state = 'streaming'")
            c.execute("CREATE TABLE wal (n int)")  # past the start of a segment, which counts to the one before
            row = c.execute("SELECT pg_walfile_name(pg_current_wal_insert_lsn())").fetchone()
            assert row is not None
            c.execute("INSERT INTO wal VALUES (1); SELECT pg_switch_wal()")
            deadline = time.monotonic() + PATIENCE
            while not (tmp_path / row[0]).exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        receiving.terminate()
        receiving.communicate(timeout=PATIENCE)
    assert (tmp_path / row[0]).read_bytes() == (cluster.data_dir / "pg_wal" / row[0]).read_bytes()


def test_changes_are_received(replicated: tuple[Cluster, RunningProxy], tmp_path: Path) -> None:
    cluster, proxy = replicated
    uri = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"
    out = tmp_path / "changes"
    with psycopg.connect(cluster.dsn(), autocommit=True) as c:
        c.execute("CREATE TABLE changed (n int, v text); CREATE PUBLICATION p FOR TABLE changed")
    run(cluster, "pg_recvlogical", "-d", uri, "--slot", "s", "--create-slot", "-P", "pgoutput")
    receiving = subprocess.Popen([str(cluster.bin_dir / "pg_recvlogical"), "-d", uri, "--slot", "s", "--start", "-f", str(out), "-s", "0", "-F", "0", "-o", "proto_version=1", "-o", "publication_names=p"],
                                 stderr=subprocess.PIPE)  # fmt: skip
    try:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            _until(c, "SELECT 1 FROM pg_replication_slots WHERE slot_name = 's' AND active")
            c.execute("INSERT INTO changed SELECT n, repeat('y', 1000) FROM generate_series(1, 3000) n")
            c.execute("INSERT INTO changed VALUES (0, 'the end: df.start(''a'' ~> ''b'')')")
            deadline = time.monotonic() + PATIENCE
            while not (out.exists() and b"the end" in out.read_bytes()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        receiving.terminate()
        receiving.communicate(timeout=PATIENCE)
    found = re.findall(rb"t\0\0\0.(\d+)t\0\0\x03\xe8(y{1000})", out.read_bytes(), re.DOTALL)
    assert [int(n) for n, _ in found] == list(range(1, 3001))
    with psycopg.connect(cluster.dsn(), autocommit=True) as c:  # the server takes a moment to see that the receiver has gone
        _until(c, "SELECT 1 FROM pg_replication_slots WHERE slot_name = 's' AND NOT active")
    run(cluster, "pg_recvlogical", "-d", uri, "--slot", "s", "--drop-slot")


def _until(c: psycopg.Connection[Any], query: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while c.execute(query).fetchone() is None:  # type: ignore[arg-type]
        assert time.monotonic() < deadline, query
        time.sleep(0.02)
