"""HTTP steps of workflows on a real server and a real database: rights, delivery, references, secrets."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import signal as unix
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import sql as psql
from structlog.testing import capture_logs

import engine.worker
from engine.http.client import HttpClient
from engine.http.policy import HostList, HttpPolicy
from engine.http.secrets import ensure_key
from engine.settings import EngineSettings
from engine.worker import Worker
from tests.engine.fix_http_server import HttpServer, http_server
from tests.engine.helpers import Client, ended, install, running_worker, until
from tests.fix_postgres import Database

POLICY = HttpPolicy(allow=HostList.parse(["127.0.0.0/8", "::1"]))


PROGRAM = """
import asyncio, base64, pickle, sys
from engine.worker import Worker
asyncio.run(Worker(pickle.loads(base64.b64decode(sys.argv[1]))).run())
"""


@contextmanager
def worker_process(database: Database, **changes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, killed at the end."""
    settings = base64.b64encode(pickle.dumps(EngineSettings(dsn=database.dsn(), http=POLICY, **changes))).decode()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, settings], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def scene(database: Database, **changes: Any) -> AsyncIterator[tuple[HttpServer, Client, Worker]]:
    """An installed database with a worker, and a server that it may call."""
    await install(database)
    async with http_server() as server, running_worker(database, **{"http": POLICY, **changes}) as worker:
        with Client(database) as client:
            yield server, client, worker


def submit(client: Client, future: str, *parameters: object) -> str:
    """df.start of an SQL expression."""
    found: str = client.one(f"SELECT df.start({future})", *parameters)
    return found


async def result(client: Client, worker: Worker, future: str, *parameters: object) -> Any:
    """The output of a workflow that must complete."""
    instance = submit(client, future, *parameters)
    worker.wake()
    [(status, output)] = await ended(client, instance)
    assert status == "completed", output
    return json.loads(output or "null")


async def error(client: Client, worker: Worker, future: str, *parameters: object) -> str:
    """The error of a workflow that must fail."""
    instance = submit(client, future, *parameters)
    worker.wake()
    [(status, output)] = await ended(client, instance)
    assert status == "failed", output
    return output or ""


async def test_a_call_and_what_the_next_steps_make_of_it(database: Database) -> None:
    async with scene(database) as (server, c, worker):
        c.execute("CREATE TABLE log (status int, body jsonb)")
        found = await result(c, worker, """
            df.seq(df.seq(
                df."as"(%s::text, 'q'),
                df."as"(df.http(%s, 'post', '{"id":$q.id,"name":"$q.name"}', '{"X-Name":"$q.name","X-Label":"{sys_label}"}'), 'r')),
                'INSERT INTO log SELECT $r.status, ($r.body)::jsonb RETURNING status'), 'my label'""",
            """SELECT 7 AS id, E'a"b\\nc ü/&' AS name""", server.url("/echo?name=$q.name"))
        assert found == {"rows": [{"status": 200}], "row_count": 1}
        seen = server.requests[0]
        assert seen.target == "/echo?name=a%22b%0Ac%20%C3%BC%2F%26"
        assert json.loads(seen.body) == {"id": 7, "name": 'a"b\nc ü/&'}
        assert seen.headers["x-name"] == 'a"b c ü/&'
        assert seen.headers["x-label"] == "my label"
        assert seen.headers["content-type"] == "application/json"
        assert seen.headers["user-agent"].startswith("pg_durable/0.2.6 dfproxy/")
        assert c.one("SELECT body->>'method' FROM log") == "POST"
        # The template is what people see.
        assert "$q.name" in c.one("SELECT query FROM df.nodes WHERE node_type = 'HTTP'")


