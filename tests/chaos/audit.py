"""Compares what the database holds after a storm with what the workflows must have done, step by step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import psycopg

from tests.chaos.workload import expected
from tests.engine.fix_graphs import Tree


@dataclass
class Findings:
    """Counts. Everything below `effects` must be 0; `examples` says more about the first of them."""

    workflows: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    effects: int = 0
    calls: int = 0  #: HTTP calls that arrived
    repeated: int = 0  #: steps in another database, and HTTP calls, that ran more than once, which is allowed

    lost: int = 0  #: effects that must be there and are not, and starts that committed and are not there
    doubled: int = 0  #: effects that are there more than once
    uncalled: int = 0  #: effects that no workflow should have had
    stuck: int = 0  #: instances that did not end
    wrong: int = 0  #: instances that ended with another status than theirs, or signals that reached the wrong wait
    leftovers: int = 0  #: rows of queue that belong to instances that ended
    examples: list[str] = field(default_factory=list)

    @property
    def broken(self) -> int:
        """How many promises were not kept."""
        return self.lost + self.doubled + self.uncalled + self.stuck + self.wrong + self.leftovers

    def blame(self, kind: str, count: int, what: str) -> None:
        """Counts a finding and keeps an example of it."""
        setattr(self, kind, getattr(self, kind) + count)
        if len(self.examples) < 20:
            self.examples.append(f"{kind}: {what}")

    def lines(self) -> list[str]:
        """For people."""
        counts = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if f.name != "examples"]
        return [", ".join(counts[:7]), ", ".join(counts[7:]), *self.examples]


def audit(dsn: str, workflows: Mapping[str, Tree], elsewhere: Mapping[str, int], other_dsn: str | None,
          arrived: Sequence[tuple[str, str]] = ()) -> Findings:
    """Looks at everything. `workflows`: the committed ones; `elsewhere`: steps of those that ran in another database.
    `arrived`: the HTTP calls as their server saw them: X-Place, Idempotency-Key.
    """
    found = Findings()
    calls: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for header, key in arrived:
        instance, _, place = header.partition(" ")
        calls[instance][place].append(key)
        found.calls += 1
    with psycopg.connect(dsn) as c:
        status = {i: (s, o) for i, s, o in c.execute("SELECT id, status, output FROM duroxide.instances")}
        cancels = {i for i, in c.execute("SELECT instance FROM public.cancels")}
        effects: dict[str, Counter[str]] = defaultdict(Counter)
        payloads: dict[tuple[str, str], str | None] = {}
        for instance, place, payload in c.execute("SELECT instance, place, payload FROM public.effects"):
            effects[instance][place] += 1
            payloads[instance, place] = payload
            found.effects += 1
        winners: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
        for instance, execution, node, result in c.execute(
                "SELECT instance_id, execution, node, result FROM duroxide.history WHERE event = 'decided' "
                "AND result ~ '^[0-9]+$'"):
            winners[instance][execution, node] = int(result)
        left = c.execute("SELECT count(*) FROM duroxide.queue q JOIN duroxide.instances i ON i.id = q.instance_id "
                         "WHERE i.status IN ('completed', 'failed')").fetchall()[0][0]
        queued = {i for i, in c.execute("SELECT instance_id FROM duroxide.queue")}
    if left:
        found.blame("leftovers", left, f"{left} rows of queue")
    for instance in set(status) - set(workflows) - set(elsewhere):
        found.blame("uncalled", 1, f"{instance} was rolled back")
    for instance in set(effects) - set(workflows):
        found.blame("uncalled", effects[instance].total(), f"{instance}: {dict(effects[instance])}")
    for instance, tree in workflows.items():
        found.workflows += 1
        if instance not in status:
            found.blame("lost", 1, f"{instance}: the start committed, the instance is gone")
            continue
        _check(found, instance, tree, status[instance], instance in cancels, winners[instance], effects[instance],
               {p: v for (i, p), v in payloads.items() if i == instance}, calls[instance], queued=instance in queued)
    if other_dsn is not None:
        with psycopg.connect(other_dsn) as c:
            ran = dict(c.execute("SELECT instance, count(*) FROM public.effects GROUP BY 1").fetchall())
        for instance, steps in elsewhere.items():
            found.workflows += 1
            if status.get(instance, ("gone",))[0] != "completed":
                found.blame("stuck", 1, f"{instance} (another database): {status.get(instance)}")
            if ran.get(instance, 0) < steps:
                found.blame("lost", steps - ran.get(instance, 0), f"{instance}: in another database")
            found.repeated += max(0, ran.get(instance, 0) - steps)
    return found


def _check(found: Findings, instance: str, tree: Tree, status: tuple[str, str | None], cancelled: bool,
           winners: Mapping[tuple[str, int], int], effects: Counter[str], payloads: Mapping[str, str | None],
           calls: Mapping[str, list[str]], *, queued: bool) -> None:
    want = expected(tree, winners)
    state, output = status
    if state not in ("completed", "failed", "cancelled") or (state == "cancelled" and queued):
        found.blame("stuck", 1, f"{instance} is {state}, queued: {queued}")
        return
    setattr(found, state, getattr(found, state) + 1)
    if state == "cancelled":
        if not cancelled:
            found.blame("wrong", 1, f"{instance} is cancelled, and nobody asked")
        want.optional |= want.required
        want.required = set()
        want.calls = set()
    elif (state == "failed") != want.failed:
        found.blame("wrong", 1, f"{instance} is {state}: {output}")
        return
    elif want.unknown_race:
        found.blame("lost", 1, f"{instance}: a race without a recorded winner")
    for place in want.required - set(effects):
        found.blame("lost", 1, f"{instance} {place}")
    for place in want.calls - set(calls):
        found.blame("lost", 1, f"{instance} {place}: the call never arrived")
    for place, keys in calls.items():
        found.repeated += len(keys) - 1
        if len(set(keys)) > 1:
            found.blame("wrong", 1, f"{instance} {place}: called with different keys: {set(keys)}")
    if len({keys[0] for keys in calls.values()}) < len(calls):
        found.blame("wrong", 1, f"{instance}: different calls with the same key")
    for place, count in effects.items():
        if place not in want.required and place not in want.optional:
            # A race in a round that a cancel or a failure cut short may be undecided: its branches are no surprise.
            found.blame("uncalled", count, f"{instance} {place}")
        elif count > 1:
            found.blame("doubled", count - 1, f"{instance} {place} x{count}")
        elif place in want.payloads and payloads[place] != want.payloads[place]:
            found.blame("wrong", 1, f"{instance} {place}: signal {payloads[place]} instead of {want.payloads[place]}")
