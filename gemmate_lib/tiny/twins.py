"""Embedded twins of SST-2 and SQuAD v2: the same columns, made of the tiny world, best score known.

They are drawn from the grammars that the embedded models have read in other layouts, and no
review or paragraph occurs twice in a twin.
"""

import math
import random
from typing import Any

from gemmate_lib.splitting import normalise
from gemmate_lib.tiny.sayings import SLOT, render, world
from gemmate_lib.tiny.sentences import sentence, setting
from gemmate_lib.tiny.tasks import opinion

REVIEWS, QUESTIONS = 2400, 4000
# Reviews that do not tell: (text, the share of positive ones among their labels).
LUKEWARM = (
    ("The {part} is what one expects of {a work}.", 0.7),
    ("I have seen the {work} twice, and the {part} is the same.", 0.8),
    ("The {part} is longer than the {part2}.", 0.3),
    ("Some will like the {work}, others will not.", 0.6),
)
LUKEWARM_SHARE, UNANSWERABLE_SHARE = 0.08, 0.35


def tiny_reviews(seed: int = 2006) -> list[dict[str, Any]]:
    """Draw reviews with their label, 1 for a positive one: the columns of SST-2."""
    rng, seen = random.Random(seed), set()
    rows: list[dict[str, Any]] = []
    while len(rows) < REVIEWS:
        if rng.random() < LUKEWARM_SHARE:
            template, share = rng.choice(LUKEWARM)
            text, label = _fill(rng, template), int(rng.random() < share)
        else:
            text, said = opinion(rng)
            label = int(said == "positive")
        if normalise(text) not in seen:
            seen.add(normalise(text))
            rows.append({"idx": len(rows), "sentence": text, "label": label})
    return rows


def _fill(rng: random.Random, template: str) -> str:
    words: dict[str, str] = {}
    for _, name, number in SLOT.findall(template):
        taken = [w for w in world()["generic"][name.lower()] if w not in words.values()]
        words[name.lower() + number] = rng.choice(taken)
    return render(template, words)


def positive_chance(text: str) -> float | None:
    """The share of positive labels among reviews like a lukewarm one; None for a review that tells.

    An ideal reader is right about a review that tells, and in the larger share of the others.
    """
    for template, share in LUKEWARM:
        parts = SLOT.split(template)[:: SLOT.groups + 1]
        if text.startswith(parts[0]) and text.endswith(parts[-1]) and all(p in text for p in parts):
            return share
    return None


def accuracy_ceiling(texts: list[str]) -> float:
    """The accuracy that the ideal reader is expected to reach on these reviews."""
    chances = [positive_chance(text) for text in texts]
    return math.fsum(1.0 if c is None else max(c, 1 - c) for c in chances) / len(chances)


def tiny_questions(seed: int = 2006) -> list[dict[str, Any]]:
    """Draw paragraphs with a question each, a third of them unanswerable: SQuAD v2's columns."""
    rng, seen = random.Random(seed), set()
    rows: list[dict[str, Any]] = []
    while len(rows) < QUESTIONS:
        row = {"id": f"tiny-{len(rows):04d}", "title": "The tiny world"} | _reading(rng)
        if row["context"] not in seen:
            seen.add(row["context"])
            rows.append(row)
    return rows


def _reading(rng: random.Random) -> dict[str, Any]:
    """A paragraph of facts, a question, and the words of it that answer, if any do."""
    chosen = []
    for statement, asked in rng.sample(world()["facts"], rng.randint(2, 4)):
        lines = "\n".join([statement, *rng.choice(list(asked.items()))])
        filled = sentence(rng, lines, setting(rng), rng.choice(list(world()["topics"])))
        chosen.append(filled.split("\n"))
    told, question, answer = chosen[0]
    answerable = rng.random() >= UNANSWERABLE_SHARE
    rng.shuffle(kept := chosen if answerable else chosen[1:])
    context = " ".join(line for line, _, _ in kept)
    start = context.index(told) + told.index(answer) if answerable else 0
    answers = {"text": [answer], "answer_start": [start]}
    none: dict[str, Any] = {"text": [], "answer_start": []}
    return {"context": context, "question": question, "answers": answers if answerable else none}
