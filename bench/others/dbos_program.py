"""DBOS: `python -m bench.others.dbos_program URI`. Steps are transactions of a datasource, which are exactly-once."""

from __future__ import annotations

import sys

import sqlalchemy as sa
from dbos import DBOS, SQLAlchemyDatasource

from bench.others.program import AT_A_TIME, HOUR, obey, rows_of

QUEUE = "work"

uri = sys.argv[1].replace("postgresql://", "postgresql+psycopg://")
DBOS(config={"name": "bench", "system_database_url": uri, "application_version": "1", "executor_id": "one",
             "log_level": "ERROR", "sys_db_pool_size": AT_A_TIME})
source = SQLAlchemyDatasource.create(uri, {"pool_size": AT_A_TIME})


@source.transaction
def hit(row: int) -> None:
    """A step."""
    source.sql_session().execute(sa.text("UPDATE hits SET n = n + 1 WHERE id = :row"), {"row": row})


@DBOS.workflow()
def work(number: int) -> None:
    """Three steps."""
    for row in rows_of(number):
        hit(row)


@DBOS.workflow()
async def wait() -> None:
    """A long sleep."""
    await DBOS.sleep_async(HOUR)


def start(first: int, count: int) -> None:
    """Enqueues them: what is in the queue outlives this process."""
    for number in range(first, first + count):
        DBOS.enqueue_workflow(QUEUE, work, number)


def park(first: int, count: int) -> None:
    """Enqueues sleepers, in a queue without a limit."""
    for _ in range(first, first + count):
        DBOS.enqueue_workflow("sleepers", wait)


def one(number: int) -> None:
    """Without the queue, whose polling interval would count."""
    DBOS.start_workflow(work, number).get_result(polling_interval_sec=0.001)


if __name__ == "__main__":
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=AT_A_TIME, polling_interval_sec=0.05)
    DBOS.register_queue("sleepers", polling_interval_sec=0.5)
    obey(start=start, park=park, one=one)
