"""Sessions whose client encoding is not UTF-8, where a byte of a character may look like ASCII."""

from __future__ import annotations

from proxy.wire import build
from tests.differential.conversation import Conversation, extended, send, talk


def query(sql: str, codec: str) -> bytes:
    return build.query(sql.encode(codec))


def _one(encoding: str, codec: str, word: str) -> Conversation:
    """The same conversation in any encoding. `word` is a word of its language."""
    def raw(sql: str) -> bytes:
        return query(sql.format(w=word), codec)

    return talk(
        f"encoding {encoding}", f"SET client_encoding = '{encoding}'",
        raw("SELECT '{w}' AS \"{w}\", length('{w}'), convert_to('{w}', 'UTF8')"),
        raw("SELECT '{w} df.start(''a'' ~> ''b'')', 1 AS \"{w} ~> df.\" -- {w} df.start("),
        raw("SELECT df.start, '{w}' FROM documents df ORDER BY df.id LIMIT 1"),
        raw("SELECT df.nosuch_{w} FROM documents df"),
        raw("SELECT '{w}', nosuch"),
        raw("SELECT '{w}'::int"),
        raw("SELECT complain('error', '{w}')"),
        raw("SELECT complain('notice', '{w}')"),
        raw("SET application_name = '{w}'"),
        raw("SELECT $1$ {w} $1$, $x${w} df.start('a' ~> 'b')$x$"),
        extended(f"SELECT $1, '{word}', length($1), '~>'".encode(codec), word.encode(codec), types=(25,)),
        extended(f"SELECT '{word}' -- df.start(".encode(codec), results=(1,)),
        raw("CREATE TABLE play.\"{w}\" (\"{w}\" text)"),
        send(raw("COPY play.\"{w}\" FROM STDIN"), until="G"),
        send(build.copy_data(f"{word}\n".encode(codec)) + build.copy_done(), until="Z"),
        raw("TABLE play.\"{w}\""),
        raw("COPY play.\"{w}\" TO STDOUT"),
        raw("LISTEN \"{w}\""),
        raw("NOTIFY \"{w}\", '{w}'"),
        raw("SELECT '{w} ' || U&'\\20AC', '{w}' || chr(1234)"),
        "SELECT chr(8364)", "SELECT chr(26085)", "SELECT chr(128512)",
        "RESET client_encoding", "SELECT chr(128512)",
    )  # fmt: skip


CONVERSATIONS = [
    _one("LATIN1", "latin-1", "Größe"),
    _one("LATIN9", "iso8859-15", "Größe €"),
    _one("WIN1252", "cp1252", "Größe €"),
    _one("WIN1251", "cp1251", "размер"),
    _one("KOI8R", "koi8-r", "размер"),
    _one("LATIN2", "iso8859-2", "żółć"),
    _one("ISO_8859_5", "iso8859-5", "размер"),
    _one("SJIS", "cp932", "日本語ソ表能"),  # ソ, 表 and 能 end in a byte that is a backslash
    _one("EUC_JP", "euc_jp", "日本語ソ表能"),
    _one("EUC_KR", "euc_kr", "한국어"),
    _one("EUC_CN", "gb2312", "中文"),
    _one("GBK", "gbk", "中文乗"),  # second bytes that are ASCII
    _one("BIG5", "big5", "中文功能"),  # 功 ends in a byte that is a backslash
    _one("GB18030", "gb18030", "中文€乗"),
    _one("UHC", "cp949", "한국어똠"),
    _one("UTF8", "utf-8", "Größe 日本 😀"),
    talk("bytes that are not in the encoding", build.query(b"SELECT '\xff\xfe'"), build.query(b"SELECT '\xc3\x28' -- df.start('a' ~> 'b')"), build.query(b"SELECT df.start FROM documents df WHERE df.start = '\xe2\x82'"),
         build.query(b"SELECT '\xed\xa0\x80'"), build.query(b"SELECT df.start('\xff' ~> 'b')"), extended(b"SELECT '\xff'"), extended("SELECT $1", b"\xff", types=(25,)), extended("SELECT $1", b"a\0b", types=(25,)),
         "SET client_encoding = 'LATIN1'", build.query(b"SELECT '\xff\xfe ~>'"), "SET client_encoding = 'WIN1252'", build.query(b"SELECT '\x81'"), build.query(b"SELECT '\x81', df.start FROM documents df"),
         "SET client_encoding = 'SJIS'", build.query(b"SELECT '\x83'"), build.query(b"SELECT '\x83', '~>'"), build.query(b"SELECT df.id, '\xff' FROM documents df")),
    talk("encodings that Python lacks", "SET client_encoding = 'EUC_TW'", "SELECT df.start FROM documents df ORDER BY id LIMIT 1", "SET client_encoding = 'MULE_INTERNAL'", "SELECT df.start, '~>' FROM documents df ORDER BY id LIMIT 1", "SELECT nosuch, '~>'"),
    talk("SQL_ASCII", "SET client_encoding = 'SQL_ASCII'", build.query("SELECT 'ü ~>', df.start FROM documents df ORDER BY id LIMIT 1".encode()), build.query(b"SELECT '\xff ~>', df.start FROM documents df"), build.query("SELECT 'ü', df.nosuch FROM documents df".encode())),
    talk("backslashes in SJIS with standard_conforming_strings off", "SET client_encoding = 'SJIS'", "SET standard_conforming_strings = off", "SET escape_string_warning = off",
         query("SELECT 'ソ', 'a\\'b ~> df.start(', '表'", "cp932"), query("SELECT '能\\\\', df.start FROM documents df ORDER BY df.id LIMIT 1", "cp932")),
    talk("standard_conforming_strings off", "SET standard_conforming_strings = off", "SELECT 'a\\'b'", "SELECT 'x\\', df.start, \\'y' FROM documents df ORDER BY df.id LIMIT 1", "SELECT 'x\\'' || ' ~> ' AS v, df.start FROM documents df ORDER BY df.id LIMIT 1",
         "SELECT $$a\\'b ~> $$, '\\\\', df.id FROM documents df ORDER BY df.id LIMIT 1", "SELECT 'unterminated\\', df.start", "SET standard_conforming_strings = on", "SELECT 'a\\', df.start FROM documents df ORDER BY df.id LIMIT 1"),
    talk("the encoding changes inside a transaction", "BEGIN", "SET LOCAL client_encoding = 'LATIN1'", query("SELECT 'ü ~>', df.start FROM documents df ORDER BY id LIMIT 1", "latin-1"), "COMMIT", "SELECT 'ü ~>', df.start FROM documents df ORDER BY id LIMIT 1",
         "BEGIN", "SET client_encoding = 'SJIS'", "ROLLBACK", "SELECT 'ü ~>', df.start FROM documents df ORDER BY id LIMIT 1"),
    talk("the encoding changes inside a pipeline", extended("SET client_encoding = 'LATIN1'") + extended("SELECT 'ü', df.start FROM documents df ORDER BY id LIMIT 1".encode("latin-1")) + extended("RESET client_encoding") + extended("SELECT 'ü', df.start FROM documents df ORDER BY id LIMIT 1")),
    talk("the encoding changes inside a query", "SET client_encoding = 'LATIN1'; SELECT chr(252), df.start FROM documents df ORDER BY id LIMIT 1; SELECT '~>'"),
]  # fmt: skip
