"""Servers that mean harm, or nothing at all: whatever they send, a call ends with an answer or an HttpError, in bounds."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import brotli
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engine.http import client as client_module
from engine.http import decoding
from engine.http.client import HttpClient
from engine.http.decoding import BodyDecoder, CorruptError, TooLargeError
from engine.http.errors import HttpError
from engine.http.policy import HttpPolicy
from tests.engine.fix_http_server import HttpServer, http_server, make_certificate
from tests.engine.test_http_client import LOOPBACK, call

LIMIT = 100_000


class Talk:
    """A client and a server that answers with given bytes, on a loop of their own: hypothesis' tests are not async."""

    def __init__(self, runner: asyncio.Runner, server: HttpServer, client: HttpClient) -> None:
        self._runner = runner
        self._server = server
        self._client = client

    def about(self, raw: bytes, method: str = "GET") -> dict[str, Any] | HttpError:
        """What becomes of a call that is answered so."""
        self._server.raw = raw
        try:
            found = self._runner.run(call(self._client, self._server.url("/raw"), method, timeout=10))
        except HttpError as e:
            return e
        assert len(found["body"]) <= 3 * LIMIT
        assert 200 <= found["status"] < 500
        assert "\0" not in json.dumps(found, ensure_ascii=False)
        return found


@contextmanager
def talking(tls: Path | None = None) -> Iterator[Talk]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def begin() -> tuple[HttpServer, HttpClient]:
            certificate = make_certificate(tls, "127.0.0.1") if tls is not None else None
            server = await stack.enter_async_context(
                http_server(tls=certificate.server_context("h2") if certificate else None))
            client = HttpClient(HttpPolicy(allow=LOOPBACK, max_response_bytes=LIMIT,
                                           ca_file=certificate.file if certificate else None))
            stack.push_async_callback(client.aclose)
            return server, client

        talk = Talk(runner, *runner.run(begin()))
        try:
            yield talk
        finally:
            runner.run(stack.aclose())


HEADERS = st.sampled_from([
    b"Content-Length: 5", b"Content-Length: 5, 6", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 0",
    b"Content-Length: " + b"9" * 40, b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked",
    b"Content-Encoding: gzip", b"Content-Encoding: br", b"Content-Encoding: deflate, br", b"Content-Encoding: ,,", b"Content-Type: \xff\xfe",
    b"Content-Type: text/plain; charset=utf-16", b'Content-Type: text/x;charset="', b"Content-Type: text/x; charset=utf-7", b"X: \x00",
    b": x", b" folded", b"Connection: close", b"Connection: upgrade", b"X: " + b"v" * 2000])
STATUS = st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No", b"HTTP/1.1 304 No", b"HTTP/1.1 100 Go on",
                          b"HTTP/1.1 101 Switch", b"HTTP/1.1 099 x", b"HTTP/1.1 1000 x", b"HTTP/1.1 599", b"HTTP/1.1 999 x", b"HTTP/2.0 200 OK", b""])
