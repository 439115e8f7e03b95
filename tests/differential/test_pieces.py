"""The same conversations with the client's bytes cut into small pieces: message boundaries are nothing that TCP keeps."""

from __future__ import annotations

import random

import pytest

from tests.differential.compare import accepted, differences
from tests.differential.conftest import Stage
from tests.differential.conversation import Conversation, Send
from tests.differential.runner import hold
from tests.differential.test_conversations import CONVERSATIONS

#: Conversations that send more are left to the tests that send them whole. Bytes.
_MOST = 20_000


def _small(conversation: Conversation) -> bool:
    return sum(len(s.data) for s in conversation.steps if isinstance(s, Send)) < _MOST


@pytest.mark.parametrize("conversation", [c for c in CONVERSATIONS if _small(c)], ids=str)
def test_pieces_are_put_together(stage18: Stage, conversation: Conversation) -> None:
    direct = hold(stage18.scene, conversation)
    pieces = random.Random(conversation.name)
    proxied = hold(stage18.scene, conversation, address=stage18.proxied, pieces=pieces)
    places = accepted().get(conversation.name, set())
    report = [str(d) for d in differences(direct, proxied) if d.where not in places]
    assert not report, "\n".join(report)
