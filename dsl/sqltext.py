"""Finds references in SQL text, by what PostgreSQL's lexer would make of their surroundings (Part I "Substitution").

Comments, quoted identifiers and the tags of dollar quotes are left alone. In a literal a reference stands for text; in
the body of a dollar quote, as anywhere else, for SQL: bodies are mostly code (DO, CREATE FUNCTION).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from dsl.references import ESCAPED_REFERENCE, REFERENCE, Reference, SubstitutionError

#: Dollar quotes within dollar quotes; nobody writes more than three.
MAX_QUOTE_DEPTH = 50

_LETTER = r"A-Za-z_\x80-\U0010ffff"
#: Where something may begin that is not plain code.
_POINT = re.compile(r"[-/'\"$]")
_LINE_COMMENT = re.compile(r"--[^\r\n]*")
_QUOTED_NAME = re.compile(r'"[^"]*(?:""[^"]*)*"?')
_PREFIX = re.compile(rf"(?<![{_LETTER}0-9])(?:[EeBbXxNn]|[Uu]&)\Z")
_WORD = re.compile(rf"[{_LETTER}0-9]+\Z")
#: Longer words mean nothing here.
_LONGEST_WORD = 32
_COMMENT_MARK = re.compile(r"/\*|\*/")
_DOLLAR_QUOTE = re.compile(rf"\$(?:[{_LETTER}][{_LETTER}0-9]*)?\$")
_DELIMITERS = re.compile(rf"(?=({_DOLLAR_QUOTE.pattern}))")
_PLAIN_BODY = re.compile(r"[^']*(?:''[^']*)*")
_ESCAPED_BODY = re.compile(r"[^'\\]*(?:(?:''|\\.)[^'\\]*)*\\?", re.S)
#: A literal goes on after white space with a line break in it.
_CONTINUED = re.compile(r"(?>(?:[ \t\f\v]++|--[^\r\n]*+)*)[\r\n](?>(?:\s++|--[^\r\n]*+[\r\n])*)'")
_BLANK = r"(?>(?:\s++|--[^\r\n]*+[\r\n]|/\*(?>(?:[^*]|\*(?!/))*)\*/)*)"
_CLOSES = re.compile(rf"{_BLANK}\)")
_SUBSCRIPT = re.compile(rf"{_BLANK}\[|\.")
#: Statements in whose grammar constants stand bare: no cast, no parentheses.
_BARE = re.compile(rf"{_BLANK}(?:SET|FETCH|MOVE|ALTER|CREATE\s+(?:(?:TEMP|TEMPORARY|UNLOGGED)\s+)?"
                   r"(?:SEQUENCE|ROLE|USER|SERVER|SUBSCRIPTION))\b", re.I)
_SET_OPERATORS = frozenset({"union", "intersect", "except", "select"})
#: After these the grammar wants a simple expression: a cast needs parentheses.
_SIMPLE_AFTER = frozenset({"first", "next", "offset"})


class Place(Enum):
    """What a reference stands in."""

    CODE = "code"
    LITERAL = "literal"
    ESCAPED_LITERAL = "escaped literal"  # E'...' and U&'...': backslashes count


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a reference stands. `list_of`: alone in the parentheses of `in`, or of `any` or ALL (`any`)."""

    place: Place
    list_of: str | None = None
    bare: bool = False


_LITERAL, _ESCAPED = Spot(Place.LITERAL), Spot(Place.ESCAPED_LITERAL)


def replace_references(text: str, known: Callable[[str], bool], write: Callable[[Reference, Spot], str]) -> str:
    """Replaces each reference whose name is known by what `write` makes of it. Raises SubstitutionError."""
    return _Scan(known, write, _BARE.match(text) is not None).code(text, 0)


