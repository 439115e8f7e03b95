"""The command before a primary and its standby: clients and workflows follow a failover."""

from __future__ import annotations

import psycopg

from tests.e2e.fix_dfproxy import running_proxy
from tests.proxy.standby import pair, promote
from tests.proxy.test_adversity import eventually


def test_clients_and_workflows_follow_a_failover() -> None:
    with pair() as (one, two):
        with psycopg.connect(one.dsn(), autocommit=True) as c:
            c.execute("CREATE ROLE svc LOGIN CREATEROLE")
            c.execute("CREATE DATABASE app OWNER svc")
        hosts = f"127.0.0.1:{one.port},127.0.0.1:{two.port}"
        upstream = f"postgresql://svc@{hosts}/app?target_session_attrs=read-write"
        with running_proxy(upstream) as proxy:
            dsn = proxy.dsn("svc", "app")
            with psycopg.connect(dsn, autocommit=True) as c:
                c.execute("CREATE TABLE done (n int)")
                finished = c.execute("SELECT df.start('INSERT INTO done VALUES (1)')").fetchone()
                assert c.execute("SELECT df.await_instance(%s)", finished).fetchone() == ("completed",)
                waiting = c.execute(
                    "SELECT df.start(df.wait_for_signal('go') ~> 'INSERT INTO done VALUES (2)')").fetchone()
            # What the standby has not got yet would be lost with the primary, proxy or not.
            with psycopg.connect(one.dsn(), autocommit=True) as c, psycopg.connect(two.dsn(), autocommit=True) as there:
                c.execute("SET synchronous_commit = on")
                c.execute("CREATE TABLE behind_all_that ()")
                eventually(lambda: there.execute("SELECT to_regclass('behind_all_that')").fetchone() != (None,))
            one.stop("immediate")
            promote(two)

            def signalled() -> bool:
                try:
                    with psycopg.connect(dsn, autocommit=True) as c:
                        c.execute("SELECT df.signal(%s, 'go')", waiting)
                        return True
                except psycopg.OperationalError:
                    return False

            eventually(signalled)
            with psycopg.connect(dsn, autocommit=True) as c:
                assert c.execute("SELECT inet_server_port()").fetchone() == (two.port,)
                assert c.execute("SELECT df.await_instance(%s, 90)", waiting).fetchone() == ("completed",)
                assert c.execute("SELECT array_agg(n ORDER BY n) FROM done").fetchone() == ([1, 2],)
