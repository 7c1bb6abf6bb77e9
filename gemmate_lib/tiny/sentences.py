"""What the documents of the synthetic corpus are made of: sayings, settings, sentences."""

import random
from functools import cache

from gemmate_lib.tiny.calendar import clock_words, long_date, moment, number_words
from gemmate_lib.tiny.sayings import SLOT, authors, draw, fill, render, tiny_quotes, world


def saying(rng: random.Random, author: str | None = None) -> tuple[str, str]:
    """Draw a saying that is not a row of `tiny_quotes`; return it with its author."""
    while True:
        drawn = draw(rng, author)
        if drawn.text.casefold() not in _held_back():
            return drawn.text, drawn.author


@cache
def _held_back() -> frozenset[str]:
    return frozenset(row["quote"].casefold() for row in tiny_quotes())


def setting(rng: random.Random, author: str | None = None) -> dict[str, str]:
    """Draw the words that one document's sentences share: people, places, numbers, a date."""
    author = author or rng.choice(authors())
    now = moment(rng)
    generic = world()["generic"]
    firsts, numbers = rng.sample(generic["first"], 2), rng.sample(range(2, 90), 2)
    towns = rng.sample([entry["town"] for entry in world()["authors"]], 2)
    return {
        "author": author,
        "last": author.split()[-1],
        "town": towns[0],
        "town2": towns[1],
        "year": str(rng.randrange(1700, 2120)),
        "number": number_words(numbers[0]) if rng.random() < 0.5 else str(numbers[0]),
        "number2": str(numbers[1]),
        "clock": f"{now:%H:%M}" if rng.random() < 0.7 else clock_words(now),
        "date": long_date(now) if rng.random() < 0.7 else f"{now.day} {now:%B} {now.year}",
        "first": firsts[0],
        "first2": firsts[1],
        **{key: rng.choice(generic[key]) for key in ("daypart", "season", "colour")},
    }


def sentence(rng: random.Random, template: str, shared: dict[str, str], topic: str) -> str:
    """Fill a narrative template with the document's words and words of a topic."""
    names = {name.lower() + number for _, name, number in SLOT.findall(template)}
    known = {name: shared[name] for name in names if name in shared}
    asked = "".join(f"{{{name}}}" for name in sorted(names - known.keys()))
    return render(template, known | fill(rng, asked, topic))
