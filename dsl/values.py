"""From PostgreSQL's text format to the engine's JSON text: results and their columns (SURFACE 5.1, 6.6, Part I).

A result is kept as JSON *text*, exactly as it was made: key order and the digits of numbers matter. It is parsed only
when somebody looks into it, and numbers then keep their digits (`Number`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any, NoReturn, TypeAlias

from msgspec import Struct

from dsl.types import (
    BOOL,
    FLOAT4,
    FLOAT8,
    INT2,
    INT4,
    INT8,
    JSON,
    JSONB,
    TIMESTAMP,
    TIMESTAMPTZ,
    TYPES_SQL,
    VOID,
    Kind,
    TypeCatalog,
    TypeInfo,
)

__all__ = ["TYPES_SQL", "Column", "Json", "Kind", "Number", "Result", "ResultKind", "StaleTypeError", "TypeCatalog",
           "TypeInfo", "compact", "describe", "encode_rows", "json_string", "parse_json"]


class Number(str):
    """A JSON number, as its digits were written."""

    __slots__ = ()


Json: TypeAlias = "bool | str | Number | list[Any] | dict[str, Any] | None"


class StaleTypeError(ValueError):
    """A composite's text does not fit what the catalog knows of its type: forget it, load it again, encode again."""

    def __init__(self, oid: int) -> None:
        super().__init__(f"type {oid} has changed")
        self.oid = oid


class Column(Struct, frozen=True):
    """One column of a SQL result.

    `name`: the member of the row objects (duplicates are numbered). `oid`: of the type. `type`: what to write after
    `::` (format_type with modifier), `text` for those that can't be cast to. `shape`: how to read the JSON back: `s` a
    scalar, `j` JSON itself, `a` or `b` an array (its text has commas, or semicolons) of what follows, `c(...)` a
    composite.
    """

    name: str
    oid: int
    type: str
    shape: str = "s"

    def to_json(self) -> dict[str, Any]:
        """For duroxide.history.types."""
        item: dict[str, Any] = {"name": self.name, "oid": self.oid, "type": self.type}
        return item if self.shape == "s" else {**item, "shape": self.shape}

    @classmethod
    def from_json(cls, item: dict[str, Any]) -> Column:
        """The opposite of to_json."""
        return cls(item["name"], item["oid"], item["type"], item.get("shape", "s"))


class ResultKind(StrEnum):
    """SURFACE 6.4, "Result kinds"; TEXT is a result that is not JSON."""

    ROWS = "rows"
    OBJECT = "object"
    OTHER = "other"
    TEXT = "text"


