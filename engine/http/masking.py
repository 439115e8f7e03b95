"""Keeps the values of secret variables out of what people read: errors and logs.

What a request is made of is masked in every text that comes back. Where a secret makes the URL itself, nothing that is
taken from that URL is shown at all: a library may have written it in another way (engine/http/template.py, `shown`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from dsl.graph import GraphError
from dsl.substitute import SubstitutionError
from engine.http.errors import HttpError
from engine.http.url import MASK, SHORTEST, spellings


class Mask:
    """Replaces secret values by `***`. As a context manager: in the texts of errors of ours that pass."""

    __slots__ = ("_pattern", "_raw", "_secrets")

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = tuple(secrets)
        values = {s for secret in self._secrets for s in (secret, " ".join(secret.split()), *_pieces(secret))
                  if s.strip()}
        written = {w for value in values for w in (*spellings(value), *_as_json(value)) if w}
        self._raw = tuple(value.encode("utf-8", "replace") for value in values)
        self._pattern = re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True))), re.IGNORECASE) \
            if written else None

    def and_also(self, secret: str) -> Mask:
        """A mask for one more."""
        return Mask((*self._secrets, secret))

    def text(self, text: str) -> str:
        """The text without them, in whatever case and escaping they stand there."""
        return text if self._pattern is None else self._pattern.sub(MASK, text)

    def is_in(self, content: bytes) -> bool:
        """Whether bytes hold one of them."""
        return any(value in content for value in self._raw)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pattern is not None and isinstance(error, HttpError | SubstitutionError | GraphError):
            error.args = (self.text(str(error)),)


NOTHING = Mask()


def _pieces(secret: str) -> list[str]:
    """Of a URL that is secret as a whole: a server knows it in pieces, and may say them."""
    _, scheme, rest = secret.partition("://")
    return [piece for piece in re.split(r"[/?#&=:@\s]+", rest) if len(piece) >= SHORTEST] if scheme else []


def _as_json(value: str) -> tuple[str, str]:
    return json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]
