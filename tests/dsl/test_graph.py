"""dsl.graph: what is decoded, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl.graph import MAX_DEPTH, MAX_NODES, MAX_WAIT, Graph, GraphError, Node, NodeType


def item(number: int, kind: str, **members: Any) -> dict[str, Any]:
    return {"id": f"{number:08x}", "type": kind, **members}


def sql(number: int, **members: Any) -> dict[str, Any]:
    return item(number, "SQL", query="SELECT 1", **members)


def leaf(kind: NodeType, query: Any) -> Node:
    text = query if isinstance(query, str) else json.dumps(query)
    return Graph.from_json([item(1, kind, query=text)]).root


def test_the_example_of_the_architecture() -> None:
    graph = Graph.from_json(json.dumps([
        item(1, "THEN", left=1, right=2), sql(2, name="a"), item(3, "LOOP", left=3, condition=8),
        item(4, "JOIN", left=4, right=5, extras=[6, 7]), sql(5), sql(6), sql(7), sql(8), sql(9)]))
    assert len(graph.nodes) == 9
    assert graph.root.type is NodeType.THEN
    assert graph.root.children == (1, 2)
    assert graph.nodes[1] == Node(1, "00000002", NodeType.SQL, "SELECT 1", "a")
    assert graph.nodes[2].children == (3, 8)
    assert graph.nodes[3].children == (4, 5, 6, 7)
    assert graph.nodes[3].extras == (6, 7)


def test_null_members_are_absent() -> None:
    graph = Graph.from_json([item(1, "SQL", query="SELECT 1", name=None, left=None, right=None, condition=None,
                                  extras=None, surplus=1)])
    assert graph.root == Node(0, "00000001", NodeType.SQL, "SELECT 1")


FAULTS: list[tuple[str, Any, str]] = [
    ("not JSON", "[", "not valid JSON"),
    ("deep JSON", "[" * 100_000, "not valid JSON"),
    ("not an array", "{}", "not a non-empty JSON array"),
    ("empty", "[]", "not a non-empty JSON array"),
    ("not an object", [1], "is not an object"),
    ("no id", [{"type": "SQL", "query": ""}], "id is not 8 hex digits"),
    ("long id", [item(1, "SQL", query="") | {"id": "000000001"}], "id is not 8 hex digits"),
    ("upper-case id", [item(1, "SQL", query="") | {"id": "ABCDEF01"}], "id is not 8 hex digits"),
    ("unknown type", [item(1, "FORK", query="")], "Unknown node_type 'FORK'. Valid types: SQL, THEN, IF"),
    ("lower-case type", [item(1, "sql", query="")], "Unknown node_type 'sql'"),
    ("type no text", [item(1, "x") | {"type": ["SQL"]}], "Unknown node_type"),
    ("query no text", [item(1, "SQL", query=1)], "query is not text"),
    ("bad name", [sql(1, name="a b")], "result name is not a valid identifier: a b"),
    ("empty name", [sql(1, name="")], "result name is not a valid identifier"),
    ("name with line end", [sql(1, name="a\n")], "result name is not a valid identifier"),
    ("non-ASCII name", [sql(1, name="ä")], "result name is not a valid identifier"),
    ("extras no array", [item(1, "JOIN", left=1, right=2, extras=3), sql(2), sql(3)], "extras is not an array"),
    ("leaf without query", [item(1, "SQL")], "SQL has no query"),
    ("leaf with child", [sql(1, left=1), sql(2)], "SQL is a leaf but has children"),
    ("THEN without right", [item(1, "THEN", left=1), sql(2)], "THEN has no right child"),
    ("THEN without left", [item(1, "THEN", right=1), sql(2)], "THEN has no left child"),
    ("THEN with query", [item(1, "THEN", left=1, right=2, query=""), sql(2), sql(3)], "THEN has a query"),
    ("THEN with condition", [item(1, "THEN", left=1, right=2, condition=3), sql(2), sql(3), sql(4)],
     "has a condition, which only an IF or a LOOP may have"),
    ("RACE with extras", [item(1, "RACE", left=1, right=2, extras=[3]), sql(2), sql(3), sql(4)],
     "has extras, which only a JOIN may have"),
    ("IF that tests nothing", [item(1, "IF", left=1, right=2), sql(2), sql(3)],
     "has neither a condition nor a df.if_rows test"),
    ("LOOP with right", [item(1, "LOOP", left=1, right=2), sql(2), sql(3)], "LOOP has a right child"),
    ("LOOP without body", [item(1, "LOOP")], "LOOP has no left child"),
    ("child is itself", [item(1, "LOOP", left=0)], "left is not the place of a later node: 0"),
    ("child before", [item(1, "LOOP", left=1), item(2, "LOOP", left=0)], "left is not the place of a later node: 0"),
    ("child outside", [item(1, "LOOP", left=1)], "left is not the place of a later node: 1"),
    ("child negative", [item(1, "LOOP", left=-1)], "left is not the place of a later node: -1"),
    ("child no integer", [item(1, "LOOP", left=True), sql(2)], "left is not the place of a later node: True"),
    ("shared child", [item(1, "THEN", left=1, right=1), sql(2)], "place 1 has more than one parent"),
    ("orphan", [item(1, "LOOP", left=1), sql(2), sql(3)], "place 2 has no parent"),
    ("island", [sql(1), item(2, "LOOP", left=2), sql(3)], "place 1 has no parent"),
    ("id twice", [item(1, "LOOP", left=1), sql(1)], "a node id is used twice"),
    ("too many", [sql(n) for n in range(MAX_NODES + 1)], "Workflow exceeds maximum node count of 10000. Simplify"),
]


@pytest.mark.parametrize(("value", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_refused(value: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        Graph.from_json(value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def chain(levels: int) -> list[dict[str, Any]]:
    return [*(item(n, "LOOP", left=n + 1) for n in range(levels)), sql(levels)]


def test_depth_limit() -> None:
    assert len(Graph.from_json(chain(MAX_DEPTH)).nodes) == MAX_DEPTH + 1
    with pytest.raises(GraphError, match=r"Graph exceeds maximum nesting depth of 256\. Simplify"):
        Graph.from_json(chain(MAX_DEPTH + 1))


def test_a_join_may_be_as_wide_as_the_graph_is_large() -> None:
    places = list(range(1, MAX_NODES))
    graph = Graph.from_json([item(0, "JOIN", left=1, right=2, extras=places[2:]), *(sql(n) for n in places)])
    assert graph.root.children == tuple(places)


def test_configurations() -> None:
    assert leaf(NodeType.SLEEP, "60").sleep_seconds == 60
    assert leaf(NodeType.WAIT_SCHEDULE, {"cron_expr": "* * * * *"}).cron == ("* * * * *", None)
    assert leaf(NodeType.WAIT_SCHEDULE, {"cron_expr": "@daily", "timezone": "Europe/Berlin"}).cron \
        == ("@daily", "Europe/Berlin")
    assert leaf(NodeType.SIGNAL, {"signal_name": "go", "timeout_seconds": None}).signal == ("go", None)
    assert leaf(NodeType.SIGNAL, {"signal_name": "go", "timeout_seconds": 5}).signal == ("go", 5)
    assert leaf(NodeType.BREAK, {"break_value": None}).break_value is None
    assert leaf(NodeType.BREAK, {"break_value": "$x"}).break_value == "$x"
    http = {"url": "u", "method": "GET", "body": None, "headers": None, "timeout_seconds": 30}
    assert leaf(NodeType.HTTP, http).http == http
    multipart = {"url": "u", "method": "POST", "parts": [{"name": "a", "data_b64": ""}]}
    assert leaf(NodeType.HTTP_MULTIPART, multipart).http == multipart
    rows = Graph.from_json([item(1, "IF", left=1, right=2, query='{"condition_type":"result_has_rows",'
                                                                 '"result_name":"x"}'), sql(2), sql(3)]).root
    assert rows.if_rows_name == "x"
    decided = Graph.from_json([item(1, "IF", left=1, right=2, condition=3), sql(2), sql(3), sql(4)]).root
    assert decided.if_rows_name is None
    loop = Graph.from_json([item(1, "LOOP", left=1, query='{"continue_on_failure":true}'), sql(2)]).root
    assert loop.continue_on_failure
    assert not Graph.from_json([item(1, "LOOP", left=1), sql(2)]).root.continue_on_failure


@pytest.mark.parametrize(("kind", "member", "query", "message"), [
    (NodeType.SLEEP, "sleep_seconds", "-1", "Invalid SLEEP config: not a number of seconds: -1"),
    (NodeType.SLEEP, "sleep_seconds", "soon", "not a number of seconds: soon"),
    (NodeType.SLEEP, "sleep_seconds", "", "not a number of seconds"),
    (NodeType.SLEEP, "sleep_seconds", "٣", "not a number of seconds"),
    (NodeType.SLEEP, "sleep_seconds", "9" * 10_000, f"a wait may last at most {MAX_WAIT} seconds"),
    (NodeType.WAIT_SCHEDULE, "cron", "{", "query is not valid JSON"),
    (NodeType.WAIT_SCHEDULE, "cron", "[" * 100_000, "query is not valid JSON"),
    (NodeType.WAIT_SCHEDULE, "cron", [], "query is not a JSON object"),
    (NodeType.WAIT_SCHEDULE, "cron", {}, "config has no cron_expr text"),
    (NodeType.WAIT_SCHEDULE, "cron", {"cron_expr": "x", "timezone": 1}, "timezone must be text"),
    (NodeType.SIGNAL, "signal", {"signal_name": ""}, "config has no signal_name text"),
    (NodeType.SIGNAL, "signal", {"signal_name": "a", "timeout_seconds": 0}, "must be a positive integer"),
    (NodeType.SIGNAL, "signal", {"signal_name": "a", "timeout_seconds": True}, "must be a positive integer"),
    (NodeType.SIGNAL, "signal", {"signal_name": "a", "timeout_seconds": 10**18}, "a wait may last at most"),
    (NodeType.BREAK, "break_value", {"break_value": 1}, "break_value must be text or null"),
    (NodeType.HTTP, "http", {"method": "GET"}, "Invalid HTTP config: url must be text"),
    (NodeType.HTTP, "http", {"url": "u"}, "method must be text"),
    (NodeType.HTTP, "http", {"url": "u", "method": "GET", "body": {}}, "body must be text or null"),
    (NodeType.HTTP, "http", {"url": "u", "method": "GET", "headers": []}, "headers must be an object or null"),
    (NodeType.HTTP, "http", {"url": "u", "method": "GET", "timeout_seconds": -1}, "must be a positive number"),
    (NodeType.HTTP_MULTIPART, "http", {"url": "u", "method": "PUT"}, "Invalid multipart HTTP config: parts must be"),
    (NodeType.HTTP_MULTIPART, "http", {"url": "u", "method": "PUT", "parts": [1]}, "part 1 is not an object"),
    (NodeType.HTTP_MULTIPART, "http", {"url": "u", "method": "PUT", "parts": [{"name": "a"}]},
     "part 1: data_b64 must be text"),
    (NodeType.HTTP_MULTIPART, "http",
     {"url": "u", "method": "PUT", "parts": [{"name": "a", "data_b64": "", "filename": 1}]},
     "part 1: filename must be text or null"),
])
def test_refused_configurations(kind: NodeType, member: str, query: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        getattr(leaf(kind, query), member)
    assert message in str(caught.value)
    assert "(node 00000001)" in str(caught.value)


@pytest.mark.parametrize(("query", "message"), [
    ('{"condition_type":"dice"}', "unknown condition_type: dice"),
    ('{"condition_type":"result_has_rows"}', "config has no result_name text"),
])
def test_refused_if_rows(query: str, message: str) -> None:
    node = Graph.from_json([item(1, "IF", left=1, right=2, query=query), sql(2), sql(3)]).root
    with pytest.raises(GraphError, match=message):
        _ = node.if_rows_name


def test_refused_continue_on_failure() -> None:
    node = Graph.from_json([item(1, "LOOP", left=1, query='{"continue_on_failure":1}'), sql(2)]).root
    with pytest.raises(GraphError, match="continue_on_failure must be true or false"):
        _ = node.continue_on_failure


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2, 12) | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                               ["id", "type", "query", "name", "left", "right", "condition", "extras"]), inner),
                           max_leaves=20)


@given(st.lists(json_values, max_size=8))
def test_anything_is_a_graph_or_a_graph_error(value: list[Any]) -> None:
    try:
        graph = Graph.from_json(json.dumps(value))
    except GraphError:
        return
    assert len(graph.nodes) == len(value)


@given(st.lists(st.tuples(st.sampled_from(list(NodeType)), st.lists(st.integers(0, 9), max_size=4)),
                min_size=1, max_size=10))
def test_what_is_accepted_is_a_tree(shape: list[tuple[NodeType, list[int]]]) -> None:
    value = []
    for number, (kind, children) in enumerate(shape):
        roles = dict(zip(("left", "right", "condition"), children, strict=False))
        value.append(item(number, kind, query="{}" if kind not in ("THEN", "RACE") else None, **roles))
    try:
        graph = Graph.from_json(value)
    except GraphError:
        return
    children = [child for node in graph.nodes for child in node.children]
    assert sorted(children) == list(range(1, len(graph.nodes)))
    assert all(child > node.index for node in graph.nodes for child in node.children)
