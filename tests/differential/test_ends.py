"""How a session ends when it is not the client who ends it, and what becomes of one whose client is gone."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg
import pytest

from proxy.embedded import Cluster
from proxy.rewriter import Rewriter
from proxy.wire import build
from proxy.wire.frames import Frame
from tests.differential.compare import Normaliser, Said, differences
from tests.differential.conftest import Stage
from tests.differential.conversation import extended
from tests.differential.wireclient import PATIENCE, Connection
from tests.fix_postgres import running_cluster, versions
from tests.proxy.proxies import running_proxy

STARTUP = build.startup({"user": "postgres", "database": "postgres", "application_name": "watched"})
#: What each session does when its server ends: bytes sent, and what is read before the server is stopped.
DOING: dict[str, list[tuple[bytes, str]]] = {
    "idle": [(build.query("SELECT 1"), "Z")],
    "in a transaction": [(build.query("BEGIN; SELECT 1"), "Z")],
    "in a failed transaction": [(build.query("BEGIN"), "Z"), (build.query("SELECT 1/0"), "Z")],
    "in a statement": [(build.query("SELECT pg_sleep(600)"), "")],
    "in a rewritten statement": [(build.query("SELECT pg_sleep(600) -- df.start('a' ~> 'b')"), "")],
    "in an extended statement": [(extended("SELECT pg_sleep(600)") + extended("SELECT 2"), "")],
    "in COPY": [(build.query("CREATE TEMP TABLE c (n int)"), "Z"), (build.query("COPY c FROM STDIN"), "G")],
    "listening": [(build.query("LISTEN c"), "Z")],
    "between Parse and Sync": [(build.parse("", "SELECT 1") + build.flush(), "1")],
}


def _settled(cluster: Cluster, connections: list[Connection]) -> None:
    """Waits until each backend waits for its client or sleeps."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as c:
        deadline = time.monotonic() + PATIENCE
        settled = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s) AND wait_event IN ('ClientRead', 'PgSleep')"
        while c.execute(settled, ([x.pid for x in connections],)).fetchone() != (len(connections),):
            assert time.monotonic() < deadline
            time.sleep(0.01)


