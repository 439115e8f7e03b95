"""Decoders of what a server sends.

Each takes the payload of one message and raises ProtocolError where it is malformed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from proxy.wire.frames import ProtocolError
from proxy.wire.messages import Authentication

_U16: Final = struct.Struct(">H")
_I32: Final = struct.Struct(">i")
_U32: Final = struct.Struct(">I")
_COLUMN: Final = struct.Struct(">IhIhih")


class ColumnDescription(NamedTuple):
    """A column of RowDescription.

    `table_oid` and `attnum` are 0 where it is not a table's; `format` is 0 (text) or 1 (binary).
    """

    name: str
    table_oid: int
    attnum: int
    type_oid: int
    type_size: int
    type_modifier: int
    format: int


def _cstring(payload: bytes, start: int) -> tuple[bytes, int]:
    """The zero-terminated bytes at `start` and where the next field begins."""
    end = payload.find(b"\0", start)
    if end < 0:
        raise ProtocolError("a text in a message from the server has no end")
    return payload[start:end], end + 1


def _text(raw: bytes) -> str:
    # A server may speak any encoding, and messages before authentication are in the database's: never fail on that.
    return raw.decode("utf-8", "surrogateescape")


def error_fields(payload: bytes) -> dict[str, str]:
    """Fields of ErrorResponse or NoticeResponse by their one-letter code.

    No field is promised to be there, not even C (SQLSTATE) or M (message). Bytes that are not UTF-8 come as lone
    surrogates ("surrogateescape"), and `encode_error_fields` turns them back.
    """
    fields: dict[str, str] = {}
    position = 0
    while position < len(payload) and payload[position]:
        code = chr(payload[position])
        raw, position = _cstring(payload, position + 1)
        fields[code] = _text(raw)
    return fields


def encode_error_fields(fields: Mapping[str, str]) -> bytes:
    """The payload of ErrorResponse or NoticeResponse: the inverse of `error_fields`."""
    payload = bytearray()
    for code, value in fields.items():
        payload += code.encode("latin-1") + value.encode("utf-8", "surrogateescape") + b"\0"
    return bytes(payload) + b"\0"


def row_description(payload: bytes) -> list[ColumnDescription]:
    """Columns of RowDescription."""
    try:
        (count,) = _U16.unpack_from(payload)
        position = 2
        columns = []
        for _ in range(count):
            name, position = _cstring(payload, position)
            columns.append(ColumnDescription(_text(name), *_COLUMN.unpack_from(payload, position)))
            position += _COLUMN.size
    except struct.error as e:
        raise ProtocolError("a RowDescription is cut short") from e
    return columns


def data_row(payload: bytes) -> list[bytes | None]:
    """Values of DataRow; None is NULL."""
    unpack = _I32.unpack_from
    try:
        (count,) = _U16.unpack_from(payload)
        position = 2
        values: list[bytes | None] = []
        for _ in range(count):
            (size,) = unpack(payload, position)
            position += 4
            if size < 0:
                values.append(None)
            else:
                values.append(payload[position : position + size])
                position += size
    except struct.error as e:
        raise ProtocolError("a DataRow is cut short") from e
    if position != len(payload):
        raise ProtocolError("a DataRow's values don't fill it")
    return values


def parameter_description(payload: bytes) -> list[int]:
    """Type OIDs of ParameterDescription."""
    try:
        (count,) = _U16.unpack_from(payload)
        return list(struct.unpack_from(f">{count}I", payload, 2))
    except struct.error as e:
        raise ProtocolError("a ParameterDescription is cut short") from e


def parameter_status(payload: bytes) -> tuple[str, str]:
    """Name and value of ParameterStatus."""
    name, position = _cstring(payload, 0)
    value, _ = _cstring(payload, position)
    return _text(name), _text(value)


def backend_key_data(payload: bytes) -> tuple[int, bytes]:
    """Process id and cancel key (4 to 256 bytes) of BackendKeyData."""
    if not 8 <= len(payload) <= 260:
        raise ProtocolError(f"a cancel key of {len(payload) - 4} bytes is not between 4 and 256")
    return _U32.unpack_from(payload)[0], payload[4:]


def command_tag(payload: bytes) -> str:
    """The tag of CommandComplete, such as `UPDATE 3`."""
    return _text(_cstring(payload, 0)[0])


def transaction_status(payload: bytes) -> int:
    """The TransactionStatus of ReadyForQuery."""
    if len(payload) != 1:
        raise ProtocolError("a ReadyForQuery has more or less than one byte")
    return payload[0]


def authentication_code(payload: bytes) -> int:
    """The code of an Authentication message (see messages.Authentication; others exist)."""
    if len(payload) < 4:
        raise ProtocolError("an Authentication message is cut short")
    return int(_U32.unpack_from(payload)[0])


def sasl_mechanisms(payload: bytes) -> list[str]:
    """The mechanisms of AuthenticationSASL; `payload` includes the code."""
    if authentication_code(payload) != Authentication.SASL:
        raise ProtocolError("not an AuthenticationSASL message")
    names = []
    position = 4
    while position < len(payload) and payload[position]:
        name, position = _cstring(payload, position)
        names.append(_text(name))
    return names
