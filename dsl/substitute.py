"""Putting variables and results into a step's text (SURFACE 6, as amended by Part I "Substitution").

Two passes: `{name}` anywhere, raw; then `$name` references, each written as its place demands: an operand in SQL, text
inside a literal, JSON in a JSON body, percent-encoded in a URL. What is inserted is not looked at again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum
from urllib.parse import quote as percent_encode

from dsl import literals
from dsl.references import (
    JSON_REFERENCE,
    REFERENCE,
    Reference,
    SubstitutionError,
    Value,
    Whole,
    column_values,
    resolve,
    rows_of,
)
from dsl.sqltext import Place, Spot, replace_references
from dsl.values import Json, Number, Result, compact, json_string, parse_json

__all__ = ["Raw", "SubstitutionError", "break_result", "references", "step_sql", "substitute_base64", "substitute_raw",
           "substitute_sql"]

_BRACES = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.S)
#: How far back the `$` of `$name."column"` is looked for.
_LONGEST_NAME = 300
_LINE_BREAKS = re.compile(r"[\r\n\0]+")


class Raw(Enum):
    """Where a text that is not SQL goes."""

    JSON = "json"      # a body that is JSON by declaration
    BODY = "body"      # any other body: JSON if it parses as JSON once the references are set aside, else plain
    URL = "url"
    HEADER = "header"  # also names of parts and files
    PLAIN = "plain"


def substitute_sql(text: str, *, variables: Mapping[str, str], instance_id: str, label: str | None,
                   results: Mapping[str, Result]) -> str:
    """A SQL step's text, ready to be run. Raises SubstitutionError; its text is the error of the node."""
    text = _braces(text, variables, instance_id, label)
    if not results or "$" not in text:
        return text

    def value(reference: Reference, spot: Spot) -> str:
        try:
            return _sql(reference, spot, results)
        except (literals.UnfitTextError, RecursionError) as error:
            raise _unfit(reference, error) from None

    return replace_references(text, results.__contains__, value)


def step_sql(text: str, *, variables: Mapping[str, str], instance_id: str, label: str | None,
             results: Mapping[str, Result]) -> str:
    """substitute_sql of a step's whole text. One that is nothing but a reference to a value is the SELECT of it, as in
    df.if('$batch.done', ...), which the original's guide has, and which can be nothing else."""
    whole = REFERENCE.fullmatch(text.strip())
    if whole and not whole["set"] and whole["name"] in results:
        text = f"SELECT {text}"
    return substitute_sql(text, variables=variables, instance_id=instance_id, label=label, results=results)


def substitute_raw(text: str, *, variables: Mapping[str, str], instance_id: str, label: str | None,
                   results: Mapping[str, Result], context: Raw = Raw.PLAIN) -> str:
    """A body, a URL or a header's value, ready to be sent. Raises SubstitutionError as substitute_sql does."""
    text = _braces(text, variables, instance_id, label)
    if results and "$" in text:
        text = _raw(text, results, context)
    return _LINE_BREAKS.sub(" ", text.strip("\r\n")) if context is Raw.HEADER else text


def substitute_base64(text: str, *, part: str, variables: Mapping[str, str], instance_id: str, label: str | None,
                      results: Mapping[str, Result]) -> str:
    """`data_b64` of a multipart part: one whole reference, or none at all (SURFACE 6.7). Raises SubstitutionError."""
    trimmed = text.strip()
    variable, reference = _BRACES.fullmatch(trimmed), REFERENCE.fullmatch(trimmed)
    if variable or (reference and not reference["set"]):
        # A variable's value is data here, not a template.
        return substitute_raw(trimmed, variables=variables, instance_id=instance_id, label=label,
                              results={} if variable else results)
    if "$" in text or "{" in text:
        raise SubstitutionError(f"data_b64 for part '{part}' mixes a variable reference with other text. "
                                "Only a whole-value reference is supported")
    return text


def break_result(value: str | None, *, variables: Mapping[str, str], instance_id: str, label: str | None,
                 results: Mapping[str, Result]) -> str:
    """The JSON text that `df.break(value)` ends its loop with (SURFACE 5.6; references as in a JSON body, Part I).

    A text that is JSON after substitution is that JSON, compact; any other becomes a JSON string.
    Raises SubstitutionError.
    """
    if value is None:
        return "null"
    text = _braces(value, variables, instance_id, label)
    if results and "$" in text:
        text = _raw(text, results, Raw.JSON if REFERENCE.fullmatch(text.strip()) else Raw.BODY)
    try:
        return compact(parse_json(text))
    except ValueError:
        return json_string(text)
    except RecursionError:
        raise SubstitutionError("df.break value is nested too deeply") from None


def references(text: str) -> frozenset[str]:
    """The names that a SQL text refers to, whether or not a result of that name exists."""
    names = set()

    def value(reference: Reference, spot: Spot) -> str:
        names.add(reference.name)
        return reference.text

    replace_references(text, lambda name: True, value)
    return frozenset(names)


def _braces(text: str, variables: Mapping[str, str], instance_id: str, label: str | None) -> str:
    """Pass one (SURFACE 6.2): raw, everywhere, known names only, what is inserted is not scanned for braces."""
    if "{" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        match match[1]:
            case "sys_instance_id":
                return instance_id
            case "sys_label":
                return label or ""
            case name:
                return variables.get(name, match[0])

    return _BRACES.sub(value, text)


