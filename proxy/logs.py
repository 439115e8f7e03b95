"""Logging: structlog to stderr, as text for a person on a terminal and as JSON lines for everything else.

What is logged never holds a password: settings keep them in `SecretStr`, and a last processor takes them out of texts
that came from elsewhere (an exception that quotes a connection string). What libraries log, and asyncio does, comes the
same way: a line is a line of JSON whoever wrote it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

#: user:password@ of a URI, and password=... of a keyword string.
_URI = re.compile(r"(\w+://[^\s:/@]*):[^\s@/]+@")
_KEYWORD = re.compile(r"(?i)\b(password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)")


def redact(text: str) -> str:
    """`text` without the passwords of connection strings in it."""
    # Few texts can have one, and these two looks are quick.
    if "://" in text:
        text = _URI.sub(r"\1:***@", text)
    return _KEYWORD.sub(r"\1***", text) if "password" in text.casefold() else text


def _redacting(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = redact(value)
    return event


class _Libraries(logging.Handler):
    """Logs with structlog what came to the standard library's logging."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {"logger": record.name}
            if record.exc_info and record.exc_info[1] is not None:
                if record.levelno < logging.ERROR:
                    # Something that a library deals with, as when a pool waits for a server that is away.
                    fields["reason"] = str(record.exc_info[1]) or type(record.exc_info[1]).__name__
                else:
                    fields["exc_info"] = record.exc_info
            structlog.get_logger().log(record.levelno, record.getMessage(), **fields)
        except Exception:  # noqa: BLE001 - a handler never raises; this is what it has to do instead
            self.handleError(record)


def configure(level: str, style: str) -> None:
    """Sets logging up for the whole process. `style` is `text`, `json` or `auto` (text where stderr is a terminal)."""
    least = getattr(logging, level.upper())
    text = style == "text" or (style == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redacting,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries say too much below warnings, the addresses of HTTP steps among it.
    logging.basicConfig(handlers=[_Libraries()], level=max(least, logging.WARNING), force=True)
    logging.getLogger("dfproxy").setLevel(least)
