"""Which of the upstream's hosts a new session goes to, where `target_session_attrs` does not leave it to the order.

A relayed login can't be taken back and done again with another server: who that is has to be right beforehand. So the
proxy looks at each host with a login of its own, that of the upstream's connection string, and remembers for seconds
what it saw. Sessions report what their server says about itself, which costs nothing: a promotion is known at once, and
where there is no login of its own the proxy goes by these reports alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import structlog

from proxy.relay import Leg
from proxy.tls import UpstreamTls, channel_binding
from proxy.upstream import Address, DialError, Login, SessionAttributes, Upstream
from proxy.wire import backend, build
from proxy.wire.auth import AuthenticationError, ClientAuth
from proxy.wire.frames import Frame, FrameParser, ProtocolError
from proxy.wire.messages import MAX_AUTH_MESSAGE, Authentication, Backend

log = structlog.get_logger("dfproxy.hosts")

#: Seconds for which what was seen of the hosts is gone by.
FRESH: Final = 2.0
#: Seconds for which hosts that stand before one that will do in the upstream may still answer.
_GRACE: Final = 0.25
#: Seconds between surveys, whatever happens.
_PAUSE: Final = 0.1
#: Bytes of a server that has not finished greeting yet.
_MAX_GREETING: Final = 1024 * 1024
#: Classes of SQLSTATE (53 resources, 57 operator's intervention) with which a server says that it can't now.
_NOT_NOW: Final = ("53", "57")


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a host. `standby` None: nothing; `reason` says why, or why it can't be used."""

    at: float
    standby: bool | None = None
    read_only: bool = False
    away: bool = False
    reason: str = ""

    def __str__(self) -> str:
        if self.standby is None:
            return self.reason
        return "a standby" if self.standby else "a primary whose transactions are read-only" if self.read_only \
            else "a primary"


class _LookError(Exception):
    """A host that was reached does not let itself be looked at. `away`: it takes nobody now."""

    def __init__(self, reason: str, *, away: bool = False) -> None:
        super().__init__(reason)
        self.away = away


class Hosts:
    """The upstream's hosts, for all sessions of a process."""

    def __init__(self, upstream: Upstream, tls: UpstreamTls) -> None:
        self._upstream = upstream
        self._tls = tls
        self._seen: dict[Address, Seen] = {}
        self._surveying = asyncio.Lock()
        self._surveyed = self._exhausted = float("-inf")  # the last survey; the last one that looked at every host
        self._locked: set[Address] = set()  # those that our login is no good for

    async def dial(self, factory: Callable[[], Leg]) -> tuple[Leg, Address]:
        """Connects to a host that will do, as far as is known. Raises DialError where there is none."""
        upstream = self._upstream
        if upstream.wanted is SessionAttributes.ANY or len(upstream.addresses) == 1:
            return await upstream.dial(factory, self._tls.connect)
        if not self._fresh():
            await self._survey()
        for last in (False, True):
            for address in self._candidates():
                try:
                    return await self._tls.connect(address, factory, upstream.connect_timeout), address
                except OSError as e:  # TimeoutError is one
                    self._seen[address] = Seen(time.monotonic(), away=True, reason=self._say(e))
            if last or upstream.login is None:
                break
            await self._survey()
        known = "; ".join(f"{a}: {self._seen.get(a, 'unknown')}" for a in upstream.addresses)
        raise DialError(f"no host of the upstream is {upstream.wanted.value} ({known})")

    def reported(self, address: Address, standby: bool) -> bool:
        """A session's server says whether it is a standby (ParameterStatus in_hot_standby); whether it will do.

        That transactions are read-only by default is not asked of a session: its own role or options may say so.
        """
        wanted = self._upstream.wanted
        if wanted is SessionAttributes.ANY:
            return True
        known = self._seen.get(address)
        if known is None or known.standby is not standby:
            log.info("a host changed", host=str(address), standby=standby)
            self._seen[address] = Seen(time.monotonic(), standby)
        return wanted.suits(standby) or wanted is SessionAttributes.READ_ONLY

    def _say(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self._upstream.connect_timeout:g} s"
        return error.strerror or str(error)

    # --- choosing ---

    def _suits(self, seen: Seen | None) -> bool:
        return seen is not None and seen.standby is not None and self._upstream.wanted.suits(
            seen.standby, seen.read_only)

    def _first_choice(self, seen: Seen | None) -> bool:
        """Whether nothing better can be found."""
        preferred = self._upstream.wanted is not SessionAttributes.PREFER_STANDBY
        return self._suits(seen) and (preferred or (seen is not None and seen.standby is True))

    def _fresh(self) -> bool:
        """Whether what is known is recent, and enough to choose by."""
        if self._upstream.login is None:
            return True
        return self._surveyed > time.monotonic() - FRESH and any(
            self._suits(s) or (s.standby is None and not s.away) for s in self._seen.values())

    def _candidates(self) -> Iterator[Address]:
        """The hosts to try, best first: what suits, what nothing is known of, what will do if it must."""
        addresses = self._upstream.addresses
        yield from [a for a in addresses if self._first_choice(self._seen.get(a))]
        yield from [a for a in addresses if self._unknown(a)]
        yield from [a for a in addresses if self._suits(s := self._seen.get(a)) and not self._first_choice(s)]

    def _unknown(self, address: Address) -> bool:
        seen = self._seen.get(address)
        if seen is None:
            return self._upstream.login is None  # otherwise a look is yet to come
        if seen.standby is None and not seen.away:
            return True
        if self._suits(seen) or not (self._upstream.login is None or address in self._locked):
            return False
        # A host that can't be looked at may have changed since a session reported what it was.
        return seen.away or seen.at < time.monotonic() - FRESH

    # --- looking ---

    async def _survey(self) -> None:
        """Looks at all hosts at once, and returns as soon as one is known that will do."""
        login = self._upstream.login
        if login is None:
            return
        asked = time.monotonic()
        async with self._surveying:
            if max(self._surveyed, self._exhausted + _PAUSE) >= asked:
                return  # somebody else has just done it
            addresses = self._upstream.addresses
            started = time.monotonic()
            async with asyncio.TaskGroup() as group:
                tasks = {group.create_task(self._look(address, login)): address for address in addresses}
                pending, found = set(tasks), False
                while pending:
                    done, pending = await asyncio.wait(
                        pending, timeout=_GRACE if found else None, return_when=asyncio.FIRST_COMPLETED)
                    found = found or any(self._first_choice(self._seen.get(tasks[t])) for t in done)
                    if found and (not done or self._decided({tasks[t] for t in pending})):
                        break
                for task in pending:
                    task.cancel()
            self._surveyed = started
            if not pending:
                self._exhausted = started

    def _decided(self, pending: set[Address]) -> bool:
        """Whether the first host that will do, in the upstream's order, is known."""
        for address in self._upstream.addresses:
            if address in pending:
                return False
            if self._first_choice(self._seen.get(address)):
                return True
        return False

    async def _look(self, address: Address, login: Login) -> None:
        timeout = self._upstream.connect_timeout
        try:
            async with asyncio.timeout(timeout):
                standby, read_only = await _look(await self._tls.connect(address, Leg, timeout), login)
        except OSError as e:  # TimeoutError is one
            seen = Seen(time.monotonic(), away=True, reason=self._say(e))
        except (_LookError, AuthenticationError, ProtocolError) as e:
            if not (isinstance(e, _LookError) and e.away):
                self._cannot_look(address, str(e))
                return
            seen = Seen(time.monotonic(), away=True, reason=str(e))
        else:
            seen = Seen(time.monotonic(), standby, read_only)
            self._locked.discard(address)
        before, self._seen[address] = self._seen.get(address), seen
        if before is None or str(before) != str(seen):
            log.info("a host was looked at", host=str(address), found=str(seen))

    def _cannot_look(self, address: Address, reason: str) -> None:
        """What sessions have reported of the host is all there is."""
        if address not in self._locked:
            self._locked.add(address)
            log.warning("a host can't be looked at; sessions will have to find out what it is", host=str(address),
                        reason=reason)
        seen = self._seen.get(address)
        if seen is None or seen.standby is None:
            self._seen[address] = Seen(time.monotonic(), reason=reason)


