"""Telling whether a worker process of this machine is dead, so that its instances need not wait for the lease.

A worker writes into its name which boot of which kernel, which PID namespace and which process it is. Another worker
under the same kernel and namespace can look; anybody else must wait for the lease. Linux only; elsewhere nothing is
known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_MARK = "life="


@dataclass(frozen=True)
class Life:
    """One process, unmistakably: its text form is what a worker's name carries."""

    place: str
    pid: int
    started: str

    @classmethod
    def mine(cls) -> Life | None:
        """This process; None where the system does not tell."""
        place, started = _place(), _started(os.getpid())
        return cls(place, os.getpid(), started) if place and started else None

    def __str__(self) -> str:
        return f"{_MARK}{self.place}/{self.pid}/{self.started}"


def is_dead(worker_name: str) -> bool:
    """Whether the worker of that name was a process of this machine that is certainly gone."""
    _, mark, text = worker_name.rpartition(_MARK)
    parts = text.split("/")
    if not mark or len(parts) != 3 or parts[0] != _place() or not parts[1].isdigit():
        return False
    return _started(int(parts[1])) != parts[2]


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if it is gone or a zombie."""
    try:
        # The second field, the program's name in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
