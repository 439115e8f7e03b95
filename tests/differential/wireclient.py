"""A client that hides nothing: sends bytes as told, and gives every message of the server as it came."""

from __future__ import annotations

import random
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Final

from proxy.wire import backend
from proxy.wire.frames import Frame, FrameParser, ProtocolError
from proxy.wire.messages import Backend

#: Seconds within which the next byte must come. Only a hang takes as long.
PATIENCE: Final = 30.0
#: What `read` ends with where the server closes the connection. Type bytes of the protocol are letters and digits.
END: Final = Frame(ord("."), b"")

Address = tuple[str, int]


class Stuck(AssertionError):
    """The server (or the proxy) did not send what was awaited."""

    def __init__(self, awaited: str, got: list[Frame]) -> None:
        self.got = got
        super().__init__(f"waited {PATIENCE:.0f} s for {awaited!r} and got {''.join(chr(f.type) for f in got)!r}")


class Connection:
    """One connection. `pieces`: a source of chance that cuts what is sent into small pieces, sent one by one."""

    def __init__(self, address: Address, pieces: random.Random | None = None) -> None:
        self.address = address
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.parser = FrameParser()
        self.pid = 0
        self.key = b""
        self._pieces = pieces
        self._ended = False
        self._unparsed = bytearray()  # as long as there was no message
        self._plain: bytearray | None = None

    def exchange(self, data: bytes, until: str) -> list[Frame]:
        """Sends, and reads meanwhile, until messages of the types in `until` came in this order (others between).

        `.` in `until` stands for the end of the connection. Raises Stuck where they do not come.
        """
        got: list[Frame] = []
        awaited = list(until)
        outgoing = list(self._cut(data)) if data else []
        selector = selectors.DefaultSelector()
        self.socket.setblocking(False)
        try:
            selector.register(self.socket, selectors.EVENT_READ)
            while awaited or outgoing:
                if awaited and (frame := self._next()) is not None:
                    got.append(frame)
                    if chr(frame.type) == awaited[0]:
                        awaited.pop(0)
                    if frame is END:
                        if awaited:
                            raise Stuck("".join(awaited), got)
                        break
                    continue
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if outgoing else 0)
                selector.modify(self.socket, events)
                ready = selector.select(PATIENCE)
                if not ready:
                    raise Stuck("".join(awaited) or "(taking what is sent)", got)
                if ready[0][1] & selectors.EVENT_WRITE:
                    self._send_some(outgoing)
                if ready[0][1] & selectors.EVENT_READ:
                    self._receive_some()
                if self._ended:
                    outgoing.clear()
        finally:
            selector.close()
        return got

    def one_byte(self, data: bytes) -> bytes:
        """Sends a request (SSLRequest, GSSENCRequest) and returns the byte that answers it; empty at the end."""
        self.socket.setblocking(True)
        self.socket.settimeout(PATIENCE)
        self.socket.sendall(data)
        return self.socket.recv(1)

    def remember_key(self, frames: list[Frame]) -> None:
        """Takes the cancel key out of the replies to a startup packet."""
        for frame in frames:
            if frame.type == Backend.BACKEND_KEY_DATA:
                self.pid, self.key = backend.backend_key_data(frame.payload)

    def half_close(self) -> None:
        """Says that nothing more will be sent."""
        self.socket.shutdown(socket.SHUT_WR)

    def vanish(self) -> None:
        """Cuts the connection as a crash does: what follows is reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def _next(self) -> Frame | None:
        if self._plain is not None:
            if not self._ended:
                return None
            rest, self._plain = bytes(self._plain), None
            return Frame(0, rest)
        try:
            frame = self.parser.next_frame()
        except ProtocolError:
            # An answer in version 2 of the protocol. What follows is read to the end, as it is.
            self._plain = self._unparsed
            self.parser = FrameParser()
            return None
        return END if frame is None and self._ended else frame

    def _cut(self, data: bytes) -> Iterator[memoryview]:
        view = memoryview(data)
        if self._pieces is None:
            yield view
            return
        while view:
            size = self._pieces.choice((1, 2, 3, 5, 9, 40, 300))
            yield view[:size]
            view = view[size:]

    def _send_some(self, outgoing: list[memoryview]) -> None:
        try:
            sent = self.socket.send(outgoing[0])
        except (BlockingIOError, InterruptedError):
            return
        except (BrokenPipeError, ConnectionResetError):
            outgoing.clear()  # what the server said before it closed is still to be read
            return
        if sent == len(outgoing[0]):
            outgoing.pop(0)
            if self._pieces is not None and self._pieces.random() < 0.05:
                time.sleep(0.001)  # lets the piece travel alone
        else:
            outgoing[0] = outgoing[0][sent:]

    def _receive_some(self) -> None:
        try:
            data = self.socket.recv(1 << 18)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:
            self._ended = True
            return
        if data:
            if len(self._unparsed) < 1000:
                self._unparsed += data
            if self._plain is None:
                self.parser.feed(data)
        else:
            self._ended = True
