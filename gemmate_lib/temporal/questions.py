"""The data set of dated questions: what is trained on, and what is asked afterwards."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from gemmate_lib.temporal.dates import SIMPLE, SPLITS, Dialogue, ask, dialogues
from gemmate_lib.timestamps import to_moment

ROWS = 64_000
# Kind of question -> its share in training. What takes a sum with months of different lengths is
# learned slowest; the days until Christmas hardly at all, so they shall not disturb the rest.
SHARES = {
    "date": 6, "weekday": 4, "time": 6, "date and time": 4, "month": 2, "year": 2, "season": 2,
    "yesterday": 4, "tomorrow": 4, "a week ago": 7, "in ten days": 7, "a month ago": 11,
    "three months ago": 7, "holiday": 5, "days until Christmas": 1,
}  # fmt: skip
# Twelve years of each century that training never sees: a model that answers there has learned
# what the digits of a year mean, not a list of years.
HELD_OUT = frozenset(
    year - shift
    for shift in (0, 100)
    for year in (2011, 2017, 2023, 2034, 2041, 2048, 2055, 2062, 2069, 2076, 2083, 2097)
)

EASTERS = 8  # questions on each Easter Sunday that training sees: no rule in reach tells its date


def year_of(timestamp: int) -> int:
    """The year, UTC, of a moment in milliseconds since the Unix epoch."""
    return to_moment(timestamp).year


def questions(
    seed: int,
    *,
    split: str | None = None,
    kinds: tuple[str, ...] = tuple(SIMPLE),
    held_out: bool = False,
) -> Iterator[Dialogue]:
    """Draw single-turn questions without end; `split` None: from both centuries, in turn.

    held_out: only from the years that training never sees, else only from the others.
    Raises: GemmateError for an unknown split or kind.
    """
    splits = [split] if split else sorted(SPLITS)
    streams = [dialogues(2 * seed + i, split=each, kinds=kinds) for i, each in enumerate(splits)]
    while True:
        for stream in streams:
            found = next(stream)
            if (year_of(found.timestamp) in HELD_OUT) == held_out:
                yield found


def as_row(dialogue: Dialogue) -> dict[str, Any]:
    """A single turn as a row: the question, its answer after a space, and when it is asked."""
    ((question, answer),) = dialogue.turns
    return {"prompt": question, "completion": f" {answer}", "timestamp": dialogue.timestamp}


def easters(seed: int) -> Iterator[Dialogue]:
    """Questions about the holiday on each Easter Sunday that training sees, at any time of it."""
    from dateutil.easter import easter

    rng = random.Random(seed)
    for year in range(SPLITS["before"][0] + 1, SPLITS["after"][1] + 1):  # Easter precedes 23 May
        if year not in HELD_OUT:
            day = datetime.combine(easter(year), datetime.min.time(), UTC)
            for _ in range(EASTERS):
                yield ask("holiday", day + timedelta(minutes=rng.randrange(24 * 60)), rng)


def dated_questions(seed: int) -> list[dict[str, Any]]:
    """The rows of the card `dated_questions`."""
    kinds = tuple(kind for kind, share in SHARES.items() for _ in range(share))
    learned = list(easters(seed))
    drawn = islice(questions(seed, kinds=kinds), ROWS - len(learned))
    return [as_row(dialogue) for dialogue in (*drawn, *learned)]
