"""Statements that are rewritten: as good as the same statement written by hand, and errors point into what the client sent.

Each case is what the client sends through the proxy, and what somebody without dfproxy would send directly. `^^` stands
right before the place that the error has to point at (it is not sent).
"""

from __future__ import annotations

import re

import pytest

from proxy.wire import build
from tests.differential.compare import Said, differences
from tests.differential.conftest import Stage
from tests.differential.conversation import Cancel, Conversation, Sleeping, extended, send, talk
from tests.differential.runner import hold

#: name -> (through the proxy, directly)
CASES = {
    "the name of a column": ("SELECT 'a' ~> 'b', ('c' ~> 'd'), df.seq('e', 'f')", "SELECT df.seq('a', 'b') AS \"?column?\", df.seq('c', 'd') AS \"?column?\", df.seq('e', 'f')"),
    "result": ("SELECT 'a' ~> 'b' AS x", "SELECT df.seq('a', 'b') AS x"),
    "all operators": (
        "SELECT ('a' |=> 'x') ~> ('b' & 'c') ~> ('d' | 'e') ~> ('f' ?> 'g' !> 'h') ~> @> ('i') AS x",
        "SELECT df.seq(df.seq(df.seq(df.seq(df.as('a', 'x'), df.join('b', 'c')), df.race('d', 'e')), df.if('f', 'g', 'h')), df.loop('i')) AS x",
    ),
    "error behind": ("SELECT 'a' ~> 'b', ^^nosuch", "SELECT df.seq('a', 'b'), nosuch"),
    "error before": ("SELECT ^^nosuch, 'a' ~> 'b'", "SELECT nosuch, df.seq('a', 'b')"),
    "error between": ("SELECT 'a' ~> 'b', ^^nosuch, 'c' ~> 'd'", "SELECT df.seq('a', 'b'), nosuch, df.seq('c', 'd')"),
    "error inside": ("SELECT 'a' ~> ^^nosuch ~> 'c'", "SELECT df.seq(df.seq('a', nosuch), 'c')"),
    "error in an operand": ("SELECT 'a' ~> ('b' || ^^lover('x')) ~> 'c'", "SELECT df.seq(df.seq('a', 'b' || lover('x')), 'c')"),
    "error on another line": ("SELECT 'a' ~>\n   'b' |=> 'x',\n\n   ^^nosuch", "SELECT df.as(df.seq('a',\n   'b'), 'x'),\n\n   nosuch"),
    "error behind wide characters": ("SELECT 'ü€😀' ~> 'b', 'ü€😀', ^^nosuch", "SELECT df.seq('ü€😀', 'b'), 'ü€😀', nosuch"),
    "error in a second statement": ("SELECT 'a' ~> 'b' AS x; SELECT ^^nosuch", "SELECT df.seq('a', 'b') AS x; SELECT nosuch"),
    "error in a first statement": ("SELECT ^^nosuch; SELECT 'a' ~> 'b'", "SELECT nosuch; SELECT df.seq('a', 'b')"),
    "syntax error": ("SELECT 'a' ~> 'b' FROM ^^WHERE", "SELECT df.seq('a', 'b') FROM WHERE"),
    "syntax error at the end": ("SELECT 'a' ~> 'b' FROM (^^", "SELECT df.seq('a', 'b') FROM ("),
    "error at run time": ("SELECT 'a' ~> 'b', 1 / 0", "SELECT df.seq('a', 'b') AS \"?column?\", 1 / 0"),
    "error of a value": ("SELECT 'a' ~> 'b', ^^'x'::int", "SELECT df.seq('a', 'b'), 'x'::int"),
    "error of a function": ("SELECT 'a' ~> 'b', complain('error', 'e')", "SELECT df.seq('a', 'b') AS \"?column?\", complain('error', 'e')"),
    "notice": ("SELECT 'a' ~> 'b' AS x, complain('notice', 'n')", "SELECT df.seq('a', 'b') AS x, complain('notice', 'n')"),
    "error of a builder": ("SELECT 'a' ~> ''", "SELECT df.seq('a', '') AS \"?column?\""),
    "error in a DO block": (
        "DO $$\nDECLARE f text;\nBEGIN\n  f := 'a' ~>\n    'b'\n    ~> 'c';\n  PERFORM 1/0;\nEND $$",
        "DO $$\nDECLARE f text;\nBEGIN\n  f := df.seq(df.seq('a',\n    'b'),\n     'c');\n  PERFORM 1/0;\nEND $$",
    ),
    "error of a query in a DO block": (
        "DO $$\nBEGIN\n  PERFORM 'a' ~> 'b';\n  PERFORM nosuch(\n1);\nEND $$",
        "DO $$\nBEGIN\n  PERFORM df.seq('a', 'b');\n  PERFORM nosuch(\n1);\nEND $$",
    ),
    "syntax error in a DO block": (
        "DO $$\nBEGIN\n  PERFORM 'a' ~> 'b';\n  ^^ELSE\nEND $$", "DO $$\nBEGIN\n  PERFORM df.seq('a', 'b');\n  ELSE\nEND $$",
    ),
    "error in a function body": (
        "CREATE FUNCTION play.f() RETURNS text LANGUAGE sql AS $$\n  SELECT 'a' ~> 'b'\n  FROM ^^nosuch $$",
        "CREATE FUNCTION play.f() RETURNS text LANGUAGE sql AS $$\n  SELECT df.seq('a', 'b')\n  FROM nosuch $$",
    ),
    "error in a quoted function body": (
        "CREATE FUNCTION play.f() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN ''a'' ~> ''b''; ^^ELSE END'",
        "CREATE FUNCTION play.f() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN df.seq(''a'', ''b''); ELSE END'",
    ),
    "prepared in SQL": ("PREPARE p AS SELECT 'SELECT 1' ~> $1, ^^nosuch", "PREPARE p AS SELECT df.seq('SELECT 1', $1), nosuch"),
    "insert select": (
        "INSERT INTO parents SELECT 9, 'SELECT 1' ~> title, -1 FROM documents WHERE id = 1",
        "INSERT INTO parents SELECT 9, df.seq('SELECT 1', title), -1 FROM documents WHERE id = 1",
    ),
    "explain": ("EXPLAIN (COSTS off, VERBOSE) SELECT 'SELECT 1' ~> title FROM documents", "EXPLAIN (COSTS off, VERBOSE) SELECT df.seq('SELECT 1', title) FROM documents"),
}  # fmt: skip


