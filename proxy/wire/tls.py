"""TLS without I/O: ciphertext in, plain bytes out, and the other way round. The handshake's rules of PostgreSQL.

asyncio's own TLS layer is not used for relayed connections: it can't be given the bytes of a handshake that were read
already (a client that starts TLS unasked), has no half-close, and drops what it has decrypted when the connection
ends while its reader is paused.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import Sequence
from typing import Final

from asn1crypto.x509 import Certificate

#: The protocol's name in ALPN (RFC 7301, registered with IANA); required where TLS starts without SSLRequest.
ALPN: Final = "postgresql"
#: Payload of the largest TLS record, which is what one read gives at most. Bytes.
_RECORD: Final = 16 * 1024
#: Hash functions of certificate signatures whose use for channel binding RFC 5929 replaces by SHA-256.
_WEAK: Final = ("md5", "sha1")


class TlsStream:
    """One end of a TLS connection.

    Feed what the other end sent, send what `outgoing` gives. Raises ssl.SSLError from any method once the connection is
    broken; an alert for the other end may still be in `outgoing` then.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname)
        self.established = False  # the handshake is over
        self.ended = False  # the other end has said that it sends no more

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes ciphertext that was received."""
        self._incoming.write(data)

    def handshake(self) -> bool:
        """Goes on with the handshake; True when it is over."""
        if not self.established:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                return False
            self.established = True
        return True

    def read(self) -> bytes:
        """Everything that can be decrypted by now. The handshake is over."""
        chunks = []
        # To ask for more than there is costs an exception, at each message.
        while not self.ended and (self._incoming.pending or self._object.pending()):
            try:
                chunk = self._object.read(_RECORD)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                chunk = b""
            if chunk:
                chunks.append(chunk)
            else:
                self.ended = True
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def write(self, chunks: Sequence[bytes | memoryview]) -> None:
        """Encrypts. The handshake is over."""
        for chunk in chunks:
            if chunk:
                # All of it at once: there is no limit to what `outgoing` holds, and nothing is negotiated anew.
                self._object.write(chunk)

    def write_eof(self) -> None:
        """Says that no more will be written. What the other end sends can still be read."""
        with contextlib.suppress(ssl.SSLWantReadError):  # it is said; the other end has not said so itself
            self._object.unwrap()

    def outgoing(self) -> bytes:
        """The ciphertext to be sent."""
        return self._outgoing.read()

    @property
    def alpn(self) -> str | None:
        """The protocol that ALPN agreed on."""
        return self._object.selected_alpn_protocol()

    @property
    def peer_certificate(self) -> bytes | None:
        """The other end's certificate in DER, verified if the context verifies."""
        return self._object.getpeercert(binary_form=True)

    @property
    def version(self) -> str:
        """`TLSv1.3` and the like."""
        return self._object.version() or ""


def server_end_point(certificate: bytes) -> bytes | None:
    """Channel binding data of type tls-server-end-point for a server's certificate in DER (RFC 5929 section 4.1).

    The certificate's digest, by the hash function of its signature; by SHA-256 where that is MD5 or SHA-1. None where
    the signature has no hash function of its own (Ed25519): the RFC defines no binding then. Raises ValueError where
    the certificate can't be read.
    """
    algorithm = Certificate.load(certificate)["signature_algorithm"]
    if algorithm.signature_algo not in ("rsassa_pkcs1v15", "rsassa_pss", "dsa", "ecdsa"):
        return None
    name: str = algorithm.hash_algo
    return hashlib.new("sha256" if name in _WEAK else name, certificate).digest()


def common_name(certificate: bytes) -> str | None:
    """The subject's common name in a certificate in DER, as PostgreSQL compares it with the user; None without one.

    Raises ValueError where the certificate can't be read, or has several.
    """
    names = [pair.native["value"] for relative in Certificate.load(certificate).subject.chosen for pair in relative
             if pair.native["type"] == "common_name"]
    if len(names) > 1:
        raise ValueError("the certificate has several common names")
    if not names:
        return None
    name = str(names[0])
    if "\0" in name:
        raise ValueError("the certificate's common name holds a zero byte")
    return name
