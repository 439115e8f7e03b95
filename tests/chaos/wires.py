"""A TCP forwarder between workers and server that cuts, stalls and refuses connections on command.

The cruellest thing that it does is `mute`: the server hears everything, its answers are held back, then the connection
is cut. The client can't know whether its COMMIT happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """One connection: two sockets and a gate in each direction."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._writers = (client, server)
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.up.set()
        self.down.set()

    def cut(self) -> None:
        """Resets both ends; what was on its way is lost."""
        for writer in self._writers:
            writer.transport.abort()


class Wires:
    """The forwarder: listens on a loopback port of its own and keeps count of its connections."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.open: set[Wire] = set()
        self.refusing = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Wires]:
        """Listens until the end of the block, then cuts everything."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for wire in list(self.open):
                wire.cut()
            while self.open:
                await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.refusing:
                raise ConnectionRefusedError
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        wire = Wire(writer, far_writer)
        self.open.add(wire)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far_writer, wire.up))
                group.create_task(_pump(far_reader, writer, wire.down))
        except* OSError:
            pass  # one end has reset it, of which the other must hear
        finally:
            self.open.discard(wire)
            wire.cut()

    async def mute(self, wires: list[Wire], seconds: float) -> None:
        """Holds back what the server answers on these, then cuts them."""
        for wire in wires:
            wire.down.clear()
        await asyncio.sleep(seconds)
        for wire in wires:
            wire.cut()
            wire.down.set()

    async def stall(self, wires: list[Wire], seconds: float) -> None:
        """Lets nothing through for a while, in either direction; nothing is lost."""
        for wire in wires:
            wire.up.clear()
            wire.down.clear()
        await asyncio.sleep(seconds)
        for wire in wires:
            wire.up.set()
            wire.down.set()

    async def refuse(self, seconds: float) -> None:
        """Accepts no new connection for a while."""
        self.refusing = True
        await asyncio.sleep(seconds)
        self.refusing = False


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    while data := await reader.read(65536):
        await gate.wait()
        writer.write(data)
        await writer.drain()
    writer.write_eof()
