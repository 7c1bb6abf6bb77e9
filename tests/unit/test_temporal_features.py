"""The calendar is exact for twenty thousand years; each kind shows what it says."""

import datetime
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal import features as f
from gemmate_lib.temporal.encoder import TemporalEncoder
from gemmate_lib.temporal.encoding import DAY, REFERENCE, REFERENCE_MS, to_timestamp

UTC = datetime.UTC
MOMENTS = st.datetimes(timezones=st.just(UTC))


def at(moment: datetime.datetime) -> torch.Tensor:
    """int64 [1]: milliseconds since the epoch."""
    return torch.tensor([to_timestamp(moment)])


def fields(timestamps: torch.Tensor) -> list[tuple[int, ...]]:
    """One tuple a timestamp."""
    return list(zip(*(value.tolist() for value in f.civil(timestamps).values()), strict=True))


@given(MOMENTS)
def test_the_calendar_is_pythons(moment: datetime.datetime) -> None:
    wanted = (moment.year, moment.month, moment.day, moment.weekday(), moment.hour, moment.minute)
    assert fields(at(moment)) == [wanted]


def test_every_day_of_twenty_thousand_years() -> None:
    """Told by counting: each day follows the one before by the leap rule."""
    days = torch.arange(f.EARLIEST // DAY, f.LATEST // DAY + 1)
    found = f.civil(days * DAY)
    year, month, day = found["year"], found["month"], found["day"]
    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    lengths = torch.tensor([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])[month - 1]
    lengths = lengths + (leap & (month == 2))
    last = day == lengths
    assert torch.equal(torch.where(last, 1, day + 1)[:-1], day[1:])
    assert torch.equal(torch.where(last, month % 12 + 1, month)[:-1], month[1:])
    assert torch.equal((year + (last & (month == 12)))[:-1], year[1:])
    assert torch.equal((found["weekday"][:-1] + 1) % 7, found["weekday"][1:])
    assert (year[0], month[0], day[0]) == (-9999, 1, 1)
    assert (year[-1], month[-1], day[-1]) == (9999, 12, 31)


def test_known_days() -> None:
    assert fields(torch.tensor([0])) == [(1970, 1, 1, 3, 0, 0)]
    assert fields(at(REFERENCE)) == [(2006, 5, 23, 1, 0, 0)]  # a Tuesday
    assert fields(torch.tensor([-1])) == [(1969, 12, 31, 2, 23, 59)]
    assert fields(torch.tensor([f.EARLIEST]))[0][:3] == (-9999, 1, 1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("kind", f.KINDS)
def test_features_keep_the_shape(kind: str, shape: tuple[int, ...]) -> None:
    features, count = f.KINDS[kind]
    found = features(torch.full(shape, REFERENCE_MS + 12345))
    assert found.shape == (*shape, count) and found.dtype == torch.float64


@given(st.integers(f.EARLIEST, f.LATEST))
def test_the_calendars_features_give_back_the_date(timestamp: int) -> None:
    moment = torch.tensor([timestamp])
    groups = f.calendar(moment)[0].split(list(f.GROUPS.values()))
    assert all(group.sum() == 1 for group in groups)
    found = [int(group.argmax()) for group in groups]
    sign, *digits = found[:5]
    month, day, weekday, hour, minute = found[5:10]
    year = int("".join(map(str, digits))) * (-1 if sign else 1)
    assert fields(moment) == [(year, month + 1, day + 1, weekday, hour, minute)]
    assert found[10] == (1 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 0)
    pairs = [(found[11], found[12]), (found[13], found[14]), (found[15], found[16])]
    assert [10 * tens + units for tens, units in pairs] == [day + 1, hour, minute]


def test_learned_periods_start_as_the_fixed_ones_and_learn() -> None:
    moments = torch.tensor([0, REFERENCE_MS + 3 * DAY, f.LATEST])
    fixed, learned = (TemporalEncoder(kind, 8) for kind in ("fourier", "learned_fourier"))
    assert torch.equal(fixed.features(moments), learned.features(moments))
    torch.nn.init.normal_(learned.projection.weight)
    learned(moments).sum().backward()
    assert learned.shift is not None and learned.shift.grad is not None
    assert (learned.shift.grad != 0).all()
    # One cycle more a century: where the fixed phase has come back, this one is a cycle on.
    learned.shift.data[0] = 1.0
    later = torch.tensor([REFERENCE_MS, REFERENCE_MS + f.CENTURY])
    torch.testing.assert_close(*learned.features(later)[:, [0, len(f.PERIODS)]], atol=1e-6, rtol=0)
    half = torch.tensor([REFERENCE_MS + f.CENTURY // 2])  # whole hours: only the shift turns it
    assert learned.features(half)[0, len(f.PERIODS)].item() == pytest.approx(-1, abs=1e-6)


def test_an_era_sees_decades_and_no_days() -> None:
    year, origin = f.GREGORIAN // 400, -(3 * 10**12)
    shift = torch.tensor([0, DAY, 10 * year, 100 * year, f.GREGORIAN, -7 * f.GREGORIAN])
    start, day, decade, century, *round_again = f.era(origin + shift)
    apart = [float((other - start).norm()) for other in (day, decade, century)]
    assert 50 * apart[0] < apart[1] < apart[2]
    assert all(torch.equal(start, again) for again in round_again)
    # Each wave is a circle of radius 1 / sqrt(k) around zero, so that no time is louder.
    radii = torch.hypot(*start.split(f.WAVES))
    torch.testing.assert_close(radii, torch.arange(1, f.WAVES + 1).double() ** -0.5)
    # The kth wave is itself again after a kth of 400 years, and opposite after half of that.
    for k in range(1, f.WAVES + 1):
        half = f.era(torch.tensor([origin + f.GREGORIAN // (2 * k)]))[0]
        wave = [k - 1, k - 1 + f.WAVES]
        torch.testing.assert_close(half[wave], -start[wave], atol=1e-9, rtol=0)


def test_signed_log_tells_before_from_after() -> None:
    elapsed = torch.tensor([-(10**12), -5, -1, 0, 1, 5, 10**12])
    found = f.signed_log(REFERENCE_MS + elapsed)[:, 0]
    assert torch.equal(found, -found.flip(0))
    assert found[-1] == pytest.approx(0.1 * math.log(10**12)) and found[3] == 0
    assert torch.equal(found[4:], f.log(REFERENCE_MS + elapsed[4:])[:, 0])


@given(st.integers(-(10**6), 10**6), st.integers(0, len(f.PERIODS) - 1))
def test_fourier_comes_back_after_each_period(turns: int, which: int) -> None:
    moment = REFERENCE_MS + 123_456_789
    later = moment + turns * f.PERIODS[which]
    if not f.EARLIEST <= later <= f.LATEST:
        return
    columns = [which, which + len(f.PERIODS)]
    first, second = (f.fourier(torch.tensor([t]))[0, columns] for t in (moment, later))
    assert torch.equal(first, second)  # exactly, however far


def test_wrong_input_is_refused() -> None:
    for kind, (features, _) in f.KINDS.items():
        with pytest.raises(GemmateError, match="int64"):
            features(torch.tensor([1.0]))
        if kind != "log":  # the original says nothing of the calendar
            for beyond in (f.EARLIEST - 1, f.LATEST + 1):
                with pytest.raises(GemmateError, match="-9999 to 9999"):
                    features(torch.tensor([0, beyond]))
    with pytest.raises(GemmateError, match=r"'lgo'.*log, signed_log"):
        f.parts("calendar+lgo")
    assert f.parts("log+calendar") == ["log", "calendar"]
