"""Where, as whom and with what protection a step's session connects: what the DSN of the service role says."""

from __future__ import annotations

import os
import ssl
import time
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs, unquote, urlsplit

from proxy.wire.tls_options import ClientTls, SslMode

#: Seconds after which the files of a TLS context are read again: certificates are renewed while a worker runs.
_FRESH = 60.0
_contexts: dict[ClientTls, tuple[float, ssl.SSLContext]] = {}


@dataclass(frozen=True)
class Target:
    """Servers, login and TLS. A host that starts with `/` is the folder of a Unix-domain socket."""

    hosts: tuple[tuple[str, int], ...]
    user: str
    database: str
    password: str | None = field(default=None, repr=False)
    tls: ClientTls = field(default_factory=ClientTls)

    @classmethod
    def from_dsn(cls, dsn: str) -> Target:
        """Reads a libpq URI. Raises ValueError where it is none."""
        parts = urlsplit(dsn)
        if parts.scheme not in ("postgresql", "postgres"):
            raise ValueError("the upstream is not a URI that starts with postgresql://")
        query = {k: v[-1] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        credentials, at, addresses = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":") if at else ("", "", "")
        names: list[str] = []
        ports: list[str] = []
        for address in addresses.split(","):
            name, port = address, ""
            if not address.endswith("]") and ":" in address:
                name, _, port = address.rpartition(":")
            names.append(unquote(name).strip("[]"))
            ports.append(port)
        if "host" in query:
            names = query["host"].split(",")
            ports = [""] * len(names)
        if "port" in query:
            given = query["port"].split(",")
            ports = given * len(names) if len(given) == 1 else given
        if len(names) != len(ports):
            raise ValueError("the upstream names a different number of hosts and ports")
        fallback = os.environ.get("PGPORT", "5432")
        who = unquote(user) or query.get("user") or os.environ.get("PGUSER") or "postgres"
        return cls(
            hosts=tuple((n or os.environ.get("PGHOST", "localhost"), int(p or fallback))
                        for n, p in zip(names, ports, strict=True)),
            user=who,
            password=unquote(password) or query.get("password") or os.environ.get("PGPASSWORD"),
            database=unquote(parts.path.lstrip("/")) or query.get("dbname") or os.environ.get("PGDATABASE") or who,
            tls=ClientTls.from_parameters(query),
        )

    def to(self, *, user: str, password: str | None, database: str | None) -> Target:
        """The same servers for another role, and maybe another database."""
        return replace(self, user=user, password=password, database=database or self.database)

    def wants_tls(self, host: str) -> bool:
        """Whether to ask a host for TLS; never on a Unix-domain socket."""
        return self.tls.mode is not SslMode.DISABLE and not host.startswith("/")

    def context(self) -> ssl.SSLContext:
        """The TLS context, at most a minute old. Raises TlsConfigError, which is a ValueError."""
        known = _contexts.get(self.tls)
        if known is None or known[0] + _FRESH < time.monotonic():
            known = _contexts[self.tls] = time.monotonic(), self.tls.context()
        return known[1]