class Result(Struct, frozen=True, dict=True):
    """A node's result: the engine's JSON text, and for a SQL step its columns."""

    text: str
    columns: tuple[Column, ...] | None = None

    @cached_property
    def value(self) -> Json:
        """The parsed text; a text that is not JSON is a string. Raises RecursionError on absurdly deep nesting."""
        try:
            return parse_json(self.text)
        except ValueError:
            return self.text

    @cached_property
    def kind(self) -> ResultKind:
        """How references to it are read. Raises RecursionError as `value` does."""
        value = self.value
        if isinstance(value, dict):
            return ResultKind.ROWS if isinstance(value.get("rows"), list) else ResultKind.OBJECT
        return ResultKind.TEXT if value is self.text else ResultKind.OTHER

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The row objects of a ROWS result; what is not an object counts as a row without columns."""
        rows = self.value["rows"] if isinstance(self.value, dict) else []
        return [row if isinstance(row, dict) else {} for row in rows]


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_no_constant)


def parse_json(text: str) -> Json:
    """Parses JSON; numbers keep their digits. Raises ValueError, RecursionError."""
    value: Json = _DECODER.decode(text)
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")


def json_string(text: str) -> str:
    """A JSON string literal, non-ASCII as it is (but for lone surrogates, which UTF-8 can't carry)."""
    literal = encode_basestring(text)
    return literal if literal.isascii() else _SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", literal)


def compact(value: Json) -> str:
    """Compact JSON text; numbers with their own digits. Raises RecursionError."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case Number():
            return str(value)
        case str():
            return json_string(value)
        case list():
            return "[" + ",".join([compact(item) for item in value]) + "]"
        case _:
            return "{" + ",".join([f"{json_string(key)}:{compact(item)}" for key, item in value.items()]) + "}"


#: Statements of the same kind return the same columns: so many are remembered.
_DESCRIBED = 256


def describe(fields: Iterable[tuple[str, int, int]], catalog: TypeCatalog) -> tuple[Column, ...]:
    """The columns of a RowDescription: (name, type OID, type modifier) each. Load `catalog.unknown` types before."""
    listed = tuple(fields)
    known = catalog.described.get(listed)
    if known is not None:
        return known
    names = _distinct([name for name, _, _ in listed])
    columns = tuple(
        Column(name, oid, catalog.format_type(oid, modifier) if catalog.castable(oid) else "text", catalog.shape(oid))
        for name, (_, oid, modifier) in zip(names, listed, strict=True))
    if len(catalog.described) >= _DESCRIBED:
        catalog.described.clear()
    catalog.described[listed] = columns
    return columns


def _distinct(names: list[str]) -> list[str]:
    """Repeated names get _2, _3 (Part I "Values"); a name that some column really has is never taken."""
    if len(set(names)) == len(names):
        return names
    taken = set(names)
    count: dict[str, int] = {}
    result = []
    for name in names:
        number = count.get(name, 0) + 1
        fresh = name
        while number > 1 and (fresh := f"{name}_{number}") in taken:
            number += 1
        count[name] = number
        taken.add(fresh)
        result.append(fresh)
    return result


Encoder: TypeAlias = Callable[[str], str]


def encode_rows(columns: Sequence[Column], rows: Sequence[Sequence[bytes | None]], catalog: TypeCatalog) -> str:
    """Text-format wire values to `{"rows":[{...}],"row_count":N}` (SURFACE 5.1, 6.6, Part I "Values").

    The session that made the values must have client_encoding UTF8, TimeZone UTC, DateStyle ISO, IntervalStyle
    iso_8601, bytea_output hex and extra_float_digits above 0. Raises StaleTypeError; UnicodeDecodeError (a ValueError).
    """
    if not rows:
        return '{"rows":[],"row_count":0}'
    cells = []
    for place, column in enumerate(columns):
        encode = _encoder(column.oid, catalog)
        if encode is str:
            cells.append(["null" if (v := row[place]) is None else v.decode() for row in rows])
        else:
            cells.append(["null" if (v := row[place]) is None else encode(v.decode()) for row in rows])
    template = "{" + ",".join(json_string(c.name).replace("%", "%%") + ":%s" for c in columns) + "}"
    texts = [template % row for row in zip(*cells, strict=True)] if cells else ["{}"] * len(rows)
    return f'{{"rows":[{",".join(texts)}],"row_count":{len(rows)}}}'


def _encoder(oid: int, catalog: TypeCatalog) -> Encoder:
    """What turns a value's text into JSON. `str`, which does nothing, is compared with by encode_rows."""
    oid = catalog.base(oid)
    simple = _ENCODERS.get(oid)
    if simple is not None:
        return simple
    info = catalog.get(oid)
    if info is not None and info.kind is Kind.ARRAY:
        return _array_encoder(_encoder(info.element, catalog), catalog.delimiter(info))
    if info is not None and info.kind is Kind.COMPOSITE:
        return _composite_encoder(info, catalog)
    return json_string


def _boolean(text: str) -> str:
    return "true" if text == "t" else "false"


def _float(text: str) -> str:
    return "null" if text[-1] in "Ny" else text  # NaN, Infinity, -Infinity


_TIMESTAMP = re.compile(r"(\d{4,}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?([+-]\d\d(?::\d\d){0,2})?( BC)?")


def _timestamp(text: str) -> str:
    """RFC 3339 in UTC. What that can't say stays readable for PostgreSQL: infinity, BC, years above 9999."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        return json_string(text)
    date, time, fraction, offset, era = match.groups()
    if offset is not None and offset != "+00" and era is None and len(date) == 10:
        # The step itself changed the time zone.
        try:
            moved = datetime.fromisoformat(f"{date}T{time}{offset}").astimezone(UTC)
            date, _, time = moved.replace(tzinfo=None).isoformat().partition("T")
            offset = "+00"
        except OverflowError:
            pass  # the first or last day of the calendar; the offset stays
    digits = "" if fraction is None else "." + fraction.ljust(3 if len(fraction) <= 3 else 6, "0")
    zone = "" if offset is None else offset if ":" in offset else offset + ":00"
    return f'"{date}T{time}{digits}{zone}{era or ""}"'


_ESCAPED = re.compile(r"\\(.)", re.S)
_LOWER_BOUNDS = re.compile(r"(?:\[[-+0-9]+:[-+0-9]+\])+=")
_ARRAY_TOKENS = {
    d: re.compile(rf'"((?:[^"\\]|\\.)*)"|([{{}}{d}])|([^{{}}"{d}]+)', re.S) for d in ",;"
}


def _array_encoder(element: Encoder, delimiter: str) -> Encoder:
    tokens = _ARRAY_TOKENS.get(delimiter)
    if tokens is None:  # an extension's type may have any delimiter
        d = re.escape(delimiter)
        tokens = re.compile(rf'"((?:[^"\\]|\\.)*)"|([{{}}]|{d})|((?:(?!{d})[^{{}}"])+)', re.S)
    brackets = {"{": "[", "}": "]", delimiter: ","}

    def piece(match: re.Match[str]) -> str:
        quoted, mark, bare = match.groups()
        if mark is not None:
            return brackets[mark]
        if bare is not None:
            return "null" if bare == "NULL" else element(bare)
        return element(_ESCAPED.sub(r"\1", quoted) if "\\" in quoted else quoted)

    def encode(text: str) -> str:
        start = _LOWER_BOUNDS.match(text)
        return tokens.sub(piece, text[start.end():] if start else text)

    return encode


_FIELD = re.compile(r'(?:"((?:[^"\\]|""|\\.)*)"|([^,()"\\]*))([,)])', re.S)
_FIELD_ESCAPED = re.compile(r'""|\\(.)', re.S)


def _composite_encoder(info: TypeInfo, catalog: TypeCatalog) -> Encoder:
    members = [(json_string(name) + ":", _encoder(oid, catalog)) for name, oid in info.fields]

    def encode(text: str) -> str:
        if not members and text == "()":
            return "{}"
        parts: list[str] = []
        position = 1
        for key, member in members:
            match = _FIELD.match(text, position)
            if match is None or (match[3] == ")") != (len(parts) == len(members) - 1):
                raise StaleTypeError(info.oid)
            position = match.end()
            if match[1] is not None:
                parts.append(key + member(_FIELD_ESCAPED.sub(lambda m: m[1] or '"', match[1])))
            else:
                parts.append(key + (member(match[2]) if match[2] else "null"))
        if position != len(text):
            raise StaleTypeError(info.oid)
        return "{" + ",".join(parts) + "}"

    return encode


_ENCODERS: dict[int, Encoder] = {
    BOOL: _boolean, INT2: str, INT4: str, INT8: str, FLOAT4: _float, FLOAT8: _float, JSON: str, JSONB: str,
    TIMESTAMP: _timestamp, TIMESTAMPTZ: _timestamp, VOID: lambda text: "null",
}
