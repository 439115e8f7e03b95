"""Which hosts and addresses may be called (SURFACE Part I "HTTP", 8.5).

Names and addresses are judged apart. An entry that is a name says which hosts may be asked for; an entry that is a
network says which addresses may be connected to, however they were found. So whoever controls a host's DNS can't lead a
call to a network that nobody listed: a name entry never opens a private address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.http.errors import BlockedError
from engine.http.names import HostError, normalise

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MIB = 2**20

#: What is not the public internet, by IANA's special-purpose registry (and multicast, and class E).
_REFUSED_4 = tuple(ipaddress.IPv4Network(n) for n in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4"))
#: The only global unicast block, and what in it is not: protocol assignments with Teredo, documentation, 6to4.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_6 = tuple(ipaddress.IPv6Network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
_NAT64 = tuple(ipaddress.IPv6Network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48"))


@dataclass(frozen=True)
class HostList:
    """Entries of http_allow or http_deny: `host.name`, `*.suffix`, `*`, an address, a network in CIDR."""

    names: frozenset[str] = frozenset()
    suffixes: tuple[str, ...] = ()
    every: bool = False
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> HostList:
        """Raises ValueError, whose text names the entry."""
        names, suffixes, networks, every = set(), [], [], False
        for entry in entries:
            text = entry.strip()
            if text == "*":
                every = True
            elif text.startswith("*."):
                suffixes.append("." + _name(entry, text[2:]))
            elif "/" in text or (network := _network(text)) is None:
                if "/" in text:
                    try:
                        networks.append(ipaddress.ip_network(text))
                    except ValueError as e:
                        raise ValueError(f"{entry!r} is not a network: {e}") from None
                else:
                    names.add(_name(entry, text))
            else:
                networks.append(network)
        return cls(frozenset(names), tuple(suffixes), every, tuple(networks))

    def __bool__(self) -> bool:
        return bool(self.names or self.suffixes or self.every or self.networks)

    def has_name(self, host: str) -> bool:
        """Whether an entry that is a name covers this host (normalised; an address is covered by `*` only)."""
        return self.every or host in self.names or (bool(self.suffixes) and host.endswith(self.suffixes))

    def has_address(self, address: Address) -> bool:
        """Whether a network entry holds this address."""
        return any(address.version == n.version and address in n for n in self.networks)


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _name(entry: str, text: str) -> str:
    try:
        host = normalise(text)
    except HostError as e:
        raise ValueError(f"{entry!r} is not a host name, *.suffix or network: {e}") from None
    if not isinstance(host, str):
        raise ValueError(f"{entry!r}: write addresses plainly, as in 192.0.2.1 or 192.0.2.0/24")
    return host


@dataclass(frozen=True, kw_only=True)
class HttpPolicy:
    """Settings of HTTP steps. Sizes in bytes, durations in seconds."""

    enabled: bool = True
    allow: HostList = field(default_factory=HostList)  #: empty: any public host
    deny: HostList = field(default_factory=HostList)  #: wins over allow
    allow_plain: bool = True  #: http:// beside https://
    max_request_bytes: int = 10 * MIB
    max_response_bytes: int = 10 * MIB  #: on the wire, and again after decompression
    max_timeout: float = 300.0  #: longer timeouts are cut to this
    max_parallel: int = 100  #: calls at a time, per worker
    max_parallel_per_host: int = 20
    ca_file: Path | None = None  #: certificates (PEM) to trust beside the system's

    def check_scheme(self, scheme: str) -> None:
        """Raises BlockedError."""
        if not self.enabled:
            raise BlockedError("outbound HTTP requests are disabled.",
                               "An administrator can set http_enabled in dfproxy's settings.")
        if scheme not in ("http", "https"):
            raise BlockedError(f"unsupported URL scheme '{scheme}'. Only http and https are allowed.")
        if scheme == "http" and not self.allow_plain:
            raise BlockedError("plain http is not allowed here. Use https.",
                               "It is dfproxy's setting http_allow_plain.")

    def check_host(self, host: str | Address) -> None:
        """What can be said before the name is resolved. Raises BlockedError."""
        if isinstance(host, str):
            if self.deny.has_name(host):
                raise BlockedError(f"'{host}' is denied by the setting http_deny.")
            # Where networks are listed, the name's addresses decide.
            if self.allow and not self.allow.has_name(host) and not self.allow.networks:
                raise _not_listed(host)
            return
        self.check_addresses(str(host), [host])

    def check_addresses(self, host: str, addresses: Iterable[Address]) -> list[Address]:
        """Those of a host's addresses that may be connected to, in order. Raises BlockedError if that is none."""
        every = list(addresses)
        literal = len(every) == 1 and host == str(every[0])
        named = not self.allow or (self.allow.every if literal else self.allow.has_name(host))
        allowed = [a for a in every if self._is_allowed(a, named=named)]
        if not allowed:
            if any(map(self._is_denied, every)):
                raise BlockedError(f"'{host}' is denied by the setting http_deny.")
            if not named and any(map(is_public, every)):
                raise _not_listed(host)
            raise BlockedError(
                f"the resolved IP address for '{host}' is in a restricted range. df.http() cannot access private or "
                "internal network addresses.", "An administrator can list its network in the setting http_allow.")
        return allowed

    def _is_denied(self, address: Address) -> bool:
        return self.deny.every or any(map(self.deny.has_address, embedded(address)))

    def _is_allowed(self, address: Address, *, named: bool) -> bool:
        if self._is_denied(address):
            return False
        plain, *carried = embedded(address)
        # Listing a translator's prefix (NAT64) opens the way through it, not what may lie at its other end.
        return (self.allow.has_address(plain) or (named and is_public(plain))) and all(
            is_public(a) or self.allow.has_address(a) for a in carried)


def _not_listed(host: str) -> BlockedError:
    return BlockedError(f"'{host}' is not in the allowed endpoint list. Only requests to hosts that the setting "
                        "http_allow names are permitted.")


def unmapped(address: Address) -> Address:
    """`::ffff:a.b.c.d` is a way to write a.b.c.d, and the system connects to that."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet. False where that is in doubt."""
    address = unmapped(address)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in n for n in _REFUSED_4)
    return address.scope_id is None and address in _GLOBAL_6 and not any(address in n for n in _REFUSED_6)


def embedded(address: Address) -> list[Address]:
    """The address itself, then those that a transition mechanism may carry a packet to."""
    address = unmapped(address)
    found: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in n for n in _NAT64) or 1 < int(address) < 2**32:
            found.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if address.sixtofour is not None:
            found.append(address.sixtofour)
        if address.teredo is not None:
            found += address.teredo
    return found
