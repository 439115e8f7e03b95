"""HTTP calls against a real server that misbehaves: what comes back, what fails and how, what is bounded."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from engine.http import transport
from engine.http.client import HttpClient
from engine.http.errors import HttpError
from engine.http.masking import Mask
from engine.http.policy import HostList, HttpPolicy
from engine.http.transport import GuardedTransport
from tests.engine.fix_http_server import HttpServer, http_server, make_certificate
from tests.engine.helpers import until

LOOPBACK = HostList.parse(["127.0.0.0/8", "::1"])


@asynccontextmanager
async def serving(**policy: Any) -> AsyncIterator[tuple[HttpServer, HttpClient]]:
    async with http_server() as server:
        client = HttpClient(HttpPolicy(**{"allow": LOOPBACK, **policy}))
        try:
            yield server, client
        finally:
            await client.aclose()


async def call(client: HttpClient, url: str, method: str = "GET", *, body: str | None = None,
               headers: dict[str, Any] | None = None, timeout: float | None = 10, parts: list[dict[str, Any]] | None = None,
               key: str = "i-n-1", secrets: tuple[str, ...] = (), hidden: tuple[str, ...] = (),
               shown: str | None = None) -> dict[str, Any]:
    """One call; its envelope."""
    config: dict[str, Any] = {"url": url, "method": method, "headers": headers, "timeout_seconds": timeout}
    config |= {"body": body} if parts is None else {"parts": parts}
    ready = await client.prepare(config, multipart=parts is not None, idempotency_key=key, hidden=hidden, shown=shown,
                                 mask=Mask(secrets))
    async with client.slot(ready):
        envelope: dict[str, Any] = json.loads(await client.perform(ready))
        return envelope


async def failure(client: HttpClient, url: str, *args: Any, **named: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        await call(client, url, *args, **named)
    return caught.value


async def test_the_envelope() -> None:
    async with serving() as (server, client):
        ready = await client.prepare({"url": server.url("/body?type=text/plain"), "method": "POST", "body": "grüße"},
                                     multipart=False, idempotency_key="k")
        async with client.slot(ready):
            text = await client.perform(ready)
        assert list(json.loads(text)) == ["status", "body", "encoding", "headers", "ok", "duration_ms"]
        found = json.loads(text)
        assert isinstance(found.pop("duration_ms"), int)
        assert found == {"status": 200, "body": "grüße", "encoding": "text", "ok": True,
                         "headers": {"content-type": "text/plain", "content-length": "7"}}
        assert '"body":"grüße","encoding"' in text


@pytest.mark.parametrize("status", [200, 201, 299, 300, 302, 400, 404, 418, 429, 499])
async def test_up_to_499_completes(status: int) -> None:
    async with serving() as (server, client):
        found = await call(client, server.url(f"/status/{status}?body=x"))
        assert (found["status"], found["ok"], found["body"]) == (status, 200 <= status < 300, "x")


@pytest.mark.parametrize("status", [500, 503, 599])
async def test_from_500_on_it_fails(status: int) -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url(f"/status/{status}?body=broken"), "POST")
        assert str(error) == f"HTTP POST {server.url(f'/status/{status}?body=***')} returned {status}: broken"
        assert error.sqlstate == f"HT{status}"


async def test_the_excerpt_of_a_failure_is_cut_between_characters() -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url("/status/500?body=" + "%C3%A9" * 300))
        assert str(error).endswith("returned 500: " + "é" * 256 + "... [truncated, 600 bytes total]")
        error = await failure(client, server.url("/status/500?body=" + "x" * 512))
        assert str(error).endswith("returned 500: " + "x" * 512)


async def test_requests_as_they_are_sent() -> None:
    async with serving() as (server, client):
        await call(client, server.url("/echo/../echo?a=b%20c&d=ü#part"), "PUT", body='{"a":1}',
                   headers={"X-Text": "t", "X-Number": Decimal("1.50"), "X-Big": 10**30, "X-Bool": True, "User-Agent": "me"})
        await call(client, server.url("/echo"), "GET", body="not json")
        await call(client, server.url("/echo"), "POST", headers={"idempotency-key": "mine", "content-type": "x/y"}, body="1")
        await call(client, server.url("/echo"), "HEAD")
        await call(client, server.url("/echo"), "OPTIONS")
        put, get, post, head, options = server.requests
        assert put.target == "/echo?a=b%20c&d=%C3%BC"
        assert put.body == b'{"a":1}'
        expected = {"host": f"127.0.0.1:{server.port}", "x-text": "t", "x-number": "1.50", "x-big": "1" + "0" * 30, "x-bool": "true", "user-agent": "me",
                    "content-type": "application/json", "content-length": "7", "idempotency-key": "i-n-1", "accept": "*/*",
                    "accept-encoding": "gzip, deflate, br"}
        assert put.headers == expected
        assert (get.body, get.headers["content-length"], "content-type" in get.headers) == (b"not json", "8", False)
        assert get.headers["user-agent"] == "dfproxy"
        assert (post.headers["idempotency-key"], post.headers["content-type"]) == ("mine", "x/y")
        assert (head.method, options.method) == ("HEAD", "OPTIONS")


@pytest.mark.parametrize(("headers", "message"), [
    ({"Host": "x"}, "header 'Host' cannot be set"),
    ({"content-LENGTH": "1"}, "header 'content-LENGTH' cannot be set"),
    ({"Transfer-Encoding": "chunked"}, "header 'Transfer-Encoding' cannot be set"),
    ({"Connection": "upgrade"}, "header 'Connection' cannot be set"),
    ({"Expect": "100-continue"}, "header 'Expect' cannot be set"),
    ({"X": ["a"]}, "the value of header 'X' must be a string, a number or a boolean"),
    ({"X": None}, "the value of header 'X' must be a string, a number or a boolean"),
    ({"X y": "a"}, "header name 'X y' is not valid"),
    ({"X:": "a"}, "header name 'X:' is not valid"),
    ({"": "a"}, "header name '' is not valid"),
    ({"X": "a\r\nY: b"}, "the value of header 'X' has a control character"),
    ({"X": "a\x00"}, "the value of header 'X' has a control character"),
    ({"X": "\ud800"}, "the value of header 'X' has half of a surrogate pair"),
])
async def test_headers_that_are_refused(headers: dict[str, Any], message: str) -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url("/echo"), headers=headers)
        assert (str(error), error.sqlstate) == (f"HTTP request failed: {message}", "22023")
        assert server.connections == 0


async def test_no_redirects_no_cookies_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    for name, value in {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9",
                        "NETRC": str(netrc)}.items():
        monkeypatch.setenv(name, value)
    async with serving() as (server, client):
        found = await call(client, server.url("/redirect"))
        assert (found["status"], found["headers"]["location"]) == (302, "/echo")
        found = await call(client, server.url("/cookie"))
        assert found["headers"]["set-cookie"] == "a=1; Path=/, b=2"
        assert found["headers"]["x-one"] == "1, 2"
        await call(client, server.url("/echo"))
        assert [r.path for r in server.requests] == ["/redirect", "/cookie", "/echo"]
        assert not {"cookie", "authorization"} & set(server.requests[-1].headers)
        assert server.connections == 1  # and it was kept


HEX_CASES = [
    ("", "616263", ("abc", "text")),
    ("text/plain", "e4", ("\ufffd", "text")),
    ("text/plain; charset=iso-8859-1", "e4", ("ä", "text")),
    ('text/html;charset="UTF-16LE"', "41004200", ("AB", "text")),
    ("text/plain; charset=shift_jis", "93fa967b", ("日本", "text")),
    ("text/plain; charset=rot13", "61", ("a", "text")),
    ("text/plain; charset=idna", "61", ("a", "text")),
    ("text/plain; charset=nonsense", "c3a4", ("ä", "text")),
    ("application/problem+json", "7b7d", ("{}", "text")),
    ("image/svg+xml", "3c", ("<", "text")),
    ("application/json", "ff", ("\ufffd", "text")),
    ("application/octet-stream", "616263", ("abc", "text")),
    ("application/octet-stream", "610062", (base64.b64encode(b"a\0b").decode(), "base64")),
    ("image/png", "89504e47ff", (base64.b64encode(b"\x89PNG\xff").decode(), "base64")),
    ("", "ff00", ("/wA=", "base64")),
    ("text/plain", "6100", ("YQA=", "base64")),
    ("text/plain; charset=utf-16be", "00410000", ("AEEAAA==", "base64")),
    ("application/json", "efbbbf7b7d", ("{}", "text")),
    ("", "efbbbf7b7d", ("{}", "text")),
    ("text/plain; charset=utf-7", "2b3241412d", ("+2AA-", "text")),
    ("text/plain; charset=koi8-u", "c1", ("а", "text")),
]


@pytest.mark.parametrize(("kind", "content", "expected"), HEX_CASES)
async def test_bodies_as_text_or_base64(kind: str, content: str, expected: tuple[str, str]) -> None:
    async with serving() as (server, client):
        found = await call(client, server.url("/hex?" + f"hex={content}&type=" + kind.replace(";", "%3B").replace("+", "%2B")))
        assert (found["body"], found["encoding"]) == expected


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "raw", "members", "identity", "gzip, br", "deflate,gzip"])
async def test_content_encodings(encoding: str) -> None:
    async with serving() as (server, client):
        found = await call(client, server.url(f"/encoded?n=300000&encoding={encoding}"))
        assert found["body"] == "a" * 300_000


async def test_an_unknown_content_encoding_is_left_alone() -> None:
    async with serving() as (server, client):
        found = await call(client, server.url("/encoded?n=5&encoding=zstd"))
        assert (found["body"], found["headers"]["content-encoding"]) == ("aaaaa", "zstd")


@pytest.mark.parametrize("encoding", ["corrupt", "cut"])
async def test_content_that_is_not_what_it_says(encoding: str) -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url(f"/encoded?n=50&encoding={encoding}"))
        assert str(error).endswith(" - the response body is not valid gzip")
        assert error.sqlstate == "HTREQ"


@pytest.mark.parametrize("path", [
    "/encoded?n=50000000&encoding=gzip", "/encoded?n=50000000&encoding=br", "/encoded?n=50000000&encoding=deflate",
    "/encoded?n=50000000&encoding=gzip,gzip,gzip", "/encoded?n=100001&encoding=identity", "/endless"])
async def test_responses_are_bounded_on_the_wire_and_unpacked(path: str) -> None:
    async with serving(max_response_bytes=100_000) as (server, client):
        error = await failure(client, server.url(path))
        assert str(error).endswith(" - the response body has more than http_max_response_bytes (100000)")
        assert error.sqlstate == "54000"
        found = await call(client, server.url("/encoded?n=100000&encoding=br"))
        assert len(found["body"]) == 100_000


async def test_requests_are_bounded() -> None:
    async with serving(max_request_bytes=1000) as (server, client):
        error = await failure(client, server.url("/echo"), "POST", body="ä" * 501)
        assert str(error) == "HTTP request failed: the request body has 1002 bytes, more than http_max_request_bytes (1000)"
        parts = [{"name": "a", "data_b64": base64.b64encode(b"x" * 900).decode()}]
        assert (await failure(client, server.url("/echo"), "POST", parts=parts)).sqlstate == "54000"
        await call(client, server.url("/echo"), "POST", body="x" * 1000)
        assert server.connections == 1


@pytest.mark.parametrize("path", ["/slow-headers", "/slow-body", "/hang", "/drip"])
async def test_the_timeout_is_for_the_whole_exchange(path: str) -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url(path + "?token=secret"), timeout=0.3)
        assert str(error) == f"HTTP timeout after 0.3s: {server.url(path + '?token=***')}"
        assert error.sqlstate == "HTTMO"
        await until(lambda: server.live == 0)  # the connection went with it


async def test_timeouts_are_cut_to_the_longest() -> None:
    async with serving(max_timeout=0.2) as (server, client):
        assert str(await failure(client, server.url("/hang"), timeout=100)).startswith("HTTP timeout after 0.2s: ")


FAULTS = {
    "/reset": "HTTP request failed: {} - ",
    "/close": "HTTP request failed: {} - Server disconnected without sending a response.",
    "/truncated": "HTTP request failed: {} - peer closed connection without sending complete message body (incomplete chunked read)",
    "/short": "HTTP request failed: {} - peer closed connection without sending complete message body "
              "(received 5 bytes, expected 10)",
    "/reset-in-body": "HTTP request failed: {} - ",
    "/switch": "HTTP request failed: {} - Received server _SWITCH_UPGRADE event without a pending proposal",
    "/rubbish": "HTTP request failed: {} - ",
    "/many-headers": "HTTP request failed: {} - ",
}


@pytest.mark.parametrize("path", FAULTS)
async def test_transport_faults(path: str) -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url(path))
        assert str(error).startswith(FAULTS[path].format(server.url(path)))
        assert error.sqlstate == "HTREQ"
        assert len(server.requests) == 1  # a fresh connection: nothing is tried again behind one's back
        assert (await call(client, server.url("/echo")))["status"] == 200


async def test_connections_that_can_t_be_had() -> None:
    async with serving() as (server, client):
        port = server.port
        error = await failure(client, "http://127.0.0.1:1/x?k=v")
        assert str(error) == "HTTP connection failed: http://127.0.0.1:1/x?k=*** - Connection refused"
        assert error.sqlstate == "HTCON"
    assert port


async def test_unusual_but_right() -> None:
    async with serving() as (server, client):
        assert (await call(client, server.url("/continue"), "POST", body="x"))["status"] == 200
        assert (await call(client, server.url("/until-close")))["body"] == "to the end"
        found = await call(client, server.url("/no-content-with-body"))
        assert (found["status"], found["body"]) == (204, "")
        assert (await call(client, server.url("/echo")))["status"] == 200
        assert (await call(client, server.url("/long")))["body"] == "hello"
        assert (await call(client, server.url("/echo")))["status"] == 200


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced() -> None:
    async with serving() as (server, client):
        assert (await call(client, server.url("/stale"), "POST"))["body"] == "fresh"
        assert (await call(client, server.url("/echo"), "POST"))["status"] == 200
        assert server.connections == 2
        assert (await call(client, server.url("/timeout-notice")))["body"] == "fresh"
        server.open.set()
        [[kept]] = client._transport._idle.values()
        await until(lambda: not kept.reusable)
        assert (await call(client, server.url("/echo")))["status"] == 200


async def test_connections_are_kept_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (server, client):
        monkeypatch.setattr(transport, "MAX_USES", 3)
        for _ in range(4):
            await call(client, server.url("/echo"))
        assert server.connections == 2
        monkeypatch.setattr(transport, "MAX_IDLE", 1)
        await asyncio.gather(*(call(client, server.url("/latency")) for _ in range(3)))
        assert client._transport.open_connections == 1
    async with serving() as (server, client):
        monkeypatch.setattr(transport, "KEEP", 0.05)
        await call(client, server.url("/echo"))
        # Nobody calls any more.
        await until(lambda: server.live == 0)
        assert client._transport.open_connections == 0


async def test_bodies_are_sent_in_the_charset_that_they_declare() -> None:
    async with serving() as (server, client):
        for charset, sent in {"iso-8859-1": b"\xe4", "UTF-16LE": b"\xe4\0", "utf-8": b"\xc3\xa4", "nonsense": b"\xc3\xa4"}.items():
            found = await call(client, server.url(f"/body?type=text/plain%3Bcharset={charset}"), "POST", body="ä",
                               headers={"content-type": f"text/plain; charset={charset}"})
            assert server.requests[-1].body == sent
            assert found["body"] == "ä"
        error = await failure(client, server.url("/body"), "POST", body="1 €", headers={"Content-Type": "text/plain; charset=latin1"})
        assert str(error) == "HTTP request failed: the body has a character that the charset of its Content-Type does not have: U+20AC"
        assert error.sqlstate == "22023"


async def test_headers_are_bounded() -> None:
    async with serving() as (server, client):
        error = await failure(client, server.url("/echo"), headers={"X": "v" * 200_000})
        assert str(error) == "HTTP request failed: the headers have 200001 characters, more than 131072"
        assert error.sqlstate == "54000"
        assert server.connections == 0


async def test_cancelling_aborts_the_call_and_leaves_nothing_behind() -> None:
    async with serving(max_parallel=2, max_parallel_per_host=2) as (server, client):
        files = len(os.listdir("/proc/self/fd"))
        for path in ["/hang", "/slow-body", "/slow-headers", "/drip"] * 5:
            before = server.gone
            task = asyncio.create_task(call(client, server.url(path), "POST", body="x" * 100_000))
            await until(lambda path=path: server.requests and server.requests[-1].path == path and server.parallel)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda before=before: server.gone > before)
        assert client._transport.open_connections == 0
        await until(lambda: len(os.listdir("/proc/self/fd")) <= files)
        # The places were given back too.
        assert (await call(client, server.url("/echo")))["status"] == 200


async def test_parallel_calls_are_limited_in_total_and_per_host() -> None:
    async with http_server() as one, http_server() as two:
        client = HttpClient(HttpPolicy(allow=LOOPBACK, max_parallel=5, max_parallel_per_host=3))
        tasks = [asyncio.create_task(call(client, s.url("/gate"))) for s in (one, two) for _ in range(10)]
        await until(lambda: one.parallel + two.parallel == 5)
        await asyncio.sleep(0.1)
        # Those of `one` who wait for their host do not keep those of `two` out.
        assert (one.parallel, two.parallel) == (3, 2)
        one.open.set()
        two.open.set()
        await asyncio.gather(*tasks)
        assert max(one.most_parallel, two.most_parallel) <= 3
        assert client._hosts == {}
        await client.aclose()


async def test_multipart() -> None:
    async with serving() as (server, client):
        parts = [{"name": "file", "filename": 'a "b"\r\nc.txt', "content_type": "text/csv; charset=utf-8",
                  "data_b64": " aGVs\nbG8= "},
                 {"name": "plain", "data_b64": ""},
                 {"name": "größe", "filename": "x.bin", "data_b64": "/w==", "ignored": 1}]
        for _ in range(2):
            await call(client, server.url("/echo"), "POST", parts=parts, headers={"CONTENT-TYPE": "x/y", "X-A": "b"})
        first, second = server.requests
        assert first == second  # an attempt is like the other, to the byte
        kind = first.headers["content-type"]
        assert kind.startswith("multipart/form-data; boundary=")
        boundary = kind.partition("boundary=")[2]
        assert first.headers["x-a"] == "b"
        assert first.body.decode("latin-1") == (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a %22b%22%0D%0Ac.txt"\r\n'
            "Content-Type: text/csv; charset=utf-8\r\n\r\nhello\r\n"
            f'--{boundary}\r\nContent-Disposition: form-data; name="plain"\r\n\r\n\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="{"größe".encode().decode("latin-1")}"; filename="x.bin"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n\xff\r\n"
            f"--{boundary}--\r\n")


@pytest.mark.parametrize(("part", "message"), [
    ({"name": "a", "data_b64": "x"}, "Invalid base64 in part 'a': "),
    ({"name": "a", "data_b64": "a-_b"}, "Invalid base64 in part 'a': "),
    ({"name": "a", "data_b64": "ä"}, "Invalid base64 in part 'a': not ASCII"),
    ({"name": "a", "data_b64": "", "content_type": "no type"}, "Invalid content_type for part 'a': not a media type"),
    ({"name": "a", "data_b64": "", "content_type": "a/b\r\nX: y"}, "Invalid content_type for part 'a': not a media type"),
])
async def test_parts_that_are_refused(part: dict[str, Any], message: str) -> None:
    async with serving() as (server, client):
        assert str(await failure(client, server.url("/echo"), "POST", parts=[part])).startswith(message)
        error = await failure(client, server.url("/echo"), "GET", parts=[{"name": "a", "data_b64": ""}])
        assert str(error) == "Invalid HTTP method for multipart: GET. Must be POST, PUT, or PATCH"
        error = await failure(client, server.url("/echo"), "TRACE")
        assert str(error) == "Invalid HTTP method: TRACE. Must be GET, POST, PUT, DELETE, or PATCH"


@pytest.mark.parametrize("target", [
    "/status/500?body=leak:to%22k/en", "/status/500?body=TO%22K/EN+to%5C%22k/en", "/reset/to%22k/en", "/close?x=to%22k/en", "http://127.0.0.1:1/to\"k/en",
    "http://127.0.0.1:1/to%22k%2Fen", "to\"k/en://x", "http://a b/to\"k/en"])
async def test_what_is_secret_is_in_no_text(target: str) -> None:
    async with serving() as (server, client):
        url = server.url(target) if target.startswith("/") else target
        if target.startswith("/reset"):
            url = server.url("/reset?") + target
        error = await failure(client, url, secrets=('to"k/en', "other"), headers={"A": 'to"k/en'})
        assert "k/en" not in str(error).lower()
        assert "k%2fen" not in str(error).lower()


async def test_http2_and_sni(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "api.example.test", "127.0.0.1")

    async def resolve(host: str) -> list[Any]:
        from ipaddress import ip_address
        return [ip_address("127.0.0.1")]

    async with http_server(tls=certificate.server_context("h2", "http/1.1")) as server:
        policy = HttpPolicy(allow=LOOPBACK, ca_file=certificate.file)
        client = HttpClient(policy, transport=GuardedTransport(policy, resolve=resolve))
        found = json.loads((await call(client, server.url("/echo", "api.example.test"), "POST", body="{}"))["body"])
        assert found["headers"][":authority"] == f"api.example.test:{server.port}"
        assert found["headers"]["idempotency-key"] == "i-n-1"
        assert found["body"] == "{}"
        assert server.protocols == ["h2"]
        assert server.server_names == ["api.example.test"]
        await call(client, server.url("/echo", "api.example.test"))
        assert server.connections == 1
        # More than the windows of both sides hold.
        body = "x" * 2_000_000
        found = json.loads((await call(client, server.url("/echo", "api.example.test"), "POST", body=body))["body"])
        assert found["body"] == body
        # A call that is aborted takes its connection with it, and no other call.
        hanging = asyncio.create_task(call(client, server.url("/hang", "api.example.test")))
        await until(lambda: server.requests[-1].path == "/hang")
        other = await call(client, server.url("/echo", "api.example.test"))
        assert other["status"] == 200
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        await until(lambda: server.gone == 1)
        assert (await failure(client, server.url("/status/502", "api.example.test"))).sqlstate == "HT502"
        for path in ("/reset", "/goaway"):
            assert (await failure(client, server.url(path, "api.example.test"))).sqlstate == "HTREQ"
        assert (await call(client, server.url("/echo", "api.example.test")))["status"] == 200
        # The name counts for the certificate, whatever the address.
        error = await failure(client, server.url("/echo", "other.example.test"))
        assert "certificate verify failed: Hostname mismatch" in str(error)
        assert error.sqlstate == "HTCON"
        await client.aclose()
        strict = HttpClient(HttpPolicy(allow=LOOPBACK))
        error = await failure(strict, server.url("/echo"))
        assert "certificate verify failed: self-signed certificate" in str(error)
        await strict.aclose()
    async with http_server(tls=certificate.server_context()) as server:
        client = HttpClient(policy)
        assert (await call(client, server.url("/echo")))["status"] == 200
        assert server.protocols == [None]
        assert server.requests[0].version == "1.1"
        await client.aclose()
