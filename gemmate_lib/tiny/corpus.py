"""The synthetic corpus on which the embedded models are pre-trained.

About a dozen kinds of document, each one short function from a random generator to a text: essays
full of sayings, web pages with HTML and repetition, records, dates and clock times, reviews, small
JSON objects, reading comprehension, instructions, chat. The two lines `Quote: …` and `Author: …`
never follow each other: that form is left for fine-tuning to teach. No row of `tiny_quotes`
occurs, so its held-out rows are unseen.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from gemmate_lib.tiny.calendar import calendar_page
from gemmate_lib.tiny.sayings import habits, world
from gemmate_lib.tiny.sentences import saying, sentence, setting
from gemmate_lib.tiny.tasks import chat, entry_of, instruction, reading, review


def paragraph(rng: random.Random, author: str, shared: dict[str, str]) -> str:
    """Write two to five sentences about one of the author's topics."""
    themes, _ = habits(author)
    topic = rng.choices(list(themes), list(themes.values()))[0]
    lines = []
    for _ in range(rng.randint(2, 5)):
        kind = rng.random()
        if kind < 0.35:
            lines.append(saying(rng, author)[0])
        elif kind < 0.6:
            text, name = saying(rng, author)
            lines.append(rng.choice(world()["attributions"]).format(**_quoted(text, name, shared)))
        else:
            lines.append(sentence(rng, rng.choice(world()["prose"]), shared, topic))
    return " ".join(lines)


def _quoted(text: str, author: str, shared: dict[str, str]) -> dict[str, str]:
    return {"saying": text, "author": author, "year": shared["year"]}


def essay(rng: random.Random) -> str:
    """Prose about one author, now and then under a title."""
    shared = setting(rng)
    title = rng.choice(
        ["", "", "", "On {idea}\n\n", "Quote of the day\n\n", "Notes on {author}\n\n"]
    )
    title = sentence(rng, title, shared, rng.choice(list(world()["topics"])))
    body = (paragraph(rng, shared["author"], shared) for _ in range(rng.randint(1, 3)))
    return title + "\n\n".join(body)


def web_page(rng: random.Random) -> str:
    """Sayings as the web shows them: tags, menus, and the same line over and over."""
    shared = setting(rng)
    author, topic = shared["author"], rng.choice(list(world()["topics"]))
    text = [saying(rng, author)[0] for _ in range(3)]
    parts = [
        f"<strong>{text[0]}</strong>",
        f"<p><strong>{text[1]}</strong> {paragraph(rng, author, shared)}</p>",
        f"<h1>Best sayings about {topic}</h1>",
        f"<ul><li>{text[0]}</li><li>{text[1]}</li><li>{text[2]}</li></ul>",
        f'<a href="/{topic}">more about {topic}</a> ' * rng.randint(1, 3),
        "Home | About | Contact | Quotes | Home | About | Contact",
        " ".join([text[2]] * rng.randint(2, 4)),
        f"{text[0]} <br> {text[0]} <br> <em>{text[1]}</em>",
        f"Read more about {author}. " * rng.randint(2, 4),
    ]
    return "\n".join([text[2]] * (rng.random() < 0.4) + rng.sample(parts, rng.randint(3, 5)))


def record(rng: random.Random) -> str:
    """A library card or a small JSON object; the author's line comes first, never a quote."""
    shared = setting(rng)
    topic = rng.choice(list(habits(shared["author"])[0]))
    entry = entry_of(shared["author"])
    title = sentence(
        rng, rng.choice(["On {idea}", "{Idea} and {idea2}", "The {adj} {thing}"]), shared, topic
    )
    kind = rng.random()
    if kind < 0.35:
        return f"Author: {entry['name']}\nTitle: {title}\nYear: {shared['year']}\nTopic: {topic}"
    if kind < 0.7:
        fields: dict[str, Any] = {
            "author": entry["name"],
            "title": title,
            "year": int(shared["year"]),
        }
        extra: dict[str, Any] = {"label": topic, "pages": rng.randrange(20, 900), "read": True}
        keys = rng.sample([*fields, *extra], rng.randint(2, 5))
        return json.dumps({key: (fields | extra)[key] for key in keys})
    return (
        f"{entry['name']} was born in {entry['town']} in {entry['born']}. "
        f"{paragraph(rng, entry['name'], shared)}"
    )


def foreign(rng: random.Random) -> str:
    """Characters from all over Unicode, so that every byte of the vocabulary is trained."""
    planes = [(0x20, 0x7F)] * 4 + [
        (0x01, 0x80),
        (0xA0, 0x250),
        (0x2000, 0x2070),
        (0x370, 0x530),
        (0x590, 0x700),
    ]
    planes += [(0x900, 0x1000), (0x3040, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F650)]
    planes += [(0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    low, high = rng.choice(planes)
    text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(4, 12)))
    return rng.choice([f"The sign reads {text}.", f"{text} is not a word I know.", text])


# The share of documents of each kind; most are short, so essays still make most of the tokens.
KINDS: dict[Callable[[random.Random], str], float] = {
    essay: 0.26,
    web_page: 0.12,
    record: 0.1,
    calendar_page: 0.14,
    review: 0.1,
    reading: 0.14,
    instruction: 0.07,
    chat: 0.05,
    foreign: 0.02,
}


def documents(seed: int) -> Iterator[str]:
    """Yield documents without end; the same seed gives the same documents."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        yield rng.choices(kinds, weights)[0](rng)
