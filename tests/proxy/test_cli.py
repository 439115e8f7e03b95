"""The command as a user calls it: exit statuses, one clear sentence for each mistake, and what init, uninstall, doctor do."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psycopg
import pytest
from psycopg import sql

from proxy.fastpath import COMPILED
from tests import command
from tests.fix_postgres import Database, free_port, running_cluster, versions

NOBODY = "postgresql://me@127.0.0.1:1/d"


def environment(home: Path, **settings: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DFPROXY_", "XDG_"))}
    return kept | {"HOME": str(home), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | settings


def call(home: Path, *arguments: str, timeout: float = 60, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = command.start([*arguments], environment(home, **settings), home, out, err)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, status, *(_text(f) for f in (out, err)))


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


class Running:
    """The command while it runs; what it says is in `said`. `real`: as `python -m proxy.cli`, not forked."""

    def __init__(self, home: Path, *arguments: str, ready: str = "ready on", real: bool = False, **settings: str) -> None:
        self.out, self.err = home / "out", home / "err"
        self.process: subprocess.Popen[bytes] | command.Command
        with self.out.open("w") as out, self.err.open("w") as err:
            if real:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "proxy.cli", *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    env=environment(home, **settings), cwd=home, start_new_session=True)
            else:
                self.process = command.start([*arguments], environment(home, **settings), home, out, err)
        deadline = time.monotonic() + 60
        while ready not in self.err.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()  # noqa: PT018
            time.sleep(0.02)

    @property
    def port(self) -> int:
        return int(self.err.read_text().split("dfproxy ready on ", 1)[1].splitlines()[0].rpartition(":")[2])

    @property
    def uri(self) -> str:
        """The connection string in the line that people copy."""
        return self.out.read_text().split('psql "', 1)[1].split('"', 1)[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status; what it said is shown where that is not 0."""
        self.process.send_signal(number)
        status = self.process.wait(30)
        if status:
            print(self.err.read_text(), file=sys.stderr)
        return status


@contextlib.contextmanager
def running(home: Path, *arguments: str, ready: str = "ready on", real: bool = False, **settings: str) -> Iterator[Running]:
    it = Running(home, *arguments, ready=ready, real=real, **settings)
    try:
        yield it
    finally:
        if it.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(it.process.pid, signal.SIGKILL)
            it.process.wait(10)


