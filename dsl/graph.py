"""The workflow graph: the flattened array in duroxide.instances.graph, decoded and validated.

The engine trusts nothing that it loads: a graph can be hand-made JSON (SURFACE 3, 4.2), so its structure is checked
here once, and the configurations of leaves when they are used (SURFACE 3.6: "All fail at run time").
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from enum import StrEnum
from typing import Any

from msgspec import Struct

#: SURFACE 3.3.
MAX_NODES = 10_000
MAX_DEPTH = 256
#: Longest wait in seconds (some 6,000 years): added to the present it must stay a datetime, which ends with year 9999.
MAX_WAIT = 200_000_000_000

_ID = re.compile(r"[0-9a-f]{8}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECONDS = re.compile(r"[0-9]+")


class GraphError(ValueError):
    """The graph, or the configuration of one of its nodes, is not valid. The text says which node and why."""


class NodeType(StrEnum):
    """The twelve node types (SURFACE 3.2)."""

    SQL = "SQL"
    THEN = "THEN"
    IF = "IF"
    JOIN = "JOIN"
    LOOP = "LOOP"
    BREAK = "BREAK"
    RACE = "RACE"
    SLEEP = "SLEEP"
    WAIT_SCHEDULE = "WAIT_SCHEDULE"
    HTTP = "HTTP"
    HTTP_MULTIPART = "HTTP_MULTIPART"
    SIGNAL = "SIGNAL"


LEAVES = frozenset({NodeType.SQL, NodeType.SLEEP, NodeType.WAIT_SCHEDULE, NodeType.BREAK, NodeType.HTTP,
                    NodeType.HTTP_MULTIPART, NodeType.SIGNAL})


class Node(Struct, frozen=True):
    """One node. Children are places in Graph.nodes; `query` is the template, before substitution."""

    index: int
    id: str
    type: NodeType
    query: str | None = None
    name: str | None = None
    left: int | None = None
    right: int | None = None
    condition: int | None = None
    extras: tuple[int, ...] = ()

    @property
    def children(self) -> tuple[int, ...]:
        """Places of the children in pre-order: left, right, condition, extras (SURFACE 3.6)."""
        fixed = (self.left, self.right, self.condition)
        return (*(c for c in fixed if c is not None), *self.extras)

    @property
    def sleep_seconds(self) -> int:
        """SLEEP: how long, in seconds. Raises GraphError."""
        text = (self.query or "").strip()
        if not _SECONDS.fullmatch(text):
            raise self.error(f"not a number of seconds: {_excerpt(text)}")
        return self._wait(int(text) if len(text) < 20 else MAX_WAIT + 1)

    @property
    def cron(self) -> tuple[str, str | None]:
        """WAIT_SCHEDULE: cron expression, time zone (None: UTC). dsl.cron checks both. Raises GraphError."""
        config = self._config()
        expression = config.get("cron_expr")
        zone = config.get("timezone")
        if not isinstance(expression, str):
            raise self.error("config has no cron_expr text")
        if zone is not None and not isinstance(zone, str):
            raise self.error("timezone must be text")
        return expression, zone

    @property
    def signal(self) -> tuple[str, int | None]:
        """SIGNAL: name, timeout in seconds (None: for ever). Raises GraphError."""
        config = self._config()
        name, timeout = config.get("signal_name"), config.get("timeout_seconds")
        if not isinstance(name, str) or not name:
            raise self.error("config has no signal_name text")
        if timeout is None:
            return name, None
        if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout <= 0:
            raise self.error("timeout_seconds must be a positive integer")
        return name, self._wait(timeout)

    @property
    def break_value(self) -> str | None:
        """BREAK: the value's text, before substitution; None is JSON null. Raises GraphError."""
        value = self._config().get("break_value")
        if value is not None and not isinstance(value, str):
            raise self.error("break_value must be text or null")
        return value

    @property
    def if_rows_name(self) -> str | None:
        """IF made by df.if_rows: the result it looks at; None when a condition node decides. Raises GraphError."""
        if self.condition is not None:
            return None
        config = self._config()
        kind, name = config.get("condition_type"), config.get("result_name")
        if kind != "result_has_rows":
            raise self.error(f"unknown condition_type: {_excerpt(kind)}")
        if not isinstance(name, str):
            raise self.error("config has no result_name text")
        return name

    @property
    def continue_on_failure(self) -> bool:
        """LOOP: whether a failed round is followed by the next one. Raises GraphError."""
        if self.query is None:
            return False
        value = self._config().get("continue_on_failure")
        if value is not None and not isinstance(value, bool):
            raise self.error("continue_on_failure must be true or false")
        return bool(value)

    @property
    def http(self) -> dict[str, Any]:
        """HTTP, HTTP_MULTIPART: the config of SURFACE 3.2, before substitution. Raises GraphError.

        Guaranteed: `url` and `method` are text; `body` is text or None; `headers` an object or None; `timeout_seconds`
        a positive number or None; for HTTP_MULTIPART `parts` a non-empty list of objects whose `name` and `data_b64`
        are text and whose `filename` and `content_type` are text or None. Numbers keep their digits.
        """
        config = self._config(exact=True)
        for key in ("url", "method"):
            if not isinstance(config.get(key), str):
                raise self.error(f"{key} must be text")
        if not isinstance(config.get("body"), str | None):
            raise self.error("body must be text or null")
        if not isinstance(config.get("headers"), dict | None):
            raise self.error("headers must be an object or null")
        timeout = config.get("timeout_seconds")
        if timeout is not None and not (type(timeout) in (int, Decimal) and timeout > 0):
            raise self.error("timeout_seconds must be a positive number")
        if self.type is NodeType.HTTP_MULTIPART:
            self._check_parts(config.get("parts"))
        return config

    def _check_parts(self, parts: Any) -> None:
        if not isinstance(parts, list) or not parts:
            raise self.error("parts must be a non-empty array")
        for number, part in enumerate(parts, 1):
            if not isinstance(part, dict):
                raise self.error(f"part {number} is not an object")
            for key in ("name", "data_b64"):
                if not isinstance(part.get(key), str):
                    raise self.error(f"part {number}: {key} must be text")
            for key in ("filename", "content_type"):
                if not isinstance(part.get(key), str | None):
                    raise self.error(f"part {number}: {key} must be text or null")

    def error(self, reason: str) -> GraphError:
        """A GraphError that names this node. HTTP_MULTIPART has the wording of SURFACE 5.12."""
        kind = "multipart HTTP" if self.type is NodeType.HTTP_MULTIPART else self.type
        return GraphError(f"Invalid {kind} config: {reason} (node {self.id})")

    def _wait(self, seconds: int) -> int:
        if seconds > MAX_WAIT:
            raise self.error(f"a wait may last at most {MAX_WAIT} seconds")
        return seconds

    def _config(self, *, exact: bool = False) -> dict[str, Any]:
        """`exact`: numbers with a point or an exponent as Decimal, so that none of their digits is lost."""
        try:
            value = json.loads(self.query or "", parse_float=Decimal if exact else None, parse_constant=_no_json)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise self.error(f"query is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise self.error("query is not a JSON object")
        return value


class Graph(Struct, frozen=True):
    """A whole workflow: its nodes, parents before children, the root first."""

    nodes: tuple[Node, ...]

    @property
    def root(self) -> Node:
        """Where execution begins."""
        return self.nodes[0]

    @classmethod
    def from_json(cls, value: str | list[Any]) -> Graph:
        """Decodes and validates the array of docs/architecture.md, "The graph in the database".

        What holds for every Graph: one tree (each node but the root has exactly one parent, at a smaller place), at
        most 10,000 nodes and 256 levels below the root, the structure per type of SURFACE 4.2 (nodes_structure_chk),
        names that are identifiers, ids of 8 hex digits used once. Raises GraphError.
        """
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise GraphError(f"Invalid graph: not valid JSON: {error}") from None
        if not isinstance(value, list) or not value:
            raise GraphError("Invalid graph: not a non-empty JSON array")
        if len(value) > MAX_NODES:
            raise GraphError(f"Workflow exceeds maximum node count of {MAX_NODES}. "
                             "Simplify the workflow or break it into multiple instances.")
        nodes = tuple(_node(index, item, len(value)) for index, item in enumerate(value))
        _check_tree(nodes)
        return cls(nodes)


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_TYPES = dict(NodeType.__members__)


def _node(index: int, item: Any, count: int) -> Node:
    if not isinstance(item, dict):
        raise GraphError(f"Invalid graph: node at place {index} is not an object")

    def fault(reason: str) -> GraphError:
        return GraphError(f"Invalid graph: node at place {index}: {reason}")

    identity, kind = item.get("id"), item.get("type")
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        raise fault(f"id is not 8 hex digits: {_excerpt(identity)}")
    type_ = _TYPES.get(kind) if isinstance(kind, str) else None
    if type_ is None:
        raise fault(f"Unknown node_type '{_excerpt(kind)}'. Valid types: {', '.join(NodeType)}")
    query, name = item.get("query"), item.get("name")
    if query is not None and not isinstance(query, str):
        raise fault("query is not text")
    if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
        raise fault(f"result name is not a valid identifier: {_excerpt(name)}")
    extras = item.get("extras")
    if extras is not None and not isinstance(extras, list):
        raise fault("extras is not an array")
    left, right, condition = item.get("left"), item.get("right"), item.get("condition")
    if left is not None or right is not None or condition is not None or extras:
        for role, child in (("left", left), ("right", right), ("condition", condition)):
            if child is not None and not _is_place(child, index, count):
                raise fault(f"{role} is not the place of a later node: {_excerpt(child)}")
        for child in extras or ():
            if not _is_place(child, index, count):
                raise fault(f"extras is not the place of a later node: {_excerpt(child)}")
    elif query is not None and type_ in LEAVES:  # most are
        return Node(index, identity, type_, query, name)
    node = Node(index, identity, type_, query, name, left, right, condition, tuple(extras or ()))
    wrong = _structure_fault(node)
    if wrong:
        raise fault(f"{node.type} {wrong}")
    return node


def _is_place(child: Any, index: int, count: int) -> bool:
    return type(child) is int and index < child < count  # a boolean is none


def _structure_fault(node: Node) -> str | None:
    """What breaks nodes_structure_chk (SURFACE 4.2) or the rules of 3.6, or None."""
    kind = node.type
    if node.extras and kind is not NodeType.JOIN:
        return "has extras, which only a JOIN may have"
    if node.condition is not None and kind not in (NodeType.IF, NodeType.LOOP):
        return "has a condition, which only an IF or a LOOP may have"
    if kind in LEAVES:
        if node.children:
            return "is a leaf but has children"
        return None if node.query is not None else "has no query"
    if node.left is None:
        return "has no left child"
    if kind is NodeType.LOOP:
        return None if node.right is None else "has a right child"
    if node.right is None:
        return "has no right child"
    if kind in (NodeType.THEN, NodeType.RACE) and node.query is not None:
        return "has a query"
    if kind is NodeType.IF and node.condition is None and node.query is None:
        return "has neither a condition nor a df.if_rows test"
    return None


def _check_tree(nodes: tuple[Node, ...]) -> None:
    """One tree, ids used once, not too deep. Children come after parents, so one pass in order sees parents first."""
    depth = [-1] * len(nodes)
    depth[0] = 0
    for node in nodes:
        if node.type in LEAVES:
            continue
        below = depth[node.index] + 1
        for child in node.children:
            if depth[child] >= 0:
                raise GraphError(f"Invalid graph: node at place {child} has more than one parent")
            if below == 0:
                raise GraphError(f"Invalid graph: node at place {node.index} has no parent")
            if below > MAX_DEPTH:
                raise GraphError(f"Graph exceeds maximum nesting depth of {MAX_DEPTH}. "
                                 "Simplify the workflow or break it into multiple instances.")
            depth[child] = below
    if -1 in depth:
        raise GraphError(f"Invalid graph: node at place {depth.index(-1)} has no parent")
    if len({node.id for node in nodes}) != len(nodes):
        raise GraphError("Invalid graph: a node id is used twice")


def _excerpt(value: Any) -> str:
    """A hostile value's text, short enough for an error message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
