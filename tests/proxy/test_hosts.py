"""An upstream of several hosts: which of them new sessions go to, before and after a failover."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from proxy.embedded import Cluster
from proxy.upstream import Login, SessionAttributes, Upstream
from tests.fix_postgres import free_port
from tests.proxy.proxies import RunningProxy, running_proxy
from tests.proxy.standby import demote, pair, promote, with_password
from tests.proxy.test_adversity import eventually

SCRAM = ["local all all trust", "host all all 127.0.0.1/32 scram-sha-256"]


@pytest.fixture(scope="module")
def still() -> Iterator[tuple[Cluster, Cluster]]:
    """A primary and a standby that stay what they are."""
    with pair() as clusters:
        yield clusters


def upstream(attributes: str, *clusters: Cluster, login: str = "postgres@") -> str:
    hosts = ",".join(f"127.0.0.1:{c.port}" for c in clusters)
    return f"postgresql://{login}{hosts}/postgres?target_session_attrs={attributes}"


def where(proxy: RunningProxy, user: str = "postgres") -> int:
    """The port of the server that a new session comes to."""
    with psycopg.connect(f"postgresql://{user}@127.0.0.1:{proxy.port}/postgres") as c:
        row = c.execute("SHOW port").fetchone()
    assert row is not None
    return int(row[0])


def test_attributes_are_parsed() -> None:
    parsed = Upstream.parse("postgresql://me:p%40ss@a,b/db?target_session_attrs=prefer-standby")
    assert parsed.wanted is SessionAttributes.PREFER_STANDBY
    assert parsed.login == Login("me", "db", "p@ss")
    assert "p@ss" not in repr(parsed)
    assert Upstream.parse("host=a,b").wanted is SessionAttributes.ANY
    assert Upstream.parse("host=a user=me").login == Login("me", "me")
    with pytest.raises(ValueError, match="target_session_attrs"):
        Upstream.parse("postgresql://a?target_session_attrs=secret")


@pytest.mark.parametrize("order", [0, 1], ids=["primary first", "standby first"])
@pytest.mark.parametrize("login", ["postgres@", ""], ids=["with a login", "without"])
@pytest.mark.parametrize(
    ("attributes", "expected"),
    [("any", "first"), ("read-write", "primary"), ("primary", "primary"), ("standby", "standby"), ("read-only", "standby"),
     ("prefer-standby", "standby")],
)
def test_each_kind_of_session(
    still: tuple[Cluster, Cluster], attributes: str, expected: str, order: int, login: str
) -> None:
    primary, standby = still
    clusters = (primary, standby) if order == 0 else (standby, primary)
    wanted = {"first": clusters[0], "primary": primary, "standby": standby}[expected]
    with running_proxy(upstream(attributes, *clusters, login=login)) as proxy:
        if not login and wanted is not clusters[0]:
            if attributes in ("prefer-standby", "read-only"):  # taken as they come, and known from then on
                assert where(proxy) == clusters[0].port
            else:
                with pytest.raises(psycopg.OperationalError, match="Connect again"):
                    where(proxy)
        assert [where(proxy) for _ in range(3)] == [wanted.port] * 3


def test_no_host_will_do(still: tuple[Cluster, Cluster]) -> None:
    _, standby = still
    nobody = free_port()
    dsn = f"postgresql://postgres@127.0.0.1:{nobody},127.0.0.1:{standby.port}/postgres?target_session_attrs=read-write"
    with running_proxy(dsn) as proxy, pytest.raises(psycopg.OperationalError) as caught:
        where(proxy)
    assert "no host of the upstream is read-write" in str(caught.value)
    assert f"127.0.0.1:{standby.port}: a standby" in str(caught.value)
    assert f"127.0.0.1:{nobody}: " in str(caught.value)


def test_one_host_is_not_chosen_but_judged(still: tuple[Cluster, Cluster]) -> None:
    _, standby = still
    with running_proxy(upstream("read-write", standby)) as proxy, pytest.raises(psycopg.OperationalError, match="standby"):
        where(proxy)


def test_a_role_may_be_read_only(still: tuple[Cluster, Cluster]) -> None:
    primary, standby = still
    with running_proxy(upstream("read-write", standby, primary)) as proxy:
        dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?options=-cdefault_transaction_read_only%3Don"
        with psycopg.connect(dsn) as c:
            assert c.execute("SHOW transaction_read_only").fetchone() == ("on",)
            assert c.execute("SHOW port").fetchone() == (str(primary.port),)


def test_a_primary_whose_transactions_are_read_only_is_passed_over(still: tuple[Cluster, Cluster]) -> None:
    primary, standby = still
    with running_proxy(upstream("read-write", primary, standby)) as proxy:
        with psycopg.connect(primary.dsn(), autocommit=True) as c:
            c.execute("ALTER ROLE postgres SET default_transaction_read_only = on")
        try:
            with pytest.raises(psycopg.OperationalError, match="a primary whose transactions are read-only"):
                where(proxy)
        finally:
            with psycopg.connect(primary.dsn(), autocommit=True) as c:
                c.execute("SET default_transaction_read_only = off")
                c.execute("ALTER ROLE postgres RESET default_transaction_read_only")
        eventually(lambda: succeeds(proxy))


def succeeds(proxy: RunningProxy, user: str = "postgres") -> bool:
    try:
        where(proxy, user)
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("kind", ["trust", "scram"])
def test_a_promotion_is_followed(kind: str) -> None:
    """The primary dies, the standby is promoted; later the old primary comes back as a standby, and they change again."""
    with pair(SCRAM if kind == "scram" else None) as (one, two):
        with_password(one, two, "ann", "s3cret")
        user = "ann:s3cret" if kind == "scram" else "ann"
        with running_proxy(upstream("read-write", one, two, login=user + "@")) as proxy:
            assert where(proxy, user) == one.port
            with psycopg.connect(f"postgresql://{user}@127.0.0.1:{proxy.port}/postgres") as old:
                one.stop("immediate")
                with pytest.raises(psycopg.OperationalError):
                    old.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError, match="no host of the upstream is read-write"):
                where(proxy, user)
            promote(two)
            # `promote` returns when the server takes writes; whoever connects from then on gets there.
            assert where(proxy, user) == two.port

        # The old primary is back, as a standby that stands first: nobody is sent there.
        with running_proxy(upstream("read-write", one, two, login=user + "@")) as proxy:
            demote(one, two)
            eventually(lambda: succeeds(proxy, user))
            assert {where(proxy, user) for _ in range(5)} == {two.port}


def test_a_session_on_a_standby_reports_its_promotion() -> None:
    with pair() as (one, two), running_proxy(upstream("primary", one, two, login="")) as proxy:
        assert where(proxy) == one.port
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres", autocommit=True):
            one.stop("immediate")
        with pytest.raises(psycopg.OperationalError, match="Connect again"):
            where(proxy)  # the only host left is a standby
        promote(two)
        # Without a login of its own the proxy has to send somebody there to find out.
        eventually(lambda: succeeds(proxy))
        assert where(proxy) == two.port
