"""What is changed in a server's errors and notices: positions, and the private marker (docs/architecture.md)."""

from __future__ import annotations

from typing import Final, Protocol

from proxy.wire.backend import encode_error_fields, error_fields

#: Value of the constraint field (n) in an error or warning that the compiler had raised.
MARKER: Final = "dfproxy:position="
_MARKER_BYTES: Final = MARKER.encode()
#: What says where in our PL/pgSQL the message was raised: file, line, routine, and the marker itself.
_PRIVATE: Final = ("n", "F", "L", "R")


class Positions(Protocol):
    """What is known of a statement that was rewritten (dsl.compiler.Compiled). Positions count characters from 1."""

    def source_position(self, position: int, /) -> int:
        """From the text that the server got to the one that the client sent."""

    def raises(self, position: int, /) -> bool:
        """Whether the compiler made this statement raise something about this place of the client's text."""


def client_view(payload: bytes, statement: Positions | None) -> bytes | None:
    """The payload of ErrorResponse or NoticeResponse as the client should see it, or None where nothing has to change.

    `statement` is the one that the message is about; None where it was not rewritten.
    """
    marked = _MARKER_BYTES in payload
    if not marked and statement is None:
        return None
    fields = error_fields(payload)
    constraint = fields.get("n", "")
    if constraint.startswith(MARKER):
        _unmark(fields, _number(constraint.removeprefix(MARKER)), statement)
    elif statement is not None and (position := _number(fields.get("P", ""))) is not None:
        fields["P"] = str(statement.source_position(position))
    else:
        return None
    return encode_error_fields(fields)


def _unmark(fields: dict[str, str], position: int | None, statement: Positions | None) -> None:
    for code in _PRIVATE:
        fields.pop(code, None)
    # The first line says where our function raised it. Others lead from there to the client's statement: through the
    # body of a function that was compiled when it was created, in whose text the position is, and not in the client's.
    _, _, callers = fields.pop("W", "").partition("\n")
    if callers:
        fields["W"] = callers
    if position is not None and statement is not None and statement.raises(position):
        fields["P"] = str(position)
    else:
        fields.pop("P", None)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 11 and text.strip("0") else None