BODY = st.sampled_from([b"hello", b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"fffffffffffffffff\r\n", b"-1\r\n", b"5;x=y\r\nhello\r\n",
                        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", gzip.compress(b"x" * 200_000), gzip.compress(b"hello"), b"\xd8\x00" * 3,
                        b"+2AA-", b"\x00", brotli.compress(b"hello"), b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
ANSWERS = st.builds(
    lambda heads, body: b"".join(b"".join(line + b"\r\n" for line in [status, *headers]) + b"\r\n" for status, headers in heads) + body,
    st.lists(st.tuples(STATUS, st.lists(HEADERS, max_size=4)), min_size=1, max_size=3), st.lists(BODY, max_size=4).map(b"".join))


def test_whatever_is_answered_in_http_1() -> None:
    with talking() as talk:
        @given(ANSWERS | st.binary(max_size=60), st.sampled_from(["GET", "POST", "HEAD"]))
        @hypothesis_settings(max_examples=300, deadline=None)
        @example(b"HTTP/1.1 200 OK\r\nX: " + b"v" * 200_000, "GET")
        def check(raw: bytes, method: str) -> None:
            found = talk.about(raw, method)
            assert isinstance(found, dict) or len(str(found)) < 1000

        check()
        found = talk.about(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        assert isinstance(found, dict)
        assert found["body"] == "ok"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


#: HPACK by hand: status 200, then this and that.
BLOCKS = [b"\x88", b"\x88\x5f\x0atext/plain", b"\x8e", b"\x08\x03abc", b"\x08\x03100", b"\x08\x03204", b"\x08\x049999", b"\x88\x5c\x015", b"\x88\x5c\x01x",
          b"\x88\x5a\x04gzip", b"\x88\x00\x06X-Caps\x01a", b"\x88\x00\x01a\x03b\x00c", b"\x88\x00\x0aconnection\x05close", b"\x5f\x0atext/plain", b"\x88\x88"]
FRAMES = st.one_of(
    st.builds(frame, st.just(1), st.sampled_from([4, 5, 0, 0x2D]), st.sampled_from([1, 1, 1, 3, 0]), st.sampled_from(BLOCKS)),
    st.builds(frame, st.just(0), st.sampled_from([0, 1, 8, 9]), st.sampled_from([1, 1, 1, 3, 0]), st.sampled_from([b"", b"hello", b"\x03abc\0\0\0", b"x" * 16384])),
    st.builds(frame, st.just(3), st.just(0), st.just(1), st.integers(0, 14).map(lambda n: n.to_bytes(4, "big"))),
    st.builds(frame, st.just(4), st.sampled_from([0, 0, 1]), st.just(0), st.sampled_from([b"", b"\0\4\0\0\0\0", b"\0\5\0\xff\xff\xff", b"\0\1\0\0\0\0", b"\0\4\xff\xff\xff\xff"])),
    st.builds(frame, st.just(6), st.sampled_from([0, 1]), st.just(0), st.just(b"12345678")),
    st.builds(frame, st.just(7), st.just(0), st.just(0), st.sampled_from([b"\0\0\0\1\0\0\0\0", b"\0\0\0\0\0\0\0\2", b"\0\0\0\5\0\0\0\0debug"])),
    st.builds(frame, st.just(8), st.just(0), st.sampled_from([0, 1]), st.sampled_from([b"\0\0\0\1", b"\0\0\0\0", b"\x7f\xff\xff\xff"])),
    st.builds(frame, st.integers(0, 255), st.integers(0, 255), st.integers(0, 4), st.binary(max_size=20)), st.binary(max_size=12))


def test_whatever_is_answered_in_http_2(tmp_path: Path) -> None:
    with talking(tmp_path) as talk:
        @given(st.lists(FRAMES, max_size=5).map(b"".join), st.sampled_from(["GET", "POST", "HEAD"]))
        @hypothesis_settings(max_examples=150, deadline=None)
        def check(raw: bytes, method: str) -> None:
            talk.about(raw, method)

        check()


def test_an_answer_counts_though_the_connection_ends_with_it(tmp_path: Path) -> None:
    head, data = frame(1, 4, 1, b"\x88"), frame(0, 1, 1, b"hello")
    with talking(tmp_path) as talk:
        for raw in (head + data, head + data + frame(7, 0, 0, b"\0\0\0\1\0\0\0\0"), frame(6, 0, 0, b"12345678") + head + data,
                    head + data + frame(3, 0, 1, b"\0\0\0\0")):
            found = talk.about(raw)
            assert isinstance(found, dict), found
            assert (found["status"], found["body"]) == (200, "hello")
        found = talk.about(head)
        assert isinstance(found, HttpError)
        assert found.sqlstate == "HTREQ"


async def test_a_body_in_crumbs_lets_others_have_their_turn() -> None:
    async with http_server() as server:
        server.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 9000 + b"0\r\n\r\n"
        client = HttpClient(HttpPolicy(allow=LOOPBACK))
        task = asyncio.create_task(call(client, server.url("/raw")))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert task.result()["body"] == "x" * 9000
        assert turns > 9000 // client_module._PARTS
        await client.aclose()


# -- decoding -----------------------------------------------------------------------------------------------------------


def decoded(encodings: list[str], *pieces: bytes, limit: int = LIMIT) -> bytes:
    decoder = BodyDecoder(encodings, limit)
    for piece in pieces:
        for _ in decoder.feed(piece):
            pass
    for _ in decoder.end():
        pass
    return decoder.content


ENCODERS = {"gzip": gzip.compress, "br": lambda data: brotli.compress(data, quality=4), "deflate": zlib.compress, "identity": bytes}


@given(st.binary(max_size=3000), st.lists(st.sampled_from(sorted(ENCODERS)), max_size=3), st.lists(st.integers(0, 4000), max_size=5))
@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_was_encoded_is_decoded_however_it_is_cut(content: bytes, encodings: list[str], cuts: list[int]) -> None:
    encoded = content
    for name in encodings:
        encoded = ENCODERS[name](encoded)
    places = sorted({0, len(encoded), *(cut % (len(encoded) + 1) for cut in cuts)})
    assert decoded(encodings, *(encoded[a:b] for a, b in pairwise(places))) == content


@given(st.binary(max_size=200), st.lists(st.sampled_from(sorted(ENCODERS)), max_size=3))
@hypothesis_settings(max_examples=200, deadline=None)
def test_what_was_not_encoded_is_refused(content: bytes, encodings: list[str]) -> None:
    with suppress(CorruptError, TooLargeError):
        decoded(encodings, content)


@pytest.mark.parametrize("name", ["gzip", "br", "deflate"])
def test_a_bomb_comes_out_in_small_pieces_and_stops_at_the_limit(name: str) -> None:
    decoder = BodyDecoder([name], 4 * 2**20)
    before = 0
    with pytest.raises(TooLargeError):
        for _ in decoder.feed(ENCODERS[name](b"\0" * 2**25)):
            size = len(decoder.content)
            assert size - before <= decoding._STEP + 2**20  # brotli rounds up
            before = size
    assert 2**20 <= before <= 4 * 2**20


def test_what_lies_between_two_encodings_is_bounded_too() -> None:
    """Empty blocks: they unpack to nothing, and take their time."""
    empty = b"\0\0\0\xff\xff" * 40_000
    outer = zlib.compress(b"\x78\x01" + empty)
    assert len(outer) < 2000
    with pytest.raises(TooLargeError):
        decoded(["deflate", "deflate"], outer)


def test_the_members_of_a_gzip_file_are_counted() -> None:
    assert decoded(["gzip"], gzip.compress(b"a") * 100) == b"a" * 100
    with pytest.raises(TooLargeError):
        decoded(["gzip"], gzip.compress(b"") * 4800)
