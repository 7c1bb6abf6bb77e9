"""Moments as whole milliseconds since the Unix epoch, UTC: from dates, and from people's files."""

import datetime
import math
import re
import time
import warnings
from collections.abc import Collection
from typing import Any

from gemmate_lib.config import GemmateError

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
REFERENCE = datetime.datetime(2006, 5, 23, tzinfo=datetime.UTC)
SECOND = 1_000  # in milliseconds, as everything below
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
YEAR = 365.2425 * DAY  # the mean year of the Gregorian calendar
# -9999-01-01 and 9999-12-31 23:59:59.999 in the proleptic Gregorian calendar.
EARLIEST, LATEST = -377_705_116_800_000, 253_402_300_799_999
# In place of a timestamp that is not known. No calendar reaches so far back.
MISSING = -(2**63)
# Milliseconds for 1973, seconds for the year 5138: whole data sets of less are seconds.
_SECONDS_BELOW = 10**11


def to_timestamp(moment: datetime.datetime) -> int:
    """Return whole milliseconds since the Unix epoch, exactly.

    Raises: GemmateError for a moment without a time zone, which means a different instant on
    every machine.
    """
    if moment.tzinfo is None:
        raise GemmateError(f"{moment} has no time zone. Add tzinfo=datetime.UTC.")
    return (moment - EPOCH) // datetime.timedelta(milliseconds=1)


def to_moment(timestamp: int) -> datetime.datetime:
    """Return the moment of a timestamp, UTC, exactly.

    Raises: OverflowError for a year beyond 1 to 9999.
    """
    return EPOCH + datetime.timedelta(milliseconds=timestamp)


REFERENCE_MS = to_timestamp(REFERENCE)


def now() -> int:
    """Return the current time."""
    return time.time_ns() // 1_000_000


def parse(value: Any, *, where: str = "the timestamp") -> int:
    """Read milliseconds, or a date in ISO 8601 (UTC unless it says otherwise); none is MISSING.

    where: what to name in an error, such as the row.
    Raises: GemmateError for a float, NaN, what is neither, or a year beyond -9999 to 9999.
    """
    if value in (None, MISSING) or (isinstance(value, str) and not value.strip()):
        return MISSING
    remedy = "Give whole milliseconds, or a date such as 2006-05-23T14:05Z."
    if isinstance(value, str):
        value = _read(value.strip())
    if isinstance(value, float):
        why = "is not a number" if math.isnan(value) else "is not a whole number"
        raise GemmateError(f"{where} {why}: {value}. {remedy}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise GemmateError(f"{where} is no timestamp: {value!r}. {remedy}")
    if not EARLIEST <= value <= LATEST:
        raise GemmateError(f"{where} is outside the years -9999 to 9999: {value}. {remedy}")
    return value


def _read(text: str) -> Any:
    """The number or moment in a text; the text itself where there is neither."""
    if re.fullmatch(r"[+-]?\d{1,19}", text):  # 20060523 too: never a date without its dashes
        return int(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
    return to_timestamp(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))


def warn_of_seconds(timestamps: Collection[int], *, where: str) -> None:
    """Warn where all of several timestamps are so small that they may be seconds.

    A single small one is no ground: January 1970 is a date.
    """
    known = {t for t in timestamps if t != MISSING}
    if len(known) > 1 and max(map(abs, known)) < _SECONDS_BELOW:
        last = max(known, key=abs)
        meant = f"{_day(last)}, or {_day(1000 * last)} if they are seconds"
        said = f"{where}: as milliseconds all lie near 1970: {last} is {meant}."
        warnings.warn(f"{said} Multiply seconds by 1000.", UserWarning, stacklevel=2)


def _day(timestamp: int) -> str:
    try:
        return to_moment(timestamp).date().isoformat()
    except OverflowError:
        return "no date"
