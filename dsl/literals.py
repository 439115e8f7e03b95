"""From the engine's JSON back to SQL: literals, typed arrays, row sets (SURFACE 6.4, Part I "Substitution").

Whatever the data says, what comes out is one operand: quotes are doubled, and only digits stand bare. This holds while
standard_conforming_strings is on, which step sessions must pin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from dsl.types import BOOL, INT2, INT4, INT8, NUMERIC, TEXT, VARCHAR
from dsl.types import FLOAT4 as _FLOAT4
from dsl.types import FLOAT8 as _FLOAT8
from dsl.values import Column, Json, Number, compact

_NUMERIC = frozenset({INT2, INT8, _FLOAT4, _FLOAT8, NUMERIC})
_DIGITS = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_JSON_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_UNFIT = re.compile("[\0\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIRST_USER_OID = 16384

Shape: TypeAlias = tuple[Any, ...]


class UnfitTextError(ValueError):
    """A text that no PostgreSQL string can hold."""


def quote(text: str) -> str:
    """A string literal. Raises UnfitTextError for NUL and lone surrogates, which JSON can hold and PostgreSQL can't."""
    check(text)
    return "'" + text.replace("'", "''") + "'"


def check(text: str, *, nul: bool = False) -> str:
    """Returns the text, or raises UnfitTextError as quote does (`nul`: for lone surrogates only)."""
    unfit = (_SURROGATE if nul else _UNFIT).search(text)
    if unfit:
        where = "UTF-8" if nul else "PostgreSQL text"
        raise UnfitTextError(f"value contains the character U+{ord(unfit[0]):04X}, which {where} cannot hold")
    return text


def quote_name(name: str) -> str:
    """A quoted identifier."""
    return '"' + check(name).replace('"', '""') + '"'


def is_text(column: Column | None) -> bool:
    """Whether values are written without a cast: text, varchar, and what can't be cast to."""
    return column is not None and (column.oid in (TEXT, VARCHAR) or column.type == "text")


def pg_text(value: Json, column: Column | None = None) -> str:
    """A value's text, as PostgreSQL's input function of the column's type reads it; null is `NULL`."""
    return "NULL" if value is None else _text(value, _parse_shape(column.shape if column else "s"))


def bare(value: Json, column: Column | None) -> str:
    """A constant without cast or parentheses, for the places whose grammar takes nothing else."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number) and _JSON_NUMBER.fullmatch(value):
        return value
    text = pg_text(value, column)
    return text if column is not None and column.oid == NUMERIC and _DIGITS.fullmatch(text) else quote(text)


def literal(value: Json, column: Column | None) -> str:
    """One operand: a literal with a cast to the column's type where that is neither text nor what the literal has."""
    if value is None:
        return "NULL"
    if column is None or column.oid in (INT4, BOOL):
        if isinstance(value, Number | bool):
            text = bare(value, column)
            if not text.startswith("-"):
                return text
            # -2147483648 alone would be a bigint.
            return f"({text})" if column is None or text != "-2147483648" else f"({text})::integer"
        if column is None:
            return quote(pg_text(value))
    if is_text(column):
        return quote(pg_text(value, column))
    return _cast(value, column)


def _cast(value: Json, column: Column) -> str:
    """Always with the cast."""
    text = pg_text(value, column)
    if column.oid in _NUMERIC and _DIGITS.fullmatch(text) and text != "-0":
        return f"({text})::{column.type}" if text.startswith("-") else f"{text}::{column.type}"
    cast = f"{quote(text)}::{column.type}"
    # `SELECT '...'::interval year` would take the alias for a unit.
    return f"({cast})" if column.type.startswith("interval") and not column.type.endswith("]") else cast


def array(values: Sequence[Json], column: Column | None) -> str:
    """The values of a column as a typed array, for ANY and ALL. Arrays are strung together: ANY looks at elements."""
    if column is None:
        return quote(_array_text(list(values), ("s",), ","))
    shape = _parse_shape(column.shape)
    if shape[0] == "array":
        elements: list[Json] = []
        for value in values:
            elements += _flat(value) if shape[1][0] != "json" else value if isinstance(value, list) else [value]
        return f"{quote(_array_text(elements, shape[1], shape[2]))}::{column.type}"
    if is_text(column):
        return quote(_array_text(list(values), shape, ","))
    if column.oid >= _FIRST_USER_OID:  # whose arrays may have any delimiter
        items = ("NULL" if v is None else quote(pg_text(v, column)) for v in values)
        return f"ARRAY[{','.join(items)}]::{column.type}[]"
    return f"{quote(_array_text(list(values), shape, ';' if column.type == 'box' else ','))}::{column.type}[]"


