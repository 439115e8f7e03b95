"""df.diagram, df.delete_instance and df.prune."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.engine.fix_surface import Connection, Player, completed, decided, done, refused, value

Begin = Callable[[str], str]


def boxes(diagram: str) -> dict[str, str]:
    """Box -> its label."""
    return dict(re.findall(r'^    ([nm]\d+)[\[({/\\]+"?(.*?)"?[\])}/\\]+$', diagram, re.MULTILINE))


def edges(diagram: str) -> set[tuple[str, str, str]]:
    """(from, to, label)."""
    return {(a, b, label) for a, label, b in re.findall(r"^    (\w+) -(?:-|\.-)>(?:\|(\w+)\|)? (\w+)$", diagram, re.MULTILINE)}


@pytest.mark.parametrize(("expression", "expected"), [
    ("df.seq('a', 'b', 'c')", {("n2", "n3", ""), ("n3", "n4", "")}),
    ("df.if('c', 't', 'e')", {("n3", "n0", ""), ("n0", "n1", "then"), ("n0", "n2", "else"), ("n1", "m0", ""), ("n2", "m0", "")}),
    ("df.if_rows('x', 't', 'e')", {("n0", "n1", "then"), ("n0", "n2", "else"), ("n1", "m0", ""), ("n2", "m0", "")}),
    ("df.join3('a', 'b', 'c')", {("n0", f"n{i}", "") for i in (1, 2, 3)} | {(f"n{i}", "m0", "") for i in (1, 2, 3)}),
    ("df.race('a', 'b')", {("n0", "n1", ""), ("n0", "n2", ""), ("n1", "m0", ""), ("n2", "m0", "")}),
    ("df.loop('a')", {("n0", "n1", ""), ("n1", "n0", "again")}),
    ("df.loop('a', 'c')", {("n0", "n1", ""), ("n1", "n2", ""), ("n2", "n0", "again"), ("n2", "m0", "done")}),
    ("df.loop(df.seq('a', df.break('x')))", {("n0", "n2", ""), ("n2", "n3", ""), ("n3", "m0", "break")}),
], ids=lambda p: p if isinstance(p, str) else "")
def test_edges(df: Connection, expression: str, expected: set[tuple[str, str, str]]) -> None:
    diagram = value(df, f"SELECT df.diagram({expression})")
    assert diagram.startswith("flowchart TD\n")
    assert edges(diagram) == expected
    ends = {end for edge in expected for end in edge[:2]}
    assert ends <= set(boxes(diagram))


def test_labels_cannot_break_out(df: Connection) -> None:
    diagram = value(df, "SELECT df.diagram(df.sql(%s))", 'SELECT "a" # <b>`&;\nFROM t')
    assert boxes(diagram) == {"n0": "SQL: SELECT #quot;a#quot; #35; #lt;b#gt;#96;#amp;; FROM t"}


def test_what_explain_refuses_diagram_refuses_in_the_same_words(df: Connection) -> None:
    for given in ("hello", "00000000", '{"node_type":"THEN"}'):
        assert value(df, "SELECT df.diagram(%s) = df.explain(%s)", given, given) is True
    assert value(df, "SELECT df.diagram(NULL) IS NULL") is True
    assert boxes(value(df, "SELECT df.diagram('df.seq(''a'', ''b'')')")) == {"n1": "SQL: a", "n2": "SQL: b"}


def test_the_live_view_has_states_as_classes(df: Connection, player: Player, begin: Begin) -> None:
    instance = begin("df.seq('a', df.if('c', 't', 'e')), 'my \"label\"'")
    player.checkpoint(instance, done(1))
    diagram = value(df, "SELECT df.diagram(%s)", instance)
    assert diagram.splitlines()[:3] == ["---", f'title: "Instance {instance} (my \\"label\\"): running"', "---"]
    assert dict(re.findall(r"^    class (\S+) (\w+)$", diagram, re.MULTILINE)) == {
        "n1": "completed", "n2,n5": "running", "n3,n4": "pending"}
    player.checkpoint(instance, done(5, '{"rows":[{"c":true}],"row_count":1}'), decided(2, "then"), done(3), finish=completed())
    classes = dict(re.findall(r"^    class (\S+) (\w+)$", value(df, "SELECT df.diagram(%s)", instance), re.MULTILINE))
    assert classes == {"n1,n2,n3,n5": "completed", "n4": "skipped"}
    assert set(re.findall(r"classDef (\w+) ", diagram)) == {"completed", "failed", "running", "pending", "skipped"}


def left(df: Connection, instance: str) -> int:
    return int(value(df, """
        SELECT (SELECT count(*) FROM duroxide.instances WHERE id = %(i)s) + (SELECT count(*) FROM duroxide.queue WHERE instance_id = %(i)s)
             + (SELECT count(*) FROM duroxide.history WHERE instance_id = %(i)s) + (SELECT count(*) FROM duroxide.signals WHERE instance_id = %(i)s)
        """.replace("%(i)s", "'" + instance + "'")))


def test_deleting(df: Connection, player: Player, begin: Begin) -> None:
    instance, other = begin("'a'"), begin("'b'")
    player.checkpoint(instance, done(0))
    df.execute("SELECT df.signal(%s, 'x')", (instance,))
    error = refused(df, "SELECT df.delete_instance(%s)", instance)
    assert (error.sqlstate, error.message) == ("55000", f"instance {instance} has not ended")
    assert value(df, "SELECT df.delete_instance(%s, force => true)", instance) == f"Instance {instance} deleted"
    assert left(df, instance) == 0
    assert left(df, other) == 2
    assert refused(df, "SELECT df.delete_instance(%s)", instance).sqlstate == "02000"
    assert refused(df, "SELECT duroxide.checkpoint(%s, %s, '[]')", instance, player.tokens[instance]).sqlstate == "DF001"
    player.checkpoint(other, done(0), finish=completed())
    assert value(df, "SELECT df.delete_instance(%s)", other) == f"Instance {other} deleted"
    assert left(df, other) == 0


def test_pruning(df: Connection, player: Player, begin: Begin) -> None:
    old, new, running = begin("'a'"), begin("'b'"), begin("'c'")
    for instance in (old, new):
        player.checkpoint(instance, done(0), finish=completed())
    df.execute("UPDATE duroxide.instances SET ended_at = '2000-01-01' WHERE id = %s", (old,))
    assert value(df, "SELECT df.prune('1999-01-01')") == 0
    assert value(df, "SELECT df.prune('2001-01-01')") == 1
    assert (left(df, old), left(df, new)) == (0, 2)
    assert value(df, "SELECT df.prune('infinity')") == 1
    assert left(df, running) == 2
    assert value(df, "SELECT df.prune(NULL) IS NULL") is True
