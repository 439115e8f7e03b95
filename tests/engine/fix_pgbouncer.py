"""A PgBouncer in transaction mode before a test server, where its binary is there."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from proxy.embedded import SYSTEM_USER
from tests.engine.helpers import Through
from tests.fix_postgres import Database, free_port

#: Debian puts it where only root's PATH leads.
BINARY = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
needs_pgbouncer = pytest.mark.skipif(BINARY is None, reason="needs PgBouncer (Debian's package pgbouncer): no binary named pgbouncer")

#: Every transaction gets the server connection that has been idle longest: what one leaves behind, others find.
CONFIG = """
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
pool_mode = transaction
auth_type = trust
auth_user = postgres
default_pool_size = {size}
server_round_robin = 1
logfile = {folder}/log
server_check_query = SELECT 1
"""


@contextlib.contextmanager
def behind_pgbouncer(database: Database, *, size: int = 3) -> Iterator[Through]:
    """Runs a PgBouncer of its own before the database's server. `size`: server connections per role and database."""
    assert BINARY is not None
    folder = Path(tempfile.mkdtemp(prefix="dfproxy-bouncer-"))
    folder.chmod(0o755)
    port = free_port()
    config = folder / "pgbouncer.ini"
    config.write_text(CONFIG.format(server=database.cluster.port, port=port, size=size, folder=folder))
    drop = {}
    if os.geteuid() == 0:  # it refuses to run as root
        entry = pwd.getpwnam(SYSTEM_USER)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        drop = {"user": SYSTEM_USER, "group": entry.pw_gid, "extra_groups": []}
    process = subprocess.Popen([BINARY, "-q", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **drop)
    try:
        behind = Through.of(database, port)
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(behind.dsn()).close()
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise AssertionError((folder / "log").read_text()) from None
                time.sleep(0.02)
        yield behind
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["behind_pgbouncer", "needs_pgbouncer"]
