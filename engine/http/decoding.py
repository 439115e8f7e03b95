"""Content-Encoding, undone within bounds: a small body that unpacks to a huge one stops at the limit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import brotli

#: What requests accept.
ACCEPTED = "gzip, deflate, br"
#: Encodings applied one over the other; nobody uses more than one.
_MOST_LAYERS = 3
#: Bytes that a decoder may put out at a time.
_STEP = 2**18


class TooLargeError(Exception):
    """The body is larger than allowed."""


class CorruptError(Exception):
    """The body is not what its Content-Encoding says; the text is the encoding."""


class _Decoder(Protocol):
    def feed(self, data: bytes, limit: int) -> bytes: ...
    def end(self) -> bytes: ...


class _Zlib:
    """gzip (also of several members) and deflate (with zlib's header, or raw as some servers have it)."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._gzip = name == "gzip"
        self._head = b""
        self._inner: zlib._Decompress | None = None

    def _begin(self, data: bytes) -> bytes:
        """Chooses by the first two bytes; returns what is to be decoded now."""
        self._head += data
        if len(self._head) < 2:
            return b""
        data, self._head = self._head, b""
        has_header = data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
        self._inner = zlib.decompressobj(31 if self._gzip else 15 if has_header else -15)
        return data

    def feed(self, data: bytes, limit: int) -> bytes:
        out, size = [], 0
        while data:
            if self._inner is not None and self._inner.eof:
                if not self._gzip or not data.startswith(b"\x1f"):
                    break  # rubbish after the end
                self._inner = None  # the next member
            if self._inner is None:
                data = self._begin(data)
                if self._inner is None:
                    break
            try:
                part = self._inner.decompress(data, _STEP)
            except zlib.error:
                raise CorruptError(self._name) from None
            size += len(part)
            if size > limit:
                raise TooLargeError
            out.append(part)
            data = self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail
        return b"".join(out)

    def end(self) -> bytes:
        if self._inner is None or self._head:
            raise CorruptError(self._name)
        # The last symbols may have been held back: a few kilobytes at most.
        part = b"" if self._inner.eof else self._inner.decompress(b"", _STEP)
        if not self._inner.eof:
            raise CorruptError(self._name)
        return part


class _Brotli:
    def __init__(self) -> None:
        self._inner = brotli.Decompressor()

    def feed(self, data: bytes, limit: int) -> bytes:
        out, size = [], 0
        try:
            if self._inner.is_finished():
                return b""
            part = self._inner.process(data, output_buffer_limit=_STEP)
            while True:
                size += len(part)
                if size > limit:
                    raise TooLargeError
                out.append(part)
                if self._inner.can_accept_more_data() or self._inner.is_finished():
                    return b"".join(out)
                part = self._inner.process(b"", output_buffer_limit=_STEP)
        except brotli.error:
            raise CorruptError("br") from None

    def end(self) -> bytes:
        if not self._inner.is_finished():
            raise CorruptError("br")
        return b""


class BodyDecoder:
    """Takes a body's pieces as they come, and keeps at most `limit` bytes of it decoded.

    Content encodings that it does not know leave the body as it is.
    """

    def __init__(self, encodings: Sequence[str], limit: int) -> None:
        self._limit = limit
        self._raw = 0
        self._size = 0
        self._parts: list[bytes] = []
        known = [e for e in encodings if e != "identity"]
        make: dict[str, Callable[[], _Decoder]] = {"gzip": lambda: _Zlib("gzip"), "x-gzip": lambda: _Zlib("gzip"),
                                                   "deflate": lambda: _Zlib("deflate"), "br": _Brotli}
        usable = len(known) <= _MOST_LAYERS and all(e in make for e in known)
        self._layers: list[_Decoder] = [make[e]() for e in reversed(known)] if usable else []

    def feed(self, data: bytes) -> None:
        """Raises TooLargeError, CorruptError."""
        self._raw += len(data)
        if self._raw > self._limit:
            raise TooLargeError
        self._pass(data, 0)

    def end(self) -> bytes:
        """The whole body. Raises TooLargeError, and CorruptError where it stops short."""
        if self._raw:
            for n, layer in enumerate(self._layers):
                self._pass(layer.end(), n + 1)
        return b"".join(self._parts)

    def _pass(self, data: bytes, first: int) -> None:
        for layer in self._layers[first:]:
            data = layer.feed(data, self._limit)
        self._size += len(data)
        if self._size > self._limit:
            raise TooLargeError
        self._parts.append(data)
