"""A client and a server that talk through the codec without I/O: each follows the protocol's tables, and they must agree."""

from __future__ import annotations

from proxy.wire.backend import authentication_code
from proxy.wire.frames import Frame, FrameParser, StartupPacket, StartupParser
from proxy.wire.messages import Backend, Frontend
from proxy.wire.states import Conversation, Event, Phase, Startup, packet_event, server_event


class End:
    """One end: what it has received, and where it thinks that the connection stands."""

    def __init__(self) -> None:
        self.startup = Startup()
        self.conversation: Conversation[str] = Conversation(started=False)
        self.packets = StartupParser()
        self.frames = FrameParser()
        self.got: list[Frame | StartupPacket] = []


class ConnectionPair:
    """`client` and `server` ends. What one sends goes through both state machines and, byte by byte, through the other's parser."""

    def __init__(self) -> None:
        self.client, self.server = End(), End()

    @property
    def phase(self) -> Phase:
        assert self.client.startup.phase is self.server.startup.phase
        return self.client.startup.phase

    @property
    def ends(self) -> tuple[End, End]:
        return self.client, self.server

    def packet(self, data: bytes) -> StartupPacket:
        """The client sends a packet without a type."""
        for i in range(len(data)):
            self.server.packets.feed(data[i : i + 1])
            packet = self.server.packets.next_packet()
        assert packet is not None
        for end in self.ends:
            end.startup.advance(packet_event(packet))
        return packet

    def answer(self, accepted: bool) -> None:
        """The server's one byte."""
        for end in self.ends:
            end.startup.advance(Event.ACCEPTANCE if accepted else Event.REFUSAL)

    def from_client(self, data: bytes, tag: str | None = None) -> None:
        """The client sends one message."""
        frame = self._through(self.server, data)
        for end in self.ends:
            if frame.type == Frontend.PASSWORD:
                end.startup.advance(Event.PASSWORD_MESSAGE)
            else:
                end.conversation.sent(frame.type, tag)

    def from_server(self, data: bytes) -> str | None:
        """The server sends one message. Returns the tag of the request that it completes."""
        frame = self._through(self.client, data)
        code = authentication_code(frame.payload) if frame.type == Backend.AUTHENTICATION else None
        done = []
        for end in self.ends:
            done.append(end.conversation.received(frame.type))
            if end.startup.phase is not Phase.READY:
                end.startup.advance(server_event(frame.type, code))
        assert done[0] == done[1]
        return done[0].tag if done[0] is not None else None

    def current(self) -> str | None:
        """The tag of the request that an error would be about now."""
        requests = [end.conversation.current for end in self.ends]
        assert requests[0] == requests[1]
        return requests[0].tag if requests[0] is not None else None

    @staticmethod
    def _through(end: End, data: bytes) -> Frame:
        for i in range(len(data)):
            end.frames.feed(data[i : i + 1])
            frame = end.frames.next_frame()
        assert frame is not None
        end.got.append(frame)
        return frame
