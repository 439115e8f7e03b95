"""The URL of a request: parsed once, for the check and for the call; and how it is shown.

What a strict reader and a lax one would take apart differently is refused rather than repaired: user information,
backslashes, control characters, percent-encoded hosts, IPv6 zones, a port that is not a number.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

import httpx

from engine.http.errors import BlockedError, RequestError
from engine.http.names import HostError, normalise
from engine.http.policy import Address
from engine.model import storable

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*)(?::(?P<port>[0-9]*))?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: Where the authority ends.
_END = re.compile("[/?#]")
_DEFAULT_PORTS = {"http": 80, "https": 443}
MASK = "***"
#: Values shorter than this are not looked for in a path: `a` is everywhere.
SHORTEST = 4
LONGEST = 32 * 1024


@dataclass(frozen=True, slots=True)
class Url:
    """Where a request goes. `host` is normalised; `url` is made of it, and is what is called."""

    scheme: str
    host: str | Address
    port: int
    url: httpx.URL

    @property
    def host_text(self) -> str:
        """The host as in a Host header, without brackets."""
        return str(self.host)


def parse(text: str) -> Url:
    """Takes a URL apart. Raises BlockedError for what must not be called, RequestError for what is no URL."""
    text = text.strip(" ")
    if _CONTROL.search(text):
        raise BlockedError("the URL contains a control character.")
    if "\\" in text:
        raise BlockedError("the URL contains a backslash.", "Write it as %5C.")
    if len(text) > LONGEST:
        raise RequestError(f"HTTP request failed: the URL is longer than {LONGEST} characters")
    match = _SCHEME.match(text)
    if match is None:
        scheme = text.partition("://")[0].lower() if "://" in text else redact(text)
        raise BlockedError(f"unsupported URL scheme '{scheme}'. Only http and https are allowed.")
    scheme = match[1].lower()
    if scheme not in _DEFAULT_PORTS:
        raise BlockedError(f"unsupported URL scheme '{scheme}'. Only http and https are allowed.")
    authority, rest = _split_authority(text[match.end():])
    if "@" in authority:
        raise BlockedError("the URL contains user information.", "Send credentials in an Authorization header.")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None or not parts["host"]:
        raise BlockedError("unable to extract hostname from URL.")
    try:
        host = normalise(parts["host"])
        port = int(parts["port"] or _DEFAULT_PORTS[scheme])
    except HostError as e:
        raise BlockedError(f"unable to extract hostname from URL: {e}.") from None
    if not 0 < port < 65536:
        raise BlockedError("the URL's port is not between 1 and 65535.")
    return Url(scheme, host, port, _build(scheme, host, port, rest))


def _split_authority(rest: str) -> tuple[str, str]:
    found = _END.search(rest)
    end = len(rest) if found is None else found.start()
    return rest[:end], rest[end:]


def _build(scheme: str, host: str | Address, port: int, rest: str) -> httpx.URL:
    shown = f"[{host}]" if isinstance(host, ipaddress.IPv6Address) else str(host)
    path = rest.partition("#")[0]
    if not path.startswith("/"):
        path = "/" + path
    try:
        url = httpx.URL(f"{scheme}://{shown}:{port}{path}")
    except (httpx.InvalidURL, UnicodeError) as e:
        raise RequestError(f"HTTP request failed: the URL can't be used: {e}") from None
    # Two readers must not disagree about where the request goes.
    if url.raw_host.decode("ascii") != str(host) or (url.port or _DEFAULT_PORTS[scheme]) != port or url.userinfo:
        raise BlockedError("unable to extract hostname from URL.")
    return url


def authority_of(text: str) -> str:
    """What lies before a URL's path; all of it where there is no scheme. For URLs that may be anything."""
    match = _SCHEME.match(text.strip())
    return match[0] + _split_authority(text.strip()[match.end():])[0] if match else text


def spellings(value: str) -> set[str]:
    """How a value may stand in a URL."""
    return {value, quote(value, safe="", errors="replace"), quote(value, safe="/!$&'()*+,;=:@", errors="replace")}


def redact(text: str, hidden: Iterable[str] = ()) -> str:
    """A URL to be shown: no user information, no values in the query, no fragment, no `hidden` values in its path."""
    text = storable(re.sub(r"[\x00-\x20\x7f]+", " ", text.strip()))
    match = _SCHEME.match(text)
    head, rest = (match[0], text[match.end():]) if match else ("", text)
    authority, rest = _split_authority(rest)
    authority = authority.rpartition("@")[2]
    rest = rest.partition("#")[0]
    path, mark, query = rest.partition("?")
    for value in sorted(hidden, key=len, reverse=True):
        if len(value) >= SHORTEST and "://" not in value:
            for spelling in spellings(value):
                path = path.replace(spelling, MASK)
    fields = [name + "=" + MASK if equals else (name and MASK) for name, equals, _ in
              (field.partition("=") for field in query.split("&"))]
    return head + authority + path + mark + "&".join(fields)
