"""What every benchmark stands on: a server of its own, and the programs in between, each a process of its own.

The server has its default settings (fsync and synchronous_commit among them), but for room for connections and WAL, and
listens on TCP: clients, proxies and yardsticks reach it in the same way. Everything is below one temporary folder and
gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from proxy.embedded import Cluster, bin_dir

APP, SERVICE, PASSWORD, DATABASE = "app", "dfproxy", "bench", "app"
#: The name of the server itself, with nothing in between.
DIRECT = "direct"
#: Where Debian's package has it; it is not in everybody's PATH.
PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
NO_PGBOUNCER = "no pgbouncer on this machine (Debian and Ubuntu: apt-get install pgbouncer): there is no yardstick"

_READY = re.compile(r"dfproxy ready on \S+:(\d+)|dfproxy worker (ready)|listening on (\d+)")


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Program:
    """A process that is measured. `port` 0: it serves no clients."""

    name: str
    process: psutil.Process
    port: int = 0
    user: str = APP
    database: str = DATABASE

    @property
    def uri(self) -> str:
        """For clients, which log in as the application unless `user` says otherwise."""
        return f"postgresql://{self.user}:{PASSWORD}@127.0.0.1:{self.port}/{self.database}"

    def _family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds of CPU time that it and its children have used; 0 for the server, whose children come and go."""
        return 0.0 if self.name == DIRECT else sum(process_time(p.pid) for p in self._family())

    def outside(self) -> float:
        """Of that, the seconds that were spent outside of the kernel, in hundredths."""
        return 0.0 if self.name == DIRECT else float(sum(p.cpu_times().user for p in self._family()))

    def memory(self) -> int:
        """Bytes of memory that it and its children occupy."""
        return sum(p.memory_info().rss for p in self._family())


@dataclass
class Stage:
    """The server, and a folder for whatever else there is."""

    folder: Path
    cluster: Cluster
    version: str = ""
    _count: int = field(default=0, init=False)

    @property
    def port(self) -> int:
        assert self.cluster.port is not None
        return self.cluster.port

    def uri(self, user: str = APP, database: str = DATABASE, port: int | None = None) -> str:
        """The server itself."""
        return f"postgresql://{user}:{PASSWORD}@127.0.0.1:{port or self.port}/{database}"

    @property
    def direct(self) -> Program:
        """The server as if it were a program in between."""
        pid = self.cluster.pid()
        assert pid is not None
        return Program(DIRECT, psutil.Process(pid), self.port)

    def admin(self, database: str = DATABASE) -> psycopg.Connection[tuple[object, ...]]:
        """A session of the superuser, over the Unix-domain socket."""
        return psycopg.connect(
            f"postgresql://postgres@/{database}?host={self.cluster.socket_dir}&port={self.port}", autocommit=True)

    def accounts(self) -> None:
        """Makes the tables of pgbench's own scripts."""
        with psycopg.connect(self.uri(), autocommit=True) as c:
            if c.execute("SELECT to_regclass('pgbench_accounts')").fetchone() != (None,):
                return
        subprocess.run([str(self.cluster.bin_dir / "pgbench"), "-i", "-q", self.uri()], check=True,
                       capture_output=True)

    def pgbench(self, program: Program, *arguments: str, clients: int, transactions: int) -> Run:
        """One run of pgbench, so many transactions by each client; the program's CPU time is counted meanwhile."""
        before = program.cpu()
        out = subprocess.run(
            [str(self.cluster.bin_dir / "pgbench"), "-n", "-c", str(clients), "-j", str(min(clients, 2)),
             "-t", str(transactions), *arguments, program.uri], capture_output=True, text=True, check=True).stdout
        cpu = program.cpu() - before
        return Run(_said(r"tps = ([\d.]+)", out), round(_said(r"actually processed: (\d+)", out)), cpu,
                   _said(r"latency average = ([\d.]+) ms", out))

    def checkpoint(self) -> None:
        """Has what was written so far written out now, not while something else is measured."""
        with self.admin() as c:
            c.execute("CHECKPOINT")

    def grant(self, database: str = DATABASE) -> None:
        """Lets the application use df.*; dfproxy has installed its schemas."""
        with self.admin(database) as c:
            c.execute(f"SELECT df.grant_usage('{APP}', with_grant => true)")

    def server_cpu(self) -> float:
        """Seconds of CPU time that the server has used, in all its processes, those that have ended included."""
        process = psutil.Process(self.direct.process.pid)
        times = process.cpu_times()
        spent = sum(times[:4])  # its own, and its children's that it has seen end
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent += process_time(child.pid)
        return float(spent)

    # -- programs in between ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def program(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None,
                *, port: int = 0) -> Iterator[Program]:
        """A process that says on which port it listens, unless that is known; terminated at the end."""
        self._count += 1
        output = self.folder / f"{self._count}-{name.replace(' ', '-')}.log"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DFPROXY_"))}
        with output.open("wb") as f:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                       env=inherited | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}))
        try:
            said = _wait_ready(process, output, port)
            yield Program(name, psutil.Process(process.pid), port or said)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def dfproxy(self, name: str = "dfproxy", *arguments: str, command: str = "serve", database: str = DATABASE,
                upstream_port: int | None = None, **settings: object) -> Iterator[Program]:
        """`dfproxy serve` (or `worker`) in front of the server; settings as in dfproxy.toml."""
        environment = {f"DFPROXY_{k.upper()}": str(v) for k, v in settings.items()}
        environment["DFPROXY_UPSTREAM"] = self.uri(SERVICE, database, upstream_port)
        listen = ["--listen", "127.0.0.1:0"] if command == "serve" else []
        with self.program(name, [sys.executable, "-m", "proxy.cli", command, *listen, *arguments],
                          environment) as program:
            yield program

    @contextlib.contextmanager
    def echo(self, upstream_port: int | None = None) -> Iterator[Program]:
        """The relay of bench/echo.py in front of the server."""
        with self.program("echo relay", [sys.executable, "-m", "bench.echo", str(upstream_port or self.port)]) as p:
            yield p

    @contextlib.contextmanager
    def pgbouncer(self, name: str = "PgBouncer", **settings: object) -> Iterator[Program | None]:
        """PgBouncer in session mode in front of the server; None where it is not installed."""
        if PGBOUNCER is None:
            yield None
            return
        port = free_port()
        options: dict[str, object] = {
            "listen_addr": "127.0.0.1", "listen_port": port, "auth_type": "scram-sha-256", "pool_mode": "session",
            "auth_file": self.folder / "users.txt", "max_client_conn": 500, "default_pool_size": 200,
            "unix_socket_dir": "", "ignore_startup_parameters": "extra_float_digits", **settings}
        (self.folder / "users.txt").write_text(f'"{APP}" "{PASSWORD}"\n')
        config = self.folder / f"pgbouncer-{port}.ini"
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={self.port}\n[pgbouncer]\n"
            + "".join(f"{k} = {v}\n" for k, v in options.items()))
        # It refuses to run as root, as PostgreSQL does, and gives its rights up by itself when it is told to whom.
        user = ["-u", "pgserver"] if os.geteuid() == 0 else []
        for path in (config, self.folder / "users.txt"):
            path.chmod(0o644)
        with self.program(name, [PGBOUNCER, *user, str(config)], port=port) as program:
            yield program


