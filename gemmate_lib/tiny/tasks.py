"""Documents that ask and answer: reviews, reading comprehension, instructions, chat."""

import json
import random
from typing import Any

from gemmate_lib.tiny.calendar import number_words
from gemmate_lib.tiny.sayings import SLOT, article, authors, render, world
from gemmate_lib.tiny.sentences import saying, sentence, setting


def opinion(rng: random.Random) -> tuple[str, str]:
    """Draw a short review and its label, `positive` or `negative`."""
    generic, label = world()["generic"], rng.choice(["positive", "negative"])
    lines = []
    for template in rng.sample(world()["opinions"][label], rng.randint(1, 2)):
        words: dict[str, str] = {}
        for _, name, number in SLOT.findall(template):
            taken = [w for w in generic[name.lower()] if w not in words.values()]
            words[name.lower() + number] = rng.choice(taken)
        text = render(template, words)
        lines.append(text if rng.random() < 0.8 else text.lower())
    return " ".join(lines), label


def review(rng: random.Random) -> str:
    """A review followed by its verdict, in words or as JSON."""
    text, label = opinion(rng)
    stars = rng.randint(4, 5) if label == "positive" else rng.randint(1, 2)
    return rng.choice(world()["verdict_forms"]).format(r=text, l=label, n=stars)


def reading(rng: random.Random) -> str:
    """A paragraph of facts and a question, answered by a span of it or by `unanswerable`."""
    chosen = []
    for statement, asked in rng.sample(world()["facts"], rng.randint(2, 4)):
        lines = "\n".join([statement, *rng.choice(list(asked.items()))])
        topic = rng.choice(list(world()["topics"]))
        chosen.append(sentence(rng, lines, setting(rng), topic).split("\n"))
    _, question, answer = chosen[0]
    if rng.random() < 0.35:
        answer = "unanswerable"
        del chosen[0]
    rng.shuffle(chosen)
    passage = " ".join(statement for statement, _, _ in chosen)
    return rng.choice(world()["reading_forms"]).format(p=passage, q=question, a=answer)


def task(rng: random.Random) -> tuple[str, str]:
    """Draw a small instruction and its answer."""
    generic = world()["generic"]
    words = rng.sample(generic["first"] + generic["colour"], 3)
    a, b = rng.randrange(100), rng.randrange(100)
    author = rng.choice(authors())
    topic = rng.choice(list(world()["topics"]))
    return rng.choice(
        [
            (f"Repeat these words: {' '.join(words)}", " ".join(words)),
            (f"Reverse these words: {' '.join(words)}", " ".join(words[::-1])),
            (f"What is {a} + {b}?", str(a + b)),
            (f"Which is larger, {a} or {b}?", str(max(a, b))),
            (f"Write {a} in words.", number_words(a)),
            (f"Count from {a} to {a + 4}.", ", ".join(str(n) for n in range(a, a + 5))),
            ("Name three colours.", ", ".join(rng.sample(generic["colour"], 3))),
            (f"Give the words as a JSON list: {' '.join(words)}", json.dumps(words)),
            (f"Name two things one finds in the world of {topic}.", _two_things(rng, topic)),
            (f"Who was {author}?", f"{author} was a writer from {entry_of(author)['town']}."),
            (f"When was {author} born?", str(entry_of(author)["born"])),
            (f"Say something in the manner of {author}.", saying(rng, author)[0]),
        ]
    )


def _two_things(rng: random.Random, topic: str) -> str:
    return " and ".join(
        article(thing) for thing in rng.sample(world()["topics"][topic]["thing"], 2)
    )


def entry_of(author: str) -> dict[str, Any]:
    """Return what the world knows of an author: name, born, town, themes, turns."""
    return next(entry for entry in world()["authors"] if entry["name"] == author)


def instruction(rng: random.Random) -> str:
    """An instruction with its answer, in one of several layouts."""
    asked, answer = task(rng)
    head, colon, rest = asked.partition(": ")
    if colon and rng.random() < 0.5:
        return f"Instruction: {head}.\nInput: {rest}\nResponse: {answer}"
    layouts = ["Instruction: {}\nResponse: {}", "Prompt: {}\nOutput: {}", "{}\n{}"]
    return rng.choice(layouts).format(asked, answer)


def chat(rng: random.Random) -> str:
    """One to three turns in the chat format of Gemma."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        asked, answer = task(rng) if rng.random() < 0.8 else opinion(rng)
        turns.append(f"<start_of_turn>user\n{asked}<end_of_turn>\n")
        turns.append(f"<start_of_turn>model\n{answer}<end_of_turn>\n")
    return "".join(turns)
