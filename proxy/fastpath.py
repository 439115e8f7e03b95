"""The fast path: requests without anything of ours in them, and their replies, relayed without entering Python.

Where the compiled module is there (it is built at installation, where there is a C compiler and Linux's headers), a
session between two requests lends the descriptors of its two connections. Each is then read by compiled code: a
request that is one whole Query or batch, mentions nothing of ours, and comes while nothing else is on its way, is
written to the server at once, and so is the reply to it: a batch about a statement of ours, too, that was prepared
before and is all that the batch is about. Whatever else arrives is given to proxy/session.py as if its
transport had read it. Connections inside of TLS are never lent.

A session that sends nothing but such requests for a while is served by a thread of the compiled code's own, which needs
neither the event loop nor the interpreter (docs/decisions/0011-a-thread-of-its-own.md).

What is decided there is what proxy/wire/plain.py, Session._passes, dsl.compiler and FrameSplitter.skim decide here;
tests compare them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from proxy.rewriter import Rewriter

if TYPE_CHECKING:
    from proxy._fastpath import Board

try:
    from proxy import _fastpath
except ImportError:
    _built = False
else:
    _built = True

#: Whether there is compiled code.
COMPILED: Final = _built
#: Plain requests after each other, after which the thread serves a session. To go there and back costs a few system
#: calls and a wake-up.
CALM = 4


def open_board(rewriter: Rewriter) -> Board | None:
    """What sessions of the running loop lend their descriptors to; None where there is nothing compiled for it.

    To be closed by `close_board` when the last of them has ended.
    """
    if not COMPILED or not rewriter.narrow:
        return None
    board = _fastpath.Board(CALM)
    asyncio.get_running_loop().add_reader(board.fileno(), board.ready)
    return board


def close_board(board: Board) -> None:
    """Ends what `open_board` has begun."""
    asyncio.get_running_loop().remove_reader(board.fileno())
    board.close()
