"""Random workflows of every kind of node, and what each must have done by its end.

An effect is a row in table `effects`: which instance, which place in the workflow, in which rounds of the loops around
it. The table has no constraint: a step that takes effect twice leaves two rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.engine.fix_graphs import Tree, brk, if_, join, loop, race, seq, signal, sleep, sql

#: (execution path, node index) -> 1-based number of the branch that won.
Winners = Mapping[tuple[str, int], int]


@dataclass
class Expected:
    """What a workflow's effects must be: each in `required` once; each in `optional` at most once; nothing else.

    `payloads`: what the effects of signals must hold. `failed`: how it ends unless it is cancelled.
    """

    required: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    payloads: dict[str, str] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)  #: HTTP calls that must have arrived, once or more
    failed: bool = False
    unknown_race: bool = False


class Workload:
    """Makes random workflows. `endpoint`: the URL of a server that counts calls; `schedules`: they may wait a minute."""

    def __init__(self, rng: random.Random, *, endpoint: str = "http://127.0.0.1:1", schedules: bool = False) -> None:
        self.rng = rng
        self.endpoint = endpoint
        self.schedules = schedules
        self.places = 0

    def workflow(self) -> Tree:
        """A workflow that ends by itself once `signals_of` it are sent."""
        self.places = 0
        return seq(self._effect([]), self._tree(3, []), self._effect([]))

    def _number(self) -> int:
        self.places += 1
        return self.places

    def _effect(self, loops: list[str]) -> Tree:
        place = f"p{self._number()}"
        pause = self.rng.choice([0, 0, 0, 0.01, 0.05, 0.3])
        rounds = "".join(f" || ':' || ${name}.n" for name in loops)
        query = f"INSERT INTO public.effects (instance, place) SELECT '{{sys_instance_id}}', '{place}'{rounds}"
        if pause:
            query += f" FROM (SELECT pg_catalog.pg_sleep({pause})) AS pause"
        return sql(query) | {"place": place, "loops": list(loops)}

    def _call(self, loops: list[str]) -> Tree:
        """A call that says in a header where in the workflow it belongs."""
        place = f"h{self._number()}"
        header = "{sys_instance_id} " + ":".join([place, *(f"${name}.n" for name in loops)])
        config = {"url": f"{self.endpoint}/latency", "method": "POST", "body": None, "headers": {"X-Place": header}, "timeout_seconds": 300}
        return {"type": "HTTP", "query": json.dumps(config), "place": place, "loops": list(loops)}

    def _tree(self, depth: int, loops: list[str], *, racing: bool = False) -> Tree:
        rng = self.rng
        kinds = ["effect", "effect", "sleep", "http"]
        if self.schedules and not loops and rng.random() < 0.3:
            kinds.append("schedule")
        if depth:
            kinds += ["then", "then", "if", "rows", "join", "race", "failing"]
        if depth and len(loops) < 2:
            kinds += ["loop", "break"]
        if not racing:
            kinds.append("signal")
        match rng.choice(kinds):
            case "effect":
                return self._effect(loops)
            case "sleep":
                return seq(sleep(rng.choice([0, 1]) if loops else rng.choice([0, 1, 1, 2])), self._effect(loops))
            case "http":
                return seq(self._call(loops), self._effect(loops))
            case "schedule":
                return seq({"type": "WAIT_SCHEDULE", "query": '{"cron_expr":"* * * * *"}'}, self._effect(loops))
            case "then":
                return seq(*[self._tree(depth - 1, loops, racing=racing) for _ in range(rng.randint(2, 3))])
            case "if":
                taken = rng.random() < 0.5
                test = sql(f"SELECT {str(taken).lower()} AS yes")
                return if_(test, self._tree(depth - 1, loops, racing=racing), self._effect(loops)) | {"taken": taken}
            case "rows":
                taken = rng.random() < 0.5
                name = f"r{self._number()}"
                test = {"type": "IF", "query": f'{{"condition_type":"result_has_rows","result_name":"{name}"}}',
                        "left": self._effect(loops), "right": self._tree(depth - 1, loops, racing=racing), "taken": taken}
                return seq(sql(f"SELECT 1 AS n WHERE {str(taken).lower()}", name), test)
            case "join":
                return join(*[self._tree(depth - 1, loops, racing=racing) for _ in range(rng.randint(2, 4))])
            case "race":
                left = self._tree(depth - 1, loops, racing=True)
                right = seq(sleep(rng.choice([0, 1])), self._effect(loops))
                if rng.random() < 0.3:
                    right = signal(f"never{self._number()}")
                return race(left, right) if rng.random() < 0.5 else race(right, left)
            case "loop":
                name, rounds = f"i{self._number()}", rng.randint(1, 2 if loops else 4)
                body = seq(sql(f"SELECT ${name}.n + 1 AS n", name), self._tree(depth - 1, [*loops, name], racing=racing))
                tree = loop(body, sql(f"SELECT ${name}.n < {rounds} AS more"), go_on=rng.random() < 0.3)
                return seq(sql("SELECT 0 AS n", name), tree | {"counter": name, "rounds": rounds})
            case "break":
                name, rounds = f"i{self._number()}", rng.randint(1, 2 if loops else 4)
                inner = if_(sql(f"SELECT ${name}.n > {rounds} AS over"), brk(),
                            self._tree(depth - 1, [*loops, name], racing=racing)) | {"breaks_after": rounds, "counter": name}
                tree = loop(seq(sql(f"SELECT ${name}.n + 1 AS n", name), inner))
                return seq(sql("SELECT 0 AS n", name), tree | {"counter": name, "rounds": rounds + 1})
            case "failing":
                return seq(self._effect(loops), sql("SELECT 1 / 0") | {"fails": True}, self._effect(loops))
            case _:
                place = f"s{self._number()}"
                rounds = "".join(f" || ':' || ${name}.n" for name in loops)
                take = sql(f"INSERT INTO public.effects (instance, place, payload) SELECT '{{sys_instance_id}}', "
                           f"'{place}'{rounds}, '${place}.data'")
                return seq(signal(place, name=place), take | {"place": place, "loops": list(loops), "signal": place})


def nodes(tree: Tree) -> Iterator[Tree]:
    """The tree's nodes in the order of the flattened graph."""
    yield tree
    for member in ("left", "right", "condition"):
        if tree.get(member) is not None:
            yield from nodes(tree[member])
    for extra in tree.get("extras") or ():
        yield from nodes(extra)


