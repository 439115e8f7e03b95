"""The life of a session: how it starts, what reaches it unasked, how it is cancelled and ended."""

from __future__ import annotations

import struct

from proxy.wire import build
from proxy.wire.messages import PROTOCOL_3_2, protocol
from tests.differential.conversation import (
    Admin,
    Ask,
    Cancel,
    Connect,
    HalfClose,
    Raw,
    Sleeping,
    extended,
    on,
    send,
    talk,
)

SLEEP = "SELECT pg_sleep(60)"
ENOUGH_TO_BLOCK = "SELECT repeat('x', 1000) FROM generate_series(1, 10000)"


def packet(code: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A packet without a type, with any length word."""
    return struct.pack(">II", len(payload) + 8 if length is None else length, code) + payload


CONVERSATIONS = [
    # Startup
    talk("start", "SELECT 1"),
    talk("start with parameters", "SHOW application_name", "SHOW DateStyle", "SHOW work_mem", application_name="an app", DateStyle="German", work_mem="5MB"),
    talk("start with options", "SHOW work_mem", "SHOW search_path", "SHOW geqo", options="-c work_mem=6MB -c search_path=a,\\ b --geqo=off"),
    talk("start with a client encoding", "SHOW client_encoding", "SELECT 'x'", client_encoding="LATIN1"),
    talk("start with a client encoding in quotes", "SHOW client_encoding", client_encoding="'utf-8'"),
    talk("start with an extension parameter", Connect("A", {"_pq_.nosuch": "1", "_pq_.other": "2"}), "SELECT 1", connect=False),
    talk("start with protocol 3.2", Connect("A", {}, PROTOCOL_3_2), "SELECT 1", connect=False),
    talk("start with protocol 3.1", Connect("A", {}, protocol(3, 1)), "SELECT 1", connect=False),
    talk("start with protocol 3.9999", Connect("A", {"_pq_.test": "x"}, protocol(3, 9999)), "SELECT 1", connect=False),
    talk("start with an unknown parameter", Connect("A", {"nosuch": "1"}, until="E."), connect=False),
    talk("start with a bad value", Connect("A", {"work_mem": "x"}, until="E."), connect=False),
    talk("start with a bad encoding", Connect("A", {"client_encoding": "nosuch"}, until="E."), connect=False),
    talk("start with a bad option", Connect("A", {"options": "-c nosuch=1"}, until="E."), Connect("B", {"options": "--what"}, until="E."), connect=False),
    talk("start without privilege", Connect("A", {"session_preload_libraries": "x"}, until="E."), connect=False),
    talk("no such database", Connect("A", {"database": "nosuch"}, until="E."), connect=False),
    talk("no such role", Connect("A", {"user": "nosuch"}, until="E."), connect=False),
    talk("no user", Connect("A", {"user": ""}, until="E."), connect=False),
    talk("long names", Connect("A", {"user": "u" * 200}, until="E."), Connect("B", {"application_name": "a" * 3000}), connect=False),
    talk("names that are not UTF-8", Connect("A", {"application_name": "ü \t"}), "SHOW application_name", connect=False),
    talk("replication", Connect("A", {"replication": "database"}), "SELECT 1", "SHOW work_mem", "BEGIN", "COMMIT", "NOSUCH_COMMAND", connect=False),
    talk("replication refused", Connect("A", {"replication": "nonsense"}, until="E."), connect=False),
    talk("database by default", Raw("A", build.startup({"user": "postgres"}), "Z"), "SELECT current_database()", connect=False),
    # Requests ahead of the startup packet
    talk("SSLRequest", Ask("A", build.ssl_request()), "SELECT 1", connect=False),
    talk("an unknown request", Raw("A", packet(protocol(1234, 5699))), connect=False),
    talk("a protocol of the past", Raw("A", packet(protocol(2, 0), b"x\0\0")), connect=False),
    talk("a protocol of the future", Raw("A", packet(protocol(4, 0), b"user\0x\0\0"), "E."), connect=False),
    talk("a length that is too large", Raw("A", packet(protocol(3, 0), b"x", 100_000)), connect=False),
    talk("a length that is too small", Raw("A", packet(protocol(3, 0), b"x", 4)), connect=False),
    talk("a startup packet without an end", Raw("A", packet(protocol(3, 0), b"user\0postgres"), "E."), connect=False),
    talk("a startup packet with more at the end", Raw("A", packet(protocol(3, 0), b"user\0postgres\0\0more"), "E."), connect=False),
    talk("an empty startup packet", Raw("A", packet(protocol(3, 0), b"\0"), "E."), connect=False),
    talk("a parameter without a value", Raw("A", packet(protocol(3, 0), b"user\0postgres\0database\0\0"), "E."), connect=False),
    talk("another protocol", Raw("A", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), connect=False),
    talk("requests behind the startup packet", Raw("A", build.startup({"user": "postgres"}) + build.query("SELECT 1") + extended("SELECT 2") + build.query("SELECT 'a' -- df.start('x' ~> 'y')"), "ZZZZ"), connect=False),
    talk("a message that is too long", send(b"Q\x7f\xff\xff\xff", until=".")),
    talk("a message that is too short", send(b"Q\0\0\0\3", until=".")),
    talk("a message with a length below zero", send(b"Q\xff\xff\xff\xff", until=".")),
    talk("a Sync that is too long", send(b"S\0\1\0\0", until=".")),
    # What comes unasked
    talk("notify oneself", "LISTEN c", "NOTIFY c", "NOTIFY c, 'payload ü'", "SELECT pg_notify('c', 'x' || n) FROM generate_series(1, 5) n", "BEGIN", "NOTIFY c, 'held back'", "COMMIT", "BEGIN", "NOTIFY c, 'never'", "ROLLBACK", "UNLISTEN c", "NOTIFY c"),
    talk("notify one another", Connect("B"), "LISTEN c", "LISTEN d", on("B", "NOTIFY c, 'from B'"), send(until="A"), on("B", "NOTIFY d"), send(until="A"), "SELECT 1"),
    talk("notifications wait for the end of a transaction", Connect("B"), "LISTEN c", "BEGIN", on("B", "NOTIFY c, 'early'"), "SELECT 1", "COMMIT"),
    talk("many notifications", Connect("B"), "LISTEN c", on("B", "SELECT pg_notify('c', repeat('x', 7000) || n) FROM generate_series(1, 200) n"), send(until="A" * 200), "SELECT 1"),
    talk("a notification that is too long", "SELECT pg_notify('c', repeat('x', 8000))"),
    talk("notify inside a pipeline", "LISTEN c", extended("NOTIFY c, '1'") + extended("SELECT 1") + extended("NOTIFY c, '2'")),
    talk("a setting changed by a function", "SELECT set_config('application_name', 'by function', false)", "SELECT set_config('client_encoding', 'LATIN1', false)", "SELECT set_config('TimeZone', 'UTC', true)"),
    talk("role changes are reported", "SET SESSION AUTHORIZATION DEFAULT", "RESET ROLE", "SET ROLE NONE"),
    # Cancelling
    talk("cancel", send(SLEEP, until=""), Sleeping("A", "PgSleep"), Cancel("A"), send(until="Z"), "SELECT 1"),
    talk("cancel in a transaction", "BEGIN", "SELECT 1", send(SLEEP, until=""), Sleeping("A", "PgSleep"), Cancel("A"), send(until="Z"), "SELECT 1", "ROLLBACK"),
    talk("cancel an extended query", send(extended(SLEEP), until=""), Sleeping("A", "PgSleep"), Cancel("A"), send(until="Z"), "SELECT 1"),
    talk("cancel inside a pipeline", send(extended(SLEEP) + extended("SELECT 2") + extended("SELECT 3"), until=""), Sleeping("A", "PgSleep"), Cancel("A"), send(until="ZZZ"), "SELECT 1"),
    talk("cancel with 3.2's long key", Connect("A", {}, PROTOCOL_3_2), send(SLEEP, until=""), Sleeping("A", "PgSleep"), Cancel("A"), send(until="Z"), "SELECT 1", connect=False),
    talk("cancel an idle session", Cancel("A"), "SELECT 1"),
    talk("cancel with a wrong key", Cancel("A", b"\0\0\0\0"), Cancel("A", b"x" * 256), "SELECT 1"),
    talk("cancel a lock", Connect("B"), on("B", "BEGIN"), on("B", "LOCK TABLE documents"), send("SELECT count(*) FROM documents", until=""), Sleeping("A", "relation"), Cancel("A"), send(until="Z"), on("B", "ROLLBACK"), "SELECT 1"),
    talk("statement timeout", "SET statement_timeout = 50", SLEEP, "SELECT 1", extended(SLEEP)),
    talk("lock timeout", Connect("B"), on("B", "BEGIN; LOCK TABLE documents"), "SET lock_timeout = 50", "SELECT count(*) FROM documents", on("B", "COMMIT"), "SELECT count(*) FROM documents"),
    talk("serialization failure", Connect("B"), "CREATE TABLE play.s AS SELECT 1 AS n", "BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT * FROM play.s", on("B", "UPDATE play.s SET n = 2"), "UPDATE play.s SET n = 3", "ROLLBACK"),
    talk("two sessions see each other's work", Connect("B"), "CREATE TABLE play.s (n int)", "BEGIN", "INSERT INTO play.s VALUES (1)", on("B", "SELECT * FROM play.s"), "COMMIT", on("B", "SELECT * FROM play.s")),
    # Ending
    talk("terminated by an administrator", Sleeping("A", "ClientRead"), Admin("SELECT pg_terminate_backend({A})"), send(until=".")),
    talk("terminated in the middle of a statement", send(SLEEP, until=""), Sleeping("A", "PgSleep"), Admin("SELECT pg_terminate_backend({A})"), send(until=".")),
    talk("terminated in a transaction", "BEGIN", "SELECT 1", Sleeping("A", "ClientRead"), Admin("SELECT pg_terminate_backend({A})"), send(until=".")),
    talk("terminated during COPY", "CREATE TABLE play.c (id int)", send("COPY play.c FROM STDIN", until="G"), Sleeping("A", "ClientRead"), Admin("SELECT pg_terminate_backend({A})"), send(until=".")),
    talk("idle in transaction timeout", "SET idle_in_transaction_session_timeout = 50", "BEGIN", send(until=".")),
    talk("idle session timeout", "SET idle_session_timeout = 50", send(until=".")),
    talk("ends itself", "SELECT 1", send("SELECT pg_terminate_backend(pg_backend_pid())", until=".")),
    talk("half closed", "SELECT 1", HalfClose()),
    talk("half closed in a transaction", "BEGIN", "SELECT 1", HalfClose()),
    talk("half closed with an answer on its way", send(ENOUGH_TO_BLOCK, until="T"), HalfClose()),
    talk("half closed with a pipeline on its way", send(b"".join(extended(f"SELECT {n}, repeat('x', 10000)") for n in range(200)), until=""), HalfClose()),
    talk("half closed inside a message", send(b"Q\0\0\1\0SELECT", until=""), HalfClose()),
    talk("half closed inside COPY", "CREATE TABLE play.c (id int)", send("COPY play.c FROM STDIN", until="G"), send(build.copy_data(b"1\n"), until=""), HalfClose()),
    talk("half closed after a large statement", send("SELECT 'df.start(', length('" + "x" * 1_000_000 + "')", until=""), HalfClose()),
]  # fmt: skip
