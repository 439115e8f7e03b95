"""TLS to the clients, and the handshake with the server.

`ServerTls` is what clients are shown: certificate, key, what is asked of them. `UpstreamTls` opens connections to the
server, with whatever TLS the upstream asks for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from proxy.relay import Hold, Leg
from proxy.upstream import Address, dial
from proxy.wire import build
from proxy.wire.messages import ANSWER_NO, ANSWER_SSL
from proxy.wire.tls import ALPN, server_end_point
from proxy.wire.tls_options import ClientTls, SslMode, TlsConfigError, load_identity, tls_version

log = structlog.get_logger("dfproxy.tls")


@dataclass(frozen=True)
class ServerTlsFiles:
    """What `ServerTls` is made of. Paths of files in PEM; the certificate's holds its chain.

    With `client_ca` clients have to have a certificate that one of its authorities signed.
    """

    certificate: str
    key: str
    client_ca: str | None = None
    min_version: str = "TLSv1.2"


class ServerTls:
    """TLS in the server role. Raises TlsConfigError where the files can't be used."""

    def __init__(self, files: ServerTlsFiles) -> None:
        self._files = files
        self.context, self.binding = self._load()

    def reload(self) -> bool:
        """Reads the files again, for the connections to come. If they can't be used the old ones stay; False then."""
        try:
            self.context, self.binding = self._load()
        except TlsConfigError as e:
            log.error("the old certificate stays in use", reason=str(e))
            return False
        log.info("certificates were read again", certificate=self._files.certificate)
        return True

    @property
    def asks_certificate(self) -> bool:
        """Whether clients have to have a certificate."""
        return self._files.client_ca is not None

    def _load(self) -> tuple[ssl.SSLContext, bytes | None]:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = tls_version(files.min_version, "tls_min_version")
        context.set_alpn_protocols([ALPN])
        # As PostgreSQL has it: sessions are long, and nothing is gained by resuming them.
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.num_tickets = 0
        load_identity(context, files.certificate, files.key, ("tls_cert", "tls_key"))
        if files.client_ca is not None:
            try:
                context.load_verify_locations(files.client_ca)
            except OSError as e:  # ssl.SSLError is one
                raise TlsConfigError(f"tls_client_ca ({files.client_ca}) can't be used: {e}") from e
            # A client without one is refused after the handshake, with a message that it can show.
            context.verify_mode = ssl.CERT_OPTIONAL
        self._warn_of_readers(files.key)
        return context, channel_binding(_first_certificate(files.certificate))

    @staticmethod
    def _warn_of_readers(key: str) -> None:
        mode = os.stat(key).st_mode
        if mode & (stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP):
            log.warning("the key in tls_key can be read by others", key=key, mode=oct(mode & 0o777))


def channel_binding(certificate: bytes | None) -> bytes | None:
    """Channel binding data for a server's certificate in DER; None where there is nothing to bind to."""
    if certificate is None:
        return None
    try:
        return server_end_point(certificate)
    except ValueError as e:
        # OpenSSL could read it. Without binding a login is what it always was before there was any.
        log.warning("no channel binding for a certificate that can't be read", reason=str(e))
        return None


def _first_certificate(path: str) -> bytes | None:
    """The first certificate of a file in PEM, in DER: the one that clients are shown as ours."""
    with open(path, encoding="latin-1") as f:
        found = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", f.read(), re.DOTALL)
    return ssl.PEM_cert_to_DER_cert(found[0]) if found is not None else None


_ANSWERS: Final = (ANSWER_SSL, ANSWER_NO)


class UpstreamTls:
    """The client role: the upstream's parameters and the context that they ask for, read once and on `reload`.

    Raises TlsConfigError where the files can't be used.
    """

    def __init__(self, parameters: ClientTls) -> None:
        self.parameters = parameters
        self.context = None if parameters.mode is SslMode.DISABLE else parameters.context()

    def reload(self) -> bool:
        """Reads the files again, for the connections to come. If they can't be used the old ones stay; False then."""
        if self.context is None:
            return True
        try:
            self.context = self.parameters.context()
        except TlsConfigError as e:
            log.error("the old certificates for the upstream stay in use", reason=str(e))
            return False
        return True

    async def connect(self, address: Address, factory: Callable[[], Leg], timeout: float) -> Leg:
        """Connects to one address, with TLS as the upstream asks for; never on a Unix-domain socket.

        Raises OSError (ssl.SSLError is one), or TimeoutError after `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            leg = await dial(address, factory, timeout)
            if self.context is None or address.is_socket:
                return leg
            try:
                return await _secure(leg, address, self.parameters, self.context)
            except ssl.SSLCertVerificationError as e:
                failure: OSError = ConnectionRefusedError(
                    f"the server's certificate is not accepted: {e.verify_message}")
            except ssl.SSLError as e:
                failure = ConnectionRefusedError(f"TLS: {(e.reason or str(e)).replace('_', ' ').lower()}")
            except OSError as e:
                failure = e
            if self.parameters.mode is not SslMode.PREFER:
                raise failure
            log.info("TLS to the server failed; connecting without", server=str(address), reason=str(failure))
            return await dial(address, factory, timeout)


async def _secure(leg: Leg, address: Address, parameters: ClientTls, context: ssl.SSLContext) -> Leg:
    """Starts TLS on a fresh connection, or returns it as it is where the server has none and none is needed."""
    try:
        if parameters.negotiation == "postgres":
            answer = await _ask(leg)
            if answer == ANSWER_NO and parameters.mode is SslMode.PREFER:
                return leg
            if answer == ANSWER_NO:
                raise ConnectionRefusedError(
                    f"the server has no TLS, and the upstream says sslmode={parameters.mode.value}")
        name = _server_name(address.server_name or address.host)
        stream = await leg.secure(context, server_side=False, server_hostname=name)
        if parameters.negotiation == "direct" and stream.alpn != ALPN:
            raise ConnectionRefusedError("the server did not agree on PostgreSQL's protocol (ALPN)")
        leg.release(Hold.SECURED)
    except BaseException:
        leg.abort()
        raise
    return leg


async def _ask(leg: Leg) -> bytes:
    """Sends SSLRequest and returns the answer, which is one byte."""
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def on_data(data: bytes) -> None:
        leg.hold(Hold.STARTUP)
        if not answer.done():
            answer.set_result(bytes(data))

    def on_gone() -> None:
        if not answer.done():
            answer.set_exception(ConnectionResetError("the server closed the connection when asked for TLS"))

    leg.on_data, leg.on_eof, leg.on_lost = on_data, on_gone, on_gone
    leg.write([build.ssl_request()])
    try:
        data = await answer
    finally:
        leg.forget()
    # Whatever came with the answer was not protected by the handshake (CVE-2021-23222). An error message that came
    # instead of it is nobody's that we know: not to be shown (CVE-2024-10977).
    if data not in _ANSWERS:
        raise ConnectionResetError("the server's answer to SSLRequest is not one byte S or N")
    leg.release(Hold.STARTUP)
    return data


def _server_name(host: str) -> str | None:
    """The name that the server's certificate is compared with; sent to it unless it is an address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".") or None
    return host
