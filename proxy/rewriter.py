"""What becomes of one statement on its way up: the byte search, the compiler, and a cache of what it made.

Nothing here ever fails a statement. What can't be decoded, what the compiler leaves alone and what it stumbles over
goes on as the client sent it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import structlog

log = structlog.get_logger("dfproxy.rewriter")

#: Larger statements are compiled in a thread, so that other clients are served meanwhile. Bytes.
INLINE_LIMIT: Final = 32 * 1024
#: Larger ones are not cached. Bytes; with the number of entries it bounds the cache.
CACHE_LIMIT: Final = 8 * 1024
#: The search holds the interpreter while it runs, so a large statement is searched in pieces. They overlap by more than
#: anything that the search looks for can be long, save white space that nobody writes.
_WINDOW: Final = 128 * 1024
_OVERLAP: Final = 4096


class CompiledStatement(Protocol):
    """What the compiler makes of a statement (dsl.compiler.Compiled)."""

    @property
    def sql(self) -> str: ...

    def source_position(self, position: int, /) -> int: ...

    def raises(self, position: int, /) -> bool: ...


class Compile(Protocol):
    """The signature of dsl.compiler.compile_sql."""

    def __call__(self, sql: str, *, standard_conforming_strings: bool) -> CompiledStatement | None: ...


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that mentions df: the text to send instead (None: as it came), and how it was compiled. `looks`: of
    df it names only what looks at workflows, so that nobody need hurry when it is committed.
    """

    text: bytes | None = None
    compiled: CompiledStatement | None = None
    looks: bool = False


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a session's settings say about how its statements are read; `codec` None means that they can't be."""

    codec: str | None = "utf_8"
    standard_conforming_strings: bool = True


#: What follows `df.`, as much as can be a name without quotes.
_NAMES = re.compile(rb'(?<![a-z0-9_$\x80-\xff])df"?[ \t\r\n\f\v]*\.([a-z_]*)', re.IGNORECASE)
#: What clients ask again and again while they wait for a workflow.
_LOOKS = frozenset((b"result", b"status", b"instances", b"nodes", b"list_instances", b"instance_info",
                    b"instance_nodes"))


def _looks(statement: bytes) -> bool:
    names = _NAMES.findall(statement)
    return bool(names) and all(name.lower() in _LOOKS for name in names)


def _always(_: bytes) -> bool:
    return True


class Rewriter:
    """Rewrites statements for all sessions of a process.

    `mentions` and `compile_` are those of dsl.compiler unless given. `cache_size` counts statements. `might` searches
    whole messages quickly for what may be a mention; where it says no, `mentions` is not asked. `narrow` means that the
    `mentions` given says yes to nothing that dsl.compiler's says no to: then the fast path may search in its place.
    """

    def __init__(
        self,
        *,
        mentions: Callable[[bytes], bool] | None = None,
        might: Callable[[bytes], bool] | None = None,
        compile_: Compile | None = None,
        cache_size: int = 1024,
        narrow: bool = False,
    ) -> None:
        self.narrow = narrow or mentions is None
        if mentions is None or compile_ is None:
            from dsl import compiler

            if mentions is None:
                mentions, might = compiler.mentions_dsl, compiler.might_mention_dsl
            compile_ = compile_ or compiler.compile_sql
        self.mentions = mentions
        self.might = might if might is not None else _always
        self._compile = compile_
        self._cached = lru_cache(maxsize=cache_size)(self._rewrite)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="dfproxy-compile")

    def rewrite(self, statement: bytes, dialect: Dialect) -> Statement | None:
        """What becomes of a statement in the session's encoding, without its zero byte; None: no mention of df."""
        if not self.mentions(statement):
            return None
        return self._cached(statement, dialect) if len(statement) <= CACHE_LIMIT else self._rewrite(statement, dialect)

    async def rewrite_large(self, statement: bytes, dialect: Dialect) -> Statement | None:
        """The same in a thread of its own, for statements of more than INLINE_LIMIT bytes."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._search_and_rewrite, statement, dialect)

    def close(self) -> None:
        """Gives up what has not begun; to be called once, when no session is left."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _search_and_rewrite(self, statement: bytes, dialect: Dialect) -> Statement | None:
        for start in range(0, len(statement), _WINDOW):
            if self.mentions(statement[start : start + _WINDOW + _OVERLAP]):
                return self._rewrite(statement, dialect)
        return None

    def _rewrite(self, statement: bytes, dialect: Dialect) -> Statement:
        codec = dialect.codec
        if codec is None:
            return Statement()
        try:
            sql = statement.decode(codec)
            if sql.encode(codec) != statement:
                return Statement()  # bytes that have two spellings: the rest of the statement must stay as it is
        except UnicodeError:
            return Statement()
        try:
            compiled = self._compile(sql, standard_conforming_strings=dialect.standard_conforming_strings)
            if compiled is None or compiled.sql == sql:
                return Statement(looks=_looks(statement))
            # What the compiler adds may hold characters that the session's encoding lacks; the client's own never do.
            text = compiled.sql.encode(codec, "replace")
        except Exception:
            # A bug of ours must not become the client's: the server judges the statement. Its text is not logged.
            log.exception("the compiler failed; the statement goes on as it came", size=len(statement))
            return Statement()
        if b"\0" in text:
            log.error("the compiler made a zero byte; the statement goes on as it came", size=len(statement))
            return Statement()
        return Statement(text, compiled)
