"""What to look at in a data set before training on it: measures against rules of thumb."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gemmate_lib.forms import Form
from gemmate_lib.quality import Quality, effective
from gemmate_lib.stats import wilson

# Rows that a task of this form is commonly given, at least; a class wants as many as CLASS.
# 1,000 chosen instructions were enough for style: Zhou et al. 2023, https://arxiv.org/abs/2305.11206
NEED: dict[Form, int] = {
    "instruction": 1_000, "messages": 1_000, "prompt-completion": 1_000, "quotes": 1_000,
    "reading": 1_000, "text": 1_000, "classification": 400,
}  # fmt: skip
CLASS = 100
SHARES = {"copies": 0.01, "near": 0.05, "conflicts": 0.01, "outside": 0.25, "smallest": 0.1}
LEAST = {"distinct": 0.1, "coverage": 0.5, "spread": 0.35}


class Finding(NamedTuple):
    """What was measured under one heading, and whether somebody should look; open: not measured."""

    title: str
    level: Literal["fine", "look", "open"]
    text: str


def findings(quality: Quality) -> list[Finding]:
    """Return a finding under each heading, in the order of the report."""
    parts = (_size, _relevance, _diversity, _copies, _balance, _lengths, _encodings, _personal)
    return [*(part(quality) for part in parts), _conflicts(quality)]


def _finding(title: str, fine: bool, text: str) -> Finding:
    return Finding(title, "fine" if fine else "look", text)


def rows_of(numbers: Sequence[int], most: int = 8) -> str:
    """Return row numbers to print, the first few."""
    more = ", …" * (len(numbers) > most)
    return f"row{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers[:most]))}{more}"


def _size(quality: Quality) -> Finding:
    n, need = len(quality.examples), NEED[quality.form]
    if quality.balance and quality.form == "classification":
        need = max(need, CLASS * len(quality.balance))
    held = max(1, n // 10)
    found = wilson(held // 2, held)
    text = f"{n:,} usable rows of {len(quality.records):,}; {need:,} are a common least for "
    text += f"{quality.form}. A tenth held out for the test tells a share of a half to within "
    text += f"{(found.high - found.low) / 2:.0%}."
    return _finding("Size", n >= need, text)


def _relevance(quality: Quality) -> Finding:
    found = quality.relevance
    if found is None:
        return Finding("Relevance", "open", "Not measured: no texts of the task were given.")
    share = len(found.outside) / len(quality.examples)
    text = f"{found.coverage:.0%} of the running words of {found.task} occur here; "
    text += f"{share:.0%} of the rows are less like it than nearly all of its own texts are."
    fine = found.coverage >= LEAST["coverage"] and share <= SHARES["outside"]
    return _finding("Relevance", fine, text)


def _diversity(quality: Quality) -> Finding:
    two, topics = quality.distinct[2], len(quality.topics)
    text = f"{quality.distinct[1]:.0%} of the words and {two:.0%} of the pairs of words are "
    text += f"distinct; the rows spread over {quality.spread:.1f} of {topics} topics."
    fine = two >= LEAST["distinct"] and (topics < 2 or quality.spread >= LEAST["spread"] * topics)
    return _finding("Diversity", fine, text)


def _copies(quality: Quality) -> Finding:
    n, near = len(quality.examples), {row for pair in quality.near for row in pair[:2]}
    text = f"{len(quality.copies)} rows repeat another but for case, punctuation or space; "
    text += f"{len(near)} rows nearly repeat another."
    few = len(quality.copies) <= SHARES["copies"] * n and len(near) <= SHARES["near"] * n
    return _finding("Duplicates", few, text)


def _balance(quality: Quality) -> Finding:
    counts = quality.balance
    if not counts:
        return _finding("Class balance", True, "The answers are texts, no classes.")
    total, least = sum(counts.values()), min(counts.values())
    even = effective(counts.values())
    text = f"{len(counts)} classes, as even as {even:.1f}; the largest has "
    text += f"{max(counts.values()) / total:.0%} of the rows, the smallest {least / total:.1%}."
    fine = len(counts) > 1 and least * len(counts) >= SHARES["smallest"] * total
    return _finding("Class balance", fine, text)


def _lengths(quality: Quality) -> Finding:
    tokens = sorted(quality.tokens)
    middle, long, most = (tokens[int(q * (len(tokens) - 1))] for q in (0.5, 0.95, 1.0))
    text = f"Half of the rows have at most {middle} tokens, 95 % at most {long}, all at most "
    text += f"{most}; the longest has {max(quality.characters):,} characters."
    return _finding("Lengths", most <= 4 * long, text)


def _encodings(quality: Quality) -> Finding:
    said = [f"{kind}: {len(rows)} ({rows_of(rows)})" for kind, rows in quality.encodings.items()]
    text = "; ".join(said) + "." if said else "No broken, hidden or unusual characters."
    if 0 < len(quality.encodings.get("not NFC", ())) < len(quality.records):
        text += " Normal forms are mixed: the same word may be two."
    return _finding("Encodings", not said, text)


def _personal(quality: Quality) -> Finding:
    said = [f"{kind}: {len(rows)} ({rows_of(rows)})" for kind, rows in quality.personal.items()]
    text = "; ".join(said) + "." if said else "Nothing that looks like it."
    return _finding("Personal data", not said, text)


def _conflicts(quality: Quality) -> Finding:
    rows = [row for group in quality.conflicts for row in group]
    text = f"{len(quality.conflicts)} inputs stand there with more than one output"
    text += f" ({rows_of(rows)})." if rows else "."
    few = len(rows) <= SHARES["conflicts"] * len(quality.examples)
    return _finding("Label conflicts", few, text)
