"""From a step's config, after substitution, to the request that is sent (SURFACE 1.2, 5.12 and Part I "HTTP")."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx

from dsl.values import parse_json
from engine.http.charset import codec_of
from engine.http.decoding import ACCEPTED
from engine.http.errors import TOO_LARGE, BlockedError, HttpError, RequestError
from engine.http.masking import NOTHING, Mask
from engine.http.policy import HttpPolicy
from engine.http.url import MASK, Url, authority_of, parse, redact

METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})
MULTIPART_METHODS = frozenset({"POST", "PUT", "PATCH"})
DEFAULT_TIMEOUT = 30.0
#: They are part of how a request is sent; setting them is how requests are smuggled.
REFUSED_HEADERS = frozenset({
    "host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect",
    "proxy-authorization", "proxy-connection", "http2-settings"})
#: Characters of names and values together. Servers take some 8 to 64 KiB.
LONGEST_HEADERS = 128 * 1024
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MEDIA_TYPE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+( *;[\x20-\x7e]*)?")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_SPACE = re.compile(rb"[ \t\n\x0b\x0c\r]+")


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is ready to be sent. `timeout` in seconds is for the whole exchange."""

    kind: str  #: HTTP or HTTP_MULTIPART, for messages
    target: Url
    request: httpx.Request
    timeout: float
    shown: str  #: the URL, for messages
    mask: Mask  #: for all else in messages


def build(config: Mapping[str, Any], *, multipart: bool, policy: HttpPolicy, idempotency_key: str, agent: str,
          hidden: Iterable[str] = (), shown: str | None = None, mask: Mask = NOTHING) -> Call:
    """A call from a config as `dsl.graph.Node.http` guarantees it. Raises BlockedError, RequestError."""
    secret_host = shown is not None and MASK in authority_of(shown)
    try:
        target = parse(config["url"])
        policy.check_scheme(target.scheme)
        policy.check_host(target.host)
    except HttpError as e:
        if not secret_host:
            raise
        # The reason quotes the URL.
        text = "the URL that a secret variable makes can't be called"
        if isinstance(e, BlockedError):
            raise BlockedError(f"{text}.", "See whether it is one, and which hosts http_allow names.") from None
        raise RequestError(f"HTTP request failed: {text}", e.sqlstate) from None
    if secret_host:
        mask = mask.and_also(target.host_text)
    method = config["method"].upper()
    allowed = MULTIPART_METHODS if multipart else METHODS
    if method not in allowed:
        known = "POST, PUT, or PATCH" if multipart else "GET, POST, PUT, DELETE, or PATCH"
        what = "HTTP method for multipart" if multipart else "HTTP method"
        raise RequestError(f"Invalid {what}: {method[:40]}. Must be {known}")
    headers = _headers(config.get("headers") or {})
    names = {name.lower() for name, _ in headers}
    content: bytes | None
    if multipart:
        headers = [(n, v) for n, v in headers if n.lower() != "content-type"]
        content_type, content = _multipart(config["parts"], idempotency_key)
        headers.append(("Content-Type", content_type))
    else:
        content = _body(config.get("body"), headers)
        if content is not None and "content-type" not in names and _is_json(content):
            headers.append(("Content-Type", "application/json"))
    if content is not None and len(content) > policy.max_request_bytes:
        raise RequestError(f"HTTP request failed: the request body has {len(content)} bytes, more than "
                           f"http_max_request_bytes ({policy.max_request_bytes})", TOO_LARGE)
    length = sum(len(n) + len(v) for n, v in headers)
    if length > LONGEST_HEADERS:
        raise RequestError(f"HTTP request failed: the headers have {length} characters, more than {LONGEST_HEADERS}",
                           TOO_LARGE)
    for name, value in (("User-Agent", agent), ("Accept", "*/*"), ("Accept-Encoding", ACCEPTED),
                        ("Idempotency-Key", idempotency_key)):
        if name.lower() not in names:
            headers.append((name, value))
    encoded = [(n.encode("ascii"), v.encode("utf-8")) for n, v in headers]
    timeout = float(min(config.get("timeout_seconds") or DEFAULT_TIMEOUT, policy.max_timeout))
    request = httpx.Request(method, target.url, headers=encoded, content=content)
    return Call("HTTP_MULTIPART" if multipart else "HTTP", target, request, timeout,
                redact(str(target.url), hidden) if shown is None else shown, mask)


def _headers(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    headers = []
    for name, value in given.items():
        if not _TOKEN.fullmatch(name):
            raise RequestError(f"HTTP request failed: header name '{name[:80]}' is not valid")
        if name.lower() in REFUSED_HEADERS:
            raise RequestError(f"HTTP request failed: header '{name}' cannot be set",
                               hint="It is part of how the request is sent.")
        if isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, int | Decimal):
            text = str(value)
        elif isinstance(value, str):
            text = value.strip(" \t")
        else:
            raise RequestError(f"HTTP request failed: the value of header '{name}' must be a string, a number or a "
                               "boolean")
        if _CONTROL.search(text):
            raise RequestError(f"HTTP request failed: the value of header '{name}' has a control character")
        headers.append((name, _encodable(text, f"the value of header '{name}'")))
    return headers


def _encodable(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"HTTP request failed: {what} has half of a surrogate pair") from None
    return text


def _body(body: str | None, headers: list[tuple[str, str]]) -> bytes | None:
    """In the charset that Content-Type declares; UTF-8 where it declares none, or one that nobody knows."""
    if body is None:
        return None
    declared = next((value for name, value in headers if name.lower() == "content-type"), "")
    codec = codec_of(declared)
    try:
        return _encodable(body, "the body").encode(codec)
    except UnicodeEncodeError as e:
        raise RequestError("HTTP request failed: the body has a character that the charset of its Content-Type does "
                           f"not have: U+{ord(body[e.start]):04X}") from None


def _is_json(content: bytes) -> bool:
    try:
        parse_json(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _multipart(parts: list[dict[str, Any]], idempotency_key: str) -> tuple[str, bytes]:
    """Content-Type and body. The boundary follows from the key: every attempt sends the same bytes."""
    files = []
    for part in parts:
        name = part["name"]
        try:
            data = base64.b64decode(_SPACE.sub(b"", part["data_b64"].encode("ascii")), validate=True)
        except (binascii.Error, UnicodeEncodeError) as e:
            reason = "not ASCII" if isinstance(e, UnicodeEncodeError) else str(e)
            raise RequestError(f"Invalid base64 in part '{name}': {reason}") from None
        filename, content_type = part.get("filename"), part.get("content_type")
        if content_type is not None and not _MEDIA_TYPE.fullmatch(content_type):
            raise RequestError(f"Invalid content_type for part '{name}': not a media type")
        for text in (name, filename or ""):
            _encodable(text, f"part '{name}'")
        if content_type is None and filename is not None:
            content_type = "application/octet-stream"
        files.append((name, (filename, data, content_type)))
    everything = [data for _, (_, data, _) in files]
    boundary = hashlib.sha256(idempotency_key.encode()).hexdigest()[:40]
    while any(boundary.encode() in data for data in everything):
        boundary = hashlib.sha256(boundary.encode()).hexdigest()[:40]
    content_type = f"multipart/form-data; boundary={boundary}"
    request = httpx.Request("POST", "http://unused", headers={"Content-Type": content_type}, files=files)
    return content_type, request.read()
