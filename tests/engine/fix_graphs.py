"""Graphs for tests: nested tuples are flattened to the JSON of docs/architecture.md; hypothesis draws random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from dsl.graph import Graph

Tree = dict[str, Any]


def sql(query: str, name: str | None = None) -> Tree:
    return {"type": "SQL", "query": query, "name": name}


def then(left: Tree, right: Tree, name: str | None = None) -> Tree:
    return {"type": "THEN", "left": left, "right": right, "name": name}


def seq(*steps: Tree) -> Tree:
    tree = steps[0]
    for step in steps[1:]:
        tree = then(tree, step)
    return tree


def if_(condition: Tree, yes: Tree, no: Tree, name: str | None = None) -> Tree:
    return {"type": "IF", "left": yes, "right": no, "condition": condition, "name": name}


def join(*branches: Tree, name: str | None = None) -> Tree:
    return {"type": "JOIN", "left": branches[0], "right": branches[1], "extras": list(branches[2:]), "name": name}


def race(left: Tree, right: Tree, name: str | None = None) -> Tree:
    return {"type": "RACE", "left": left, "right": right, "name": name}


def loop(body: Tree, condition: Tree | None = None, name: str | None = None, *, go_on: bool = False) -> Tree:
    return {"type": "LOOP", "left": body, "condition": condition, "name": name,
            "query": '{"continue_on_failure":true}' if go_on else None}


def sleep(seconds: int, name: str | None = None) -> Tree:
    return {"type": "SLEEP", "query": str(seconds), "name": name}


def signal(signal_name: str, timeout: int | None = None, name: str | None = None) -> Tree:
    limit = "null" if timeout is None else str(timeout)
    return {"type": "SIGNAL", "query": f'{{"signal_name":"{signal_name}","timeout_seconds":{limit}}}', "name": name}


def brk(value: str | None = None) -> Tree:
    return {"type": "BREAK", "query": '{"break_value":null}' if value is None else f'{{"break_value":"{value}"}}'}


def flatten(tree: Tree) -> list[dict[str, Any]]:
    """Pre-order, children in the order left, right, condition, extras."""
    nodes: list[dict[str, Any]] = []

    def add(t: Tree) -> int:
        index = len(nodes)
        node: dict[str, Any] = {"id": f"{index + 1:08x}", "type": t["type"]}
        nodes.append(node)
        for member in ("query", "name"):
            if t.get(member) is not None:
                node[member] = t[member]
        for member in ("left", "right", "condition"):
            if t.get(member) is not None:
                node[member] = add(t[member])
        if t.get("extras"):
            node["extras"] = [add(e) for e in t["extras"]]
        return index

    add(tree)
    return nodes


def graph(tree: Tree) -> Graph:
    return Graph.from_json(flatten(tree))


names = st.one_of(st.none(), st.sampled_from(["a", "b", "c"]))


def trees(*, in_loop: bool = False, depth: int = 4) -> st.SearchStrategy[Tree]:
    """Random workflows of every node kind that needs no HTTP; loops end (their condition holds in rounds 1 and 2)."""
    steps = st.builds(sql, st.sampled_from(["step", "fail", "step $a?", "step {v}"]), names)
    plain = [steps, steps, steps, st.builds(sleep, st.integers(0, 3), names), st.builds(signal, st.just("go"), st.just(2), names)]
    leaf = st.one_of(*plain, st.builds(brk, st.sampled_from([None, "x"]))) if in_loop else st.one_of(*plain)
    if depth == 0:
        return leaf
    sub = trees(in_loop=in_loop, depth=depth - 1)
    inside = trees(in_loop=True, depth=depth - 1)
    condition = st.builds(sql, st.just("again"))
    return st.one_of(
        leaf,
        st.builds(then, sub, sub, names),
        st.builds(then, sub, sub, names),
        st.builds(if_, sub, sub, sub, names),
        st.builds(lambda b, n: join(*b, name=n), st.lists(sub, min_size=2, max_size=4), names),
        st.builds(race, sub, sub, names),
        st.builds(lambda b, c, n, g: loop(b, c, n, go_on=g), inside, condition, names, st.booleans()),
    )
