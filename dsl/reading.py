"""Warnings that say how an expression was read where that is not how it looks (SURFACE Part I "Reading").

And the SQL that makes the backend raise what the compiler found. None of it holds a line break, so that the line
numbers of what it is spliced into stay right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsl.checks import CompileError

_BLANK = re.compile(r"\s+")
_EXCERPT = 60


@dataclass(frozen=True, slots=True)
class CompileWarning:
    """A warning to be raised by the backend. `position` is 1-based, in characters of the client's text."""

    message: str
    hint: str
    position: int


def excerpt(text: str) -> str:
    """A piece of the client's text for a message: one line, not long."""
    text = _BLANK.sub(" ", text[: 4 * _EXCERPT] if len(text) <= 4 * _EXCERPT else
                      text[: 2 * _EXCERPT] + text[-2 * _EXCERPT :]).strip()  # fmt: skip
    if len(text) <= _EXCERPT:
        return text
    half = (_EXCERPT - 5) // 2
    # Cut between words, so that no operator is cut in half.
    head, tail = text[:half].rsplit(" ", 1)[0], text[-half:].split(" ", 1)[-1]
    return f"{head} ... {tail}"


def quote(text: str | None) -> str:
    """A SQL literal that means the same whatever standard_conforming_strings says."""
    if text is None:
        return "NULL"
    text = _BLANK.sub(" ", text.replace("\x00", "")).replace("'", "''")
    return f" E'{text.replace(chr(92), chr(92) * 2)}'" if "\\" in text else f"'{text}'"


def warning_call(warning: CompileWarning) -> tuple[str, str]:
    """What goes before and after the expression that the warning is about."""
    return "duroxide.warning(", f", {quote(warning.message)}, {quote(warning.hint)}, {warning.position})"


def error_statement(error: CompileError, source: str, parameters: int) -> str:
    """The statement that raises the error in the place of `source`, with as many parameters, so that Bind fits."""
    if parameters:
        fields = ", ".join(map(quote, (error.sqlstate, error.message, error.detail, error.hint)))
        casts = "".join(f", ${n}::text" for n in range(1, parameters + 1))
        return f"SELECT duroxide.error({fields}, {error.position}){casts}"
    options = {"ERRCODE": error.sqlstate, "MESSAGE": error.message, "DETAIL": error.detail, "HINT": error.hint,
               "CONSTRAINT": f"dfproxy:position={error.position}"}  # fmt: skip
    using = ", ".join(f"{name} = {quote(value)}" for name, value in options.items() if value)
    tag = dollar_tag(source + using)
    return f"DO {tag} BEGIN RAISE EXCEPTION USING {using}; END {tag}"


def extension_statement(tag: str) -> str:
    """What stands for CREATE EXTENSION pg_durable."""
    return (
        f"DO {tag} BEGIN IF pg_catalog.to_regnamespace('df') IS NULL THEN RAISE EXCEPTION USING ERRCODE = '55000', "
        "MESSAGE = 'the durable workflow functions are not installed in this database', "
        "HINT = 'Run \"dfproxy init\" for this database.'; END IF; "
        "RAISE NOTICE 'dfproxy provides the surface of pg_durable: there is nothing to install'; "
        f"END {tag}"
    )


def dollar_tag(text: str) -> str:
    """A dollar quote that does not occur in `text`."""
    tag, number = "$dfproxy$", 0
    while tag in text:
        number += 1
        tag = f"$dfproxy{number}$"
    return tag


def branches_follow(left: str, symbol: str, before: str, branch: str, right: str, position: int) -> CompileWarning:
    """`a ~> b & c`."""
    return CompileWarning(
        f'"{symbol}" after "~>" was read as ({left}) {symbol} {right}: '
        f'all that stands before "{symbol}" is its first branch',
        f"Write {before} ({branch} {symbol} {right}) for branches that begin after the steps before them, "
        f"or ({left}) {symbol} {right} to keep this reading.",
        position,
    )


def name_follows(left: str, symbol: str, before: str, branch: str, name: str, position: int) -> CompileWarning:
    """`a & b |=> 'x'`."""
    return CompileWarning(
        f'"|=>" after "{symbol}" was read as ({left}) |=> {name}: '
        f'it names the result of "{symbol}", not the last branch',
        f"Write {before} ({branch} |=> {name}) to name the branch, or ({left}) |=> {name} to keep this reading.",
        position,
    )


def loop_ends(body: str, symbol: str, right: str, position: int) -> CompileWarning:
    """`@> a ~> b`."""
    return CompileWarning(
        f'"@>" takes the next operand only: this was read as (@> {body}) {symbol} {right}',
        f"Write @> ({body} {symbol} {right}) to repeat all of it, "
        f"or (@> {body}) {symbol} {right} to keep this reading.",
        position,
    )


def concatenation(left: str, before: str, operand: str, right: str, position: int) -> CompileWarning:
    """`'a' ~> 'b' || c`."""
    return CompileWarning(
        f'"||" after a workflow operator was read as ({left}) || {right}: it appends to the text of the whole workflow',
        f"Write {before} ({operand} || {right}).",
        position,
    )


def doubtful_step(step: str, fault: str, position: int) -> CompileWarning:
    """Text of a step that PostgreSQL will hardly accept."""
    return CompileWarning(
        f'step "{step}" does not look like a SQL statement: {fault}',
        "It is sent to PostgreSQL as it is when the step runs.",
        position,
    )


def undefined_name(name: str, position: int) -> CompileWarning:
    """A reference to a result that no earlier step has."""
    return CompileWarning(
        f'no earlier step defines the result "{name}"',
        f"Name a step before it: ... |=> '{name}'. A reference that nothing defines stays in the text as it is.",
        position,
    )
