"""Which addresses are ever connected to: every spelling, generated URLs, names that resolve to what they should not."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import httpcore
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engine.http import network
from engine.http.client import HttpClient
from engine.http.errors import BlockedError, HttpError
from engine.http.names import HostError, normalise
from engine.http.policy import Address, HostList, HttpPolicy, is_public
from engine.http.transport import GuardedTransport
from engine.http.url import parse, redact
from tests.engine.fix_http_server import http_server
from tests.engine.test_http_client import call, failure

ANY = HttpPolicy()

#: Ways to write 127.0.0.1 and its like in a URL; none may lead anywhere.
SPELLINGS = [
    "127.0.0.1", "127.0.0.1.", "127.1", "127.0.1", "0x7f.0.0.1", "0x7f.1", "0X7F.1", "0177.0.0.1", "0177.1", "00000177.0.0.1",
    "2130706433", "0x7f000001", "017700000001", "0x0000007f000001", "127.0x0.0.01", "0", "0.0.0.0", "0x", "0x0", "127.255.255.254",
    "１２７.０.０.１", "①②⑦.⓪.⓪.①", "127。0。0。1", "127．0．0．1", "127｡0｡0｡1", "２１３０７０６４３３", "𝟏𝟐𝟕.𝟎.𝟎.𝟏",
    "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::FFFF:10.0.0.1]",
    "[0:0:0:0:0:ffff:a9fe:a9fe]", "[64:ff9b::127.0.0.1]", "[64:ff9b::8.8.8.8]", "[64:ff9b:1::1]", "[2002:7f00:1::]",
    "[2002:808:808::1]", "[2001::1]", "[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "[fe80::1]", "[fe80::1%25eth0]", "[fe80::1%eth0]",
    "[fe80::1%1]", "[::1%25lo]", "[fec0::1]", "[fc00::1]", "[fd12:3456::1]", "[ff02::1]", "[ff0e::1]", "[100::1]", "[2001:db8::1]",
    "[3fff::1]", "[5f00::1]", "[4000::1]", "[::ffff:0:127.0.0.1]",
    "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1",
    "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "0xa9fea9fe", "2852039166", "0251.0376.0251.0376", "169.254.43518",
    "localhost", "LOCALHOST", "localhost.", "ⓛocalhost", "ｌｏｃａｌｈｏｓｔ", "lo%63alhost", "127%2e0%2e0%2e1", "%31%32%37.0.0.1",
    "user@127.0.0.1", "user:pw@127.0.0.1", "8.8.8.8@127.0.0.1", "127.0.0.1@8.8.8.8", "8.8.8.8\\@127.0.0.1", "8.8.8.8\\.127.0.0.1",
    "127.0.0.1\\", "127.0.0.1\t", "127.0.0.1\r\nHost: x", "127.0.0.1\x00.example.com", "exam\nple.com", " 127.0.0.1", "127.0.0.1 ",
    "127 .0.0.1", "[127.0.0.1]", "[::1", "::1", "1.2.3.4.5", "256.256.256.256", "1.2.3.256", "0xg.1", "08.1.1.1", "4294967296",
    "1..2", ".127.0.0.1", "127.0.0.1..", "", "-", "a_b..c", "xn--", "a" * 64, "\u200b127.0.0.1", "127.0.0.1\u00ad", "⑴27.0.0.1",
    "127.0.0.1:80:80", "127.0.0.1:0x50", "8.8.8.8:99999", "8.8.8.8:-1", "8.8.8.8:8 0",
]


async def connects_to(url: str, policy: HttpPolicy, answers: dict[str, list[Address]] | None,
                      monkeypatch: pytest.MonkeyPatch) -> tuple[list[Address], Exception | None]:
    """The addresses that a call tries to connect to (it gets nowhere), and how it ends."""
    tried: list[Address] = []

    async def connect(address: Address, port: int) -> socket.socket:
        tried.append(address)
        raise ConnectionRefusedError

    async def resolve(host: str) -> list[Address]:
        await asyncio.sleep(0)
        if answers is None:
            return [ipaddress.ip_address(i[4][0]) for i in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        return answers.get(host, [])

    with monkeypatch.context() as patch:
        patch.setattr(network, "_connect", connect)
        client = HttpClient(policy, transport=GuardedTransport(policy, resolve=resolve))
        try:
            await call(client, url)
        except HttpError as e:
            return tried, e
        finally:
            await client.aclose()
    return tried, None


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_spellings_that_lead_nowhere(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "HTTPS"):
        tried, error = await connects_to(f"{scheme}://{spelling}/latest/meta-data", ANY, None, monkeypatch)
        assert tried == []
        assert isinstance(error, BlockedError), error
        assert error.sqlstate == "42501"


@pytest.mark.parametrize(("text", "address"), [
    ("8.8.8.8", "8.8.8.8"), ("8.8.8.8.", "8.8.8.8"), ("0x8.8.2056", "8.8.8.8"), ("134744072", "8.8.8.8"), ("010.8.8.8", "8.8.8.8"),
    ("[2606:4700:4700::1111]", "2606:4700:4700::1111"), ("[::ffff:8.8.8.8]", "8.8.8.8"), ("８.８.８.８", "8.8.8.8")])
async def test_public_addresses_in_any_spelling(text: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, _ = await connects_to(f"http://{text}/", ANY, None, monkeypatch)
    assert [str(network.unmapped(a)) for a in tried] == [address]


@pytest.mark.parametrize("url", ["ftp://8.8.8.8/", "file:///etc/passwd", "gopher://8.8.8.8/", "8.8.8.8/x", "//8.8.8.8/", "http:8.8.8.8",
                                 "http:/8.8.8.8/", "http:///x", "http://", "javascript:alert(1)", "unix:///run/x", ""])
async def test_what_is_no_http_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, error = await connects_to(url, ANY, None, monkeypatch)
    assert tried == []
    assert isinstance(error, BlockedError)


#: An oracle of its own: Python's tables, and what they lack.
_ODD = [ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/23", "192.88.99.0/24", "3fff::/20")]


def harmless(address: Address) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    return address.is_global and not address.is_multicast and not address.is_reserved and not any(
        address.version == n.version and address in n for n in _ODD)


edges = [ipaddress.ip_address(a) for a in (
    "9.255.255.255", "10.0.0.0", "11.0.0.0", "100.63.255.255", "100.64.0.0", "126.255.255.255", "128.0.0.0", "169.254.169.254",
    "172.15.255.255", "172.16.0.0", "172.32.0.0", "192.167.255.255", "192.169.0.0", "223.255.255.255", "224.0.0.0", "::", "::1",
    "::ffff:0:0", "1fff:ffff::", "2000::", "2001:1ff:ffff::", "2001:200::", "2003::", "2606:4700::1111", "4000::", "fd00::1")]
addresses: st.SearchStrategy[Address] = st.one_of(
    st.sampled_from(edges), st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address), st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address),
    st.integers(0, 2**32 - 1).map(lambda n: ipaddress.IPv6Address(0xFFFF_0000_0000 + n)),
    st.integers(0, 2**32 - 1).map(lambda n: ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) + n)),
    st.integers(0, 2**32 - 1).map(lambda n: ipaddress.IPv6Address((0x2002 << 112) + (n << 80) + 1)),
    st.integers(0, 2**125 - 1).map(lambda n: ipaddress.IPv6Address((1 << 125) + n)))


@given(addresses)
@hypothesis_settings(max_examples=500, deadline=None)
def test_no_public_address_is_anything_else(address: Address) -> None:
    if is_public(address):
        assert harmless(address)


def spell(number: int, style: tuple[int, int, int]) -> str:
    """An IPv4 address in one of its many spellings."""
    count, base, wide = style
    parts = [number >> 8 * (3 - i) & 255 for i in range(count - 1)]
    parts.append(number & 256 ** (5 - count) - 1)
    text = ".".join({0: str(p), 1: f"0x{p:x}", 2: f"0{p:o}"}[(base + i) % 3 if base == 3 else base] for i, p in enumerate(parts))
    return text.translate({ord(c): chr(ord(c) + 0xFEE0) for c in "0123456789"}) if wide and "x" not in text else text


spelled = st.tuples(st.integers(0, 2**32 - 1) | st.sampled_from([0x7F000001, 0x0A000001, 0xA9FEA9FE, 0xC0A80101]),
                    st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 1)))


@given(spelled)
@hypothesis_settings(max_examples=500, deadline=None)
def test_every_spelling_of_an_address_is_that_address(case: tuple[int, tuple[int, int, int]]) -> None:
    number, style = case
    assert normalise(spell(number, style)) == ipaddress.IPv4Address(number)


hosts = st.one_of(
    spelled.map(lambda c: spell(*c)), addresses.map(lambda a: f"[{a}]" if a.version == 6 else str(a)),
    st.sampled_from(["inside.example", "outside.example", "mixed.example", "a.b.c.", "ÄÖ.example"]),
    st.text(min_size=0, max_size=12), st.text("0123456789.xabcdef[]:%@\\/?#。", max_size=20))
urls = st.builds(lambda s, u, h, p, r: f"{s}://{u}{h}{p}{r}", st.sampled_from(["http", "https", "hTTp"]),
                 st.sampled_from(["", "", "", "u@", "u:p@", "8.8.8.8@"]), hosts, st.sampled_from(["", ":80", ":1", ":", ":0x50"]),
                 st.text("/?#@:\\abc%. ", max_size=8))
#: And some that lead somewhere, so that policies have something to decide.
urls |= st.sampled_from(["inside.example", "outside.example", "other.test", "8.8.8.8", "[2606:4700::1111]", "10.0.0.1", "[fd00::1]"]).map(
    lambda host: f"http://{host}/")
public = st.sampled_from(["8.8.8.8", "9.1.2.3", "93.184.216.34", "2606:4700::1111", "10.0.0.1"]).map(ipaddress.ip_address)
answers = st.fixed_dictionaries({name: st.lists(public | addresses, max_size=3) for name in (
    "inside.example", "outside.example", "mixed.example", "other.test", "a.b.c", "xn--4ca0b.example")})


entries = st.lists(st.sampled_from(["*", "inside.example", "*.example", "10.0.0.0/8", "127.0.0.1", "::1", "fd00::/8", "8.0.0.0/7"]),
                   max_size=3)


def listed(entries: list[str], host: str | Address, address: Address) -> tuple[bool, bool]:
    """Whether a list covers a host by a name, and an address by a network."""
    nets = [ipaddress.ip_network(e) for e in entries if e != "*" and "example" not in e]
    named = "*" in entries or (isinstance(host, str) and any(host == e or (e[0] == "*" and host.endswith(e[1:])) for e in entries))
    return named, any(address.version == n.version and address in n for n in nets)


def test_whatever_is_connected_to_is_allowed() -> None:
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        @given(urls, answers, st.just([]) | entries, st.just([]) | entries)
        @hypothesis_settings(max_examples=400, deadline=None)
        @example("http://8.8.8.8\\@127.0.0.1/", {}, [], [])
        @example("http://127.0.0.1#@8.8.8.8/", {}, [], [])
        @example("http://8.8.8.8?@127.0.0.1/", {}, [], [])
        @example("http://mixed.example/", {"mixed.example": [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("8.8.8.8")]}, [], [])
        @example("http://mixed.example/", {"mixed.example": [ipaddress.ip_address("10.0.0.1")]}, ["*"], [])
        @example("http://inside.example/", {"inside.example": [ipaddress.ip_address("10.0.0.1")]}, ["10.0.0.0/8"], ["*.example"])
        def check(url: str, answers: dict[str, list[Address]], allow: list[str], deny: list[str]) -> None:
            policy = HttpPolicy(allow=HostList.parse(allow), deny=HostList.parse(deny))
            tried, error = runner.run(connects_to(url, policy, answers, patch))
            assert isinstance(error, HttpError)
            for address in tried:
                # It is what the parsed URL says, public or listed as a network, and not denied in either way.
                host = parse(url).host
                expected = answers.get(host, []) if isinstance(host, str) else [host]
                assert address in {network.unmapped(a) for a in expected}
                named, in_network = listed(allow, host, address)
                assert in_network or (harmless(address) and (named or not allow))
                assert listed(deny, host, address) == (False, False)

        check()


async def test_a_name_that_changes_its_mind() -> None:
    """The resolver answers with an allowed address first, and with the server's own afterwards."""
    async with http_server() as server:
        asked = 0

        async def rebinding(host: str) -> list[Address]:
            nonlocal asked
            asked += 1
            return [ipaddress.ip_address("127.0.0.9" if asked == 1 else "127.0.0.1")]

        # 127.0.0.9 stands for what is public; nobody answers there.
        policy = HttpPolicy(allow=HostList.parse(["127.0.0.9"]))
        client = HttpClient(policy, transport=GuardedTransport(policy, resolve=rebinding))
        error = await failure(client, server.url("/echo", "rebind.example"))
        assert asked == 1  # what was checked is what is connected to: nobody asks again
        assert error.sqlstate == "HTCON"
        for _ in range(3):
            assert isinstance(await failure(client, server.url("/echo", "rebind.example")), BlockedError)
        assert server.connections == 0
        await client.aclose()


