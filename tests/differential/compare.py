"""What two runs of a conversation said, made comparable, and compared field by field.

Only what can't be equal is normalised: process ids, cancel keys, object ids above 16383 (each run makes objects of its
own), names of temporary schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from proxy.wire import backend
from proxy.wire.frames import Frame, ProtocolError
from proxy.wire.messages import Backend

#: The first object id that is not PostgreSQL's own (FirstNormalObjectId).
_FIRST_OID: Final = 16384
_PROCESS: Final = re.compile(r"(?i)(?<=\bprocess )\d+|(?<=\bPID )\d+")
_TEMPORARY: Final = re.compile(r"\bpg_(toast_)?temp_\d+")

#: Fields by name, in the order in which they came.
Fields = tuple[tuple[str, object], ...]


class Said(NamedTuple):
    """One message (or other event) of a session."""

    session: str
    what: str
    fields: Fields

    def __str__(self) -> str:
        return f"{self.session}: {self.what}({', '.join(f'{n}={short(v)}' for n, v in self.fields)})"


def short(value: object, limit: int = 300) -> str:
    """Its representation, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


@dataclass
class Normaliser:
    """Makes messages of one run comparable with those of another; numbers what differs by its first appearance."""

    sessions: dict[int, str] = field(default_factory=dict)  # process id -> session
    _oids: dict[int, str] = field(default_factory=dict)

    def said(self, session: str, frame: Frame) -> Said:
        """A message with all its fields."""
        try:
            what = Backend(frame.type).name
        except ValueError:
            return Said(session, "end" if frame.type == ord(".") else f"type {frame.type}", (("payload", frame.payload),))
        try:
            return Said(session, what, tuple(self._fields(frame)))
        except ProtocolError:
            return Said(session, what, (("malformed", frame.payload),))

    def _fields(self, frame: Frame) -> Iterable[tuple[str, object]]:
        payload = frame.payload
        match frame.type:
            case Backend.ERROR_RESPONSE | Backend.NOTICE_RESPONSE:
                for code, value in backend.error_fields(payload).items():
                    yield code, self._text(value)
                yield "size", len(backend.encode_error_fields(backend.error_fields(payload))) - len(payload)
            case Backend.ROW_DESCRIPTION:
                for i, column in enumerate(backend.row_description(payload)):
                    seen = column._replace(name="")
                    yield f"{i}", (column.name, self._oid(column.table_oid), self._oid(column.type_oid),
                                   seen.attnum, seen.type_size, seen.type_modifier, seen.format)
            case Backend.PARAMETER_DESCRIPTION:
                yield "types", tuple(self._oid(o) for o in backend.parameter_description(payload))
            case Backend.BACKEND_KEY_DATA:
                yield "key length", len(backend.backend_key_data(payload)[1])
            case Backend.NOTIFICATION_RESPONSE:
                yield "from", self.sessions.get(int.from_bytes(payload[:4], "big"), "?")
                yield "text", payload[4:]
            case Backend.DATA_ROW:
                yield "values", tuple(backend.data_row(payload))
            case Backend.PARAMETER_STATUS:
                yield "name", backend.parameter_status(payload)[0]
                yield "value", backend.parameter_status(payload)[1]
                yield "payload", payload
            case _:
                yield "payload", payload

    def _oid(self, oid: int) -> int | str:
        return oid if oid < _FIRST_OID else self._oids.setdefault(oid, f"object {len(self._oids) + 1}")

    def _text(self, text: str) -> str:
        text = _PROCESS.sub(lambda m: f"<{self.sessions.get(int(m[0]), 'pid')}>", text)
        return _TEMPORARY.sub(lambda m: f"pg_{m[1] or ''}temp_<n>", text)


class Difference(NamedTuple):
    """`where` is MESSAGE.field, or `sequence` where the messages are not even of the same type."""

    where: str
    direct: object
    proxied: object

    def __str__(self) -> str:
        return f"{self.where}:\n    directly  {short(self.direct, 600)}\n    proxied   {short(self.proxied, 600)}"


def differences(direct: Sequence[Said], proxied: Sequence[Said]) -> list[Difference]:
    """Where two runs differ; none if they are equal. After messages of different types nothing more is compared."""
    found: list[Difference] = []
    for i in range(max(len(direct), len(proxied))):
        one = direct[i] if i < len(direct) else None
        other = proxied[i] if i < len(proxied) else None
        if one == other:
            continue
        if one is None or other is None or one[:2] != other[:2]:
            found.append(Difference("sequence", [str(s) for s in direct[i : i + 3]], [str(s) for s in proxied[i : i + 3]]))
            break
        fields, others = dict(one.fields), dict(other.fields)
        names = [n for n in dict.fromkeys([*fields, *others]) if fields.get(n) != others.get(n)]
        found += [Difference(f"{one.what}.{n}", fields.get(n), others.get(n)) for n in names or ["order of fields"]]
    return found


_DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "differences.md"
_ROW: Final = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|", re.MULTILINE)


def accepted(document: Path = _DOCUMENT) -> dict[str, set[str]]:
    """The differences that docs/differences.md gives a reason for: conversation -> places.

    They are the rows of its table whose first two cells are code: the conversation's name, and the place (there may be
    several rows for one conversation).
    """
    found: dict[str, set[str]] = {}
    for name, where in _ROW.findall(document.read_text()):
        found.setdefault(name.replace("\\|", "|"), set()).add(where)
    return found
