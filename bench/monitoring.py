"""`make bench OF=monitoring`: the functions that look at workflows, with a million of them.

For each: the best of five calls, as an ordinary role that owns one in twenty workflows, as one that owns none, and
as the service role; and what its statements scan. A sequential scan of a big table is marked: only df.metrics, which
counts, should have one (and the inbox, which is empty here).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from engine.migrate import migrate
from proxy.embedded import Cluster, bin_dir

FILL = """
INSERT INTO duroxide.instances
       (id, label, graph, submitted_by, status, output, created_at, updated_at, started_at, ended_at)
SELECT lpad(to_hex(n), 8, '0'), CASE WHEN n % 10 < 3 THEN 'label-' || n % 1000 END,
       '[{"id":"00000001","type":"THEN","left":1,"right":2},{"id":"00000002","type":"SQL","query":"SELECT 1"},
         {"id":"00000003","type":"SQL","query":"SELECT 2"}]',
       ('role' || n % 20)::regrole,
       CASE WHEN n % 100 < 5 THEN 'pending' WHEN n % 100 < 7 THEN 'failed' WHEN n % 100 < 8 THEN 'cancelled'
            ELSE 'completed' END,
       CASE WHEN n % 100 >= 5 THEN '{"rows":[],"row_count":0}' END, now() - n * interval '1 s', now(), now(),
       CASE WHEN n % 100 >= 5 THEN now() - n * interval '1 s' END
  FROM generate_series(1, %(count)s) n;
-- Those that have ended are not queued.
DELETE FROM duroxide.queue q USING duroxide.instances i WHERE i.id = q.instance_id AND i.ended_at IS NOT NULL;
UPDATE duroxide.queue SET started_at = now(), wake_at = 'infinity' WHERE instance_id < '00005000';
INSERT INTO duroxide.history (instance_id, execution, node, event, result)
SELECT i.id, '', n, 'completed', '{"rows":[{"a":1}],"row_count":1}' FROM duroxide.instances i, generate_series(1, 2) n;
"""
QUERIES = {
    "status": "SELECT df.status('{id}')",
    "result": "SELECT df.result('{id}')",
    "instance_info": "SELECT * FROM df.instance_info('{id}')",
    "instance_nodes": "SELECT * FROM df.instance_nodes('{id}')",
    "instance_executions": "SELECT * FROM df.instance_executions('{id}')",
    "explain": "SELECT df.explain('{id}')",
    "list_instances()": "SELECT * FROM df.list_instances()",
    "list_instances('running')": "SELECT * FROM df.list_instances('running')",
    "list_instances('pending')": "SELECT * FROM df.list_instances('pending')",
    "list_instances('failed', 100)": "SELECT * FROM df.list_instances('failed', 100)",
    "list_instances('completed')": "SELECT * FROM df.list_instances('completed')",
    "list_instances by label": "SELECT * FROM df.list_instances(NULL, 100, 'label-61')",
    "list_instances, label and status": "SELECT * FROM df.list_instances('completed', 100, 'label-61')",
    "list_instances, deep page": "SELECT * FROM df.list_instances(NULL, 100, NULL,"
                                 " duroxide.cursor_of(now() - interval '5 days', '00000000'))",
    "list_instances, no such label": "SELECT * FROM df.list_instances(NULL, 100, 'nobody')",
    "df.instances by id": "SELECT * FROM df.instances WHERE id = '{id}'",
    "df.nodes by instance": "SELECT * FROM df.nodes WHERE instance_id = '{id}'",
    "newest of df.instances": "SELECT * FROM df.instances ORDER BY created_at DESC LIMIT 20",
    "prune nothing": "SELECT df.prune('2000-01-01')",
    "metrics": "SELECT * FROM df.metrics()",
}
#: The big tables with their indexes; a scan that is counted for a table itself is a sequential one.
RELATIONS = """
SELECT c.oid, c.relname, c.relkind = 'r' AS is_table
  FROM pg_class c LEFT JOIN pg_index x ON x.indexrelid = c.oid
 WHERE COALESCE(x.indrelid, c.oid) IN ('duroxide.instances'::regclass, 'duroxide.history'::regclass,
                                       'duroxide.queue'::regclass, 'duroxide.signals'::regclass)
"""


def plans(connection: psycopg.Connection[Any], query: str) -> list[str]:
    """Which indexes and tables the statements of a query scan, nested ones too, as the server counts."""
    with connection.transaction():
        relations = connection.execute(RELATIONS).fetchall()

        def scans() -> list[int]:
            ids = [oid for oid, _, _ in relations]
            return [row[0] for row in connection.execute(
                "SELECT pg_stat_get_xact_numscans(o) FROM unnest(%s::oid[]) WITH ORDINALITY AS u(o, i) ORDER BY i",
                (ids,))]

        before = scans()
        connection.execute(query)
        changed = [relation for relation, a, b in zip(relations, before, scans(), strict=True) if b > a]
    return sorted(f"Seq Scan on {name}" if is_table else name for _, name, is_table in changed)


def measure(connection: psycopg.Connection[Any], query: str) -> float:
    """Milliseconds of the quickest of five calls: what the machine does beside them doesn't count."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        connection.execute(query)
        taken.append(time.perf_counter() - began)
    return min(taken) * 1000


def main() -> None:
    """Fills a temporary server, and prints a table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(prefix="dfproxy-bench-") as folder:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder) / "data", bin_dir(18), port=54_999, settings={
            "fsync": "off", "shared_buffers": "1GB", "max_wal_size": "8GB"})
        cluster.start()
        try:
            report(cluster, count)
        finally:
            cluster.stop("immediate")


def report(cluster: Cluster, count: int) -> None:
    """Fills and measures."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE service LOGIN CREATEROLE")
        admin.execute("CREATE DATABASE bench OWNER service")
    asyncio.run(migrate(cluster.dsn(user="service", database="bench")))
    with psycopg.connect(cluster.dsn(database="bench"), autocommit=True) as admin:
        for n in range(21):  # the last one has no workflow
            admin.execute(f"CREATE ROLE role{n} LOGIN")
            admin.execute(f"SELECT df.grant_usage('role{n}', with_grant => true)")
        for statement in FILL.replace("%(count)s", str(count)).split(";\n"):
            if statement.strip():
                admin.execute(statement)
        admin.execute("VACUUM ANALYZE")
        size = admin.execute("SELECT pg_size_pretty(pg_database_size('bench'))").fetchone()
    print(f"{count:,} instances, {size[0] if size else ''}")
    print(f"{'':34}{'role ms':>10}{'none ms':>10}{'service ms':>12}  scans, as the role")
    mine = f"{count // 2 // 20 * 20 + 1:08x}"
    with psycopg.connect(cluster.dsn(user="role1", database="bench"), autocommit=True) as role, \
            psycopg.connect(cluster.dsn(user="role20", database="bench"), autocommit=True) as none, \
            psycopg.connect(cluster.dsn(user="service", database="bench"), autocommit=True) as service:
        for name, template in QUERIES.items():
            query = template.replace("{id}", mine)
            scans = plans(role, query)
            marked = "  SEQUENTIAL" if any("Seq Scan" in s for s in scans) else ""
            print(f"{name:34}{measure(role, query):>10.1f}{measure(none, query):>10.1f}{measure(service, query):>12.1f}"
                  f"  {', '.join(scans)}{marked}", flush=True)


if __name__ == "__main__":
    main()