def _sql(reference: Reference, spot: Spot, results: Mapping[str, Result]) -> str:
    if reference.row_set:
        rows, result = rows_of(reference, results)
        if spot.place is Place.CODE:
            return literals.row_set(reference.name, rows, result.columns or None)
        return _in_literal(compact(rows), spot)
    if spot.list_of is not None:
        values = column_values(reference, results)
        if values is not None:
            return literals.value_list(*values) if spot.list_of == "in" else literals.array(*values)
    value = resolve(reference, results)
    if isinstance(value, Whole):
        return literals.quote(value.text) if spot.place is Place.CODE else _in_literal(value.text, spot)
    if spot.place is not Place.CODE:
        return _in_literal(literals.pg_text(value.json, value.column), spot)
    return literals.bare(value.json, value.column) if spot.bare else literals.literal(value.json, value.column)


def _in_literal(text: str, spot: Spot) -> str:
    text = literals.check(text).replace("'", "''")
    return text.replace("\\", "\\\\") if spot.place is Place.ESCAPED_LITERAL else text


def _raw(text: str, results: Mapping[str, Result], context: Raw) -> str:
    def replacer(write: Callable[[Reference], str]) -> Callable[[re.Match[str]], str]:
        def replace(match: re.Match[str]) -> str:
            if match["name"] not in results:
                return match[0]
            reference = Reference.of(match)
            try:
                return literals.check(write(reference), nul=True)
            except (literals.UnfitTextError, RecursionError) as error:
                raise _unfit(reference, error) from None
        return replace

    whole = REFERENCE.fullmatch(text.strip())
    if context is Raw.URL and not whole:
        return REFERENCE.sub(replacer(lambda r: percent_encode(_plain(r, results), safe="", errors="replace")), text)
    if context is Raw.JSON and whole:
        return REFERENCE.sub(replacer(lambda r: _document(r, results)), text)
    if context is Raw.JSON or (context is Raw.BODY and not whole and _is_json(text, results)):
        outside = replacer(lambda r: _json(r, results))
        inside = replacer(lambda r: json_string(_plain(r, results))[1:-1])
        return _by_json_strings(text, lambda part: REFERENCE.sub(outside, part),
                                lambda part: JSON_REFERENCE.sub(inside, part))
    return REFERENCE.sub(replacer(lambda r: _plain(r, results)), text)


def _by_json_strings(text: str, outside: Callable[[str], str], inside: Callable[[str], str]) -> str:
    """Applies one function to the JSON strings in a text, and another to what lies between."""
    pieces, position = [], 0
    for match in _JSON_STRING.finditer(text):
        start = match.start()
        if text[start - 1:start] == ".":  # `$n."any column"` is no string
            begin = text.rfind("$", max(position, start - _LONGEST_NAME), start)
            reference = REFERENCE.match(text, begin) if begin >= 0 else None
            if reference and reference.end() >= match.end():
                continue
        pieces += [outside(text[position:start]), inside(match[0])]
        position = match.end()
    return "".join([*pieces, outside(text[position:])])


def _is_json(text: str, results: Mapping[str, Result]) -> bool:
    """Whether a template is JSON once the references outside its strings are set aside."""
    def aside(match: re.Match[str]) -> str:
        return "null" if match["name"] in results else match[0]

    try:
        parse_json(_by_json_strings(text, lambda part: REFERENCE.sub(aside, part), lambda part: part))
    except (ValueError, RecursionError):
        return False
    return True


def _plain(reference: Reference, results: Mapping[str, Result]) -> str:
    """The value's text, as SURFACE 6.4 "Raw contexts" has it."""
    if reference.row_set:
        return compact(rows_of(reference, results)[0])
    value = resolve(reference, results)
    if isinstance(value, Whole):
        return value.text
    return "NULL" if value.json is None else _text(value.json)


def _text(value: Json) -> str:
    return str(value) if isinstance(value, str) else compact(value)


def _json(reference: Reference, results: Mapping[str, Result]) -> str:
    """The value as JSON."""
    if reference.row_set:
        return compact(rows_of(reference, results)[0])
    value = resolve(reference, results)
    if isinstance(value, Whole):
        return value.text if value.is_json else json_string(value.text)
    return compact(value.json)


def _document(reference: Reference, results: Mapping[str, Result]) -> str:
    """The value as a whole JSON document. A text that is a JSON object or array already (a body received before, a
    `jsonb_build_object(...)::text`) is the document itself."""
    if not reference.row_set:
        value = resolve(reference, results)
        if isinstance(value, Value) and isinstance(value.json, str) and not isinstance(value.json, Number) \
                and value.json.lstrip()[:1] in ("{", "["):
            try:
                parse_json(value.json)
            except (ValueError, RecursionError):
                pass  # looks like JSON, but is a text after all
            else:
                return value.json
    return _json(reference, results)


def _unfit(reference: Reference, error: Exception) -> SubstitutionError:
    return reference.error(": value is nested too deeply" if isinstance(error, RecursionError) else f": {error}")
