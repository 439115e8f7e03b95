"""Small questions about a libpq URI: which database, whose login, how to show it, how to name another database."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from proxy.settings import SettingsError


def check(dsn: str, setting: str = "--upstream") -> str:
    """`dsn` itself if it is a URI for PostgreSQL. Raises SettingsError, without showing it (passwords)."""
    try:
        scheme = urlsplit(dsn).scheme
    except ValueError as e:
        # Such as an IPv6 address behind another host, which newer releases of Python don't take.
        raise SettingsError(f"{setting} can't be read as a URI ({e}); several hosts can also be given as"
                            " postgresql://USER@/DATABASE?host=NAME,::1&port=5432,5432") from e
    if scheme not in ("postgresql", "postgres"):
        raise SettingsError(f"{setting} must be a URI: postgresql://USER@HOST:PORT/DATABASE")
    return dsn


def database(dsn: str) -> str:
    """The database that a URI names; as libpq does, the user's name where it names none."""
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query))
    return query.get("dbname") or unquote(parts.path.lstrip("/")) or user(dsn)


def user(dsn: str) -> str:
    """The user that a URI names, or an empty text."""
    parts = urlsplit(dsn)
    info, at, _ = parts.netloc.rpartition("@")
    return dict(parse_qsl(parts.query)).get("user") or (unquote(info.partition(":")[0]) if at else "")


def has_password(dsn: str) -> bool:
    """Whether a URI holds a password."""
    parts = urlsplit(dsn)
    info, _, _ = parts.netloc.rpartition("@")
    return ":" in info or "password" in dict(parse_qsl(parts.query))


def hosts(dsn: str) -> str:
    """Host and port (or folder of the socket) for a person to read; several are listed."""
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query))
    return query.get("host") or unquote(parts.netloc.rpartition("@")[2]) or "localhost"


def show(dsn: str) -> str:
    """A URI without its password and options: `user@host:port/database`."""
    name = user(dsn)
    return f"{name + '@' if name else ''}{hosts(dsn)}/{database(dsn)}"


def with_database(dsn: str, name: str) -> str:
    """The same URI for another database on the same server."""
    parts = urlsplit(dsn)
    query = [(k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if k != "dbname"]
    # urlunsplit would drop the slashes where there is no host.
    options = "?" + urlencode(query) if query else ""
    return f"{parts.scheme}://{parts.netloc}/{quote(name, safe='')}{options}"
