"""Questions whose answer depends on when they are asked, drawn by a seed, with true answers.

A question does not say what time it is: its timestamp does. All dates are Gregorian, all times
UTC, and every answer has one fixed form: "Tuesday, 23 May 2006", "Tuesday", "14:05", "2006".
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from gemmate_lib.config import among
from gemmate_lib.timestamps import MINUTE, REFERENCE, to_moment, to_timestamp

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")  # fmt: skip
SEASONS = ("winter", "spring", "summer", "autumn")  # in the north, by whole months from December
FIXED = {
    (1, 1): "New Year's Day", (2, 14): "Valentine's Day", (5, 1): "Labour Day",
    (7, 4): "Independence Day", (10, 31): "Halloween", (12, 25): "Christmas Day",
    (12, 26): "Boxing Day", (12, 31): "New Year's Eve",
}  # fmt: skip
ZONES = {"Tokyo": "Asia/Tokyo", "New York": "America/New_York", "Berlin": "Europe/Berlin",
         "Kolkata": "Asia/Kolkata", "Nairobi": "Africa/Nairobi"}  # fmt: skip
EVENTS = {"the first moon landing": 1969, "the fall of the Berlin Wall": 1989,
          "the first World Wide Web page": 1991, "the end of the First World War": 1918,
          "the first modern Olympic Games": 1896}  # fmt: skip
SPLITS = {"after": (2006, 2106), "before": (1906, 2006)}  # from 23 May to 23 May


@dataclass(frozen=True)
class Dialogue:
    """Turns of question and answer, all asked at `timestamp` (ms since the Unix epoch, UTC)."""

    kind: str
    timestamp: int
    turns: tuple[tuple[str, str], ...]


def short_date(day: datetime) -> str:
    """23 May 2006."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def long_date(day: datetime) -> str:
    """Tuesday, 23 May 2006."""
    return f"{WEEKDAYS[day.weekday()]}, {short_date(day)}"


def clock(moment: datetime) -> str:
    """14:05."""
    return f"{moment.hour:02}:{moment.minute:02}"


def date_after(**delta: int) -> Callable[[datetime], str]:
    """What tells the date some days or months on; where a month has no such day, its last."""

    def tell(now: datetime) -> str:
        from dateutil.relativedelta import relativedelta

        return long_date(now + relativedelta(**delta))

    return tell


def holiday(day: datetime) -> str:
    """The holiday of a day, or `none`; Easter and Thanksgiving (in the United States) move."""
    from dateutil.easter import easter

    if (day.month, day.day) in FIXED:
        return FIXED[day.month, day.day]
    if day.month == 11 and day.weekday() == 3 and 22 <= day.day <= 28:
        return "Thanksgiving"
    return "Easter Sunday" if day.date() == easter(day.year) else "none"


def days_until(now: datetime, month: int, day: int) -> int:
    """Days to the next such day; 0 on the day itself."""
    today = now.replace(hour=0, minute=0)
    then = today.replace(month=month, day=day)
    return ((then if then >= today else then.replace(year=now.year + 1)) - today).days


def age(now: datetime, born: datetime) -> int:
    """Completed years."""
    return now.year - born.year - ((now.month, now.day) < (born.month, born.day))


