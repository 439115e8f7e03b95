"""The operating system's limit on open files, which connections count against."""

from __future__ import annotations

import resource
from typing import Final

import structlog

from proxy.server import SPARE

log = structlog.get_logger("dfproxy")

#: Files besides those of clients: logs, libraries, the worker's connections, cancel requests.
_OTHERS: Final = 1000


def allow_connections(clients: int, *, each: int = 2) -> None:
    """Raises the process's soft limit on open files to what `clients` need, which have `each` so many.

    That is one for the client and one for its connection to the server; on the fast path each of them has a second one.
    """
    wanted = each * clients + SPARE + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("the limit on open files may be too low for max_client_connections: raise it (ulimit -n,"
                    " LimitNOFILE)", limit=most, wanted=wanted)
