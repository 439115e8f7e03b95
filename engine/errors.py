"""What can go wrong with a step's session."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ConnectionLostError", "ResultTooLargeError", "ServerError", "StepRefusedError"]


class ServerError(Exception):
    """An ErrorResponse. `fields` are keyed by the protocol's one-letter codes."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields
        super().__init__(self.message)

    @property
    def message(self) -> str:
        return self.fields.get("M", "unknown error")

    @property
    def sqlstate(self) -> str:
        return self.fields.get("C", "XX000")

    @property
    def fatal(self) -> bool:
        """Whether the session ended with it."""
        return self.fields.get("V", self.fields.get("S")) in ("FATAL", "PANIC")


class ConnectionLostError(Exception):
    """The session ended without an answer; `error` is the server's last words, if it had any."""

    def __init__(self, message: str, error: ServerError | None = None) -> None:
        super().__init__(message)
        self.error = error


class ResultTooLargeError(Exception):
    """A result exceeds a limit; the message names the limit. The connection must be closed."""


class StepRefusedError(Exception):
    """A statement that no step may contain; its transaction must be rolled back."""

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class NotBegunError(Exception):
    """A step was sent behind another workflow's commit, which did not come about, or does not come to an end. It has
    not begun, as far as anybody can see: it takes its own way.
    """
