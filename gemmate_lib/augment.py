"""More training rows out of those there are, rewritten by `gemmate_lib.rewriting`.

Only the training split grows. What a row answers stays as it is, and so do the words of the
prompt that answer it: a span, a name, a word that the completion repeats.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from gemmate_lib.config import GemmateError
from gemmate_lib.data import Splits
from gemmate_lib.rewriting import Rewriter
from gemmate_lib.rows import Row, Soft
from gemmate_lib.splitting import normalise, shingles

Span = tuple[int, int]
_SENTENCE = re.compile(r"[^\s.!?][^.!?\n]*[.!?]*")
_TOKEN = re.compile(r"\w+")


@dataclass
class AugmentReport:
    """What became of the rows tried: `kept`, or why there is none; all are rows of training."""

    name: str
    tried: int = 0
    kept: int = 0
    unchanged: int = 0
    repeated: int = 0
    leaking: dict[str, list[int]] = field(default_factory=dict)  # split -> source rows

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [f"{self.name}: {self.kept} rows added, of {self.tried} tried"]
        lines += [f"{self.unchanged} dropped: nothing changed"] * bool(self.unchanged)
        lines += [f"{self.repeated} dropped: such a row is there"] * bool(self.repeated)
        for split, rows in self.leaking.items():
            lines.append(f"{len(rows)} dropped: too like a row of {split}")
        return lines


def augment(
    splits: Splits, rewriter: Rewriter, *, copies: int = 1, near: float = 0.8, seed: int = 0
) -> tuple[Splits, AugmentReport]:
    """Add up to `copies` rewritten rows for each training row; validation and test stay.

    A new row has the number of its source and the field `augmented`. It is left out where its
    prompt is as near as `near` to a held-out one (Jaccard of word 3-grams).
    Raises: GemmateError where the rows have no prompt, and so are all answer.
    """
    if not all(row.prompt for row in splits.train):
        problem = "Rows without a prompt are all answer, which augmentation leaves alone"
        raise GemmateError(f"{problem}. Give rows of prompt and completion.")
    report, rng = AugmentReport(rewriter.name, copies * len(splits.train)), random.Random(seed)
    leaks = _LeakCheck(splits, near)
    seen = {_key(row) for row in splits.train}
    new: list[Row] = []
    for _ in range(copies):
        for row in rewrite(splits.train, rewriter, rng):
            if row is None:
                report.unchanged += 1
            elif _key(row) in seen:
                report.repeated += 1
            elif split := leaks.split_of(row.prompt):
                report.leaking.setdefault(split, []).append(row.source_row)
            else:
                seen.add(_key(row))
                new.append(replace(row, fields=row.fields | {"augmented": rewriter.name}))
    report.kept = len(new)
    return replace(splits, train=[*splits.train, *new]), report


def _key(row: Row) -> str:
    return normalise(f"{row.prompt}\n{row.completion}")


class _LeakCheck:
    """Finds the held-out prompt that a new one is too like."""

    def __init__(self, splits: Splits, near: float) -> None:
        held = [(s, row) for s in ("test", "validation") for row in getattr(splits, s)]
        self.near, self.splits = near, [split for split, _ in held]
        self.sets = [shingles(normalise(row.prompt)) for _, row in held]
        self.index: dict[str, list[int]] = defaultdict(list)
        for i, items in enumerate(self.sets):
            for item in items:
                self.index[item].append(i)

    def split_of(self, prompt: str) -> str | None:
        own = shingles(normalise(prompt))
        shared = Counter(i for item in own for i in self.index.get(item, ()))
        for i, count in shared.items():
            if count >= self.near * (len(own) + len(self.sets[i]) - count) - 1e-9:
                return self.splits[i]
        return None


def rewrite(rows: Sequence[Row], rewriter: Rewriter, rng: random.Random) -> list[Row | None]:
    """Rewrite what may change of each prompt; None where nothing did."""
    spans = [free_spans(row, rewriter.unit) for row in rows]
    texts = [row.prompt[a:b] for row, own in zip(rows, spans, strict=True) for a, b in own]
    written = iter(_checked(texts, rewriter.write(texts, rng)))
    pairs = zip(rows, spans, strict=True)
    return [_rebuilt(row, own, [next(written) for _ in own]) for row, own in pairs]


def _checked(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Take no rewriting that is blank or has other numbers; none opens a line of its own."""
    if len(old) != len(new):
        raise GemmateError(f"{len(old)} texts became {len(new)}. Return one for each.")
    found = []
    for before, after in zip(old, new, strict=True):
        numbers = [sorted(re.findall(r"\d+", text)) for text in (before, after)]
        plain = after.strip() if "\n" in before else " ".join(after.split())
        lead, trail = len(before) - len(before.lstrip()), len(before.rstrip())
        fit = plain and numbers[0] == numbers[1]
        found.append(before[:lead] + plain + before[trail:] if fit else before)
    return found


def region(row: Row) -> tuple[Span, str | None]:
    """Return what of a prompt is the text of the row, not its frame, and the field it is."""
    if row.soft:
        text = row.prompt[row.soft.start : row.soft.end]
        return (row.soft.start, row.soft.end), next(
            (name for name, value in row.fields.items() if value == text), None
        )
    for name in ("instruction", "prompt"):
        text = row.fields.get(name, "")
        if text and (at := row.prompt.find(text)) >= 0:
            return (at, at + len(text)), name
    return (0, len(row.prompt)), None


def free_spans(row: Row, unit: str) -> list[Span]:
    """Return the places of a prompt that may change: between protected words, or sentences.

    Protected are the answer's place and every word that the completion has too; of whole sentences
    those that hold the answer, a longer word of it, or a number of it.
    """
    (start, end), _ = region(row)
    answer = {word.lower() for word in _TOKEN.findall(row.completion)}
    if unit == "sentence":  # nearly every sentence shares a "the" with its answer
        answer = {word for word in answer if len(word) > 3 or word.isdigit()}
    places = _TOKEN.finditer(row.prompt, start, end)
    kept = [match.span() for match in places if match.group().lower() in answer]
    kept += [row.soft.keep] if row.soft and row.soft.keep else []
    if unit == "sentence":
        found = (match.span() for match in _SENTENCE.finditer(row.prompt, start, end))
        return [(a, b) for a, b in found if not any(x < b and y > a for x, y in kept)]
    spans, at = [], start
    for x, y in sorted(kept):
        spans += [(at, x)] * (x > at)
        at = max(at, y)
    return spans + [(at, end)] * (end > at)


def _rebuilt(row: Row, spans: list[Span], texts: list[str]) -> Row | None:
    """Put the texts in place of the spans, and move what comes after them."""
    if all(row.prompt[a:b] == text for (a, b), text in zip(spans, texts, strict=True)):
        return None
    growth = [len(text) - (b - a) for (a, b), text in zip(spans, texts, strict=True)]
    totals = [0, *accumulate(growth)]

    def moved(place: int) -> int:
        return place + totals[sum(b <= place for _, b in spans)]

    parts, at = [], 0
    for (a, b), text in zip(spans, texts, strict=True):
        parts += [row.prompt[at:a], text]
        at = b
    prompt = "".join([*parts, row.prompt[at:]])
    (start, end), name = region(row)
    fields = row.fields | ({name: prompt[start : moved(end)]} if name else {})
    soft = row.soft
    if soft:
        keep = (moved(soft.keep[0]), moved(soft.keep[1])) if soft.keep else None
        soft = Soft(soft.start, moved(soft.end), keep)
    return replace(row, prompt=prompt, fields=fields, soft=soft)
