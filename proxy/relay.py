"""Two connections joined: bytes from one go to the other, no faster than it takes them.

A `Leg` is one connection as an asyncio protocol. A `Relay` joins the client's leg and the server's. What is done to the
bytes on their way is the business of the two pumps that it is given (proxy/session.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import Final, Protocol, cast

import structlog

from proxy.upstream import tune
from proxy.wire.tls import TlsStream

log = structlog.get_logger("dfproxy.relay")

#: Seconds of silence after which a connection whose end we have said is closed, and those that this may take at most
#: while the other end goes on sending.
_SILENCE: Final = 1.0
_PATIENCE: Final = 10.0

#: Bytes that may wait to be written to a leg before the other one is no longer read.
DEFAULT_HIGH_WATER = 256 * 1024


class Hold(IntFlag):
    """Why a leg is not being read. It is read again when no reason is left."""

    NONE = 0
    PEER_FULL = 1  #: the other leg's write buffer is full
    BUSY = 2  #: what was read is still being worked on
    STARTUP = 4  #: the other leg is not there yet
    SECURED = 8  #: the TLS handshake is over, and its outcome is yet to be looked at


def _ignore_data(data: bytes) -> None:
    """Data of a leg that nobody listens to any more."""


def _ignore() -> None:
    """An event of a leg that nobody listens to any more."""


class Reader(Protocol):
    """Somebody else than the transport who reads a leg's connection, and may write to it (proxy/fastpath.py).

    What the reader does not want to do itself it leaves to the leg: `send`; `recall` at the end of the stream; `abort`
    where the connection is broken; `failed` for bugs.
    """

    def start(self, leg: Leg, transport: asyncio.Transport, fd: int, /) -> None:
        """Here is the connection, on a descriptor that is closed after `stop`."""

    def resume(self) -> None:
        """Reads from now on."""

    def pause(self) -> None:
        """Does not read for the time being."""

    def stop(self) -> None:
        """Neither reads nor writes any more."""


class Leg(asyncio.Protocol):
    """One connection. Its owner sets the `on_…` callables, which run on the event loop and must not raise."""

    def __init__(self, high_water: int = DEFAULT_HIGH_WATER) -> None:
        self._on_data: Callable[[bytes], None] = _ignore_data
        self.on_eof: Callable[[], None] = _ignore
        self.on_lost: Callable[[], None] = _ignore
        self.on_full: Callable[[], None] = _ignore
        self.on_drained: Callable[[], None] = _ignore
        self._high_water = high_water
        self._holds = Hold.NONE
        self._transport: asyncio.Transport | None = None
        #: Done when the connection is gone.
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False  # the other end has ended its direction
        self._finished = False  # we have ended ours
        self.tls: TlsStream | None = None
        self._handshake: asyncio.Future[None] | None = None
        self._parting: asyncio.TimerHandle | None = None  # the next look at a connection that is about to be closed
        self._heard = False  # something, since the last look
        self._part_by = 0.0  # on the loop's clock
        self._reader: Reader | None = None  # whom the connection is lent to
        self._lent = -1  # its descriptor there
        self._on_recalled: Callable[[], None] = _ignore

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._high_water, low=self._high_water // 4)
        tune(self._transport)
        self._shorten()
        if self._holds:
            self._transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self.tls is None:
            self._on_data(data)
        elif self._parting is not None:
            self._swallow(data)
        else:
            self.tls.feed(data)
            self._decrypt(self.tls)

    def _shorten(self) -> None:
        """Has the transport call the owner itself, while there is nothing to decrypt; else `data_received`."""
        if self.tls is None:
            vars(self)["data_received"] = self._on_data
        else:
            vars(self).pop("data_received", None)
        if self._transport is not None:
            self._transport.set_protocol(self)  # it keeps the method that it has found once

    def eof_received(self) -> bool:
        if self._parting is not None:
            self.close()
            return True
        if self._handshake is not None and not self._handshake.done():
            self._handshake.set_exception(ConnectionResetError("the connection ended during the TLS handshake"))
        self._end()
        return True  # half-open: what is on its way to this leg is still delivered

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self.on_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.recall()
        if self._parting is not None:
            self._parting.cancel()
        if self._handshake is not None and not self._handshake.done():
            self._handshake.set_exception(
                exc or ConnectionResetError("the connection was closed during the TLS handshake"))
        if not self.lost.done():
            self.lost.set_result(None)
        self.on_lost()

    def pause_writing(self) -> None:
        self.on_full()

    def resume_writing(self) -> None:
        self.on_drained()

    # --- TLS ---

    async def secure(
        self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None, received: bytes = b""
    ) -> TlsStream:
        """Starts TLS and returns when the handshake is over; `received` is what was read of it already.

        Nothing is handed on before `release(Hold.SECURED)`, so that the caller can look at the outcome. Raises
        ssl.SSLError or ConnectionError where the handshake fails; the leg can only be closed then.
        """
        self.recall()
        if not self._open:
            raise ConnectionResetError("the connection was closed before the TLS handshake")
        self._handshake = asyncio.get_running_loop().create_future()
        self.tls = TlsStream(context, server_side=server_side, server_hostname=server_hostname)
        self._shorten()
        self.tls.feed(received)
        self._decrypt(self.tls)
        await self._handshake
        return self.tls

    def _decrypt(self, tls: TlsStream) -> None:
        """Goes on with what was fed: the handshake, or data for the owner."""
        try:
            if not tls.established:
                assert self._handshake is not None
                done = tls.handshake()
                self._send_ciphertext(tls)
                if done and not self._handshake.done():
                    self.hold(Hold.SECURED)
                    self._handshake.set_result(None)
            if not tls.established or self._holds & Hold.SECURED:
                return
            plain = tls.read()
            # Reading may have made something to be sent: an answer to a key update, an alert.
            self._send_ciphertext(tls)
        except ssl.SSLError as e:
            self._send_ciphertext(tls)
            self._broken(e)
            return
        if plain:
            self._on_data(plain)
        if tls.ended:
            self._end()

    def _broken(self, error: ssl.SSLError) -> None:
        if self._handshake is not None and not self._handshake.done():
            self._handshake.set_exception(error)
            return
        self._finished = True
        log.info("a TLS connection broke", peer=self.peer, reason=error.reason or str(error))
        self.on_eof()
        self.close()

    def _send_ciphertext(self, tls: TlsStream) -> None:
        data = tls.outgoing()
        if data and self._open:
            cast(asyncio.Transport, self._transport).write(data)

    # --- what the owner calls ---

    @property
    def on_data(self) -> Callable[[bytes], None]:
        """What gets the data."""
        return self._on_data

    @on_data.setter
    def on_data(self, callback: Callable[[bytes], None]) -> None:
        self._on_data = callback
        self._shorten()

    @property
    def peer(self) -> str:
        """The other end's address for a log line, or an empty text."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "")

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The other end's address; None on a Unix-domain socket, or without a connection."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        if not isinstance(name, tuple):
            return None
        address = ipaddress.ip_address(str(name[0]).partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return mapped or address

    def hold(self, reason: Hold) -> None:
        """Stops reading until `release` was called for each reason."""
        if self._parting is not None:
            return
        if not self._holds and self._open:
            cast(asyncio.Transport, self._transport).pause_reading()
            if self._reader is not None:
                self._reader.pause()
        self._holds |= reason

    def release(self, reason: Hold) -> None:
        """Takes one reason away."""
        if not self._holds & reason:
            return
        self._holds &= ~reason
        if reason is Hold.SECURED and self.tls is not None:
            self._decrypt(self.tls)  # what came together with the end of the handshake
        if not self._holds and self._open:
            if self._reader is not None:
                try:
                    self._reader.resume()
                except OSError as e:
                    log.warning("a connection can't be lent any more", peer=self.peer, reason=str(e))
                    self.recall()
            else:
                cast(asyncio.Transport, self._transport).resume_reading()

    # --- lending ---

    def lend(self, reader: Reader, on_recalled: Callable[[], None]) -> bool:
        """Lets somebody else read the connection, until `recall`, which then calls `on_recalled`.

        False, and nothing changes, where there is more to it than reading: TLS, or an end that was said or heard.
        Raises OSError where there is no descriptor left.
        """
        if self.tls is not None or not self._open or self.ended or self._finished or self._reader is not None:
            return False
        transport = cast(asyncio.Transport, self._transport)
        # A descriptor of its own: an event loop does not let anybody else watch the one that its transport has.
        fd = os.dup(transport.get_extra_info("socket").fileno())
        try:
            reader.start(self, transport, fd)
            transport.pause_reading()
            if not self._holds:
                reader.resume()
        except BaseException:
            reader.stop()
            os.close(fd)
            if not self._holds:
                transport.resume_reading()
            raise
        self._reader, self._lent, self._on_recalled = reader, fd, on_recalled
        return True

    def recall(self) -> None:
        """Has the transport read again; nothing where the connection is not lent."""
        if self._reader is None:
            return
        self._reader.stop()
        self._reader = None
        os.close(self._lent)
        if not self._holds and self._open:
            cast(asyncio.Transport, self._transport).resume_reading()
        callback, self._on_recalled = self._on_recalled, _ignore
        callback()

    def failed(self, error: Exception) -> None:
        """Whoever it is lent to found a bug."""
        log.error("serving a connection failed", peer=self.peer, exc_info=error)
        self.abort()

    def write(self, chunks: Sequence[bytes | memoryview]) -> None:
        """Writes, or drops where the connection closes, its direction has ended, or a TLS handshake is under way."""
        if not self._open or self._finished:
            return
        if self.tls is not None:
            if self.tls.established:
                self._write_encrypted(self.tls, chunks)
            return
        transport = cast(asyncio.Transport, self._transport)
        if len(chunks) == 1:
            transport.write(chunks[0])
        else:
            transport.writelines(chunks)

    def send(self, data: bytes) -> None:
        """`write` of one piece, as most are."""
        transport = self._transport
        if self.tls is not None or self._finished or transport is None or transport.is_closing():
            self.write((data,))
        else:
            transport.write(data)

    def _write_encrypted(self, tls: TlsStream, chunks: Sequence[bytes | memoryview]) -> None:
        try:
            tls.write(chunks)
        except ssl.SSLError as e:
            self._broken(e)
        self._send_ciphertext(tls)

    def write_eof(self) -> None:
        """Ends this direction after what was written; the other one stays open."""
        self.recall()
        if self.tls is not None:
            self._end_tls(self.tls)
        elif self._open and not self._finished:
            self._finished = True
            transport = cast(asyncio.Transport, self._transport)
            if transport.can_write_eof():
                transport.write_eof()

    def close(self) -> None:
        """Closes after what was written has been delivered."""
        self.recall()
        if self._transport is not None:
            if self.tls is not None:
                self._end_tls(self.tls)
            self._transport.close()

    def part(self) -> None:
        """Closes after what was written has been delivered, but not into the other end's words.

        Closing a connection while bytes arrive resets it, and the other end may lose what it was told last. So our
        direction is ended first, and what still comes is swallowed until the other end closes or has been silent.
        """
        self.recall()
        if self._parting is not None:
            return
        if not self._open or self.ended or (self._handshake is not None and not self._handshake.done()):
            self.close()
            return
        self.on_data = self._swallow
        self.on_eof = self.on_full = self.on_drained = _ignore
        self.write_eof()
        self._finished = True
        transport = cast(asyncio.Transport, self._transport)
        if self.tls is not None and transport.can_write_eof():
            transport.write_eof()
        if self._holds:
            self._holds = Hold.NONE
            transport.resume_reading()
        loop = asyncio.get_running_loop()
        self._part_by = loop.time() + _PATIENCE
        self._parting = loop.call_later(_SILENCE, self._look)

    def _swallow(self, data: bytes) -> None:
        self._heard = True

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if self._heard and loop.time() < self._part_by:
            self._heard = False
            self._parting = loop.call_later(_SILENCE, self._look)
        else:
            self.close()

    def _end_tls(self, tls: TlsStream) -> None:
        """Tells the other end, in TLS's own words, that this was all; anybody could cut it short otherwise."""
        if not tls.established or not self._open or self._finished:
            return
        self._finished = True
        try:
            tls.write_eof()
        except ssl.SSLError as e:
            log.debug("a TLS connection can't be ended properly", peer=self.peer, reason=e.reason or str(e))
        self._send_ciphertext(tls)

    def forget(self) -> None:
        """Takes all `on_…` callables away."""
        self.on_data = _ignore_data
        self.on_eof = self.on_lost = self.on_full = self.on_drained = _ignore

    def abort(self) -> None:
        """Closes at once."""
        self.recall()
        if self._transport is not None:
            self._transport.abort()

    @property
    def _open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()


class Relay:
    """Joins two legs until both are gone.

    `to_server` and `to_client` take what was read and call `write` of the opposite leg.
    """

    def __init__(
        self, client: Leg, server: Leg, to_server: Callable[[bytes], None], to_client: Callable[[bytes], None]
    ) -> None:
        self.client = client
        self.server = server
        client.on_data, server.on_data = to_server, to_client
        client.on_full, client.on_drained = lambda: server.hold(Hold.PEER_FULL), lambda: server.release(Hold.PEER_FULL)
        server.on_full, server.on_drained = lambda: client.hold(Hold.PEER_FULL), lambda: client.release(Hold.PEER_FULL)
        # The client's end of stream only ends its direction: replies to what it sent are still on their way.
        client.on_eof, client.on_lost = server.write_eof, server.close
        # Without a server there is nothing more to say to either side.
        server.on_eof, server.on_lost = self.close, client.part
        # What happened while they were not joined yet.
        if client.lost.done() or server.lost.done() or server.ended:
            self.close()
        elif client.ended:
            server.write_eof()

    async def finished(self) -> None:
        """Returns when both legs are gone."""
        await self.client.lost
        await self.server.lost

    def close(self) -> None:
        """Ends both legs after what was written to them has been delivered."""
        self.client.part()
        self.server.close()
