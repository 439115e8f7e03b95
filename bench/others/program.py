"""What the programs of the other engines have in common: they take orders on their standard input, one a line.

`start FIRST COUNT`: starts workflows with these numbers. `park FIRST COUNT`: workflows that sleep for an hour.
`one NUMBER`: starts one and waits for its end. Each order is answered by a line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

AT_A_TIME = 32
HOUR = 3600


def rows_of(number: int) -> Iterator[int]:
    """Which rows of `hits` the steps of a workflow change."""
    for step in range(3):
        yield (number + 3333 * step) % 10000 + 1


def obey(**orders: Callable[..., Any]) -> None:
    """Until the input ends."""
    print("ready", flush=True)
    for order in sys.stdin:
        name, *arguments = order.split()
        orders[name](*map(int, arguments))
        print("done", flush=True)
