"""Appendix B of the specification, lines 5 to 10 and 15: what workflows yield, from the SQL that a user writes to what df.result says.

All workflows are started at once, in one session through the proxy; each has its own answer.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from tests.e2e.fix_dfproxy import Through

TABLES = """
CREATE TABLE trace (workflow text, what text);
CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL DEFAULT 0);
INSERT INTO counters SELECT generate_series(1, 40);
CREATE FUNCTION tick(counter int) RETURNS int LANGUAGE sql AS 'UPDATE counters SET n = n + 1 WHERE id = counter RETURNING n';
"""
FAILED = "SQL execution failed: error returned from database: "
BOOM = f"{FAILED}division by zero"

#: What df.start is given -> the result: rows as lists of their values, any other as it is; or the error's text.
YIELDS: dict[str, Any] = {
    # 5. Sequence and values.
    "'SELECT 1 AS a' ~> 'SELECT 2 AS a' ~> 'SELECT 3 AS a'": [[3]],
    "'SELECT 7 AS a, ''x'' AS b' |=> 'r' ~> 'SELECT $r AS one, $r.b AS two, $r.a + 1 AS three'": [[7, "x", 8]],
    "'SELECT 1 AS a, ''p'' AS b UNION ALL SELECT 2, ''q''' |=> 'r' ~> 'SELECT count(*) AS n, string_agg(b, ''-'' ORDER BY a DESC) AS s FROM $r.*'":
        [[2, "q-p"]],
    "'SELECT 1 AS a WHERE false' |=> 'r' ~> 'SELECT $r? IS NULL AS x, $r.a? IS NULL AS y'": [[True, True]],
    "'SELECT ''O''''Neill; -- \\ $1'' AS a' |=> 'r' ~> 'SELECT $r.a AS a, ''<$r.a>'' AS b, length($r) AS n'":
        [["O'Neill; -- \\ $1", "<O'Neill; -- \\ $1>", 16]],
    "'SELECT 1 AS v' |=> 'a' ~> 'SELECT 2 AS v' |=> 'ab' ~> 'SELECT $a AS one, $ab AS two, ''$a.b'' <> ''x'' AS three'": "$a.b: result has no field 'b' (available: v)",
    "'SELECT 1 AS v' |=> 'a' ~> 'SELECT 2 AS v' |=> 'ab' ~> 'SELECT $ab AS two, $a AS one'": [[2, 1]],
    "'SELECT 1 AS v' |=> 'a' ~> 'SELECT 2 AS v' |=> 'a' ~> 'SELECT $a AS v'": [[2]],
    "'SELECT 1 AS v' |=> 'a' ~> 'SELECT $nobody AS v'": f'{FAILED}syntax error at or near "$"',
    "'SELECT 1 AS v WHERE false' |=> 'r' ~> 'SELECT $r'": "$r has no rows — query returned zero results",
    "'SELECT NULL::int AS v' |=> 'r' ~> 'SELECT $r'": "$r is NULL — first column of first row is NULL",
    "'SELECT NULL::int AS v' |=> 'r' ~> 'SELECT $r.v'": "$r.v is NULL",
    "df.sleep(0) |=> 's' ~> 'SELECT $s.seconds AS n'": [[0]],
    "df.sleep(0) |=> 's' ~> 'SELECT * FROM $s.*'": "$s.* — invalid result format",
    "('SELECT 1 AS a' & 'SELECT 2 AS a') |=> 'j' ~> 'SELECT jsonb_array_length($j::jsonb) AS n'": [[2]],
    "('SELECT 1 AS a' & 'SELECT 2 AS a') |=> 'j' ~> 'SELECT $j.a'": "$j.a: result is neither a row set nor a JSON object",
    "'SELECT array_agg(g) AS l FROM generate_series(1, 3) g' |=> 'r' ~> 'SELECT sum(x) AS n FROM unnest($r.l) x'": [[6]],
    "'SELECT g AS id FROM generate_series(1, 3) g' |=> 'r' ~> 'SELECT count(*) AS n FROM generate_series(2, 9) x WHERE x = ANY($r) AND x IN ($r.id)'": [[2]],
    # 6. Variables.
    "'SELECT ''{greeting}, {nobody}'' AS a'": [["Hello, {nobody}"]],
    "'SELECT ''{braces}'' AS a'": [["{greeting}"]],
    "'SELECT ''{greeting}'' AS a' & @> ('SELECT ''{greeting}'' AS b' |=> 'x' ~> df.break('$x')) & ('SELECT ''{greeting}'' AS c' | df.sleep(600))":
        [[{"a": "Hello"}, "Hello"], {"c": "Hello"}],
    "'SELECT df.getvar(''greeting'') AS a'": [["Hello"]],
    "'SELECT df.setvar(''greeting'', ''x'')'": FAILED + "df.setvar() cannot be called inside a workflow - set variables before starting the workflow",
    "'SELECT df.unsetvar(''greeting'')'": FAILED + "df.unsetvar() cannot be called inside a workflow - manage variables before starting the workflow",
    "'SELECT df.clearvars()'": FAILED + "df.clearvars() cannot be called inside a workflow - manage variables before starting the workflow",
    # 7. Conditions.
    **{f"'SELECT {condition}' ?> 'SELECT ''{n}: yes'' AS a' !> 'SELECT ''{n}: no'' AS a'": [[f"{n}: {outcome}"]]
       for n, (condition, outcome) in enumerate([
           ("true", "yes"), ("false", "no"), ("NULL::text", "no"), ("1 WHERE false", "no"), ("0", "no"), ("-3", "yes"), ("0.00", "no"), ("0.01", "yes"),
           ("'' NO ''", "no"), ("''f''", "no"), ("''n''", "no"), ("''off''", "no"), ("''''", "no"), ("''0''", "no"), ("''maybe''", "yes"), ("''t''", "yes"),
           ("''{}''::json", "no"), ("''[0]''::json", "yes"), ("''{}''::int[]", "no"), ("false, true", "no"), ("count(*) > 0 FROM counters", "yes")])},
    "('SELECT 1 AS a' |=> 'r') ~> df.if('SELECT $r = 1', 'SELECT $r + 1 AS a', 'SELECT 0 AS a') |=> 'i' ~> 'SELECT $i + 1 AS a'": [[3]],
    "'SELECT 1 AS a' ~> 'SELECT false' ?> 'SELECT 1 AS a' !> ('SELECT 2 AS a' ~> 'SELECT 3 AS a')": [[3]],
    "'SELECT true AS done, 1 AS a' |=> 'b' ~> ('$b.done' ?> ' $b.a ' !> 'SELECT 2 AS a')": [[1]],
    "'SELECT 1 AS a WHERE false' |=> 'b' ~> df.if('$b.a?', 'SELECT 1 AS a', 'SELECT 2 AS a')": [[2]],
    "df.if('SELECT 1' & 'SELECT 2', 'SELECT ''a join is true'' AS a', 'SELECT 0')": [["a join is true"]],
    "df.if(df.wait_for_signal('never', 1), 'SELECT ''came'' AS a', 'SELECT ''timed out'' AS a')": [["timed out"]],
    "df.if('SELECT 1/0', 'SELECT 1', 'SELECT 2')": BOOM,
    "'SELECT 1' |=> 'r' ~> df.if_rows('r', 'SELECT ''rows'' AS a', 'SELECT ''none'' AS a')": [["rows"]],
    "'SELECT 1 WHERE false' |=> 'r' ~> df.if_rows('r', 'SELECT ''rows'' AS a', 'SELECT ''none'' AS a')": [["none"]],
    "'UPDATE counters SET n = n WHERE id = 1' |=> 'r' ~> df.if_rows('r', 'SELECT ''rows'' AS a', 'SELECT ''none'' AS a')": [["none"]],
    "df.if_rows('r', 'SELECT 1', 'SELECT 2')": "df.if_rows: result 'r' not found",
    "df.sleep(0) |=> 'r' ~> df.if_rows('r', 'SELECT 1', 'SELECT 2')": "df.if_rows: result 'r' is not a SQL result (missing row_count)",
    # 8. Loops.
    "df.loop('SELECT tick(1) AS n' |=> 'r', 'SELECT $r < 4')": [[4]],
    "df.loop('SELECT tick(2) AS n', 'SELECT false')": [[1]],
    "'SELECT tick(3) AS n' |=> 'p' ~> df.loop('SELECT tick(4) AS n' |=> 'r', 'SELECT $r < 3') ~> 'SELECT $p AS prefix, $r AS n, (SELECT n FROM counters WHERE id = 3) AS once'":
        [[1, 3, 1]],
    "'SELECT 0 AS n' |=> 'sum' ~> df.loop('SELECT tick(5) AS n' |=> 'r' ~> 'SELECT $sum + $r AS n' |=> 'sum', 'SELECT $r < 4') ~> 'SELECT $sum AS n'": [[10]],
    "@> df.break()": None,
    "@> df.break('text')": "text",
    "@> df.break('42')": 42,
    "@> df.break('{\"a\": [1, null]}')": {"a": [1, None]},
    "@> ('SELECT ''it\"s'' AS t, 2 AS n' |=> 'r' ~> df.break('{\"t\": \"$r.t\", \"n\": $r.n}'))": {"t": 'it"s', "n": 2},
    "df.loop('SELECT 1', df.break('from the condition'))": "from the condition",
    "@> ('SELECT tick(7) >= 3' ?> df.break('in if') !> 'SELECT 1')": "in if",
    "@> ('SELECT 1' & df.break('in join'))": "in join",
    "@> (df.sleep(600) | df.break('in race'))": "in race",
    "@> ((@> df.break('inner') |=> 'i') ~> df.break('outer after $i'))": 'outer after "inner"',
    "df.loop(df.loop('SELECT tick(8) AS n', 'SELECT (SELECT n FROM counters WHERE id = 8) % 3 <> 0') ~> 'SELECT tick(9) AS n', 'SELECT (SELECT n FROM counters WHERE id = 9) < 2') ~> 'SELECT n FROM counters WHERE id = 8'":
        [[6]],
    "(@> df.break('7')) |=> 'l' ~> 'SELECT $l::int AS n'": [[7]],
    "@> 'SELECT 1/0'": BOOM,
    "'SELECT 1' ~> @> 'SELECT 1/0'": f"Loop sub-orchestration failed: {BOOM}",
    "df.loop('SELECT tick(10) AS n' |=> 'r' ~> 'SELECT 1/($r - 1) AS n', 'SELECT $r < 2', continue_on_failure => true)": [[1]],
    # 9. Branches.
    "'SELECT 1 AS a' & 'SELECT 2 AS a'": [{"a": 1}, {"a": 2}],
    "'SELECT 1 AS a' & 'SELECT 2 AS a' & 'SELECT 3 AS a'": [[{"a": 1}, {"a": 2}], {"a": 3}],
    "df.join3('SELECT 1 AS a', 'SELECT 2 AS a', 'SELECT 3 AS a')": [{"a": 1}, {"a": 2}, {"a": 3}],
    "('SELECT 1 AS a' |=> 'x') & ('SELECT 2 AS a' |=> 'y') ~> 'SELECT $x + $y AS a'": [[3]],
    "'SELECT 1 AS a' |=> 'x' ~> (('SELECT 2 AS a' |=> 'x') & 'SELECT $x AS a') ~> 'SELECT $x AS a'": [[2]],
    "'SELECT 1' & 'SELECT 1/0' & 'SELECT 1/0'": f"JOIN branch 1 failed: JOIN branch 2 failed: {BOOM}; JOIN branch 2 failed: {BOOM}",
    "df.join3('SELECT 1/0', 'INSERT INTO trace VALUES (''join'', ''all branches finish'')', 'SELECT 1')": f"JOIN branch 1 failed: {BOOM}",
    "(df.sleep(600) ~> 'INSERT INTO trace VALUES (''race'', ''the loser ran on'')') | ('SELECT 5 AS a' |=> 'w') ~> 'SELECT $w AS a'": [[5]],
    "df.sleep(600) | 'SELECT 1/0'": f"RACE right branch failed: {BOOM}",
    "'SELECT 1/0' | df.sleep(600)": f"RACE left branch failed: {BOOM}",
    "df.race(df.sleep(600), df.sleep(600), 'SELECT 3 AS a')": [[3]],
    "(@> df.break('1')) & df.loop('SELECT tick(11) AS n' |=> 'r', 'SELECT $r < 3')": [1, {"n": 3}],
    "df.loop(('SELECT tick(12) AS n' |=> 'r') & ('SELECT 1' | df.sleep(600)), 'SELECT $r < 3') ~> 'SELECT $r AS n'": [[3]],
    "(@> 'SELECT 1/0') & 'SELECT 1'": f"JOIN branch 1 failed: {BOOM}",
    # 15. Values.
    "'SELECT 1.50::numeric AS a, 3.14::float4 AS b, ARRAY[1, 2] AS c, ''\\xdead''::bytea AS d, ''1 day''::interval AS e, ''x''::char(3) AS f, 1 AS g, 2 AS g'":
        [["1.50", 3.14, [1, 2], "\\xdead", "P1D", "x  ", 1, 2]],
    "'INSERT INTO trace VALUES (''dml'', ''x'') RETURNING what, 7 AS n'": [["x", 7]],
    "'CREATE TEMP TABLE gone (a int)' ~> 'SELECT to_regclass(''gone'') IS NULL AS a'": [[True]],
}


def plain(result: Any) -> Any:
    """Rows as lists of values; within an array, a result of one row as that row."""
    if isinstance(result, dict) and set(result) == {"rows", "row_count"}:
        return [list(row.values()) for row in result["rows"]]
    if isinstance(result, list):
        return [inside(item) for item in result]
    return result


def inside(item: Any) -> Any:
    if isinstance(item, dict) and set(item) == {"rows", "row_count"}:
        return item["rows"][0]
    return [inside(i) for i in item] if isinstance(item, list) else item


def test_what_workflows_yield(through: Through) -> None:
    with through.connect() as c:
        c.execute("SET client_min_messages = error")
        c.execute(TABLES)
        c.execute("SELECT df.setvar('greeting', 'Hello'), df.setvar('braces', '{greeting}')")
        started = {}
        for expression in YIELDS:
            row = c.execute(f"SELECT df.start({expression}, 'b')".encode()).fetchone()
            assert row is not None
            started[expression] = row[0]
        wrong = []
        for expression, expected in YIELDS.items():
            c.execute("SELECT df.await_instance(%s, 60)", (started[expression],))
            row = c.execute("SELECT status, df.result(id), df.error(id), output FROM df.instances WHERE id = %s", (started[expression],)).fetchone()
            assert row is not None
            status, result, error, output = row
            if status == "completed":
                found = plain(json.loads(output))
                if error is not None or json.loads(result) != json.loads(output):
                    wrong.append((expression, "result and output differ", row))
            else:
                found = error
                if (status, result, output) != ("failed", None, error):
                    wrong.append((expression, "a failure is told wrongly", row))
            if found != expected:
                wrong.append((expression, expected, found))
        assert not wrong, "\n".join(f"{e}\n    {a}\n    {b}" for e, a, b in wrong)
        assert c.execute("SELECT workflow FROM trace ORDER BY 1").fetchall() == [("dml",), ("join",)]


def test_generations_and_names_of_root_loops(through: Through) -> None:
    with through.connect() as c:
        row = c.execute("SELECT df.start(df.loop('SELECT 1 AS n', 'SELECT count(*) < 3 FROM df.instance_executions(''{sys_instance_id}'')'), 'root'),"
                        "       df.start('SELECT 1' ~> df.loop(df.sleep(0), 'SELECT false'), 'below')").fetchone()
        assert row is not None
        for instance, rounds in zip(row, (3, 1), strict=True):
            assert c.execute("SELECT df.await_instance(%s, 60)", (instance,)).fetchone() == ("completed",)
            assert c.execute("SELECT current_execution_id FROM df.instance_info(%s)", (instance,)).fetchone() == (rounds,)
            assert c.execute("SELECT array_agg(status ORDER BY execution_id) FROM df.instance_executions(%s)", (instance,)).fetchone() == (
                ["ContinuedAsNew"] * (rounds - 1) + ["Completed"],)


def test_a_round_that_does_nothing_takes_a_second(through18: Through) -> None:
    with through18.connect() as c, pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        instance = c.execute("SELECT df.start(@> df.sleep(0))").fetchone()
        assert instance is not None
        c.execute("SELECT df.await_instance(%s, 2)", instance)
    with through18.connect() as c:
        rounds = c.execute("SELECT current_execution_id FROM df.instance_info(%s)", instance).fetchone()
        assert rounds is not None
        assert 1 <= rounds[0] <= 5
        c.execute("SELECT df.cancel(%s)", instance)


def test_role_names_that_need_quotes(through: Through) -> None:
    """16. Capitals, spaces, quotes: in row security, in SQL steps, and in the rights of HTTP steps."""
    name = f"Ann \"O'B\" \\é {through.database.name}"
    with psycopg.connect(through.database.superuser_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        admin.execute("SELECT df.grant_usage(%s, include_http => true)", (name,))
        with psycopg.connect(through.proxy.dsn(quote(name), through.database.name), autocommit=True) as c:

            def end(workflow: str) -> tuple[Any, ...]:
                row = c.execute(f"SELECT df.start({workflow})".encode()).fetchone()
                c.execute("SELECT df.await_instance(%s, 60)", row)
                found = c.execute("SELECT status, output, submitted_by = quote_ident(current_user)::regrole FROM df.instances WHERE id = %s", row).fetchone()
                assert found is not None
                return found

            status, output, own = end("'SELECT current_user AS c, session_user = current_user AS s' |=> 'me' ~> 'SELECT $me.c AS c, $me.s AS s'")
            assert (status, json.loads(output)["rows"][0]["c"], own) == ("completed", name, True)
            # Past the gate of rights, and stopped at the next one.
            assert "restricted range" in end("df.http('http://127.0.0.1:9/')")[1]
            admin.execute(sql.SQL("REVOKE EXECUTE ON FUNCTION df.http(text, text, text, jsonb, integer) FROM {}").format(sql.Identifier(name)))
            assert f"Blocked: role '{name}' does not have EXECUTE privilege on df.http()." in end(
                """'{"node_type":"HTTP","query":"{\\"url\\":\\"http://127.0.0.1:9/\\",\\"method\\":\\"GET\\",\\"timeout_seconds\\":5}"}'""")[1]
            assert c.execute("SELECT count(*) FROM df.list_instances()").fetchone() == (3,)
        with through.connect() as owner:
            assert owner.execute("SELECT count(*) FROM df.list_instances()").fetchone() == (3,)


def test_workflows_of_a_role_go_on_though_its_rights_were_revoked(through18: Through) -> None:
    name = f"leaver_{through18.database.name}"
    with psycopg.connect(through18.database.superuser_dsn, autocommit=True) as admin, through18.connect() as owner:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        admin.execute("SELECT df.grant_usage(%s)", (name,))
        with psycopg.connect(through18.proxy.dsn(name, through18.database.name), autocommit=True) as c:
            row = c.execute("SELECT df.start(df.wait_for_signal('go') ~> 'SELECT current_user::text AS who')").fetchone()
            assert row is not None
            admin.execute("SELECT df.revoke_usage(%s)", (name,))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                c.execute("SELECT df.status(%s)", row)
        owner.execute("SELECT df.signal(%s, 'go')", row)
        owner.execute("SELECT df.await_instance(%s, 60)", row)
        output = owner.execute("SELECT output FROM df.instances WHERE id = %s", row).fetchone()
        assert output is not None
        assert json.loads(output[0])["rows"] == [{"who": name}]
        admin.execute("SELECT df.revoke_usage(%s)", (name,))
        assert admin.execute("SELECT count(*) FROM duroxide.executors WHERE role = %s::regrole", (name,)).fetchone() == (0,)
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
