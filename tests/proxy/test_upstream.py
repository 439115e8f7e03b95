"""Where a connection string says that the server is, and how the proxy gets there."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import psycopg
import pytest

from proxy.relay import Leg
from proxy.upstream import Address, DialError, Upstream
from tests.fix_postgres import Database, free_port
from tests.proxy.proxies import running_proxy


@pytest.mark.parametrize(
    ("dsn", "addresses"),
    [
        ("postgresql://db.example", [Address("db.example")]),
        ("postgres://ann:p%40ss@db.example:6543/app?sslmode=disable", [Address("db.example", 6543)]),
        ("postgresql://ann:pa:ss@word@h/app", [Address("h")]),
        ("postgresql://[::1]:6543,[fe80::1]/app", [Address("::1", 6543), Address("fe80::1")]),
        ("postgresql://a:1,b,c:3/app", [Address("a", 1), Address("b"), Address("c", 3)]),
        ("postgresql:///app?host=/run/pg&port=6000", [Address("/run/pg", 6000)]),
        ("postgresql://%2Frun%2Fpg/app", [Address("/run/pg")]),
        ("postgresql://ann@/app?host=/a,/b&port=1,2", [Address("/a", 1), Address("/b", 2)]),
        ("postgresql:///app?host=a,b&port=7", [Address("a", 7), Address("b", 7)]),
        ("postgresql://h?hostaddr=10.0.0.1", [Address("10.0.0.1")]),
        ("host=a,b port=1,2 user=ann", [Address("a", 1), Address("b", 2)]),
        (r"host = '/a b' password='it\'s' port=7", [Address("/a b", 7)]),
        ("host=h password=a\\ b", [Address("h")]),
    ],
)
def test_parse(dsn: str, addresses: list[Address]) -> None:
    assert list(Upstream.parse(dsn).addresses) == addresses


def test_parse_agrees_with_libpq(subtests: pytest.Subtests) -> None:
    for dsn in (
        "postgresql://ann:secret@a:1,b:2/app?connect_timeout=3", "postgresql://[::1]:7/x", "host=a,b port=1,2",
        "postgresql://%2Frun%2Fpg:7/x", "postgresql:///x?host=/run/pg", "host='a' port = 7", "postgresql://a,b:2/x",
    ):
        with subtests.test(dsn):
            known = psycopg.conninfo.conninfo_to_dict(dsn)
            hosts = str(known["host"]).split(",")
            ports = str(known.get("port", "")).split(",")
            ports = ports * len(hosts) if len(ports) == 1 else ports
            assert [(a.host, a.port) for a in Upstream.parse(dsn).addresses] == [
                (host, int(port or 5432)) for host, port in zip(hosts, ports, strict=True)
            ]


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://h:secret/app", "postgresql://h:0", "postgresql://h:70000", "secret", "host=a port=1,2", "postgresql://[::1",
     "postgresql://h?sslmode=secret", "postgresql://h?connect_timeout=secret", "host='secret"],
)
def test_what_cannot_be_used_is_refused_without_being_quoted(dsn: str) -> None:
    with pytest.raises(ValueError) as caught:
        Upstream.parse(dsn)
    assert "secret" not in str(caught.value)


def test_connect_timeout() -> None:
    assert Upstream.parse("postgresql://h?connect_timeout=7").connect_timeout == 7
    assert Upstream.parse("postgresql://h?connect_timeout=1").connect_timeout == 2  # as in libpq
    assert Upstream.parse("postgresql://h?connect_timeout=0").connect_timeout == 10


def test_socket_paths() -> None:
    assert Address("/run/pg", 6000).socket_path == "/run/pg/.s.PGSQL.6000"
    assert Address("@abstract").socket_path == "\0abstract/.s.PGSQL.5432"
    assert str(Address("::1", 7)) == "[::1]:7"


async def test_dial_says_what_was_tried(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(DialError) as caught:
        await Upstream((Address("127.0.0.1", port), Address(str(tmp_path)))).dial(Leg)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert f"{tmp_path}/.s.PGSQL.5432" in str(caught.value)


async def test_dial_gives_up_on_a_host_that_does_not_answer() -> None:
    with socket.socket() as s:  # a backlog that is full: connections are neither taken nor refused
        s.bind(("127.0.0.1", 0))
        s.listen(0)
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(s.getsockname())
            fillers.append(filler)
        await asyncio.sleep(0.1)
        with pytest.raises(DialError, match="no answer within"):
            await Upstream((Address(*s.getsockname()),), connect_timeout=0.3).dial(Leg)
        for filler in fillers:
            filler.close()


def test_unix_socket_upstream(database: Database) -> None:
    cluster = database.cluster
    with running_proxy(f"postgresql:///?host={cluster.socket_dir}&port={cluster.port}") as proxy:
        with psycopg.connect(proxy.dsn(database)) as c:
            assert c.execute("SELECT inet_client_addr()").fetchone() == (None,)
        c = psycopg.connect(proxy.dsn(database))
        c.cancel_safe()
        c.close()


def test_several_hosts_the_first_that_answers(database18: Database) -> None:
    upstream = f"postgresql://127.0.0.1:{free_port()},127.0.0.1:{database18.cluster.port}/"
    with running_proxy(upstream) as proxy, psycopg.connect(proxy.dsn(database18)) as c:
        assert c.execute("SELECT 1").fetchone() == (1,)


def test_a_server_that_is_not_there_is_named() -> None:
    port = free_port()
    with running_proxy(f"postgresql://127.0.0.1:{port}/") as proxy:
        with pytest.raises(psycopg.OperationalError) as caught:
            psycopg.connect(f"postgresql://ann@127.0.0.1:{proxy.port}/app")
        assert f"can't reach PostgreSQL: 127.0.0.1:{port}" in str(caught.value)
        assert "upstream" in str(caught.value)
