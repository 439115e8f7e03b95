"""df.start of a future that the planner knows (0012_starts.sql): the same graph, the same errors, worked out once for a plan."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from dsl.graph import Graph
from engine import migrate
from tests.engine.fix_graphs import Tree, trees
from tests.engine.fix_surface import Connection, refused, value
from tests.fix_postgres import Database

#: What a start is that has its graph already.
PLANNED = re.compile(r"Output: duroxide\.start\('\{\"\[\{")
#: What duroxide.flatten makes of a future, without ids; NULL where it is refused.
REFERENCE = """
CREATE FUNCTION pg_temp.bare(graph jsonb) RETURNS jsonb LANGUAGE sql AS
    $$ SELECT jsonb_agg(n - 'id' ORDER BY i) FROM jsonb_array_elements(graph) WITH ORDINALITY AS e(n, i) $$;
CREATE FUNCTION pg_temp.reference(fut text) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    RETURN pg_temp.bare(duroxide.flatten(duroxide.decode(fut), 0));
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END $$;
"""
TYPES = ["SQL", "THEN", "IF", "JOIN", "LOOP", "BREAK", "RACE", "SLEEP", "WAIT_SCHEDULE", "HTTP", "SIGNAL"]
TEXTS = st.sampled_from(["SELECT 1", "", "OK", " OK ", "0123abcd", "completed", "{", "{}", '{"a": 1}', "Instance x", "Triggered x", "{x}",
                         "a\nb", "\x01", "\\u0000", "ä☃", '"', "'", "\\", "%", '"id":"\x01', '{"node_type":"SQL","query":"x"}',
                         '{"node_type":"SQL","query":"\\u0000"}', '{"node_type":"SQL","query":"x","n":1e999999}']) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def members(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Nodes, most of them with something wrong."""
    child = children | st.sampled_from([None, 1, "x"])
    return st.fixed_dictionaries(
        {"node_type": st.sampled_from(TYPES) | st.sampled_from(["sql", 1, None])},
        optional={"left_node": child, "right_node": child, "condition_node": child,
                  "extra_nodes": st.lists(children, max_size=2) | st.sampled_from([None, "x", [1]]),
                  "query": TEXTS | st.sampled_from([None, 1]), "result_name": st.sampled_from(["a", "", "1", None, 1])})


def future(tree: Tree) -> dict[str, Any]:
    """A tree of fix_graphs as the JSON of a future."""
    node: dict[str, Any] = {"node_type": tree["type"]}
    for member in ("left", "right", "condition"):
        if tree.get(member) is not None:
            node[member + "_node"] = future(tree[member])
    if tree.get("extras"):
        node["extra_nodes"] = [future(e) for e in tree["extras"]]
    for member, name in (("query", "query"), ("name", "result_name")):
        if tree.get(member) is not None:
            node[name] = tree[member]
    return node


VALID = trees().map(future).map(json.dumps)
ANY = TEXTS | st.recursive(members(st.just({"node_type": "SQL", "query": "x"})), members, max_leaves=6).map(json.dumps) | VALID
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def bare(graph: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in n.items() if k != "id"} for n in graph]


@FEW
@given(futures=st.lists(ANY, min_size=60, max_size=100))
@example(futures=[json.dumps({"node_type": "SQL", "query": '{"node_type":"SQL","query":"\\u0000"}'})])
def test_a_template_is_what_flatten_makes_or_nothing(df: Connection, futures: list[str]) -> None:
    """Many at a time; a future that flatten refuses has no template."""
    with df.transaction(force_rollback=True):
        df.execute(REFERENCE)
        wrong = df.execute("""
            SELECT f, template, reference
              FROM (SELECT f, duroxide.graph_template(f) AS template, pg_temp.reference(f) AS reference FROM unnest(%s::text[]) f) x
             WHERE pg_temp.bare(replace(template, E'\\x01', '')::jsonb) <> reference OR reference IS NULL AND template IS NOT NULL
            """, (futures,)).fetchall()
    assert wrong == []


