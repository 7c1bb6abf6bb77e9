"""Every answer of the generator, worked out again by another road than its own."""

import datetime
import itertools
import re
from collections import Counter

import pytest
import torch
from dateutil import tz

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal import dates
from gemmate_lib.temporal.dates import MONTHS, WEEKDAYS, Dialogue
from gemmate_lib.temporal.features import civil


def fields(timestamp: int) -> dict[str, int]:
    """By integer arithmetic on tensors: no datetime."""
    return {name: int(value) for name, value in civil(torch.tensor(timestamp)).items()}


def written(timestamp: int) -> str:
    f = fields(timestamp)
    return f"{WEEKDAYS[f['weekday']]}, {f['day']} {MONTHS[f['month'] - 1]} {f['year']}"


def days(timestamp: int, count: int) -> str:
    return written(timestamp + count * 86_400_000)


def months(timestamp: int, count: int) -> str:
    """Back day by day until the month is right, then on to the day, or to the month's end."""
    f = fields(timestamp)
    wanted = (f["year"] * 12 + f["month"] - 1 + count) // 12, (f["month"] - 1 + count) % 12 + 1
    step = timestamp
    while (fields(step)["year"], fields(step)["month"]) != wanted:
        step -= 86_400_000
    while fields(step)["day"] > f["day"]:
        step -= 86_400_000
    return written(step)


def easter(year: int) -> tuple[int, int]:
    """The anonymous Gregorian algorithm (Meeus, Astronomical Algorithms, 1991, chapter 8)."""
    a, (b, c) = year % 19, divmod(year, 100)
    d, e = divmod(b, 4)
    g = (8 * b + 13) // 25
    h = (19 * a + b - d - g + 15) % 30
    i, k = divmod(c, 4)
    m = (32 + 2 * e + 2 * i - h - k) % 7
    n = (a + 11 * h + 19 * m) // 433
    month = (h + m - 7 * n + 90) // 25
    return month, (h + m - 7 * n + 33 * month + 19) % 32


def holiday(timestamp: int) -> str:
    f = fields(timestamp)
    if (f["month"], f["day"]) in dates.FIXED:
        return dates.FIXED[f["month"], f["day"]]
    if (f["month"], f["day"]) == easter(f["year"]):
        return "Easter Sunday"
    fourth = f["month"] == 11 and f["weekday"] == 3 and (f["day"] - 1) // 7 == 3
    return "Thanksgiving" if fourth else "none"


def until(timestamp: int, month: int, day: int) -> int:
    """Counted day by day."""
    for count in itertools.count():
        f = fields(timestamp + count * 86_400_000)
        if (f["month"], f["day"]) == (month, day):
            return count
    raise AssertionError


def simple(kind: str, t: int) -> str:
    f = fields(t)
    clock = f"{f['hour']:02}:{f['minute']:02}"
    seasons = {12: "winter", 1: "winter", 2: "winter", 3: "spring", 4: "spring", 5: "spring",
               6: "summer", 7: "summer", 8: "summer"}  # fmt: skip
    answers = {
        "date": lambda: written(t), "weekday": lambda: WEEKDAYS[f["weekday"]],
        "time": lambda: clock, "date and time": lambda: f"{written(t)}, {clock}",
        "month": lambda: MONTHS[f["month"] - 1], "year": lambda: str(f["year"]),
        "season": lambda: seasons.get(f["month"], "autumn"),
        "yesterday": lambda: days(t, -1), "tomorrow": lambda: days(t, 1),
        "a week ago": lambda: days(t, -7), "in ten days": lambda: days(t, 10),
        "a month ago": lambda: months(t, -1), "three months ago": lambda: months(t, -3),
        "holiday": lambda: holiday(t), "days until Christmas": lambda: str(until(t, 12, 25)),
    }  # fmt: skip
    return answers[kind]()


def read_date(text: str) -> int:
    """Milliseconds at midnight of `5 March 1990`, found by Python's own ordinal."""
    day, month, year = re.search(r"(\d+) (\w+) (\d+)", text).groups()
    return (
        datetime.date(int(year), MONTHS.index(month) + 1, int(day)).toordinal() - 719_163
    ) * 86_400_000


