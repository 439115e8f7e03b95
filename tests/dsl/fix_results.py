"""Results as the engine makes them: a statement run on a real server, its text-format values encoded."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import rows, sql

from dsl.values import TYPES_SQL, Column, Result, TypeCatalog, describe, encode_rows

#: What a step session has set (docs/architecture.md); the tests must see the same texts.
SESSION = ("-c TimeZone=UTC -c DateStyle=ISO,MDY -c IntervalStyle=iso_8601 -c bytea_output=hex -c extra_float_digits=2 "
           "-c standard_conforming_strings=on")

#: A user's types: each kind, with names that need quotes, and each made of others.
TYPES = """
CREATE SCHEMA "Odd schema";
CREATE TYPE mood AS ENUM ('sad', 'o''k', 'ha"ppy', 'back\\slash');
CREATE DOMAIN posint AS integer CHECK (VALUE > 0);
CREATE DOMAIN posints AS posint[];
CREATE TYPE "Odd schema"."Addr ess" AS (street text, "no." posint, tags text[], extra jsonb, at timestamptz);
CREATE TYPE person AS (name text, home "Odd schema"."Addr ess", others "Odd schema"."Addr ess"[]);
CREATE TYPE nothing AS ();
CREATE TYPE floatrange AS RANGE (subtype = float8);
CREATE DOMAIN home AS "Odd schema"."Addr ess";
"""


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A session as steps have it."""
    return psycopg.connect(dsn, options=SESSION, autocommit=True, client_encoding="utf8")


def load(connection: psycopg.Connection[Any], catalog: TypeCatalog, oids: list[int]) -> None:
    """As the engine loads types."""
    if unknown := catalog.unknown(oids):
        text = "{" + ",".join(map(str, unknown)) + "}"
        with psycopg.RawCursor(connection) as cursor:
            row = cursor.execute(TYPES_SQL.encode(), [text]).fetchone()
        assert row is not None
        catalog.load(row[0], unknown)


def run(connection: psycopg.Connection[Any], statement: str | sql.Composable,
        catalog: TypeCatalog | None = None) -> Result:
    """Runs a statement; its result as a SQL node has it."""
    catalog = catalog or TypeCatalog()
    with psycopg.ClientCursor(connection, row_factory=rows.tuple_row) as cursor:
        cursor.execute(statement.encode() if isinstance(statement, str) else statement)
        result = cursor.pgresult
        assert result is not None
        fields = [((result.fname(i) or b"").decode(), result.ftype(i), result.fmod(i)) for i in range(result.nfields)]
        cells = [[result.get_value(r, c) for c in range(result.nfields)] for r in range(result.ntuples)]
    load(connection, catalog, [oid for _, oid, _ in fields])
    columns: tuple[Column, ...] = describe(fields, catalog)
    return Result(encode_rows(columns, cells, catalog), columns)