async def test_conditions_and_failures(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        branch = "df.if(df.http(%s, 'GET'), 'SELECT 1 AS n', 'SELECT 2 AS n')"
        assert (await result(c, worker, branch, server.url("/status/204")))["rows"] == [{"n": 1}]
        assert (await result(c, worker, branch, server.url("/status/404")))["rows"] == [{"n": 2}]
        text = await error(c, worker, "df.http(%s, 'GET')", server.url("/status/503?body=down&token=x"))
        assert text == f"HTTP GET {server.url('/status/503?body=***&token=***')} returned 503: down"
        assert c.rows("SELECT error->>'sqlstate' FROM duroxide.instances WHERE status = 'failed'") == [("HT503",)]
        text = await error(c, worker, "df.http(%s, 'GET', timeout_seconds => 1)", server.url("/hang"))
        assert text == f"HTTP timeout after 1s: {server.url('/hang')}"
        text = await error(c, worker, "df.seq(df.\"as\"('SELECT 1 AS a', 'q'), df.http(%s, 'GET'))", server.url("/$q.b"))
        assert text == "$q.b: result has no field 'b' (available: a)"
        text = await error(c, worker, "df.http('http://10.0.0.1/')")
        assert text.startswith("Blocked: the resolved IP address for '10.0.0.1' is in a restricted range.")
        assert c.one("SELECT error->>'sqlstate' FROM duroxide.instances WHERE output = %s", text) == "42501"


async def test_variables_make_urls_and_are_not_shown_in_their_paths(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        c.execute("SELECT df.setvar('base', %s), df.setvar('tenant', 'tenant-four')", server.url(""))
        found = await result(c, worker, "df.http('{base}/echo?t={tenant}&u={unknown}', 'GET')")
        assert json.loads(found["body"])["target"] == "/echo?t=tenant-four&u={unknown}"
        text = await error(c, worker, "df.http('{base}/close/../close?x={tenant}', 'GET')")
        assert text.startswith(f"HTTP request failed: {server.url('/close?x=***')} - ")
        text = await error(c, worker, "df.http('http://127.0.0.1:1/{tenant}/x', 'GET')")
        assert text == "HTTP connection failed: http://127.0.0.1:1/***/x - Connection refused"


async def test_binary_bodies_pass_into_multipart(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        content = bytes(range(256))
        await result(c, worker, """df.seq(df."as"(df.http(%s, 'GET'), 'file'),
            df.http_multipart(%s, 'PUT', '[{"name":"f","filename":"$file.status.bin","data_b64":"$file.body"},
                                           {"name":"none","data_b64":"$file.missing?"}]'))""",
                     server.url("/hex?type=image/png&hex=" + content.hex()), server.url("/echo"))
        put = server.requests[1]
        assert (put.method, put.path) == ("PUT", "/echo")
        assert b'filename="200.bin"\r\nContent-Type: application/octet-stream\r\n\r\n' + content + b"\r\n--" in put.body
        text = await error(c, worker, """df.http_multipart(%s, 'POST', '[{"name":"f","data_b64":"x{y}"}]')""", server.url("/echo"))
        assert text == "data_b64 for part 'f' mixes a variable reference with other text. Only a whole-value reference is supported"
        text = await error(c, worker, """df.http_multipart(%s, 'POST', '[{"name":"f"}]')""", server.url("/echo"))
        assert text.startswith("Invalid multipart HTTP config: part 1: data_b64 must be text")
        assert len(server.requests) == 2


async def test_hand_made_configs_fail_the_node_and_nothing_else(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        for config, start in {
            "not json": "Invalid HTTP config: query is not valid JSON", "[]": "Invalid HTTP config: query is not a JSON object",
            "{}": "Invalid HTTP config: url must be text", '{"url":1,"method":"GET"}': "Invalid HTTP config: url must be text",
            '{"url":"http://127.0.0.1:1","method":"TRACE"}': "Invalid HTTP method: TRACE.",
            '{"url":"http://127.0.0.1:1","method":"GET","headers":{"Host":"x"}}': "HTTP request failed: header 'Host' cannot be set",
            '{"url":"http://127.0.0.1:1","method":"GET","headers":[]}': "Invalid HTTP config: headers must be an object",
            '{"url":"http://127.0.0.1:1","method":"GET","timeout_seconds":0}': "Invalid HTTP config: timeout_seconds must be",
            '{"url":"http://127.0.0.1:1","method":"GET","timeout_seconds":true}': "Invalid HTTP config: timeout_seconds must be",
            '{"url":"http://127.0.0.1:1","method":"GET","timeout_seconds":NaN}': "Invalid HTTP config: query is not valid JSON: NaN",
            '{"url":"http://127.0.0.1:1","method":"GET","timeout_seconds":1e999999999999999999999}': "Invalid HTTP config: query is not",
            '{"url":"http://127.0.0.1:1/","method":"GET","timeout_seconds":1' + "0" * 400 + "}": "HTTP connection failed: ",
            # What no text of the database and no log can hold.
            '{"url":"http://127.0.0.1:1","method":"\\ud800\\u0000"}': "Invalid HTTP method: \ufffd\ufffd. Must be",
            '{"url":"x\\ud800://127.0.0.1:1","method":"GET"}': "Blocked: unsupported URL scheme 'x\ufffd'.",
            '{"url":"http://127.0.0.1:1/\\ud800","method":"GET"}': "HTTP request failed: the URL can't be used",
            '{"url":"http://127.0.0.1:1","method":"GET","headers":{"\\ud800":1}}': "HTTP request failed: header name '\ufffd' is not",
            "[" * 100_000: "Invalid HTTP config: query is not valid JSON",
        }.items():
            text = await error(c, worker, "json_build_object('node_type', 'HTTP', 'query', %s::text)::text", config)
            assert text.startswith(start)
        found = await result(c, worker, "json_build_object('node_type', 'HTTP', 'query', %s::text)::text",
                             json.dumps({"url": server.url("/echo"), "method": "get"}))
        assert found["status"] == 200
        assert worker.statistics.bugs == 0


async def test_answers_that_no_text_can_hold(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        # Not to record the answer would mean to call again, and again.
        text = await error(c, worker, "df.http(%s, 'GET')", server.url("/status/500?body=a%00b"))
        assert text == f"HTTP GET {server.url('/status/500?body=***')} returned 500: YQBi"
        instance = submit(c, "df.http(%s, 'GET')", server.url("/hex?type=text/plain&hex=610062"))
        worker.wake()
        await ended(c, instance)
        assert c.rows("SELECT r::jsonb->>'body', r::jsonb->>'encoding' FROM df.result(%s) r", instance) == [("YQBi", "base64")]
        assert len(server.requests) == 2


@contextmanager
def as_role(database: Database, name: str, *, http: bool) -> Iterator[Client]:
    """A client that logs in as a new role which may submit workflows."""
    with psycopg.connect(database.dsn(), autocommit=True) as owner:
        owner.execute(psql.SQL("CREATE ROLE {} LOGIN").format(psql.Identifier(name)))
    try:
        with psycopg.connect(database.dsn(), autocommit=True) as owner:
            owner.execute("SELECT df.grant_usage(%s, include_http => %s)", (name, http))
        with Client(database, user=name) as client:
            yield client
    finally:
        with psycopg.connect(database.superuser_dsn, autocommit=True) as admin:
            oid = admin.execute("SELECT oid FROM pg_roles WHERE rolname = %s", (name,)).fetchone()
            assert oid is not None
            for role in (f"dfx_{oid[0]}", name):
                admin.execute(psql.SQL("DROP OWNED BY {} CASCADE").format(psql.Identifier(role)))
                admin.execute(psql.SQL("DROP ROLE {}").format(psql.Identifier(role)))


@pytest.mark.parametrize("name", ["plain_caller", 'Mixed "Case" Caller'])
async def test_the_right_to_call_is_looked_up_when_the_step_runs(database18: Database, name: str) -> None:
    name = f"{name} {database18.name}"
    async with scene(database18) as (server, owner, worker):
        with as_role(database18, name, http=True) as c:
            assert (await result(c, worker, "df.http(%s, 'GET')", server.url("/echo")))["ok"] is True
            hand_made = "json_build_object('node_type', 'HTTP', 'query', %s::text)::text"
            config = json.dumps({"url": server.url("/echo"), "method": "GET"})
            quoted = psql.Identifier(name).as_string(None)
            # An instance that runs already: it waits, the right is taken away, it goes on.
            waiting = submit(c, "df.seq(df.wait_for_signal('go'), df.http(%s, 'GET'))", server.url("/echo"))
            worker.wake()
            await until(lambda: c.one("SELECT status FROM df.instances WHERE id = %s", waiting) == "running")
            owner.execute(f"REVOKE EXECUTE ON FUNCTION df.http(text,text,text,jsonb,integer) FROM {quoted}")
            c.execute("SELECT df.signal(%s, 'go', '{}')", waiting)
            worker.wake()
            [(status, output)] = await ended(c, waiting)
            message = (f"Blocked: role '{name}' does not have EXECUTE privilege on df.http(). Grant EXECUTE ON FUNCTION "
                       f"df.http(text,text,text,jsonb,integer) TO {quoted} to allow HTTP requests.")
            assert (status, output) == ("failed", message)
            assert await error(c, worker, hand_made, config) == message
            assert "permission denied for function http" in await error(c, worker, "%s::text", f"SELECT df.http('{server.url('/echo')}')")
            parts = json.dumps({"url": server.url("/echo"), "method": "POST", "parts": [{"name": "a", "data_b64": ""}]})
            multipart = "json_build_object('node_type', 'HTTP_MULTIPART', 'query', %s::text)::text"
            assert (await result(c, worker, multipart, parts))["ok"] is True
            owner.execute(f"REVOKE EXECUTE ON FUNCTION df.http_multipart(text,text,jsonb,jsonb,integer) FROM {quoted}")
            assert await error(c, worker, multipart, parts) == (
                f"Blocked: role '{name}' does not have EXECUTE privilege on df.http_multipart(). Grant EXECUTE ON FUNCTION "
                f"df.http_multipart(text,text,jsonb,jsonb,integer) TO {quoted} to allow multipart HTTP requests.")
            assert len(server.requests) == 2
            # The text says what to do, and doing it helps.
            owner.execute(message.split("Grant ", 1)[1].join(["GRANT ", ""]).rsplit(" to allow", 1)[0])
            assert (await result(c, worker, hand_made, config))["ok"] is True


async def test_the_right_is_looked_up_again_after_a_wait_for_a_place(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[HttpClient] = []

    class Watched(HttpClient):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            clients.append(self)

    monkeypatch.setattr(engine.worker, "HttpClient", Watched)
    policy = replace(POLICY, max_parallel_per_host=1)
    async with scene(database18, http=policy) as (server, owner, worker):
        with as_role(database18, f"waiter {database18.name}", http=True) as c, capture_logs() as logs:
            first = submit(owner, "df.http(%s, 'GET')", server.url("/gate"))
            worker.wake()
            await until(lambda: server.requests)
            second = submit(c, "df.http(%s, 'GET')", server.url("/gate?second"))
            worker.wake()
            await until(lambda: [queue.users for queue in clients[0]._hosts.values()] == [2])
            owner.execute(f'REVOKE EXECUTE ON FUNCTION df.http(text,text,text,jsonb,integer) FROM "waiter {database18.name}"')
            server.open.set()
            assert (await ended(owner, first))[0][0] == "completed"
            [(status, output)] = await ended(owner, second)
            assert (status, (output or "").partition(". ")[0]) == (
                "failed", f"Blocked: role 'waiter {database18.name}' does not have EXECUTE privilege on df.http()")
            assert len(server.requests) == 1
        # Refusals are logged: who, what, where to.
        [refused] = [e for e in logs if e["event"] == "HTTP call refused"]
        assert refused["role"] == f"waiter {database18.name}"
        assert refused["url"] == server.url("/gate?***")


async def test_keys_are_the_same_for_every_attempt_and_differ_otherwise(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        url = server.url("/echo")
        instance = submit(c, "df.join(df.loop(df.http(%s, 'GET'), %s), df.loop(df.loop(df.http(%s, 'GET'), %s), %s))",
                          url, "SELECT count(*) < 2 FROM duroxide.history WHERE node = 2 AND event = 'completed'",
                          url, "SELECT false", "SELECT false")
        worker.wake()
        assert (await ended(c, instance))[0][0] == "completed"
        nodes = {r[0] - 1: r[1] for r in c.rows("SELECT o, n->>'id' FROM duroxide.instances, jsonb_array_elements(graph) "
                                                "WITH ORDINALITY AS g(n, o) WHERE id = %s", instance)}
        keys = sorted(r.headers["idempotency-key"] for r in server.requests)
        assert keys == sorted([f"{instance}-{nodes[2]}-1:1", f"{instance}-{nodes[2]}-1:2", f"{instance}-{nodes[6]}-4:1.5:1"])
        await result(c, worker, "df.http(%s, 'GET', NULL, '{\"Idempotency-Key\": \"{sys_instance_id}/x\"}')", url)
        assert server.requests[-1].headers["idempotency-key"].endswith("/x")
        found = submit(c, "df.http(%s, 'GET')", url)
        worker.wake()
        await ended(c, found)
        assert server.requests[-1].headers["idempotency-key"] == f"{found}-{c.one('SELECT id FROM df.nodes WHERE instance_id = %s', found)}-1"


async def test_a_worker_killed_in_mid_call_is_followed_by_one_that_calls_again_with_the_same_key(database18: Database) -> None:
    await install(database18)
    async with http_server() as server:
        with Client(database18) as c:
            c.execute("CREATE TABLE done (n int)")
            instance = submit(c, "df.seq(df.http(%s, 'POST', '{\"n\":1}'), 'INSERT INTO done VALUES (1)')", server.url("/gate"))
            with worker_process(database18, lease=60.0) as process:
                await until(lambda: server.requests)
                assert c.history(instance) == [("", 1, "started", None)]
                os.kill(process.pid, unix.SIGKILL)
                process.wait()
                server.open.set()
            async with running_worker(database18, http=POLICY):
                [(status, _)] = await ended(c, instance)
            assert status == "completed"
            first, second = server.requests
            assert first == second
            assert first.headers["idempotency-key"].startswith(instance)
            assert c.rows("SELECT n FROM done") == [(1,)]
            assert [(r[1], r[2]) for r in c.history(instance)] == [(1, "completed"), (2, "completed")]


async def test_select_of_a_builder_is_that_step(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        c.execute("CREATE TABLE orders (id int, note text); INSERT INTO orders VALUES (1, 'it''s \"one\"'), (2, 'two')")
        body = "(SELECT json_agg(o ORDER BY id)::text FROM orders o)"
        found = await result(c, worker, "df.seq(df.\"as\"('SELECT 2 AS n', 'q'), df.\"as\"(%s, 'r')) ",
                             f"-- all orders\n select df.http('{server.url('/echo')}?n=$q.n', body => {body}) AS call;")
        assert list(found) == ["status", "body", "encoding", "headers", "ok", "duration_ms"]
        seen = server.requests[0]
        assert seen.target == "/echo?n=2"
        assert json.loads(seen.body) == [{"id": 1, "note": 'it\'s "one"'}, {"id": 2, "note": "two"}]
        # Its result is named, shown and tested like that of any HTTP step.
        found = await result(c, worker, "df.if(%s, 'SELECT 1 AS n', 'SELECT 2 AS n')",
                             f"SELECT df.http('{server.url('/status/404')}', 'GET')")
        assert found["rows"] == [{"n": 2}]
        found = await result(c, worker, "%s::text", f"""SELECT df.http_multipart('{server.url("/echo")}', 'POST',
            jsonb_build_array(jsonb_build_object('name', 'f', 'data_b64', encode('\\xff00', 'base64'))))""")
        assert b"\r\n\r\n\xff\x00\r\n" in server.requests[-1].body
        assert "returned 500" in await error(c, worker, "%s::text", f"SELECT df.http('{server.url('/status/500')}')")
        assert "Invalid HTTP method: X" in await error(c, worker, "%s::text", "SELECT df.http('http://h', 'X')")


async def test_what_a_select_asked_for_is_asked_for_again_after_a_crash(database18: Database) -> None:
    await install(database18)
    async with http_server() as server:
        with Client(database18) as c:
            c.execute("CREATE SEQUENCE s")
            instance = submit(c, "%s::text", f"SELECT df.http('{server.url('/gate')}', body => nextval('s')::text)")
            with worker_process(database18, lease=60.0) as process:
                await until(lambda: server.requests)
                os.kill(process.pid, unix.SIGKILL)
                process.wait()
                server.open.set()
            async with running_worker(database18, http=POLICY):
                assert (await ended(c, instance))[0][0] == "completed"
            assert [r.body for r in server.requests] == [b"1", b"1"]
            assert server.requests[0].headers == server.requests[1].headers
            assert c.one("SELECT last_value FROM s") == 1


NO_CALLS = [
    "SELECT note FROM letters", "SELECT (SELECT note FROM letters) AS http", "SELECT df.http('http://x.example', 'GET') FROM letters",
    "SELECT df.http('http://x.example', 'GET'), 1", "SELECT (df.http('http://x.example', 'GET'))",
    "SELECT df.http('http://x.example', 'GET') || ''", "SELECT df.http('http://x.example', 'GET') AS a LIMIT 1",
    "WITH x AS (SELECT 1) SELECT df.http('http://x.example', 'GET')", "SELECT 'SELECT df.http(''http://x.example'')'",
]


@pytest.mark.parametrize("query", NO_CALLS)
async def test_no_other_text_is_a_call(database18: Database, query: str) -> None:
    async with scene(database18) as (server, c, worker):
        future = json.dumps({"node_type": "HTTP", "query": json.dumps({"url": server.url("/echo"), "method": "GET"})})
        c.execute("CREATE TABLE letters (note text)")
        c.execute("INSERT INTO letters VALUES (%s)", future)
        found = await result(c, worker, "%s::text", query)
        assert found["row_count"] == 1
        assert server.connections == 0


async def test_losing_a_race_and_being_cancelled_aborts_the_call(database18: Database) -> None:
    async with scene(database18) as (server, c, worker):
        found = submit(c, "df.race(df.http(%s, 'GET', timeout_seconds => 300), df.wait_for_signal('stop'))", server.url("/hang"))
        worker.wake()
        await until(lambda: server.requests)
        c.execute("SELECT df.signal(%s, 'stop', '1')", found)
        worker.wake()
        [(status, output)] = await ended(c, found)
        assert (status, json.loads(output or "")["data"]) == ("completed", 1)
        await until(lambda: server.gone == 1)
        found = submit(c, "df.http(%s, 'GET', timeout_seconds => 300)", server.url("/slow-body"))
        worker.wake()
        await until(lambda: len(server.requests) == 2)
        c.execute("SELECT df.cancel(%s, 'enough')", found)
        worker.wake()
        await until(lambda: server.gone == 2)
        assert await ended(c, found) == [("cancelled", "canceled: enough")]


async def test_a_stopping_worker_finishes_or_gives_back(database18: Database) -> None:
    await install(database18)
    async with http_server() as server:
        with Client(database18) as c:
            found = submit(c, "df.http(%s, 'GET')", server.url("/gate"))
            async with running_worker(database18, http=POLICY) as worker:
                await until(lambda: server.requests)
                await worker.stop(0.05)
            assert c.rows("SELECT owner FROM duroxide.queue") == [(None,)]
            server.open.set()
            async with running_worker(database18, http=POLICY):
                assert (await ended(c, found))[0][0] == "completed"
            assert len({r.headers["idempotency-key"] for r in server.requests}) == 1


async def test_a_result_that_can_t_be_recorded_at_once_is_kept(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's sessions die while the call is on its way: the answer is recorded later, the call is not repeated."""
    async with scene(database18) as (server, c, worker):
        found = submit(c, "df.http(%s, 'GET')", server.url("/gate"))
        worker.wake()
        await until(lambda: server.requests)
        with psycopg.connect(database18.superuser_dsn, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                          "WHERE datname = current_database() AND application_name = 'dfproxy:control'")
        server.open.set()
        assert (await ended(c, found))[0][0] == "completed"
        assert len(server.requests) == 1


async def test_http_can_be_switched_off(database18: Database) -> None:
    async with scene(database18, http=HttpPolicy(enabled=False)) as (server, c, worker):
        text = await error(c, worker, "df.http(%s)", server.url("/echo"))
        assert text == "Blocked: outbound HTTP requests are disabled."
        assert server.connections == 0


# -- secrets -------------------------------------------------------------------------------------------------------

TOKEN = 'sk-"Geheim"/ü+' + "x" * 400


async def make_key(database: Database, secret: str | None) -> None:
    connection = await asyncpg.connect(database.dsn())
    try:
        await ensure_key(connection, secret)
    finally:
        await connection.close()


async def test_secret_variables(database: Database) -> None:
    async with scene(database, secret="s3cret") as (server, c, worker):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="there is no key yet to seal secret variables with"):
            c.execute("SELECT df.setvar('t', 'x', secret => true)")
        await make_key(database, "s3cret")
        assert c.one("SELECT df.setvar('token', %s, secret => true)", TOKEN) == "OK"
        c.execute("SELECT df.setvar('short', 'ä', true), df.setvar('empty', '', true), df.setvar('plain', 'p', secret => false)")
        assert c.one("SELECT df.getvar('token')") == "***"
        assert c.rows("SELECT name, value FROM df.vars ORDER BY name") == [
            ("empty", "***"), ("plain", "p"), ("short", "***"), ("token", "***")]
        body = '{"a":"{token}"}'.replace("{token}", "{short}{empty}{plain}")
        # A server that sends a secret back is beyond our power: this one does not.
        found = submit(c, "df.http(%s, 'POST', %s, '{\"Authorization\":\"Bearer {token}\"}'), '{token}'", server.url("/status/200"), body)
        worker.wake()
        assert (await ended(c, found))[0][0] == "completed"
        assert server.requests[0].headers["authorization"] == "Bearer " + TOKEN
        assert json.loads(server.requests[0].body) == {"a": "äp"}
        multipart = """df.http_multipart(%s, 'POST', '[{"name":"{short}","data_b64":"aGk="}]')"""
        assert (await result(c, worker, multipart, server.url("/echo")))["ok"]
        # In SQL they are refused, wherever they may stand.
        for future in ("'SELECT ''{token}''' ", "df.if('SELECT ''{token}'' = ''a''', 'SELECT 1', 'SELECT 2')",
                       "df.loop(df.break('{token}'))", "'SELECT df.http(''http://x.example/{token}'')'"):
            text = await error(c, worker, future)
            assert text.endswith("variable 'token' is secret: it can be used in the url, headers, body and parts of df.http "
                                 "and df.http_multipart, not in SQL")
        # Errors do not show them.
        text = await error(c, worker, "df.http(%s, 'POST', '{token}', '{\"A\":\"{token}\"}')", server.url("/body/../status/500?body={short}"))
        assert "ä" not in text
        text = await error(c, worker, "df.http('http://127.0.0.1:1/{token}')")
        assert "Geheim" not in text
        # Whoever reads everything that is stored does not read them.
        rows = c.rows("SELECT i::text FROM duroxide.instances i UNION ALL SELECT v::text FROM duroxide.vars v UNION ALL "
                      "SELECT h::text FROM duroxide.history h UNION ALL SELECT k::text FROM duroxide.secret_keys k")
        assert not [r for r in rows if "Geheim" in r[0] or "sk-" in r[0]]
        assert "{token}" in c.one("SELECT df.explain(%s)", found)
        # Overwritten by an ordinary value, it is an ordinary variable, by whatever way.
        c.execute("SELECT df.setvar('token', 'open')")
        c.execute("UPDATE df.vars SET value = 'open too' WHERE name = 'short'")
        assert (await result(c, worker, "'SELECT ''{token} {short}'' AS v'"))["rows"] == [{"v": "open open too"}]
        c.execute("SELECT df.setvar('token', 'again', true), df.setvar('token', 'and again', true)")
        found = await result(c, worker, "df.http(%s, 'POST', '{token}')", server.url("/echo"))
        assert json.loads(found["body"])["body"] == "and again"


async def test_secrets_leave_no_trace(database18: Database) -> None:
    """In errors, in the log, in what is stored: neither as they are, nor in part, nor in another spelling."""
    async with scene(database18, secret="s3cret") as (server, c, worker):
        await make_key(database18, "s3cret")
        hook = f"http://127.0.0.1:{server.port}/x/../status/500/../500?Key-Seven=Seventh&body=SEVENTH"
        for name, value in {"token": "Geheim-One", "hook": hook, "host": "SECOND-Host.invalid", "odd": "third?ok=en", "name": "fourth\n",
                            "dollar": "p$q.fifth$$w$q?", "short": "z6", "bell": "eleventh\a", "dsn": "pg://seventh:eighth@h/ninth?tenth"}.items():
            c.execute("SELECT df.setvar(%s, %s, secret => true)", name, value)
        with capture_logs() as logs:
            texts = [await error(c, worker, future, *parameters) for future, *parameters in (
                # The name of a part is quoted by an error.
                ("df.http_multipart(%s, 'POST', '[{\"name\":\"{token}{name}\",\"data_b64\":\"x{y}\"}]')", server.url("/echo")),
                ("df.http_multipart(%s, 'POST', '[{\"name\":\"{token}\",\"data_b64\":\"!\"}]')", server.url("/echo")),
                # All of the URL, and pieces of it. Libraries write URLs and hosts in their own way.
                ("df.http('{hook}')",), ("df.http('{odd}')",), ("df.http('{token}://x')",), ("df.http('http://{host}:1/')",),
                ("df.http('http://{host}:x/')",), ("df.http('http://127.0.0.1:1/{dsn}')",), ("df.http('http://127.0.0.1:1/{short}?{odd}')",),
                ("df.http('http://127.0.0.1:{token}/')",), ("df.http('http://{token}@127.0.0.1/')",), ("df.http('http://127.0.0.1/\\{token}')",),
                # A server that says what it was told, cut in the middle of it, or as bytes.
                ("df.http(%s)", server.url("/status/500?body=" + "x" * 505 + "{token}")), ("df.http(%s)", server.url("/status/500?body=%00{token}")),
                ("df.http(%s, headers => '{\"X-T\": \"{token}{bell}\"}')", server.url("/echo")),
                ("df.http(%s, body => '{token}')", server.url("/reset")), ("df.http(%s, body => '{token}', timeout_seconds => 1)", server.url("/hang?{token}")),
            )]
            # What looks like a reference in a secret is none: it would quote it, or send something else.
            found = await result(c, worker, "df.seq(df.\"as\"('SELECT 1 AS a', 'q'), df.http(%s, 'POST', '{dollar}{name}'))", server.url("/body"))
            assert found["body"] == "p$q.fifth$$w$q?fourth\n"
        assert worker.statistics.bugs == 0
        assert len([e for e in logs if e["event"] == "HTTP call"]) >= 8
        stored = c.rows("SELECT i::text FROM duroxide.instances i WHERE status <> 'completed' UNION ALL SELECT v::text FROM duroxide.vars v "
                        "UNION ALL SELECT h::text FROM duroxide.history h WHERE event <> 'completed'")
        everything = "\n".join([*texts, *map(str, logs), *(row[0] for row in stored)]).lower()
        for piece in ("geheim", "second-host", "third?", "ok=en", "fourth", "fifth", "z6", "seventh", "eighth", "ninth", "tenth", "eleventh", "R2VoZWlt".lower()):
            assert piece not in everything
        assert "HTTP POST *** returned 500: ***" in texts
        assert "Blocked: the URL that a secret variable makes can't be called." in texts


async def test_a_secret_opens_for_its_owner_under_its_name_only(database18: Database) -> None:
    async with scene(database18, secret="s3cret") as (server, owner, worker):
        await make_key(database18, "s3cret")
        owner.execute("SELECT df.setvar('token', 'for the owner', true)")
        sealed = owner.one("SELECT sealed FROM duroxide.vars")
        with as_role(database18, f"thief {database18.name}", http=True) as thief:
            thief.execute("INSERT INTO duroxide.vars (name, value) VALUES ('token', %s)", sealed)
            future = "df.http(%s, 'POST', '{token}')"
            assert await error(thief, worker, future, server.url("/echo")) == "secret variable 'token' can't be opened; set it again"
        owner.execute("SELECT df.setvar('other', %s)", sealed)
        assert await error(owner, worker, "df.http(%s, 'POST', '{other}')", server.url("/echo")) == (
            "secret variable 'other' can't be opened; set it again")
        flipped = sealed[:-1] + ("0" if sealed[-1] != "0" else "1")
        owner.execute("UPDATE duroxide.vars SET sealed = %s WHERE name = 'token'", flipped)
        assert "can't be opened" in await error(owner, worker, "df.http(%s, 'POST', '{token}')", server.url("/echo"))
        for odd in ("dfproxy-sealed:1:", "dfproxy-sealed:1:x:y:z", sealed + ":zz"):
            owner.execute("UPDATE duroxide.vars SET sealed = %s WHERE name = 'token'", odd)
            assert "set it again" in await error(owner, worker, "df.http(%s, 'POST', '{token}')", server.url("/echo"))
        assert server.connections == 0


async def test_another_secret_makes_another_key(database18: Database) -> None:
    async with scene(database18, secret="new") as (server, c, worker):
        await make_key(database18, "old")
        c.execute("SELECT df.setvar('token', 'x', true)")
        await make_key(database18, "new")
        await make_key(database18, "new")
        assert c.one("SELECT count(*) FROM duroxide.secret_keys") == 2
        text = await error(c, worker, "df.http(%s, 'POST', '{token}')", server.url("/echo"))
        assert text == "secret variable 'token' was sealed for another installation or secret of dfproxy; set it again"
        c.execute("SELECT df.setvar('token', 'x', true)")
        assert (await result(c, worker, "df.http(%s, 'POST', '{token}')", server.url("/echo")))["ok"]
        with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="at most 8192 bytes"):
            c.execute("SELECT df.setvar('token', repeat('ä', 4097), true)")
        c.execute("SELECT df.setvar('token', repeat('ä', 4096), true)")
        found = await result(c, worker, "df.http(%s, 'POST', '{token}')", server.url("/echo"))
        assert json.loads(found["body"])["body"] == "ä" * 4096


async def test_sealing_again_looks_different_and_rolls_back(database18: Database) -> None:
    async with scene(database18) as (_, c, __):
        await make_key(database18, None)
        c.execute("BEGIN; SELECT df.setvar('token', 'x', true); ROLLBACK")
        assert c.one("SELECT count(*) FROM duroxide.vars") == 0
        seals = {c.one("SELECT duroxide.seal('token', 'x')") for _ in range(5)}
        assert len(seals) == 5
        assert base64.b64encode(b"x").decode() not in "".join(seals)
        await asyncio.sleep(0)