def longer(dialogue: Dialogue) -> list[str]:
    t, asked = dialogue.timestamp, [question for question, _ in dialogue.turns]
    number = [int(found[0]) if (found := re.findall(r"\d+", text)) else 0 for text in asked]
    midnight = t // 86_400_000 * 86_400_000
    if dialogue.kind == "planning":
        start = t + number[0] * 86_400_000
        return [written(start), WEEKDAYS[fields(start)["weekday"]], days(start, number[2])]
    if dialogue.kind == "birthday":
        born, f = read_date(asked[0]), fields(t)
        b = fields(born)
        months_old = (f["year"] - b["year"]) * 12 + f["month"] - b["month"] - (f["day"] < b["day"])
        return [str(months_old // 12), str(until(t, b["month"], b["day"]))]
    if dialogue.kind == "countdown":
        return [str((read_date(asked[0]) - midnight) // 86_400_000)]
    if dialogue.kind == "history":
        return [str(abs(number[0] - fields(t)["year"]))]
    if dialogue.kind == "time zone":
        moment = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(
            milliseconds=t
        )
        cities = [re.search(r"in ([\w ]+)\?", question)[1] for question in asked]
        return [f"{moment.astimezone(tz.gettz(dates.ZONES[city])):%H:%M}" for city in cities]
    return [days(t, number[0]), days(t, number[0] - 7 * number[1])]


@pytest.mark.parametrize("split", dates.SPLITS)
@pytest.mark.parametrize("kind", dates.KINDS)
def test_every_answer_holds_by_another_road(kind: str, split: str) -> None:
    # dateutil.tz knows no rules for after 2037, where zoneinfo goes on by the last ones.
    last = 2_145_916_800_000 if kind == "time zone" else 1 << 62
    drawn = (d for d in dates.dialogues(7, split=split, kinds=(kind,)) if d.timestamp < last)
    for dialogue in itertools.islice(drawn, 60):
        answers = [answer for _, answer in dialogue.turns]
        wanted = [simple(kind, dialogue.timestamp)] if kind in dates.SIMPLE else longer(dialogue)
        assert answers == wanted, dialogue


def test_the_standard_questions_and_the_form_of_their_answers() -> None:
    now = datetime.datetime(2006, 5, 23, 14, 5, tzinfo=datetime.UTC)
    standard = {phrasings[0]: answer(now) for phrasings, answer in dates.SIMPLE.values()}
    assert standard["What is today's date?"] == "Tuesday, 23 May 2006"
    assert standard["What day of the week is it?"] == "Tuesday"
    assert standard["What time is it?"] == "14:05"
    assert standard["What was the date a week ago?"] == "Tuesday, 16 May 2006"
    assert standard["What year is it?"] == "2006"
    assert len({p for phrasings, _ in dates.SIMPLE.values() for p in phrasings}) == sum(
        len(phrasings) for phrasings, _ in dates.SIMPLE.values()
    )


def test_a_stream_is_its_seed_s_and_stays_in_its_split() -> None:
    for split, (first, last) in dates.SPLITS.items():
        once, twice, other = (
            list(itertools.islice(dates.dialogues(seed, split=split), 500)) for seed in (1, 1, 2)
        )
        assert once == twice != other
        assert {d.kind for d in once} == set(dates.KINDS)
        begin, end = (read_date(f"23 May {year}") for year in (first, last))
        assert all(begin <= d.timestamp < end for d in once)


def test_half_the_holiday_questions_are_asked_on_one() -> None:
    drawn = itertools.islice(dates.dialogues(3, kinds=("holiday",)), 600)
    names = Counter(dialogue.turns[0][1] for dialogue in drawn)
    assert 0.4 < 1 - names["none"] / 600 < 0.6
    assert {"Easter Sunday", "Thanksgiving", *dates.FIXED.values(), "none"} == set(names)


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(GemmateError, match=r"'befor'.*'before'"):
        next(dates.dialogues(0, split="befor"))
    with pytest.raises(GemmateError, match=r"'weekdy'.*'weekday'"):
        next(dates.dialogues(0, kinds=("weekdy",)))
