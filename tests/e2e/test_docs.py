"""What the documentation shows is what happens: every SQL block and every example runs, in the setting that the text gives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from proxy import demo
from proxy.settings import Settings
from tests.e2e.fix_dfproxy import Proxy
from tests.fix_postgres import running_cluster, versions

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.sql"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]
SECURITY = ROOT / "docs" / "security.md"
#: Pages whose blocks are run one after the other. A first line `-- fails: ...` or `-- warns: ...` says what is expected.
SESSIONS = [ROOT / "docs" / "guide.md", ROOT / "docs" / "reference.md"]
#: The last lines that an example prints.
ENDS = {
    "approval": ["completed", "approved"],
    "first-answer-wins": ["completed", "arrived"],
    "order-trigger": ["1|completed", "2|completed", "1|t|12.50", "2|t|99.00"],
    "process-documents": ["1000|3000"],
    "without-operators": ["1"],
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("--")).strip()


@dataclass
class Block:
    """A block of SQL in a page, what must be printed (None: anything), and what its first line says of it."""

    line: int
    sql: str
    prints: str | None
    fails: str | None
    warns: str | None


def session(page: Path) -> list[Block]:
    """The SQL blocks of a page, which are one session. A `text` block that follows one at once is what it prints."""
    text = page.read_text()
    found: list[Block] = []
    for match in re.finditer(r"^```sql\n(.*?)^```\n(?:\n*```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL):
        sql, prints = match.groups()
        said = dict(re.findall(r"\A-- (fails|warns): (.*)$", sql, re.MULTILINE))
        found.append(Block(text[: match.start()].count("\n") + 1, sql, prints, said.get("fails"), said.get("warns")))
    return found


class Production:
    """A server that was set up by the statements of docs/security.md, with a proxy in front of it."""

    def __init__(self, proxy: Proxy, bin_dir: Path) -> None:
        self.proxy = proxy
        self.bin_dir = bin_dir

    def play(self, blocks: list[Block], page: str, user: str = "app") -> None:
        """Runs the blocks of a page in one session, and compares what they print, their errors and their warnings."""
        cut = "@@@ next block"
        script = "".join(
            f"\\set ON_ERROR_STOP {'off' if b.fails else 'on'}\n{b.sql}\n\\echo {cut}\n\\warn {cut}\n" for b in blocks)
        done = subprocess.run([str(self.bin_dir / "psql"), "-X", "-At", "-q", self.proxy.dsn(user, "mydb")],
                              input=script, capture_output=True, text=True, timeout=120, check=False)
        printed, said = done.stdout.split(f"{cut}\n"), done.stderr.split(f"{cut}\n")
        for number, block in enumerate(blocks):
            where = f"{page}, line {block.line}"
            stderr = said[number]
            assert number + 1 < len(printed), f"{where}: {stderr}"
            if block.prints is not None:
                shown = [line.rstrip() for line in printed[number].splitlines()]
                assert shown == block.prints.splitlines(), f"{where}: {stderr}"
            assert ("ERROR:" in stderr, "WARNING:" in stderr) == (bool(block.fails), bool(block.warns)), f"{where}: {stderr}"
            assert (block.fails or block.warns or "") in stderr, f"{where}: {stderr}"
        assert done.returncode == 0

    def psql(self, script: str, user: str = "app") -> list[str]:
        """What psql prints, line by line; the script must not fail."""
        done = subprocess.run([str(self.bin_dir / "psql"), "-X", "-At", "-q", "-v", "ON_ERROR_STOP=1", self.proxy.dsn(user, "mydb")],
                              input=script, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr, done.stderr
        return [line.rstrip() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def server() -> Iterator[Production]:
    with running_cluster(versions()[0]) as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE app LOGIN")
            c.execute("CREATE DATABASE mydb OWNER app")
        with psycopg.connect(cluster.dsn(database="mydb"), autocommit=True) as c:
            for block in blocks(SECURITY, "sql"):
                c.execute(block)
        proxy = Proxy(cluster.dsn(user="dfproxy", database="mydb"))
        subprocess.run([sys.executable, "-m", "proxy.cli", "init", "--grant", "app"], check=True,
                       env=os.environ | {"DFPROXY_UPSTREAM": proxy.upstream})
        proxy.start()
        try:
            yield Production(proxy, cluster.bin_dir)
        finally:
            assert proxy.stop() == 0


@pytest.fixture
def production(server: Production) -> Production:
    """The server, with nothing left of an earlier example."""
    server.psql("SET client_min_messages = error; DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return server


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_examples(production: Production, example: Path) -> None:
    printed = production.psql(example.read_text())
    wanted = ENDS[example.stem]
    assert printed[-len(wanted):] == wanted


def test_the_workflow_of_the_readme_prints_what_the_readme_shows(production: Production) -> None:
    (workflow,) = blocks(ROOT / "README.md", "sql")
    (shown,) = blocks(ROOT / "README.md", "text")
    printed = "\n".join(production.psql(workflow)) + "\n"
    anonymous = re.compile("[0-9a-f]{8}(?= \\(process-documents)")
    assert anonymous.sub("-", printed) == anonymous.sub("-", shown)


def test_readme_example_and_demo_show_the_same_workflow() -> None:
    (workflow,) = blocks(ROOT / "README.md", "sql")
    example = without_comments((ROOT / "examples" / "process-documents.sql").read_text())
    assert workflow.strip() == example
    assert demo.WORKFLOW.strip() in example


def test_statements_of_the_operations_guide(production: Production) -> None:
    for block in blocks(ROOT / "docs" / "operations.md", "sql"):
        production.psql(block, user="dfproxy")


@pytest.mark.parametrize("page", SESSIONS, ids=lambda p: p.stem)
def test_pages_that_are_sessions(production: Production, page: Path) -> None:
    production.psql("SELECT df.grant_usage('app', include_http => true)", user="dfproxy")
    production.play(session(page), page.name)


def test_no_page_has_sql_that_no_test_runs() -> None:
    with_sql = {p.relative_to(ROOT).as_posix() for p in PAGES if blocks(p, "sql")}
    # docs/http.md: tests/engine/test_http_docs.py, beside a server that answers.
    elsewhere = {"README.md", "docs/http.md", "docs/operations.md", "docs/security.md"}
    assert with_sql == elsewhere | {p.relative_to(ROOT).as_posix() for p in SESSIONS}
    assert {p.stem for p in EXAMPLES} == set(ENDS)
    assert {p.name for p in EXAMPLES} == set(re.findall(r"\]\((\S+\.sql)\)", (ROOT / "examples/README.md").read_text()))


def test_the_settings_table_is_the_settings() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)

    def shown(value: object) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, float):
            return f"{value:g}"
        return "none" if value in (None, ()) else str(value)

    assert rows == [(name, shown(f.default), f.description) for name, f in Settings.model_fields.items()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
