"""`make chaos`: a storm, its audit, exit status 1 if a promise was broken.

    python -m tests.chaos [--seconds 20] [--seed 0] [--workers 3] [--lease 2] [--rate 12] [--break-fence] [--log]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tests.chaos.storm import Plan, storm


def main() -> int:
    """Reads the flags, runs, prints."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=Plan.workers)
    parser.add_argument("--lease", type=float, default=Plan.lease)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--calm", type=float, default=Plan.calm)
    parser.add_argument("--break-fence", action="store_true", help="let lost leases write: the audit must find it")
    parser.add_argument("--log", action="store_true", help="print what the workers logged")
    given = parser.parse_args()
    plan = Plan(seconds=given.seconds, seed=given.seed, workers=given.workers, lease=given.lease, rate=given.rate,
                calm=max(given.calm, 80.0) if given.seconds >= 60 else given.calm, schedules=given.seconds >= 60,
                fence=not given.break_fence)
    report = asyncio.run(storm(plan))
    if given.log:
        print(report.log)
    print("\n".join(report.lines()))
    return 1 if report.findings.broken or not report.findings.workflows else 0


if __name__ == "__main__":
    sys.exit(main())
