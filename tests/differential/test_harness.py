"""The differential tests can fail: a proxy that is less than transparent is found out, by each kind of difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from proxy.rewriter import Rewriter
from proxy.wire import backend, build
from proxy.wire.frames import Frame
from tests.differential.compare import Normaliser, accepted, differences
from tests.differential.conftest import Stage
from tests.differential.conversation import extended, send, statements, talk
from tests.differential.runner import hold
from tests.differential.test_conversations import CONVERSATIONS
from tests.differential.test_statements import FILES
from tests.differential.wireclient import Stuck
from tests.proxy.proxies import running_proxy


@dataclasses.dataclass(frozen=True)
class Changed:
    sql: str

    def source_position(self, position: int) -> int:
        return position


MEDDLING: dict[str, tuple[Callable[[str], str], str, str]] = {
    "a value": (lambda s: s.replace("1", "2"), "SELECT 'a1'", "DATA_ROW.values"),
    "a name": (lambda s: s.replace("aa", "bb"), "SELECT 1 AS aa", "ROW_DESCRIPTION.0"),
    "a type": (lambda s: s.replace("int4", "int8"), "SELECT 1::int4", "ROW_DESCRIPTION.0"),
    "a position": (lambda s: " " + s, "SELECT nosuch", "ERROR_RESPONSE.P"),
    "a message": (lambda s: s.replace("nosuch", "nosich"), "SELECT nosuch", "ERROR_RESPONSE.M"),
    "an error's internal line": (lambda s: s.replace("BEGIN", "BEGIN\n"), "DO 'BEGIN PERFORM 1/0; END'", "ERROR_RESPONSE.W"),
    "a tag": (lambda s: s.replace("1, 3", "1, 2"), "CREATE TABLE play.t AS SELECT generate_series(1, 3)", "COMMAND_COMPLETE.payload"),
    "a notice": (lambda s: s.replace("loud", "quiet"), "SELECT complain('notice', 'loud')", "NOTICE_RESPONSE.M"),
    "a lost statement": (lambda s: "", "BEGIN", "sequence"),
    "the transaction's state": (lambda s: "BEGIN" if s == "COMMIT" else s, "COMMIT", "sequence"),
    "a parameter": (lambda s: s.replace("one", "two"), "SET application_name = 'one'", "PARAMETER_STATUS.value"),
    "one more result": (lambda s: s + "; SELECT 2", "SELECT 1", "sequence"),
    "parameter types": (lambda s: s.replace("$1::int4", "$1::int8::int4"), "SELECT $1::int4", "PARAMETER_DESCRIPTION.types"),
}  # fmt: skip


@pytest.mark.parametrize("what", MEDDLING)
def test_meddling_is_seen(stage: Stage, what: str) -> None:
    change, sql, place = MEDDLING[what]
    rewriter = Rewriter(mentions=lambda _: True, compile_=lambda s, standard_conforming_strings: Changed(change(s)))
    step: str | bytes = extended(sql, b"1") if "$1" in sql else sql
    conversation = talk(what, step, "SELECT 'not changed'")
    with running_proxy(stage.database.dsn(), rewriter=rewriter) as proxy:
        direct = hold(stage.scene, conversation)
        assert not differences(direct, hold(stage.scene, conversation))
        proxied = hold(stage.scene, conversation, address=("127.0.0.1", proxy.port))
    assert place in {d.where for d in differences(direct, proxied)}


def test_every_field_counts() -> None:
    fields = {"S": "ERROR", "V": "ERROR", "C": "22012", "M": "m", "P": "1", "D": "d", "H": "h"}

    def said(f: dict[str, str]) -> list[object]:
        return [Normaliser().said("A", Frame(ord("E"), backend.encode_error_fields(f)))]

    for code in fields:
        without = {k: v for k, v in fields.items() if k != code}
        assert [d.where for d in differences(said(fields), said(without))] == [f"ERROR_RESPONSE.{code}"]  # type: ignore[arg-type]
    turned = dict(reversed(fields.items()))
    assert [d.where for d in differences(said(fields), said(turned))] == ["ERROR_RESPONSE.order of fields"]  # type: ignore[arg-type]
    padded = [Normaliser().said("A", Frame(ord("E"), backend.encode_error_fields(fields) + b"\0"))]
    assert [d.where for d in differences(said(fields), padded)] == ["ERROR_RESPONSE.size"]  # type: ignore[arg-type]


def test_the_end_counts() -> None:
    row = Normaliser().said("A", Frame(ord("D"), build.data_row([b"1"])[5:]))
    assert [d.where for d in differences([row, row], [row])] == ["sequence"]


def test_silence_is_no_answer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.differential.wireclient.PATIENCE", 0.2)
    with pytest.raises(Stuck):
        hold(stage.scene, talk("asks nothing", "SELECT 1", send(until="Z")))


def test_every_listed_difference_exists(stage: Stage) -> None:
    """Those of conversations are checked with them; a statement's is checked here."""
    known = {s for f in FILES for s in statements(f.read_text())}
    names = {c.name for c in CONVERSATIONS}
    for name, places in accepted().items():
        assert name in known | names, f"docs/differences.md lists {name!r}, which is nowhere in the corpus"
        if name in known:
            conversation = talk(name, name)
            found = differences(hold(stage.scene, conversation), hold(stage.scene, conversation, address=stage.proxied))
            assert {d.where for d in found} == places, name
