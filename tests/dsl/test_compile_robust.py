"""The compiler on texts of any kind: it never raises, changes nothing but its spans, and stays linear."""

from __future__ import annotations

import re

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsl.compiler import MAX_BODY_DEPTH, compile_sql, mentions_dsl
from dsl.dialect import DISTINCTIVE, Tokens, lex, literal
from tests.fix_postgres import Database

_PIECES = r"""~> |=> ?> !> @> & | || :: := => = < ( ) [ ] , ; . .. : + - * / % -- /* */ ' '' " $$ $x$ $1 $ \ # @ ~ ! ? { }
    'a' 'b' E'c\'' "q" df df. df.start( df.seq( df.loop( df.break() df.explain(' df.nope( "df". start as if case when then
    else end select from where do $$ begin perform return execute create function language sql plpgsql extension
    pg_durable drop is null array x y 1 2.5 0x1f U&'x' int text loop between collate "C" at time zone over filter
    operator(pg_catalog.~>) variadic fut ä 𝄞"""
PIECES = st.sampled_from([*_PIECES.split(), "\n", "\t"])
SOUP = st.lists(PIECES, max_size=40).flatmap(
    lambda pieces: st.sampled_from(["", " "]).map(lambda gap: gap.join(pieces))
)
#: Everything that the compiler may put in.
INSERTED = re.compile(r'df\.(?:seq|as|join|race|if|loop|"loop")\(|[,)]|duroxide\.warning\(')


def check(source: str, conforming: bool = True) -> None:
    compiled = compile_sql(source, standard_conforming_strings=conforming)
    if compiled is None:
        return
    if compiled.error is not None:
        assert 1 <= compiled.error.position <= len(source) + 1
        assert compiled.error.message in compiled.sql.replace("''", "'").replace("\\\\", "\\") or "\n" in source
        return
    assert compiled.sql != source
    if "pg_durable" not in source.lower():
        assert compiled.sql.count("\n") == source.count("\n")
    assert compiled.source_position(1) >= 1
    assert compiled.source_position(len(compiled.sql) + 1) == len(source) + 1
    last = 0
    for position in range(1, len(compiled.sql) + 2):
        source_position = compiled.source_position(position)
        assert 1 <= source_position <= len(source) + 1
        # A character that was not inserted is found where it came from.
        if position <= len(compiled.sql) and source_position <= len(source):
            last = max(last, source_position)
    assert last <= len(source)


@settings(max_examples=1500, deadline=None)
@given(SOUP, st.booleans())
@example("df.start('a'~>'b' & ", True)
@example("SELECT case 'a' ~> case ; end ) ]", True)
@example("df.seq(case when 'a' ~> , ) end", True)
@example("DO '", True)
@example("DO E'\\u12' ~>", True)
def test_soup(source: str, conforming: bool) -> None:
    check(source, conforming)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=200), st.booleans())
def test_any_text(source: str, conforming: bool) -> None:
    check(source, conforming)
    mentions_dsl(source.encode("utf-8", "surrogatepass"))


@settings(max_examples=500, deadline=None)
@given(SOUP)
def test_a_compiled_text_was_mentioned(source: str) -> None:
    if compile_sql(source) is not None:
        assert mentions_dsl(source.encode())


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["'a'", "x", "df.sql('b')", "('c' ~> 'd')", "$1"]), min_size=2, max_size=6),
       st.lists(st.sampled_from([" ~> ", "~>", "\n~>\n", " /* c */ ~> ", " & ", " | "]), min_size=6, max_size=6),
       st.sampled_from(["SELECT {}", "DO $$ BEGIN x := {}; END $$", "SELECT 1, df.start({}), 'tail'"]))  # fmt: skip
def test_only_spans_change(operands: list[str], operators: list[str], frame: str) -> None:
    text = operands[0] + "".join(o + x for o, x in zip(operators, operands[1:], strict=False))
    source = frame.format(text)
    compiled = compile_sql(source)
    if compiled is None:
        return
    # Without what was put in and what it replaced, both are the same, to the character.
    without = re.sub(r", '[^']*(?:''[^']*)*', '[^']*(?:''[^']*)*', \d+\)", "", compiled.sql)
    without = INSERTED.sub("", without.replace(' AS "?column?"', ""))
    expected = re.sub(r"[ \t]*(?:~>|&|\|)", "", source)
    assert INSERTED.sub("", expected).replace(" ", "") == without.replace(" ", "")
    # Literals and names are found where they stand in the source.
    for found in re.finditer(r"'[abcd]'|\bx\b|\$1", compiled.sql):
        at = compiled.source_position(found.start() + 1) - 1
        if source.startswith(found.group(), at):
            continue
        assert "duroxide.warning(" in compiled.sql  # the texts of warnings quote the source


