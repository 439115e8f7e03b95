"""References to results in a text: what they look like, and what they stand for (SURFACE 6.3, 6.4, Part I)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsl.values import Column, Json, Result, ResultKind

#: SURFACE 6.4: more rows than this are not written into a statement.
MAX_ROW_SET = 10_000

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
#: `$$name` is never a reference.
_START = rf"(?<!\$)\$(?P<name>{_NAME})"
_SQL_FIELD = r'\."(?P<quoted>[^"]*(?:""[^"]*)*)"'
_JSON_FIELD = r'\.\\"(?P<quoted>(?:[^"\\]|\\(?!"))*)\\"'


def _pattern(quoted_field: str) -> str:
    return (rf"{_START}(?:(?P<set>\.\*)|\.(?P<field>{_NAME})(?P<field_safe>\?)?"
            rf"|{quoted_field}(?P<quoted_safe>\?)?|(?P<safe>\?))?")


#: A reference in SQL and in plain text.
REFERENCE = re.compile(_pattern(_SQL_FIELD))
#: A backslash and what it escapes, or a reference: in E'...' and U&'...'.
ESCAPED_REFERENCE = re.compile(rf"\\.|{_pattern(_SQL_FIELD)}", re.S)
#: A reference within a JSON string, where the quotes around a column's name are escaped themselves.
JSON_REFERENCE = re.compile(_pattern(_JSON_FIELD))


class SubstitutionError(ValueError):
    """A reference that can't be replaced. The text is the whole error of the node (SURFACE 6.4 "Errors")."""


@dataclass(frozen=True, slots=True)
class Reference:
    """`$name`, `$name.field` or `$name.*`; `safe` with a `?`. `text` is how it was written."""

    text: str
    name: str
    field: str | None
    safe: bool
    row_set: bool

    @classmethod
    def of(cls, match: re.Match[str]) -> Reference:
        """From a match of one of the patterns above."""
        quoted, field = match["quoted"], match["field"]
        if quoted is not None:
            field = quoted.replace('""', '"')
        safe = bool(match["field_safe"] or match["quoted_safe"] or match["safe"])
        return cls(match[0], match["name"], field, safe, match["set"] is not None)

    @property
    def strict_text(self) -> str:
        """How errors name it: without the question mark."""
        return self.text.removesuffix("?") if self.safe else self.text

    def error(self, reason: str) -> SubstitutionError:
        """An error that begins with the reference."""
        return SubstitutionError(f"{self.strict_text}{reason}")


@dataclass(frozen=True, slots=True)
class Whole:
    """What `$name` stands for when the result is not a row set: the engine's text."""

    text: str
    is_json: bool


@dataclass(frozen=True, slots=True)
class Value:
    """One value, and the column that it comes from where that is known."""

    json: Json
    column: Column | None = None


def resolve(reference: Reference, results: Mapping[str, Result]) -> Value | Whole:
    """What a reference that is not a row set stands for. Null and missing only where it is safe.

    Raises SubstitutionError.
    """
    result = results[reference.name]
    match result.kind:
        case ResultKind.ROWS:
            value = _from_rows(reference, result)
        case ResultKind.OBJECT if reference.field is not None:
            assert isinstance(result.value, dict)
            if reference.field not in result.value and not reference.safe:
                raise _missing(reference, result.value)
            value = Value(result.value.get(reference.field))
        case _ if reference.field is None:
            return Whole(result.text, result.kind is not ResultKind.TEXT)
        case ResultKind.TEXT:
            raise reference.error(": result is not valid JSON")
        case _:
            raise reference.error(": result is neither a row set nor a JSON object")
    if value.json is None and not reference.safe:
        raise reference.error(" is NULL" if reference.field is not None else
                              " is NULL — first column of first row is NULL")
    return value


def column_values(reference: Reference, results: Mapping[str, Result]) -> tuple[list[Any], Column | None] | None:
    """The reference's column in *all* rows, for ANY, ALL and IN; None when the result has no rows to speak of.

    Raises SubstitutionError.
    """
    result = results[reference.name]
    if result.kind is not ResultKind.ROWS:
        return None
    rows, column = result.rows, _column(reference, result)
    if column is not None:
        return [row.get(column.name) for row in rows], column
    if not rows:
        return [], None
    key = _key(reference, rows[0])
    return [row.get(key) for row in rows], None


def rows_of(reference: Reference, results: Mapping[str, Result]) -> tuple[list[dict[str, Any]], Result]:
    """The rows that `$name.*` stands for. Raises SubstitutionError."""
    result = results[reference.name]
    if result.kind is not ResultKind.ROWS:
        raise reference.error(" — invalid result format")
    if len(result.rows) > MAX_ROW_SET:
        raise reference.error(f" — result has {len(result.rows)} rows, exceeding the maximum of {MAX_ROW_SET} "
                              "for row-set expansion.")
    return result.rows, result


def _from_rows(reference: Reference, result: Result) -> Value:
    column = None
    rows = result.rows
    if result.columns or rows:
        try:
            column = _column(reference, result)
            key = column.name if column is not None else _key(reference, rows[0]) if rows else None
        except SubstitutionError:
            if reference.safe:
                return Value(None)
            raise
        if rows and key is not None:
            return Value(rows[0].get(key), column)
    if reference.safe:
        return Value(None, column)
    raise SubstitutionError(f"${reference.name} has no rows — query returned zero results")


def _column(reference: Reference, result: Result) -> Column | None:
    """The column meant, where the result knows its columns."""
    if not result.columns:
        return None
    if reference.field is None:
        return result.columns[0]
    for column in result.columns:
        if column.name == reference.field:
            return column
    raise _missing(reference, [column.name for column in result.columns])


def _key(reference: Reference, row: Mapping[str, Any]) -> str:
    if reference.field is None:
        if not row:
            raise reference.error(": first row has no columns")
        return next(iter(row))
    if reference.field not in row:
        raise _missing(reference, row)
    return reference.field


def _missing(reference: Reference, names: Mapping[str, Any] | list[str]) -> SubstitutionError:
    return reference.error(f": result has no field '{reference.field}' (available: {', '.join(sorted(names))})")
