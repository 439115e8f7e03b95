"""Finds references in SQL text, by what PostgreSQL's lexer would make of their surroundings (Part I "Substitution").

Comments, quoted identifiers and the tags of dollar quotes are left alone. In a literal a reference stands for text; in
the body of a dollar quote, as anywhere else, for SQL: bodies are mostly code (DO, CREATE FUNCTION).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from dsl.references import ESCAPED_REFERENCE, REFERENCE, Reference, SubstitutionError

#: Dollar quotes within dollar quotes; nobody writes more than three.
MAX_QUOTE_DEPTH = 50

_LETTER = r"A-Za-z_\x80-\U0010ffff"
_TOKEN = re.compile(
    rf"""(?P<space>\s+|--[^\r\n]*)
    |(?P<comment>/\*)
    |(?P<literal>(?:[EeBbXxNn]|[Uu]&)?')
    |(?P<quoted>"[^"]*(?:""[^"]*)*"?)
    |(?P<word>[{_LETTER}][{_LETTER}0-9]*)
    |(?P<number>[0-9][{_LETTER}0-9.]*)
    |(?P<dollar>\$)
    |(?P<other>.)""", re.X | re.S)
_COMMENT_MARK = re.compile(r"/\*|\*/")
_DOLLAR_QUOTE = re.compile(rf"\$(?:[{_LETTER}][{_LETTER}0-9]*)?\$")
_DELIMITERS = re.compile(rf"(?=({_DOLLAR_QUOTE.pattern}))")
_PLAIN_BODY = re.compile(r"[^']*(?:''[^']*)*")
_ESCAPED_BODY = re.compile(r"[^'\\]*(?:(?:''|\\.)[^'\\]*)*\\?", re.S)
#: A literal goes on after white space with a line break in it.
_CONTINUED = re.compile(r"(?:[ \t\f\v]++|--[^\r\n]*+)*+[\r\n](?:\s++|--[^\r\n]*+[\r\n])*+'")
_BLANK = r"(?:\s++|--[^\r\n]*+[\r\n]|/\*(?:[^*]|\*(?!/))*+\*/)*+"
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
        position, before = 0, _Before()
        delimiters: dict[str, int] | None = None
        while (token := _TOKEN.match(text, position)) is not None:
            kind, end = token.lastgroup, token.end()
            if kind == "comment":
                end = _comment_end(text, end)
            elif kind == "literal":
                piece, end = self._literal(text, token)
                out.append(piece)
                position = end
                before.push("'")
                continue
            elif kind == "dollar":
                if before.glued != position:
                    if delimiters is None:
                        delimiters = {m[1]: m.start() for m in _DELIMITERS.finditer(text)}
                    opening = _DOLLAR_QUOTE.match(text, position)
                    if opening and delimiters.get(opening[0], -1) >= opening.end():
                        closing = text.index(opening[0], opening.end())
                        body = text[opening.end():closing]
                        out.append(_enclose(body, self.code(body, depth + 1), opening[0]))
                        position = closing + len(opening[0])
                        before.push("$$")
                        continue
                reference = REFERENCE.match(text, position)
                if reference and self.known(reference["name"]):
                    end = reference.end()
                    out.append(self._operand(text, reference, before))
                    position = end
                    before.push("x")
                    continue
            if kind not in ("space", "comment"):
                before.push(token[0])
            if kind in ("word", "number"):
                before.glued = end
            out.append(text[position:end])
            position = end
        return "".join(out)

    def _literal(self, text: str, opening: re.Match[str]) -> tuple[str, int]:
        """A string literal with its continuations: its new text, and where it ends."""
        escaped = opening[0][0] in "EeUu"
        body = _ESCAPED_BODY if escaped and opening[0][0] in "Ee" else _PLAIN_BODY
        out, position = [opening[0]], opening.end()
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

    def _operand(self, text: str, match: re.Match[str], before: _Before) -> str:
        """A reference in code. What is inserted stays one operand, whatever its neighbours are."""
        start, end = match.span()
        spot = Spot(Place.CODE, before.opens_list(text, end), self.bare)
        glued = before.glued == start
        if glued:  # `part_$n`
            spot = Spot(Place.CODE, None, True)
        written = self.write(Reference.of(match), spot)
        if written == match[0]:
            return written
        quoted = written.startswith("'")
        cast = "::" in written and (quoted or written[0] not in "'(" or written.startswith("(-"))
        if (cast and (_SUBSCRIPT.match(text, end) or before.last in _SIMPLE_AFTER)) or (quoted and before.last == "'"):
            written = f"({written})"
        if quoted and start and (glued or text[start - 1] in "&'\"$"):
            written = " " + written  # E$n, U&$n must not become another kind of literal
        follower = text[end:end + 1]
        return written + " " if follower and (follower.isalnum() or follower in "_'") else written


class _Before:
    """The last significant tokens, lower-case. `glued`: where the last word or number ends."""

    __slots__ = ("glued", "last", "second", "third")

    def __init__(self) -> None:
        self.glued = -1
        self.last = self.second = self.third = ""

    def push(self, token: str) -> None:
        self.third, self.second = self.second, self.last
        self.last = token.lower() if len(token) < 12 else token

    def opens_list(self, text: str, end: int) -> str | None:
        """Whether a reference that ends there is alone in the parentheses of IN, ANY, SOME or ALL."""
        if self.last != "(" or not _CLOSES.match(text, end):
            return None
        if self.second == "in":
            return "in"
        if self.second in ("any", "some") or (self.second == "all" and self.third not in _SET_OPERATORS):
            return "any"
        return None


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
