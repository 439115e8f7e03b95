"""What the parts of a step cost the server: `python -m bench.pieces`. No ratios, and not part of `make bench`.

One session over and over sends what a worker sends for a step, whole, and with one part left out. CPU time of the
server process, in microseconds; the wait for the disk is not among it.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable

from bench import flows
from bench.measure import interleaved, median
from bench.stage import APP, DATABASE, Stage, process_time, stage
from engine.connection import RESET, STEP_DONE, STEP_DONE_TYPES
from proxy.wire import build
from proxy.wire.messages import Backend

STEPS, WARM_UP, REPEATS = 400, 50, 15
TOKEN = "11111111-1111-1111-1111-111111111111"
#: An instance that is held, for step_done to write to.
HELD = f"""
INSERT INTO duroxide.instances (id, graph) VALUES ('00000001', '[]');
UPDATE duroxide.queue SET owner = gen_random_uuid(), token = '{TOKEN}' WHERE instance_id = '00000001';
"""
PARTS = ("role", "text", "constraints", "record", "clean-up")


class Session:
    """A session of the superuser, over the Unix-domain socket."""

    def __init__(self, stage: Stage) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(f"{stage.cluster.socket_dir}/.s.PGSQL.{stage.port}")
        self._count = itertools.count(1)
        answers = self._ask(build.startup({"user": "postgres", "database": DATABASE}))
        self.pid = struct.unpack(">I", answers[Backend.BACKEND_KEY_DATA][:4])[0]

    def _ask(self, data: bytes) -> dict[int, bytes]:
        """Sends, and waits for ReadyForQuery. Returns the last answer of each type. Raises RuntimeError on an error."""
        self._socket.sendall(data)
        answers: dict[int, bytes] = {}
        received = b""
        while Backend.READY_FOR_QUERY not in answers:
            received += self._socket.recv(65536)
            while len(received) >= 5 and len(received) > (length := struct.unpack_from(">I", received, 1)[0]):
                answers[received[0]], received = received[5:1 + length], received[1 + length:]
        if Backend.ERROR_RESPONSE in answers:
            raise RuntimeError(answers[Backend.ERROR_RESPONSE].decode())
        return answers

    def step(self, without: str = "") -> None:
        """One step, but for one of the parts."""
        number = next(self._count)
        text = f"UPDATE hits SET n = n + 1 WHERE id = {number % 10000 + 1}"
        record = [b"00000001", TOKEN.encode(), b"", b"%d" % number, b'{"rows":[],"row_count":0}', b"[]",
                  b'{"tag":"UPDATE 1"}', b"2026-01-02T03:04:05.678901+00:00", b"f"]
        parts = {
            "begin": _statement("BEGIN"),
            "role": _statement(f"SET LOCAL ROLE {APP}"),
            "text": build.parse("", text) + build.bind("", "") + build.describe_portal("") + build.execute(""),
            "constraints": _statement("SET CONSTRAINTS ALL IMMEDIATE"),
            "no role": _statement("SET ROLE NONE"),
            "record": build.parse("", STEP_DONE, STEP_DONE_TYPES) + build.bind("", "", record) + build.execute(""),
            "commit": _statement("COMMIT"),
            "clean-up": build.query(RESET),
        }
        left_out = ("role", "no role") if without == "role" else (without,)
        data = b"".join(message for name, message in parts.items() if name not in left_out)
        self._ask(data + build.sync() if "clean-up" in left_out else data)

    def cost(self, without: str = "") -> float:
        """Microseconds of a step."""
        for _ in range(WARM_UP):
            self.step(without)
        before = process_time(self.pid)
        for _ in range(STEPS):
            self.step(without)
        return (process_time(self.pid) - before) / STEPS * 1e6


def _statement(sql: str) -> bytes:
    return build.parse("", sql) + build.bind("", "") + build.execute("")


def main() -> None:
    """Prints them."""
    with stage() as s:
        with s.dfproxy("worker", command="worker"):
            flows.prepare(s)
        with s.admin() as c:
            c.execute(HELD)
        session = Session(s)
        measures: list[Callable[[], float]] = [session.cost]
        measures += [lambda part=part: session.cost(part) for part in PARTS]  # type: ignore[misc]
        whole, *rest = interleaved(REPEATS, measures)
        costs = [median([a - b for a, b in zip(whole, without, strict=True)]) for without in rest]
        print(f"a step, us of the server's CPU time: {median(whole):.0f}")
        for part, cost in zip(PARTS, costs, strict=True):
            print(f"{cost:8.0f}  {part}")
        print(f"{median(whole) - sum(costs):8.0f}  the transaction, the messages and the round trip")


if __name__ == "__main__":
    main()
