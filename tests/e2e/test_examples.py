"""The workloads of examples/: each folder runs as its README says, prints what the README shows, and leaves the right data."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.e2e.fix_dfproxy import Through, running_proxy
from tests.fix_postgres import Cluster, fresh_database, versions

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WORKLOADS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    """The stand-in for the web services, as examples/api.py makes it, in a thread."""
    spec = importlib.util.spec_from_file_location("examples_api", EXAMPLES / "api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Api(0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def served(cluster18: Cluster, api: Any) -> Iterator[Through]:
    with fresh_database(cluster18, versions()[0]) as database, \
            running_proxy(database.dsn(), "--set", "http_allow=127.0.0.1/32") as proxy:
        yield Through(proxy, database)


@pytest.fixture
def superuser(served: Through) -> Iterator[psycopg.Connection[Any]]:
    """A superuser past the proxy. What one example made is gone before the next."""
    with psycopg.connect(served.database.superuser_dsn, autocommit=True) as c:
        c.execute("SET client_min_messages = error")
        c.execute("CREATE EXTENSION IF NOT EXISTS vector")
        yield c
        c.execute("DELETE FROM duroxide.instances")
        c.execute("DROP SCHEMA public CASCADE")
        c.execute("CREATE SCHEMA public AUTHORIZATION pg_database_owner")


def run(served: Through, api: Any, name: str) -> list[str]:
    """Runs the files that the README names, in a psql each; returns what those after setup.sql print."""
    folder = EXAMPLES / name
    readme = (folder / "README.md").read_text()
    (shell,) = re.findall(r"^```sh\n(.*?)^```", readme, re.M | re.S)
    files = re.findall(r"-f (\S+)", shell)
    assert files[0] == "setup.sql"
    assert set(files) == {path.name for path in folder.glob("*.sql")}
    printed: list[str] = []
    for file in files:
        done = subprocess.run(
            [str(served.database.cluster.bin_dir / "psql"), "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1",
             "-v", f"api=http://127.0.0.1:{api.server_port}", "-f", file, served.dsn],
            cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert not re.search("WARNING|ERROR", done.stderr), done.stderr
        printed = printed + done.stdout.splitlines() if file != "setup.sql" else []
    return printed


def shown(name: str) -> list[str]:
    """What the README says is printed."""
    (text,) = re.findall(r"^```text\n(.*?)^```", (EXAMPLES / name / "README.md").read_text(), re.M | re.S)
    return text.splitlines()


def rows(c: psycopg.Connection[Any], query: str) -> list[Any]:
    return c.execute(query).fetchall()


def test_embedding_pipeline(served: Through, api: Any, superuser: psycopg.Connection[Any]) -> None:
    assert run(served, api, "embedding-pipeline") == shown("embedding-pipeline")
    calls = [e for e in api.log if e["path"] == "/v1/embeddings"]
    assert [len(e["body"]["input"]) for e in calls] == [4, 4, 4, 4, 1, 1]
    # Only what has changed is sent when it runs again, and vectors are replaced.
    before = rows(superuser, "SELECT chunk_id, embedding::text FROM embeddings ORDER BY 1")
    superuser.execute("UPDATE documents SET body = replace(body, 'three minutes', 'a minute') WHERE title = 'Tea'")
    assert served.psql("-q", script=(EXAMPLES / "embedding-pipeline/workflow.sql").read_text()).stdout.splitlines() == ["completed", "17|17"]
    assert sum(len(e["body"]["input"]) for e in api.log[len(calls):]) == 1
    after = rows(superuser, "SELECT chunk_id, embedding::text FROM embeddings ORDER BY 1")
    assert len(after) == len(before) == 17
    assert sum(a != b for a, b in zip(after, before, strict=True)) == 1
    assert rows(superuser, "SELECT count(*) FROM chunks JOIN embeddings ON chunk_id = id WHERE of_text <> md5(content)") == [(0,)]


def test_ingest_pipeline(served: Through, api: Any, superuser: psycopg.Connection[Any]) -> None:
    printed = run(served, api, "ingest-pipeline")
    assert printed == shown("ingest-pipeline")
    assert rows(superuser, "SELECT order_id, customer, product, quantity, file FROM sales ORDER BY 1") == [
        (1001, "Ann", "kettle", 1, "sales-1.csv"), (1002, "O'Neill", "teapot", 3, "sales-1.csv"),
        (1003, "Zoë", "kettle", 1, "sales-1.csv"), (1006, "Ann", "cup", 6, "sales-1.csv"),
        (1007, "Zoë", "teapot", 1, "sales-2.csv"), (1008, "Bob", "cup", 12, "sales-2.csv")]
    assert [n for n, _ in rows(superuser, "TABLE customers ORDER BY name")] == ["Ann", "Bob", "O'Neill", "Zoë"]
    assert [str(p) for _, p, _ in rows(superuser, "TABLE products ORDER BY name")] == ["2.95", "24.90", "17.90"]
    assert rows(superuser, "SELECT (SELECT count(*) FROM staging), (SELECT count(*) FROM clean)") == [(0, 0)]


def test_maintenance_with_approval(served: Through, api: Any, superuser: psycopg.Connection[Any]) -> None:
    began = len(api.log)
    printed = run(served, api, "maintenance-with-approval")
    assert printed[-7:] == shown("maintenance-with-approval")
    asked = sorted(e["body"]["text"] for e in api.log[began:])
    assert asked == ['"Visits" has 3000 dead rows. VACUUM?', "events has 5000 dead rows. VACUUM?"]
    assert rows(superuser, "SELECT relname, vacuum_count FROM pg_stat_user_tables WHERE relname IN ('events', 'Visits') ORDER BY 1") == [
        ("Visits", 0), ("events", 1)]
    assert rows(superuser, "SELECT label, status FROM df.instances WHERE status NOT IN ('completed')") == [("look for bloat", "running")]


def test_fan_out_aggregation(served: Through, api: Any, superuser: psycopg.Connection[Any]) -> None:
    assert run(served, api, "fan-out-aggregation") == shown("fan-out-aggregation")
    assert rows(superuser, """
        SELECT region, orders, revenue FROM report EXCEPT SELECT region, count(*), sum(amount) FROM sales GROUP BY region""") == []
    assert rows(superuser, "SELECT sum(orders), sum(share) BETWEEN 99.5 AND 100.5 FROM report") == [(44, True)]
    assert rows(superuser, "SELECT count(*) FILTER (WHERE node_type = 'SQL'), count(*) FILTER (WHERE status <> 'completed') FROM df.nodes") == [(7, 0)]


def test_webhook_enrichment(served: Through, api: Any, superuser: psycopg.Connection[Any]) -> None:
    began = len(api.log)
    assert run(served, api, "webhook-enrichment") == shown("webhook-enrichment")
    calls = api.log[began:]
    looked_up = [e["path"].rpartition("/")[2] for e in calls if e["method"] == "GET"]
    assert {d: looked_up.count(d) for d in looked_up} == {
        "acme.example": 1, "busy-bees.example": 3, "nobody.example": 1, "down.example": 4, "sturm.example": 1}
    delivered = {e["body"]["email"]: e["body"]["company"]["name"] for e in calls if e["method"] == "POST"}
    assert delivered == {"ann@acme.example": "Acme Corporation", "o'neill@busy-bees.example": "Busy Bees Ltd",
                         "zoë@sturm.example": 'Sturm & Söhne "KG"'}
    keys = [e["idempotency_key"] for e in calls]
    assert None not in keys
    assert len(set(keys)) == len(keys) == 13
    assert rows(superuser, "SELECT count(*) FROM df.instances WHERE label = 'lead 6'") == [(0,)]


def test_every_folder_has_a_test_and_a_line_in_the_readme() -> None:
    assert WORKLOADS == ["embedding-pipeline", "fan-out-aggregation", "ingest-pipeline", "maintenance-with-approval", "webhook-enrichment"]
    readme = (EXAMPLES / "README.md").read_text()
    for name in WORKLOADS:
        assert f"[{name}]({name}/)" in readme
        assert f"test_{name.replace('-', '_')}" in globals()