@FEW
@given(futures=st.lists(VALID, min_size=20, max_size=30))
def test_constants_and_parameters_start_the_same_graph(df: Connection, futures: list[str]) -> None:
    with df.transaction(force_rollback=True):
        assert value(df, "SELECT count(*) FROM unnest(%s::text[]) f WHERE duroxide.graph_template(f) IS NULL", futures) == 0
        constants = sql.SQL("SELECT {}").format(sql.SQL(", ").join(sql.SQL("df.start({})").format(f) for f in futures))
        parameters = "SELECT df.start(f) FROM unnest(%s::text[]) WITH ORDINALITY AS u(f, n) ORDER BY n"
        submitted = "SELECT duroxide.submit(NULL, f, NULL, NULL) FROM unnest(%s::text[]) WITH ORDINALITY AS u(f, n) ORDER BY n"
        ids = [list(df.execute(constants).fetchone() or ())]
        ids += [[r[0] for r in df.execute(query, (futures,))] for query in (parameters, submitted)]
        graphs = dict(df.execute("SELECT id, graph FROM duroxide.instances").fetchall())
    for planned, given_, old in zip(*ids, strict=True):
        Graph.from_json(graphs[planned])
        assert bare(graphs[planned]) == bare(graphs[given_]) == bare(graphs[old])


@FEW
@given(futures=st.lists(ANY, min_size=15, max_size=25))
@example(futures=['{"node_type":"SQL","query":"\\u0000"}', "OK", '{"node_type":"SQL","query":"x","n":1e999999}'])
def test_constants_and_parameters_are_refused_alike(df: Connection, futures: list[str]) -> None:
    def outcome(query: str | sql.Composed, *arguments: Any) -> tuple[str | None, ...] | None:
        try:
            with df.transaction(force_rollback=True):
                df.execute(query, arguments or None)
        except psycopg.Error as e:
            d = e.diag
            return d.sqlstate, d.message_primary, d.message_detail, d.message_hint, d.constraint_name, d.statement_position
        return None

    for fut in futures:
        planned = outcome(sql.SQL("SELECT df.start({})").format(fut))
        assert planned == outcome("SELECT df.start(%s)", fut) == outcome("SELECT duroxide.submit(NULL, %s, NULL, NULL)", fut)


def test_variables_are_read_where_a_step_can_have_a_place_for_one(df: Connection) -> None:
    """Elsewhere nobody would find them: steps have no braces. A loop at the root shows them with its earlier rounds."""
    df.execute("SELECT df.setvar('v', 'one')")
    futures = {
        "SELECT 1": False, "SELECT '{v}'": True, "SELECT '{'": True, "df.seq('SELECT 1', 'SELECT $a')": False, "SELECT '\"id'": False,
        "df.seq('SELECT 1', df.as('SELECT {v}', 'a'))": True, "df.loop('SELECT 1', 'SELECT false')": True,
        "df.seq(df.loop('SELECT 1', 'SELECT false'), 'SELECT 2')": False, "df.if('SELECT {v}', 'a', 'b')": True,
        "df.loop('SELECT 1', 'SELECT {v}')": True, "df.http('http://x/{v}')": True, "df.sleep(3)": False, "df.wait_for_signal('x{v}')": True}
    for fut, wanted in futures.items():
        text = fut if fut.startswith("df.") else sql.Literal(fut).as_string(df)
        for start in (f"df.start({text})", f"df.start(df.as({text}, 'x' || n))"):  # with a plan's graph, and without
            instance = value(df, f"SELECT {start} FROM generate_series(1, 1) n")
            found = value(df, "SELECT vars FROM duroxide.instances WHERE id = %s", instance)
            assert found == ({"v": "one"} if wanted else {}), start


@FEW
@given(futures=st.lists(VALID, min_size=20, max_size=30))
def test_a_text_with_a_brace_is_never_taken_for_plain(df: Connection, futures: list[str]) -> None:
    with df.transaction(force_rollback=True):
        prepared = df.execute("SELECT (duroxide.prepare_start(f, 'caller'))[1], (duroxide.prepare_start(f, 'caller'))[3]"
                              "  FROM unnest(%s::text[]) f", (futures,)).fetchall()
    for template, third in prepared:
        nodes = json.loads(template.replace("\x01", ""))
        braces = any("{" in n.get("query", "") for n in nodes)
        assert (third == "plain") == (not braces and nodes[0]["type"] != "LOOP")


