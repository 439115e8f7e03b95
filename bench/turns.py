"""Counts round trips from in between: a relay that notes how often a client speaks after the server has answered."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter as Tally
from typing import Any

_NAME = re.compile(rb"application_name\0([^\0]*)\0")


class Counter:
    """A relay to a port of this machine, on a loop of its own in a thread, inside `with`."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._upstream = port
        self._tally: Tally[str] = Tally()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def turns(self, name: str) -> int:
        """Round trips of the sessions with this application_name, the log-in not counted."""
        return self._tally[name]

    def __enter__(self) -> Counter:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, server = await asyncio.open_connection("127.0.0.1", self._upstream)
        state: dict[str, Any] = {"name": "", "turn": False, "ready": False}
        await asyncio.gather(self._pump(reader, server, state, up=True), self._pump(upstream, writer, state, up=False))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, state: dict[str, Any], *,
                    up: bool) -> None:
        while data := await source.read(65536):
            if up:
                if not state["name"] and (found := _NAME.search(data)):
                    state["name"] = found[1].decode()
                if state["ready"] and state["turn"] and data[:1] != b"X":
                    self._tally[state["name"]] += 1
            elif b"Z\0\0\0\5" in data:
                state["ready"] = True  # logged in
            state["turn"] = not up  # the next word of the client is a new round trip if the server has spoken
            target.write(data)
            await target.drain()
        target.close()