STOPS: dict[str, Callable[[Cluster], None]] = {
    "fast": lambda c: c.stop("fast"),
    "immediate": lambda c: c.stop("immediate"),
    "kill": lambda c: c.kill(),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_server_that_is_restarted(stop: str) -> None:
    """The same sessions directly and through the proxy, all at once; the server is stopped, and started again."""
    with running_cluster(versions()[0]) as cluster, running_proxy(cluster.dsn(), rewriter=Rewriter()) as proxy:
        assert cluster.port is not None
        both: dict[str, dict[int, Connection]] = {}
        for doing, steps in DOING.items():
            both[doing] = {port: Connection(("127.0.0.1", port)) for port in (cluster.port, proxy.port)}
            for connection in both[doing].values():
                connection.remember_key(connection.exchange(STARTUP, "Z"))
                for data, until in steps:
                    connection.exchange(data, until)
        _settled(cluster, [c for pair in both.values() for c in pair.values()])
        STOPS[stop](cluster)
        report = []
        for doing, pair in both.items():
            said: list[list[Said]] = []
            for connection in pair.values():
                normaliser = Normaliser()
                said.append([normaliser.said(doing, f) for f in connection.exchange(b"", ".")])
                connection.close()
            if stop == "kill":
                # Which backends still see that the postmaster is gone before they are killed themselves is a matter of luck.
                assert [one[-1].what for one in said] == ["end", "end"]
                assert {dict(s.fields)["C"] for one in said for s in one if s.what == "ERROR_RESPONSE"} <= {"57P01"}
                continue
            report += [f"{doing}: {d}" for d in differences(*said)]
            if stop == "fast":
                assert [dict(s.fields)["C"] for s in said[0] if s.what == "ERROR_RESPONSE"] == ["57P01"]
        assert not report, "\n".join(report)
        refused = Connection(("127.0.0.1", proxy.port))
        (error, _) = refused.exchange(STARTUP, "E.")
        refused.close()
        assert b"08006" in error.payload, "a proxy without its server says so"
        cluster.start()
        again = Connection(("127.0.0.1", proxy.port))
        assert again.exchange(STARTUP + build.query("SELECT 1"), "ZZ")
        again.close()


def test_a_server_that_shuts_down_refuses_in_its_own_words() -> None:
    with running_cluster(versions()[0]) as cluster, running_proxy(cluster.dsn(), rewriter=Rewriter()) as proxy:
        assert cluster.port is not None
        with psycopg.connect(cluster.dsn(), autocommit=True) as keeps_it_up:
            cluster.run("pg_ctl", "-D", str(cluster.data_dir), "-m", "smart", "-W", "stop")
            direct = _refusal(cluster.port)
            assert b"57P03" in direct[0].payload
            assert _refusal(proxy.port) == direct
            keeps_it_up.close()
        deadline = time.monotonic() + PATIENCE
        while cluster.pid() is not None:  # it ends by itself now
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _refusal(port: int) -> list[Frame]:
    """What a new client is told, once it is no longer let in."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        connection = Connection(("127.0.0.1", port))
        try:
            frames = connection.exchange(STARTUP + build.terminate(), ".")
        finally:
            connection.close()
        if frames[0].type == ord("E"):
            return frames
    raise AssertionError("everybody is let in")


@pytest.mark.parametrize("doing", ["copying in", "copying out", "in a statement", "in a transaction", "authenticating"])
def test_a_client_that_vanishes_leaves_nothing(stage18: Stage, doing: str) -> None:
    scene = stage18.scene
    scene.clear()
    scene.admin.execute("CREATE TABLE play.c (n int)")
    scene.admin.execute("GRANT ALL ON play.c TO PUBLIC")
    connection = Connection(stage18.proxied)
    if doing == "authenticating":
        connection.socket.sendall(scene.startup()[:20])
    else:
        connection.remember_key(connection.exchange(scene.startup(), "Z"))
    match doing:
        case "copying in":
            connection.exchange(build.query("COPY play.c FROM STDIN"), "G")
            connection.socket.sendall(build.copy_data(b"1\n") * 5000 + b"d\0\0\1\0half a mess")
        case "copying out":
            connection.exchange(build.query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 1000000)) TO STDOUT"), "Hd")
        case "in a statement":
            connection.exchange(build.query("INSERT INTO play.c SELECT n FROM generate_series(1, 5) n, pg_sleep(0.5)"), "")
        case "in a transaction":
            connection.exchange(build.query("BEGIN; INSERT INTO play.c VALUES (1)"), "Z")
    connection.vanish()
    deadline = time.monotonic() + PATIENCE
    while stage18.proxy.call(lambda: stage18.proxy.server.clients):
        assert time.monotonic() < deadline, "the proxy keeps the session"
        time.sleep(0.01)
    while connection.pid and scene.admin.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (connection.pid,)).fetchone():
        assert time.monotonic() < deadline, "the backend stays"
        time.sleep(0.01)
    # A statement that was sent whole is done, as it would be directly; nothing else is.
    expected = 5 if doing == "in a statement" else 0
    assert scene.admin.execute("SELECT count(*) FROM play.c").fetchone() == (expected,)


def test_kerberos_encryption_is_not_offered(stage: Stage) -> None:
    """Whatever the server would answer: nobody in between could read what follows."""
    connection = Connection(stage.proxied)
    assert connection.one_byte(build.gssenc_request()) == b"N"
    assert connection.one_byte(build.ssl_request()) == b"N"
    frames = connection.exchange(stage.scene.startup() + build.query("SELECT 1"), "ZZ")
    assert frames[-2].payload == b"SELECT 1\0"
    connection.close()
