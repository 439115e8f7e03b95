"""Content-Encoding, undone within bounds: a small body that unpacks to a huge one stops at the limit.

Decoders yield what they make piece by piece, so that whoever drives them can let others have their turn in between.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import brotli

#: What requests accept.
ACCEPTED = "gzip, deflate, br"
#: Encodings applied one over the other; nobody uses more than one.
_MOST_LAYERS = 3
#: Members of a gzip file. Block-wise writers make one of 64 KiB.
_MOST_MEMBERS = 4096
#: Bytes that a decoder takes or gives at a time: a millisecond's work.
_STEP = 2**18


class TooLargeError(Exception):
    """The body is larger than allowed."""


class CorruptError(Exception):
    """The body is not what its Content-Encoding says; the text is the encoding."""


class _Decoder(Protocol):
    def feed(self, data: bytes) -> Iterator[bytes]: ...
    def end(self) -> bytes: ...


class _Zlib:
    """gzip (also of several members) and deflate (with zlib's header, or raw as some servers have it)."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._gzip = name == "gzip"
        self._head = b""
        self._inner: zlib._Decompress | None = None
        self._members = 0

    def _begin(self, data: bytes) -> bytes:
        """Chooses by the first two bytes; returns what is to be decoded now."""
        self._head += data
        if len(self._head) < 2:
            return b""
        self._members += 1
        if self._members > _MOST_MEMBERS:
            raise TooLargeError
        data, self._head = self._head, b""
        has_header = data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
        self._inner = zlib.decompressobj(31 if self._gzip else 15 if has_header else -15)
        return data

    def feed(self, data: bytes) -> Iterator[bytes]:
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
                yield self._inner.decompress(data, _STEP)
            except zlib.error:
                raise CorruptError(self._name) from None
            data = self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail

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

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            if self._inner.is_finished():
                return
            yield self._inner.process(data, output_buffer_limit=_STEP)
            while not self._inner.can_accept_more_data() and not self._inner.is_finished():
                yield self._inner.process(b"", output_buffer_limit=_STEP)
        except brotli.error:
            raise CorruptError("br") from None

    def end(self) -> bytes:
        if not self._inner.is_finished():
            raise CorruptError("br")
        return b""


class BodyDecoder:
    """Takes a body's pieces as they come. At most `limit` bytes come in, and out of each decoder.

    Content encodings that it does not know leave the body as it is. `feed` and `end` are to be iterated to their end;
    they raise TooLargeError, CorruptError.
    """

    def __init__(self, encodings: Sequence[str], limit: int) -> None:
        known = [e for e in encodings if e != "identity"]
        make: dict[str, Callable[[], _Decoder]] = {"gzip": lambda: _Zlib("gzip"), "x-gzip": lambda: _Zlib("gzip"),
                                                   "deflate": lambda: _Zlib("deflate"), "br": _Brotli}
        usable = len(known) <= _MOST_LAYERS and all(e in make for e in known)
        self._layers: list[_Decoder] = [make[e]() for e in reversed(known)] if usable else []
        self._left = [limit] * (len(self._layers) + 1)  #: of what goes into each layer, and into the body
        self._parts: list[bytes] = []
        self._untouched = True

    @property
    def content(self) -> bytes:
        """The body so far."""
        return b"".join(self._parts)

    def feed(self, data: bytes) -> Iterator[None]:
        """Takes a piece of the body."""
        if not self._layers:
            self._count(data, 0)
            self._parts.append(data)
            return
        for start in range(0, len(data), _STEP):
            yield from self._pass(data[start:start + _STEP], 0)

    def end(self) -> Iterator[None]:
        """The body has ended: it must be complete. An empty one is, whatever it was to be encoded with."""
        if self._layers and not self._untouched:
            for n, layer in enumerate(self._layers):
                yield from self._pass(layer.end(), n + 1)

    def _pass(self, data: bytes, n: int) -> Iterator[None]:
        self._count(data, n)
        if n == len(self._layers):
            self._parts.append(data)
            yield
        else:
            for part in self._layers[n].feed(data):
                yield from self._pass(part, n + 1)

    def _count(self, data: bytes, n: int) -> None:
        self._untouched = False
        self._left[n] -= len(data)
        if self._left[n] < 0:
            raise TooLargeError
