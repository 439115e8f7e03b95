"""The charset that a Content-Type declares, as a Python codec."""

from __future__ import annotations

import codecs
import encodings
import pkgutil
import re
from encodings import normalize_encoding
from encodings.aliases import aliases

_CHARSET = re.compile(r""";\s*charset\s*=\s*(?:"([^"]*)"|([^\s;,"]+))""", re.I)
#: Python codecs that are no charsets.
_NO_CHARSETS = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf_7", "base64_codec",
                "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec", "mbcs", "oem", "tactis",
                "charmap", "aliases"}
#: Only what is listed is looked up: Python remembers every name that it does not know, for ever.
_KNOWN = {*aliases.values(), *(module.name for module in pkgutil.iter_modules(encodings.__path__))} - _NO_CHARSETS


def codec_of(content_type: str) -> str:
    """The codec of the declared charset; `utf-8` where none is declared, or one that is not known."""
    match = _CHARSET.search(content_type)
    if match is None:
        return "utf-8"
    name = normalize_encoding(match[1] or match[2] or "").lower()
    if aliases.get(name, name) not in _KNOWN:
        return "utf-8"
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "utf-8"  # not on this system
