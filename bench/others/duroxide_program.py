"""duroxide, the engine of pg_durable: `python -m bench.others.duroxide_program URI`. Activities are at-least-once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
from duroxide import Client, PostgresProvider, Runtime, RuntimeOptions

from bench.others.program import AT_A_TIME, HOUR, obey, rows_of

uri = sys.argv[1]
provider = PostgresProvider.connect_with_schema(uri, "engine")
runtime = Runtime(provider, RuntimeOptions(worker_concurrency=AT_A_TIME,
                                           log_level="error"))
client = Client(provider)
own = threading.local()


@runtime.register_activity("hit")
def hit(_: Any, row: int) -> None:
    """A step, in a session of the thread's own."""
    if not hasattr(own, "session"):
        own.session = psycopg.connect(uri, autocommit=True)
    own.session.execute("UPDATE hits SET n = n + 1 WHERE id = %s", (row,))


@runtime.register_orchestration("work")
def work(ctx: Any, number: int) -> Iterator[Any]:
    """Three steps."""
    for row in rows_of(number):
        yield ctx.schedule_activity("hit", row)


@runtime.register_orchestration("wait")
def wait(ctx: Any, _: Any) -> Iterator[Any]:
    """A long sleep."""
    yield ctx.schedule_timer(HOUR * 1000)


def start(first: int, count: int) -> None:
    """Each by a call of its own."""
    for number in range(first, first + count):
        client.start_orchestration(f"work-{number}", "work", number)


def park(first: int, count: int) -> None:
    """Sleepers."""
    for number in range(first, first + count):
        client.start_orchestration(f"wait-{number}", "wait", None)


def one(number: int) -> None:
    """Waits as its client does."""
    start(number, 1)
    client.wait_for_orchestration(f"work-{number}", 60_000)


if __name__ == "__main__":
    runtime.start()
    obey(start=start, park=park, one=one)
