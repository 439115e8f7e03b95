"""The header of the PROXY protocol (versions 1 and 2), with which a load balancer says whom it forwards.

Whether there is one is never guessed: whoever uses this knows that the peer sends one. The header's length is found
here, what it says is read by the library.
"""

from __future__ import annotations

import struct
from typing import Final

from proxyprotocol import ProxyProtocolIncompleteError
from proxyprotocol.result import is_ipv4, is_ipv6, is_unix
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from proxy.wire.frames import ProtocolError

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
#: The longest line of version 1, its CRLF included.
_MAX_LINE: Final = 107
#: The longest header of version 2 that is accepted: addresses, and what load balancers add about TLS.
_MAX_HEADER: Final = 4096
_FIXED: Final = 16


class ProxyHeader:
    """Takes the first bytes of a connection. `feed` returns None until the header is there.

    Then `peer` is who is forwarded, as `host:port` or a path; None where the header does not say (a health check).
    """

    def __init__(self) -> None:
        self._buffer = b""
        self.peer: str | None = None

    def feed(self, data: bytes) -> bytes | None:
        """What follows the header, or None if it is not complete. Raises ProtocolError where it is none."""
        self._buffer += data
        end = self._end(self._buffer)
        if end is None:
            return None
        header, rest = self._buffer[:end], self._buffer[end:]
        version = ProxyProtocolV1() if header.startswith(_V1) else ProxyProtocolV2()
        try:
            result = version.unpack(header)
            if is_ipv4(result) or is_ipv6(result):
                host, port = result.source
                self.peer = f"[{host}]:{port}" if is_ipv6(result) else f"{host}:{port}"
            elif is_unix(result):
                self.peer = result.source
        except (ProxyProtocolIncompleteError, ValueError, struct.error) as e:
            raise ProtocolError(f"the PROXY header can't be read: {e}") from e
        self._buffer = b""
        return rest

    @staticmethod
    def _end(data: bytes) -> int | None:
        if data.startswith(_V1):
            end = data.find(b"\r\n", 0, _MAX_LINE)
            if end >= 0:
                return end + 2
            if len(data) >= _MAX_LINE:
                raise ProtocolError("the line of the PROXY header has no end")
            return None
        if data.startswith(_V2):
            if len(data) < _FIXED:
                return None
            size = _FIXED + int.from_bytes(data[14:_FIXED], "big")
            if size > _MAX_HEADER:
                raise ProtocolError(f"a PROXY header of {size} bytes is longer than the limit of {_MAX_HEADER}")
            return size if len(data) >= size else None
        if _V1.startswith(data) or _V2.startswith(data):
            return None
        raise ProtocolError("the connection does not begin with a PROXY header, which this peer has to send")
