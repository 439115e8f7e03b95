"""docs/http.md: its SQL runs, its settings are those that there are."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import psycopg

from dsl.compiler import compile_sql
from engine.http.policy import MIB, HttpPolicy
from proxy.settings import Settings
from tests.engine.helpers import until
from tests.engine.test_http_steps import make_key, scene
from tests.fix_postgres import Database

PAGE = (Path(__file__).parent.parent.parent / "docs" / "http.md").read_text()


async def test_every_block_runs(database18: Database) -> None:
    async with scene(database18, secret="s") as (server, c, worker):
        await make_key(database18, "s")
        app = f"app_{database18.name}"
        c.execute(f"CREATE ROLE {app} LOGIN")
        try:
            for block in re.findall(r"^```sql\n(.*?)^```", PAGE, re.M | re.S):
                for text in filter(str.strip, re.split(r";\s*\n", block)):
                    statement = text.replace("https://api.example.com", server.url("")).replace("'app'", f"'{app}'")
                    compiled = compile_sql(statement, standard_conforming_strings=True)
                    await asyncio.to_thread(c.execute, compiled.sql if compiled else statement)
                    worker.wake()
                    await until(lambda: c.one("SELECT count(*) FROM duroxide.queue") == 0)
            assert c.rows("SELECT status, label FROM df.instances ORDER BY created_at") == [
                ("completed", "price"), ("completed", "report"), ("completed", "with a secret")]
            assert c.one("SELECT body->>'body' FROM prices") == '{"sku": "a/1"}'
            assert server.requests[0].target == "/echo?sku=a%2F1"
            assert server.requests[-1].headers["authorization"] == "Bearer sk-123"
        finally:
            with psycopg.connect(database18.superuser_dsn, autocommit=True) as admin:
                oid = admin.execute("SELECT oid FROM pg_roles WHERE rolname = %s", (app,)).fetchone()
                assert oid is not None
                for role in (f"dfx_{oid[0]}", app):
                    if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone():
                        admin.execute(f"DROP OWNED BY {role} CASCADE")  # type: ignore[arg-type]
                        admin.execute(f"DROP ROLE {role}")  # type: ignore[arg-type]


def test_the_settings_of_the_page_are_those_there_are() -> None:
    documented = set(re.findall(r"`(http_[a-z_]+)`", PAGE.split("## Where calls may go")[1].split("\n\n")[1]))
    assert documented == {name for name in Settings.model_fields if name.startswith("http_")}
    ours, theirs = HttpPolicy(), Settings()
    assert (ours.max_request_bytes, ours.max_response_bytes) == (10 * MIB, 10 * MIB)
    for name in ("enabled", "allow_plain", "max_request_bytes", "max_response_bytes", "max_timeout", "max_parallel",
                 "max_parallel_per_host", "ca_file"):
        assert getattr(ours, name) == getattr(theirs, "http_" + name)
