"""PostgreSQL's lexical rules, and the operators that the DSL adds to them.

sqlglot's own tokenizer can't carry this dialect: it takes single characters for operators (PostgreSQL: maximal
munch, so `~>-` is one operator), swallows the text after DO and EXECUTE, reads `{# #}` as a comment and any Unicode
space as a space, and joins neither `'a'<newline>'b'` nor knows `standard_conforming_strings`. Where the compiler
splices into other people's SQL each of these would be a corrupted statement. sqlglot still judges step texts.

Offsets are 0-based, in characters.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass


def names(text: str) -> frozenset[str]:
    """A set from a list of words."""
    return frozenset(text.split())


IDENT, QUOTED, STRING, PARAM, NUMBER, PUNCT, OP, TIGHT, COMPARE, OTHER = range(1, 11)

#: Binary operators that nothing in PostgreSQL has for text, so that they alone say "this is ours".
DISTINCTIVE = frozenset({"~>", "|=>", "?>", "!>"})
LOOP = "@>"

#: pg_get_keywords() of categories R and T (15 to 18) that end or separate expressions.
BOUNDARIES = names(
    """as create except fetch for from grant group having intersect into limit offset on order returning to union
    where window with all analyse analyze and any asc asymmetric both check collate column constraint default
    deferrable desc distinct do else end foreign in initially lateral leading not only or placing primary references
    select some symmetric table then trailing unique using variadic when
    isnull notnull overlaps ilike is join like similar"""
)
#: The rest of category T: may also name a function.
JOIN_WORDS = names(
    """authorization binary collation concurrently cross freeze full inner left natural outer right tablesample
    verbose"""
)
#: Words that begin an expression's context in PL/pgSQL, or follow another word, but are ordinary names elsewhere.
SOFT = names("return next query perform assert execute if elsif elseif while by")
#: Infix words that are not reserved.
INFIX = frozenset({"between", "escape"})
#: After these a PL/pgSQL statement begins.
STATEMENT_OPENERS = names("begin then else loop declare atomic")

# A group is never repeated by `*+`: Python before 3.11.5 takes what the last round began, and did not end, for a part
# of the match.
_SPACE = r"(?>(?:[ \t\n\r\f\v]++|--[^\n\r]*+)*)"
# What may stand between two parts of one literal: white space and comments, with a line break before the next quote.
_CONT = r"(?>(?:[ \t\f\v]++|--[^\n\r]*+)*)[\n\r](?>(?:[ \t\n\r\f\v]++|--[^\n\r]*+[\n\r])*)"
_PLAIN = r"'[^']*+(?>(?:''[^']*+)*)'"
_ESCAPED = r"'[^'\\]*+(?>(?:(?:''|\\.)[^'\\]*+)*)'"
_IDENT = r"[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*+"
_TAG = r"\$(?:[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_\u0080-\U0010ffff]*+)?\$"


def _master(plain: str) -> re.Pattern[str]:
    """One pattern for all tokens; group numbers are the constants `_G_*` below."""
    return re.compile(
        _SPACE
        + "(?:"
        + "|".join(
            (
                rf"([eE]{_ESCAPED}(?>(?:{_CONT}{_ESCAPED})*)|[nN]?{plain}(?>(?:{_CONT}{plain})*)"
                rf"|[uU]&{_PLAIN}(?>(?:{_CONT}{_PLAIN})*))",
                rf"([bBxX]{_PLAIN}(?>(?:{_CONT}{_PLAIN})*))",
                r'((?:[uU]&)?"[^"]*+(?>(?:""[^"]*+)*)")',
                # An unfinished literal: nothing that follows can be trusted.
                r"""((?:[eEnNbBxX]|[uU]&)?'|(?:[uU]&)?")""",
                rf"({_IDENT})",
                r"(\.\.|::|:=|[()\[\],;:]|\.(?![0-9]))",
                r"(/\*)",
                r"((?>(?:(?!--|/\*)[~!@#^&|`?+\-*/%<>=])+))",
                r"(0[xX][0-9a-fA-F_]++|0[oO][0-7_]++|0[bB][01_]++"
                r"|(?:[0-9][0-9_]*+(?>(?:\.(?!\.)[0-9_]*+)?)|\.[0-9][0-9_]*+)(?>(?:[eE][+-]?[0-9]++)?))",
                r"(\$[0-9]++)",
                rf"({_TAG})",
                r"(\Z)",
                r"(.)",
            )
        )
        + ")",
        re.DOTALL,
    )


