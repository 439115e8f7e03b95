"""What an engine is told: one frozen value, made by the command line (or a test) and passed down."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from engine.http.policy import HttpPolicy


def default_worker_name() -> str:
    """`host:pid`, as people recognise it in duroxide.workers."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of one worker in one database. Durations are seconds, sizes bytes.

    `dsn` is a libpq URI of the service role, possibly with several hosts. `max_control_connections` below 3 counts as
    3: heartbeat and poll have a connection each, so that neither can be starved by a checkpoint that waits for a lock.
    """

    dsn: str = field(repr=False)
    secret: str | None = field(default=None, repr=False)  #: executor passwords derive from it; None: duroxide.secret
    worker_name: str = field(default_factory=default_worker_name)
    version: str = "0"

    # Budgets
    max_user_connections: int = 10
    max_control_connections: int = 4
    max_instances: int = 1000  #: instances in memory
    claim_batch: int = 200  #: instances claimed by one poll
    execution_acquire_timeout: float = 30.0
    connect_timeout: float = 30.0
    idle_connection: float = 60.0  #: after which an unused step connection is closed
    statement_cache_size: int = 100  #: of control connections; none behind a pooler

    # Time
    lease: float = 15.0
    poll_busy: float = 0.01  #: the shortest pause between polls, while they find work
    poll_held: float = 0.25  #: the longest, while instances are held (their inbox is read by polling)
    poll_idle: float = 1.0  #: the longest, otherwise
    park_after: float = 1.0  #: waits longer than this leave memory
    retry_min: float = 0.1  #: back-off after infrastructure faults
    retry_max: float = 30.0

    # Limits
    max_result_bytes: int = 16 * 2**20
    max_result_rows: int = 100_000
    loop_history_rounds: int = 10
    max_crashes: int = 10

    # What has ended
    retention_days: float = 30
    retention_max_instances: int | None = None  #: how many are kept at most; None: any number
    reconcile_interval: float = 3600.0  #: between two passes of retention; 0: never

    # HTTP steps
    http: HttpPolicy = field(default_factory=HttpPolicy)

    # Who may
    enable_superuser_instances: bool = False
    require_login: bool = False
    allow_set_role: bool = False
