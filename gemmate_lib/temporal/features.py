"""What a timestamp is turned into before it is projected: numbers that a network can read.

Each kind shows other things of the same moment. Everything that must be exact is computed in
int64; what is a real number, in float64.

Shapes: `...` any shape of timestamps, int64, milliseconds since the Unix epoch, UTC; `F` features.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal.encoding import TAU, log_encoding, require_int64
from gemmate_lib.timestamps import DAY, EARLIEST, HOUR, LATEST, MINUTE, REFERENCE_MS

# The sizes of the calendar's one-hot groups: sign, four digits of the year, and so on.
GROUPS = {
    "before year 0": 2,
    "millennium": 10,
    "century": 10,
    "decade": 10,
    "year": 10,
    "month": 12,
    "day": 31,
    "weekday": 7,
    "hour": 24,
    "minute": 60,
    "leap year": 2,
    "day's tens": 4,
    "day's units": 10,
    "hour's tens": 3,
    "hour's units": 10,
    "minute's tens": 6,
    "minute's units": 10,
}
# Whole milliseconds, so that a phase is exact at any distance; the Gregorian calendar repeats
# after 400 years, of which the month, the year, the decade and the century are fractions.
GREGORIAN = 146_097 * DAY
PERIODS = (
    HOUR, DAY, 7 * DAY, GREGORIAN // 4800, GREGORIAN // 400, GREGORIAN // 40, GREGORIAN // 4,
)  # fmt: skip
CENTURY = GREGORIAN // 4
WAVES = 16  # of `era`: the shortest lasts 25 years


def _check(timestamps: torch.Tensor) -> None:
    require_int64(timestamps)
    outside = (timestamps < EARLIEST) | (timestamps > LATEST)
    if bool(outside.any()):
        first = int(timestamps[outside][0])
        raise GemmateError(f"The timestamp {first} is outside the years -9999 to 9999.")


def _floor(number: torch.Tensor, divisor: int) -> torch.Tensor:
    return torch.div(number, divisor, rounding_mode="floor")


def _tens(number: torch.Tensor) -> torch.Tensor:
    return _floor(number, 10)


def _units(number: torch.Tensor) -> torch.Tensor:
    return torch.remainder(number, 10)


def _is_leap(year: torch.Tensor) -> torch.Tensor:
    fourth, hundredth, last = (torch.remainder(year, n) == 0 for n in (4, 100, 400))
    return (fourth & ~hundredth | last).long()


def civil(timestamps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return year, month (1-12), day (1-31), weekday (Monday 0), hour and minute: int64 [...].

    The proleptic Gregorian calendar, by integer arithmetic alone: a year that starts in March has
    its leap day at the end, and 400 of them always have 146,097 days.
    Raises: GemmateError for another type than int64, or a year beyond -9999 to 9999.
    Source: https://howardhinnant.github.io/date_algorithms.html#civil_from_days
    """
    _check(timestamps)
    days = _floor(timestamps, DAY)
    minutes = _floor(timestamps - days * DAY, MINUTE)
    from_march = days + 719_468  # since 0000-03-01
    era = _floor(from_march, 146_097)
    day = from_march - era * 146_097  # of the era, from 0
    leaps = _floor(day, 1_460) - _floor(day, 36_524) + _floor(day, 146_096)
    year = _floor(day - leaps, 365)  # of the era, from 0
    day = day - (365 * year + _floor(year, 4) - _floor(year, 100))  # of the year, 1 March is 0
    month = _floor(5 * day + 2, 153)  # March is 0
    first = _floor(153 * month + 2, 5)
    return {
        "year": year + era * 400 + (month >= 10),
        "month": torch.where(month < 10, month + 3, month - 9),
        "day": day - first + 1,
        "weekday": torch.remainder(days + 3, 7),  # 1970-01-01 was a Thursday
        "hour": _floor(minutes, 60),
        "minute": torch.remainder(minutes, 60),
    }


