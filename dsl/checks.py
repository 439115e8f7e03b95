"""Checks of df calls that need no database: arguments against the surface, and constant arguments.

Messages are those that the builder functions would raise (SURFACE 1.2), so that it does not show who found the fault.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from dsl import cron
from dsl.dialect import names
from dsl.surface import FUNCTIONS, Function


@dataclass(frozen=True, slots=True)
class CompileError:
    """An error to be raised by the backend. `position` is 1-based, in characters of the client's text."""

    sqlstate: str
    message: str
    hint: str | None = None
    detail: str | None = None
    position: int = 0


class CompileFault(Exception):
    """Carries a CompileError out of the compiler."""

    def __init__(self, error: CompileError) -> None:
        super().__init__(error.message)
        self.error = error


_IDENTIFIER = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")
_HTTP_METHODS = names("GET POST PUT DELETE PATCH HEAD OPTIONS")
_MULTIPART_METHODS = names("POST PUT PATCH")

#: What a check says: message, hint, SQLSTATE.
Fault = tuple[str, str | None, str]
_INVALID = "22023"


def unknown_function(name: str) -> Fault | None:
    """A name that is surely a slip of the pen; any other unknown one is left to PostgreSQL (someone may own it)."""
    close = difflib.get_close_matches(name.lower(), FUNCTIONS, n=1, cutoff=0.7)
    if not close:
        return None
    suggestion = FUNCTIONS[close[0]]
    return (f"function df.{name} does not exist", f"Did you mean {' or '.join(map(str, suggestion))}?", "42883")


def bind(name: str, given: list[tuple[str | None, bool]]) -> dict[int, str] | Fault:
    """Which parameter each argument is for, by position; `given` is (name or None, VARIADIC) for each."""
    faults: list[Fault] = []
    overloads = FUNCTIONS[name]
    for function in overloads:
        bound = _bind_one(function, given)
        if isinstance(bound, dict):
            return bound
        faults.append(bound)
    if len(faults) > 1:
        # The overload that comes nearest is not known; a wrong name says more than a wrong count.
        named = [f for f in faults if "parameter" in f[0]]
        message = (named or faults)[0][0]
        return message, "It is " + " or ".join(map(str, overloads)) + ".", "42883"
    return faults[0]


def _bind_one(function: Function, given: list[tuple[str | None, bool]]) -> dict[int, str] | Fault:
    parameters = function.parameters
    bound: dict[int, str] = {}
    named = False
    for index, (name, variadic) in enumerate(given):
        if name is None:
            if named:
                return _misfit(function, "an argument without a name follows one with a name", "42601")
            if index < len(parameters) and not (variadic and not parameters[index].variadic):
                bound[index] = parameters[index].name
            elif parameters and parameters[-1].variadic and not variadic:
                bound[index] = parameters[-1].name
            else:
                return _count(function, len(given))
        else:
            named = True
            names = [p.name for p in parameters]
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = (f'Did you mean "{close[0]}"? ' if close else "") + f"It is {function}."
                return f'function df.{function.name} has no parameter "{name}"', hint, "42883"
            if name in bound.values():
                return _misfit(function, f'parameter "{name}" is given more than once', "42601")
            bound[index] = name
    taken = set(bound.values())
    for parameter in parameters:
        if parameter.default is None and parameter.name not in taken:
            if named:
                return _misfit(function, f'parameter "{parameter.name}" is missing', "42883")
            return _count(function, len(given))
    return bound


def _misfit(function: Function, fault: str, sqlstate: str) -> Fault:
    return f"df.{function.name}: {fault}", f"It is {function}.", sqlstate


def _count(function: Function, given: int) -> Fault:
    least = sum(p.default is None for p in function.parameters)
    most = len(function.parameters)
    if function.parameters and function.parameters[-1].variadic:
        takes = f"at least {least}"
    else:
        takes = str(least) if least == most else f"{least} to {most}"
    plural = "argument" if takes in ("1", "at least 1") else "arguments"
    message = f"function df.{function.name} takes {takes} {plural}, but {given} {'is' if given == 1 else 'are'} given"
    return message, f"It is {function}.", "42883"


def result_name(value: str) -> Fault | None:
    """The name after `|=>`."""
    if not value:
        return "df.as: result name cannot be empty", None, _INVALID
    if not _IDENTIFIER.match(value):
        return (f"df.as: result name '{value}' is not a valid identifier — must match [a-zA-Z_][a-zA-Z0-9_]*", None,
                _INVALID)  # fmt: skip
    return None


def _schedule(value: str) -> Fault | None:
    try:
        cron.check(value, None)
    except ValueError as fault:
        return str(fault), None, _INVALID
    return None


def _zone(value: str) -> Fault | None:
    try:
        cron.find_zone(value)
    except ValueError as fault:
        return str(fault), "SELECT name FROM pg_timezone_names lists them.", _INVALID
    return None


def _signal_name(value: str) -> Fault | None:
    return None if value else ("Signal name cannot be empty", None, _INVALID)


def _timeout(value: str) -> Fault | None:
    return ("Timeout must be positive", None, _INVALID) if _number(value, 1) <= 0 else None


def _sleep(value: str) -> Fault | None:
    return ("Sleep duration must be non-negative", None, _INVALID) if _number(value, 0) < 0 else None


def _number(value: str, default: int) -> int:
    text = re.sub(r"\s", "", value)
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,30}", text) else default


def _method(value: str) -> Fault | None:
    if value.upper() in _HTTP_METHODS:
        return None
    return (f"Invalid HTTP method: {value}. Must be GET, POST, PUT, DELETE, or PATCH",
            "HEAD and OPTIONS are accepted too.", _INVALID)  # fmt: skip


def _multipart_method(value: str) -> Fault | None:
    if value.upper() in _MULTIPART_METHODS:
        return None
    return f"Invalid HTTP method for multipart: {value}. Must be POST, PUT, or PATCH", None, _INVALID


def _transaction_mode(value: str) -> Fault | None:
    if value.lower() in ("caller", "new"):
        return None
    return (f"invalid transaction_mode \"{value}\" for df.start(): expected 'caller' or 'new'", None, _INVALID)


#: (function, parameter) -> check of a constant, given as the literal's value or the number as written.
CONSTANTS: dict[tuple[str, str], Callable[[str], Fault | None]] = {
    ("as", "name"): result_name,
    ("step", "name"): result_name,
    ("sleep", "seconds"): _sleep,
    ("wait_for_schedule", "cron_expr"): _schedule,
    ("wait_for_schedule", "zone"): _zone,
    ("wait_for_signal", "name"): _signal_name,
    ("wait_for_signal", "timeout_seconds"): _timeout,
    ("signal", "signal_name"): _signal_name,
    ("http", "method"): _method,
    ("http", "timeout_seconds"): _timeout,
    ("http_multipart", "method"): _multipart_method,
    ("http_multipart", "timeout_seconds"): _timeout,
    ("await_instance", "timeout_seconds"): _timeout,
    ("wait_for_completion", "timeout_seconds"): _timeout,
    ("start", "transaction_mode"): _transaction_mode,
}
