"""`python -m bench.http` (or `python -m bench http`): HTTP steps against plain httpx.

The server is a process of its own on this machine and answers after 50 ms. First the client alone, in this process, as
httpx is: 1,000 calls at once on new connections, and 1,000 calls, 100 at a time, on kept ones. Then whole workflows:
1,000 of one call each, started by one statement, run by `dfproxy worker` with their checkpoints.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import httpx
import psycopg
import uvloop

from bench.flows import LEFT
from bench.measure import interleaved, median, middle_ratio
from bench.stage import DATABASE, Stage, stage
from bench.table import HEADER, Reach, Row, line
from engine.http.client import HttpClient
from engine.http.policy import HostList, HttpPolicy

LATENCY = 0.05
AT_ONCE, REPEATS = 1000, 3
KEPT, IN_FLIGHT = 1000, 100
ALLOW = "127.0.0.0/8"
START = "SELECT count(df.start(df.http(%s, 'GET'))) FROM generate_series(1, %s)"
#: From the first call that began to the last result that was recorded, as the database saw it.
TOOK = """
SELECT extract(epoch FROM max(i.ended_at) - min(i.started_at))::float8, count(*) FROM duroxide.instances i
 WHERE i.created_at >= %s AND i.status = 'completed'"""

Call = Callable[[], Awaitable[None]]


class Server(asyncio.Protocol):
    """Answers every request without a body after a while."""

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{\"ok\":true}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while b"\r\n\r\n" in self.data:
            _, _, self.data = self.data.partition(b"\r\n\r\n")
            asyncio.get_running_loop().call_later(LATENCY, self.transport.write, self.ANSWER)

    @staticmethod
    async def serve() -> None:
        """Until it is terminated."""
        listener = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=4096)
        print(f"listening on {listener.sockets[0].getsockname()[1]}", flush=True)
        await listener.serve_forever()


async def _rate(call: Call, count: int, in_flight: int) -> tuple[float, float]:
    """Calls a second, and microseconds of CPU time for each."""
    left = iter(range(count))

    async def caller() -> None:
        for _ in left:
            await call()

    began, before = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return count / (time.perf_counter() - began), (time.process_time() - before) / count * 1e6


async def _ours(url: str, count: int, in_flight: int) -> tuple[float, float]:
    policy = HttpPolicy(allow=HostList.parse([ALLOW]), max_parallel=in_flight, max_parallel_per_host=in_flight)
    client = HttpClient(policy)
    config: dict[str, Any] = {"url": url, "method": "GET", "timeout_seconds": 30}

    async def call() -> None:
        ready = await client.prepare(config, multipart=False, idempotency_key="a-b-1")
        async with client.slot(ready):
            await client.perform(ready)

    try:
        return await _rate(call, count, in_flight)
    finally:
        await client.aclose()


async def _httpx(url: str, count: int, in_flight: int) -> tuple[float, float]:
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as client:
        async def call() -> None:
            (await client.get(url)).raise_for_status()

        return await _rate(call, count, in_flight)


def _workflows(made: Stage, url: str) -> float:
    """Calls a second in workflows, from the first that began to the last that ended."""
    with psycopg.connect(made.uri(), autocommit=True) as c, made.admin(DATABASE) as admin:
        [since] = c.execute("SELECT clock_timestamp()").fetchone() or (None,)
        c.execute(START, (url, AT_ONCE))
        while admin.execute(LEFT.format(since="'-infinity'")).fetchone() != (False,):
            time.sleep(0.02)
        [took, count] = admin.execute(TOOK, (since,)).fetchone() or (None, 0)
        assert count == AT_ONCE, f"{count} of {AT_ONCE} workflows were completed"
        return AT_ONCE / float(str(took))


def run(made: Stage) -> Iterator[Row]:
    """Yields the rows."""
    with made.program("http server", [sys.executable, "-m", "bench.http", "--server"]) as server:
        url = f"http://127.0.0.1:{server.port}/"
        yardstick = []
        # A thousand at once take httpx half a minute, which no repeat could make a near thing.
        for what, count, in_flight, repeats in ((f"{AT_ONCE:,} calls at once", AT_ONCE, AT_ONCE, 1),
                                                (f"{KEPT:,} calls, {IN_FLIGHT} at a time", KEPT, IN_FLIGHT, REPEATS)):
            ours, theirs = interleaved(repeats, [lambda n=count, m=in_flight: uvloop.run(_ours(url, n, m)),
                                                 lambda n=count, m=in_flight: uvloop.run(_httpx(url, n, m))])
            row = _row(what, ours, theirs)
            yardstick.append(row.against)
            yield row
        with made.dfproxy("worker", command="worker", http_allow=ALLOW, max_instances=2 * AT_ONCE,
                          http_max_parallel=AT_ONCE, http_max_parallel_per_host=AT_ONCE) as worker:
            with made.admin() as c:
                c.execute("SELECT df.grant_usage('app', include_http => true)")
            _workflows(made, url)  # sessions are opened, caches filled
            before = worker.cpu()
            [rates] = interleaved(REPEATS, [lambda: _workflows(made, url)])
            cpu = (worker.cpu() - before) / REPEATS / AT_ONCE * 1e6
            yield Row(f"{AT_ONCE:,} workflows of one call", "1/s", median(rates), f"httpx, {IN_FLIGHT} at a time",
                      yardstick[-1], None, "with two checkpoints each: that it began, and what came of it;"
                      f" CPU of the worker: {cpu:.0f} us each",
                      {"ours": rates})


def _row(what: str, ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> Row:
    rates = [r[0] for r in ours]
    ratio = middle_ratio(rates, [r[0] for r in theirs])
    return Row(what, "1/s", median(rates), "httpx", median(rates) / ratio, Reach(1.0),
               f"CPU a call: {median([r[1] for r in ours]):,.0f} us, httpx {median([r[1] for r in theirs]):,.0f} us",
               {"ours": ours, "httpx": theirs})


def main(arguments: list[str]) -> None:
    """The table by itself; `--server`: the server."""
    if arguments == ["--server"]:
        uvloop.run(Server.serve())
        return
    with stage() as made:
        print(HEADER)
        for row in run(made):
            print(line(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
