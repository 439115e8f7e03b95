"""The session with which a worker asks for work.

It hears what it has asked for before that is committed, and may get ready meanwhile: a commit takes as long as the disk
does, and what is claimed is mostly there to be begun at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.connection import StepConnection
from proxy.wire import build

__all__ = ["ControlConnection"]

_SYNC = build.sync()
#: The server sends what it has, and only then commits.
_TELL_AND_COMMIT = build.describe_portal("") + build.execute("") + build.flush() + _SYNC


class ControlConnection(StepConnection):
    """A session that asks prepared questions, each a transaction of its own. Not for concurrent use."""

    async def prepare(self, name: str, sql: str, types: Sequence[int]) -> None:
        """Prepares a question; `types` are OIDs of its parameters. Raises ServerError, ConnectionLostError."""
        exchange = await self._exchange([build.parse(name, sql, types), _SYNC])
        if exchange.error is not None:
            raise exchange.error

    async def ask(self, name: str, parameters: Sequence[str]) -> tuple[list[list[bytes | None]], asyncio.Future[None]]:
        """The rows of what was prepared as `name`, in text format; and a future that is done once they are committed.

        That future may be awaited by several (shield it: who is cancelled must not cancel it for the others). Raises,
        and so may the future, ServerError or ConnectionLostError; after the latter nobody knows what was committed.
        """
        exchange = self._send([build.bind("", name, [p.encode() for p in parameters]), _TELL_AND_COMMIT])
        told = exchange.told = self._loop.create_future()
        committed: asyncio.Future[None] = self._loop.create_future()

        def ended(future: asyncio.Future[None]) -> None:
            fault = future.exception() or exchange.error
            if fault is None:
                committed.set_result(None)
            else:
                committed.set_exception(fault)
                committed.exception()  # maybe nobody waits any more
            if not told.done():
                told.set_result(None)

        assert exchange.future is not None
        exchange.future.add_done_callback(ended)
        self._flush()
        await told
        if exchange.future.done():
            exchange.future.result()
        return self._result(exchange).rows, committed
