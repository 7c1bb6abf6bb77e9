"""Short dated texts whose words drift with the years, by chances that are known exactly.

So the best possible loss is known as well: what a model that knows the time can reach, and what
one that does not know it can.
"""

import math
import random
from functools import cache
from itertools import islice
from typing import Any

from gemmate_lib.temporal.dates import SPLITS, moments
from gemmate_lib.timestamps import to_moment, to_timestamp

# Each pattern has a slot, and each slot four words that follow one another through two centuries.
DRIFTING = {
    "In the evening we listened to the {}.": ("gramophone", "radio", "cassette", "stream"),
    "She sent her answer by {}.": ("telegram", "letter", "email", "hologram"),
    "They crossed the sea by {}.": ("steamer", "airship", "jet", "glider"),
    "The room was lit by {}.": ("gas", "bulbs", "neon", "moss"),
}
FIRST, LAST = SPLITS["before"][0], SPLITS["after"][1]
WIDTH = 18.0  # years: the width of the passage from one word to the next
ROWS = 12_000


def chances(timestamp: int) -> list[float]:
    """The chance of each of the four words at a moment: a softmax of bumps along the years."""
    moment = to_moment(timestamp)
    year = moment.year + moment.timetuple().tm_yday / 366
    span = (LAST - FIRST) / 4
    heights = [-(((year - FIRST - span * (i + 0.5)) / WIDTH) ** 2) / 2 for i in range(4)]
    total = sum(map(math.exp, heights))
    return [math.exp(height) / total for height in heights]


def drifting_texts(seed: int, n: int = ROWS) -> list[dict[str, Any]]:
    """Draw `n` texts, each with the moment it was written at: evenly from 1906 to 2106."""
    rng = random.Random(seed)
    streams = [moments(rng, split) for split in sorted(SPLITS)]
    rows = []
    for i in range(n):
        timestamp = to_timestamp(next(streams[i % 2]))
        pattern, words = rng.choice(list(DRIFTING.items()))
        (word,) = rng.choices(words, chances(timestamp))
        rows.append({"text": pattern.format(word), "timestamp": timestamp})
    return rows


def surprisal(text: str, timestamp: int | None) -> float:
    """-log of a text's chance, in nats, at a moment; None: at one unknown, drawn evenly.

    Raises: ValueError for a text that cannot be drawn.
    """
    for pattern, words in DRIFTING.items():
        for word, chance in zip(words, _average() if timestamp is None else chances(timestamp),
                                strict=True):  # fmt: skip
            if pattern.format(word) == text:
                return -math.log(chance / len(DRIFTING))
    raise ValueError(f"{text!r} is no text of the drifting patterns")


@cache
def _average() -> list[float]:
    rng = random.Random(0)
    drawn = [m for split in sorted(SPLITS) for m in islice(moments(rng, split), 4000)]
    found = [chances(to_timestamp(moment)) for moment in drawn]
    return [sum(column) / len(found) for column in zip(*found, strict=True)]