def calendar(timestamps: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return one 1 for each field of the date and time, float64 [..., 221]: see GROUPS.

    A projection of it is a sum of learned vectors, one for each digit, month, weekday and so on.
    By construction it hands over the weekday and the leap years, which a network would otherwise
    have to work out, and the digits that a date is written with: where each goes is left to learn.
    """
    found = civil(timestamps)
    size = found["year"].abs()
    digits = [torch.remainder(_floor(size, 10**place), 10) for place in (3, 2, 1, 0)]
    rest = [found["month"] - 1, found["day"] - 1, found["weekday"], found["hour"], found["minute"]]
    pairs = [f(found[k]) for k in ("day", "hour", "minute") for f in (_tens, _units)]
    values = [(found["year"] < 0).long(), *digits, *rest, _is_leap(found["year"]), *pairs]
    hot = [
        torch.nn.functional.one_hot(value, classes)
        for value, classes in zip(values, GROUPS.values(), strict=True)
    ]
    return torch.cat(hot, dim=-1).double()


def log(timestamps: torch.Tensor, *, tau: float = TAU, **_: Any) -> torch.Tensor:
    """Return GemmaTE's own encoding, tau * log(max(t - reference, 1)): float64 [..., 1]."""
    return log_encoding(timestamps, tau)[..., None]


def signed_log(timestamps: torch.Tensor, *, tau: float = TAU, **_: Any) -> torch.Tensor:
    """Return the same with the sign of t - reference, so that before is not one moment."""
    _check(timestamps)
    elapsed = timestamps - REFERENCE_MS
    return (elapsed.sign() * elapsed.abs().clamp(min=1).double().log() * tau)[..., None]


def fourier(
    timestamps: torch.Tensor, *, shift: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return sine and cosine of the phase in each of PERIODS, float64 [..., 14].

    The remainder is taken in int64, so that a phase is as sharp in a thousand years as today.
    shift: what is learned, if the periods are: cycles a century to add to each frequency, [7]. In
    this unit a step of the optimizer turns no phase far, not even a century from the reference.
    """
    _check(timestamps)
    lengths = torch.tensor(PERIODS, device=timestamps.device)
    elapsed = timestamps[..., None] - REFERENCE_MS
    phase = torch.remainder(elapsed, lengths).double() / lengths
    if shift is not None:
        phase = phase + elapsed.double() / CENTURY * shift
    angle = phase * (2 * math.pi)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def era(timestamps: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return sine and cosine of the first WAVES harmonics of 400 years, float64 [..., 32].

    A clock with no fine hand: days beside each other look the same, decades do not. So what is
    learned at one date holds for its neighbours, and a date is hard to learn by heart, as it
    should be where dated texts are few. The kth harmonic is divided by the square root of k: slow
    changes weigh more. It cannot answer what day it is.
    """
    _check(timestamps)
    order = torch.arange(1, WAVES + 1, device=timestamps.device)
    phase = torch.remainder(timestamps - REFERENCE_MS, GREGORIAN).double() / GREGORIAN
    angle = phase[..., None] * order * (2 * math.pi)
    return torch.cat([angle.sin(), angle.cos()], dim=-1) / order.repeat(2).sqrt()


class Kind(NamedTuple):
    """From timestamps int64 [...], tau and shift to features float64 [..., F], and their number."""

    features: Callable[..., torch.Tensor]
    size: int


KINDS = {
    "log": Kind(log, 1),
    "signed_log": Kind(signed_log, 1),
    "fourier": Kind(fourier, 2 * len(PERIODS)),
    "learned_fourier": Kind(fourier, 2 * len(PERIODS)),
    "calendar": Kind(calendar, sum(GROUPS.values())),
    "era": Kind(era, 2 * WAVES),
}


def parts(kind: str) -> list[str]:
    """The kinds in a kind, such as `log+calendar`. Raises: GemmateError for an unknown one."""
    names = kind.split("+")
    for name in names:
        if name not in KINDS:
            known = ", ".join(KINDS)
            raise GemmateError(f"There is no temporal encoder {name!r}. Join any of {known} by +.")
    return names
