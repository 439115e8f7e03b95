"""Message boundaries.

`FrameParser` gives whole messages; `FrameSplitter` lets most of a stream pass and gives only what is asked for.
A regular message is one type byte, a length (4 bytes, big-endian, counting itself) and the payload. The first packet of
a connection has no type byte: `StartupParser`. Every length is checked against a limit before anything is buffered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy.wire import messages as m

_HEADER: Final = struct.Struct(">BI")
_U32: Final = struct.Struct(">I")
_COMPACT: Final = 1 << 16


class ProtocolError(Exception):
    """The bytes are not PostgreSQL's protocol; nothing that follows them can be understood."""


class Frame(NamedTuple):
    """A whole message: its type byte and its payload (without the length)."""

    type: int
    payload: bytes

    def encode(self) -> bytes:
        """The message as it stands on the wire."""
        return _HEADER.pack(self.type, len(self.payload) + 4) + self.payload


def _check_length(type_: int, length: int, max_length: int) -> None:
    """`length` is the length word. Raises ProtocolError unless the payload has 0 to `max_length` bytes."""
    if length < 4:
        raise ProtocolError(f"message {chr(type_)!r} gives {length} as its length, which is less than the length word")
    if length - 4 > max_length:
        raise ProtocolError(f"message {chr(type_)!r} of {length - 4} bytes is longer than the limit of {max_length}")


class FrameParser:
    """Whole messages from a byte stream in which every message has a type byte.

    `max_length` is the longest payload accepted, in bytes; `next_frame` raises ProtocolError once a header exceeds it.
    """

    def __init__(self, max_length: int = m.MAX_MESSAGE) -> None:
        self.max_length = max_length
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Adds what was received."""
        if self._start == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        elif self._start > _COMPACT:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next message, or None until more is fed. Raises ProtocolError on a length out of bounds."""
        start, buffer = self._start, self._buffer
        if len(buffer) - start < 5:
            return None
        type_, length = _HEADER.unpack_from(buffer, start)
        _check_length(type_, length, self.max_length)
        end = start + 1 + length
        if len(buffer) < end:
            return None
        self._start = end
        return Frame(type_, bytes(buffer[start + 5 : end]))

    @property
    def buffered(self) -> int:
        """Bytes received that no message has consumed."""
        return len(self._buffer) - self._start


@dataclass(frozen=True)
class StartupPacket:
    """The first packet of a connection: StartupMessage, CancelRequest, SSLRequest or GSSENCRequest.

    `code` is the protocol version or the request code, `payload` what follows it, `raw` the packet as received.
    """

    code: int
    payload: bytes
    raw: bytes

    @property
    def major(self) -> int:
        return self.code >> 16

    def parameters(self) -> dict[str, str]:
        """The parameters of a StartupMessage. Raises ProtocolError where names and values don't pair up."""
        fields = self.payload.split(b"\0")
        # name\0value\0 … \0: the list ends in one empty name and what follows its terminator.
        if len(fields) < 2 or fields[-1] or fields[-2] or len(fields) % 2:
            raise ProtocolError("the startup packet's parameters are not pairs that end in a zero byte")
        if not all(fields[:-2:2]):
            raise ProtocolError("the startup packet has a parameter without a name")
        texts = [field.decode("utf-8", "surrogateescape") for field in fields[:-2]]
        return dict(zip(texts[::2], texts[1::2], strict=True))


class StartupParser:
    """The packets before the regular messages.

    `next_packet` gives them one by one; `take_rest` gives what was fed beyond them.
    """

    def __init__(self, max_length: int = m.MAX_STARTUP_PACKET) -> None:
        self.max_length = max_length
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Adds what was received."""
        self._buffer += data

    @property
    def is_tls(self) -> bool:
        """Whether the stream starts with a TLS handshake rather than a packet."""
        return bool(self._buffer) and self._buffer[0] == m.TLS_HANDSHAKE

    def next_packet(self) -> StartupPacket | None:
        """The next packet, or None until more is fed. Raises ProtocolError on a length that no startup packet has."""
        buffer = self._buffer
        if not buffer:
            return None
        # Decided on the first bytes: a client of another protocol must not wait for a length that it never meant.
        known = bytes(buffer[:4]).ljust(4, b"\0")
        if _U32.unpack(known)[0] > self.max_length:
            raise ProtocolError("the first bytes are not a PostgreSQL startup packet")
        if len(buffer) < 4:
            return None
        (length,) = _U32.unpack_from(buffer)
        if length < 8:
            raise ProtocolError(f"a startup packet of {length} bytes is too short")
        if len(buffer) < length:
            return None
        raw = bytes(buffer[:length])
        del buffer[:length]
        return StartupPacket(_U32.unpack_from(raw, 4)[0], raw[8:], raw)

    def take_rest(self) -> bytes:
        """What was fed after the last packet, which this parser forgets."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest



