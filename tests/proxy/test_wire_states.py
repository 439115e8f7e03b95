"""The protocol's states: the tables by themselves, a client and a server through them, and random conversations with real servers."""

from __future__ import annotations

import random
import re
import socket

import pytest

from proxy.wire import backend, build
from proxy.wire.frames import FrameParser, ProtocolError
from proxy.wire.messages import Authentication, Backend, Frontend, TransactionStatus
from proxy.wire.states import (
    BATCH,
    STARTUP,
    STARTUP_TABLE,
    TELLING_PLAIN,
    Conversation,
    Event,
    Phase,
    Startup,
    packet_event,
    server_event,
)
from tests.fix_postgres import Database
from tests.proxy.pairs import ConnectionPair

R, Z = build.authentication, build.ready_for_query
IDLE = TransactionStatus.IDLE


def started() -> ConnectionPair:
    pair = ConnectionPair()
    pair.packet(build.startup({"user": "ann"}))
    pair.from_server(R(Authentication.OK))
    pair.from_server(build.parameter_status("client_encoding", "UTF8"))
    pair.from_server(build.backend_key_data(1, b"abcd"))
    pair.from_server(Z(IDLE))
    assert pair.phase is Phase.READY
    assert all(end.conversation.idle for end in pair.ends)
    return pair


def reply(type_: Backend) -> bytes:
    return build.message(type_, b"\0\0")


def test_startup_with_every_encryption_request_and_scram() -> None:
    pair = ConnectionPair()
    pair.packet(build.gssenc_request())
    assert pair.phase is Phase.GSS_ANSWER
    pair.answer(False)
    pair.packet(build.ssl_request())
    pair.answer(False)
    pair.packet(build.startup({"user": "ann"}))
    pair.from_server(build.message(Backend.NEGOTIATE_PROTOCOL_VERSION, b"\0\3\0\0\0\0\0\0"))
    pair.from_server(build.authentication_sasl(["SCRAM-SHA-256"]))
    assert pair.phase is Phase.PASSWORD
    pair.from_client(build.sasl_initial("SCRAM-SHA-256", b"n,,"))
    pair.from_server(R(Authentication.SASL_CONTINUE, b"r="))
    pair.from_client(build.sasl_response(b"c="))
    pair.from_server(R(Authentication.SASL_FINAL, b"v="))
    assert pair.phase is Phase.AUTHENTICATION
    pair.from_server(R(Authentication.OK))
    pair.from_server(Z(IDLE))
    assert pair.phase is Phase.READY


def test_cancel() -> None:
    pair = ConnectionPair()
    pair.packet(build.cancel_request(1, b"abcd"))
    assert pair.phase is Phase.CANCELLING


@pytest.mark.parametrize("request_", [build.ssl_request(), build.gssenc_request()])
def test_encryption_is_asked_for_once(request_: bytes) -> None:
    pair = ConnectionPair()
    pair.packet(request_)
    pair.answer(False)
    with pytest.raises(ProtocolError, match="out of place"):
        pair.packet(request_)


def test_every_transition_that_the_table_lacks_is_refused() -> None:
    for phase in Phase:
        for event in Event:
            machine = Startup()
            machine.phase = phase
            if (phase, event) in STARTUP_TABLE:
                assert machine.advance(event) is STARTUP_TABLE[phase, event]
            else:
                with pytest.raises(ProtocolError):
                    machine.advance(event)
                assert machine.phase is phase


def test_every_phase_can_be_reached() -> None:
    reached = {Phase.FIRST_PACKET}
    for _ in Phase:
        reached |= {to for (phase, _), to in STARTUP_TABLE.items() if phase in reached}
    assert reached == set(Phase)


def test_messages_that_have_no_business_before_the_server_is_ready() -> None:
    for type_ in (Backend.DATA_ROW, Backend.COPY_DATA, 0, 255):
        with pytest.raises(ProtocolError):
            server_event(type_)
    with pytest.raises(ProtocolError):
        packet = ConnectionPair()
        packet_event(packet.packet(b"\0\0\0\x08" + (1234 << 16 | 9999).to_bytes(4, "big")))


def test_requests_are_answered_in_order() -> None:
    pair = started()
    pair.from_client(build.query("a"), "a")
    pair.from_client(build.parse("", "b"), "b")
    pair.from_client(build.sync(), "c")
    assert pair.current() == "a"
    pair.from_server(build.data_row([b"1"]))
    assert pair.from_server(build.command_complete("SELECT 1")) is None
    assert pair.from_server(Z(IDLE)) == "a"
    assert pair.current() == "b"
    assert pair.from_server(reply(Backend.PARSE_COMPLETE)) == "b"
    assert pair.from_server(Z(IDLE)) == "c"
    assert pair.current() is None


