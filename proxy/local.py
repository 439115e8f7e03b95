"""The embedded PostgreSQL of `dfproxy serve` without `--upstream`, and of `dfproxy demo`.

A folder holds the cluster (`pg18/`), the passwords (`credentials.json`, the owner's alone) and a lock. Three roles: the
superuser, which only set-up uses; `dfproxy`, the service role, as little as a managed server would give it; and `app`,
whose database the newcomer works in. pgvector, which only a superuser can install, is there already. The server listens
on a Unix-domain socket and asks everybody for a password: whoever reaches the proxy's port is not let in by that alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import quote

import asyncpg
import platformdirs
import structlog

from proxy.embedded import DEFAULT_VERSION, SUPERUSER, Cluster, EmbeddedError, bin_dir

SERVICE_ROLE = "dfproxy"
APP_ROLE = "app"
DATABASE = "app"

log = structlog.get_logger("dfproxy.embedded")


def default_folder() -> Path:
    """Where the embedded server keeps its data unless `data_dir` says otherwise."""
    return Path(platformdirs.user_data_dir("dfproxy", appauthor=False))


class LocalServer:
    """The embedded server of one folder: locked, started, set up, watched and stopped.

    Blocking calls run in threads; a process that was killed leaves nothing that the next start does not mend.
    """

    def __init__(self, folder: Path, version: int = DEFAULT_VERSION) -> None:
        self.folder = folder
        self.version = version
        self._lock: IO[str] | None = None
        self._passwords: dict[str, str] = {}
        self.cluster = Cluster(folder / f"pg{version}", bin_dir(version), hba=("local all all scram-sha-256",))

    # -- life ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Locks the folder, starts the server (or finds it running) and makes roles and database where missing.

        Raises EmbeddedError, with a sentence for the user.
        """
        await asyncio.to_thread(self._open)
        await asyncio.to_thread(self._start)
        await self._set_up()

    async def stop(self) -> None:
        """Stops the server and gives the folder free; nothing if it is not ours (`start` failed)."""
        if self._lock is None:
            return
        await asyncio.to_thread(self.cluster.stop)
        self._unlock()

    async def watch(self) -> None:
        """Starts the server again whenever it is gone (somebody killed it); returns only by cancellation."""
        while True:
            await asyncio.sleep(0.5)
            if self.cluster.pid() is None:
                log.error("embedded PostgreSQL is gone; starting it again")
                try:
                    await asyncio.to_thread(self._start)
                except EmbeddedError as e:
                    log.error("embedded PostgreSQL does not start", error=str(e))
                    await asyncio.sleep(5)

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a+")
        except OSError as e:
            raise EmbeddedError(f"can't use the data folder {self.folder}: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "?"
            self._unlock()
            raise EmbeddedError(
                f"another dfproxy (process {holder}) uses the data folder {self.folder}: stop it, or give --data-dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._passwords = _credentials(self.folder / "credentials.json")
        self.cluster.superuser_password = self._passwords[SUPERUSER]

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.cluster.start()
            except EmbeddedError:
                # Killed a moment ago, it may have children that still hold the shared memory.
                log_tail = _tail(self.cluster.data_dir / "server.log")
                if "shared memory block" not in log_tail or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    # -- what is in it ------------------------------------------------------------------------------------

    @property
    def upstream(self) -> str:
        """What dfproxy's own connections use: the service role, over the Unix-domain socket."""
        return self._dsn(SERVICE_ROLE)

    @property
    def superuser(self) -> str:
        return self._dsn(SUPERUSER)

    def app_uri(self, host: str, port: int) -> str:
        """The URI that the newcomer pastes: through the proxy at `host` and `port`."""
        host = f"[{host}]" if ":" in host else host
        return f"postgresql://{APP_ROLE}:{self._passwords[APP_ROLE]}@{host}:{port}/{DATABASE}"

    def _dsn(self, role: str, database: str = DATABASE) -> str:
        return (f"postgresql://{role}:{self._passwords[role]}@/{database}"
                f"?host={quote(str(self.cluster.socket_dir), safe='')}&port=5432")

    async def _set_up(self) -> None:
        connection = await _patiently(lambda: asyncpg.connect(self._dsn(SUPERUSER, "postgres"), timeout=30))
        try:
            for role, options in ((SERVICE_ROLE, "LOGIN NOSUPERUSER CREATEROLE"), (APP_ROLE, "LOGIN NOSUPERUSER")):
                if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role):
                    await connection.execute(f'CREATE ROLE "{role}" {options}')
                await connection.execute(await connection.fetchval(
                    "SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)", role, self._passwords[role]))
            if not await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", DATABASE):
                template = await asyncpg.connect(self._dsn(SUPERUSER, "template1"), timeout=30)
                try:
                    await template.execute("CREATE EXTENSION IF NOT EXISTS vector")
                finally:
                    await template.close()
                await connection.execute(f'CREATE DATABASE "{DATABASE}" OWNER "{APP_ROLE}"')
            await connection.execute(f'GRANT CREATE ON DATABASE "{DATABASE}" TO "{SERVICE_ROLE}"')
        finally:
            await connection.close()

    async def grant(self) -> None:
        """Lets `app` use df.* and gives it its executor login; the schemas must be there already."""
        connection = await asyncpg.connect(self.superuser, timeout=30)
        try:
            await connection.execute("SELECT df.grant_usage($1::text, true)", APP_ROLE)
        finally:
            await connection.close()


async def _patiently(connect: Callable[[], object], seconds: float = 60) -> asyncpg.Connection:
    """Connects to a server that may still be recovering from a crash."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await connect()  # type: ignore[misc]
        except (asyncpg.CannotConnectNowError, ConnectionError, FileNotFoundError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def _credentials(path: Path) -> dict[str, str]:
    """The passwords of the three roles: read, or made at the first start and kept, readable by the owner alone."""
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        kept = {}
    missing = {role: secrets.token_urlsafe(18) for role in (SUPERUSER, SERVICE_ROLE, APP_ROLE) if role not in kept}
    if missing:
        kept.update(missing)
        fresh = path.with_suffix(".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            json.dump(kept, f)
            f.flush()
            os.fsync(f.fileno())
        fresh.rename(path)
    return {role: str(kept[role]) for role in (SUPERUSER, SERVICE_ROLE, APP_ROLE)}


def _tail(path: Path, size: int = 4000) -> str:
    try:
        with path.open("rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - size))
            return f.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
