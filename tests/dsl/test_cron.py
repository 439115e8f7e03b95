"""dsl.cron: SURFACE Part I "Cron"."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsl.cron import check, next_fire


def fires(expression: str, zone: str | None, after: str, count: int = 1) -> list[str]:
    """The next firings in UTC."""
    moment = datetime.fromisoformat(after).replace(tzinfo=UTC)
    found = []
    for _ in range(count):
        moment = next_fire(expression, zone, moment)
        assert moment.tzinfo is UTC
        found.append(moment.isoformat(timespec="minutes")[:16])
    return found


@pytest.mark.parametrize(("expression", "after", "expected"), [
    ("* * * * *", "2024-01-01T00:00:00", ["2024-01-01T00:01", "2024-01-01T00:02"]),
    ("* * * * *", "2024-01-01T00:00:59.999", ["2024-01-01T00:01"]),
    ("0 0 * * *", "2023-12-31T23:59:59", ["2024-01-01T00:00", "2024-01-02T00:00"]),
    ("*/20 * * * *", "2024-01-01T00:00:00", ["2024-01-01T00:20", "2024-01-01T00:40", "2024-01-01T01:00"]),
    ("10-50/10 1 * * *", "2024-01-01T01:35:00", ["2024-01-01T01:40", "2024-01-01T01:50", "2024-01-02T01:10"]),
    ("5,1 0 * * *", "2024-01-01T00:00:00", ["2024-01-01T00:01", "2024-01-01T00:05"]),
    # 2024-06-14 is a Friday.
    ("0 9 * * 1-5", "2024-06-14T10:00:00", ["2024-06-17T09:00", "2024-06-18T09:00"]),
    ("0 0 * * 0", "2024-06-14T00:00:00", ["2024-06-16T00:00"]),
    ("0 0 * * 7", "2024-06-14T00:00:00", ["2024-06-16T00:00"]),
    ("0 0 * * Sun", "2024-06-14T00:00:00", ["2024-06-16T00:00"]),
    ("0 0 * * sunday", "2024-06-14T00:00:00", ["2024-06-16T00:00"]),
    ("0 0 * * MON-SUN", "2024-06-15T00:00:00", ["2024-06-16T00:00", "2024-06-17T00:00"]),
    ("0 0 * * fri-7", "2024-06-12T00:00:00", ["2024-06-14T00:00", "2024-06-15T00:00", "2024-06-16T00:00", "2024-06-21T00:00"]),
    ("0 0 1 JAN,july *", "2024-01-02T00:00:00", ["2024-07-01T00:00", "2025-01-01T00:00"]),
    # Either day field suffices when both are restricted...
    ("0 0 13 * 5", "2024-07-10T00:00:00", ["2024-07-12T00:00", "2024-07-13T00:00", "2024-07-19T00:00"]),
    # ...and only then.
    ("0 0 13 * ?", "2024-06-14T00:00:00", ["2024-07-13T00:00"]),
    ("0 0 ? * 5", "2024-06-14T00:00:00", ["2024-06-21T00:00"]),
    ("0 0 29 2 *", "2024-03-01T00:00:00", ["2028-02-29T00:00"]),
    ("@hourly", "2024-06-14T10:30:00", ["2024-06-14T11:00"]),
    (" @Daily ", "2024-06-14T10:30:00", ["2024-06-15T00:00"]),
    ("@weekly", "2024-06-14T10:30:00", ["2024-06-16T00:00"]),
    ("@monthly", "2024-06-14T10:30:00", ["2024-07-01T00:00"]),
    ("@yearly", "2024-06-14T10:30:00", ["2025-01-01T00:00"]),
])
def test_utc(expression: str, after: str, expected: list[str]) -> None:
    assert fires(expression, None, after, len(expected)) == expected
    assert fires(expression, "UTC", after, len(expected)) == expected


@pytest.mark.parametrize(("expression", "zone", "after", "expected"), [
    ("0 9 * * *", "Europe/Berlin", "2024-01-15T12:00", ["2024-01-16T08:00"]),
    ("0 9 * * *", "Europe/Berlin", "2024-07-15T12:00", ["2024-07-16T07:00"]),
    # Berlin skips 02:00-03:00 (01:00 UTC) on 2024-03-31: at the first valid instant.
    ("30 2 * * *", "Europe/Berlin", "2024-03-30T12:00", ["2024-03-31T01:00", "2024-04-01T00:30"]),
    ("*/30 2 * * *", "Europe/Berlin", "2024-03-30T12:00", ["2024-03-31T01:00", "2024-04-01T00:00", "2024-04-01T00:30"]),
    ("0 2,3 * * *", "Europe/Berlin", "2024-03-30T12:00", ["2024-03-31T01:00", "2024-04-01T00:00"]),
    # It repeats 02:00-03:00 on 2024-10-27 (00:00 and 01:00 UTC): only once...
    ("30 2 * * *", "Europe/Berlin", "2024-10-26T12:00", ["2024-10-27T00:30", "2024-10-28T01:30"]),
    ("30 2 * * *", "Europe/Berlin", "2024-10-27T00:45", ["2024-10-28T01:30"]),
    ("30 2 * * *", "Europe/Berlin", "2024-10-27T01:00", ["2024-10-28T01:30"]),
    ("0 */2 * * *", "Europe/Berlin", "2024-10-26T22:30", ["2024-10-27T00:00", "2024-10-27T03:00"]),
    # ...but with a wildcard hour each real hour counts, in both directions.
    ("30 * * * *", "Europe/Berlin", "2024-03-31T00:00", ["2024-03-31T00:30", "2024-03-31T01:30", "2024-03-31T02:30"]),
    ("*/30 * * * *", "Europe/Berlin", "2024-10-26T23:30",
     ["2024-10-27T00:00", "2024-10-27T00:30", "2024-10-27T01:00", "2024-10-27T01:30", "2024-10-27T02:00"]),
    ("0 0-23 * * *", "Europe/Berlin", "2024-10-26T23:30", ["2024-10-27T00:00", "2024-10-27T01:00", "2024-10-27T02:00"]),
    ("15 * * * 0", "Europe/Berlin", "2024-10-27T00:20", ["2024-10-27T01:15", "2024-10-27T02:15"]),
    # Cairo skips midnight; Lord Howe moves by half an hour; Apia skipped the whole of 2011-12-30.
    ("0 0 * * *", "Africa/Cairo", "2024-04-25T12:00", ["2024-04-25T22:00", "2024-04-26T21:00"]),
    ("0 2 * * *", "Australia/Lord_Howe", "2024-10-05T00:00", ["2024-10-05T15:30", "2024-10-06T15:00"]),
    ("45 1 * * *", "Australia/Lord_Howe", "2024-04-06T12:00", ["2024-04-06T14:45", "2024-04-07T15:15"]),
    ("45 * * * *", "Australia/Lord_Howe", "2024-04-06T14:00", ["2024-04-06T14:45", "2024-04-06T15:15", "2024-04-06T16:15"]),
    ("0 12 30 12 *", "Pacific/Apia", "2011-12-29T00:00", ["2011-12-30T10:00", "2012-12-29T22:00"]),
])
def test_zones(expression: str, zone: str, after: str, expected: list[str]) -> None:
    assert fires(expression, zone, after, len(expected)) == expected


@pytest.mark.parametrize("expression", [
    "", "x", "* * * *", "* * * * * *", "0 0 1 1 * 2030", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 0 *",
    "* * * 13 *", "* * * * 8", "*/0 * * * *", "5-1 * * * *", "1,,2 * * * *", "-1 * * * *", "? * * * *", "* * * foo *",
    "* * * * funday", "@reboot", "@", "0 0 30 2 *", "0 0 31 4,6,9,11 *", "١ * * * *", "* * * * *\0", "1/2/3 * * * *",
    "* * L * *", "* * LW * *", "* * * * 5L", "* * * * 1#2"])
def test_refused(expression: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(expression, None)
    assert str(caught.value).startswith(f"Invalid cron expression '{expression}': ")
    with pytest.raises(ValueError):
        next_fire(expression, None, datetime(2024, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "Europe", "../UTC", "/etc/passwd", "a\0b", "+02:00"])
def test_unknown_zones(zone: str) -> None:
    with pytest.raises(ValueError) as caught:
        check("* * * * *", zone)
    assert str(caught.value) == f"unknown time zone '{zone}'"


def test_checked() -> None:
    check("0 9 * * 1-5", None)
    check("@hourly", "Europe/Berlin")
    check("@hourly", "europe/BERLIN")
    check("0 0 ? JUL Monday-FRI", "utc")


ZONES = st.sampled_from([None, "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo", "Asia/Kolkata"])
FIELDS = st.tuples(st.sampled_from(["*", "0", "30", "*/7", "15,45"]), st.sampled_from(["*", "0", "2", "1-3", "*/5"]),
                   st.sampled_from(["*", "1", "27-31"]), st.sampled_from(["*", "3,10", "4"]), st.sampled_from(["*", "0", "1-5"]))


@settings(deadline=None)
@given(FIELDS, ZONES, st.datetimes(datetime(2023, 1, 1), datetime(2026, 1, 1)))
def test_the_next_is_later_and_nothing_lies_between(fields: tuple[str, ...], zone: str | None, after: datetime) -> None:
    """Asking again from any moment in between gives the same answer."""
    expression, moment = " ".join(fields), after.replace(tzinfo=UTC)
    fire = next_fire(expression, zone, moment)
    assert fire > moment
    assert fire.second == fire.microsecond == 0
    for part in (0.001, 0.5, 0.999):
        assert next_fire(expression, zone, moment + (fire - moment) * part) == fire
    local = fire.astimezone(ZoneInfo(zone or "UTC"))
    if fields[1] == "*":
        assert fields[0] != "30" or local.minute == 30
    elif local.utcoffset() == (fire - timedelta(minutes=1)).astimezone(local.tzinfo).utcoffset():
        assert fields[1] not in ("0", "2") or local.hour == int(fields[1])


@settings(deadline=None)
@given(ZONES, st.datetimes(datetime(2023, 1, 1), datetime(2026, 1, 1)))
def test_every_minute_is_every_minute(zone: str | None, after: datetime) -> None:
    moment = after.replace(tzinfo=UTC)
    assert next_fire("* * * * *", zone, moment) - moment <= timedelta(minutes=1)
