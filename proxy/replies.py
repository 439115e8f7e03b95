"""What is changed in a server's errors and notices: positions, and the private marker (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.wire.backend import encode_error_fields, error_fields

#: Value of the constraint field (n) in an error or warning that the compiler had raised.
MARKER: Final = "dfproxy:position="
_MARKER_BYTES: Final = MARKER.encode()
#: What says where in our PL/pgSQL the message was raised: context, file, line, routine, and the marker itself.
_PRIVATE: Final = ("n", "W", "F", "L", "R")


def client_view(payload: bytes, source_position: Callable[[int], int] | None) -> bytes | None:
    """The payload of ErrorResponse or NoticeResponse as the client should see it, or None where nothing has to change.

    `source_position` maps 1-based character positions of the statement that the message is about back to the text
    that the client sent; None where that statement was not rewritten.
    """
    marked = _MARKER_BYTES in payload
    if not marked and source_position is None:
        return None
    fields = error_fields(payload)
    constraint = fields.get("n", "")
    if constraint.startswith(MARKER):
        for code in _PRIVATE:
            fields.pop(code, None)
        position = _number(constraint.removeprefix(MARKER))
        # A statement that was not rewritten has merely called something that was: the position is not in its text.
        if position is not None and source_position is not None:
            fields["P"] = str(position)
        else:
            fields.pop("P", None)
    elif source_position is not None and (position := _number(fields.get("P", ""))) is not None:
        fields["P"] = str(source_position(position))
    else:
        return None
    return encode_error_fields(fields)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 11 and text.strip("0") else None
