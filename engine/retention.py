"""Retention: what ended long ago is removed, a batch at a time (SURFACE Part I "Running", and 10.5).

Every worker makes a pass once an interval; an advisory lock lets one of them at it at a time, for a batch each. A batch
is a short transaction of its own, and is followed by a pause as long as it took: a backlog of millions goes without
anybody noticing, and keeps no old snapshot alive that would stop vacuum.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg
import structlog

from engine.settings import EngineSettings
from engine.store import Store, is_infrastructure

log = structlog.get_logger("dfproxy.engine")

#: Most instances that one transaction removes; fewer where they are large.
BATCH = 500
#: Seconds that a batch should stay below.
BRISK = 0.5
#: Longest wait in seconds for a worker's first pass: those that start together need not all look together.
FIRST = 60.0
_EVER = datetime.min.replace(tzinfo=UTC)


@dataclass
class Pass:
    """What one pass did. `yielded`: another worker was at it."""

    removed: int = 0
    batches: int = 0
    yielded: bool = False


async def keep(settings: EngineSettings, store: Store) -> None:
    """Makes a pass every `reconcile_interval`, until it is cancelled. Never raises because of the database."""
    interval = settings.reconcile_interval
    if not interval:
        return
    await asyncio.sleep(random.uniform(0, min(FIRST, interval)))
    while True:
        try:
            done = await one_pass(settings, store)
            if done.removed:
                log.info("old workflows are removed", count=done.removed)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as e:
            # Also a constraint of the owner's own that holds a row: the worker must go on.
            level = "info" if is_infrastructure(e) else "warning"
            getattr(log, level)("old workflows could not be removed", reason=str(e) or type(e).__name__)
        await asyncio.sleep(interval * random.uniform(0.9, 1.0))


async def one_pass(settings: EngineSettings, store: Store) -> Pass:
    """Removes all that is due. Raises what the store's connections raise."""
    done = Pass()
    before = store.clock.now() - timedelta(days=settings.retention_days)
    after, limit = _EVER, BATCH
    while True:
        began = time.monotonic()
        try:
            removed, reached = await store.retain(before, settings.retention_max_instances, after, limit)
        except TimeoutError:
            if limit == 1:
                raise
            limit = max(1, limit // 8)
            continue
        if removed is None:
            done.yielded = True
            return done
        done.removed += removed
        done.batches += 1
        if removed < limit or reached is None:
            return done
        after, took = reached, time.monotonic() - began
        limit = max(1, limit // 2) if took > BRISK else min(BATCH, limit * 2)
        await asyncio.sleep(took)