(_G_STRING, _G_BITS, _G_QUOTED, _G_BROKEN, _G_IDENT, _G_PUNCT, _G_COMMENT, _G_OP, _G_NUMBER, _G_PARAM, _G_TAG,
 _G_END, _G_OTHER) = range(1, 14)  # fmt: skip
_CONFORMING = _master(_PLAIN)
_ESCAPING = _master(_ESCAPED)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_KEEPS_SIGN = frozenset("~!@#^&|`?%")
_TIGHT = frozenset("+-*/%^")
_COMPARE = frozenset({"<", ">", "=", "<=", ">=", "<>", "!=", "=>"})


class Tokens:
    """The tokens of a text, in parallel arrays (a statement of 10 MB has millions).

    `words` holds what tokens are compared by: identifiers in lower case, quoted identifiers as written without the
    closing quote, operators and punctuation as text, the empty string for literals.
    """

    __slots__ = ("conforming", "ends", "kinds", "sql", "starts", "words")

    def __init__(self, sql: str, conforming: bool) -> None:
        self.sql = sql
        self.conforming = conforming
        self.kinds = bytearray()
        self.starts = array("L")
        self.ends = array("L")
        self.words: list[str] = []

    def __len__(self) -> int:
        return len(self.kinds)

    def text(self, index: int) -> str:
        """The token as written."""
        return self.sql[self.starts[index] : self.ends[index]]


def lex(sql: str, *, standard_conforming_strings: bool = True) -> Tokens | None:
    """Tokens of `sql` by PostgreSQL's lexical rules; None if a literal or comment does not end."""
    tokens = Tokens(sql, standard_conforming_strings)
    match = (_CONFORMING if standard_conforming_strings else _ESCAPING).match
    kinds, starts, ends, words = tokens.kinds, tokens.starts, tokens.ends, tokens.words
    lowered: dict[str, str] = {}
    position = 0
    while True:
        found = match(sql, position)
        if found is None:  # can't be: `.` and `\Z` cover everything
            return None
        group = found.lastindex or _G_END
        position = found.end()
        if group == _G_IDENT:
            kind, word = IDENT, found.group(_G_IDENT)
            word = lowered.get(word) or lowered.setdefault(word, word.lower())
        elif group == _G_PUNCT:
            kind, word = PUNCT, found.group(_G_PUNCT)
        elif group == _G_STRING:
            kind, word = STRING, ""
        elif group == _G_OP:
            word = found.group(_G_OP)
            if len(word) > 1 and word[-1] in "+-" and _KEEPS_SIGN.isdisjoint(word):
                shorter = word.rstrip("+-") or word[0]
                position -= len(word) - len(shorter)
                word = shorter
            kind = TIGHT if word in _TIGHT else COMPARE if word in _COMPARE else OP
        elif group in (_G_NUMBER, _G_BITS):
            kind, word = NUMBER, ""
        elif group == _G_PARAM:
            kind, word = PARAM, ""
        elif group == _G_QUOTED:
            kind, word = QUOTED, found.group(_G_QUOTED)
            # Keeps its opening quote, so that no quoted name is ever taken for a keyword or a bracket.
            word = word[:-1]
        elif group == _G_COMMENT:
            depth = 1
            while depth:
                edge = _COMMENT_EDGE.search(sql, position)
                if edge is None:
                    return None
                depth += 1 if edge.group() == "/*" else -1
                position = edge.end()
            continue
        elif group == _G_TAG:
            close = sql.find(found.group(_G_TAG), position)
            if close < 0:
                return None
            position = close + len(found.group(_G_TAG))
            kind, word = STRING, ""
        elif group == _G_END:
            return tokens
        elif group == _G_BROKEN:
            return None
        else:
            kind, word = OTHER, found.group(_G_OTHER)
        kinds.append(kind)
        starts.append(found.start(group))
        ends.append(position)
        words.append(word)


