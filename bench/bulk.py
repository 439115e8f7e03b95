"""Bulk: a result of 1 GB, and COPY of a million rows in and out, through the proxy and directly.

The client reads or writes as fast as a client can and looks at nothing, so that the proxy is what limits.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import psycopg

from bench.measure import interleaved, median, middle_ratio
from bench.stage import APP, DATABASE, PASSWORD, Program, Stage
from bench.table import Reach, Row
from proxy.wire import build
from proxy.wire.auth import ClientAuth
from proxy.wire.frames import FrameParser

ROWS, REPEATS = 1_000_000, 3
RESULT = f"SELECT repeat('x', 1000) FROM generate_series(1, {ROWS})"
READY = (b"Z\0\0\0\5I", b"Z\0\0\0\5T")


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    with stage.dfproxy("dfproxy", "--no-engine") as ours, psycopg.connect(stage.uri(), autocommit=True) as c:
        c.execute("CREATE TABLE bulk (id int, amount numeric, note text)")
        c.execute(f"INSERT INTO bulk SELECT n, n * 1.5, 'a note of a row ' || n FROM generate_series(1, {ROWS}) n")
        c.execute("CREATE UNLOGGED TABLE taken (LIKE bulk)")
        c.execute("VACUUM bulk")
        with c.cursor().copy("COPY bulk TO STDOUT") as copy:
            text = b"".join(bytes(block) for block in copy)
        block = _aligned(text)
        direct = stage.direct
        yield from _row("result of 1 GB", ROWS * 1000 / 1e6, "MB/s", ours, direct, lambda p: _read(p.port, RESULT))
        yield from _row("COPY out of 1,000,000 rows", ROWS, "rows/s", ours, direct,
                        lambda p: _read(p.port, "COPY bulk TO STDOUT"))
        yield from _row("COPY in of 1,000,000 rows", ROWS, "rows/s", ours, direct, lambda p: _write(p, block))
        c.execute("DROP TABLE bulk, taken")  # autovacuum would look through them while something else is measured


def _row(what: str, amount: float, unit: str, ours: Program, direct: Program,
         transfer: Callable[[Program], None]) -> Iterator[Row]:
    peaks: list[float] = []
    cpus: list[float] = []

    def through() -> float:
        before, cpu = ours.memory(), ours.cpu()
        with _Watch(ours) as watch:
            rate = _rate(amount, lambda: transfer(ours))
        peaks.append((watch.peak - before) / 2**20)
        cpus.append(ours.cpu() - cpu)
        return rate

    mine, theirs = interleaved(REPEATS, [through, lambda: _rate(amount, lambda: transfer(direct))])
    # The ratio is that of neighbours; the figures shown are the medians, scaled to it.
    ratio = middle_ratio(mine, theirs)
    yield Row(what, unit, median(mine), "direct", median(mine) / ratio, Reach(0.8),
              f"proxy: {median(cpus):.2f} s CPU, at most {max(peaks):.1f} MB more memory than before",
              {"ours": mine, "direct": theirs, "cpu": cpus, "memory": peaks})


def _rate(amount: float, transfer: Callable[[], None]) -> float:
    began = time.perf_counter()
    transfer()
    return amount / (time.perf_counter() - began)


class _Watch:
    """Looks at a program's memory while something runs."""

    def __init__(self, program: Program) -> None:
        self.peak = 0
        self._program = program
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, self._program.memory())

    def __enter__(self) -> _Watch:
        self.peak = self._program.memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _read(port: int, query: str) -> None:
    """Reads a reply to its end, which is a ReadyForQuery at the end of what was read."""
    with _login(port) as s:
        s.sendall(build.query(query))
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        last = b""
        while last not in READY:
            size = s.recv_into(buffer)
            if not size:
                raise ConnectionError("the connection ended in mid-reply")
            last = (last + bytes(view[max(0, size - 6) : size]))[-6:]


def _login(port: int) -> socket.socket:
    """A session of the application, as a plain socket."""
    s = socket.create_connection(("127.0.0.1", port))
    auth, parser = ClientAuth(APP, PASSWORD), FrameParser()
    s.sendall(build.startup({"user": APP, "database": DATABASE}))
    while True:
        frame = parser.next_frame()
        if frame is None:
            parser.feed(s.recv(65536))
        elif frame.type == ord("R"):
            if answer := auth.respond(frame.payload):
                s.sendall(answer)
        elif frame.type == ord("E"):
            raise ConnectionError(frame.payload.decode(errors="replace"))
        elif frame.type == ord("Z"):
            return s


def _write(program: Program, blocks: list[bytes]) -> None:
    with psycopg.connect(program.uri, autocommit=True) as c:
        c.execute("TRUNCATE taken")
        with c.cursor().copy("COPY taken FROM STDIN") as copy:
            for block in blocks:
                copy.write(block)


def _aligned(text: bytes, size: int = 32768) -> list[bytes]:
    """The text in pieces of about a driver's size."""
    return [text[at : at + size] for at in range(0, len(text), size)]
