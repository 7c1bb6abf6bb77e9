"""Times from people's files: exact, in UTC, and refused by row where they cannot be read."""

import math
import warnings
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmate_lib import timestamps as t
from gemmate_lib.config import GemmateError


@given(st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)))
def test_iso_dates_come_back_in_whole_milliseconds(moment: datetime) -> None:
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC)
    expected = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert t.parse(moment.isoformat()) == expected
    assert t.parse(moment.replace(tzinfo=None).isoformat()) == expected  # UTC where it says nothing
    assert t.parse(str(expected)) == t.parse(expected) == expected


def test_the_same_moment_in_several_forms() -> None:
    for written in ("2009-02-13T23:31:30Z", "2009-02-14T00:31:30+01:00", " 1234567890000 ",
                    "2009-02-13 23:31:30", 1234567890000):  # fmt: skip
        assert t.parse(written) == 1234567890000
    assert t.parse("2006-05-23") == t.REFERENCE_MS
    assert t.parse(0) == 0 and t.parse("-1") == -1


def test_no_time_is_missing() -> None:
    for nothing in (None, "", "  ", t.MISSING):
        assert t.parse(nothing) == t.MISSING


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (1.5, "not a whole number"), (1234567890000.0, "not a whole number"),
        ("1.2e12", "not a whole number"), (math.nan, "not a number"), ("nan", "not a number"),
        (math.inf, "not a whole number"), ("yesterday", "no timestamp"), ("2006-02-30", "no time"),
        (True, "no timestamp"), ([1], "no timestamp"), (2**62, "years -9999 to 9999"),
        (t.LATEST + 1, "years -9999 to 9999"), (str(t.EARLIEST - 1), "years -9999 to 9999"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_the_row_and_the_remedy(value: object, why: str) -> None:
    with pytest.raises(GemmateError, match=rf"^Row 7: date .*{why}.*Give whole milliseconds"):
        t.parse(value, where="Row 7: date")


def test_a_whole_data_set_of_seconds_is_warned_of_with_both_dates() -> None:
    seconds = [1_100_000_000, 1_234_567_890, t.MISSING]
    with pytest.warns(UserWarning, match=r"1234567890 is 1970-01-15, or 2009-02-13 if") as seen:
        t.warn_of_seconds(seconds, where="events.csv")
    assert len(seen) == 1 and str(seen[0].message).startswith("events.csv: ")


@pytest.mark.parametrize(
    "fine", [[5], [5, 5, 5], [], [t.MISSING], [5, 1_234_567_890_000], [10**11, 1]]
)
def test_small_times_are_no_ground_for_a_warning(fine: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.warn_of_seconds(fine, where="here")


def test_now_is_now() -> None:
    assert abs(t.now() - datetime.now(UTC).timestamp() * 1000) < 60_000
