"""Requests that stand alone: most of what clients send is one whole Query, or one whole batch up to its Sync."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from proxy.wire.messages import Frontend

_HEADER: Final = struct.Struct(">BI")
# Plain integers for what runs on every message: looking up a member of an enumeration takes as long as the rest of it.
QUERY: Final = int(Frontend.QUERY)
SYNC: Final = int(Frontend.SYNC)
_PARSE: Final = int(Frontend.PARSE)
_BIND: Final = int(Frontend.BIND)
_DESCRIBE: Final = int(Frontend.DESCRIBE)
_EXECUTE: Final = int(Frontend.EXECUTE)
_CLOSE: Final = int(Frontend.CLOSE)
#: What may stand in a batch besides Sync.
_BATCHED: Final = frozenset(int(t) for t in (
    Frontend.PARSE, Frontend.BIND, Frontend.DESCRIBE, Frontend.EXECUTE, Frontend.CLOSE, Frontend.FLUSH))


def plain_request(data: bytes) -> int:
    """QUERY if `data` is exactly one Query, SYNC if it is exactly one batch that ends with its only Sync, or 0."""
    size = len(data)
    if size < 5:
        return 0
    unpack, batched = _HEADER.unpack_from, _BATCHED
    type_, length = unpack(data)
    if type_ == QUERY:
        return QUERY if length == size - 1 else 0
    position = 0
    while True:
        end = position + 1 + length
        if length < 4 or end > size:
            return 0
        if type_ == SYNC:
            return SYNC if end == size else 0
        if type_ not in batched or size - end < 5:
            return 0
        position = end
        type_, length = unpack(data, position)


def texts(data: bytes) -> Iterator[bytes]:
    """The statements in what `plain_request` has said yes to, without their zero byte.

    A Query that has none at its end, or a Parse that has no place for one, gives what there is.
    """
    size, position = len(data), 0
    while position < size:
        type_, length = _HEADER.unpack_from(data, position)
        end = position + 1 + length
        if type_ == QUERY:
            yield data[position + 5 : end - 1]
        elif type_ == _PARSE:
            name = data.find(0, position + 5, end)
            statement = data.find(0, name + 1, end) if name >= 0 else -1
            yield data[name + 1 : statement] if statement >= 0 else data[position + 5 : end]
        position = end


def bound_alone(data: bytes) -> bytes | None:
    """The name of the statement that a batch is about: it binds it to the unnamed portal, and has to do with no other.

    None: it is more than that. `plain_request` has said SYNC to `data`.
    """
    end = 1 + _HEADER.unpack_from(data)[1]
    last = data.find(0, 6, end)
    if data[0] != _BIND or data[5] != 0 or last < 0:
        return None
    position = end
    while True:
        type_, length = _HEADER.unpack_from(data, position)
        if type_ == SYNC:
            return data[6:last]
        if type_ in (_PARSE, _BIND, _CLOSE):
            return None
        end = position + 1 + length
        # An Execute begins with its portal's name, a Describe with what it is about.
        start = data[position + 5 : min(end, position + 7)]
        if (type_ == _DESCRIBE and start != b"P\0") or (type_ == _EXECUTE and start[:1] != b"\0"):
            return None
        position = end
