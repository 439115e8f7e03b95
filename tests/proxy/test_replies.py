"""What is changed in errors and notices, field by field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.replies import client_view
from proxy.wire.backend import encode_error_fields, error_fields


class Moved:
    """A statement that became `grown` characters longer in front, and raises something about its third character."""

    def __init__(self, grown: int) -> None:
        self.grown = grown

    def source_position(self, position: int) -> int:
        return position - self.grown

    def raises(self, position: int) -> bool:
        return position == 3


FIELDS = {"S": "ERROR", "V": "ERROR", "C": "42703", "M": "no", "P": "20", "F": "parse.c", "L": "7", "R": "parse", "W": "PL/pgSQL"}


def view(fields: dict[str, str], grown: int | None = 5) -> dict[str, str] | None:
    changed = client_view(encode_error_fields(fields), Moved(grown) if grown is not None else None)
    return error_fields(changed) if changed is not None else None


def test_the_position_alone_is_mapped() -> None:
    assert view(FIELDS) == FIELDS | {"P": "15"}


def test_nothing_changes_without_a_position_or_a_rewritten_statement() -> None:
    assert view(FIELDS, grown=None) is None
    assert view({k: v for k, v in FIELDS.items() if k != "P"}) is None


def test_the_marker_becomes_the_position_unmapped() -> None:
    marked = FIELDS | {"n": "dfproxy:position=3"}
    assert view(marked) == {"S": "ERROR", "V": "ERROR", "C": "42703", "M": "no", "P": "3"}
    del marked["P"]
    assert view(marked) == {"S": "ERROR", "V": "ERROR", "C": "42703", "M": "no", "P": "3"}
    assert view(marked, grown=None) == {"S": "ERROR", "V": "ERROR", "C": "42703", "M": "no"}


def test_a_marker_of_another_text_points_nowhere_and_says_where_it_was_called() -> None:
    called = {"W": 'PL/pgSQL function duroxide.warning(text,text,text,integer) line 9 at RAISE\nSQL function "f" statement 1'}
    plain = {"S": "ERROR", "V": "ERROR", "C": "42703", "M": "no", "W": 'SQL function "f" statement 1'}
    assert view(FIELDS | called | {"n": "dfproxy:position=4"}) == plain
    assert view(FIELDS | called | {"n": "dfproxy:position=3"}, grown=None) == plain
    assert view(FIELDS | called | {"n": "dfproxy:position=3"}) == plain | {"P": "3"}  # in a DO block, say


@pytest.mark.parametrize("number", ["", "0", "-1", "x", "1x", "99999999999999999999", "１"])
def test_positions_that_are_none(number: str) -> None:
    assert view(FIELDS | {"P": number}) is None
    assert view(FIELDS | {"n": "dfproxy:position=" + number}) == {"S": "ERROR", "V": "ERROR", "C": "42703", "M": "no"}


def test_the_marker_counts_in_the_constraint_field_only() -> None:
    assert view(FIELDS | {"M": "dfproxy:position=3"}, grown=None) is None
    assert view(FIELDS | {"M": "dfproxy:position=3"}) == FIELDS | {"M": "dfproxy:position=3", "P": "15"}
    assert view(FIELDS | {"n": "my dfproxy:position=3"}, grown=None) is None


@given(st.dictionaries(st.sampled_from("SVCMDHPpqWsctdnFLR"), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_everything_else_stays(fields: dict[str, str]) -> None:
    changed = view(fields)
    if changed is not None:
        assert {k: v for k, v in changed.items() if k not in "PnWFLR"} == {
            k: v for k, v in fields.items() if k not in "PnWFLR"
        }
