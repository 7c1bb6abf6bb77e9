"""Dates, clock times and numbers, in digits and in words, for the synthetic corpus."""

import datetime
import random

from gemmate_lib.tiny.sayings import world

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
TENS = ["", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth",
    "eight": "eighth", "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
SEASONS = ("winter", "spring", "summer", "autumn")
DAY = datetime.timedelta(days=1)


def number_words(n: int) -> str:
    """Return a whole number below ten thousand in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = f" and {number_words(n % size)}" if n % size else ""
    return f"{number_words(n // size)} {name}{rest}"


def ordinal_words(n: int) -> str:
    """Return the ordinal of a number below one hundred in words."""
    head, dash, last = number_words(n).rpartition("-")
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + dash + ORDINALS.get(last, regular)


def long_date(day: datetime.date) -> str:
    """Return a date in the fixed form of the course: `Tuesday, 23 May 2006`."""
    return f"{day:%A}, {day.day} {day:%B} {day.year}"


def moment(rng: random.Random) -> datetime.datetime:
    """Draw a minute between 1906 and 2106."""
    start = datetime.datetime(1906, 5, 23)
    return start + datetime.timedelta(minutes=rng.randrange(200 * 365 * 24 * 60))


def clock_words(now: datetime.datetime) -> str:
    """Return the time of day as spoken, for example `five past two in the afternoon`."""
    part = "at night" if now.hour < 6 else "in the morning" if now.hour < 12 else "in the afternoon"
    part = "in the evening" if now.hour >= 18 else part
    hour, minute = now.hour % 12 or 12, now.minute
    if minute > 30:
        return f"{number_words(60 - minute)} to {number_words(hour % 12 + 1)} {part}"
    past = {0: "", 15: "quarter past ", 30: "half past "}
    return f"{past.get(minute, number_words(minute) + ' past ')}{number_words(hour)} {part}"


def answers_of_time(now: datetime.datetime) -> dict[str, str]:
    """Return the answers to `questions_of_time` for one moment, in their fixed forms."""
    return {
        "today": long_date(now),
        "weekday": f"{now:%A}",
        "time": f"{now:%H:%M}",
        "year": str(now.year),
        "month": f"{now:%B}",
        "yesterday": long_date(now - DAY),
        "tomorrow": long_date(now + DAY),
        "week_ago": long_date(now - 7 * DAY),
        "ten_days": long_date(now + 10 * DAY),
        "season": SEASONS[now.month % 12 // 3],
    }


def calendar_page(rng: random.Random) -> str:
    """Dates and clock times in digits and in words, and questions about a given moment."""
    now = moment(rng)
    kind = rng.random()
    if kind < 0.55:
        known, asked = answers_of_time(now), world()["questions_of_time"]
        head = rng.choice(["Now: {today}, {time}.", "It is {today}, {time}.", "Today is {today}."])
        lines = [head.format(**known)]
        for question in rng.sample(list(asked), rng.randint(2, 4)):
            if "time" in asked[question] and "{time}" not in head:
                continue
            lines.append(f"{question} {known[asked[question]]}")
        return "\n".join(lines)
    if kind < 0.7:
        holiday = rng.choice(world()["holidays"])
        count = rng.randint(2, 60)
        unit = rng.choice(["days", "weeks", "months", "years"])
        when = rng.choice([f"in {count} {unit}", f"{number_words(count)} {unit} ago", "last week"])
        return f"{holiday} was celebrated {when}. It is {clock_words(now)}, that is {now:%H:%M}."
    if kind < 0.85:
        day, year = ordinal_words(now.day), number_words(now.year)
        return f"{now.day} {now:%B} {now.year} is the {day} of {now:%B}, {year}. ({now:%Y-%m-%d})"
    days = [long_date(now + n * DAY) for n in range(rng.randint(2, 5))]
    return "\n".join(days)
