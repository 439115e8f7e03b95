"""The command `dfproxy` in a process of its own, without waiting a second for its imports each time.

One process imports everything once and is forked for each call: what runs is the command's `main`, with arguments,
environment, folder, files and process group of its own. That `python -m proxy.cli` does the same, some tests show with
the real thing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any


class Command:
    """The part of subprocess.Popen's interface that tests use."""

    def __init__(self, origin: Origin, pid: int) -> None:
        self._origin = origin
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._origin.status(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        if self.returncode is None:
            self.returncode = self._origin.status(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("dfproxy", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Origin:
    """The process that is forked."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-m", __name__, str(theirs.fileno())],
                                             stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._ended: dict[int, int] = {}
        self._started: list[int] = []
        self._lock = threading.Lock()
        atexit.register(self._close)

    def _close(self) -> None:
        self._channel.close()
        self._process.wait(30)

    def start(self, arguments: list[str], environment: dict[str, str], folder: Path, out: IO[Any], err: IO[Any]) -> Command:
        order = {"arguments": arguments, "environment": environment, "folder": str(folder)}
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(order).encode()], [out.fileno(), err.fileno()])
            while not self._started:
                self._hear(60)
            return Command(self, self._started.pop())

    def status(self, pid: int, timeout: float) -> int | None:
        """The exit status, as subprocess gives it; None if it still runs after so many seconds."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while pid not in self._ended and self._hear(max(0, deadline - time.monotonic())):
                pass
            return self._ended.get(pid)

    def _hear(self, timeout: float) -> bool:
        if not select.select([self._channel], [], [], timeout)[0]:
            return False
        what, pid, status = json.loads(self._channel.recv(1000))
        if what == "started":
            self._started.append(pid)
        else:
            self._ended[pid] = status
        return True


_origins: dict[int, Origin] = {}


def start(arguments: list[str], environment: dict[str, str], folder: Path, out: IO[Any], err: IO[Any]) -> Command:
    """Starts `dfproxy ARGUMENTS` in `folder`, in a session of its own."""
    origin = _origins.get(os.getpid())
    if origin is None:
        origin = _origins[os.getpid()] = Origin()
    return origin.start(arguments, environment, folder, out, err)


# --- in the process that is forked ---


def _main(channel: socket.socket) -> None:
    import proxy.cli
    import proxy.demo
    import proxy.doctor
    import proxy.serve
    import proxy.supervisor
    import proxy.wiring  # noqa: F401

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writing)
    while True:
        ready = select.select([channel, reading], [], [])[0]
        if reading in ready:
            os.read(reading, 1000)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    channel.send(json.dumps(["ended", ended[0], os.waitstatus_to_exitcode(ended[1])]).encode())
        if channel in ready:
            data, fds, _, _ = socket.recv_fds(channel, 1_000_000, 2)
            if not data:
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run(json.loads(data), fds)
            channel.send(json.dumps(["started", pid, None]).encode())
            for fd in fds:
                os.close(fd)


def _run(order: dict[str, Any], fds: list[int]) -> None:
    """The child: never returns."""
    from proxy.cli import main

    status: Any = 1
    try:
        os.setsid()
        for fd, number in zip(fds, (1, 2), strict=True):
            os.dup2(fd, number)
        os.closerange(3, 100)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = ["dfproxy", *order["arguments"]]
        main()
        status = 0
    except SystemExit as e:
        status = 0 if e.code is None else e.code
    except BaseException:  # noqa: BLE001 (as the interpreter would)
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _main(socket.socket(fileno=int(sys.argv[1])))
