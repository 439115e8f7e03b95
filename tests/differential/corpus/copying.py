"""COPY in both directions, by both protocols, to its end and not."""

from __future__ import annotations

import struct

from proxy.wire import build
from tests.differential.conversation import Send, copy_in, extended, int4, send, talk

SYNC = build.sync()
data, done, fail = build.copy_data, build.copy_done, build.copy_fail
TABLE = "CREATE TABLE play.c (id int PRIMARY KEY, v text, d date)"
IN = "COPY play.c FROM STDIN"
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)


def rows(start: int, end: int) -> bytes:
    return b"".join(b"%d\tvalue %d\t2024-01-01\n" % (n, n) for n in range(start, end))


def begun(sql: str = IN) -> Send:
    """COPY by the extended protocol, up to CopyInResponse."""
    return send(build.parse("", sql) + build.bind("", "") + build.execute() + build.flush(), until="G")


CONVERSATIONS = [
    talk("copy in", TABLE, *copy_in(IN, rows(0, 100)), "SELECT count(*), sum(id), min(v) FROM play.c"),
    talk("copy in, many messages", TABLE, *copy_in(IN, *[rows(n, n + 1) for n in range(3000)]), "SELECT count(*) FROM play.c"),
    talk("copy in, one large message", TABLE, *copy_in(IN, rows(0, 60_000)), "SELECT count(*) FROM play.c"),
    talk("copy in, rows across messages", TABLE, *copy_in(IN, b"1\tab", b"c\t2024", b"-01-0", b"1\n2\tx\t\\N", b"\n"), "SELECT * FROM play.c ORDER BY id"),
    talk("copy in, no data", TABLE, *copy_in(IN), *copy_in(IN, b""), "SELECT count(*) FROM play.c"),
    talk("copy in, end marker", TABLE, *copy_in(IN, b"1\ta\t\\N\n\\.\n"), *copy_in(IN, b"3\ta\t\\N\n\\.\nignored\n"), "SELECT * FROM play.c"),
    talk("copy in, csv", TABLE, *copy_in("COPY play.c FROM STDIN (FORMAT csv, HEADER match)", b'id,v,d\n1,"a ""b"",\nc",2024-01-01\n'), *copy_in("COPY play.c FROM STDIN (FORMAT csv, HEADER match)", b"id,x,d\n"), "TABLE play.c"),
    talk("copy in, binary", TABLE, *copy_in("COPY play.c FROM STDIN (FORMAT binary)", HEADER + struct.pack(">h", 3) + int4(4) + int4(7) + int4(3) + b"\0bc"[1:] + b"d" + int4(-1) + b"\xff\xff"),
         *copy_in("COPY play.c FROM STDIN (FORMAT binary)", b"nonsense that is long enough to be a header"), "TABLE play.c"),
    talk("copy in, some columns", TABLE, *copy_in("COPY play.c (v, id) FROM STDIN", b"x\t1\n"), "TABLE play.c"),
    talk("copy in, where", TABLE, *copy_in("COPY play.c FROM STDIN WHERE id % 2 = 0", rows(0, 10)), "SELECT id FROM play.c ORDER BY 1"),
    talk("copy in, a bad value", TABLE, *copy_in(IN, b"1\ta\t2024-01-01\nx\tb\t2024-01-01\n"), "SELECT count(*) FROM play.c", "SELECT 1"),
    talk("copy in, a bad value in a lot of data", TABLE, *copy_in(IN, rows(0, 500), b"bad\n", *[rows(n, n + 1000) for n in range(1000, 60_000, 1000)]), "SELECT count(*) FROM play.c"),
    talk("copy in, too few columns", TABLE, *copy_in(IN, b"1\n"), *copy_in(IN, b"1\ta\t\\N\textra\n")),
    talk("copy in, a duplicate key", TABLE, *copy_in(IN, rows(0, 3), rows(0, 1))),
    talk("copy in, bytes that are no UTF-8", TABLE, *copy_in(IN, b"1\t\xff\xfe\t\\N\n")),
    talk("copy in, on_error ignore", TABLE, Send("A", build.parse("", "COPY play.c FROM STDIN (ON_ERROR ignore)") + build.bind("", "") + build.execute() + data(b"1\ta\t\\N\nx\tb\t\\N\n") + done() + SYNC, "Z"), "SELECT id FROM play.c"),
    talk("copy in, the client fails", TABLE, *copy_in(IN, rows(0, 10), fail="changed my mind ü"), "SELECT count(*) FROM play.c"),
    talk("copy in, in a transaction", TABLE, "BEGIN", *copy_in(IN, rows(0, 10)), "SAVEPOINT s", *copy_in(IN, rows(0, 1)), "ROLLBACK TO s", *copy_in(IN, rows(10, 20)), "COMMIT", "SELECT count(*) FROM play.c"),
    talk("copy in, refused at once", "COPY nosuch FROM STDIN", "COPY documents FROM STDIN (FORMAT nosuch)", "SELECT 1"),
    talk("copy in, refused at once with data on its way", send(build.query("COPY nosuch FROM STDIN") + data(b"x") * 100 + done(), until="Z"), "SELECT 1"),
    talk("copy in among other statements", TABLE, send("SELECT 1; COPY play.c FROM STDIN; SELECT 2", until="G"), Send("A", data(rows(0, 5)) + done(), "Z"), "SELECT count(*) FROM play.c"),
    talk("two copies in one query", TABLE, send("COPY play.c FROM STDIN; COPY play.c FROM STDIN", until="G"), Send("A", data(rows(0, 5)) + done(), "G"), Send("A", data(rows(5, 9)) + done(), "Z"), "SELECT count(*) FROM play.c"),
    talk("copy in, a query in the place of data", TABLE, send(IN, until="G"), send(build.query("SELECT 1"), until="EE.")),
    talk("copy in, Flush and Sync among the data", TABLE, send(IN, until="G"), Send("A", data(rows(0, 2)) + build.flush() + SYNC + data(rows(2, 4)) + done(), "Z"), "SELECT count(*) FROM play.c"),
    talk("copy in, the session is terminated", TABLE, send(IN, until="G"), Send("A", data(rows(0, 2)) + build.terminate(), ".")),
    talk("extended copy in", TABLE, begun(), Send("A", data(rows(0, 9)) + done() + SYNC, "Z"), "SELECT count(*) FROM play.c", extended("SELECT 1")),
    talk("extended copy in, all at once", TABLE, Send("A", build.parse("", IN) + build.bind("", "") + build.execute() + data(rows(0, 50)) + done() + SYNC, "Z"), "SELECT count(*) FROM play.c"),
    talk("extended copy in, Sync before the data", TABLE, Send("A", build.parse("", IN) + build.bind("", "") + build.execute() + SYNC + data(rows(0, 50)) + done() + SYNC, "Z"), "SELECT count(*) FROM play.c"),
    talk("extended copy in, a pipeline behind it", TABLE, Send("A", build.parse("", IN) + build.bind("", "") + build.execute() + data(rows(0, 50)) + done() + SYNC + extended("SELECT count(*) FROM play.c") + extended("SELECT 2"), "ZZZ")),
    talk("extended copy in, more in the same batch", TABLE, Send("A", build.parse("", IN) + build.bind("", "") + build.execute() + data(rows(0, 50)) + done() + extended("SELECT count(*) FROM play.c"), "Z")),
    talk("extended copy in, a bad value", TABLE, begun(), Send("A", data(b"x\n") + done() + SYNC, "Z"), extended("SELECT 1")),
    talk("extended copy in, the client fails", TABLE, begun(), Send("A", data(rows(0, 3)) + fail("no") + SYNC, "Z"), extended("SELECT 1")),
    talk("extended copy in, an error ahead of it", TABLE, Send("A", extended("SELECT 1/0", end=b"") + build.parse("", IN) + build.bind("", "") + build.execute() + data(rows(0, 3)) + done() + SYNC + build.query("SELECT 1"), "ZZ")),
    talk("copy out", "COPY (SELECT * FROM documents ORDER BY id) TO STDOUT", extended("COPY parents TO STDOUT"), extended("COPY parents TO STDOUT (FORMAT binary)")),
    talk("copy out, a lot", "COPY (SELECT n, repeat('x', 100) FROM generate_series(1, 8000) n) TO STDOUT"),
    talk("copy out, large rows", "COPY (SELECT repeat('x', 5000000) FROM generate_series(1, 4)) TO STDOUT (FORMAT binary)"),
    talk("copy out among other statements", "SELECT 1; COPY parents TO STDOUT; COPY parents TO STDOUT (FORMAT csv); SELECT 1/0; SELECT 2"),
    talk("copy out that fails in the middle", "COPY (SELECT 1 / (3000 - n) FROM generate_series(1, 10000) n) TO STDOUT", extended("COPY (SELECT 1 / (3 - n) FROM generate_series(1, 10) n) TO STDOUT")),
    talk("copy out with notices", "COPY (SELECT complain('notice', 'n' || id) FROM documents WHERE id < 5) TO STDOUT"),
    talk("copy out, in a pipeline", extended("SELECT 1") + extended("COPY parents TO STDOUT") + extended("SELECT 2")),
    talk("copy in through SQL that mentions df", "CREATE TABLE play.df (start text)", *copy_in("COPY play.df (start) FROM STDIN", b"df.start('a' ~> 'b')\n"), "COPY (SELECT df.start FROM play.df) TO STDOUT"),
    talk("copy in with notices from a trigger", TABLE, "CREATE FUNCTION play.t() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE 'row %', NEW.id; RETURN NEW; END $$", "CREATE TRIGGER t BEFORE INSERT ON play.c FOR EACH ROW EXECUTE FUNCTION play.t()", *copy_in(IN, rows(0, 5))),
]  # fmt: skip
