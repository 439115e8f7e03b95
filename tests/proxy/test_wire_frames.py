"""Message boundaries: however the bytes are cut, the same messages come out, and nothing is believed without a bound."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire import build
from proxy.wire.frames import (
    NOTE,
    PASS,
    PEEK,
    PEEK_BYTES,
    WHOLE,
    Frame,
    FrameParser,
    FrameSplitter,
    Peek,
    ProtocolError,
    StartupParser,
)
from proxy.wire.messages import CANCEL_REQUEST, PROTOCOL_3_0, SSL_REQUEST

frames = st.lists(
    st.builds(Frame, st.sampled_from(b"QPBDESdZTC"), st.one_of(st.binary(max_size=40), st.binary(max_size=1500))),
    max_size=12,
)
modes = st.dictionaries(st.sampled_from(b"QPBDESdZTC"), st.sampled_from((PASS, NOTE, WHOLE, PEEK)))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at each of `cuts` (taken modulo its length)."""
    at = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


def stream(of: list[Frame]) -> bytes:
    return b"".join(f.encode() for f in of)


@given(frames, st.lists(st.integers(0, 100_000)))
def test_parser_gives_the_same_frames_however_the_bytes_are_cut(given: list[Frame], cuts: list[int]) -> None:
    parser, got = FrameParser(), []
    for piece in pieces(stream(given), cuts):
        parser.feed(piece)
        while (frame := parser.next_frame()) is not None:
            got.append(frame)
    assert got == given
    assert parser.buffered == 0


def test_parser_at_every_single_cut() -> None:
    data = build.query("SELECT 1") + build.sync() + build.parse("s", "SELECT $1", [23])
    whole = FrameParser()
    whole.feed(data)
    expected = [whole.next_frame() for _ in range(4)]
    assert expected[3] is None
    for cut in range(len(data) + 1):
        parser, got = FrameParser(), []
        for piece in (data[:cut], data[cut:]):
            parser.feed(piece)
            while (frame := parser.next_frame()) is not None:
                got.append(frame)
        assert got == expected[:3]


@given(frames, modes, st.lists(st.integers(0, 100_000)), st.integers(0, 60))
def test_splitter_loses_and_invents_nothing(
    given: list[Frame], modes: dict[int, int], cuts: list[int], max_whole: int
) -> None:
    splitter = FrameSplitter(max_whole=max_whole)
    for type_, mode in modes.items():
        splitter.modes[type_] = mode
    data = stream(given)
    out, seen = b"", []
    for piece in pieces(data, cuts):
        for item in splitter.feed(piece):
            if isinstance(item, Frame):
                assert modes[item.type] == WHOLE
                seen.append(item)
                out += item.encode()
            elif isinstance(item, int | Peek):
                seen.append(item)
            else:
                out += item
    assert out == data
    assert splitter.at_boundary
    expected: list[object] = []
    for frame in given:
        match modes.get(frame.type, PASS):
            case 2 if len(frame.payload) <= max_whole:
                expected.append(frame)
            case 1 | 2:
                expected.append(frame.type)
            case 3:
                expected.append(Peek(frame.type, frame.payload[:PEEK_BYTES]))
    assert seen == expected


def test_spans_that_are_forwarded_never_end_inside_a_header_nor_hold_part_of_a_whole_message() -> None:
    data = stream([Frame(ord("D"), b"x" * 9), Frame(ord("E"), b"fields"), Frame(ord("D"), b"y" * 3)])
    for cut in range(len(data) + 1):
        splitter = FrameSplitter()
        splitter.modes[ord("E")] = WHOLE
        first = list(splitter.feed(data[:cut]))
        rest = list(splitter.feed(data[cut:]))
        out = b"".join(bytes(i) for i in first + rest if not isinstance(i, Frame))  # type: ignore[arg-type]
        assert out == data[:14] + data[25:]
        forwarded = sum(len(i) for i in first if not isinstance(i, Frame))  # type: ignore[arg-type]
        # 1 to 4 bytes of a header wait for the rest of it; bytes of a payload don't wait.
        assert forwarded == (0 if cut < 5 else cut if cut <= 14 else 14 if cut < 30 else cut - 11)


@given(
    st.lists(st.builds(Frame, st.sampled_from(b"DDDTCZZEN"), st.binary(max_size=12)), max_size=30),
    st.lists(st.integers(0, 300)), st.booleans(),
)
def test_skimming_takes_only_what_feeding_would_pass(frames: list[Frame], cuts: list[int], at_messages: bool) -> None:
    data = stream(frames)
    if at_messages:  # as servers write them
        ends = [len(stream(frames[: i + 1])) for i in range(len(frames))]
        cuts = [ends[c % len(ends)] for c in cuts] if ends else []
    plain, skimmed = FrameSplitter(), FrameSplitter()
    for splitter in (plain, skimmed):
        splitter.modes[ord("Z")] = splitter.modes[ord("E")] = WHOLE
        splitter.modes[ord("C")] = NOTE
    expected, got, out, fed = [], [], b"", b""

    def feed(splitter: FrameSplitter, piece: bytes, told: list[object]) -> bytes:
        passed = b""
        for item in splitter.feed(piece):
            if isinstance(item, Frame | int):
                told.append(item)
                passed += item.encode() if isinstance(item, Frame) else b""
            else:
                passed += bytes(item)  # type: ignore[arg-type]
        return passed

    for piece in pieces(data, cuts):
        fed += feed(plain, piece, expected)
        last = skimmed.skim(piece, ord("Z"))
        if last < 0:
            out += feed(skimmed, piece, got)
            continue
        out += piece
        if last:
            assert skimmed.at_boundary
            got.append(last)
    assert out == fed
    assert [i if isinstance(i, int) else i.type for i in got] == [i if isinstance(i, int) else i.type for i in expected]
    assert plain.at_boundary == skimmed.at_boundary