def one_sentence(done: subprocess.CompletedProcess[str], status: int) -> str:
    """What it said on stderr, which must be a single line and no traceback."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stderr.startswith("dfproxy: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# -- calling it --------------------------------------------------------------------------------------------


def test_version_and_help(tmp_path: Path) -> None:
    real = subprocess.run([sys.executable, "-m", "proxy.cli", "--version"], capture_output=True, text=True, check=True,
                          env=environment(tmp_path), cwd=tmp_path)
    assert real.stdout == call(tmp_path, "--version").stdout
    assert real.stdout.startswith("dfproxy 0.")
    text = call(tmp_path, "--help").stdout
    assert all(name in text for name in ("serve", "worker", "init", "uninstall", "doctor", "demo"))


def test_a_mistake_in_the_call_is_status_2(tmp_path: Path) -> None:
    assert call(tmp_path, "serve", "--nonsense").returncode == 2
    said = one_sentence(call(tmp_path, "serve", DFPROXY_LISTN="x"), 2)
    assert "unknown setting DFPROXY_LISTN in the environment; did you mean 'listen'?" in said
    assert "--set lese" in one_sentence(call(tmp_path, "serve", "--set", "lese=3"), 2)
    assert "must be a URI" in one_sentence(call(tmp_path, "init", "--upstream", "host=x"), 2)
    assert "can't be read as a URI" in one_sentence(call(tmp_path, "init", "--upstream", "postgresql://[h/x"), 2)


def test_commands_that_need_a_server_say_so(tmp_path: Path) -> None:
    for words in (["worker"], ["init"], ["doctor"], ["uninstall", "--yes"]):
        assert "no server named: give --upstream" in one_sentence(call(tmp_path, *words), 1)


# -- faults that a user can mend ---------------------------------------------------------------------------


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    for name in ("serve", "worker", "init", "doctor"):
        said = one_sentence(call(tmp_path, name, DFPROXY_UPSTREAM=NOBODY), 1)
        assert "can't reach PostgreSQL at me@127.0.0.1:1/d: Connection refused" in said


def test_a_wrong_password_is_named_and_not_shown(tmp_path: Path) -> None:
    with running_cluster(versions()[0], hba=["local all all trust", "host all all 127.0.0.1/32 scram-sha-256"]) as c:
        with psycopg.connect(f"postgresql://postgres@/postgres?host={c.socket_dir}&port={c.port}", autocommit=True) as s:
            s.execute("CREATE ROLE me LOGIN PASSWORD 'right'")
        for uri in (f"postgresql://me:wr0ng@127.0.0.1:{c.port}/postgres", f"postgresql://me@127.0.0.1:{c.port}/postgres"):
            said = one_sentence(call(tmp_path, "serve", DFPROXY_UPSTREAM=uri), 1)
            assert "me@127.0.0.1" in said
            assert "assword" in said
            assert "wr0ng" not in said


def test_a_database_that_is_not_there(tmp_path: Path, database18: Database) -> None:
    uri = database18.cluster.dsn(user=database18.owner, database="nowhere")
    assert 'database "nowhere" does not exist' in one_sentence(call(tmp_path, "init", DFPROXY_UPSTREAM=uri), 1)


def test_a_role_that_may_not_create(tmp_path: Path, database18: Database) -> None:
    with psycopg.connect(database18.superuser_dsn, autocommit=True) as c:
        c.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier("poor_" + database18.name)))
    uri = database18.dsn("poor_" + database18.name)
    said = one_sentence(call(tmp_path, "serve", DFPROXY_UPSTREAM=uri), 1)
    assert f"GRANT CREATE ON DATABASE {database18.name} TO poor_{database18.name}" in said


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_in_use(tmp_path: Path, database18: Database, processes: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = one_sentence(call(tmp_path, "serve", "--listen", address, "--processes", processes,
                                 DFPROXY_UPSTREAM=database18.dsn()), 1)
    assert f"can't listen on {address}: Address already in use" in said


# -- serve and worker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_what_a_person_needs_and_stops_when_asked(
        tmp_path: Path, database18: Database, number: signal.Signals) -> None:
    with running(tmp_path, "serve", "--listen", "127.0.0.1:0", DFPROXY_UPSTREAM=database18.dsn()) as it:
        with psycopg.connect(it.uri) as c:
            assert c.execute("SELECT df.version()").fetchone() is not None
        assert f":{it.port}/{database18.name}" in it.uri
        text = it.out.read_text()
        assert all(part in text for part in ("dfproxy 0.", f"PostgreSQL {database18.version}", "identity",
                                              "executor logins"))
        assert it.stop(number) == 0


def test_a_stop_does_not_wait_for_idle_clients_and_not_for_ever_for_busy_ones(
        tmp_path: Path, database18: Database) -> None:
    with running(tmp_path, "serve", "--listen", "127.0.0.1:0", "--set", "drain_timeout=1",
                 DFPROXY_UPSTREAM=database18.dsn()) as it:
        idle, busy = psycopg.connect(it.uri, autocommit=True), psycopg.connect(it.uri)
        busy.execute("SELECT 1")  # a transaction is open
        assert it.stop() == 0
        for c in (idle, busy):
            with pytest.raises(psycopg.OperationalError):
                c.execute("SELECT 1")
            c.close()


def test_without_an_engine_nothing_is_installed(tmp_path: Path, database18: Database) -> None:
    with running(tmp_path, "serve", "--no-engine", "--listen", "127.0.0.1:0", DFPROXY_UPSTREAM=database18.dsn()) as it:
        with psycopg.connect(it.uri) as c:
            assert c.execute("SELECT to_regnamespace('df')").fetchone() == (None,)
        assert it.stop() == 0


def test_a_worker_alone_serves_direct_connections(tmp_path: Path, database18: Database) -> None:
    with running(tmp_path, "worker", ready="worker ready", DFPROXY_UPSTREAM=database18.dsn()) as it:
        with psycopg.connect(database18.dsn(), autocommit=True) as c:
            row = c.execute("SELECT df.start(df.seq('SELECT 1', 'SELECT 2'))").fetchone()
            assert c.execute("SELECT df.await_instance(%s, 30)", row).fetchone() == ("completed",)
        assert it.stop() == 0


def test_no_password_in_arguments_or_logs(tmp_path: Path) -> None:
    secret = "correct-horse-battery"
    with running_cluster(versions()[0], hba=["local all all trust", "host all all 127.0.0.1/32 scram-sha-256"]) as c:
        local = f"postgresql://postgres@/postgres?host={c.socket_dir}&port={c.port}"
        with psycopg.connect(local, autocommit=True) as s:
            s.execute(f"CREATE ROLE me LOGIN CREATEROLE PASSWORD '{secret}'")
            s.execute("CREATE DATABASE mine OWNER me")
        uri = f"postgresql://me:{secret}@127.0.0.1:{c.port}/mine"
        with running(tmp_path, "serve", "--listen", "127.0.0.1:0", "--processes", "2", "--log-level", "debug",
                     real=True, DFPROXY_UPSTREAM=uri) as it:
            family = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            assert "proxy.supervisor" in family
            assert secret not in family
            assert it.stop() == 0
            assert secret not in it.out.read_text() + it.err.read_text()
        flagged = call(tmp_path, "init", "--upstream", uri)
        assert flagged.returncode == 0
        assert "can be seen by every user" in flagged.stderr
        assert secret not in flagged.stdout + flagged.stderr


# -- several processes -------------------------------------------------------------------------------------


def children(pid: int) -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return {int(word) for word in found.split()}


def wait_until(condition: object, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def gone(pids: set[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return not any(alive(pid) for pid in pids)


def test_processes_share_a_port_and_are_replaced(tmp_path: Path, database18: Database) -> None:
    with running(tmp_path, "serve", "--listen", "127.0.0.1:0", "--processes", "2", "--set", "lease=2",
                 DFPROXY_UPSTREAM=database18.dsn()) as it:
        first = children(it.process.pid)
        assert len(first) == 2
        victim = min(first)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(children(it.process.pid) - first) == 1, "no process in the place of the killed one")

        def works() -> bool:
            try:
                with psycopg.connect(it.uri, autocommit=True, connect_timeout=5) as c:
                    row = c.execute("SELECT df.start('SELECT 1')").fetchone()
                    return c.execute("SELECT df.await_instance(%s, 30)", row).fetchone() == ("completed",)
            except psycopg.OperationalError:
                return False  # it may still be starting

        wait_until(works, "workflows do not run")
        family = children(it.process.pid)
        assert it.stop() == 0
        assert gone(family)


def test_processes_end_with_their_parent(tmp_path: Path, database18: Database) -> None:
    with running(tmp_path, "serve", "--listen", "127.0.0.1:0", "--processes", "2",
                 DFPROXY_UPSTREAM=database18.dsn()) as it:
        family = children(it.process.pid)
        assert len(family) == 2
        os.kill(it.process.pid, signal.SIGKILL)
        it.process.wait(10)
        wait_until(lambda: gone(family), "processes outlive their parent")


# -- init, uninstall, doctor -------------------------------------------------------------------------------


def test_init_grants_and_uninstall_removes(tmp_path: Path, database_ends: Database) -> None:
    database = database_ends
    role = "app_" + database.name
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c:
        c.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        c.execute(sql.SQL("GRANT {} TO {} WITH ADMIN OPTION").format(sql.Identifier(role), sql.Identifier(database.owner)))
    for _ in range(2):
        done = call(tmp_path, "init", "--grant", role, DFPROXY_UPSTREAM=database.dsn())
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{role} may use df.*" in done.stdout
    with psycopg.connect(database.dsn(role), autocommit=True) as c:
        assert c.execute("SELECT length(df.start('SELECT 1'))").fetchone() == (8,)

    said = one_sentence(call(tmp_path, "uninstall", DFPROXY_UPSTREAM=database.dsn()), 2)
    assert "give --yes" in said
    said = one_sentence(call(tmp_path, "uninstall", "--yes", DFPROXY_UPSTREAM=database.dsn()), 1)
    assert "1 workflow" in said
    assert "force" in said
    assert call(tmp_path, "uninstall", "--yes", "--force", DFPROXY_UPSTREAM=database.dsn()).returncode == 0
    with psycopg.connect(database.dsn()) as c:
        assert c.execute("SELECT to_regnamespace('df'), to_regnamespace('duroxide')").fetchone() == (None, None)
        assert c.execute("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'dfx%%' AND pg_has_role(oid, %s, 'MEMBER')",
                         (role,)).fetchone() == (0,)


def test_doctor_from_an_empty_database_to_a_served_one(tmp_path: Path, database18: Database) -> None:
    uri = database18.dsn()
    sick = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri)
    assert sick.returncode == 1
    assert "not installed" in sick.stdout
    assert "dfproxy init" in sick.stdout
    assert call(tmp_path, "init", DFPROXY_UPSTREAM=uri).returncode == 0
    idle = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri)
    assert (idle.returncode, "none alive" in idle.stdout) == (1, True)
    assert ("compiled" if COMPILED else "not built") in idle.stdout
    off = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri, DFPROXY_FASTPATH="off")
    assert "switched off" in off.stdout
    with running(tmp_path, "worker", ready="worker ready", DFPROXY_UPSTREAM=uri):
        wait_until(lambda: call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri).returncode == 0,
                   "doctor still finds something with a worker there")


def test_doctor_finds_and_init_mends_executor_logins(tmp_path: Path, database_ends: Database) -> None:
    database = database_ends
    role = "app_" + database.name
    uri = database.dsn()
    with psycopg.connect(database.superuser_dsn, autocommit=True) as c, \
            running(tmp_path, "worker", ready="worker ready", DFPROXY_UPSTREAM=uri):
        c.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        c.execute(sql.SQL("GRANT {} TO {} WITH ADMIN OPTION").format(sql.Identifier(role), sql.Identifier(database.owner)))
        assert call(tmp_path, "init", "--grant", role, DFPROXY_UPSTREAM=uri).returncode == 0
        healthy = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri)
        assert healthy.returncode == 0, healthy.stdout
        executor = c.execute("SELECT executor::text FROM duroxide.executors").fetchone()
        assert executor is not None

        c.execute(f"REVOKE {role} FROM {executor[0]}" if database.version < 16
                  else f"REVOKE {role} FROM {executor[0]} GRANTED BY {database.owner}")
        sick = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri)
        assert (sick.returncode, f"is no member of {role}" in sick.stdout) == (1, True), sick.stdout
        mended = call(tmp_path, "init", DFPROXY_UPSTREAM=uri)
        assert (mended.returncode, "anew" in mended.stdout) == (0, True), mended.stdout
        healthy = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri)
        assert healthy.returncode == 0, healthy.stdout


def test_doctor_names_a_superuser(tmp_path: Path, database18: Database) -> None:
    sick = call(tmp_path, "doctor", DFPROXY_UPSTREAM=database18.superuser_dsn)
    assert (sick.returncode, "is a superuser" in sick.stdout) == (1, True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may read."""
    with tempfile.TemporaryDirectory(prefix="dfproxy-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin") is None,
                    reason="PgBouncer is not installed on this machine")
