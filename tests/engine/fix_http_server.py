"""A loopback HTTP server that misbehaves on request: HTTP/1.1 by h11, HTTP/2 over TLS by h2.

What it does is said by the path: see `ANSWERS`. Every request that arrived whole is in `requests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import ipaddress
import json
import socket
import ssl
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import brotli
import h2.config
import h2.connection
import h2.events
import h11
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Seen:
    """A request as the server got it. Header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    version: str = "1.1"

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def query(self, name: str, default: str = "") -> str:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True).get(name, [default])[0]


@dataclass
class HttpServer:
    """A running server. `connections` counts those accepted, `gone` those that the client dropped in mid-call."""

    port: int = 0
    scheme: str = "http"
    requests: list[Seen] = field(default_factory=list)
    connections: int = 0
    gone: int = 0
    parallel: int = 0
    most_parallel: int = 0
    protocols: list[str | None] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)  #: what /gate waits for
    live: int = 0  #: connections that are open
    raw: bytes = b""  #: what /raw answers with, byte for byte, before it closes

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"


Answer = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request and the raw connection to answer on."""

    def __init__(self, server: HttpServer, seen: Seen, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
        self.server = server
        self.seen = seen
        self.writer = writer
        self.reader = reader
        self.keep = True

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int = 200, body: bytes = b"", *headers: tuple[str, str], length: int | None = None) -> None:
        head = f"HTTP/1.1 {status} Whatever\r\n"
        for name, value in headers:
            head += f"{name}: {value}\r\n"
        head += f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
        await self.raw(head.encode("utf-8") + (b"" if self.seen.method == "HEAD" else body))

    def reset(self) -> None:
        """Ends the connection with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        self.keep = False

    def close(self) -> None:
        self.writer.close()
        self.keep = False


def described(seen: Seen) -> bytes:
    return json.dumps({"method": seen.method, "target": seen.target, "headers": seen.headers,
                       "body": seen.body.decode("utf-8", "replace")}).encode()


async def _echo(x: Exchange) -> None:
    await x.answer(200, described(x.seen), ("Content-Type", "application/json"))


async def _status(x: Exchange) -> None:
    await x.answer(int(x.seen.path.rsplit("/", 1)[1]), x.seen.query("body").encode(), ("Content-Type", "text/plain"))


async def _body(x: Exchange) -> None:
    """The request's body comes back, under ?type=."""
    kind = x.seen.query("type")
    await x.answer(200, x.seen.body, *([("Content-Type", kind)] if kind else []))


async def _hex(x: Exchange) -> None:
    """?hex= as bytes, under ?type=."""
    kind = x.seen.query("type")
    await x.answer(200, bytes.fromhex(x.seen.query("hex")), *([("Content-Type", kind)] if kind else []))


async def _encoded(x: Exchange) -> None:
    """?n= bytes of `a`, in ?encoding=."""
    plain = b"a" * int(x.seen.query("n"))
    encoding = x.seen.query("encoding")
    for one in encoding.split(","):
        plain = {"gzip": lambda d: gzip.compress(d, 9), "br": lambda d: brotli.compress(d, quality=5), "deflate": zlib.compress,
                 "raw": lambda d: zlib.compressobj(9, zlib.DEFLATED, -15).compress(d), "identity": lambda d: d,
                 "zstd": lambda d: d, "members": lambda d: gzip.compress(d[:10]) + gzip.compress(d[10:]),
                 "corrupt": lambda d: b"\x1f\x8b" + b"x" * 20, "cut": lambda d: gzip.compress(d)[:-9]}[one.strip()](plain)
    named = encoding.replace("raw", "deflate").replace("members", "gzip").replace("corrupt", "gzip").replace("cut", "gzip")
    if "raw" in encoding:
        flusher = zlib.compressobj(9, zlib.DEFLATED, -15)
        plain = flusher.compress(b"a" * int(x.seen.query("n"))) + flusher.flush()
    await x.answer(200, plain, ("Content-Encoding", named), ("Content-Type", "text/plain"))


