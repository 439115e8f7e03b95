"""dsl.truth: SURFACE 6.5 as amended by Part I."""

from __future__ import annotations

import json

import pytest

from dsl.truth import is_true
from dsl.values import Result


def row(value: str) -> str:
    return f'{{"rows":[{{"v":{value}}}],"row_count":1}}'


TRUE = ["true", "1", "-1", "0.5", "1e-400", "0.00001", '"true"', '"t"', '"yes"', '" T "', '"1"', '"-0.10"', '"1e5"', '".5"',
        '"anything"', '"null"', '"on"', '"y"', '"NaN"', '"0x0"', '"2024-06-15"', "[0]", '{"a":null}', '"e5"', '"1_0"']
FALSE = ["false", "0", "-0", "0.0", "0e5", "0E9", "null", '""', '"  "', '"false"', '"F"', '"f"', '"no"', '"No "', '"off"',
         '"OFF"', '"n"', '"N"', '"0"', '"0.00"', '"-0"', '"+0"', '"0."', '".0"', '"0e10"', "[]", "{}"]


@pytest.mark.parametrize("value", TRUE)
def test_true(value: str) -> None:
    assert is_true(Result(row(value)))
    assert is_true(Result(value))


@pytest.mark.parametrize("value", FALSE)
def test_false(value: str) -> None:
    assert not is_true(Result(row(value)))
    assert not is_true(Result(value))


@pytest.mark.parametrize(("text", "expected"), [
    ('{"rows":[],"row_count":0}', False),
    ('{"rows":[{}],"row_count":1}', True),                     # a row without columns: the whole JSON counts
    ('{"rows":[{"a":false,"b":true}],"row_count":1}', False),  # the first column
    ('{"rows":[{"a":true},{"a":false}],"row_count":2}', True),  # of the first row
    ('{"slept": true, "seconds": 0}', True),
    ('{"scheduled": true}', True),
    ('{"status":200,"body":"","encoding":"text","headers":{},"ok":true,"duration_ms":1}', True),
    ('{"status":404,"body":"","encoding":"text","headers":{},"ok":false,"duration_ms":1}', False),
    ('{"signal_name":"n","timed_out":false,"data":null}', True),
    ('{"signal_name":"n","timed_out":true,"data":null}', False),
    ('{"ok":false}', True),                                    # not what an HTTP node gives
    ('{"timed_out":true}', True),
    ("not JSON", True), ("off", False), ("", False),
])
def test_results_of_nodes(text: str, expected: bool) -> None:
    assert is_true(Result(text)) is expected


@pytest.mark.parametrize("first", [False, True])
def test_deep_json_beside_the_answer(first: bool) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    text = f'{{"rows":[{{"a":{json.dumps(first)},"b":{deep},"c":"]["}}],"row_count":1}}'
    assert is_true(Result(text)) is first


def test_deep_json_as_the_answer() -> None:
    assert is_true(Result(row('{"a":' * 50_000 + "0" + "}" * 50_000)))
