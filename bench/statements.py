"""What statements cost in the proxy that it looks at: those that mention df but are not ours, and those it rewrites.

Every statement has a text of its own, so that no cache of compiled statements helps; beside it the same with a text
that repeats. Figures are CPU time of the proxy for one statement, less that of a plain statement in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.measure import interleaved, median
from bench.stage import Stage
from bench.table import Reach, Row

PLAIN = "\\set aid random(1, 1000000)\nSELECT :aid AS x, 'af.start' AS y;\n"
#: Mentions that are found in a literal, and in a comment, once the statement has been taken apart.
MENTION = "\\set aid random(1, 1000000)\nSELECT :aid AS x, 'df.start' AS y;\n"
MENTION_SAME = "SELECT 12345 AS x, 'df.start' AS y;\n"
#: A constant graph of operators, which becomes function calls.
REWRITTEN = "\\set aid random(1, 1000000)\nSELECT 'SELECT :aid' ~> 'SELECT 2' AS x;\n"
REWRITTEN_SAME = "SELECT 'SELECT 1' ~> 'SELECT 2' AS x;\n"
CLIENTS, TRANSACTIONS, REPEATS = 8, 1000, 3


def run(stage: Stage) -> Iterator[Row]:
    """Yields the rows."""
    scripts = {}
    for name, text in (("plain", PLAIN), ("mention", MENTION), ("mention, same text", MENTION_SAME),
                       ("rewritten", REWRITTEN), ("rewritten, same text", REWRITTEN_SAME)):
        path = stage.folder / f"{name.replace(' ', '-').replace(',', '')}.sql"
        path.write_text(text)
        scripts[name] = str(path)
    with stage.dfproxy() as ours:
        def one(script: str) -> float:
            return stage.pgbench(ours, "-f", script, clients=CLIENTS, transactions=TRANSACTIONS).microseconds

        stage.grant()
        taken = interleaved(REPEATS, [lambda s=s: one(s) for s in scripts.values()])  # type: ignore[misc]
    cost = {name: median(values) for name, values in zip(scripts, taken, strict=True)}
    plain = cost["plain"]
    note = f"a plain statement costs {plain:.0f} us of the proxy's CPU"
    for name, most, what in (("mention", 60, "mention df, not ours"), ("mention, same text", 60, "the same text again"),
                             ("rewritten", 400, "rewritten"), ("rewritten, same text", 400, "the same text again")):
        yield Row(what, "us CPU added", max(0.0, cost[name] - plain), "direct", None,
                  Reach(most, most=True, of="figure"),
                  note if name == "mention" else "", {"total": cost[name], "plain": plain})