@pytest.mark.parametrize("fut", ["OK", '{"node_type":"THEN"}', '{"node_type":"SQL","query":"\\u0000"}', "{"])
def test_planning_raises_nothing(df: Connection, fut: str) -> None:
    """What is never executed is never refused."""
    query = sql.SQL("SELECT CASE WHEN n > 1 THEN df.start({}) END FROM generate_series(1, 1) n").format(fut)
    assert df.execute(query).fetchall() == [(None,)]


GRAPH = "df.seq(df.as('SELECT 1', 'a'), df.if('SELECT $a', df.sleep(1), df.loop('SELECT 2', 'SELECT false')))"


def plan(df: Connection, query: str) -> str:
    return "\n".join(r[0] for r in df.execute(f"EXPLAIN (VERBOSE, COSTS OFF) {query}"))


def test_a_plan_has_the_graph_of_constants(df: Connection) -> None:
    """As it is the planner that works it out, it does so once."""
    assert PLANNED.search(plan(df, f"SELECT df.start({GRAPH})"))
    assert PLANNED.search(plan(df, f"SELECT df.start({GRAPH}, 'label-' || n, $$db$$) FROM generate_series(1, 3) n"))
    df.execute(f"PREPARE start(text) AS SELECT df.start({GRAPH}, $1); SET LOCAL plan_cache_mode = force_generic_plan")
    assert PLANNED.search(plan(df, "EXECUTE start('x')"))
    ids = [value(df, "EXECUTE start('x')") for _ in range(3)]
    df.execute("DEALLOCATE start")
    rows = df.execute("SELECT graph, label FROM duroxide.instances WHERE id = ANY (%s)", (ids,)).fetchall()
    assert [r[1] for r in rows] == ["x"] * 3
    assert len({n["id"] for r in rows for n in r[0]}) == 3 * len(rows[0][0])
    assert "duroxide.prepare_start(" in plan(df, "SELECT df.start(df.sql('SELECT ' || n)) FROM generate_series(1, 3) n")


@pytest.mark.parametrize("steps", [8, 9, 128, 129, 2048, 2049, 4990])
def test_ids_of_graphs_of_any_size(df: Connection, steps: int) -> None:
    """8 hexadecimal digits, used once; other ones in the next workflow."""
    start = "SELECT df.start(df.seq(VARIADIC ARRAY(SELECT 'SELECT ' || i FROM generate_series(1, %s) i)))"
    first, second = (value(df, "SELECT graph FROM duroxide.instances WHERE id = %s", value(df, start, steps)) for _ in range(2))
    assert len(Graph.from_json(first).nodes) == 2 * steps - 1
    if steps < 1000:  # there are 4 random digits in the largest
        assert first[0]["id"] != second[0]["id"]


def test_an_argument_is_evaluated_once(df: Connection) -> None:
    df.execute("CREATE TEMPORARY SEQUENCE calls")
    for mode in ("", ", transaction_mode => CASE WHEN nextval('calls') > 0 THEN 'caller' END"):
        df.execute("SELECT setval('calls', 1, false)")
        instance = value(df, f"SELECT df.start('SELECT ' || nextval('calls'), 'label ' || nextval('calls'){mode})")
        assert value(df, "SELECT last_value FROM calls") == (3 if mode else 2)
        row = df.execute("SELECT graph->0->>'query', label FROM duroxide.instances WHERE id = %s", (instance,)).fetchone()
        assert row is not None
        assert len({row[0].removeprefix("SELECT "), row[1].removeprefix("label ")} & {"1", "2", "3"}) == 2


def test_who_may_not_call_start_may_not_in_a_plan_either(df: Connection) -> None:
    df.execute("CREATE ROLE surface_stranger; GRANT USAGE ON SCHEMA df, duroxide TO surface_stranger;"
               "GRANT surface_stranger TO CURRENT_USER")
    if df.info.server_version >= 160000:
        df.execute("GRANT surface_stranger TO CURRENT_USER WITH SET TRUE")
    df.execute("SET LOCAL ROLE surface_stranger")
    assert refused(df, f"SELECT df.start({GRAPH})").message == "permission denied for table instances"
    forged = "SELECT duroxide.start(ARRAY['[]', '7'], NULL, NULL)"
    assert refused(df, forged).message == "permission denied for table instances"
    df.execute("RESET ROLE; SELECT df.grant_usage('surface_stranger'); REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA df FROM PUBLIC;"
               "SET LOCAL ROLE surface_stranger")
    assert refused(df, "SELECT df.start('SELECT 1')").message == "permission denied for function start"