def _position(said: list[Said]) -> str | None:
    return next((dict(s.fields).get("P") for s in said if s.what == "ERROR_RESPONSE"), None)  # type: ignore[return-value]


def _check(sent: str, direct: list[Said], proxied: list[Said]) -> None:
    marked = sent.find("^^")
    found = [d for d in differences(direct, proxied) if d.where != "ERROR_RESPONSE.P"]
    assert not found, "\n".join(map(str, found))
    assert (_position(direct) is not None) == (marked >= 0), "the case expects what PostgreSQL does not do"
    assert _position(proxied) == (str(marked + 1) if marked >= 0 else None)


@pytest.mark.parametrize("case", CASES)
def test_simple(stage: Stage, case: str) -> None:
    sent, plain = CASES[case]
    direct = hold(stage.scene, talk(case, plain, "SELECT 'after'"))
    proxied = hold(stage.scene, talk(case, sent.replace("^^", ""), "SELECT 'after'"), address=stage.proxied)
    _check(sent, direct, proxied)


@pytest.mark.parametrize("case", [c for c in CASES if ";" not in re.sub(r"\$\$.*\$\$|'.*'", "", CASES[c][0], flags=re.DOTALL)])
def test_extended(stage: Stage, case: str) -> None:
    sent, plain = CASES[case]
    direct = hold(stage.scene, talk(case, extended(plain), "SELECT 'after'"))
    proxied = hold(stage.scene, talk(case, extended(sent.replace("^^", "")), "SELECT 'after'"), address=stage.proxied)
    _check(sent, direct, proxied)


def test_in_a_pipeline_each_error_finds_its_statement(stage18: Stage) -> None:
    sent = ["SELECT 1", "SELECT 'a' ~> 'b' ~> 'c', ^^nosuch", "SELECT 2, ^^nosuch", "SELECT 'a' ~> 'b', ^^nosuch", "SELECT 'a' ~> 'b' AS x"]
    plain = ["SELECT 1", "SELECT df.seq(df.seq('a', 'b'), 'c'), nosuch", "SELECT 2, nosuch", "SELECT df.seq('a', 'b'), nosuch", "SELECT df.seq('a', 'b') AS x"]
    for way in (extended, build.query):
        direct = hold(stage18.scene, talk("p", b"".join(map(way, plain))))
        proxied = hold(stage18.scene, talk("p", b"".join(way(s.replace("^^", "")) for s in sent)), address=stage18.proxied)
        assert {d.where for d in differences(direct, proxied)} == {"ERROR_RESPONSE.P"}
        positions = [dict(s.fields)["P"] for s in proxied if s.what == "ERROR_RESPONSE"]
        assert positions == [str(s.index("^^") + 1) for s in sent if "^^" in s]