#: Operands that don't show that a workflow is meant; a lone literal shows nothing either.
OTHERS = st.sampled_from(["x", "t.y", '"z"', "$1", "$2::pair", "f(x)", "5", "'5'::int8", "(x)", "now()", "array[x]", "x[1]",
                          "(SELECT max(x) FROM t)", "x || y", "a + 1", "CASE WHEN x THEN y ELSE 'z' END", "NULL", "lower('x')"])


@settings(max_examples=500, deadline=None)
@given(st.lists(OTHERS, min_size=2, max_size=6), st.lists(st.sampled_from(sorted({*DISTINCTIVE, "&", "|", "->"})), min_size=6, max_size=6),
       st.none() | st.integers(0, 5), st.booleans(),
       st.sampled_from(["SELECT {}", "SELECT df.id FROM documents df WHERE {} ORDER BY df.start", "SELECT df.status(x), {}",
                        "DO $$ BEGIN x := {}; EXECUTE 'SELECT x ~> $1'; END $$", "SELECT df.sql('x'); INSERT INTO t VALUES (1, {})",
                        "CREATE FUNCTION f(x pair) RETURNS text LANGUAGE sql AS $$ SELECT x ~> 1, {} $$"]))  # fmt: skip
def test_others_operators_are_left_alone(operands: list[str], operators: list[str], literal_at: int | None, loop: bool, frame: str) -> None:
    if literal_at is not None and literal_at < len(operands):
        operands[literal_at] = "'abc'"
    elif loop:
        operands[-1] = "@> " + operands[-1]
    text = operands[0] + "".join(f" {o} {x}" for o, x in zip(operators, operands[1:], strict=False))
    assert compile_sql(frame.format(text)) is None


def test_what_speaks_late_costs_no_more_passes() -> None:
    source = "x := a ~> b"
    for depth in range(23):
        source = f"DO $a{depth}$ BEGIN a := b ~> c; EXECUTE $b{depth}$ {source}; SELECT a ~> b, df.sql('x') $b{depth}$; END $a{depth}$"
    compiled = compile_sql(source)
    assert compiled is not None
    assert compiled.sql.count("df.seq(") == MAX_BODY_DEPTH  # two at each level that it looks into


@pytest.mark.parametrize(
    "source",
    [
        "SELECT df.start(" + " ~> ".join(["'SELECT $a'"] * 10_000) + ")",
        "SELECT df.start(" + " & ".join(["'a'"] * 10_000) + ")",
        "SELECT " + "(" * 2_000 + "'a' ~> 'b'" + ")" * 2_000,
        "SELECT df.start(" + "('a $x' ~> " * 2_000 + "'b'" + ")" * 2_000 + ")",
        "SELECT " + "df.seq('a $x', " * 2_000 + "'b' & 'c'" + ")" * 2_000,
        "SELECT " + "@> " * 10_000 + "'b'",
        "SELECT " + "(" * 2_000 + "'c' ?> 't'" + ")" * 2_000 + " !> 'e'",
        "SELECT df.start(" + "CASE WHEN true THEN " * 2_000 + "'c' & 't'" + " END" * 2_000 + ")",
        "SELECT df.start(" + " ~> ".join(f"('select $n{i}' |=> 'n{i + 1}')" for i in range(5_000)) + ")",
        "DO $$ BEGIN " + "PERFORM df.start('a' ~> 'b');\n" * 5_000 + "END $$",
        "SELECT df.start('a' ~> '" + "x''" * 500_000 + "')",
    ],
    ids=["chain", "join", "parens", "right", "calls", "loops", "partial", "case", "names", "body", "literal"],
)  # fmt: skip
def test_large(source: str) -> None:
    compiled = compile_sql(source)
    assert compiled is not None
    assert compiled.error is None


@pytest.mark.parametrize("source", ["SELECT " + "(" * 50_000 + " ~> 'b'", "/*" * 50_000 + " ~> ", "SELECT $a" * 50_000,
                                    "SELECT " + "'a" * 50_001, "df.start(" * 20_000, "case " * 50_000 + "~>",
                                    "SELECT " + "[" * 50_000 + " ~> "])  # fmt: skip
def test_large_nonsense(source: str) -> None:
    check(source)


def test_deep_bodies() -> None:
    source = "SELECT 'a' ~> 'b'"
    for depth in range(40):
        source = f"DO $a{depth}$ BEGIN EXECUTE $b{depth}${source}$b{depth}$; END $a{depth}$"
    compile_sql(source)
    shallow = source
    for depth in range(39, 9, -1):
        shallow = shallow.removeprefix(f"DO $a{depth}$ BEGIN EXECUTE $b{depth}$").removesuffix(f"$b{depth}$; END $a{depth}$")
    compiled = compile_sql(shallow)
    assert compiled is not None
    assert "df.seq('a', 'b')" in compiled.sql