@pytest.mark.parametrize(("mode", "level"), [("transaction", "problem"), ("session", "note")])
def test_doctor_sees_a_pooler(tmp_path: Path, open_folder: Path, database18: Database, mode: str, level: str) -> None:
    program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert program is not None
    port = free_port()
    # PgBouncer refuses root, too; pytest's folder is closed to other users.
    user = "nobody" if os.geteuid() == 0 else None
    folder = open_folder
    (folder / "ini").write_text(f"""
[databases]
* = host=127.0.0.1 port={database18.cluster.port} user={database18.owner}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
ignore_startup_parameters = extra_float_digits,options
""")
    uri = f"postgresql://{database18.owner}@127.0.0.1:{port}/{database18.name}"
    with (folder / "log").open("w") as log, \
            subprocess.Popen([program, str(folder / "ini")], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                             user=user) as bouncer:
        try:
            def answers() -> bool:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    return True
                return False

            wait_until(answers, (folder / "log").read_text())
            table = call(tmp_path, "doctor", DFPROXY_UPSTREAM=uri).stdout
            line = next(line for line in table.splitlines() if "pooler" in line)
            assert level in line, table
            assert f"{mode} mode" in line, table
        finally:
            bouncer.terminate()
            bouncer.wait(10)


# -- several databases -------------------------------------------------------------------------------------