def test_an_error_skips_to_sync_whether_it_was_sent_already_or_not() -> None:
    for sync_first in (True, False):
        pair = started()
        pair.from_client(build.parse("", "a"), "a")
        pair.from_client(build.bind("", ""), "b")
        pair.from_client(build.execute(""), "c")
        if sync_first:
            pair.from_client(build.sync(), "sync")
            pair.from_client(build.query("next"), "next")
        assert pair.current() == "a"
        pair.from_server(build.error_response("ERROR", "42601", "no"))
        if not sync_first:
            assert not pair.client.conversation.idle
            pair.from_client(build.execute(""), "skipped")
            pair.from_client(build.query("skipped, too"), "skipped")
            pair.from_client(build.sync(), "sync")
            pair.from_client(build.query("next"), "next")
        assert pair.current() == "sync"
        assert pair.from_server(Z(IDLE)) == "sync"
        assert pair.current() == "next"


def test_a_sync_during_copy_in_is_ignored() -> None:
    pair = started()
    for message in (build.parse("", "COPY"), build.bind("", ""), build.execute("")):
        pair.from_client(message)
    pair.from_client(build.sync(), "ignored")  # libpq sends one here, and another after the data
    pair.from_server(reply(Backend.PARSE_COMPLETE))
    pair.from_server(reply(Backend.BIND_COMPLETE))
    pair.from_server(reply(Backend.COPY_IN_RESPONSE))
    pair.from_client(build.copy_data(b"x"))
    pair.from_client(build.copy_done())
    pair.from_client(build.sync(), "sync")
    pair.from_client(build.query("next"), "next")
    pair.from_server(build.command_complete("COPY 1"))
    assert pair.from_server(Z(IDLE)) == "sync"
    assert pair.current() == "next"


def test_copy_data_sent_ahead() -> None:
    pair = started()
    pair.from_client(build.query("COPY"), "copy")
    pair.from_client(build.copy_data(b"x"))
    pair.from_client(build.copy_done())
    pair.from_client(build.query("next"), "next")
    pair.from_server(reply(Backend.COPY_IN_RESPONSE))
    pair.from_server(build.command_complete("COPY 1"))
    assert pair.from_server(Z(IDLE)) == "copy"
    assert pair.from_server(Z(IDLE)) == "next"
    assert pair.client.conversation.idle


def test_a_reply_that_does_not_fit_puts_the_order_right() -> None:
    conversation: Conversation[str] = Conversation()
    conversation.sent(Frontend.SYNC, "swallowed by a COPY that failed")
    conversation.sent(Frontend.PARSE, "parse")
    done = conversation.received(Backend.PARSE_COMPLETE)
    assert done is not None
    assert done.tag == "parse"
    assert conversation.idle
    assert conversation.received(Backend.READY_FOR_QUERY) is None


def test_the_startup_packet_is_the_first_request() -> None:
    conversation: Conversation[str] = Conversation(started=False)
    conversation.sent(Frontend.QUERY, "early")
    first = conversation.received(Backend.READY_FOR_QUERY)
    assert first is not None
    assert first.type == STARTUP
    second = conversation.received(Backend.READY_FOR_QUERY)
    assert second is not None
    assert second.tag == "early"


def test_copy_ends_that_nothing_asked_for_do_not_pile_up() -> None:
    conversation: Conversation[str] = Conversation()
    conversation.sent(Frontend.QUERY)
    for _ in range(1000):
        conversation.sent(Frontend.COPY_DONE)
        conversation.sent(Frontend.COPY_FAIL)
    assert len(conversation) == 2


# --- random conversations with a real server ---

#: SQL that fails says its own number, which is how an error is known to belong to it.
BAD = "SELECT nobody_knows_{n}"
GOOD = ("SELECT {n}", "", "SELECT generate_series(1, 3), {n}", "BEGIN", "COMMIT", "ROLLBACK", "SELECT 1 / 0 AS x{n}",
        "COPY (SELECT {n}) TO STDOUT", "SELECT {n}; SELECT {n}")


