"""Each statement of the corpus files, directly and through the proxy, by each way to send a statement.

The statements of a file make one session, so that what one leaves behind (a transaction, a setting) is there for the
next. Every message of the server is compared (see compare.py for what is normalised).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.wire import build
from tests.differential.compare import Said, accepted, differences
from tests.differential.conftest import Stage
from tests.differential.conversation import Connect, Conversation, Send, extended, statements
from tests.differential.runner import hold

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*.sql"))


def simple(sql: str, _: int) -> bytes:
    return build.query(sql)


def text(sql: str, _: int) -> bytes:
    return extended(sql)


def binary(sql: str, _: int) -> bytes:
    return extended(sql, results=(1,))


def named(sql: str, n: int) -> bytes:
    """A named statement and portal, closed afterwards; the reply to each part is asked for with Flush."""
    return b"".join((
        build.parse(f"s{n}", sql), build.flush(), build.describe_statement(f"s{n}"), build.flush(),
        build.bind(f"p{n}", f"s{n}", (), (), (0,)), build.execute(f"p{n}", 2), build.flush(), build.execute(f"p{n}"),
        build.close_portal(f"p{n}"), build.close_statement(f"s{n}"), build.sync(),
    ))  # fmt: skip


WAYS = {w.__name__: w for w in (simple, text, binary, named)}


def _each(said: list[Said], count: int) -> list[list[Said]]:
    """The replies of each statement: what stands between one ReadyForQuery and the next."""
    replies: list[list[Said]] = [[]]
    for one in said:
        replies[-1].append(one)
        if one.what == "READY_FOR_QUERY":
            replies.append([])
    assert len(replies) == count + 2  # the startup's is the first; nothing follows the last
    return replies


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_statement_is_answered_alike(stage: Stage, file: Path, way: str) -> None:
    corpus = statements(file.read_text())
    steps = [Send("A", WAYS[way](sql, n), "Z") for n, sql in enumerate(corpus)]
    conversation = Conversation(f"{file.stem}-{way}", (Connect(), *steps))
    direct = _each(hold(stage.scene, conversation), len(corpus))
    proxied = _each(hold(stage.scene, conversation, address=stage.proxied), len(corpus))
    allowed = accepted()
    report = []
    for sql, one, other in zip(["(startup)", *corpus], direct[:-1], proxied[:-1], strict=True):
        report += [f"{sql}\n  {d}" for d in differences(one, other) if d.where not in allowed.get(sql, set())]
    assert not report, f"{len(report)} differences:\n" + "\n\n".join(report)


def test_the_corpus_is_large() -> None:
    assert sum(len(statements(f.read_text())) for f in FILES) > 500