def signals_of(tree: Tree) -> dict[str, list[str]]:
    """What must be sent so that the workflow can end: name -> payloads in order."""
    found: dict[str, list[str]] = {}

    def count(node: Tree, times: int) -> None:
        if node["type"] == "SIGNAL" and node.get("name"):
            found[node["name"]] = [str(n) for n in range(1, times + 1)]
        for member in ("left", "right", "condition"):
            if node.get(member) is not None:
                count(node[member], times * node.get("rounds", 1))
        for extra in node.get("extras") or ():
            count(extra, times)

    count(tree, 1)
    return found


def expected(tree: Tree, winners: Winners) -> Expected:
    """What the workflow must have done, given who won its races. Walks the tree as SURFACE 5 says."""
    index = {id(node): n for n, node in enumerate(nodes(tree))}
    found = Expected()
    taken: dict[str, int] = {}

    def walk(node: Tree, execution: str, rounds: dict[str, int], *, sure: bool) -> str:
        """`done`, `failed` or `broke`; effects go into `found`."""
        match node["type"]:
            case "SQL":
                if node.get("fails"):
                    return "failed"
                if "place" in node:
                    key = ":".join([node["place"], *(str(rounds[name]) for name in node["loops"])])
                    (found.required if sure else found.optional).add(key)
                    if "signal" in node:
                        taken[node["signal"]] = taken.get(node["signal"], 0) + 1
                        found.payloads[key] = str(taken[node["signal"]])
                return "done"
            case "HTTP":
                if sure:
                    found.calls.add(":".join([node["place"], *(str(rounds[name]) for name in node["loops"])]))
                return "done"
            case "THEN":
                outcome = walk(node["left"], execution, rounds, sure=sure)
                return outcome if outcome != "done" else walk(node["right"], execution, rounds, sure=sure)
            case "IF":
                yes = rounds[node["counter"]] > node["breaks_after"] if "breaks_after" in node else node["taken"]
                return walk(node["left"] if yes else node["right"], execution, rounds, sure=sure)
            case "JOIN":
                outcomes = [walk(branch, execution, rounds, sure=sure)
                            for branch in (node["left"], node["right"], *node["extras"])]
                return next((o for o in outcomes if o != "done"), "done")
            case "RACE":
                winner = winners.get((execution, index[id(node)]))
                if winner is None and sure:
                    found.unknown_race = True
                outcomes = [walk(branch, execution, rounds, sure=sure and winner == n)
                            for n, branch in enumerate((node["left"], node["right"]), 1)]
                return outcomes[(winner or 1) - 1]
            case "LOOP":
                for n in range(1, node["rounds"] + 1):
                    inside = f"{execution}/{index[id(node)]}:{n}"
                    outcome = walk(node["left"], inside, rounds | {node["counter"]: n}, sure=sure)
                    if outcome == "broke":
                        return "done"
                    if outcome == "failed" and not node.get("query"):
                        return "failed"
                return "done"
            case "BREAK":
                return "broke"
            case _:
                return "done"

    found.failed = walk(tree, "", {}, sure=True) == "failed"
    found.optional -= found.required
    return found


def describe(tree: Tree) -> dict[str, Any]:
    """How many nodes of each type, for the report."""
    kinds: dict[str, int] = {}
    for node in nodes(tree):
        kinds[node["type"]] = kinds.get(node["type"], 0) + 1
    return kinds
