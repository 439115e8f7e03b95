"""What engine tests share: an installed database, instances put in by hand, a worker in this process or in another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from engine.migrate import migrate
from engine.settings import EngineSettings
from engine.store import Poll, Store
from engine.worker import Worker
from tests.engine.fix_graphs import Tree, flatten
from tests.fix_postgres import Database

#: Workers in this process: told of every start, as the proxy tells its worker.
_workers: set[Worker] = set()


async def install(database: Database) -> None:
    """Installs the schemas as the database's owner."""
    await migrate(database.dsn())


def settings(database: Database, **changes: Any) -> EngineSettings:
    """Settings for tests: the owner is the service role."""
    return EngineSettings(dsn=database.dsn(), **changes)


@contextlib.asynccontextmanager
async def running_worker(database: Database, **changes: Any) -> AsyncIterator[Worker]:
    """A worker in this process, ended by a clean stop."""
    worker = Worker(settings(database, **changes))
    _workers.add(worker)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(worker.run())
        try:
            yield worker
        finally:
            _workers.discard(worker)
            await worker.stop(5)
            await task


async def polled(store: Store, limit: int, **options: bool) -> Poll:
    """What a poll has found, once that is committed."""
    found = await store.poll(limit, **options)
    await store.settle(found)
    return found


@dataclass(frozen=True)
class Through(Database):
    """The same database, by another port: there is something in between. Superusers go straight to the server."""

    port: int = 0

    @classmethod
    def of(cls, database: Database, port: int) -> Through:
        return cls(database.cluster, database.name, database.owner, database.version, port)

    def dsn(self, user: str | None = None) -> str:
        return f"postgresql://{user or self.owner}@127.0.0.1:{self.port}/{self.name}"


class Client:
    """A session that starts workflows by inserting graphs, and looks at them."""

    def __init__(self, database: Database, user: str | None = None) -> None:
        self.connection = psycopg.connect(database.dsn(), user=user or database.owner, autocommit=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def execute(self, query: str, *parameters: object) -> None:
        self.connection.execute(query.encode(), parameters or None)

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self.connection.execute(query.encode(), parameters or None).fetchall()

    def one(self, query: str, *parameters: object) -> Any:
        return self.rows(query, *parameters)[0][0]

    def start(self, tree: Tree | list[Any], *, label: str | None = None, database: str | None = None) -> str:
        """Inserts an instance, as df.start would."""
        graph = flatten(tree) if isinstance(tree, dict) else tree
        found: str = self.one(
            "INSERT INTO duroxide.instances (id, label, graph, database) "
            "VALUES (substr(md5(random()::text), 1, 8), %s, %s, %s) RETURNING id", label, json.dumps(graph), database)
        for worker in _workers:
            worker.wake()
        return found

    def status(self, instance: str) -> str:
        status: str = self.one("SELECT status FROM duroxide.instances WHERE id = %s", instance)
        return status

    def outcome(self, instance: str) -> tuple[str, str | None]:
        """Status and output."""
        return self.rows("SELECT status, output FROM duroxide.instances WHERE id = %s", instance)[0]  # type: ignore

    def history(self, instance: str) -> list[tuple[Any, ...]]:
        return self.rows("SELECT execution, node, event, result FROM duroxide.history WHERE instance_id = %s "
                         "ORDER BY execution, node", instance)


async def until(condition: Callable[[], Any], timeout: float = 60.0) -> Any:
    """Waits until a condition is true and returns what it gave; fails after `timeout` seconds, far above any need."""
    async with asyncio.timeout(timeout):
        while not (found := condition()):
            await asyncio.sleep(0.01)
        return found


async def ended(client: Client, *instances: str, timeout: float = 60.0) -> list[tuple[str, str | None]]:
    """Waits until all have ended; their status and output."""
    marks = ",".join(["%s"] * len(instances))
    query = f"SELECT count(*) FROM duroxide.instances WHERE id IN ({marks}) AND ended_at IS NOT NULL"
    await until(lambda: client.one(query, *instances) == len(instances), timeout)
    return [client.outcome(i) for i in instances]


PROGRAM = """
import asyncio, sys
from engine.settings import EngineSettings
from engine.worker import Worker

async def main():
    worker = Worker(EngineSettings(dsn=sys.argv[1], **eval(sys.argv[2])))
    await worker.run()

asyncio.run(main())
"""


@contextlib.contextmanager
def worker_process(database: Database, **changes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), database.dsn(), repr(changes)],
                               stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
