"""Whether a condition's result counts as true (SURFACE 6.5, as amended by Part I "Substitution")."""

from __future__ import annotations

import re

from dsl.values import Json, Number, Result, ResultKind

_FALSE = frozenset({"", "false", "f", "no", "off", "n"})
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.S)
#: Levels that a test looks at, with some to spare: result, rows, row, column, the column's own members.
_LEVELS = 8
#: Members by which results of HTTP and SIGNAL nodes are known (SURFACE 5.1).
_HTTP = frozenset({"status", "body", "headers", "ok"})
_SIGNAL = frozenset({"signal_name", "timed_out"})


def is_true(result: Result) -> bool:
    """Tests a condition's result: first column of the first row; `ok` of HTTP; a signal that came in time.

    """
    try:
        value = result.value
    except RecursionError:
        result = Result(_shallow(result.text))
        value = result.value
    if result.kind is ResultKind.ROWS:
        rows = result.rows
        if not rows:
            return False
        if rows[0]:
            return _truth(next(iter(rows[0].values())))
    elif isinstance(value, dict):
        if value.keys() >= _HTTP:
            return value["ok"] is True
        if value.keys() >= _SIGNAL:
            return value["timed_out"] is not True
    return _truth(value)


def _truth(value: Json) -> bool:
    if isinstance(value, Number):
        return _nonzero(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _FALSE:
            return False
        return _nonzero(text) if _NUMBER.fullmatch(text) else True
    return bool(value)


def _shallow(text: str) -> str:
    """The JSON with everything below _LEVELS replaced by 1: for a result that nests too deep to be parsed."""
    pieces, depth, position = [], 0, 0
    for match in _BRACKETS.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            if depth == _LEVELS:
                pieces += [text[position:match.start()], "1"]
        elif match[0] in ("]", "}"):
            if depth == _LEVELS:
                position = match.end()
            depth -= 1
    return "".join([*pieces, text[position:]])


def _nonzero(digits: str) -> bool:
    """Without converting: 1e-400 is not zero, and neither are a million digits a problem."""
    mantissa = re.split("[eE]", digits, maxsplit=1)[0]
    return any(digit in "123456789" for digit in mantissa)
