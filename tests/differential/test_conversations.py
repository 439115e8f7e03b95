"""Conversations at the level of messages, directly and through the proxy."""

from __future__ import annotations

import pytest

from tests.differential.compare import accepted, differences
from tests.differential.conftest import Stage
from tests.differential.conversation import Conversation
from tests.differential.corpus import copying, encodings, extended, sessions
from tests.differential.runner import hold

CONVERSATIONS = [*extended.CONVERSATIONS, *copying.CONVERSATIONS, *sessions.CONVERSATIONS, *encodings.CONVERSATIONS]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=str)
def test_every_conversation_is_answered_alike(stage: Stage, conversation: Conversation) -> None:
    direct = hold(stage.scene, conversation)
    proxied = hold(stage.scene, conversation, address=stage.proxied)
    found = differences(direct, proxied)
    places = accepted().get(conversation.name, set())
    report = [str(d) for d in found if d.where not in places]
    assert not report, "\n".join(report)
    stale = places - {d.where for d in found}
    assert not stale, f"docs/differences.md lists what does not differ: {stale}"


def test_names_are_unique() -> None:
    names = [c.name for c in CONVERSATIONS]
    assert len(set(names)) == len(names)