def value_list(values: Sequence[Json], column: Column | None) -> str:
    """What stands between the parentheses of IN. No values: a sub-select, so that IN is false and NOT IN is true."""
    if values:
        return ",".join([literal(value, column) for value in values])
    return f"SELECT {_null(column)} WHERE false"


def row_set(alias: str, rows: Sequence[dict[str, Any]], columns: Sequence[Column] | None) -> str:
    """A FROM item with the rows, under the result's name (SURFACE 6.4 "Row set in SQL", with the types kept)."""
    name = quote_name(alias)
    typed: list[tuple[str, Column | None]]
    if columns is not None:
        typed = [(column.name, column) for column in columns]
    else:
        typed = [(key, None) for key in rows[0]] if rows else []
    if not typed:
        if rows:
            return f"(SELECT FROM pg_catalog.generate_series(1,{len(rows)})) AS {name}"
        return f"(SELECT NULL WHERE false) AS {name}"
    names = ",".join(quote_name(key) for key, _ in typed)
    if not rows:
        return f"(SELECT {','.join(_null(column) for _, column in typed)} WHERE false) AS {name}({names})"
    first = ",".join([_first_cell(rows[0].get(key), column) for key, column in typed])
    rest = ["(" + ",".join([_cell(row.get(key), column) for key, column in typed]) + ")" for row in rows[1:]]
    return f"(VALUES {', '.join([f'({first})', *rest])}) AS {name}({names})"


def _null(column: Column | None) -> str:
    return "NULL" if column is None else f"NULL::{column.type}"


def _first_cell(value: Json, column: Column | None) -> str:
    """In the row that gives the VALUES its types: all of them are written."""
    if column is None:
        return _cell(value, None)
    if value is None:
        return _null(column)
    return literal(value, column) if column.oid in (INT4, BOOL) else _cast(value, column)


def _cell(value: Json, column: Column | None) -> str:
    """In a later row: untyped literals, which take the type of the first row's."""
    if value is None:
        return "NULL"
    if isinstance(value, bool) or (isinstance(value, Number) and column is None):
        return literal(value, None)
    if column is None:
        return f"{quote(pg_text(value))}::text"
    text = pg_text(value, column)
    return text if column.oid == INT4 and text.isascii() and text.isdigit() else quote(text)


def _text(value: Json, shape: Shape) -> str:
    match shape[0]:
        case "json":
            return compact(value)
        case "array" if isinstance(value, list):
            return _array_text(value, shape[1], shape[2])
        case "composite" if isinstance(value, dict) and len(value) == len(shape[1]):
            return "(" + ",".join([_field(v, s) for v, s in zip(value.values(), shape[1], strict=True)]) + ")"
    return str(value) if isinstance(value, str) else compact(value)


def _array_text(values: list[Any], element: Shape, delimiter: str) -> str:
    parts = []
    for value in values:
        if value is None:
            parts.append("NULL")
        elif isinstance(value, list) and element[0] != "json":
            parts.append(_array_text(value, element, delimiter))
        else:
            text = _text(value, element)
            parts.append(text if _DIGITS.fullmatch(text) else
                         '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return "{" + delimiter.join(parts) + "}"


def _field(value: Json, shape: Shape) -> str:
    if value is None:
        return ""
    return '"' + _text(value, shape).replace("\\", "\\\\").replace('"', '""') + '"'


def _flat(value: Json) -> list[Json]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]


@lru_cache(maxsize=512)
def _parse_shape(text: str) -> Shape:
    """Column.shape as a tree: ("s",), ("json",), ("array", element, delimiter), ("composite", fields)."""
    shape, end = _shape_at(text, 0)
    return shape if end == len(text) else ("s",)


def _shape_at(text: str, position: int) -> tuple[Shape, int]:
    code = text[position:position + 1]
    if code in ("a", "b"):
        element, end = _shape_at(text, position + 1)
        return ("array", element, "," if code == "a" else ";"), end
    if code == "c":
        fields, end = [], position + 2
        while end < len(text) and text[end] != ")":
            field, end = _shape_at(text, end)
            fields.append(field)
        return ("composite", tuple(fields)), end + 1
    return (("json",) if code == "j" else ("s",)), position + 1
