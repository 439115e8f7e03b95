"""PostgreSQL types as plain data: which shape a type's values have, and how a cast to it is written.

Built-in types are known here; the engine loads the others with TYPES_SQL (docs/architecture.md: dsl does no I/O).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsl.values import Column

#: One parameter, a text such as `{16385,16390}` (OIDs); one row, one text column, for TypeCatalog.load. Brings along
#: the types that those are made of. Names are written with their schema, so that a search_path can't change them.
TYPES_SQL = """
WITH RECURSIVE wanted(oid) AS (
    SELECT pg_catalog.unnest($1::pg_catalog.text::pg_catalog.oid[])
    UNION
    SELECT p.oid FROM wanted w JOIN pg_catalog.pg_type t ON t.oid = w.oid CROSS JOIN LATERAL (
        SELECT t.typelem WHERE t.typinput = 'pg_catalog.array_in'::pg_catalog.regproc
        UNION ALL SELECT t.typbasetype WHERE t.typtype = 'd'
        UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute a
                   WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS p(oid) WHERE p.oid <> 0
)
SELECT COALESCE(pg_catalog.json_agg(pg_catalog.json_build_object(
           'oid', t.oid::pg_catalog.int8,
           'name', CASE WHEN n.nspname = 'pg_catalog' THEN pg_catalog.format_type(t.oid, -1)
                        ELSE pg_catalog.format('%I.%I', n.nspname, t.typname) END,
           'kind', CASE WHEN t.typinput = 'pg_catalog.array_in'::pg_catalog.regproc THEN 'a' ELSE t.typtype::text END,
           'element', (CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.typelem END)::pg_catalog.int8,
           'delimiter', t.typdelim::text,
           'fields', (SELECT pg_catalog.json_agg(pg_catalog.json_build_array(a.attname, a.atttypid::pg_catalog.int8)
                                                 ORDER BY a.attnum)
                        FROM pg_catalog.pg_attribute a
                       WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped)
       )), '[]')::text
  FROM wanted w JOIN pg_catalog.pg_type t ON t.oid = w.oid JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
"""

BOOL, TEXT, VARCHAR, RECORD, VOID, JSON, JSONB, NUMERIC = 16, 25, 1043, 2249, 2278, 114, 3802, 1700
FLOAT4, FLOAT8, INT2, INT4, INT8, TIMESTAMP, TIMESTAMPTZ = 700, 701, 21, 23, 20, 1114, 1184
BPCHAR, BIT, VARBIT, TIME, TIMETZ, INTERVAL = 1042, 1560, 1562, 1083, 1266, 1186

# oid, name without modifier as format_type writes it, oid of the array type.
_SCALARS = """
16 1000 boolean|17 1001 bytea|18 1002 "char"|19 1003 name|20 1016 bigint|21 1005 smallint|22 1006 int2vector
23 1007 integer|24 1008 regproc|25 1009 text|26 1028 oid|27 1010 tid|28 1011 xid|29 1012 cid|30 1013 oidvector
114 199 json|142 143 xml|600 1017 point|601 1018 lseg|602 1019 path|603 1020 box|604 1027 polygon|628 629 line
650 651 cidr|700 1021 real|701 1022 double precision|718 719 circle|774 775 macaddr8|790 791 money|829 1040 macaddr
869 1041 inet|1033 1034 aclitem|1042 1014 bpchar|1043 1015 character varying|1082 1182 date
1083 1183 time without time zone|1114 1115 timestamp without time zone|1184 1185 timestamp with time zone
1186 1187 interval|1266 1270 time with time zone|1560 1561 "bit"|1562 1563 bit varying|1700 1231 numeric
1790 2201 refcursor|2202 2207 regprocedure|2203 2208 regoper|2204 2209 regoperator|2205 2210 regclass
2206 2211 regtype|2950 2951 uuid|2970 2949 txid_snapshot|3220 3221 pg_lsn|3614 3643 tsvector|3615 3645 tsquery
3734 3735 regconfig|3769 3770 regdictionary|3802 3807 jsonb|3904 3905 int4range|3906 3907 numrange|3908 3909 tsrange
3910 3911 tstzrange|3912 3913 daterange|3926 3927 int8range|4072 4073 jsonpath|4089 4090 regnamespace
4096 4097 regrole|4191 4192 regcollation|4451 6150 int4multirange|4532 6151 nummultirange|4533 6152 tsmultirange
4534 6153 tstzmultirange|4535 6155 datemultirange|4536 6157 int8multirange|5038 5039 pg_snapshot|5069 271 xid8
"""
# Types whose input functions refuse every text: a value of one is shown, never cast.
_OUTPUT_ONLY = """
194 0 pg_node_tree|2249 2287 record|2275 1263 cstring|2277 0 anyarray|2278 0 void|705 0 unknown|3361 0 pg_ndistinct
3402 0 pg_dependencies|3642 3644 gtsvector|4600 0 pg_brin_bloom_summary|4601 0 pg_brin_minmax_multi_summary
5017 0 pg_mcv_list
"""

_INTERVAL_UNITS = {1 << 2: "year", 1 << 1: "month", 1 << 3: "day",
                   1 << 10: "hour", 1 << 11: "minute", 1 << 12: "second"}
_INTERVAL_ANY = 0x7FFF


class Kind(StrEnum):
    """What a type is made of: pg_type.typtype, with arrays told apart."""

    BASE = "b"
    ARRAY = "a"
    COMPOSITE = "c"
    DOMAIN = "d"
    ENUM = "e"
    RANGE = "r"
    MULTIRANGE = "m"
    PSEUDO = "p"


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """One type. `name` is SQL text without modifier; `element` is an array's element or a domain's base type."""

    oid: int
    name: str
    kind: Kind = Kind.BASE
    element: int = 0
    delimiter: str = ","
    fields: tuple[tuple[str, int], ...] = ()
    castable: bool = True


class TypeCatalog:
    """Types by OID: the built-in ones, and those of one database that were loaded."""

    def __init__(self) -> None:
        self._types = dict(_BUILTIN)
        #: What dsl.values.describe has made of columns, for as long as nothing is learnt about types.
        self.described: dict[tuple[tuple[str, int, int], ...], tuple[Column, ...]] = {}

    def get(self, oid: int) -> TypeInfo | None:
        """The type, or None when it is not known (its values are then shown as their text)."""
        return self._types.get(oid)

    def unknown(self, oids: Iterable[int]) -> list[int]:
        """What should be loaded with TYPES_SQL: those of `oids`, and of the types that they are made of."""
        missing: set[int] = set()
        seen: set[int] = set()
        todo = list(oids)
        while todo:
            oid = todo.pop()
            if oid in _BUILTIN or oid in seen:
                continue
            seen.add(oid)
            info = self._types.get(oid)
            if info is None:
                missing.add(oid)
            else:
                todo += [info.element] if info.element else [field for _, field in info.fields]
        return sorted(missing)

    def load(self, text: str, asked: Iterable[int] = ()) -> None:
        """Takes in the result of TYPES_SQL. `asked` types that are not in it (dropped meanwhile) count as text."""
        self.described.clear()
        for item in json.loads(text):
            oid = item["oid"]
            if oid not in _BUILTIN:
                self._types[oid] = TypeInfo(
                    oid, item["name"], Kind(item["kind"]), item["element"], item["delimiter"],
                    tuple((name, field) for name, field in item["fields"] or ()), item["kind"] != "p")
        for oid in asked:
            self._types.setdefault(oid, TypeInfo(oid, "text"))

    def forget(self, oid: int) -> None:
        """Drops what was loaded about a type that has changed."""
        self.described.clear()
        if oid not in _BUILTIN:
            self._types.pop(oid, None)

    def base(self, oid: int) -> int:
        """The type below all domains."""
        while (info := self._types.get(oid)) is not None and info.kind is Kind.DOMAIN:
            oid = info.element
        return oid

    def shape(self, oid: int) -> str:
        """How values of the type look as JSON: see dsl.values.Column.shape."""
        oid = self.base(oid)
        if oid in (JSON, JSONB):
            return "j"
        info = self._types.get(oid)
        if info is None:
            return "s"
        if info.kind is Kind.ARRAY:
            return ("a" if self._delimiter(info) == "," else "b") + self.shape(info.element)
        if info.kind is Kind.COMPOSITE:
            return f"c({''.join(self.shape(field) for _, field in info.fields)})"
        return "s"

    def _delimiter(self, array: TypeInfo) -> str:
        element = self._types.get(array.element)
        return element.delimiter if element else ","

    def delimiter(self, array: TypeInfo) -> str:
        """What separates the elements in an array's text: a comma but for `box`."""
        return self._delimiter(array)

    def castable(self, oid: int) -> bool:
        """Whether the type's name may stand after `::` for a text."""
        info = self._types.get(oid)
        if info is None:
            return False
        return self.castable(info.element) if info.kind is Kind.ARRAY else info.castable

    def format_type(self, oid: int, modifier: int = -1) -> str:
        """The type as SQL text, as format_type() writes it, always with the schema of a user's type.

        Modifiers of types that are not built in are left out: only their output functions know them.
        """
        info = self._types.get(oid)
        if info is None:
            return "text"
        if info.kind is Kind.ARRAY:
            return self.format_type(info.element, modifier) + "[]"
        return info.name if modifier < 0 else _with_modifier(info, modifier)


def _with_modifier(info: TypeInfo, modifier: int) -> str:
    match info.oid:
        case 1700:
            scale = ((modifier - 4) & 0x7FF ^ 0x400) - 0x400  # eleven bits, signed, since PostgreSQL 15
            return f"numeric({(modifier - 4) >> 16 & 0xFFFF},{scale})"
        case 1042:
            return f"character({modifier - 4})"
        case 1043:
            return f"character varying({modifier - 4})"
        case 1560:
            return f"bit({modifier})"
        case 1562:
            return f"bit varying({modifier})"
        case 1083 | 1266 | 1114 | 1184:
            first, rest = info.name.split(" ", 1)
            return f"{first}({modifier}) {rest}"
        case 1186:
            return _interval(modifier)
        case _:
            return info.name


def _interval(modifier: int) -> str:
    units, precision = modifier >> 16 & 0x7FFF, modifier & 0xFFFF
    text = "interval"
    if units != _INTERVAL_ANY:
        named = [name for bit, name in _INTERVAL_UNITS.items() if units & bit]
        text += f" {named[0]}" + (f" to {named[-1]}" if len(named) > 1 else "")
    return text if precision == 0xFFFF else f"{text}({precision})"


def _builtin() -> dict[int, TypeInfo]:
    types = {}
    for table, castable in ((_SCALARS, True), (_OUTPUT_ONLY, False)):
        for entry in table.strip().replace("\n", "|").split("|"):
            oid_text, array_text, name = entry.split(" ", 2)
            oid, array = int(oid_text), int(array_text)
            kind = Kind.RANGE if name.endswith("range") else Kind.BASE
            types[oid] = TypeInfo(oid, name, kind, 0, ";" if name == "box" else ",", (), castable)
            if array:
                types[array] = TypeInfo(array, name + "[]", Kind.ARRAY, oid, ",", (), castable)
    return types


_BUILTIN = _builtin()