class Peek(NamedTuple):
    """The start of a message that passes: its type byte and the first `PEEK_BYTES` of its payload (or all of it)."""

    type: int
    start: bytes


# What `FrameSplitter` does with messages of a type.
PASS: Final = 0  #: forwards them, says nothing
NOTE: Final = 1  #: forwards them, and gives the type byte
WHOLE: Final = 2  #: gives them as Frames instead of forwarding; one longer than `max_whole` is treated like NOTE
PEEK: Final = 3  #: forwards them, and gives a Peek

#: Enough for two names (of a portal and of a statement) as long as PostgreSQL tells names apart, and more.
PEEK_BYTES: Final = 512

Span = bytes | memoryview
#: What a splitter yields: bytes to forward as they are, the type byte of a noted message, a whole message, a start.
Item = Span | int | Frame | Peek


class FrameSplitter:
    """Splits a byte stream at message boundaries without collecting the payloads that only pass.

    `modes` has one of PASS, NOTE, WHOLE for each type byte; it may be changed, or another put in its place, while a
    feed is under way, and applies from the next message on. The note (or peek) of a message comes before the bytes to
    forward that hold it. Bytes to forward never end inside a header, and never hold a part of a message that is given
    whole.
    """

    def __init__(
        self, modes: bytes | bytearray | None = None, *, max_length: int = m.MAX_MESSAGE, max_whole: int = m.MAX_MESSAGE
    ) -> None:
        self.modes: bytes | bytearray = bytearray(256) if modes is None else modes
        self.max_length = max_length
        self.max_whole = max_whole
        self._remaining = 0  # payload bytes still to come of a message that passes
        self._head = b""  # an incomplete header, or message start that is too short for a Peek
        self._whole: bytearray | None = None  # the payload so far of a message given whole
        self._whole_type = 0
        self._whole_length = 0

    @property
    def at_boundary(self) -> bool:
        """Whether everything fed so far ends exactly where a message ends."""
        return self._remaining == 0 and not self._head and self._whole is None

    def go_on(self, remaining: int, head: bytes) -> None:
        """Goes on where somebody else has stopped, from a boundary on.

        `remaining` bytes are to come of a message that passes; or `head` is the part of a header that has come.
        """
        self._remaining, self._head = remaining, head

    def skim(self, data: bytes, last: int) -> int:
        """Takes `data` if all of it passes without a word, which most does, in one go and without a generator.

        Returns 0 then; `last` if its last message is of that type, complete, and the only one whose mode is not PASS;
        and -1 if it is to be fed, where nothing has been taken.
        """
        if self._head or self._whole is not None:
            return -1
        size, position = len(data), self._remaining
        modes, unpack, most = self.modes, _HEADER.unpack_from, self.max_length + 4
        while size - position >= 5:
            type_, length = unpack(data, position)
            if not 4 <= length <= most:
                return -1
            if modes[type_]:
                if type_ != last or position + 1 + length != size:
                    return -1
                self._remaining = 0
                return last
            position += 1 + length
        if position < size:
            return -1  # an incomplete header
        self._remaining = position - size
        return 0

    def feed(self, data: bytes) -> Iterator[Item]:
        """Yields what `data` holds, in order; to be exhausted before the next feed.

        Raises ProtocolError on a length out of bounds, after yielding what came before it.
        """
        if self._head:
            data = self._head + data
            self._head = b""
        size = len(data)
        modes, unpack, view = self.modes, _HEADER.unpack_from, memoryview(data)
        start = 0  # of what is to be forwarded
        position = 0
        if self._whole is not None:
            position = start = min(size, self._whole_length - len(self._whole))
            self._whole += view[:position]
            if len(self._whole) < self._whole_length:
                return
            frame, self._whole = Frame(self._whole_type, bytes(self._whole)), None
            yield frame
            modes = self.modes
        elif self._remaining:
            position = min(size, self._remaining)
            self._remaining -= position
        while size - position >= 5:
            type_, length = unpack(data, position)
            if not 4 <= length <= self.max_length + 4:
                if start < position:
                    yield view[start:position]
                _check_length(type_, length, self.max_length)
            mode = modes[type_]
            end = position + 1 + length
            if mode == WHOLE and length - 4 <= self.max_whole:
                if start < position:
                    yield view[start:position]
                if end <= size:
                    yield Frame(type_, data[position + 5 : end])
                    modes = self.modes
                    start = position = end
                    continue
                self._whole = bytearray(view[position + 5 :])
                self._whole_type, self._whole_length = type_, length - 4
                return
            if mode == PEEK:
                needed = position + 5 + min(length - 4, PEEK_BYTES)
                if needed > size:
                    break
                yield Peek(type_, data[position + 5 : needed])
                modes = self.modes
            elif mode:
                yield type_
                modes = self.modes
            if end > size:
                self._remaining = end - size
                position = size
                break
            position = end
        if position < size:
            self._head = data[position:]
        if start < position:
            yield data if start == 0 and position == size else view[start:position]