def test_errors_late_in_a_prepared_statement_s_life(stage18: Stage) -> None:
    """A statement that is planned again fails when it is executed, and its error points into what Parse had."""
    def talking(text: str) -> list[str | bytes]:
        return ["CREATE TABLE play.t (gone int)", build.parse("s", text) + build.sync(), build.bind("", "s") + build.execute() + build.sync(),
                "ALTER TABLE play.t DROP COLUMN gone", build.bind("", "s") + build.execute() + build.sync()]  # fmt: skip

    sent, plain = "SELECT 'a' ~> 'b' AS x, ^^gone FROM play.t", "SELECT df.seq('a', 'b') AS x, gone FROM play.t"
    direct = hold(stage18.scene, talk("p", *talking(plain)))
    proxied = hold(stage18.scene, talk("p", *talking(sent.replace("^^", ""))), address=stage18.proxied)
    _check(sent, direct, proxied)


@pytest.mark.parametrize(("encoding", "codec", "word"), [("LATIN1", "latin-1", "Größe"), ("SJIS", "cp932", "表ソ能"), ("EUC_JP", "euc_jp", "表ソ能"), ("BIG5", "cp950", "功能")])
def test_positions_count_characters_of_any_encoding(stage18: Stage, encoding: str, codec: str, word: str) -> None:
    sent = f"SELECT '{word}' ~> 'SELECT ''{word}''' AS \"{word}\", '{word}', ^^nosuch"
    plain = f"SELECT df.seq('{word}', 'SELECT ''{word}''') AS \"{word}\", '{word}', nosuch"
    setting = f"SET client_encoding = '{encoding}'"
    for way in (extended, build.query):
        direct = hold(stage18.scene, talk("e", setting, way(plain.encode(codec))))
        proxied = hold(stage18.scene, talk("e", setting, way(sent.replace("^^", "").encode(codec))), address=stage18.proxied)
        _check(sent, direct, proxied)


@pytest.mark.parametrize("way", [build.query, extended])
@pytest.mark.parametrize(("sent", "code", "message"), [
    ("SELECT 1, ^^df.strat('SELECT 1')", "42883", "df.strat"),
    ("SELECT 'ü' || ^^df.strat('SELECT 1')", "42883", "df.strat"),
    ("SELECT df.start('a' ~> 'b' ~> ^^df.brake())", "42883", "df.brake"),
    ("SELECT df.start('c' ^^?> 't')", "42601", "?>"),
])  # fmt: skip
def test_the_compiler_s_errors_are_the_backend_s(stage: Stage, sent: str, code: str, message: str, way: object) -> None:
    """Raised inside the transaction, with a position, and without a trace of how."""
    ask = way(sent.replace("^^", ""))  # type: ignore[operator]
    said = hold(stage.scene, talk("c", "BEGIN", ask, "SELECT 1", "ROLLBACK", "SELECT 1"), address=stage.proxied)
    first, second = (dict(s.fields) for s in said if s.what == "ERROR_RESPONSE")
    assert first["C"] == code
    assert message in str(first["M"])
    assert first["P"] == str(sent.index("^^") + 1)
    assert not {"n", "W", "F", "L", "R", "q", "p"} & set(first)
    assert second["C"] == "25P02"
    states = [dict(s.fields)["payload"] for s in said if s.what == "READY_FOR_QUERY"]
    assert states == [b"I", b"T", b"E", b"E", b"I", b"I"]


def test_cancel_reaches_a_rewritten_statement(stage: Stage) -> None:
    def talking(text: str) -> Conversation:
        return talk("c", "BEGIN", send(text, until=""), Sleeping("A", "PgSleep"), Cancel("A"), send(until="Z"), "ROLLBACK")

    direct = hold(stage.scene, talking("SELECT df.seq('a', 'b') AS \"?column?\", pg_sleep(60)"))
    proxied = hold(stage.scene, talking("SELECT 'a' ~> 'b', pg_sleep(60)"), address=stage.proxied)
    assert not differences(direct, proxied)
