"""Where clients connect: TCP sockets and a Unix-domain socket, and how to stop without losing anybody.

Several processes may listen on one port (SO_REUSEPORT): with a second dfproxy there, the first one can go. When it
stops it still takes those that the kernel has accepted for it. The file of a Unix-domain socket is put in place by
renaming: a second dfproxy takes it over from the first without a moment in which it is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from proxy.relay import Leg

#: Everybody may connect; who may log in is the server's business. As PostgreSQL's own default.
_MODE: Final = 0o777


class Listener:
    """Listens from `open` until `close` or `stop`; `factory` makes the protocol of each connection.

    `host` may be a name of several addresses, `port` 0 picks a free one; `folder` is where the Unix-domain socket is
    made, named as PostgreSQL names it.
    """

    def __init__(self, host: str, port: int, *, folder: Path | None = None, reuse_port: bool = False,
                 backlog: int = 1024) -> None:
        self._host = host
        self._folder = folder
        self._reuse_port = reuse_port
        self._backlog = backlog
        self.port = port
        self._servers: list[asyncio.Server] = []
        #: The same sockets once more: what they have in their queues can be taken when the servers are closed.
        self._doubles: list[socket.socket] = []
        self._file: tuple[Path, tuple[int, int]] | None = None

    async def open(self, factory: Callable[[], Leg]) -> None:
        """Listens, but accepts nobody before `start`. Raises OSError."""
        loop = asyncio.get_running_loop()
        try:
            for family, address in await self._addresses():
                sock = self._tcp(family, address)
                self.port = int(sock.getsockname()[1])
                self._keep(sock)
                self._servers.append(await loop.create_server(factory, sock=sock, start_serving=False,
                                                              backlog=self._backlog))
            if self._folder is not None:
                sock = self._unix(self._folder / f".s.PGSQL.{self.port}")
                self._keep(sock)
                self._servers.append(await loop.create_unix_server(factory, sock=sock, start_serving=False,
                                                                   backlog=self._backlog))
        except BaseException:
            self.close()
            raise

    async def start(self) -> None:
        """Begins to accept."""
        for server in self._servers:
            await server.start_serving()

    async def stop(self, take: Callable[[socket.socket], None]) -> None:
        """Stops listening; `take` gets each connection that was waiting to be accepted."""
        for server in self._servers:
            server.close()
        # The loop closes its own descriptors on its next round. From then on ours alone keep the sockets alive, so that
        # nothing comes between the last connection that is taken and the end.
        for _ in range(3):
            await asyncio.sleep(0)
        doubles, self._doubles = self._doubles, []
        for double in doubles:
            waiting = list(_accepted(double))
            double.close()
            for connection in waiting:
                take(connection)
        self.close()

    def close(self) -> None:
        """Stops listening; connections that wait to be accepted are lost."""
        for server in self._servers:
            server.close()
        for double in self._doubles:
            double.close()
        self._servers.clear()
        self._doubles.clear()
        if self._file is not None:
            path, identity = self._file
            self._file = None
            with contextlib.suppress(FileNotFoundError):
                if _identity(path) == identity:  # else it is another's by now
                    path.unlink()

    def _keep(self, sock: socket.socket) -> None:
        self._doubles.append(sock.dup())
        self._doubles[-1].setblocking(False)

    async def _addresses(self) -> list[tuple[int, tuple[object, ...]]]:
        found = await asyncio.get_running_loop().getaddrinfo(
            self._host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return list(dict.fromkeys((int(family), tuple(address)) for family, _, _, _, address in found))

    def _tcp(self, family: int, address: tuple[object, ...]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # A name of several addresses has the same port on all.
            sock.bind((address[0], self.port, *address[2:]))
            sock.listen(self._backlog)
        except BaseException:
            sock.close()
            raise
        return sock

    def _unix(self, path: Path) -> socket.socket:
        if not self._reuse_port and _answers(path):
            raise OSError(errno.EADDRINUSE, f"another process listens on {path}")
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(fresh))
            fresh.chmod(_MODE)
            sock.listen(self._backlog)
            fresh.rename(path)
        except OSError as e:
            sock.close()
            fresh.unlink(missing_ok=True)
            raise OSError(e.errno, f"{e.strerror or e} ({path})") from e
        self._file = (path, _identity(path))
        return sock


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """What waits to be accepted."""
    while True:
        try:
            yield listener.accept()[0]
        except BlockingIOError:
            return
        except ConnectionError:  # that one has gone already
            continue


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _answers(path: Path) -> bool:
    """Whether somebody listens on a Unix-domain socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.setblocking(False)
        try:
            s.connect(str(path))
        except BlockingIOError:  # its backlog is full
            return True
        except OSError:
            return False
    return True


def adopt(connection: socket.socket, factory: Callable[[], Leg]) -> Awaitable[object]:
    """Serves a connection that was accepted already."""
    return asyncio.get_running_loop().connect_accepted_socket(factory, connection)
