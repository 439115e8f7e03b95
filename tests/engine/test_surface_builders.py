"""The builders: the exact text that they return, and what they refuse (SURFACE 1.2, 2.5, 3)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsl import cron
from tests.engine.fix_surface import Connection, refused, value

A, B, C = (f'{{"node_type":"SQL","query":"{letter}"}}' for letter in "abc")
AB = f'{{"node_type":"THEN","left_node":{A},"right_node":{B}}}'

TEXTS = {
    "df.sql('a')": A,
    "df.sql('')": '{"node_type":"SQL","query":""}',
    "df.sql(E'say \"é\"\\n\\t\\\\')": '{"node_type":"SQL","query":"say \\"é\\"\\n\\t\\\\"}',
    "df.sql(E'\\x01\\u2028')": '{"node_type":"SQL","query":"\\u0001\u2028"}',
    "df.seq('a', 'b')": AB,
    "df.seq(b => 'b', a => 'a')": AB,
    "df.seq(df.sql('a'), 'b')": AB,
    "df.seq('a'::varchar, 'b')": AB,
    "df.seq('a', 'b', 'c')": f'{{"node_type":"THEN","left_node":{AB},"right_node":{C}}}',
    "df.seq(VARIADIC ARRAY['a', 'b', 'c'])": f'{{"node_type":"THEN","left_node":{AB},"right_node":{C}}}',
    "df.seq(VARIADIC ARRAY['a'])": A,
    "df.as('SELECT 1', 'a')": '{"node_type":"SQL","query":"SELECT 1","result_name":"a"}',
    "df.as(df.as('a', 'x'), 'y')": '{"node_type":"SQL","query":"a","result_name":"y"}',
    "df.as(df.seq('a', 'b'), 'x')": AB[:-1] + ',"result_name":"x"}',
    "df.seq(df.as('a', 'x'), 'b')": AB.replace('"a"', '"a","result_name":"x"'),
    "df.as('{\"result_name\":\"no\"}', 'x')": '{"node_type":"SQL","query":"{\\"result_name\\":\\"no\\"}","result_name":"x"}',
    "df.step('x', 'a')": '{"node_type":"SQL","query":"a","result_name":"x"}',
    "df.as_op('a', 'x')": '{"node_type":"SQL","query":"a","result_name":"x"}',
    "df.sleep(60)": '{"node_type":"SLEEP","query":"60"}',
    "df.sleep(0)": '{"node_type":"SLEEP","query":"0"}',
    "df.wait_for_schedule('*/5 * * * *')": '{"node_type":"WAIT_SCHEDULE","query":"{\\"cron_expr\\":\\"*/5 * * * *\\"}"}',
    "df.wait_for_schedule('@hourly', 'europe/BERLIN')":
        '{"node_type":"WAIT_SCHEDULE","query":"{\\"cron_expr\\":\\"@hourly\\",\\"timezone\\":\\"Europe/Berlin\\"}"}',
    "df.loop('a')": f'{{"node_type":"LOOP","left_node":{A}}}',
    "df.loop_prefix_op('a')": f'{{"node_type":"LOOP","left_node":{A}}}',
    "df.loop('a', 'b')": f'{{"node_type":"LOOP","left_node":{A},"condition_node":{B}}}',
    "df.loop('a', condition => 'b', continue_on_failure => true)":
        f'{{"node_type":"LOOP","left_node":{A},"condition_node":{B},"query":"{{\\"continue_on_failure\\":true}}"}}',
    "df.break()": '{"node_type":"BREAK","query":"{\\"break_value\\":null}"}',
    "df.break('done \"x\"')": '{"node_type":"BREAK","query":"{\\"break_value\\":\\"done \\\\\\"x\\\\\\"\\"}"}',
    "df.break(df.sql('a'))": '{"node_type":"BREAK","query":' + json.dumps(json.dumps({"break_value": A}, separators=(",", ":"))) + "}",
    "df.if('a', 'b', 'c')": f'{{"node_type":"IF","left_node":{B},"right_node":{C},"condition_node":{A}}}',
    "df.if_else_op(df.if_then_op('a', 'b'), 'c')": f'{{"node_type":"IF","left_node":{B},"right_node":{C},"condition_node":{A}}}',
    "df.if_then_op('a', 'b')": '{"condition": "a", "_partial_if": true, "then_branch": "b"}',
    "df.if_rows('r', 'a', 'b')": f'{{"node_type":"IF","left_node":{A},"right_node":{B},'
                                 '"query":"{\\"condition_type\\":\\"result_has_rows\\",\\"result_name\\":\\"r\\"}"}',
    "df.join('a', 'b')": f'{{"node_type":"JOIN","left_node":{A},"right_node":{B}}}',
    "df.join3('a', 'b', 'c')": f'{{"node_type":"JOIN","left_node":{A},"right_node":{B},"extra_nodes":[{C}]}}',
    "df.join('a', 'b', 'c')": f'{{"node_type":"JOIN","left_node":{A},"right_node":{B},"extra_nodes":[{C}]}}',
    "df.join(VARIADIC ARRAY['a', 'b'])": f'{{"node_type":"JOIN","left_node":{A},"right_node":{B}}}',
    "df.join('a', 'b', 'c', 'a')": f'{{"node_type":"JOIN","left_node":{A},"right_node":{B},"extra_nodes":[{C},{A}]}}',
    "df.as(df.join3('a', 'b', 'c'), 'x')":
        f'{{"node_type":"JOIN","left_node":{A},"right_node":{B},"extra_nodes":[{C}],"result_name":"x"}}',
    "df.seq(df.join3('a', 'b', 'c'), 'a')":
        f'{{"node_type":"THEN","left_node":{{"node_type":"JOIN","left_node":{A},"right_node":{B},"extra_nodes":[{C}]}},'
        f'"right_node":{A}}}',
    "df.race('a', 'b')": f'{{"node_type":"RACE","left_node":{A},"right_node":{B}}}',
    "df.race('a', 'b', 'c')":
        f'{{"node_type":"RACE","left_node":{{"node_type":"RACE","left_node":{A},"right_node":{B}}},"right_node":{C}}}',
    "df.wait_for_signal('go')": '{"node_type":"SIGNAL","query":"{\\"signal_name\\":\\"go\\",\\"timeout_seconds\\":null}"}',
    "df.wait_for_signal('go', 30)": '{"node_type":"SIGNAL","query":"{\\"signal_name\\":\\"go\\",\\"timeout_seconds\\":30}"}',
    "df.http('HTTPS://a.example/x')":
        '{"node_type":"HTTP","query":"{\\"url\\":\\"HTTPS://a.example/x\\",\\"method\\":\\"POST\\",\\"body\\":null,'
        '\\"headers\\":null,\\"timeout_seconds\\":30}"}',
    "df.http('{base}/x', 'get', 'b', '{\"A\": \"b\"}', 5)":
        '{"node_type":"HTTP","query":"{\\"url\\":\\"{base}/x\\",\\"method\\":\\"GET\\",\\"body\\":\\"b\\",'
        '\\"headers\\":{\\"A\\":\\"b\\"},\\"timeout_seconds\\":5}"}',
    "df.http_multipart('http://a', parts => '[{\"name\": \"n\", \"data_b64\": \"YQ==\"}]')":
        '{"node_type":"HTTP_MULTIPART","query":"{\\"url\\":\\"http://a\\",\\"method\\":\\"POST\\",'
        '\\"parts\\":[{\\"name\\":\\"n\\",\\"data_b64\\":\\"YQ==\\"}],\\"headers\\":null,\\"timeout_seconds\\":30}"}',
    # What is no future becomes SQL, whole and unchanged (3.4, case 4).
    "df.seq(' a ', '{name}')": '{"node_type":"THEN","left_node":{"node_type":"SQL","query":" a "},'
                               '"right_node":{"node_type":"SQL","query":"{name}"}}',
    "df.seq('[1]', '{\"node_type\":\"BOGUS\"}')":
        '{"node_type":"THEN","left_node":{"node_type":"SQL","query":"[1]"},'
        '"right_node":{"node_type":"SQL","query":"{\\"node_type\\":\\"BOGUS\\"}"}}',
    # Hand-made futures: any order, white space, nulls, unknown members.
    "df.seq(E'\\n ' || jsonb_build_object('query', 'a', 'node_type', 'SQL', 'left_node', NULL, 'x', 1)::text, 'b')": AB,
}


@pytest.mark.parametrize("expression", TEXTS)
def test_the_text_of_a_builder(df: Connection, expression: str) -> None:
    assert value(df, f"SELECT {expression}") == TEXTS[expression]


def test_a_hand_made_compound_is_put_in_order(df: Connection) -> None:
    text = value(df, """SELECT df.as(jsonb_build_object('right_node', df.sql('b')::jsonb, 'left_node', df.sql('a')::jsonb,
                                                        'node_type', 'THEN')::text, 'x')""")
    assert list(json.loads(text)) == ["node_type", "left_node", "right_node", "result_name"]
    assert json.loads(text)["left_node"] == json.loads(A)
    assert ": " not in text


NULLS = ["df.sql(NULL)", "df.seq('a', NULL)", "df.seq('a', 'b', NULL)", "df.as(NULL, 'x')", "df.sleep(NULL)", "df.if('a', NULL, 'b')",
         "df.join('a', NULL)", "df.join('a', 'b', NULL)", "df.race(NULL, 'b')", "df.if_rows(NULL, 'a', 'b')",
         "df.wait_for_schedule(NULL)", "df.loop_prefix_op(NULL)", "df.if_else_op(df.if_then_op('a', NULL), 'b')", "df.status(NULL)",
         "df.result(NULL)", "df.explain(NULL)", "df.signal(NULL, 'a')", "df.cancel(NULL)", "df.await_instance(NULL)"]


@pytest.mark.parametrize("expression", NULLS)
def test_null_gives_null(df: Connection, expression: str) -> None:
    assert value(df, f"SELECT {expression}") is None


REFUSED = {
    "df.as('a', '')": ("22023", "df.as: result name cannot be empty"),
    "df.as('a', '1x')": ("22023", "df.as: result name '1x' is not a valid identifier — must match [a-zA-Z_][a-zA-Z0-9_]*"),
    "df.as('a', 'ö')": ("22023", "df.as: result name 'ö' is not a valid identifier"),
    "df.as('a', E'x\\n')": ("22023", "is not a valid identifier"),
    "df.sleep(-1)": ("22023", "Sleep duration must be non-negative"),
    "df.wait_for_schedule('nonsense')": ("22023", "Invalid cron expression 'nonsense'"),
    "df.wait_for_schedule('* * * * *', 'Mars/Olympus')": ("22023", "unknown time zone 'Mars/Olympus'"),
    "df.wait_for_signal('')": ("22023", "Signal name cannot be empty"),
    "df.wait_for_signal(NULL)": ("22004", "name cannot be NULL"),
    "df.wait_for_signal('a', 0)": ("22023", "Timeout must be positive"),
    "df.loop(NULL)": ("22004", "body cannot be NULL"),
    "df.join(VARIADIC ARRAY['a'])": ("22023", "df.join needs at least 2 branches"),
    "df.seq(VARIADIC ARRAY[]::text[])": ("22023", "df.seq needs at least 1 step"),
    "df.http(NULL)": ("22004", "url cannot be NULL"),
    "df.http('ftp://x')": ("22023", "Blocked: unsupported URL scheme 'ftp'. Only http and https are allowed."),
    "df.http('example.com')": ("22023", "Blocked: unsupported URL scheme 'example.com'. Only http and https are allowed."),
    "df.http('http://x', 'TRACE')": ("22023", "Invalid HTTP method: TRACE. Must be GET, POST, PUT, DELETE, or PATCH"),
    "df.http('http://x', timeout_seconds => 0)": ("22023", "Timeout must be positive"),
    "df.http('http://x', headers => '[]')": ("22023", "headers must be a JSON object"),
    "df.http('http://x', headers => '{\"a\": null}')": ("22023", "the value of header 'a' must be"),
    "df.http('http://x', headers => '{\"a\": [1]}')": ("22023", "the value of header 'a' must be"),
    "df.http('http://x', headers => '{\"a\": \"b\\r\\nc: d\"}')": ("22023", "contains a line break"),
    "df.http('http://x', headers => '{\"a b\": \"c\"}')": ("22023", "header name 'a b' is not valid"),
    "df.http('http://x', headers => '{\"HOST\": \"c\"}')": ("22023", "header 'HOST' cannot be set"),
    "df.http_multipart('http://x', 'GET')": ("22023", "Invalid HTTP method for multipart: GET. Must be POST, PUT, or PATCH"),
    "df.http_multipart('http://x')": ("22004", "parts is required and cannot be NULL"),
    "df.http_multipart('http://x', parts => '{}')": ("22023", "parts must be a JSON array of part objects"),
    "df.http_multipart('http://x', parts => '[]')": ("22023", "parts must contain at least one part"),
    "df.http_multipart('gopher://x')": ("22023", "Blocked: unsupported URL scheme 'gopher'."),
    "df.seq('{\"node_type\":\"THEN\",\"left_node\":5}', 'b')":
        ("22023", "Invalid Durofut JSON: failed to deserialize workflow step: Durofut children must be JSON objects"),
    "df.loop('{\"node_type\":\"LOOP\",\"condition_node\":\"x\"}')": ("22023", "condition_node must be a Durofut JSON object"),
    "df.loop('{\"node_type\":\"JOIN\",\"extra_nodes\":[1]}')": ("22023", "extra_nodes entries must be Durofut JSON objects"),
    "df.loop('{\"node_type\":\"JOIN\",\"extra_nodes\":null}')": ("22023", "failed to deserialize workflow step"),
    "df.loop('{\"node_type\":\"SQL\",\"query\":7}')": ("22023", "failed to deserialize workflow step"),
    "df.if_else_op('{\"a\": 1}', 'x')": ("42601", "Invalid if-then-else: left side of !> must be a ?> expression"),
    "df.if_else_op('{\"_partial_if\": null}', 'x')": ("42601", "Invalid if-then-else: left side of !> must be a ?> expression"),
    "df.if_else_op(df.seq('a', 'b'), 'x')": ("42601", "Invalid if-then-else: left side of !> must be a ?> expression"),
    "df.if_else_op('SELECT 1', 'x')": ("22P02", "invalid input syntax for type json"),
}


@pytest.mark.parametrize("expression", REFUSED)
def test_what_a_builder_refuses(df: Connection, expression: str) -> None:
    sqlstate, fragment = REFUSED[expression]
    error = refused(df, f"SELECT {expression}")
    assert error.sqlstate == sqlstate
    assert fragment in error.message


def test_head_options_and_a_whole_url_reference_are_accepted(df: Connection) -> None:
    assert '\\"HEAD\\"' in value(df, "SELECT df.http('http://x', 'head')")
    assert '\\"OPTIONS\\"' in value(df, "SELECT df.http('http://x', 'Options')")
    assert "$url" in value(df, "SELECT df.http('$url')")


CRON = ["* * * * *", "*/5 * * * *", "10-50/10 1,2 1 jan,FEB mon-fri", "0 0 29 2 *", "0 0 31 2 1", "5/7 * * * *", "0 0 * * 7", "@daily",
        "@WEEKLY", " 0  9 * * 1-5 ", "59 23 31 12 0", "0 0 ? * MON", "0 0 1 January ?", "0 0 * * Monday,Friday", "0 0 * * mon-sun",
        "0 0 * * sat-Sunday", "0 0 * september-DEC/2 *"]
BAD_CRON = ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *", "5-1 * * * *",
            "a * * * *", "mon * * * *", "* * * * mon-", "1,,2 * * * *", "0 0 30 2 *", "0 0 31 4,6,9,11 *", "@never", "-1 * * * *", "1.5 * * * *",
            "* * * * *; DROP", "99999999999 * * * *", "? * * * *", "* * ?/2 * *", "* * * * mond", "* * * septembe *", "* * L * *", "* * * * 1#2",
            "* * * * sun,?", "* * sun * *"]


@pytest.mark.parametrize("expression", [*CRON, *BAD_CRON])
def test_cron_is_judged_as_the_engine_judges_it(df: Connection, expression: str) -> None:
    fault = value(df, "SELECT duroxide.cron_fault(%s)", expression)
    assert (fault is None) == (expression in CRON), fault
    try:
        cron.check(expression, None)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == (expression in CRON)


ITEM = st.sampled_from([*"*?0123456789", "10", "12", "23", "31", "59", "60", "jan", "Dec", "MARCH", "sun", "Mon", "SATURDAY", "tues", "-1", "", "x"])
FIELD = st.lists(st.builds("{}{}{}".format, ITEM, st.just("") | st.builds("-{}".format, ITEM), st.sampled_from(["", "", "", "/2", "/0", "/99", "/x"])),
                 min_size=1, max_size=3).map(",".join)


EXPRESSION = st.lists(FIELD | st.sampled_from(["*", "1"]), min_size=5, max_size=5).map(" ".join)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(expressions=st.lists(EXPRESSION, min_size=30, max_size=60))
def test_cron_is_judged_alike_whatever_it_is(df: Connection, expressions: list[str]) -> None:
    """Many at a time: it is the builder's and the engine's words on each that are compared."""
    wrong = []
    for expression, fault in df.execute("SELECT e, duroxide.cron_fault(e) FROM unnest(%s::text[]) e", (expressions,)):
        refusal = None
        try:
            cron.check(expression, None)
        except ValueError as e:
            refusal = str(e)
        if (fault is None) != (refusal is None):
            wrong.append((expression, fault, refusal))
    assert not wrong


@pytest.mark.parametrize("node_type", ["THEN", "RACE"])
def test_long_chains_are_built_and_stay_shallow(df: Connection, node_type: str) -> None:
    builder = {"THEN": "df.seq", "RACE": "df.race"}[node_type]
    text = value(df, f"SELECT {builder}(VARIADIC ARRAY(SELECT 'SELECT ' || i FROM generate_series(1, 4000) i))")
    nodes = value(df, "SELECT duroxide.flatten(%s::jsonb, 0)", text)
    assert [n["query"] for n in nodes if n["type"] == "SQL"] == [f"SELECT {i}" for i in range(1, 4001)]


def test_nesting_beyond_the_limit_of_start_is_built(df: Connection) -> None:
    expression = "'SELECT 0'"
    for i in range(400):
        expression = f"df.seq({expression}, 'SELECT {i}')"
    text: str = value(df, f"SELECT {expression}")
    assert text.count('"THEN"') == 400
    assert "maximum nesting depth of 256" in refused(df, "SELECT df.start(%s)", text).message


def test_builders_need_no_privilege_but_usage_of_the_schema(df: Connection) -> None:
    df.execute("CREATE ROLE surface_nobody; GRANT surface_nobody TO CURRENT_USER" if df.info.server_version < 160000
               else "CREATE ROLE surface_nobody; GRANT surface_nobody TO CURRENT_USER WITH SET TRUE")
    df.execute("GRANT USAGE ON SCHEMA df TO surface_nobody; SET LOCAL ROLE surface_nobody")
    assert value(df, "SELECT df.seq('a', 'b')") == AB
    assert refused(df, "SELECT df.http('http://x')").sqlstate == "42501"


def test_compiler_errors_and_warnings_are_raised_by_the_backend(df: Connection) -> None:
    error = refused(df, "SELECT duroxide.error('42601', 'no', NULL, 'do', 7)")
    assert (error.sqlstate, error.message, error.hint, error.constraint) == ("42601", "no", "do", "dfproxy:position=7")
    error = refused(df, "SELECT duroxide.error('22023', 'no', 'detail', NULL, 1), %s::text", "a parameter")
    assert (error.sqlstate, error.hint) == ("22023", None)
    notices: list[Any] = []
    df.add_notice_handler(lambda n: notices.append((n.severity, n.message_primary, n.message_hint, n.constraint_name)))
    warning = "duroxide.warning(df.sql('a'), 'read so', 'use parentheses', 12)"
    assert value(df, f"SELECT {warning} FROM generate_series(1, 3)") == A
    assert notices == [("WARNING", "read so", "use parentheses", "dfproxy:position=12")]


def test_every_function_pins_its_names(df: Connection) -> None:
    """Either by a setting of its own, or by a body whose names were resolved when it was created."""
    loose = df.execute("""
        SELECT p.oid::regprocedure::text FROM pg_proc p
         WHERE p.pronamespace IN ('df'::regnamespace, 'duroxide'::regnamespace)
           AND p.prosqlbody IS NULL AND NOT COALESCE(p.proconfig::text LIKE '%%search_path%%', false)""").fetchall()
    assert loose == []


def test_few_functions_run_with_the_owners_rights(df: Connection) -> None:
    definers = {r[0] for r in df.execute("""
        SELECT p.proname FROM pg_proc p WHERE p.prosecdef
           AND p.pronamespace IN ('df'::regnamespace, 'duroxide'::regnamespace)""")}
    assert definers == {"on_start", "on_cancel", "on_delete", "checkpoint", "step_done", "launch_answer", "metrics", "register_executor", "forget_executor"}