class _Scan:
    def __init__(self, known: Callable[[str], bool], write: Callable[[Reference, Spot], str], bare: bool) -> None:
        self.known = known
        self.write = write
        self.bare = bare

    def code(self, text: str, depth: int) -> str:
        """SQL: a statement, or the body of a dollar quote."""
        if depth > MAX_QUOTE_DEPTH:
            raise SubstitutionError(f"dollar quotes are nested more than {MAX_QUOTE_DEPTH} levels deep")
        out: list[str] = []
        before = _Before()
        delimiters: dict[str, int] | None = None
        done = position = 0  # what is written; where to look on
        while (point := _POINT.search(text, position)) is not None:
            start, mark = point.start(), point[0]
            position = start + 1
            if mark == "'":
                before.push(text[done:start])
                piece, end = self._literal(text, start, _prefix(text, start, done))
                out += (text[done:start], piece)
                before.push("'")
            elif mark == '"':
                quoted = _QUOTED_NAME.match(text, start)
                assert quoted is not None
                before.push(text[done:start])
                end = quoted.end()
                out.append(text[done:end])
                before.push('"')
            elif mark in "-/":
                line = _LINE_COMMENT.match(text, start)
                if line is None and not text.startswith("/*", start):
                    continue
                before.push(text[done:start])
                end = line.end() if line is not None else _comment_end(text, start + 2)
                out.append(text[done:end])
            else:
                glued = start > done and _WORD.match(text[start - 1]) is not None
                if not glued:
                    if delimiters is None:
                        delimiters = {m[1]: m.start() for m in _DELIMITERS.finditer(text, start)}
                    opening = _DOLLAR_QUOTE.match(text, start)
                    if opening and delimiters[opening[0]] >= opening.end():
                        closing = text.index(opening[0], opening.end())
                        body = text[opening.end():closing]
                        before.push(text[done:start])
                        out += (text[done:start], _enclose(body, self.code(body, depth + 1), opening[0]))
                        done = position = closing + len(opening[0])
                        before.push("$")
                        continue
                reference = REFERENCE.match(text, start)
                if reference is None or not self.known(reference["name"]):
                    continue
                before.push(text[done:start])
                end = reference.end()
                out += (text[done:start], self._operand(text, reference, before, glued))
                before.push("?")
            done = position = end
        out.append(text[done:])
        return "".join(out)

    def _literal(self, text: str, start: int, prefix: str) -> tuple[str, int]:
        """A string literal from its first quote on, with its continuations: its new text, and where it ends."""
        escaped = prefix in ("E", "U")
        body = _ESCAPED_BODY if prefix == "E" else _PLAIN_BODY
        out, position = ["'"], start + 1
        while True:
            content = body.match(text, position)
            assert content is not None
            out.append(self._in_literal(content[0], escaped))
            position = content.end()
            if position >= len(text):
                return "".join(out), position
            further = _CONTINUED.match(text, position + 1)
            if further is None:
                return "".join([*out, "'"]), position + 1
            out.append(text[position:further.end()])
            position = further.end()

    def _in_literal(self, content: str, escaped: bool) -> str:
        if "$" not in content:
            return content
        spot = _ESCAPED if escaped else _LITERAL

        def replace(match: re.Match[str]) -> str:
            if match["name"] is None or not self.known(match["name"]):
                return match[0]
            return self.write(Reference.of(match), spot)

        return (ESCAPED_REFERENCE if escaped else REFERENCE).sub(replace, content)

    def _operand(self, text: str, match: re.Match[str], before: _Before, glued: bool) -> str:
        """A reference in code. What is inserted stays one operand, whatever its neighbours are."""
        start, end = match.span()
        last = before.last()
        # Within a word, as in `part_$n`, only digits make sense.
        spot = Spot(Place.CODE, None, True) if glued else Spot(Place.CODE, before.opens_list(text, end), self.bare)
        written = self.write(Reference.of(match), spot)
        if written == match[0]:
            return written
        quoted = written.startswith("'")
        cast = "::" in written and (quoted or written[0] not in "'(" or written.startswith("(-"))
        if (cast and (_SUBSCRIPT.match(text, end) or last in _SIMPLE_AFTER)) or (quoted and last == "'"):
            written = f"({written})"
        if quoted and start and (glued or text[start - 1] in "&'\"$"):
            written = " " + written  # E$n, U&$n must not become another kind of literal
        follower = text[end:end + 1]
        return written + " " if follower and (follower.isalnum() or follower in "_'") else written


class _Before:
    """What stands before a point: the code without its comments; literals and the like as one character each."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def push(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)

    def words(self) -> Iterator[str]:
        """The tokens backwards, lower-case: words, and single other characters."""
        for piece in reversed(self.pieces):
            rest = piece.rstrip()
            while rest:
                word = _WORD.search(rest[-_LONGEST_WORD:])
                token = word[0] if word else rest[-1]
                yield token.lower()
                rest = rest[:-len(token)].rstrip()

    def last(self) -> str:
        """The last token, or nothing."""
        return next(self.words(), "")

    def opens_list(self, text: str, end: int) -> str | None:
        """Whether a reference that ends there is alone in the parentheses of IN, ANY, SOME or ALL."""
        if self.last() != "(" or not _CLOSES.match(text, end):
            return None
        _, word, before = (*itertools.islice(self.words(), 3), "", "")[:3]
        if word == "in":
            return "in"
        if word in ("any", "some") or (word == "all" and before not in _SET_OPERATORS):
            return "any"
        return None


def _prefix(text: str, quote: int, done: int) -> str:
    """What kind of literal begins at that quote: E, U, or any other; what ends before `done` is no part of it."""
    match = _PREFIX.search(text[max(done, quote - 3):quote])
    if match is None:
        return ""
    before = quote - len(match[0]) - 1
    # In `a$e'...'` the e is part of the name.
    return "" if before >= done and text[before] == "$" else match[0][0].upper()


def _comment_end(text: str, position: int) -> int:
    """Behind a comment that begins before `position`; comments nest."""
    depth = 1
    for mark in _COMMENT_MARK.finditer(text, position):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(text)


def _enclose(old: str, new: str, delimiter: str) -> str:
    """The body between its dollar quotes; if what was inserted would end them, between others."""
    if new != old and (new + delimiter).index(delimiter) != len(new):
        tag = next(tag for n in itertools.count() if (tag := f"df{n}") not in new)
        delimiter = f"${tag}$"
    return delimiter + new + delimiter
