"""What an HTTP step yields: status, headers and body of the answer as one JSON text (SURFACE 5.1, 5.12)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from engine.http.charset import codec_of
from engine.http.masking import NOTHING, Mask
from engine.http.url import MASK

_TEXT_TYPES = frozenset({
    "application/json", "application/xml", "application/javascript", "application/ecmascript",
    "application/x-www-form-urlencoded", "application/graphql", "application/yaml", "application/x-yaml"})
_TEXT_SUFFIXES = ("+json", "+xml", "+yaml")
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
    """The body as text, or in base64; and which of the two (`text`, `base64`).

    A text with U+0000 counts as binary, whatever its type: no text and no jsonb of PostgreSQL can hold that.
    """
    media = re.split("[,;]", content_type, maxsplit=1)[0].strip().lower()
    is_text = media.startswith("text/") or media in _TEXT_TYPES or media.endswith(_TEXT_SUFFIXES)
    codec = codec_of(content_type) if is_text else "utf-8"
    try:
        text = content.decode("utf-8-sig" if codec == "utf-8" else codec, "replace" if is_text else "strict")
    except UnicodeDecodeError:
        text = "\0"  # binary
    if "\0" in text:
        return base64.b64encode(content).decode("ascii"), "base64"
    return text, "text"


def envelope(answer: Answer) -> str:
    """The JSON text of SURFACE 5.1."""
    body, encoding = body_of(answer.content, answer.headers.get("content-type", ""))
    # Half a surrogate pair can't come out of a decoder that replaces (but of utf-7's, which is no charset here).
    return _encode({"status": answer.status, "body": body, "encoding": encoding, "headers": answer.headers,
                    "ok": answer.ok, "duration_ms": answer.duration_ms})


def excerpt(answer: Answer, mask: Mask = NOTHING) -> str:
    """The beginning of a body, for an error (SURFACE 5.12). Masked before it is cut: half a secret is no secret."""
    body, encoding = body_of(answer.content, answer.headers.get("content-type", ""))
    if encoding == "base64" and mask.is_in(answer.content):
        return MASK
    body = mask.text(body)
    raw = body.encode("utf-8", "replace")
    if len(raw) <= EXCERPT:
        return body
    unit = "base64 characters" if encoding == "base64" else "bytes"
    return f"{raw[:EXCERPT].decode('utf-8', 'ignore')}... [truncated, {len(raw)} {unit} total]"