async def _slow_headers(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 200 OK\r\n")
    await _until_gone(x)


async def _slow_body(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
    await _until_gone(x)


async def _drip(x: Exchange) -> None:
    """A byte now and then: no single wait is long."""
    await x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    with contextlib.suppress(OSError):
        while not x.reader.at_eof():
            await x.raw(b"x")
            await asyncio.sleep(0.02)
    x.server.gone += 1
    x.close()


async def _hang(x: Exchange) -> None:
    await _until_gone(x)


async def _until_gone(x: Exchange) -> None:
    with contextlib.suppress(OSError):
        await x.reader.read()
    x.server.gone += 1
    x.close()


async def _reset(x: Exchange) -> None:
    x.reset()


async def _close(x: Exchange) -> None:
    x.close()


async def _truncated(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    x.close()


async def _short(x: Exchange) -> None:
    await x.answer(200, b"hello", length=10)
    x.close()


async def _long(x: Exchange) -> None:
    await x.answer(200, b"hello, and more than that", length=5)


async def _reset_in_body(x: Exchange) -> None:
    await x.answer(200, b"hello", length=10)
    await asyncio.sleep(0.05)
    x.reset()


async def _continue(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    await _echo(x)


async def _no_content_with_body(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello")


async def _switch(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n\x81\x05")


async def _rubbish(x: Exchange) -> None:
    await x.raw(b"SSH-2.0-OpenSSH_9.6\r\n")
    x.close()


async def _redirect(x: Exchange) -> None:
    await x.answer(302, b"", ("Location", "/echo"))


async def _cookie(x: Exchange) -> None:
    await x.answer(200, described(x.seen), ("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2"), ("X-One", "1"), ("x-one", "2"))


async def _many_headers(x: Exchange) -> None:
    await x.raw(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"v" * 1000) for n in range(1000)) + b"\r\n")
    x.close()


async def _endless(x: Exchange) -> None:
    """More than anybody wants, without saying so before."""
    await x.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n" % 65536 + b"x" * 65536 + b"\r\n"
    with contextlib.suppress(OSError):
        while True:
            await x.raw(chunk)
    x.server.gone += 1
    x.close()


async def _until_close(x: Exchange) -> None:
    await x.raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nto the end")
    x.close()


async def _latency(x: Exchange) -> None:
    await asyncio.sleep(float(x.seen.query("s", "0.05")))
    await x.answer(200, b"ok", ("Content-Type", "text/plain"))


async def _gate(x: Exchange) -> None:
    await x.server.open.wait()
    await x.answer(200, b"through", ("Content-Type", "text/plain"))


async def _stale(x: Exchange) -> None:
    """Answers, keeps the connection, and closes it at the next request without a word."""
    await x.answer(200, b"fresh", ("Content-Type", "text/plain"))
    await x.reader.read(1)
    x.reset()


async def _timeout_notice(x: Exchange) -> None:
    """Answers, and then says what nobody asked for, as some servers do before they close an idle connection."""
    await x.answer(200, b"fresh", ("Content-Type", "text/plain"))
    await x.server.open.wait()
    await x.answer(408, b"too late")
    x.close()


async def _raw(x: Exchange) -> None:
    await x.raw(x.server.raw)
    x.close()


ANSWERS: dict[str, Answer] = {
    "/echo": _echo, "/status/": _status, "/body": _body, "/hex": _hex, "/encoded": _encoded, "/slow-headers": _slow_headers,
    "/slow-body": _slow_body, "/drip": _drip, "/hang": _hang, "/reset": _reset, "/close": _close, "/truncated": _truncated,
    "/short": _short, "/long": _long, "/reset-in-body": _reset_in_body, "/continue": _continue,
    "/no-content-with-body": _no_content_with_body, "/switch": _switch, "/rubbish": _rubbish, "/redirect": _redirect,
    "/cookie": _cookie, "/many-headers": _many_headers, "/endless": _endless, "/until-close": _until_close, "/latency": _latency,
    "/gate": _gate, "/stale": _stale, "/timeout-notice": _timeout_notice, "/raw": _raw,
}


async def _serve(server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    connection = h11.Connection(h11.SERVER)
    seen: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(65536)
            if not data and seen is None:
                return
            connection.receive_data(data)
        elif isinstance(event, h11.Request):
            seen, body = event, b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert seen is not None
            headers = {n.decode(): v.decode("utf-8", "replace") for n, v in seen.headers}
            request = Seen(seen.method.decode(), seen.target.decode(), headers, body)
            server.requests.append(request)
            exchange = Exchange(server, request, writer, reader)
            await _reply(server, exchange)
            if not exchange.keep:
                return
            # Answers were written by hand: tell h11 that there was one.
            connection = h11.Connection(h11.SERVER)
            seen = None
        else:
            return


async def _reply(server: HttpServer, exchange: Exchange) -> None:
    path = exchange.seen.path
    found = max((p for p in ANSWERS if path == p or (p.endswith("/") and path.startswith(p))), key=len, default=None)
    server.parallel += 1
    server.most_parallel = max(server.most_parallel, server.parallel)
    try:
        if found is None:
            await exchange.answer(404, b"no such path", ("Content-Type", "text/plain"))
        else:
            await ANSWERS[found](exchange)
    finally:
        server.parallel -= 1


async def _serve_h2(server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    writer.write(connection.data_to_send())
    heads: dict[int, dict[str, str]] = {}
    bodies: dict[int, bytes] = {}
    unsent: dict[int, bytes] = {}
    while data := await reader.read(65536):
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.StreamEnded) and event.stream_id and heads[event.stream_id][":path"] == "/raw":
                writer.write(connection.data_to_send() + server.raw)
                await writer.drain()
                return writer.close()
            if isinstance(event, h2.events.RequestReceived):
                assert event.stream_id is not None
                heads[event.stream_id] = {_text(n): _text(v) for n, v in event.headers or ()}
                bodies[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                bodies[event.stream_id] += event.data or b""
                connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                assert event.stream_id is not None
                unsent[event.stream_id] = _reply_h2(server, connection, event.stream_id, heads.pop(event.stream_id),
                                                    bodies.pop(event.stream_id))
        for stream, content in list(unsent.items()):
            unsent[stream] = _send_h2(connection, stream, content)
            if not unsent[stream]:
                del unsent[stream]
        writer.write(connection.data_to_send())
        await writer.drain()
    if heads or server.parallel:
        server.gone += 1
        server.parallel = 0


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _reply_h2(server: HttpServer, connection: h2.connection.H2Connection, stream: int, head: dict[str, str], body: bytes) -> bytes:
    """Begins to answer; returns the body that is to be sent."""
    seen = Seen(head[":method"], head[":path"], head, body, "2")
    server.requests.append(seen)
    if seen.path == "/hang":
        server.parallel += 1
        return b""
    if seen.path == "/reset":
        connection.reset_stream(stream, 2)
        return b""
    if seen.path == "/goaway":
        connection.close_connection()
        return b""
    status = seen.path.rsplit("/", 1)[1] if seen.path.startswith("/status/") else "200"
    connection.send_headers(stream, [(":status", status), ("content-type", "application/json")])
    return described(seen)


def _send_h2(connection: h2.connection.H2Connection, stream: int, content: bytes) -> bytes:
    """Sends as much as the client has room for; returns the rest."""
    while content and (room := min(connection.local_flow_control_window(stream), connection.max_outbound_frame_size)) > 0:
        connection.send_data(stream, content[:room], end_stream=len(content) <= room)
        content = content[room:]
    return content


@contextlib.asynccontextmanager
async def http_server(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[HttpServer]:
    """Serves on 127.0.0.1 (and ::1, on the same port, where there is IPv6)."""
    server = HttpServer(scheme="https" if tls else "http")
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        server.connections += 1
        server.live += 1
        ssl_object = writer.get_extra_info("ssl_object")
        protocol = ssl_object.selected_alpn_protocol() if ssl_object else None
        server.protocols.append(protocol)
        try:
            # asyncio's server complains of cancelled handlers.
            with contextlib.suppress(OSError, h11.RemoteProtocolError, asyncio.CancelledError):
                await (_serve_h2 if protocol == "h2" else _serve)(server, reader, writer)
        finally:
            tasks.discard(task)
            server.live -= 1
            writer.transport.abort()

    if tls is not None:
        def server_name(_: Any, name: str | None, __: Any) -> None:
            server.server_names.append(name)
        tls.sni_callback = server_name
    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls, backlog=2048)
    server.port = listener.sockets[0].getsockname()[1]
    six = None
    with contextlib.suppress(OSError):
        six = await asyncio.start_server(accept, "::1", server.port, ssl=tls)
    try:
        yield server
    finally:
        for one in (listener, six):
            if one is not None:
                one.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate that is its own authority."""

    file: Path

    def server_context(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


def make_certificate(folder: Path, *names: str) -> Certificate:
    """For DNS names and addresses."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dfproxy test")])
    kinds: list[x509.GeneralName] = []
    for name in names:
        try:
            kinds.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            kinds.append(x509.DNSName(name))
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1)).add_extension(x509.SubjectAlternativeName(kinds), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256()))
    file = folder / "certificate.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM))
    return Certificate(file)
