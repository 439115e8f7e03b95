"""PostgreSQL's names of character encodings and the Python codecs that read them."""

from __future__ import annotations

from typing import Final

#: Normalised name (lower case, letters and digits only) -> codec. EUC_TW and MULE_INTERNAL have none in Python.
_CODECS: Final = {
    "big5": "cp950",
    "euccn": "gb2312",
    "eucjis2004": "euc_jis_2004",
    "eucjp": "euc_jp",
    "euckr": "euc_kr",
    "gb18030": "gb18030",
    "gbk": "cp936",
    "iso88595": "iso8859_5",
    "iso88596": "iso8859_6",
    "iso88597": "iso8859_7",
    "iso88598": "iso8859_8",
    "johab": "johab",
    "koi8": "koi8_r",
    "koi8r": "koi8_r",
    "koi8u": "koi8_u",
    "latin1": "iso8859_1",
    "latin2": "iso8859_2",
    "latin3": "iso8859_3",
    "latin4": "iso8859_4",
    "latin5": "iso8859_9",
    "latin6": "iso8859_10",
    "latin7": "iso8859_13",
    "latin8": "iso8859_14",
    "latin9": "iso8859_15",
    "latin10": "iso8859_16",
    "shiftjis2004": "shift_jis_2004",
    "sjis": "cp932",
    "uhc": "cp949",
    "unicode": "utf_8",
    "utf8": "utf_8",
    "win866": "cp866",
    "win874": "cp874",
    **{f"win{n}": f"cp{n}" for n in range(1250, 1259)},
}


def codec(client_encoding: str, server_encoding: str = "UTF8") -> str | None:
    """The codec for what a session with these ParameterStatus values sends, or None if Python has none.

    SQL_ASCII means that the server takes the client's bytes for its own encoding; where that is SQL_ASCII too, a
    character is a byte.
    """
    name = _normal(client_encoding)
    if name == "sqlascii":
        name = _normal(server_encoding)
        if name == "sqlascii":
            return "iso8859_1"
    return _CODECS.get(name)


def _normal(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