def test_skimming_leaves_what_it_can_not_take_alone() -> None:
    splitter = FrameSplitter(max_length=1000)
    splitter.modes[ord("Z")] = WHOLE
    ready = build.ready_for_query(ord("I"))
    for data in (b"D", b"D\0\0", build.data_row([b"a"]) + b"D\0", ready + build.data_row([b"a"]), ready + ready,
                 struct.pack(">BI", ord("D"), 3), struct.pack(">BI", ord("D"), 5000)):
        assert splitter.skim(data, ord("Z")) == -1
        assert splitter.at_boundary
    assert splitter.skim(build.data_row([b"a"]) + ready, ord("Z")) == ord("Z")
    assert splitter.skim(struct.pack(">BI", ord("D"), 104) + b"x" * 40, ord("Z")) == 0
    assert not splitter.at_boundary
    assert splitter.skim(b"x" * 60, ord("Z")) == 0
    assert splitter.at_boundary


def test_modes_may_change_between_two_messages_of_one_feed() -> None:
    splitter = FrameSplitter()
    splitter.modes[ord("P")] = WHOLE
    seen = []
    for item in splitter.feed(build.parse("", "x") + build.bind("", "")):
        seen.append(item)
        splitter.modes[ord("B")] = PEEK
    assert isinstance(seen[1], Peek)


def test_a_payload_that_passes_is_handed_on_as_it_arrives() -> None:
    splitter = FrameSplitter()
    list(splitter.feed(struct.pack(">BI", ord("D"), 4 + 10_000_000)))
    for _ in range(10):
        chunk = random.randbytes(1000)
        assert list(splitter.feed(chunk)) == [chunk]
    assert not splitter.at_boundary


def test_a_chunk_that_only_passes_is_the_very_object_that_came() -> None:
    data = build.data_row([b"a"]) * 10
    (item,) = FrameSplitter().feed(data)
    assert item is data


@pytest.mark.parametrize("length", [0, 1, 2, 3, 1005, 0x80000000, 0xFFFFFFFF])
def test_lengths_out_of_bounds_are_refused_at_once(length: int) -> None:
    header = struct.pack(">BI", ord("D"), length)
    parser = FrameParser(max_length=1000)
    parser.feed(header)
    with pytest.raises(ProtocolError):
        parser.next_frame()
    splitter = FrameSplitter(max_length=1000)
    items = splitter.feed(build.sync() + header)
    assert bytes(next(items)) == build.sync()  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        next(items)


@given(st.lists(st.integers(0, 200)))
def test_startup_packets_however_cut(cuts: list[int]) -> None:
    parameters = {"user": "ann", "database": "app", "application_name": "tést", "options": "-c a=b"}
    data = build.ssl_request() + build.startup(parameters) + b"rest"
    parser, got = StartupParser(), []
    for piece in pieces(data, cuts):
        parser.feed(piece)
        while len(got) < 2 and (packet := parser.next_packet()) is not None:
            got.append(packet)
    assert [p.code for p in got] == [SSL_REQUEST, PROTOCOL_3_0]
    assert got[1].parameters() == parameters
    assert got[1].raw == build.startup(parameters)
    assert parser.take_rest() == b"rest"
    assert parser.take_rest() == b""


def test_cancel_keys_of_any_length() -> None:
    for size in (4, 32, 256):
        parser = StartupParser()
        parser.feed(build.cancel_request(77, b"k" * size))
        packet = parser.next_packet()
        assert packet is not None
        assert (packet.code, packet.payload) == (CANCEL_REQUEST, struct.pack(">I", 77) + b"k" * size)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\0\0\0\4", b"\0\0\0\7\0\0\0", b"\0\1\0\0", b"\xff", b"\x16\x03\x01", b"SSH-2.0"]
)
def test_what_is_no_startup_packet_is_refused_at_the_first_byte_that_tells(data: bytes) -> None:
    parser = StartupParser()
    parser.feed(data)
    with pytest.raises(ProtocolError):
        parser.next_packet()


@pytest.mark.parametrize("payload", [b"", b"user", b"user\0ann", b"user\0ann\0", b"user\0\0", b"\0x\0\0", b"user\0ann\0\0\0"])
def test_startup_parameters_that_do_not_pair_up(payload: bytes) -> None:
    parser = StartupParser()
    parser.feed(struct.pack(">II", len(payload) + 8, PROTOCOL_3_0) + payload)
    packet = parser.next_packet()
    assert packet is not None
    with pytest.raises(ProtocolError):
        packet.parameters()


def test_tls_is_told_by_its_first_byte() -> None:
    parser = StartupParser()
    parser.feed(b"\x16\x03\x01\x02\x00")
    assert parser.is_tls
