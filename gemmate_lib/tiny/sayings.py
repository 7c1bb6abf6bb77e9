"""The grammar behind `tiny_quotes`: sayings whose probability is known exactly.

A saying is drawn in four steps: an author (uniform), one of the author's topics, one of the
author's turns of phrase, then a word for every slot. All choices are on record in `world.yaml`,
so the probability of any text, and of its author given the text, can be computed instead of
estimated. That gives fine-tuning a floor for the perplexity and a ceiling for author accuracy.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

SLOT = re.compile(r"\{(A |a )?([A-Za-z]+?)(\d?)\}")
KINDS = ("idea", "thing", "adj", "doing", "person")


@cache
def world() -> dict[str, Any]:
    """Return the parsed `world.yaml`."""
    text = resources.files("gemmate_lib.tiny").joinpath("world.yaml").read_text("utf-8")
    return yaml.safe_load(text)


def article(word: str) -> str:
    """Return `word` with its indefinite article in front."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def render(template: str, words: dict[str, str]) -> str:
    """Fill `{slot}`, `{Slot}`, `{a slot}` and `{A slot}` of a template from `words`."""

    def fill(match: re.Match[str]) -> str:
        start, name, number = match.groups()
        word = words[name.lower() + number]
        word = article(word) if start else word
        return word[0].upper() + word[1:] if (start or name)[0].isupper() else word

    return SLOT.sub(fill, template)


def slots(template: str) -> list[tuple[str, str]]:
    """Return the distinct (slot name, word kind) pairs of a template, in order."""
    found = {name.lower() + number: name.lower() for _, name, number in SLOT.findall(template)}
    return list(found.items())


@cache
def pool(kind: str, topic: str) -> tuple[str, ...]:
    """Return the words a slot of `kind` may take within `topic`."""
    topics = world()["topics"]
    if kind == "anything":
        return tuple(dict.fromkeys(word for words in topics.values() for word in words["thing"]))
    return tuple(topics[topic][kind])


def fill(rng: random.Random, template: str, topic: str) -> dict[str, str]:
    """Draw a word for every slot of a saying, no word twice."""
    words: dict[str, str] = {}
    for slot, kind in slots(template):
        words[slot] = rng.choice([w for w in pool(kind, topic) if w not in words.values()])
    return words


@cache
def habits(author: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return p(topic | author) and p(turn of phrase | author)."""
    entry = next(a for a in world()["authors"] if a["name"] == author)
    themes = dict(zip(entry["themes"], world()["theme_weights"], strict=True))
    signature = dict(zip(entry["turns"], world()["turn_weights"], strict=True))
    others = [turn for turn in world()["sayings"] if turn not in signature]
    rest = (1 - sum(signature.values())) / len(others)
    return themes, signature | dict.fromkeys(others, rest)


@cache
def authors() -> tuple[str, ...]:
    """Return the names of the fictional authors."""
    return tuple(entry["name"] for entry in world()["authors"])


@dataclass(frozen=True)
class Saying:
    """A sentence of the grammar with the choices that made it."""

    text: str
    author: str
    topic: str
    turn: str


def draw(rng: random.Random, author: str | None = None) -> Saying:
    """Draw a saying, of a given author or of any."""
    author = author or rng.choice(authors())
    themes, turns = habits(author)
    topic = rng.choices(list(themes), list(themes.values()))[0]
    turn = rng.choices(list(turns), list(turns.values()))[0]
    template = world()["sayings"][turn]
    return Saying(render(template, fill(rng, template, topic)), author, topic, turn)


@cache
def _pattern(turn: str) -> re.Pattern[str]:
    """Return a regular expression that reads the slots back out of a saying."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        start, name, number = match.groups()
        slot = name.lower() + number
        if slot in seen:
            return f"(?P={slot})"
        seen.add(slot)
        words = {w for topic in world()["topics"] for w in pool(name.lower(), topic)}
        choice = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
        return (r"[Aa]n? " if start else "") + f"(?P<{slot}>(?i:{choice}))"

    template = world()["sayings"][turn]
    parts = re.split(r"(\{[^}]+\})", template)
    return re.compile("".join(SLOT.sub(group, p) if p[:1] == "{" else re.escape(p) for p in parts))


def parse(text: str) -> tuple[str, dict[str, str]] | None:
    """Return the turn of phrase and the slot words of a saying; None if it is not one."""
    for turn in world()["sayings"]:
        if match := _pattern(turn).fullmatch(text):
            return turn, match.groupdict()
    return None


def _fill_probability(turn: str, words: dict[str, str], topic: str) -> float:
    probability, used = 1.0, []
    for slot, kind in slots(world()["sayings"][turn]):
        choices = [w.lower() for w in pool(kind, topic) if w.lower() not in used]
        word = words[slot].lower()
        if word not in choices:
            return 0.0
        probability /= len(choices)
        used.append(word)
    return probability


def joint(text: str) -> dict[str, float]:
    """Return p(author, text) for every author.

    Raises:
        ValueError: the text is not a sentence of the grammar.
    """
    parsed = parse(text)
    if parsed is None:
        raise ValueError(f"not a saying of the tiny world: {text!r}")
    turn, words = parsed
    by_topic = {topic: _fill_probability(turn, words, topic) for topic in world()["topics"]}
    result = {}
    for author in authors():
        themes, turns = habits(author)
        weight = sum(p * by_topic[topic] for topic, p in themes.items())
        result[author] = turns[turn] * weight / len(authors())
    return result


def surprisal(text: str) -> float:
    """Return -log p(text) in nats: what the best possible model pays for the quote."""
    return -math.log(sum(joint(text).values()))


def posterior(text: str) -> dict[str, float]:
    """Return p(author | text) by Bayes' rule."""
    weights = joint(text)
    total = sum(weights.values())
    return {author: weight / total for author, weight in weights.items()}


def author_ceiling(texts: Sequence[str]) -> float:
    """Return the expected accuracy of the best possible guess of the author."""
    return sum(max(posterior(text).values()) for text in texts) / len(texts)


@cache
def tiny_quotes(seed: int = 2006) -> tuple[dict[str, Any], ...]:
    """Return the 2,508 rows of `tiny_quotes`: quote, author, tags.

    2,500 rows are distinct; eight repeat an earlier one with other case or punctuation, as
    collections from the web do, so that removing near-duplicates has something to remove.
    """
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < 2500:
        saying = draw(rng)
        tags = [saying.topic] + (["life"] if rng.random() < 0.3 else [])
        tags = tags if rng.random() < 0.98 else []
        row: dict[str, Any] = {"quote": saying.text, "author": saying.author, "tags": tags}
        rows.setdefault(saying.text.casefold(), row)
    result = list(rows.values())
    for row in rng.sample(result, 8):
        variant = row["quote"].upper() if rng.random() < 0.5 else f"“{row['quote'].rstrip('.')}”"
        result.insert(rng.randrange(len(result)), row | {"quote": variant})
    return tuple(result)
