"""Makes calls: bounded in number, in time and in size. One client per worker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import httpcore
import httpx
from h2.exceptions import H2Error

from engine.http.decoding import BodyDecoder, CorruptError, TooLargeError
from engine.http.envelope import Answer, envelope, excerpt, join_headers
from engine.http.errors import CONNECTION, EXCHANGE, TIMEOUT, TOO_LARGE, HttpError
from engine.http.policy import HttpPolicy
from engine.http.request import Call, build
from engine.http.transport import GuardedTransport
from engine.http.url import MASK, redact, spellings

#: Work on more than this many bytes is done in a thread.
_THREAD_BYTES = 256 * 1024


class HttpClient:
    """Performs HTTP steps under one policy."""

    def __init__(self, policy: HttpPolicy, *, agent: str = "dfproxy",
                 transport: GuardedTransport | None = None) -> None:
        self.policy = policy
        self._agent = agent
        self._transport = transport or GuardedTransport(policy)
        self._all = asyncio.Semaphore(policy.max_parallel)
        self._hosts: dict[tuple[str, int], _Queue] = {}

    async def aclose(self) -> None:
        """Drops all connections."""
        await self._transport.aclose()

    async def prepare(self, config: Mapping[str, Any], *, multipart: bool, idempotency_key: str,
                      secrets: Iterable[str] = ()) -> Call:
        """The call of a config (see `dsl.graph.Node.http`), checked as far as that can be done without calling.

        Raises HttpError.
        """
        def work() -> Call:
            return build(config, multipart=multipart, policy=self.policy, idempotency_key=idempotency_key,
                         agent=self._agent)

        with masked(secrets):
            if _size(config) > _THREAD_BYTES:
                return await asyncio.to_thread(work)
            return work()

    @asynccontextmanager
    async def slot(self, call: Call) -> AsyncIterator[None]:
        """A place among the parallel calls. Whoever waits for a busy host takes no place from others."""
        key = (call.target.host_text, call.target.port)
        queue = self._hosts.get(key)
        if queue is None:
            queue = self._hosts[key] = _Queue(self.policy.max_parallel_per_host)
        queue.users += 1
        try:
            async with queue.places, self._all:
                yield
        finally:
            queue.users -= 1
            if not queue.users:
                del self._hosts[key]

    async def perform(self, call: Call, *, hidden: Iterable[str] = (), secrets: Iterable[str] = ()) -> str:
        """Makes the call; returns the envelope. To be used within a `slot`.

        `hidden`: values not to be shown in the path of a URL; `secrets`: in no text at all. Raises HttpError for
        transport errors and for answers of 500 or more. Cancellation aborts the call.
        """
        secrets = tuple(secrets)
        shown = redact(str(call.request.url), (*hidden, *secrets))
        with masked(secrets):
            answer = await self._exchange(call, shown)
            if answer.status >= 500:
                raise HttpError(f"{call.kind} {call.request.method} {shown} returned {answer.status}: "
                                f"{excerpt(answer)}", f"HT{min(answer.status, 999)}")
        if len(answer.content) > _THREAD_BYTES:
            return await asyncio.to_thread(envelope, answer)
        return envelope(answer)

    async def _exchange(self, call: Call, shown: str) -> Answer:
        try:
            async with asyncio.timeout(call.timeout) as limit:
                return await self._send(call)
        except TimeoutError as e:
            if not limit.expired():
                raise HttpError(f"HTTP request failed: {shown} - {e}", EXCHANGE) from e
            raise HttpError(f"HTTP timeout after {call.timeout:g}s: {shown}", TIMEOUT) from None
        except httpcore.ConnectError as e:
            raise HttpError(f"HTTP connection failed: {shown} - {e}", CONNECTION) from e
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ConnectionNotAvailable, H2Error, OSError,
                ValueError) as e:
            # ValueError: a library's word for what a server should not have said.
            reason = str(e) or type(e).__name__
            raise HttpError(f"HTTP request failed: {shown} - {reason}", EXCHANGE) from e
        except TooLargeError:
            raise HttpError(f"HTTP request failed: {shown} - the response body has more than http_max_response_bytes "
                            f"({self.policy.max_response_bytes})", TOO_LARGE) from None
        except CorruptError as e:
            raise HttpError(f"HTTP request failed: {shown} - the response body is not valid {e}", EXCHANGE) from None

    async def _send(self, call: Call) -> Answer:
        began = time.monotonic()
        response = await self._transport.handle_async_request(call.request)
        try:
            content = await self._read(call, response)
        finally:
            await response.aclose()
        headers = join_headers(response.headers.raw)
        return Answer(response.status_code, headers, content, round((time.monotonic() - began) * 1000))

    async def _read(self, call: Call, response: httpx.Response) -> bytes:
        limit = self.policy.max_response_bytes
        length = response.headers.get("content-length", "")
        if call.request.method != "HEAD" and length.isdecimal() and int(length[:20]) > limit:
            raise TooLargeError
        encodings = response.headers.get("content-encoding", "").lower().split(",")
        decoder = BodyDecoder([e.strip() for e in encodings if e.strip()], limit)
        stream = cast("AsyncGenerator[bytes]", aiter(cast("httpx.AsyncByteStream", response.stream)))
        async with aclosing(stream) as parts:
            async for part in parts:
                decoder.feed(part)
        return decoder.end()


class _Queue:
    """The places of one host, and how many use or want one."""

    __slots__ = ("places", "users")

    def __init__(self, places: int) -> None:
        self.places = asyncio.Semaphore(places)
        self.users = 0


class masked:
    """Within it, no HttpError shows one of these values."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({s for s in secrets if s}, key=len, reverse=True)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, HttpError) or not self._secrets:
            return
        text = str(error)
        for secret in self._secrets:
            quoted = json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]
            for spelling in (*spellings(secret), *quoted):
                text = text.replace(spelling, MASK)
        error.args = (text,)


def _size(config: Mapping[str, Any]) -> int:
    parts = config.get("parts") or ()
    return len(config.get("body") or "") + sum(len(p["data_b64"]) for p in parts)