async def test_refused_answers_are_left_out_and_the_next_is_tried() -> None:
    async with http_server() as server:
        answers = ["10.0.0.1", "127.0.0.2", "127.0.0.1"]

        async def resolve(host: str) -> list[Address]:
            return [ipaddress.ip_address(a) for a in answers]

        policy = HttpPolicy(allow=HostList.parse(["127.0.0.0/8"]))
        client = HttpClient(policy, transport=GuardedTransport(policy, resolve=resolve))
        # Nobody listens on 127.0.0.2.
        assert (await call(client, server.url("/echo", "several.example")))["status"] == 200
        assert server.requests[0].headers["host"] == f"several.example:{server.port}"
        await client.aclose()


async def test_names_that_can_t_be_resolved() -> None:
    async def resolve(host: str) -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    client = HttpClient(ANY, transport=GuardedTransport(ANY, resolve=resolve))
    error = await failure(client, "http://nowhere.example/?a=b")
    assert str(error) == ("HTTP connection failed: http://nowhere.example/?a=*** - 'nowhere.example' can't be resolved: "
                          "Name or service not known")
    await client.aclose()


RULES: list[tuple[dict[str, Any], str, list[str], str | None]] = [
    # policy, host, its addresses, what is refused (None: it is connected to the last address)
    ({}, "public.example", ["8.8.8.8"], None),
    ({}, "private.example", ["10.0.0.1"], "restricted range"),
    ({"allow": ["api.example"]}, "api.example", ["8.8.8.8"], None),
    ({"allow": ["API.example."]}, "api.example", ["8.8.8.8"], None),
    ({"allow": ["api.example"]}, "other.example", ["8.8.8.8"], "not in the allowed endpoint list"),
    ({"allow": ["api.example"]}, "api.example", ["10.0.0.1"], "restricted range"),
    ({"allow": ["api.example"]}, "xapi.example", ["8.8.8.8"], "not in the allowed endpoint list"),
    ({"allow": ["*.example"]}, "a.b.example", ["8.8.8.8"], None),
    ({"allow": ["*.example"]}, "example", ["8.8.8.8"], "not in the allowed endpoint list"),
    ({"allow": ["*.example"]}, "badexample", ["8.8.8.8"], "not in the allowed endpoint list"),
    ({"allow": ["bücher.example"]}, "xn--bcher-kva.example", ["8.8.8.8"], None),
    ({"allow": ["api.example"]}, "8.8.8.8", [], "not in the allowed endpoint list"),
    ({"allow": ["8.8.8.8"]}, "8.8.8.8", [], None),
    ({"allow": ["8.8.0.0/16"]}, "134744072", [], None),
    ({"allow": ["10.0.0.0/8"]}, "private.example", ["10.1.2.3"], None),
    ({"allow": ["10.0.0.0/8"]}, "[::ffff:10.0.0.1]", [], None),
    ({"allow": ["10.0.0.0/8"]}, "public.example", ["8.8.8.8"], "not in the allowed endpoint list"),
    ({"allow": ["10.0.0.0/8"]}, "private.example", ["192.168.0.1"], "restricted range"),
    ({"allow": ["*", "10.0.0.0/8"]}, "public.example", ["8.8.8.8"], None),
    ({"allow": ["*", "10.0.0.0/8"]}, "private.example", ["10.1.2.3"], None),
    ({"allow": ["*"]}, "private.example", ["10.1.2.3"], "restricted range"),
    ({"allow": ["*"]}, "8.8.8.8", [], None),
    ({"allow": ["fd00::/8"]}, "[fd00::1]", [], None),
    ({"allow": ["64:ff9b::/96", "*"]}, "nat.example", ["64:ff9b::808:808"], None),
    ({"allow": ["64:ff9b::/96", "*"]}, "nat.example", ["64:ff9b::7f00:1"], "restricted range"),
    ({"deny": ["bad.example"]}, "bad.example", ["8.8.8.8"], "denied by the setting http_deny"),
    ({"deny": ["*.example"]}, "bad.example", ["8.8.8.8"], "denied by the setting http_deny"),
    ({"deny": ["8.0.0.0/8"]}, "public.example", ["8.8.8.8"], "denied by the setting http_deny"),
    ({"deny": ["8.0.0.0/8"]}, "[::ffff:8.8.8.8]", [], "denied by the setting http_deny"),
    ({"deny": ["8.0.0.0/8"], "allow": ["8.8.8.8"]}, "8.8.8.8", [], "denied by the setting http_deny"),
    ({"deny": ["10.0.0.0/24"], "allow": ["10.0.0.0/8"]}, "in.example", ["10.0.0.7", "10.0.1.7"], None),
    ({"deny": ["*"]}, "8.8.8.8", [], "denied by the setting http_deny"),
]