def test_two_databases_share_executor_logins(tmp_path: Path, database18: Database) -> None:
    """Roles belong to the server: both databases' workers must agree on the password of a role's executor."""
    role, other = "app_" + database18.name, database18.name + "_b"
    with psycopg.connect(database18.superuser_dsn, autocommit=True) as c:
        names = {"role": sql.Identifier(role), "owner": sql.Identifier(database18.owner), "db": sql.Identifier(other)}
        c.execute(sql.SQL("CREATE ROLE {role} LOGIN").format(**names))
        c.execute(sql.SQL("GRANT {role} TO {owner} WITH ADMIN OPTION").format(**names))
        c.execute(sql.SQL("CREATE DATABASE {db} OWNER {owner}").format(**names))
        c.execute(sql.SQL("GRANT CREATE ON DATABASE {db} TO {role}").format(**names))
        try:
            both = {"DFPROXY_UPSTREAM": database18.dsn(), "DFPROXY_DATABASES": other}
            done = call(tmp_path, "init", "--grant", role, **both)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("may use df.*") == 2
            with running(tmp_path, "serve", "--listen", "127.0.0.1:0", **both) as it:
                for name in (database18.name, other):
                    with psycopg.connect(f"postgresql://{role}@127.0.0.1:{it.port}/{name}", autocommit=True) as s:
                        row = s.execute("SELECT df.start('SELECT current_database() AS db, current_user AS me')").fetchone()
                        assert s.execute("SELECT df.await_instance(%s, 30)", row).fetchone() == ("completed",)
                        result = s.execute("SELECT df.result(%s)", row).fetchone()
                        assert result is not None
                        assert f'"db": "{name}"' in result[0].replace('":"', '": "')
                        assert f'"me": "{role}"' in result[0].replace('":"', '": "')
                checked = call(tmp_path, "doctor", **both)
                assert checked.returncode == 0, checked.stdout
                assert it.stop() == 0
                assert "password" not in it.err.read_text()
        finally:
            c.execute(sql.SQL("DROP DATABASE {db} WITH (FORCE)").format(**names))