class _Reader:
    """Whole messages from a leg."""

    def __init__(self, leg: Leg) -> None:
        self._parser = FrameParser(MAX_AUTH_MESSAGE)
        self._size = 0
        self._gone = False
        self._news = asyncio.Event()
        leg.on_data, leg.on_eof, leg.on_lost = self._feed, self._end, self._end

    def _feed(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > _MAX_GREETING:
            self._gone = True
        else:
            self._parser.feed(data)
        self._news.set()

    def _end(self) -> None:
        self._gone = True
        self._news.set()

    async def next(self) -> Frame:
        """The next message. Raises ConnectionResetError where there is none, ProtocolError."""
        while (frame := self._parser.next_frame()) is None:
            if self._gone:
                raise ConnectionResetError("the server closed the connection")
            self._news.clear()
            await self._news.wait()
        return frame


async def _look(leg: Leg, login: Login) -> tuple[bool, bool]:
    """Logs in, and returns whether the server is a standby and whether its transactions are read-only by default."""
    reader = _Reader(leg)
    certificate = leg.tls.peer_certificate if leg.tls is not None else None
    auth = ClientAuth(login.user, login.password, channel_binding(certificate))
    parameters: dict[str, str] = {}
    try:
        leg.write([build.startup(
            {"user": login.user, "database": login.database, "application_name": "dfproxy:hosts"})])
        while True:
            frame = await reader.next()
            match frame.type:
                case Backend.AUTHENTICATION if backend.authentication_code(frame.payload) != Authentication.OK:
                    answer = await asyncio.to_thread(auth.respond, frame.payload)
                    if answer:
                        leg.write([answer])
                case Backend.AUTHENTICATION:
                    auth.respond(frame.payload)
                case Backend.PARAMETER_STATUS:
                    name, value = backend.parameter_status(frame.payload)
                    parameters[name] = value
                case Backend.ERROR_RESPONSE:
                    fields = backend.error_fields(frame.payload)
                    raise _LookError(fields.get("M", "an error"), away=fields.get("C", "")[:2] in _NOT_NOW)
                case Backend.READY_FOR_QUERY:
                    break
        leg.write([build.terminate()])
    finally:
        leg.forget()
        leg.close()
    return parameters.get("in_hot_standby") == "on", parameters.get("default_transaction_read_only") == "on"