# Kind -> phrasings, and the answer at a moment. The first phrasing is the standard one.
Simple = tuple[tuple[str, ...], Callable[[datetime], str]]
SIMPLE: Mapping[str, Simple] = {
    "date": (("What is today's date?", "What date is it today?", "Tell me the date."), long_date),
    "weekday": (
        ("What day of the week is it?", "Which weekday is it?", "What weekday is today?"),
        lambda now: WEEKDAYS[now.weekday()],
    ),
    "time": (("What time is it?", "What is the time now?", "Tell me the time."), clock),
    "date and time": (
        ("What are the date and the time?", "Give me the date and the time."),
        lambda now: f"{long_date(now)}, {clock(now)}",
    ),
    "month": (("What month is it?", "Which month is it?"), lambda now: MONTHS[now.month - 1]),
    "year": (("What year is it?", "Which year is it?"), lambda now: str(now.year)),
    "season": (
        ("What season is it in the north?", "Which season is it in the north?"),
        lambda now: SEASONS[now.month % 12 // 3],
    ),
    "yesterday": (
        ("What was the date yesterday?", "What date was it yesterday?"),
        date_after(days=-1),
    ),
    "tomorrow": (
        ("What is the date tomorrow?", "What date is it tomorrow?"),
        date_after(days=1),
    ),
    "a week ago": (
        ("What was the date a week ago?", "What date was it a week ago?"),
        date_after(days=-7),
    ),
    "in ten days": (
        ("What is the date in 10 days?", "What date is it in ten days?"),
        date_after(days=10),
    ),
    "a month ago": (
        ("What was the date a month ago?", "What date was it one month ago?"),
        date_after(months=-1),
    ),
    "three months ago": (
        ("What was the date three months ago?", "What date was it 3 months ago?"),
        date_after(months=-3),
    ),
    "holiday": (("Which holiday is today?", "What holiday is it today?"), holiday),
    "days until Christmas": (
        ("How many days are left until Christmas?", "How many days until Christmas?"),
        lambda now: str(days_until(now, 12, 25)),
    ),
}
Turns = tuple[tuple[str, str], ...]


def planning(now: datetime, rng: random.Random) -> Turns:
    """A trip in some days: when it starts, on which weekday, and when it ends."""
    start, nights = now + timedelta(days=rng.randrange(2, 40)), rng.randrange(2, 15)
    return (
        (f"I leave in {(start - now).days} days. What date is that?", long_date(start)),
        ("What day of the week is it then?", WEEKDAYS[start.weekday()]),
        (f"I stay {nights} nights. When am I back?", long_date(start + timedelta(days=nights))),
    )


def birthday(now: datetime, rng: random.Random) -> Turns:
    """Somebody's age, and the days to the next birthday."""
    years, month, day = rng.randrange(5, 90), rng.randrange(1, 13), rng.randrange(1, 29)
    born = datetime(now.year - years, month, day, tzinfo=UTC)
    return (
        (f"I was born on {short_date(born)}. How old am I?", str(age(now, born))),
        ("How many days until my birthday?", str(days_until(now, born.month, born.day))),
    )


def countdown(now: datetime, rng: random.Random) -> Turns:
    """Days to a date that is given."""
    days = rng.randrange(1, 200)
    day = short_date(now + timedelta(days=days))
    return ((f"The launch is on {day}. How many days are left?", str(days)),)


def history(now: datetime, rng: random.Random) -> Turns:
    """Calendar years since, or until, an event that has a year."""
    event, year = rng.choice(list(EVENTS.items()))
    word = "since" if now.year >= year else "until"
    asked = f"{event[0].upper()}{event[1:]} was in {year}. How many years is it {word} then?"
    return ((asked, str(abs(now.year - year))),)


def time_zone(now: datetime, rng: random.Random) -> Turns:
    """The clock in two places of the world."""
    cities = rng.sample(list(ZONES), 2)
    answers = (clock(now.astimezone(ZoneInfo(ZONES[city]))) for city in cities)
    asked = (f"What time is it in {cities[0]}?", f"And in {cities[1]}?")
    return tuple(zip(asked, answers, strict=True))


def calendar_sum(now: datetime, rng: random.Random) -> Turns:
    """There and back by days and weeks."""
    there = now + timedelta(days=rng.randrange(11, 100))
    weeks = rng.randrange(1, 9)
    back = there - timedelta(weeks=weeks)
    return (
        (f"What date is it in {(there - now).days} days?", long_date(there)),
        (f"And {weeks} weeks before that?", long_date(back)),
    )


LONGER: Mapping[str, Callable[[datetime, random.Random], Turns]] = {
    "planning": planning,
    "birthday": birthday,
    "countdown": countdown,
    "history": history,
    "time zone": time_zone,
    "calendar sum": calendar_sum,
}
KINDS = (*SIMPLE, *LONGER)


def moments(rng: random.Random, split: str) -> Iterator[datetime]:
    """Moments of a split without end, to the minute, evenly drawn.

    Raises: GemmateError for an unknown split.
    """
    first, last = SPLITS[among(split, SPLITS, "split")]
    start, end = (to_timestamp(REFERENCE.replace(year=year)) for year in (first, last))
    while True:
        yield to_moment(rng.randrange(start, end, MINUTE))


def ask(kind: str, now: datetime, rng: random.Random) -> Dialogue:
    """One dialogue of a kind at a moment. Raises: GemmateError for an unknown kind."""
    if among(kind, KINDS, "kind of question") in SIMPLE:
        phrasings, answer = SIMPLE[kind]
        turns: Turns = ((rng.choice(phrasings), answer(now)),)
    else:
        turns = LONGER[kind](now, rng)
    return Dialogue(kind, to_timestamp(now), turns)


def dialogues(
    seed: int, *, split: str = "after", kinds: tuple[str, ...] = KINDS
) -> Iterator[Dialogue]:
    """Draw dialogues without end; half the holiday questions are asked on a holiday.

    Raises: GemmateError for an unknown split or kind.
    """
    rng = random.Random(seed)
    drawn = moments(rng, split)
    for now in drawn:
        kind = rng.choice(kinds)
        if kind == "holiday" and rng.random() < 0.5:
            now = next(moment for moment in drawn if holiday(moment) != "none")
        yield ask(kind, now, rng)
