"""Host names and addresses, in the one form in which they are judged and used.

A host in a URL can be spelled in many ways: `0x7f.1`, `2130706433`, `①②⑦.⓪.⓪.①`, `[::ffff:7f00:1]`, `EXAMPLE.com.`.
`normalise` knows them as a browser does (WHATWG URL, "host parsing"): nothing is left to the mood of a resolver.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

import idna

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_BLANK = re.compile(r"[\x00-\x20\x7f]")
_DIGITS = {8: re.compile(r"[0-7]*"), 10: re.compile(r"[0-9]+"), 16: re.compile(r"[0-9a-f]*")}


class HostError(ValueError):
    """Not a host; the text says why."""


def normalise(text: str) -> str | ipaddress.IPv4Address | ipaddress.IPv6Address:
    """A host as it stands in a URL, as a lower-case ASCII name without trailing dot, or as an address.

    Raises HostError.
    """
    # The same few are called over and over; long ones are not kept.
    return _cached(text) if len(text) < 256 else _normalise(text)


def _normalise(text: str) -> str | ipaddress.IPv4Address | ipaddress.IPv6Address:
    if text.startswith("["):
        return _ipv6(text)
    for bad, name in (("%", "percent-encoding"), ("\\", "a backslash"), ("@", "user information")):
        if bad in text:
            raise HostError(f"{name} in a host name")
    if _BLANK.search(text):
        raise HostError("a space or control character in a host name")
    if not text.isascii():
        text = _to_ascii(text)
    name = text.lower().removesuffix(".")
    if not name:
        raise HostError("an empty host name")
    last = name.rpartition(".")[2]
    if last.isdigit() or re.fullmatch("0x[0-9a-f]*", last):
        return _ipv4(name)
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise HostError("not a host name")
    return name


_cached = lru_cache(1024)(_normalise)


def _to_ascii(text: str) -> str:
    try:
        return idna.encode(text, uts46=True, transitional=False, std3_rules=True).decode("ascii")
    except idna.IDNAError:
        pass
    # IDNA knows names only. Digits and dots of other scripts may spell an address: judge what they are mapped to.
    try:
        mapped = idna.uts46_remap(text, True, False)
    except idna.IDNAError as e:
        raise HostError(f"not an international host name: {e}") from None
    if not mapped.isascii():
        raise HostError("not an international host name")
    return mapped


def _ipv6(text: str) -> ipaddress.IPv6Address:
    if not text.endswith("]"):
        raise HostError("a bracket without its fellow")
    inside = text[1:-1]
    if "%" in inside:
        raise HostError("an IPv6 zone")
    try:
        return ipaddress.IPv6Address(inside)
    except ValueError:
        raise HostError("not an IPv6 address") from None


def _ipv4(name: str) -> ipaddress.IPv4Address:
    """One to four numbers, decimal, octal (0...) or hexadecimal (0x...); the last fills what the others leave."""
    parts = name.split(".")
    if len(parts) > 4:
        raise HostError("not an IPv4 address")
    numbers = [_number(part) for part in parts]
    *leading, last = numbers
    if any(n > 255 for n in leading) or last >= 256 ** (5 - len(numbers)):
        raise HostError("not an IPv4 address")
    return ipaddress.IPv4Address(sum(n << 8 * (3 - i) for i, n in enumerate(leading)) + last)


def _number(part: str) -> int:
    base = 10
    if part.startswith("0x"):
        part, base = part[2:], 16
    elif len(part) > 1 and part.startswith("0"):
        part, base = part[1:], 8
    if not _DIGITS[base].fullmatch(part) or len(part) > 40:
        raise HostError("not an IPv4 address")
    return int(part or "0", base)
