"""Databases without workflows: what a client hears there who speaks of df.

Nothing is compiled in such a database, and its server's errors stay what they are (it may have a schema `df` of its
own); those that say that df is not there get a HINT that says where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from proxy.wire.backend import encode_error_fields, error_fields

#: SQLSTATE -> what the message then speaks of, in every language.
_SIGNS: Final = {
    "3F000": ('"df"',),  # schema "df" does not exist
    "42883": ("~>", "|=>", "?>", "!>", "@>"),  # operator does not exist
    "0A000": ("pg_durable",),  # extension "pg_durable" is not available
    "58P01": ("pg_durable",),  # could not open extension control file
}


def hint(database: str, served: Iterable[str]) -> str:
    """What to say in `database` while `served` are the databases with workflows."""
    names = ", ".join(f'"{name}"' for name in sorted(served))
    return (f'dfproxy runs workflows in {names}, not in "{database}". To have them here too, start dfproxy with'
            f' --databases naming it (or with *): it installs schema df then.')


def with_hint(payload: bytes, text: str, codec: str | None) -> bytes | None:
    """The payload of an ErrorResponse with the hint, where it says that df is missing; else None."""
    fields = error_fields(payload)
    if not any(sign in fields.get("M", "") for sign in _SIGNS.get(fields.get("C", ""), ())):
        return None
    # As all of the message, in the client's encoding.
    said = text.encode(codec or "ascii", "replace").decode("utf-8", "surrogateescape")
    fields["H"] = f"{fields['H']}\n{said}" if fields.get("H") else said
    return encode_error_fields(fields)
