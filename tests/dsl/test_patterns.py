"""Regular expressions mean the same in every Python that dfproxy runs on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("proxy", "dsl", "engine") for path in sorted((ROOT / folder).rglob("*.py"))]
#: The end of a group, or of a part that is put in, with a possessive quantifier behind it.
GROUP = re.compile(r"[)}][*+?]\+")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_group_is_repeated_possessively(path: Path) -> None:
    """Before 3.11.5 Python takes what the last round began, and did not end, for a part of it (`(?>(...)*)` is right)."""
    patterns = re.findall(r"r[fF]?\"\"\".*?\"\"\"|[rR][fF]?\"[^\"\n]*\"|[rR][fF]?'[^'\n]*'", path.read_text(), re.DOTALL)
    assert not [found for found in patterns if GROUP.search(found)]


@pytest.mark.parametrize("wrong", [r'r"(?:a|b)*+"', r'rf"{_BLANK}*+PREPARE"', r'r"(x)?+"'])
def test_it_would_be_noticed(wrong: str) -> None:
    assert GROUP.search(wrong)
