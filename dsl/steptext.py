"""Whether the text of a step can be SQL, as far as can be told without a server: for a warning, never for an error.

sqlglot does not know all of PostgreSQL, so it is only asked about plain statements of the kinds that it knows well.
What was found is remembered by the text's shape (its tokens, without numbers and literals): a client that starts the
same workflow with other values each time pays for it once.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Final

from dsl.dialect import BOUNDARIES, IDENT, NUMBER, OTHER, STRING, Tokens, lex, names
from dsl.references import REFERENCE, Reference, SubstitutionError
from dsl.sqltext import Place, Spot, replace_references

log = logging.getLogger("dfproxy.dsl")
#: It says on its own logger what it parses only roughly; nobody who runs a proxy wants to know.
logging.getLogger("sqlglot").setLevel(logging.ERROR)

#: Longer texts are not looked at. Characters.
_LONGEST: Final = 4096
#: Statements with deeper parentheses are not parsed: backtracking could take long.
_DEEPEST: Final = 12
_COMMANDS: Final = names(
    """abort alter analyse analyze begin call checkpoint close cluster comment commit copy create deallocate declare
    delete discard do drop end execute explain fetch grant import insert listen load lock merge move notify prepare
    reassign refresh reindex release repack reset revoke rollback savepoint security select set show start table
    truncate unlisten update vacuum values wait with"""
)
_KNOWN_WELL: Final = names("select insert update delete with")
#: Not all that are: some are prefix operators as well.
_KNOWN_OPERATORS: Final = names(". , ; ( ) :: = < > <= >= <> != + - * / % || -> ->> #> #>> && ~ ~* !~ !~*")
#: Words before a literal that do not make it a typed one (as in: circle '...').
_BEFORE_LITERAL: Final = BOUNDARIES | names(
    "between by not set values date time timestamp timestamptz interval to escape")
#: Syntax and names that it is known to stumble over.
_STUMBLES: Final = names("current of lateral operator xmltable json_table xmlparse overlay grouping")
_BRACES: Final = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}")


@lru_cache(maxsize=1024)
def fault(text: str) -> str | None:
    """What makes it doubtful that the text is a SQL statement, as a clause; None if nothing does."""
    if len(text) > _LONGEST or _BRACES.search(text):
        return None  # a variable may hold any piece of SQL
    whole = REFERENCE.fullmatch(text.strip())
    if whole and not whole["set"]:
        return None  # means SELECT of it
    tokens = lex(text)
    if tokens is None:
        return "a quote or a comment in it is not closed"
    return _fault(_shape(tokens))


def _shape(tokens: Tokens) -> str:
    """The text without comments, and with one number and one literal in the place of all."""
    pieces = []
    end = 0
    for index, kind in enumerate(tokens.kinds):
        piece = tokens.text(index)
        if kind == NUMBER and piece[0].isdigit():
            piece = "1"
        elif kind == STRING and piece[0] == "'":
            piece = "'x'"
        pieces.append(piece if tokens.starts[index] == end else f" {piece}")
        end = tokens.ends[index]
    return "".join(pieces)


@lru_cache(maxsize=4096)
def _fault(shape: str) -> str | None:
    try:
        text = replace_references(shape, lambda name: True, _stand_in)
    except SubstitutionError:
        return None
    tokens = lex(text)
    if tokens is None or not len(tokens):
        return None
    words = tokens.words
    if words[0] not in "(;" and words[0] not in _COMMANDS:
        return f'no statement begins with "{tokens.text(0)[:30]}"'
    depth = deepest = 0
    for word in words:
        depth += (word == "(") - (word == ")")
        deepest = max(deepest, depth)
        if depth < 0:
            return 'a ")" in it closes nothing'
    if depth:
        return 'a "(" in it is not closed'
    return _parsed(text) if words[0] in _KNOWN_WELL and deepest <= _DEEPEST and _is_plain(tokens) else None


def _is_plain(tokens: Tokens) -> bool:
    """Whether there is nothing in the statement that sqlglot might not know."""
    words, kinds = tokens.words, tokens.kinds
    if "conflict" in words and ("cross" in words or "natural" in words):
        return False  # it takes the ON of ON CONFLICT for that of the join
    for index, (word, kind) in enumerate(zip(words, kinds, strict=True)):
        before, kind_before = (words[index - 1], kinds[index - 1]) if index else ("", 0)
        if kind == STRING:
            if tokens.text(index)[0] != "'" or (kind_before == IDENT and before not in _BEFORE_LITERAL):
                return False
        elif kind == NUMBER:
            if not tokens.text(index)[0].isdigit():
                return False
        elif kind == IDENT:
            if word in _STUMBLES or (before == "as" and word in (BOUNDARIES | _COMMANDS)):
                return False
        elif kind == OTHER or (word and word[0] != '"' and word not in _KNOWN_OPERATORS):
            return False
    return True


def load() -> None:
    """Loads the parser. It takes a quarter of a second: long-running callers do it in a thread, before they need it."""
    import sqlglot  # noqa: F401


def _parsed(text: str) -> str | None:
    from sqlglot import parse
    from sqlglot.errors import SqlglotError

    try:
        parse(text, dialect="postgres")
    except SqlglotError as e:
        if "number of provided arguments" in str(e):
            return None  # a function of the user's may have a well-known name
        near = re.search(r"\x1b\[4m(.*?)\x1b\[0m", str(e), re.DOTALL)
        if near is None or not near[1].strip():
            return "it seems to be incomplete"
        return f'it seems to be wrong near "{near[1][:30]}"'
    except Exception:
        # A bug there must not cost a statement its compilation.
        log.debug("sqlglot failed on the text of a step", exc_info=True)
    return None


def _stand_in(reference: Reference, spot: Spot) -> str:
    """Something of the kind that the reference will become."""
    if spot.place is not Place.CODE:
        return "x"
    return f'(VALUES (1)) AS "{reference.name}"' if reference.row_set else "1"
