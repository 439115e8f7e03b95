"""Python's codecs read what PostgreSQL's encodings write."""

from __future__ import annotations

import codecs

import psycopg
import pytest

from proxy.encodings import codec
from tests.fix_postgres import Database

#: A text that each of some encodings can write; ASCII for the rest.
SAMPLES = ("é", "ж", "ß", "Σ", "ש", "ع", "ก", "日本", "中文", "한국", "ț", "ŷ", "Þ", "€", "plain")
#: Python has no codec for these: statements pass untouched.
WITHOUT = {"EUC_TW", "MULE_INTERNAL"}


def test_every_encoding_of_the_server(database: Database) -> None:
    with psycopg.connect(database.dsn(), autocommit=True) as c:
        names = [
            name for (name,) in c.execute("SELECT pg_encoding_to_char(n) FROM generate_series(0, 60) n").fetchall() if name
        ]
        assert len(names) > 40
        refused = set()
        for name in names:
            if name == "SQL_ASCII":
                continue
            found = codec(name)
            if found is None:
                assert name in WITHOUT
                continue
            codecs.lookup(found)
            agreed = 0
            for sample in SAMPLES:
                try:
                    row = c.execute("SELECT convert_to(%s, %s)", (sample, name)).fetchone()
                except psycopg.errors.UntranslatableCharacter:
                    continue
                assert row is not None
                try:
                    text = row[0].decode(found)
                except UnicodeDecodeError:  # such a statement passes untouched: `€` in GBK
                    refused.add((name, sample))
                    continue
                assert text == sample, name
                agreed += 1
            assert agreed > 0
        assert refused <= {("GBK", "€")}


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [
        ("utf8", "UTF8", "utf_8"), ("UNICODE", "LATIN1", "utf_8"), ("WIN1252", "UTF8", "cp1252"), ("SQL_ASCII", "UTF8", "utf_8"),
        ("SQL_ASCII", "EUC_JP", "euc_jp"), ("SQL_ASCII", "SQL_ASCII", "iso8859_1"), ("NO_SUCH", "UTF8", None),
    ],
)
def test_names(client: str, server: str, expected: str | None) -> None:
    assert codec(client, server) == expected
