"""A lot at once: memory stays flat however much passes, and many clients are served side by side."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import asyncpg
import psutil
import pytest

from proxy.wire import build
from proxy.wire.messages import Backend
from tests.fix_postgres import Database
from tests.proxy.proxies import RunningProxy
from tests.proxy.proxy_process import proxy_process
from tests.proxy.test_adversity import read_until

MIB = 1 << 20
#: What a proxy may need beyond what it had: buffers of one session on both sides, and of the allocator.
ALLOWANCE = 24 * MIB


class Watch:
    """The largest resident set of a process, sampled all the time."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._over = threading.Event()
        self.before = self.peak = process.memory_info().rss
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.before


@pytest.fixture
def outside(database18: Database) -> Iterator[tuple[socket.socket, psutil.Process]]:
    """A raw session through a proxy in a process of its own, warmed up."""
    with (
        proxy_process(database18.dsn()) as (port, process),
        socket.create_connection(("127.0.0.1", port), timeout=60) as s,
    ):
        s.sendall(build.startup({"user": database18.owner, "database": database18.name}))
        read_until(s, Backend.READY_FOR_QUERY)
        s.sendall(build.query("SELECT repeat('x', 100000) FROM generate_series(1, 100)"))
        read_until(s, Backend.READY_FOR_QUERY)
        yield s, process


def receive(s: socket.socket, size: int) -> None:
    """Takes at least `size` bytes and throws them away."""
    buffer = bytearray(MIB)
    while size > 0:
        got = s.recv_into(buffer)
        assert got
        size -= got


@pytest.mark.parametrize(
    ("what", "size"),
    [
        ("SELECT repeat('x', 1000000) FROM generate_series(1, 1074)", 1074 * MIB // 1.05),
        ("SELECT repeat('x', 256000000)", 256_000_000),
        ("SELECT n FROM generate_series(1, 3000000) n", 45_000_000),
        ("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 300000)) TO STDOUT", 300_000_000),
    ],
    ids=["1 GB of rows", "one row of 256 MB", "3 million small rows", "COPY"],
)
def test_memory_is_flat_for_results(outside: tuple[socket.socket, psutil.Process], what: str, size: float) -> None:
    s, process = outside
    with Watch(process) as watch:
        s.sendall(build.query(what))
        receive(s, int(size))
    assert watch.growth < ALLOWANCE


def test_memory_is_flat_for_what_a_client_sends(outside: tuple[socket.socket, psutil.Process]) -> None:
    s, process = outside
    s.sendall(build.query("CREATE TEMP TABLE t (a text)"))
    read_until(s, Backend.READY_FOR_QUERY)
    s.sendall(build.query("COPY t FROM STDIN"))
    read_until(s, Backend.COPY_IN_RESPONSE)
    row = build.copy_data(b"x" * 1000 + b"\n") * 1000
    with Watch(process) as watch:
        for _ in range(300):
            s.sendall(row)
        s.sendall(build.copy_done())
        read_until(s, Backend.READY_FOR_QUERY)
        # A parameter of 200 MB: Bind passes, however long.
        s.sendall(build.parse("", "SELECT length($1)", [25]) + build.bind("", "", [b"x" * 200_000_000]))
        s.sendall(build.execute() + build.sync())
        assert read_until(s, Backend.DATA_ROW)[-1].payload[6:] == b"200000000"
    assert watch.growth < ALLOWANCE


def test_memory_is_flat_while_a_client_does_not_read(outside: tuple[socket.socket, psutil.Process]) -> None:
    s, process = outside
    with Watch(process) as watch:
        s.sendall(build.query("SELECT repeat('x', 1000000) FROM generate_series(1, 500)"))
        threading.Event().wait(1.0)  # reading nothing
        receive(s, 500_000_000)
    assert watch.growth < ALLOWANCE


async def test_many_clients(database18: Database, proxied18: RunningProxy) -> None:
    async def client(n: int) -> None:
        c = await asyncpg.connect(proxied18.dsn(database18), timeout=60)
        try:
            for i in range(20):
                assert await c.fetchval("SELECT df.one() + $1::int", n * 100 + i) == n * 100 + i + 1
        finally:
            await c.close()

    async with asyncio.TaskGroup() as group:
        for n in range(100):
            group.create_task(client(n))