LITERALS = st.lists(
    st.sampled_from(["''", "\\\\", "\\'", "\\n", "\\x41", "\\u00e4", "\\101", "\\q", "a", "ä", "\n", " ", "~>", "'\n'", "--"]),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(LITERALS, min_size=1, max_size=30), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_literals_mean_what_postgresql_says(literals: list[str], conforming: bool) -> None:
    """Against the server below; here: a literal's map of origins is consistent."""
    for text in literals:
        for prefix in ("", "E", "N"):
            source = f"{prefix}'{text}'"
            tokens = lex(source, standard_conforming_strings=conforming)
            if tokens is None or len(tokens) != 1:
                continue
            found = literal(source, standard_conforming_strings=conforming)
            if found is None:
                continue
            offsets = [found.at(i) for i in range(len(found.value) + 1)]
            assert offsets == sorted(set(offsets))
            assert offsets[-1] == len(source) - 1


def test_literal_values(database18: Database) -> None:
    sources = [
        "'a''b'", "'a'\n'b'", "'a' -- x\n 'b'", "'a\\b'", "E'a\\'b\\\\'", "E'\\x41\\u00e4\\101\\t\\q'", "$$a'b$$", "$x$a$$b$x$",
        "N'a'", "E'a'\n'\\x41'", "'ä𝄞'", "E'a''b'", "''", "E''", "$$$$",
    ]  # fmt: skip
    with psycopg.connect(database18.dsn(), autocommit=True) as connection:
        for conforming in ("on", "off"):
            connection.execute(f"SET standard_conforming_strings = {conforming}; SET escape_string_warning = off")
            for source in sources:
                row = connection.execute(b"SELECT " + source.encode() + b"::text").fetchone()
                found = literal(source, standard_conforming_strings=conforming == "on")
                assert row is not None
                assert found is not None
                assert found.value == row[0], source
                assert source[: found.at(0)] in ("'", "E'", "N'", "$$", "$x$")


def pieces(tokens: Tokens | None) -> list[str]:
    assert tokens is not None
    return [tokens.text(i) for i in range(len(tokens))]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a~>b", ["a", "~>", "b"]),
        ("a ~>-1", ["a", "~>-", "1"]),
        ("a*-1", ["a", "*", "-", "1"]),
        ("a=-1", ["a", "=", "-", "1"]),
        ("a@-1", ["a", "@-", "1"]),
        ("'a'|=>'b'", ["'a'", "|=>", "'b'"]),
        ("a->>'b'", ["a", "->>", "'b'"]),
        ("a ~>--c\n b", ["a", "~>", "b"]),
        ("a ~>/*c*/b", ["a", "~>", "b"]),
        ("x:=@>y", ["x", ":=", "@>", "y"]),
        ("x::int[]", ["x", "::", "int", "[", "]"]),
        ("1..10", ["1", "..", "10"]),
        ("1.5e-3.x", ["1.5e-3", ".", "x"]),
        (".5 5. 0xFF 1_000", [".5", "5.", "0xFF", "1_000"]),
        ("$1::text", ["$1", "::", "text"]),
        ("a$b$c", ["a$b$c"]),
        ("$a$x$b$y$a$z", ["$a$x$b$y$a$", "z"]),
        ("'a' 'b'", ["'a'", "'b'"]),
        ("'a'\n'b'", ["'a'\n'b'"]),
        ("E'a\\'b' x'1F' U&\"d\" U&'x'", ["E'a\\'b'", "x'1F'", 'U&"d"', "U&'x'"]),
        ("/* a /* b */ c */ d -- e", ["d"]),
        ("a\u00a0b \u3000", ["a\u00a0b", "\u3000"]),
        ("f=>1", ["f", "=>", "1"]),
        ("", []),
        ("  -- x", []),
    ],
)
def test_lexical_rules(source: str, expected: list[str]) -> None:
    assert pieces(lex(source)) == expected


@pytest.mark.parametrize("source", ["'a", '"a', "/* a", "/* a /* b */", "$$ a", "$x$ a $y$", "E'a\\'", "U&'a", "x'1"])
def test_unfinished(source: str) -> None:
    assert lex(source) is None


def test_quotes_without_conforming_strings() -> None:
    assert lex("'a\\'", standard_conforming_strings=False) is None
    assert pieces(lex("'a\\'b'", standard_conforming_strings=False)) == ["'a\\'b'"]
