"""Several programs measured at the same time, a slice of a second each in turn: what slows the machine down hits all.

All but one are stopped (SIGSTOP) at any time. For pass-through each program in between has a pgbench of its own, whose
sessions stay open; what counts are the transactions that their logs have within each slice.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.stage import Program, Stage

#: Seconds for all of them together before the first slice. A server process of which nothing is in its caches yet, nor
#: the shared memory in its page table, is up to a fifth slower for its first thousands of transactions.
WARM = 2
#: Seconds that signals, and looking at clocks, may take in each slice.
_SLACK = 0.01


def in_turn(count: int, rounds: int) -> Iterator[int]:
    """Whose slice it is: each once in a round, and each first, second ... as often as the others."""
    for number in range(rounds):
        for offset in range(count):
            yield (number + offset) % count


def stop(processes: Iterable[int]) -> None:
    """By process id."""
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)


def go(processes: Iterable[int]) -> None:
    """After `stop`."""
    for pid in processes:
        os.kill(pid, signal.SIGCONT)


def one_slice(processes: Sequence[int], seconds: float) -> tuple[float, float]:
    """Lets stopped processes go on for a slice, and returns when it began and ended (seconds since 1970)."""
    go(processes)
    start = time.time()
    time.sleep(seconds)
    end = time.time()
    stop(processes)
    return start, end


@dataclass(frozen=True)
class Share:
    """What one program did: transactions a second by slice, and microseconds of CPU time for each transaction, in the
    program in between, in all and outside of the kernel."""

    tps: list[float]
    cpu: float
    outside: float


def in_slices(stage: Stage, programs: Sequence[Program], *arguments: str, clients: int,
              rounds: int, seconds: float) -> dict[str, Share]:
    """Runs pgbench through each program for so many slices of so many seconds.

    Raises subprocess.CalledProcessError.
    """
    whole = WARM + rounds * len(programs) * (seconds + _SLACK) + 1
    spans: list[list[tuple[float, float]]] = [[] for _ in programs]
    cpu = [0.0] * len(programs)
    with contextlib.ExitStack() as stack:
        benches = [stack.enter_context(_pgbench(stage, p, *arguments, clients=clients, seconds=round(whole + 1)))
                   for p in programs]
        for bench in benches:
            bench.begun()
        pids = [bench.process.pid for bench in benches]
        stop(pids)
        outside = [p.outside() for p in programs]
        for i in in_turn(len(programs), rounds):
            before = programs[i].cpu()
            spans[i].append(one_slice(pids[i : i + 1], seconds))
            cpu[i] += programs[i].cpu() - before
        outside = [p.outside() - o for p, o in zip(programs, outside, strict=True)]
        go(pids)
        moments = [bench.ended() for bench in benches]
    shares = {}
    for i, program in enumerate(programs):
        counts = [bisect_left(moments[i], end) - bisect_left(moments[i], start) for start, end in spans[i]]
        done = sum(counts)
        shares[program.name] = Share(
            [count / (end - start) for count, (start, end) in zip(counts, spans[i], strict=True)],
            cpu[i] / done * 1e6, outside[i] / done * 1e6)
    return shares


class _Bench:
    """A pgbench that runs, and says of each transaction when it ended."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, seconds: int) -> None:
        self.process = process
        self._folder = folder
        self._seconds = seconds

    def begun(self) -> None:
        """Returns when it has been at it for WARM seconds."""
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            progress = re.match(r"progress: ([\d.]+) s", line)
            if progress and float(progress[1]) > WARM - 0.5:
                return
        raise subprocess.CalledProcessError(self.process.wait(), self.process.args, "", said)

    def ended(self) -> list[float]:
        """Waits for its end; seconds since 1970 at which its transactions ended, in order."""
        out, said = self.process.communicate(timeout=self._seconds + 30)
        if self.process.returncode:
            raise subprocess.CalledProcessError(self.process.returncode, self.process.args, out, said)
        moments = []
        for path in self._folder.glob("log.*"):
            for line in path.read_text().splitlines():
                fields = line.split()
                moments.append(int(fields[4]) + int(fields[5]) / 1e6)
            path.unlink()
        moments.sort()
        return moments


@contextlib.contextmanager
def _pgbench(stage: Stage, program: Program, *arguments: str, clients: int, seconds: int) -> Iterator[_Bench]:
    folder = stage.folder / f"log-{program.name.replace(' ', '-')}"
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [str(stage.cluster.bin_dir / "pgbench"), "-n", "-c", str(clients), "-j", str(min(clients, 2)),
         "-T", str(seconds), "-P", "1", "-l", f"--log-prefix={folder / 'log'}", *arguments, program.uri],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield _Bench(process, folder, seconds)
    finally:
        if process.poll() is None:
            process.kill()
            process.send_signal(signal.SIGCONT)
        process.wait()
