"""Encoders and decoders, against each other and against what a real server sends."""

from __future__ import annotations

import socket
import struct
import time

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire import backend, build
from proxy.wire.frames import Frame, FrameParser, ProtocolError
from proxy.wire.messages import Backend, Direction, Frontend
from tests.fix_postgres import Database

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
values = st.lists(st.none() | st.binary(max_size=50), max_size=20)


def payload(message: bytes) -> bytes:
    parser = FrameParser()
    parser.feed(message)
    frame = parser.next_frame()
    assert frame is not None
    assert parser.buffered == 0
    return frame.payload


@given(values)
def test_data_row(row: list[bytes | None]) -> None:
    assert backend.data_row(payload(build.data_row(row))) == row


@given(st.dictionaries(st.sampled_from("SVCMDHPpqWsctdnFLR"), texts))
def test_error_fields(fields: dict[str, str]) -> None:
    assert backend.error_fields(backend.encode_error_fields(fields)) == fields


def test_error_fields_tolerate_what_is_missing_or_not_text() -> None:
    assert backend.error_fields(b"\0") == {}
    assert backend.error_fields(b"") == {}
    raw = b"SERROR\0M\xff\xfe\0\0"
    assert backend.encode_error_fields(backend.error_fields(raw)) == raw
    with pytest.raises(ProtocolError):
        backend.error_fields(b"SERROR")


def test_error_response() -> None:
    fields = backend.error_fields(payload(build.error_response("FATAL", "08006", "no", hint="do")))
    assert fields == {"S": "FATAL", "V": "FATAL", "C": "08006", "M": "no", "H": "do"}


@given(st.integers(0, 2**32 - 1), st.binary(min_size=4, max_size=256))
def test_backend_key_data(pid: int, key: bytes) -> None:
    assert backend.backend_key_data(payload(build.backend_key_data(pid, key))) == (pid, key)


@pytest.mark.parametrize("size", [0, 3, 257])
def test_cancel_keys_out_of_bounds(size: int) -> None:
    with pytest.raises(ProtocolError):
        backend.backend_key_data(b"\0\0\0\1" + b"k" * size)


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (backend.data_row, b""),
        (backend.data_row, b"\0\1"),
        (backend.data_row, b"\0\1\0\0\0\x05ab"),
        (backend.data_row, b"\0\0x"),
        (backend.row_description, b"\0\1name"),
        (backend.row_description, b"\0\1name\0\0\0"),
        (backend.parameter_status, b"name\0value"),
        (backend.command_tag, b"SELECT 1"),
        (backend.transaction_status, b""),
        (backend.transaction_status, b"II"),
        (backend.authentication_code, b"\0\0"),
        (backend.sasl_mechanisms, b"\0\0\0\0"),
        (backend.parameter_description, b"\0\2\0\0\0\1"),
    ],
)
def test_malformed_payloads(decode, data: bytes) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ProtocolError):
        decode(data)


def test_zero_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="zero byte"):
        build.query("SELECT '\0'")
    with pytest.raises(ValueError, match="zero byte"):
        build.parse("a\0b", "SELECT 1")


def test_directions() -> None:
    assert Frontend.QUERY.direction is Direction.FRONTEND
    assert Backend.DATA_ROW.direction is Direction.BACKEND
    assert Frontend.COPY_DATA.direction is Backend.COPY_DONE.direction is Direction.BOTH
    assert Frontend.COPY_FAIL.direction is Direction.FRONTEND


class Wire:
    """A connection to a server that speaks in this codec, blocking."""

    def __init__(self, database: Database, **parameters: str) -> None:
        assert database.cluster.port is not None
        self._socket = socket.create_connection(("127.0.0.1", database.cluster.port), timeout=30)
        self._parser = FrameParser()
        self.send(build.startup({"user": database.owner, "database": database.name, **parameters}))

    def send(self, *messages: bytes) -> None:
        self._socket.sendall(b"".join(messages))

    def until(self, type_: int) -> list[Frame]:
        """Messages up to the first of this type."""
        got: list[Frame] = []
        while True:
            while (frame := self._parser.next_frame()) is not None:
                got.append(frame)
                if frame.type == type_:
                    return got
            data = self._socket.recv(65536)
            assert data, f"closed after {got}"
            self._parser.feed(data)

    def close(self) -> None:
        self.send(build.terminate())
        assert self._socket.recv(1) == b""
        self._socket.close()


def test_with_a_real_server(database: Database) -> None:
    wire = Wire(database)
    start = wire.until(Backend.READY_FOR_QUERY)
    parameters = dict(backend.parameter_status(f.payload) for f in start if f.type == Backend.PARAMETER_STATUS)
    assert parameters["client_encoding"] == "UTF8"
    (key,) = [backend.backend_key_data(f.payload) for f in start if f.type == Backend.BACKEND_KEY_DATA]
    assert backend.transaction_status(start[-1].payload) == ord("I")

    wire.send(
        build.parse("s", "SELECT $1::int4 AS n, $2::text AS \"ü\", NULL AS nothing", [23, 25]),
        build.describe_statement("s"),
        build.bind("p", "s", [struct.pack(">i", 7), "ä".encode()], [1, 0], [0, 0, 0]),
        build.describe_portal("p"),
        build.execute("p"),
        build.close_portal("p"),
        build.close_statement("s"),
        build.sync(),
    )
    replies = wire.until(Backend.READY_FOR_QUERY)
    assert "".join(chr(f.type) for f in replies) == "1tT2TDC33Z"
    assert backend.parameter_description(replies[1].payload) == [23, 25]
    columns = backend.row_description(replies[4].payload)
    assert [(c.name, c.type_oid, c.type_size, c.format, c.table_oid) for c in columns] == [
        ("n", 23, 4, 0, 0), ("ü", 25, -1, 0, 0), ("nothing", 25, -1, 0, 0)
    ]
    assert backend.data_row(replies[5].payload) == [b"7", "ä".encode(), None]
    assert backend.command_tag(replies[6].payload) == "SELECT 1"

    wire.send(build.query("CREATE TEMP TABLE t (a int)"), build.query("COPY t FROM STDIN"))
    wire.until(Backend.COPY_IN_RESPONSE)
    wire.send(build.copy_data(b"1\n2\n"), build.copy_data(b"3\n"), build.copy_done())
    assert backend.command_tag(wire.until(Backend.READY_FOR_QUERY)[0].payload) == "COPY 3"
    wire.send(build.query("COPY t FROM STDIN"), build.copy_fail("never mind"))
    (error,) = [f for f in wire.until(Backend.READY_FOR_QUERY) if f.type == Backend.ERROR_RESPONSE]
    assert "never mind" in backend.error_fields(error.payload)["M"]
    wire.send(build.parse("", "SELEKT"), build.flush())
    fields = backend.error_fields(wire.until(Backend.ERROR_RESPONSE)[-1].payload)
    assert (fields["C"], fields["P"], fields["V"]) == ("42601", "1", "ERROR")
    wire.send(build.sync())
    wire.until(Backend.READY_FOR_QUERY)

    wire.send(build.query("SELECT pg_sleep(600)"))
    with psycopg.connect(database.superuser_dsn, autocommit=True) as admin:
        while admin.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", (key[0],)).fetchone() != ("active",):
            time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", database.cluster.port or 0), timeout=30) as other:
        other.sendall(build.cancel_request(*key))
        assert other.recv(1) == b""
    (error,) = [f for f in wire.until(Backend.READY_FOR_QUERY) if f.type == Backend.ERROR_RESPONSE]
    assert backend.error_fields(error.payload)["C"] == "57014"
    wire.close()
