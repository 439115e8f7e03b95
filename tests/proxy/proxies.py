"""A proxy on an event loop of its own, in a thread, so that blocking and asyncio clients alike can be pointed at it.

The compiler of these tests is a stand-in that the relay can be judged by: it knows nothing of workflows, changes the length of the
text, and keeps a map of positions.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

from dsl.compiler import mentions_dsl
from proxy.rewriter import Rewriter
from proxy.server import ProxyConfig, ProxyServer
from tests.fix_postgres import versions

T = TypeVar("T")

#: DFPROXY_TEST_FASTPATH=off: everything goes through Python.
FASTPATH = os.environ.get("DFPROXY_TEST_FASTPATH") != "off"


def fastpath_at(version: int) -> bool:
    """Whether a test of several PostgreSQL versions has the fast path with this one: both ways are to be seen."""
    return FASTPATH and version == versions()[0]


@dataclass(frozen=True)
class Replaced:
    """A statement in which each `df.x()` became something else."""

    sql: str
    spans: tuple[tuple[int, int], ...] = ()  # (position in the new text, characters that it is longer from there on)
    refused: int = 0  # position of what it raises an error about

    def raises(self, position: int) -> bool:
        return position == self.refused

    def source_position(self, position: int) -> int:
        return position - next((grown for start, grown in reversed(self.spans) if position > start), 0)


#: What the stand-in compiler replaces, and by what. Each replacement has another length than what it replaces.
REPLACEMENTS = {
    "df.one()": "(/* in the place of df.one() */ 1)",
    "df.text()": "'in the place of df.text()'::text",
    "df.nothing()": "null",
}
#: A statement with this is replaced by one that raises the private marker, as the compiler does for its errors.
REFUSED = "df.refused()"


def compile_stub(sql: str, *, standard_conforming_strings: bool) -> Replaced | None:
    if "df.bug()" in sql:
        raise RuntimeError("a bug in the compiler")
    if REFUSED in sql:
        position = sql.index(REFUSED) + 1
        return Replaced(
            "DO $dfproxy$ BEGIN RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'df.refused() is refused',"
            f" HINT = 'leave it', CONSTRAINT = 'dfproxy:position={position}'; END $dfproxy$", refused=position,
        )
    spans, grown, out, rest = [], 0, "", sql
    while True:
        found = [(rest.index(old), old) for old in REPLACEMENTS if old in rest]
        if not found:
            break
        at, old = min(found)
        new = REPLACEMENTS[old]
        out += rest[:at] + new
        rest = rest[at + len(old) :]
        grown += len(new) - len(old)
        spans.append((len(out), grown))
    return Replaced(out + rest, tuple(spans)) if spans else None


def mentions_stub(statement: bytes) -> bool:
    return b"df." in statement and mentions_dsl(statement)


@dataclass
class RunningProxy:
    """A proxy that serves; `commits` counts calls of `on_commit`.

    Without `guesses` only those are passed on that follow a mention of df; the others count in `guessed`.
    """

    server: ProxyServer
    loop: asyncio.AbstractEventLoop
    commits: list[int] = field(default_factory=list)
    guessed: list[int] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.server.port

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function on the proxy's loop."""

        async def there() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(30)

    def drain(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.drain(), self.loop).result(60)

    def dsn(self, database: Any, user: str | None = None) -> str:
        """The URI of a tests.fix_postgres.Database, through the proxy."""
        return f"postgresql://{user or database.owner}@127.0.0.1:{self.port}/{database.name}"


@contextlib.contextmanager
def running_proxy(upstream: str, *, rewriter: Rewriter | None = None, port: int = 0, guesses: bool = False, **config: Any) -> Iterator[RunningProxy]:
    """A proxy before `upstream`, with the stand-in compiler unless a rewriter is given."""
    started = threading.Event()
    box: list[RunningProxy | BaseException] = []
    stop: list[asyncio.Event] = []

    async def serve() -> None:
        commits: list[int] = []
        server = ProxyServer(
            ProxyConfig(upstream=upstream, port=port, **{"fastpath": FASTPATH, **config}),
            on_commit=lambda: commits.append(1),
            rewriter=rewriter or Rewriter(mentions=mentions_stub, might=mentions_stub, compile_=compile_stub, narrow=True),
        )
        guessed: list[int] = []
        if not guesses:
            server.perhaps_committed = lambda: guessed.append(1)  # type: ignore[method-assign]
        ending = asyncio.Event()
        async with server:
            stop.append(ending)
            box.append(RunningProxy(server, asyncio.get_running_loop(), commits, guessed))
            started.set()
            await ending.wait()
        assert server.clients == 0
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    def thread() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        except BaseException as e:  # noqa: BLE001 (raised again by the thread that waits)
            box.append(e)
        finally:
            started.set()

    worker = threading.Thread(target=thread, name="proxy")
    worker.start()
    started.wait(30)
    if isinstance(box[0], BaseException):
        worker.join(30)
        raise box[0]
    proxy = box[0]
    try:
        yield proxy
    finally:
        proxy.loop.call_soon_threadsafe(stop[0].set)
        worker.join(60)
    if len(box) > 1:
        raise box[1]  # type: ignore[misc]
