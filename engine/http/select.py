"""A SQL step whose whole statement is `SELECT df.http(...)` or `SELECT df.http_multipart(...)` is that HTTP step.

The statement runs first, as any step does, with its references put in as in SQL; what it yields is the request. It is
told by its text and not by its result: a table may hold any text, and none of it must become a request by being read.
"""

from __future__ import annotations

import json
import re

from dsl.dialect import IDENT, PUNCT, QUOTED, Tokens, lex

_CANDIDATE = re.compile(r"\s*(?:select\b|--|/\*)", re.I)
_MENTION = re.compile(r'"?http(?:_multipart)?"?\s*\(', re.I)
_SCHEMA = frozenset({"df", '"df'})
_BUILDERS = frozenset({"http", '"http', "http_multipart", '"http_multipart'})
_TYPES = frozenset({"HTTP", "HTTP_MULTIPART"})


def is_http_select(sql: str) -> bool:
    """Whether a statement is nothing but a call of df.http or df.http_multipart (an alias is allowed)."""
    if not _CANDIDATE.match(sql) or not _MENTION.search(sql):
        return False
    tokens = lex(sql)
    if tokens is None:
        return False  # the server will say what is wrong with it
    words = tokens.words
    count = len(tokens)
    while count and words[count - 1] == ";" and tokens.kinds[count - 1] == PUNCT:
        count -= 1
    if count < 6 or words[0] != "select" or words[1] not in _SCHEMA or words[2] != "." or words[3] not in _BUILDERS \
            or words[4] != "(":
        return False
    end = _closing(tokens, 4, count)
    if end is None:
        return False
    rest = list(range(end + 1, count))
    if rest and words[rest[0]] == "as":
        del rest[0]
        return len(rest) == 1 and tokens.kinds[rest[0]] in (IDENT, QUOTED)
    return not rest or (len(rest) == 1 and tokens.kinds[rest[0]] in (IDENT, QUOTED))


def _closing(tokens: Tokens, opening: int, count: int) -> int | None:
    depth = 0
    for place in range(opening, count):
        if tokens.kinds[place] == PUNCT:
            depth += (tokens.words[place] == "(") - (tokens.words[place] == ")")
            if depth == 0:
                return place
    return None


def future_of(result: str) -> dict[str, str] | None:
    """The HTTP future that a SQL result's JSON text holds, as {"type", "query"}; None if that is not what it is."""
    try:
        [row] = json.loads(result)["rows"]
        [value] = row.values()
        future = json.loads(value)
        kind, query = future["node_type"], future["query"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {"type": kind, "query": query} if kind in _TYPES and isinstance(query, str) else None
