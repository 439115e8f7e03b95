"""Most tests of the compiler write steps as 'a' and 'b'. What it says about such text has tests of its own."""

from __future__ import annotations

import pytest

from dsl import steptext


@pytest.fixture(autouse=True)
def _placeholders_are_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__.rpartition(".")[2] != "test_steptext":
        monkeypatch.setattr(steptext, "fault", lambda text: None)
