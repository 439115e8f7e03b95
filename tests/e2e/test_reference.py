"""docs/reference.md, the compiler's table and the catalog describe the same functions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg

from dsl.dialect import names
from dsl.surface import FUNCTIONS
from tests.engine.fix_surface import Connection

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference.md"
CATALOG = """
SELECT p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid),
       CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END, p.proisstrict,
       p.prosecdef, has_function_privilege('public', p.oid, 'EXECUTE')
  FROM pg_proc p WHERE p.pronamespace = 'df'::regnamespace
"""
SHORT = {"::text": "", "::jsonb": "", "::integer": "", "timestamp with time zone": "timestamptz"}


def short(text: str) -> str:
    for long, brief in SHORT.items():
        text = text.replace(long, brief)
    return text


def catalog(df: psycopg.Connection[Any]) -> dict[str, tuple[Any, ...]]:
    """Signature -> result, volatility, strictness, rights, whether PUBLIC may call it."""
    return {f"{name}({short(arguments)})": (short(result), *rest) for name, arguments, result, *rest in df.execute(CATALOG)}


def test_the_reference_describes_what_is_installed(df: Connection) -> None:
    installed = catalog(df)
    described: dict[str, tuple[Any, ...]] = {}
    for signatures, properties in re.findall(r"^```text\n(.*?)^```\n\n\*(.*?)\*", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        words = re.split(r"[,;]? ", properties.rstrip(".").lower())
        for line in signatures.splitlines():
            found = re.fullmatch(r"df\.(\w+)(\(.*?\)) → (.*)", line)
            assert found is not None, line
            name, parameters, result = found.groups()
            strict = name in re.findall(r"`(\w+)`", properties) if "are strict" in properties else "strict" in words
            described[name + parameters] = (result, words[0], strict, "owner" in properties, "EXECUTE" not in properties)
    assert described == installed


def test_the_compiler_knows_what_is_installed(df: Connection) -> None:
    known = {str(function).removeprefix("df.") for overloads in FUNCTIONS.values() for function in overloads}
    assert known == set(catalog(df))


def test_each_function_has_one_heading(df: Connection) -> None:
    text = PAGE.read_text()
    headings = re.findall(r"^### df\.(\w+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    installed = {signature.partition("(")[0] for signature in catalog(df)}
    assert installed - set(headings) == {"as_op", "if_then_op", "if_else_op", "loop_prefix_op"}


def test_the_views_have_the_columns_that_the_reference_lists(df: Connection) -> None:
    for view, said in re.findall(r"^\| `(df\.\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE):
        columns = [r[0] for r in df.execute("SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum", (view,))]
        assert view == "df._worker_epoch" or re.findall(r"`(\w+)`", said) == columns


def test_strict_are_those_that_the_specification_names(df: Connection) -> None:
    """SURFACE 1.0. What has no argument can't tell; what is dfproxy's own may be either."""
    strict = {name.partition("(")[0] for name, properties in catalog(df).items() if properties[2]}
    assert strict >= names("setvar getvar unsetvar sql seq as sleep if if_rows join join3 race signal cancel status result await_instance"
                           " wait_for_completion explain instance_info instance_nodes instance_executions")
    assert not strict & names("loop break http http_multipart wait_for_signal start run list_instances")


def test_the_architecture_names_what_workers_call(df: Connection) -> None:
    """All that PUBLIC may not execute in schema duroxide, but what needs a delegated administrator, and triggers."""
    text = (PAGE.parent / "architecture.md").read_text().partition("## What a worker calls")[2].partition("\n## ")[0]
    private = {r[0] for r in df.execute("""
        SELECT p.proname FROM pg_proc p WHERE p.pronamespace = 'duroxide'::regnamespace AND p.prorettype <> 'trigger'::regtype
           AND NOT has_function_privilege('public', p.oid, 'EXECUTE')""")}
    assert set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)) == private - {"register_executor", "forget_executor"}
