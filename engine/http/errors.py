"""Why an HTTP step failed.

The text is for people; a policy looks at the SQLSTATE: `HT` and the status for an answer of 500 or more (`HT503`),
`HTTMO` for a timeout, `HTCON` where no connection came about, `HTREQ` where the exchange broke off, 42501 for what is
not allowed, 54000 for what is too large, 22023 for a request that can't be built.
"""

from __future__ import annotations

from engine.model import StepError, storable

TIMEOUT = "HTTMO"
CONNECTION = "HTCON"
EXCHANGE = "HTREQ"
BLOCKED = "42501"
TOO_LARGE = "54000"
INVALID = "22023"


class HttpError(Exception):
    """An HTTP step's failure; its text is the error of the node."""

    def __init__(self, message: str, sqlstate: str, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(storable(message))
        self.sqlstate = sqlstate
        self.hint = hint
        self.detail = detail

    @property
    def step_error(self) -> StepError:
        """As checkpoints record it."""
        return StepError(str(self), self.sqlstate, self.detail, self.hint)


class BlockedError(HttpError):
    """The call is not allowed (SURFACE 8.5)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(f"Blocked: {message}", BLOCKED, hint)


class RequestError(HttpError):
    """The request can't be built."""

    def __init__(self, message: str, sqlstate: str = INVALID, hint: str | None = None) -> None:
        super().__init__(message, sqlstate, hint)
