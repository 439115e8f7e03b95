"""Encoders: what a client sends, and the little that a proxy says itself before it has a server.

Each returns complete messages as bytes, ready to be joined and written. Text is given as `str` (encoded as UTF-8) or as
bytes in the session's client_encoding. Raises ValueError where a name or text holds a zero byte,
which the protocol can't carry.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from proxy.wire.messages import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    PROTOCOL_3_0,
    SSL_REQUEST,
    Authentication,
    Backend,
    Frontend,
)

_HEADER: Final = struct.Struct(">BI")
_U16: Final = struct.Struct(">H")
_I32: Final = struct.Struct(">i")
_U32: Final = struct.Struct(">I")

_NULL: Final = _I32.pack(-1)
_NO_FORMATS: Final = _U16.pack(0)

Text = str | bytes


def message(type_: int, payload: bytes = b"") -> bytes:
    """A message of any type."""
    return _HEADER.pack(type_, len(payload) + 4) + payload


def _cstring(text: Text) -> bytes:
    raw = text.encode() if isinstance(text, str) else bytes(text)
    if b"\0" in raw:
        raise ValueError("a zero byte can't be part of a text in the PostgreSQL protocol")
    return raw + b"\0"


def _packet(code: int, payload: bytes = b"") -> bytes:
    return _U32.pack(len(payload) + 8) + _U32.pack(code) + payload


# --- the first packet ---

def startup(params: Mapping[str, str], version: int = PROTOCOL_3_0) -> bytes:
    """StartupMessage; `params` has at least `user`."""
    return _packet(version, b"".join(_cstring(k) + _cstring(v) for k, v in params.items()) + b"\0")


def cancel_request(pid: int, key: bytes) -> bytes:
    """CancelRequest for the session whose BackendKeyData said `pid` and `key` (4 to 256 bytes)."""
    return _packet(CANCEL_REQUEST, _U32.pack(pid) + key)


def ssl_request() -> bytes:
    """SSLRequest."""
    return _packet(SSL_REQUEST)


def gssenc_request() -> bytes:
    """GSSENCRequest."""
    return _packet(GSSENC_REQUEST)


# --- authentication ---

def password(text: Text) -> bytes:
    """PasswordMessage: the password in clear, or what MD5 authentication makes of it."""
    return message(Frontend.PASSWORD, _cstring(text))


def sasl_initial(mechanism: str, response: bytes | None) -> bytes:
    """SASLInitialResponse; `response` None means that the mechanism sends nothing first."""
    data = _I32.pack(-1) if response is None else _I32.pack(len(response)) + response
    return message(Frontend.PASSWORD, _cstring(mechanism) + data)


def sasl_response(response: bytes) -> bytes:
    """SASLResponse."""
    return message(Frontend.PASSWORD, response)


# --- queries ---

def query(sql: Text) -> bytes:
    """Query: the simple protocol, any number of statements."""
    return message(Frontend.QUERY, _cstring(sql))


def parse(name: Text, sql: Text, oids: Sequence[int] = ()) -> bytes:
    """Parse: makes the prepared statement `name` ("" is the unnamed one).

    `oids` are the parameters' types, 0 where the server decides.
    """
    return message(
        Frontend.PARSE,
        _cstring(name) + _cstring(sql) + _U16.pack(len(oids)) + struct.pack(f">{len(oids)}I", *oids),
    )


def bind(
    portal: Text,
    statement: Text,
    params: Sequence[bytes | None] = (),
    param_formats: Sequence[int] = (),
    result_formats: Sequence[int] = (),
) -> bytes:
    """Bind; formats are 0 (text) or 1 (binary): none means all text, one means that one for all."""
    parts = [_cstring(portal), _cstring(statement), _formats(param_formats), _U16.pack(len(params))]
    size_of = _I32.pack
    for value in params:
        if value is None:
            parts.append(_NULL)
        else:
            parts.append(size_of(len(value)))
            parts.append(value)
    parts.append(_formats(result_formats))
    return message(Frontend.BIND, b"".join(parts))


def _formats(formats: Sequence[int]) -> bytes:
    return struct.pack(f">{len(formats) + 1}H", len(formats), *formats) if formats else _NO_FORMATS


def describe_portal(name: Text = "") -> bytes:
    """Describe a portal."""
    return message(Frontend.DESCRIBE, b"P" + _cstring(name))


def describe_statement(name: Text = "") -> bytes:
    """Describe a prepared statement."""
    return message(Frontend.DESCRIBE, b"S" + _cstring(name))


def execute(portal: Text = "", max_rows: int = 0) -> bytes:
    """Execute; `max_rows` 0 means all."""
    return message(Frontend.EXECUTE, _cstring(portal) + _U32.pack(max_rows))


def close_portal(name: Text = "") -> bytes:
    """Close a portal."""
    return message(Frontend.CLOSE, b"P" + _cstring(name))


def close_statement(name: Text = "") -> bytes:
    """Close a prepared statement."""
    return message(Frontend.CLOSE, b"S" + _cstring(name))


def sync() -> bytes:
    """Sync: ends an extended-protocol batch."""
    return message(Frontend.SYNC)


def flush() -> bytes:
    """Flush: asks for the replies so far without ending the batch."""
    return message(Frontend.FLUSH)


def copy_data(data: bytes) -> bytes:
    """CopyData."""
    return message(Frontend.COPY_DATA, data)


def copy_done() -> bytes:
    """CopyDone."""
    return message(Frontend.COPY_DONE)


def copy_fail(reason: Text) -> bytes:
    """CopyFail: makes the COPY fail with `reason`."""
    return message(Frontend.COPY_FAIL, _cstring(reason))


def terminate() -> bytes:
    """Terminate: a clean end of the session."""
    return message(Frontend.TERMINATE)


# --- what a server says (a proxy before it has a server; tests in the server's role) ---

def error_response(
    severity: str, sqlstate: str, text: str, *, detail: str | None = None, hint: str | None = None
) -> bytes:
    """ErrorResponse in UTF-8; `severity` is ERROR or FATAL, never localised here."""
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": text}
    if detail is not None:
        fields["D"] = detail
    if hint is not None:
        fields["H"] = hint
    payload = b"".join(code.encode() + _cstring(value) for code, value in fields.items())
    return message(Backend.ERROR_RESPONSE, payload + b"\0")


def authentication(code: Authentication, data: bytes = b"") -> bytes:
    """An Authentication message: AuthenticationOk, a request for a password, a SASL step."""
    return message(Backend.AUTHENTICATION, _U32.pack(code) + data)


def authentication_sasl(mechanisms: Sequence[str]) -> bytes:
    """AuthenticationSASL with the mechanisms on offer."""
    return authentication(Authentication.SASL, b"".join(_cstring(name) for name in mechanisms) + b"\0")


def backend_key_data(pid: int, key: bytes) -> bytes:
    """BackendKeyData."""
    return message(Backend.BACKEND_KEY_DATA, _U32.pack(pid) + key)


def parameter_status(name: str, value: str) -> bytes:
    """ParameterStatus."""
    return message(Backend.PARAMETER_STATUS, _cstring(name) + _cstring(value))


def command_complete(tag: str) -> bytes:
    """CommandComplete."""
    return message(Backend.COMMAND_COMPLETE, _cstring(tag))


def data_row(values: Sequence[bytes | None]) -> bytes:
    """DataRow."""
    parts = [_U16.pack(len(values))]
    for value in values:
        parts += [_I32.pack(-1)] if value is None else [_I32.pack(len(value)), value]
    return message(Backend.DATA_ROW, b"".join(parts))


def ready_for_query(status: int) -> bytes:
    """ReadyForQuery with a TransactionStatus."""
    return message(Backend.READY_FOR_QUERY, bytes((status,)))
