"""The functions of schema `df`: names, parameters, defaults (SURFACE 1.0, with the departures of its Part I).

The compiler checks calls against this table, so it must say what the migrations create.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsl.dialect import names


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `default` is SQL text, None when the argument is mandatory."""

    name: str
    type: str
    default: str | None = None
    variadic: bool = False

    def __str__(self) -> str:
        head = f"VARIADIC {self.name} {self.type}" if self.variadic else f"{self.name} {self.type}"
        return head if self.default is None else f"{head} DEFAULT {self.default}"


@dataclass(frozen=True, slots=True)
class Function:
    """One overload. `futures` are the parameters that take a future or the SQL text of a step."""

    name: str
    parameters: tuple[Parameter, ...]
    futures: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"df.{self.name}({', '.join(map(str, self.parameters))})"


def _f(name: str, parameters: str = "", futures: str = "") -> Function:
    """A function from the text of its parameter list, written as in CREATE FUNCTION."""
    made: list[Parameter] = []
    for text in filter(None, (p.strip() for p in parameters.split(","))):
        head, _, default = text.partition(" DEFAULT ")
        words = head.split()
        variadic = words[0] == "VARIADIC"
        words = words[1:] if variadic else words
        made.append(Parameter(words[0], " ".join(words[1:]), default or None, variadic))
    return Function(name, tuple(made), frozenset(futures.split()))


_ALL = (
    _f("version"),
    _f("target_database"),
    _f("duroxide_schema"),
    _f("setvar", "name text, value text"),
    _f("setvar", "name text, value text, secret boolean"),
    _f("getvar", "name text"),
    _f("unsetvar", "name text"),
    _f("clearvars"),
    _f("sql", "query text"),
    _f("seq", "a text, b text", "a b"),
    _f("seq", "VARIADIC steps text[]", "steps"),
    _f("as", "fut text, name text", "fut"),
    _f("step", "name text, fut text", "fut"),
    _f("sleep", "seconds bigint"),
    _f("wait_for_schedule", "cron_expr text, zone text DEFAULT NULL"),
    _f("loop", "body text, condition text DEFAULT NULL, continue_on_failure boolean DEFAULT false", "body condition"),
    _f("break", "value text DEFAULT NULL"),
    _f("if", "condition text, then_branch text, else_branch text", "condition then_branch else_branch"),
    _f("if_rows", "result_name text, then_branch text, else_branch text", "then_branch else_branch"),
    _f("join", "a text, b text", "a b"),
    _f("join", "VARIADIC branches text[]", "branches"),
    _f("join3", "a text, b text, c text", "a b c"),
    _f("race", "a text, b text", "a b"),
    _f("race", "VARIADIC branches text[]", "branches"),
    _f("http", "url text, method text DEFAULT 'POST', body text DEFAULT NULL, headers jsonb DEFAULT NULL,"
               " timeout_seconds integer DEFAULT 30"),
    _f("http_multipart", "url text, method text DEFAULT 'POST', parts jsonb DEFAULT NULL, headers jsonb DEFAULT NULL,"
                         " timeout_seconds integer DEFAULT 30"),
    _f("wait_for_signal", "name text, timeout_seconds integer DEFAULT NULL"),
    _f("start", "fut text, label text DEFAULT NULL, database text DEFAULT NULL,"
                " transaction_mode text DEFAULT 'caller'", "fut"),
    _f("signal", "instance_id text, signal_name text, signal_data text DEFAULT '{}'"),
    _f("cancel", "instance_id text, reason text DEFAULT 'Cancelled by user'"),
    _f("status", "instance_id text"),
    _f("result", "instance_id text"),
    _f("error", "instance_id text"),
    _f("await_instance", "instance_id text, timeout_seconds integer DEFAULT 30"),
    _f("wait_for_completion", "instance_id text, timeout_seconds integer DEFAULT 30"),
    _f("run", "instance_id text DEFAULT NULL"),
    _f("delete_instance", "instance_id text, force boolean DEFAULT false"),
    _f("prune", "completed_before timestamptz"),
    _f("explain", "input text", "input"),
    _f("diagram", "input text", "input"),
    _f("list_instances", "status_filter text DEFAULT NULL, limit_count integer DEFAULT 100"),
    _f("list_instances", "status_filter text, limit_count integer, label_filter text, after_cursor text DEFAULT NULL"),
    _f("instance_info", "instance_id text"),
    _f("instance_nodes", "instance_id_param text"),
    _f("instance_nodes", "instance_id_param text, _last_n_executions integer"),
    _f("instance_executions", "instance_id text, limit_count integer DEFAULT 5"),
    _f("metrics"),
    _f("grant_usage", "p_role text, include_http boolean DEFAULT false, with_grant boolean DEFAULT false"),
    _f("revoke_usage", "p_role text"),
    _f("as_op", "fut text, name text", "fut"),
    _f("if_then_op", "condition text, then_branch text", "condition then_branch"),
    _f("if_else_op", "partial_if text, else_branch text", "else_branch"),
    _f("loop_prefix_op", "body text", "body"),
)

#: Function name -> its overloads.
FUNCTIONS: dict[str, tuple[Function, ...]] = {}
for _function in _ALL:
    FUNCTIONS[_function.name] = (*FUNCTIONS.get(_function.name, ()), _function)

#: Functions whose result is a future.
BUILDERS = names(
    "sql seq as step sleep wait_for_schedule loop break if if_rows join join3 race http http_multipart wait_for_signal"
    " as_op if_else_op loop_prefix_op"
)