def test_who_calls_is_looked_at_wherever_it_may_matter(shared_surface: Database) -> None:
    """As somebody else than who has logged in: by SET ROLE, or in a function with its owner's rights."""
    with psycopg.connect(shared_surface.superuser_dsn) as c:
        c.execute("CREATE ROLE surface_guest LOGIN; CREATE ROLE surface_batch; CREATE SCHEMA surface_mine; GRANT USAGE ON SCHEMA surface_mine TO PUBLIC;"
                  "SELECT df.grant_usage('surface_guest'), df.grant_usage('surface_batch')")
        for role in ("postgres", "surface_batch", "surface_guest"):
            c.execute(sql.SQL("CREATE FUNCTION surface_mine.as_{}() RETURNS text LANGUAGE sql SECURITY DEFINER RETURN df.start('SELECT 1');"
                              "ALTER FUNCTION surface_mine.as_{} OWNER TO {}").format(*(sql.SQL(role),) * 3))
        c.execute("INSERT INTO duroxide.settings VALUES ('require_login', 'on')")
        c.execute("SET SESSION AUTHORIZATION surface_guest")
        for query in ("SELECT df.start('SELECT 1')", "SELECT surface_mine.as_surface_guest()"):
            assert value(c, "SELECT submitted_by::text FROM df.instances WHERE id = %s", value(c, query)) == "surface_guest"
        assert 'current_user "postgres" is a superuser' in refused(c, "SELECT surface_mine.as_postgres()").message
        assert refused(c, "SELECT surface_mine.as_surface_batch()").message == 'current_user "surface_batch" does not have LOGIN privilege.'
        c.execute("RESET SESSION AUTHORIZATION")
        assert 'current_user "postgres" is a superuser' in refused(c, "SELECT df.start('SELECT 1')").message
        c.execute("SET ROLE surface_guest")
        assert value(c, "SELECT df.start('SELECT 1')")
        c.execute("SET ROLE surface_batch")
        assert refused(c, "SELECT df.start('SELECT 1')").message == 'current_user "surface_batch" does not have LOGIN privilege.'
        c.rollback()


@pytest.mark.parametrize(("statement", "constraint"), [
    ("INSERT INTO duroxide.instances (id, graph) VALUES ('short', '[]')", "instances_id_format_chk"),
    ("INSERT INTO duroxide.instances (id, graph) VALUES ('0000000G', '[]')", "instances_id_format_chk"),
    ("INSERT INTO duroxide.instances (id, graph, status) VALUES ('0000000a', '[]', 'odd')", "instances_status_chk"),
    ("UPDATE duroxide.instances SET status = 'odd'", "instances_status_chk"),
    ("UPDATE duroxide.instances SET id = upper(id)", "instances_id_format_chk"),
])
def test_rows_that_are_no_instances_are_refused(df: Connection, statement: str, constraint: str) -> None:
    """Even the owner's; as a CHECK constraint would."""
    df.execute("INSERT INTO duroxide.instances (id, graph, status) VALUES ('abcdef00', '[]', 'failed')")
    error = refused(df, statement)
    assert (error.sqlstate, error.constraint) == ("23514", constraint)
    assert error.message == f'new row for relation "instances" violates check constraint "{constraint}"'


def test_a_graph_by_hand_is_worth_no_more_than_an_insert_by_hand(df: Connection) -> None:
    """It passes the same privileges and checks; the engine judges every graph that it loads (tests/dsl/test_graph.py)."""
    instance = value(df, "SELECT duroxide.start(ARRAY['[{\"id\":\"x\"}]', '7'], 'forged', NULL)")
    row = df.execute("SELECT graph, label, submitted_by::text, status FROM duroxide.instances WHERE id = %s", (instance,)).fetchone()
    assert row == ([{"id": "x"}], "forged", df.info.user, "pending")
    assert value(df, "SELECT count(*) FROM duroxide.queue WHERE instance_id = %s", instance) == 1
    for forged in ("NULL", "'{}'", "ARRAY[NULL, 'SELECT 1', 'other']", "ARRAY['x', '7']", "ARRAY['[]', 'x']", "ARRAY[NULL, 'OK', 'caller']"):
        assert (refused(df, f"SELECT duroxide.start({forged}, NULL, NULL)").sqlstate or "").startswith("22")


