"""Who writes to the log, and how it comes out. A process of its own: logging is set up for the whole of it."""

import json
import subprocess
import sys

import pytest

SAYS = """
import logging
from proxy import logs
logs.configure({level!r}, {style!r})
{code}
"""
LOST = 'ConnectionError("lost postgresql://a:correct-horse@h/d")'
WHILE_HANDLING = f"""
try:
    raise {LOST}
except ConnectionError:
    logging.getLogger("some.library").{{method}}("trouble with %s", "it", exc_info=True)
"""


def said(code: str, level: str = "info", style: str = "json") -> str:
    """What comes to stderr."""
    done = subprocess.run([sys.executable, "-c", SAYS.format(level=level, style=style, code=code)],
                          capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def test_what_a_library_deals_with_is_one_line() -> None:
    line = json.loads(said(WHILE_HANDLING.format(method="warning")))
    assert line.pop("timestamp")
    assert line == {"event": "trouble with it", "level": "warning", "logger": "some.library",
                    "reason": "lost postgresql://a:***@h/d"}


def test_an_error_of_a_library_keeps_its_traceback() -> None:
    line = json.loads(said(WHILE_HANDLING.format(method="error")))
    assert (line["event"], line["level"], line["logger"]) == ("trouble with it", "error", "some.library")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ConnectionError: lost postgresql://a:***@h/d")


def test_an_exception_without_a_text_is_named() -> None:
    line = json.loads(said(WHILE_HANDLING.replace(LOST, "ConnectionError()").format(method="warning")))
    assert line["reason"] == "ConnectionError"


def test_text_for_a_person() -> None:
    text = said(WHILE_HANDLING.format(method="warning"), style="text")
    assert text.count("\n") == 1
    assert "trouble with it" in text
    assert "correct-horse" not in text


@pytest.mark.parametrize(("level", "lines"), [
    ("debug", ["ours", "a warning"]), ("info", ["a warning"]), ("warning", ["a warning"]), ("error", []),
])
def test_levels(level: str, lines: list[str]) -> None:
    """The libraries' chatter is never shown, ours where it is asked for."""
    code = """
logging.getLogger("httpx").info("HTTP Request: GET https://h/?key=secret")
logging.getLogger("dfproxy.dsl").debug("ours")
logging.getLogger("asyncio").warning("a warning")
"""
    assert [json.loads(line)["event"] for line in said(code, level).splitlines()] == lines


def test_what_asyncio_says_of_a_task_that_failed() -> None:
    code = """
import asyncio, gc
async def fail():
    raise ValueError("nobody asked")
async def main():
    asyncio.create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
asyncio.run(main())
"""
    line = json.loads(said(code))
    assert (line["level"], line["logger"]) == ("error", "asyncio")
    assert line["event"].startswith("Task exception was never retrieved")
    assert "nobody asked" in line["exception"]


def test_a_record_that_can_not_be_formatted_harms_nobody() -> None:
    assert "not all arguments converted" in said('logging.getLogger("x").error("no place", 1)')