@dataclass(frozen=True, slots=True)
class Literal:
    """A string literal's value, and how to write into it.

    `origin[i]` is the offset, within the literal's source text, of the value's character i (with one entry more for
    the end); None where the value stands in the source as it is, from `shift` on.
    """

    value: str
    shift: int
    origin: array[int] | None
    escaped: bool
    delimiter: str | None

    def at(self, offset: int) -> int:
        """Offset in the literal's source of an offset in its value."""
        return self.shift + offset if self.origin is None else self.origin[offset]

    def encode(self, text: str) -> str:
        """`text` as it must be written inside this literal."""
        if self.delimiter is not None:
            return text
        text = text.replace("'", "''")
        return text.replace("\\", "\\\\") if self.escaped else text


_ESCAPED_PART = re.compile(_ESCAPED, re.DOTALL)
_PLAIN_PART = re.compile(_PLAIN, re.DOTALL)
_TAG_AT = re.compile(_TAG)
_QUOTE = re.compile("'")
_QUOTE_OR_BACKSLASH = re.compile(r"['\\]")
_BACKSLASH = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{1,2})|([0-7]{1,3})|(.))", re.DOTALL)
_CONTROL = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def literal(source: str, *, standard_conforming_strings: bool = True) -> Literal | None:
    """The value of a string literal as written; None for one whose value is not worth knowing (U&'', byte escapes)."""
    if source[0] == "$":
        found = _TAG_AT.match(source)
        if found is None:
            return None
        tag = found.group()
        return Literal(source[len(tag) : -len(tag)], len(tag), None, False, tag)
    if source[0] in "uU":
        return None
    escaped = source[0] in "eE" or (source[0] in "'nN" and not standard_conforming_strings)
    start = 0 if source[0] == "'" else 1
    if "\\" not in source and source.find("'", start + 1) == len(source) - 1:
        return Literal(source[start + 1 : -1], start + 1, None, escaped, None)
    pattern, marks = (_ESCAPED_PART, _QUOTE_OR_BACKSLASH) if escaped else (_PLAIN_PART, _QUOTE)
    characters: list[str] = []
    origin: array[int] = array("L")
    position = start
    while position < len(source):
        if source[position] != "'":  # white space and comments between two parts
            if source.startswith("--", position):
                while position < len(source) and source[position] not in "\n\r":
                    position += 1
            else:
                position += 1
            continue
        part = pattern.match(source, position)
        if part is None:
            return None
        position += 1
        close = part.end() - 1
        while position < close:
            special = marks.search(source, position, close)
            end = special.start() if special is not None else close
            if end > position:  # a run of characters that mean themselves
                characters.append(source[position:end])
                origin.extend(range(position, end))
                position = end
                continue
            character, width = "'", 2
            if source[position] == "\\":
                decoded = _unescape(source, position)
                if decoded is None:
                    return None
                character, width = decoded
            characters.append(character)
            origin.append(position)
            position += width
        position = part.end()
    origin.append(len(source) - 1)
    return Literal("".join(characters), 0, origin, escaped, None)


def _unescape(source: str, position: int) -> tuple[str, int] | None:
    found = _BACKSLASH.match(source, position)
    if found is None:
        return None
    four, eight, hexadecimal, octal, other = found.groups()
    if other is not None:
        return _CONTROL.get(other, other), 2
    code = int(four or eight or hexadecimal, 16) if octal is None else int(octal, 8)
    # A byte of a multi-byte character, half of a surrogate pair, no character at all: leave such a literal alone.
    if code == 0 or code > 0x10FFFF or 0xD800 <= code < 0xE000 or (code > 0x7F and (hexadecimal or octal)):
        return None
    return chr(code), found.end() - position