def test_what_was_prepared_before_an_upgrade_goes_on(database18: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = migrate.migrations()
    with monkeypatch.context() as first:
        first.setattr(migrate, "migrations", lambda: everything[:10])
        asyncio.run(migrate.migrate(database18.dsn()))
    with psycopg.connect(database18.dsn(), autocommit=True) as c:
        c.execute("CREATE FUNCTION public.mine() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN df.start('SELECT 1'); END $$;"
                  "CREATE FUNCTION public.mine2() RETURNS text LANGUAGE sql RETURN df.start('SELECT 1')")
        c.execute(f"PREPARE start AS SELECT df.start({GRAPH}), public.mine(), public.mine2()")
        before = c.execute("EXECUTE start").fetchone()
        asyncio.run(migrate.migrate(database18.dsn()))
        after = c.execute("EXECUTE start").fetchone()
        assert PLANNED.search(plan(c, "EXECUTE start"))
        graphs: dict[str, Any] = dict(c.execute("SELECT id, graph FROM duroxide.instances").fetchall())
    assert before is not None
    assert after is not None
    assert [bare(graphs[i]) for i in before] == [bare(graphs[i]) for i in after]


#: Functions whose strings are written with E where they hold a backslash.
CAREFUL = {"duroxide.graph_template(text)", "duroxide.prepare_start(text,text)", "duroxide.start(text[],text,text)", "duroxide.step(text)", 'df."as"(text,text)',
           "duroxide.explain(text,text,boolean)"}


def test_functions_read_their_own_strings_alike_in_every_session(surface: Database) -> None:
    """A session without standard_conforming_strings, new, so that no function is compiled yet; nothing warns."""
    with psycopg.connect(surface.dsn(), autocommit=True) as c:
        loose = c.execute("""
            SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
             WHERE p.pronamespace IN ('df'::regnamespace, 'duroxide'::regnamespace) AND l.lanname = 'plpgsql'
               AND strpos(p.prosrc, %s) > 0 AND NOT COALESCE(p.proconfig::text LIKE '%%standard_conforming_strings=on%%', false)""",
                          ("\\",)).fetchall()
        assert {r[0] for r in loose} <= CAREFUL
    queries = [
        "SELECT df.seq(df.as(df.as('SELECT 1', 'a'), 'b'), df.seq(' {}', '\t{', df.sql('x')), df.if('a', '{', df.sleep(1)))",
        "SELECT df.explain('df.seq(df.as(''a'', ''b''), df.loop(''c'', ''d'', true))')",
        "SELECT df.explain('{\"node_type\":\"SQL\",\"query\":\"x\"}'), df.explain('SELECT 1'), df.explain('nonsense')",
        "SELECT df.wait_for_schedule(' */5 0-3\t* jan mon-fri ')",
        "SELECT df.http('http://x', headers => '{\"A\": \"b\"}')",
        "SELECT df.diagram('df.seq(df.as(''a'', ''b''), ''c'')')",
        "SELECT count(*) FROM df.list_instances(NULL, 1, NULL, encode('v1|2020-01-01T00:00:00.000000+00:00|00000000', 'hex'))",
        "SELECT duroxide.flatten(duroxide.decode(' {\"node_type\":\"SQL\",\"query\":\"x\"}'), 1)",
    ]
    refusals = ["SELECT df.start(' OK ')", "SELECT df.start(df.seq('x', ' Instance a cancelled: no'))", "SELECT df.as('x', '1')"]
    found = []
    for setting in ("off", "on"):
        notices: list[str] = []
        with psycopg.connect(surface.dsn(), options=f"-c standard_conforming_strings={setting}", autocommit=True) as c:
            c.add_notice_handler(lambda n, notices=notices: notices.append(n.message_primary or ""))  # type: ignore[misc]
            results = [c.execute(query).fetchone() for query in queries]
            results += [(refused(c, query).message,) for query in refusals]
            instance = value(c, f"SELECT df.start({GRAPH})")
            results.append((bare(value(c, "SELECT graph FROM duroxide.instances WHERE id = %s", instance)),))
        assert notices == []
        found.append(results)
    assert found[0] == found[1]
