"""psql's own features through the proxy, and clients that misbehave."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.e2e.fix_dfproxy import Through


def test_backslash_d_and_copy(through: Through, tmp_path: Path) -> None:
    through.psql(script="CREATE TABLE t (id int PRIMARY KEY, v text)")
    assert "id|integer||not null|" in through.psql("-c", r"\d t").stdout
    assert "t_pkey" in through.psql("-c", r"\di").stdout
    assert "duroxide" in through.psql("-c", r"\dn").stdout
    rows = tmp_path / "rows.csv"
    rows.write_text("".join(f"{n},value {n}\n" for n in range(20_000)))
    through.psql("-c", rf"\copy t FROM '{rows}' CSV")
    out = tmp_path / "out.csv"
    through.psql("-c", rf"\copy (SELECT * FROM t ORDER BY id) TO '{out}' CSV")
    assert out.read_text() == rows.read_text()


def test_on_error_rollback_keeps_the_transaction(through: Through) -> None:
    done = through.psql("-v", "ON_ERROR_ROLLBACK=on", script="""
        CREATE TABLE t (n int);
        BEGIN;
        INSERT INTO t VALUES (1);
        SELECT df.strat('SELECT 1');
        SELECT df.start('SELECT 1' ~> 'SELECT 2') IS NOT NULL;
        INSERT INTO t VALUES (2);
        COMMIT;
        SELECT count(*) FROM t;""", check=False)
    assert done.stdout.split()[-1] == "2"
    assert "df.strat" in done.stderr
    assert "^" in done.stderr, "psql points at the place"


def test_an_error_in_a_transaction_aborts_it_as_ever(through: Through) -> None:
    done = through.psql(script="""
        BEGIN;
        SELECT df.strat('SELECT 1');
        SELECT 1;
        COMMIT;""", check=False)
    assert "current transaction is aborted" in done.stderr


def test_watch(through18: Through) -> None:
    psql = subprocess.Popen([str(through18.database.cluster.bin_dir / "psql"), "-XAt", through18.dsn],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert psql.stdin is not None
        assert psql.stdout is not None
        psql.stdin.write("SELECT 'tick'\\watch 0.1\n")
        psql.stdin.flush()
        ticks = 0
        while ticks < 3:
            ticks += "tick" in psql.stdout.readline()
    finally:
        psql.kill()
        psql.communicate()


def test_control_c_cancels_the_statement(through: Through) -> None:
    psql = subprocess.Popen([str(through.database.cluster.bin_dir / "psql"), "-XAt", through.dsn],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert psql.stdin is not None
    psql.stdin.write("SELECT pg_sleep(60), df.status('00000000');\n")
    psql.stdin.flush()
    with psycopg.connect(through.database.dsn(), autocommit=True) as c:
        while c.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)%%' AND state = 'active'"
                        ).fetchone() == (0,):
            time.sleep(0.05)
    psql.send_signal(signal.SIGINT)
    assert "canceling statement due to user request" in psql.communicate(timeout=20)[1]


def test_a_pipeline_with_our_statements_and_an_error_in_it(through: Through) -> None:
    with through.connect() as c:
        with pytest.raises(psycopg.Error) as e, c.pipeline():
            c.execute("SELECT 1")
            c.execute("SELECT df.start(%s ~> 'SELECT 2')", ("SELECT 1",))
            c.execute("SELECT 1/0")
            c.execute("SELECT df.start('SELECT 3' ~> 'SELECT 4')")
        assert e.value.sqlstate == "22012"
        with c.pipeline():
            cursors = [c.execute("SELECT df.start(%s ~> 'SELECT 2')", (f"SELECT {n}",)) for n in range(20)]
            ids = [row[0] for cursor in cursors if (row := cursor.fetchone())]
        assert len(set(ids)) == 20


@pytest.mark.timeout(180)
def test_a_gigabyte_in_flat_memory(through18: Through) -> None:
    assert through18.proxy.process is not None
    proxy = psutil.Process(through18.proxy.process.pid)
    before = proxy.memory_info().rss
    peak = 0
    received = 0
    psql = subprocess.Popen(
        [str(through18.database.cluster.bin_dir / "psql"), "-XAt", "-c",
         r"\copy (SELECT repeat('x', 100000) FROM generate_series(1, 10000)) TO STDOUT", through18.dsn],
        stdout=subprocess.PIPE)
    assert psql.stdout is not None
    while chunk := psql.stdout.read(1 << 22):
        received += len(chunk)
        peak = max(peak, proxy.memory_info().rss)
    psql.stdout.close()
    assert psql.wait() == 0
    assert received == 10_000 * 100_001
    with through18.connect() as c, c.cursor() as cursor:  # one row that is a third of a gigabyte
        row = cursor.execute("SELECT repeat('x', 300000000)").fetchone()
        assert row is not None
        assert len(row[0]) == 300_000_000
    peak = max(peak, proxy.memory_info().rss)
    assert peak - before < 64 << 20, f"the proxy grew by {(peak - before) >> 20} MiB"


def test_garbage_ends_its_own_connection_only(through18: Through) -> None:
    chance = random.Random(7)
    with through18.connect() as good:
        for n in range(60):
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", through18.proxy.port), timeout=15) as s:
                match n % 6:
                    case 0:
                        s.sendall(chance.randbytes(chance.randint(1, 4000)))
                    case 1:
                        s.sendall(struct.pack("!I", 0xFFFFFFFF) + b"x" * 100)
                    case 2:
                        s.sendall(struct.pack("!II", 8, 0x00030000))
                    case 3:
                        s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    case 4:
                        s.sendall(b"\x16\x03\x01\x02\x00" + bytes(100))
                    case 5:
                        body = struct.pack("!I", 0x00030000) + b"user\0" + through18.database.owner.encode() + b"\0\0"
                        s.sendall(struct.pack("!I", len(body) + 4) + body)
                        time.sleep(0.02)
                        s.sendall(b"\x01\xff\xff\xff\xff garbage")
                while s.recv(65536):
                    pass
            assert good.execute("SELECT 1").fetchone() == (1,)
    assert through18.psql(script="SELECT 'next client'").stdout.strip() == "next client"


def test_the_client_vanishes_and_its_backend_goes_too(through18: Through) -> None:
    for _ in range(10):
        c = through18.connect()
        c.pgconn.finish()
    with psycopg.connect(through18.database.dsn(), autocommit=True) as direct:
        deadline = time.monotonic() + 10
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = ''"
        while direct.execute(count).fetchone() != (1,) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert direct.execute(count).fetchone() == (1,)
