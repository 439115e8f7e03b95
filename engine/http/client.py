"""Makes calls: bounded in number, in time and in size. One client per worker."""

from __future__ import annotations

import asyncio
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
from engine.http.masking import NOTHING, Mask
from engine.http.policy import HttpPolicy
from engine.http.request import Call, build
from engine.http.template import size
from engine.http.transport import GuardedTransport

#: Work on more than this many bytes or characters is done in a thread.
THREAD_SIZE = 256 * 1024
_LONGEST_REASON = 300
#: Pieces of a body taken in one go.
_PARTS = 50


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
                      hidden: Iterable[str] = (), shown: str | None = None, mask: Mask = NOTHING) -> Call:
        """The call of a config (see `dsl.graph.Node.http`), checked as far as that can be done without calling.

        `hidden`, `shown`: how its URL is to be shown, see `template.Filled`; `mask` for all else that is said of it.
        Raises HttpError.
        """
        def work() -> Call:
            return build(config, multipart=multipart, policy=self.policy, idempotency_key=idempotency_key,
                         agent=self._agent, hidden=hidden, shown=shown, mask=mask)

        with mask:
            if size(config) > THREAD_SIZE:
                return await asyncio.to_thread(work)
            return work()

    @asynccontextmanager
    async def slot(self, call: Call) -> AsyncIterator[bool]:
        """A place among the parallel calls; yields whether it had to be waited for.

        Whoever waits for a busy host takes no place from others.
        """
        key = (call.target.host_text, call.target.port)
        queue = self._hosts.get(key)
        if queue is None:
            queue = self._hosts[key] = _Queue(self.policy.max_parallel_per_host)
        queue.users += 1
        waits = queue.places.locked() or self._all.locked()
        try:
            async with queue.places, self._all:
                yield waits
        finally:
            queue.users -= 1
            if not queue.users:
                del self._hosts[key]

    async def perform(self, call: Call) -> str:
        """Makes the call; returns the envelope. To be used within a `slot`.

        Raises HttpError for transport errors and for answers of 500 or more. Cancellation aborts the call.
        """
        with call.mask:
            answer = await self._exchange(call)
            if answer.status >= 500:
                raise HttpError(f"{call.kind} {call.request.method} {call.shown} returned {answer.status}: "
                                f"{excerpt(answer, call.mask)}", f"HT{min(answer.status, 999)}")
        if len(answer.content) > THREAD_SIZE:
            return await asyncio.to_thread(envelope, answer)
        return envelope(answer)

    async def _exchange(self, call: Call) -> Answer:
        shown = call.shown
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
            raise HttpError(f"HTTP request failed: {shown} - {_reason(e, call.mask)}", EXCHANGE) from e
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
        count = 0
        async with aclosing(stream) as parts:
            async for part in parts:
                # A small part may hold a lot, and many parts may come at once: others have their turn.
                count += 1
                if count % _PARTS == 0:
                    await asyncio.sleep(0)
                for _ in decoder.feed(part):
                    await asyncio.sleep(0)
        for _ in decoder.end():
            await asyncio.sleep(0)
        return decoder.content


def _reason(error: Exception, mask: Mask) -> str:
    """A library's words, which may quote what the server sent: masked before they are cut."""
    text = mask.text(str(error))
    if not any(map(str.isalpha, text)):  # h2 names a stream by its number alone
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


class _Queue:
    """The places of one host, and how many use or want one."""

    __slots__ = ("places", "users")

    def __init__(self, places: int) -> None:
        self.places = asyncio.Semaphore(places)
        self.users = 0
