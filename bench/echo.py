"""`python -m bench.echo PORT`: the least that a relay on the same event loop can do, as a yardstick.

Accepts on a port of its own, connects to PORT on this machine, and writes what it reads to the other side. It knows
nothing of the protocol, has no backpressure and no TLS: what dfproxy costs beyond it is what dfproxy does.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import cast

import uvloop


class End(asyncio.Protocol):
    """One side of a connection."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port  # to connect to, as soon as the client is there
        self.peer: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.port is not None:
            self.task = asyncio.create_task(self.join(self.port))

    async def join(self, port: int) -> None:
        """Connects to the server."""
        _, server = await asyncio.get_running_loop().create_connection(End, "127.0.0.1", port)
        server.peer, self.peer = self.transport, server.transport
        self.peer.writelines(self.early)

    def data_received(self, data: bytes) -> None:
        if self.peer is None:
            self.early.append(data)
        else:
            self.peer.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer is not None:
            self.peer.close()


async def main(port: int) -> None:
    """Serves until the process is ended."""
    server = await asyncio.get_running_loop().create_server(lambda: End(port), "127.0.0.1", 0)
    print(f"listening on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1])))
