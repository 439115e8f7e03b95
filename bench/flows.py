"""What the benchmarks of the engine share: the tables, workflows of UPDATE steps, and waiting for them to end."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from bench.stage import APP, DATABASE, PASSWORD, Stage

LOGIN = "bench_login"
TABLES = f"""
CREATE TABLE hits (id int PRIMARY KEY, n int NOT NULL DEFAULT 0) WITH (fillfactor = 50);
INSERT INTO hits SELECT n FROM generate_series(1, 10000) n;
CREATE TABLE checkpoints (instance int, node int, result text, at timestamptz DEFAULT now());
GRANT INSERT ON checkpoints TO {LOGIN};
"""
#: One step's transaction as the engine runs it, without an engine.
STEP = f"""\\set id random(1, 10000)
BEGIN;
SET LOCAL ROLE {APP};
UPDATE hits SET n = n + 1 WHERE id = :id;
RESET ROLE;
INSERT INTO checkpoints (instance, node, result) VALUES (:id, 1, '{{"rows":[],"row_count":0}}');
COMMIT;
"""
#: Workflows of three UPDATE steps.
START = """
SELECT count(df.start(df.seq(df.seq('UPDATE hits SET n = n + 1 WHERE id = ' || n % 10000 + 1,
                                    'UPDATE hits SET n = n + 1 WHERE id = ' || (n + 3333) % 10000 + 1),
                             'UPDATE hits SET n = n + 1 WHERE id = ' || (n + 6666) % 10000 + 1)))
  FROM generate_series(1, {count}) n"""
#: Seconds from the first of them that began to the last that ended, as the server saw it.
TOOK = """
SELECT extract(epoch FROM max(ended_at) - min(started_at))::float8 FROM duroxide.instances
 WHERE created_at >= {since} AND status = 'completed' HAVING count(*) = {count}"""
#: Found by an index, however many others there are. The first is enough: to ask costs those that run nothing.
LEFT = """
SELECT EXISTS (SELECT FROM duroxide.instances WHERE created_at >= {since} AND status IN ('pending', 'running'))"""


def prepare(stage: Stage, database: str = DATABASE) -> None:
    """Makes the tables of a database in which dfproxy has installed its schemas."""
    stage.grant(database)
    prepare_plain(stage, database)


def prepare_plain(stage: Stage, database: str) -> None:
    """Makes the tables of any database."""
    with stage.admin(database) as c:
        if c.execute("SELECT to_regrole(%s)", (LOGIN,)).fetchone() == (None,):
            c.execute(f"CREATE ROLE {LOGIN} LOGIN PASSWORD '{PASSWORD}' IN ROLE {APP}")
    with psycopg.connect(stage.uri(database=database), autocommit=True) as c:
        if c.execute("SELECT to_regclass('hits')").fetchone() == (None,):
            c.execute(TABLES)


def step_script(stage: Stage) -> str:
    """The file with the transaction of one step."""
    path = stage.folder / "step.sql"
    path.write_text(STEP)
    return str(path)


def effects(stage: Stage, database: str) -> int:
    """How many steps have taken effect, or transactions that are like one."""
    with stage.admin(database) as c:
        return int(str((c.execute("SELECT sum(n) FROM hits").fetchone() or (0,))[0]))


def rate(stage: Stage, count: int, database: str = DATABASE, began: Callable[[], None] = lambda: None) -> float:
    """Starts so many workflows and returns how many steps a second they ran at; calls `began` when all are started."""
    with psycopg.connect(stage.uri(database=database), autocommit=True) as c, stage.admin(database) as admin:
        since = (c.execute("SELECT quote_literal(clock_timestamp())").fetchone() or ("",))[0]
        c.execute(START.format(count=count))
        began()
        while admin.execute(LEFT.format(since=since)).fetchone() != (False,):
            time.sleep(0.05)
        took = admin.execute(TOOK.format(since=since, count=count)).fetchone()
        assert took is not None, "not every workflow was completed"
        assert isinstance(took[0], float)
        return 3 * count / took[0]
