"""What an HTTP step yields: status, headers and body of the answer as one JSON text (SURFACE 5.1, 5.12)."""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

_TEXT_TYPES = frozenset({
    "application/json", "application/xml", "application/javascript", "application/ecmascript",
    "application/x-www-form-urlencoded", "application/graphql", "application/yaml", "application/x-yaml"})
_TEXT_SUFFIXES = ("+json", "+xml", "+yaml")
_CHARSET = re.compile(r""";\s*charset\s*=\s*(?:"([^"]*)"|([^\s;,"]+))""", re.I)
#: Python codecs that are no charsets of the web.
_NO_CHARSETS = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"})
#: Bytes of a failed call's body that its error shows.
EXCERPT = 512

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response. Header names are in lower case, repeated ones joined."""

    status: int
    headers: dict[str, str]
    content: bytes
    duration_ms: int

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


def join_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers as an object: names in lower case, values of repeated ones joined with `, ` in their order."""
    joined: dict[str, str] = {}
    for name, value in raw:
        key = name.decode("latin-1").lower()
        text = _header_text(value)
        joined[key] = f"{joined[key]}, {text}" if key in joined else text
    return joined


def _header_text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def body_of(content: bytes, content_type: str) -> tuple[str, str]:
    """The body as text, or in base64; and which of the two (`text`, `base64`)."""
    media = re.split("[,;]", content_type, maxsplit=1)[0].strip().lower()
    if media.startswith("text/") or media in _TEXT_TYPES or media.endswith(_TEXT_SUFFIXES):
        return content.decode(_charset(content_type), "replace"), "text"
    if b"\0" not in content:
        try:
            return content.decode("utf-8"), "text"
        except UnicodeDecodeError:
            pass  # binary, then
    return base64.b64encode(content).decode("ascii"), "base64"


def _charset(content_type: str) -> str:
    match = _CHARSET.search(content_type)
    if match is None:
        return "utf-8"
    name = match[1] or match[2] or ""
    try:
        codec = codecs.lookup(name).name
        b"a".decode(codec, "replace")  # some codecs do not make text
    except (LookupError, ValueError):
        return "utf-8"
    return "utf-8" if codec in _NO_CHARSETS else codec


def envelope(answer: Answer) -> str:
    """The JSON text of SURFACE 5.1."""
    body, encoding = body_of(answer.content, answer.headers.get("content-type", ""))
    # Half a surrogate pair can't come out of a decoder that replaces; utf-16 and utf-7 are no exceptions.
    return _encode({"status": answer.status, "body": body, "encoding": encoding, "headers": answer.headers,
                    "ok": answer.ok, "duration_ms": answer.duration_ms})


def excerpt(answer: Answer) -> str:
    """The beginning of a body, for an error (SURFACE 5.12)."""
    body, encoding = body_of(answer.content, answer.headers.get("content-type", ""))
    raw = body.encode("utf-8", "replace")
    if len(raw) <= EXCERPT:
        return body
    unit = "base64 characters" if encoding == "base64" else "bytes"
    return f"{raw[:EXCERPT].decode('utf-8', 'ignore')}... [truncated, {len(raw)} {unit} total]"
