"""Cron expressions: what they accept, and when they fire next (SURFACE Part I "Cron").

The library cronsim parses and enumerates matching wall-clock times; how those become instants around a change of the
clocks is decided here, because cronsim copies Debian's cron there (it skips `*/30 2 * * *` where Part I does not).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib.resources import files
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

_NICKNAMES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}
_LONG_NAMES = re.compile(
    r"\b(?:(SUN|MON|TUES|WEDNES|THURS|FRI|SATUR)DAY|(JAN|FEBR)UARY|(MAR)CH|(APR)IL|(JUNE)|(JULY)|(AUG)UST"
    r"|(SEPT)EMBER|(OCT)OBER|(NOV|DEC)EMBER)\b")
#: What cronsim knows beyond the standard: the last day (L, LW, 5L), the second Monday (1#2).
_EXTENSIONS = re.compile(r"#|(?<![A-Z])L")
#: No clock has been put back by more, and none will be (days were repeated only in the nineteenth century).
_LONGEST_REPEAT = timedelta(hours=3)
_MINUTE = timedelta(minutes=1)


def check(expression: str, zone: str | None) -> None:
    """Raises ValueError `Invalid cron expression 'X': ...` if it is not valid or never fires, `unknown time zone 'X'`.

    Five fields (minute, hour, day of month, month, day of week; 0-7, Sunday is 0 and 7), names of months and days,
    lists, ranges, steps, `?` for `*` in the day fields, or a nickname. Zones are those of the tz database, in whatever
    case; None is UTC.
    """
    find_zone(zone)
    next_fire(expression, zone, datetime(2024, 1, 1, tzinfo=UTC))


def next_fire(expression: str, zone: str | None, after: datetime) -> datetime:
    """The first firing strictly after `after` (an aware datetime), in UTC. Raises ValueError as `check` does.

    Where every hour matches, each real hour counts: hours that the clocks skip are no hours, repeated ones are two.
    Otherwise wall-clock times count: a skipped one fires at the first valid instant, a repeated one the first time.
    """
    fields = _fields(expression)
    tz = find_zone(zone)
    local = after.astimezone(tz)
    try:
        if len(CronSim(fields, local.replace(tzinfo=None)).hours) == 24:
            return _real_hours(fields, tz, after, local)
        return next(instant for wall in _walls(fields, local)
                    if (instant := _first_valid(wall, tz)) > after)
    except (CronSimError, StopIteration, OverflowError) as error:
        raise _invalid(expression, str(error) or "it never fires") from None


def _walls(fields: str, local: datetime) -> Iterator[datetime]:
    """Matching wall-clock times after that one."""
    return CronSim(fields, local.replace(tzinfo=None, fold=0))


def _first_valid(wall: datetime, tz: ZoneInfo) -> datetime:
    """The instant of a wall-clock time: the first, if it is repeated; the end of the gap, if it is skipped."""
    instant = wall.replace(tzinfo=tz).astimezone(UTC)
    if instant.astimezone(tz).replace(tzinfo=None) == wall:
        return instant
    # Read with the offset before the gap it is too late, with the one after it too early: the gap's end lies between.
    early, late = sorted(wall.replace(tzinfo=tz, fold=fold).astimezone(UTC) for fold in (0, 1))
    before = early.astimezone(tz).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + (late - early) // 2
        if middle.astimezone(tz).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late.replace(microsecond=0)


def _real_hours(fields: str, tz: ZoneInfo, after: datetime, local: datetime) -> datetime:
    """As next_fire, where each real hour counts."""
    first = next(instant for wall in _walls(fields, local)
                 if (instant := wall.replace(tzinfo=tz).astimezone(UTC)) > after
                 and instant.astimezone(tz).replace(tzinfo=None) == wall)
    offsets = {(after + d).astimezone(tz).utcoffset() for d in (-_LONGEST_REPEAT, timedelta(), _LONGEST_REPEAT)}
    if len(offsets) == 1:
        return first
    # Near a change: times of the past hours that are repeated now.
    recent = itertools.takewhile(lambda wall: wall <= local.replace(tzinfo=None) + _LONGEST_REPEAT,
                                 _walls(fields, local - _LONGEST_REPEAT))
    repeats = (wall.replace(tzinfo=tz, fold=1).astimezone(UTC) for wall in recent
               if wall.replace(tzinfo=tz, fold=1).utcoffset() != wall.replace(tzinfo=tz).utcoffset())
    return min((instant for instant in repeats
                if after < instant < first and instant.astimezone(tz).fold == 1), default=first)


@lru_cache(maxsize=1024)
def _fields(expression: str) -> str:
    """Five fields in cronsim's spelling."""
    text = _NICKNAMES.get(expression.strip().lower(), expression).upper()
    parts = text.split()
    if len(parts) != 5:
        raise _invalid(expression, "expected five fields (minute, hour, day of month, month, day of week) "
                                   f"or a nickname ({', '.join(_NICKNAMES)})")
    for place in (2, 4):
        if parts[place] == "?":
            parts[place] = "*"
    for part in parts:
        if _EXTENSIONS.search(part):
            raise _invalid(expression, f"'{part}' is no standard cron")
    parts[3:] = [_LONG_NAMES.sub(lambda m: m[0][:3], part) for part in parts[3:]]
    parts[4] = re.sub(r"-SUN\b", "-7", parts[4])  # MON-SUN
    return " ".join(parts)


@lru_cache(maxsize=256)
def find_zone(zone: str | None) -> ZoneInfo:
    """The zone of that name, in whatever case; None is UTC. Raises ValueError `unknown time zone 'X'`."""
    try:
        return ZoneInfo("UTC" if zone is None else zone)
    except (KeyError, ValueError, OSError):  # unknown; not a name; a directory of the tz database
        name = _zones().get(zone.lower()) if zone is not None else None
        if name is None:
            raise ValueError(f"unknown time zone '{zone}'") from None
        return ZoneInfo(name)


@lru_cache(maxsize=1)
def _zones() -> dict[str, str]:
    """The names of all zones, by themselves in lower case."""
    return {name.lower(): name for name in files("tzdata").joinpath("zones").read_text("ascii").split()}


def _invalid(expression: str, reason: str) -> ValueError:
    return ValueError(f"Invalid cron expression '{expression}': {reason}")