def batch(rng: random.Random, n: int) -> list[tuple[bytes, str]]:
    """Messages of one request with their tags, complete so that the server is never left waiting."""
    sql = rng.choice([*GOOD, BAD, BAD]).format(n=n)
    match rng.randrange(6):
        case 0:
            return [(build.query(sql), sql)]
        case 1:
            rows = "".join(f"{i}\n" for i in range(rng.randrange(3))) + ("bad\n" if rng.random() < 0.3 else "")
            end = build.copy_done() if rng.random() < 0.7 else build.copy_fail(f"nobody_knows_{n}")
            return [(build.query("COPY t FROM STDIN"), f"copy {n}"), (build.copy_data(rows.encode()), ""), (end, "")]
        case 2:
            # As libpq does it: one Sync that the COPY swallows, and one that counts.
            return [
                (build.parse("", "COPY t FROM STDIN"), f"parse copy {n}"), (build.bind("", ""), f"bind copy {n}"),
                (build.execute(""), f"copy {n}"), *([(build.sync(), "swallowed")] * rng.randrange(2)), (build.copy_data(b"7\n"), ""), (build.copy_done(), ""),
                (build.sync(), "sync"),
            ]
        case _:
            sql = rng.choice([*GOOD[:-1], BAD, BAD]).format(n=n)
            name = rng.choice(["", "", f"s{n}"])
            messages = [(build.parse(name, sql), f"parse {sql}")]
            if rng.random() < 0.3:
                messages.append((build.describe_statement(name), f"describe {sql}"))
            messages.append((build.bind("", name), f"bind {sql}"))
            if rng.random() < 0.5:
                messages.append((build.describe_portal(""), f"describe {sql}"))
            messages.append((build.execute("", rng.choice([0, 0, 1])), f"execute {sql}"))
            if rng.random() < 0.3:
                messages.append((build.close_statement(name), f"close {n}"))
            if rng.random() < 0.2:
                messages.append((build.flush(), ""))
            if rng.random() < 0.6:
                messages.append((build.sync(), "sync"))
            return messages


def send_alone(conversation: Conversation[str], waiting: list[tuple[bytes, str]], *, tagged: bool) -> list[bytes]:
    """The next request, if it is one Query or a batch up to its Sync, told as one; else nothing."""
    if not conversation.idle or not waiting:
        return []
    if waiting[0][0][0] == Frontend.QUERY:
        conversation.sent_alone(Frontend.QUERY, waiting[0][1] if tagged else None)
        return [waiting.pop(0)[0]]
    types = [m[0] for m, _ in waiting]
    end = types.index(Frontend.SYNC) if Frontend.SYNC in types else len(types)
    if end == len(types) or not set(types[:end]) <= set(b"PBDECH"):
        return []
    conversation.sent_alone(BATCH, "; ".join(tag for _, tag in waiting[:end]) if tagged else None)
    return [waiting.pop(0)[0] for _ in range(end + 1)]


@pytest.mark.parametrize(("alone", "tagged"), [(False, False), (True, False), (True, True)],
                         ids=["one by one", "batches as one", "batches as one, tagged"])
@pytest.mark.parametrize("seed", range(20))
def test_random_conversations(database18: Database, seed: int, alone: bool, tagged: bool) -> None:
    rng = random.Random(seed)
    messages = [m for n in range(100, 140) for m in batch(rng, n)]
    messages += [(build.sync(), "sync"), (build.query("ROLLBACK"), "rollback"), (build.query("SELECT 'the end'"), "end")]
    conversation: Conversation[str] = Conversation(started=False)
    parser = FrameParser()
    with socket.create_connection(("127.0.0.1", database18.cluster.port or 0), timeout=30) as s:
        s.sendall(build.startup({"user": database18.owner, "database": database18.name}))
        s.sendall(build.query("CREATE TEMP TABLE t (a int)"))
        conversation.sent(Frontend.QUERY, "create")
        waiting, ended, told_errors = list(messages), False, 0
        while not ended:
            assert waiting or not conversation.idle
            if alone and (batch_ := send_alone(conversation, waiting, tagged=tagged)):
                assert conversation.plain
                s.sendall(b"".join(batch_))
            # Some messages at once, some one by one: replies arrive in between or after everything.
            for message, tag in [waiting.pop(0) for _ in range(min(len(waiting), rng.choice([1, 1, 2, 4, 40]))) if not (
                    alone and conversation.plain and rng.random() < 0.8)]:
                s.sendall(message)
                conversation.sent(message[0], tag)
            if waiting and rng.random() < 0.3:
                continue
            s.settimeout(30 if not waiting else 0.005)
            try:
                data = s.recv(65536)
            except TimeoutError:
                continue
            assert data
            parser.feed(data)
            while (frame := parser.next_frame()) is not None:
                if frame.type == Backend.ERROR_RESPONSE:
                    fields = backend.error_fields(frame.payload)
                    number = re.search(r"nobody_knows_(\d+)", fields["M"])
                    if number is not None:
                        current = conversation.current
                        assert current is not None
                        untagged = alone and current.tag is None and (not tagged or current.type == Frontend.QUERY)
                        assert number[1] in (current.tag or "") or untagged, (fields["M"], current)
                        told_errors += current.tag is not None
                if conversation.plain and frame.type not in TELLING_PLAIN:
                    continue
                if conversation.plain and frame.type == Backend.READY_FOR_QUERY:
                    conversation.finished()
                    ended = not waiting
                    continue
                done = conversation.received(frame.type)
                ended = done is not None and done.tag == "end"
        assert conversation.idle
        assert parser.buffered == 0