@dataclass(frozen=True)
class Run:
    """What one run of pgbench found: transactions a second, their number, seconds of CPU in the program in between,
    and the mean latency in milliseconds."""

    tps: float
    transactions: int
    cpu: float
    latency: float

    @property
    def microseconds(self) -> float:
        """CPU time of the program in between for one transaction."""
        return self.cpu / self.transactions * 1e6

    def beyond(self, shorter: Run) -> float:
        """The same for those transactions that a shorter run did not have: without what both have done once."""
        return (self.cpu - shorter.cpu) / (self.transactions - shorter.transactions) * 1e6

    def rate_beyond(self, shorter: Run) -> float:
        """Transactions a second of those that a shorter run did not have."""
        more = self.transactions / self.tps - shorter.transactions / shorter.tps
        return (self.transactions - shorter.transactions) / more


def process_time(pid: int) -> float:
    """Seconds of CPU time of one process. Its clock is exact, what psutil reads comes in hundredths of a second."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid() of Linux
    except OSError:
        return float(sum(psutil.Process(pid).cpu_times()[:2]))


def _said(pattern: str, out: str) -> float:
    found = re.search(pattern, out)
    assert found is not None, out
    return float(found[1])


def _wait_ready(process: subprocess.Popen[bytes], output: Path, port: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if port:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return port
        elif found := _READY.search(output.read_text(errors="replace")):
            return int(found[1] or found[3] or 0)
        time.sleep(0.02)
    raise RuntimeError(f"{output.name} did not become ready:\n{output.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def stage(version: int = 18) -> Iterator[Stage]:
    """A server with the roles and the database that the benchmarks use. SIGTERM, too, stops all that was started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="dfproxy-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        cluster = Cluster(folder / "data", bin_dir(version), port=free_port(),
                          hba=("local all all trust", "host all all 127.0.0.1/32 scram-sha-256"),
                          settings={"max_connections": "300", "max_wal_size": "4GB"})
        cluster.start()
        try:
            made = Stage(folder, cluster)
            with made.admin("postgres") as c:
                c.execute(f"CREATE ROLE {SERVICE} LOGIN CREATEROLE PASSWORD '{PASSWORD}'")
                c.execute(f"CREATE ROLE {APP} LOGIN PASSWORD '{PASSWORD}'")
                made.version = str((c.execute("SHOW server_version").fetchone() or ("?",))[0])
            make_database(made, DATABASE)
            yield made
        finally:
            cluster.stop("immediate")


def make_database(stage: Stage, name: str) -> None:
    """A database of the application, in which dfproxy may install its schemas."""
    with stage.admin("postgres") as c:
        c.execute(f"CREATE DATABASE {name} OWNER {APP}")
        c.execute(f"GRANT CREATE ON DATABASE {name} TO {SERVICE}")