@pytest.mark.parametrize(("lists", "host", "found", "refused"), RULES)
async def test_rules(lists: dict[str, list[str]], host: str, found: list[str], refused: str | None,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    policy = HttpPolicy(**{name: HostList.parse(entries) for name, entries in lists.items()})
    answers = {str(parse(f"http://{host}").host): [ipaddress.ip_address(a) for a in found]}
    tried, error = await connects_to(f"http://{host}/", policy, answers, monkeypatch)
    if refused is None:
        assert len(tried) == 1
        assert not isinstance(error, BlockedError)
    else:
        assert tried == []
        assert refused in str(error)


async def test_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, error = await connects_to("http://8.8.8.8/", HttpPolicy(enabled=False), None, monkeypatch)
    assert (tried, str(error)) == ([], "Blocked: outbound HTTP requests are disabled.")
    tried, error = await connects_to("http://8.8.8.8/", HttpPolicy(allow_plain=False), None, monkeypatch)
    assert (tried, str(error)) == ([], "Blocked: plain http is not allowed here. Use https.")
    tried, error = await connects_to("https://8.8.8.8/", HttpPolicy(allow_plain=False), None, monkeypatch)
    assert len(tried) == 1


async def test_the_transport_judges_by_itself() -> None:
    """Whoever uses it without the client's checks gets no further."""
    import httpx
    transport = GuardedTransport(ANY)
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        for url in ("http://127.0.0.1:1/", "http://2130706433/", "http://localhost/", "http://[::1]/"):
            with pytest.raises((BlockedError, httpcore.ConnectError)) as caught:
                await client.get(url)
            assert isinstance(caught.value, BlockedError)


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "a b", "", "*.", "**", "a.*", "http://x", "x:80", "10.0.0.0/33", "0x7f.1"])
def test_entries_that_say_nothing(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is not a|write addresses plainly") as caught:
        HostList.parse([entry])
    assert repr(entry) in str(caught.value)


@given(st.text(max_size=30))
@hypothesis_settings(max_examples=300, deadline=None)
def test_normalising_twice_changes_nothing(text: str) -> None:
    try:
        once = normalise(text)
    except HostError:
        return
    if isinstance(once, str):
        assert normalise(once) == once
        assert once.isascii()


@pytest.mark.parametrize(("url", "shown"), [
    ("https://u:p@h.example/a/b?k=v&l&m=#frag", "https://h.example/a/b?k=***&***&m=***"),
    ("https://h.example", "https://h.example"),
    ("https://h.example/secretvalue/x?secretvalue=1", "https://h.example/***/x?secretvalue=***"),
    ("no url ?token=x", "no url ?token=***"),
    ("https://a@b@c/", "https://c/"),
    ("http://x/\r\ny", "http://x/ y"),
])
def test_how_urls_are_shown(url: str, shown: str) -> None:
    assert redact(url, ["secretvalue", "x"]) == shown
