"""No text twice and none in two splits: duplicates, shared prompts, the seeded split."""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
_EPSILON = 1e-9  # 0.56 * 25 is 14.000000000000002


class _Spaced(dict[int, str | int]):
    """A table for `str.translate` that puts a space for punctuation, in any script."""

    def __missing__(self, code: int) -> str | int:
        self[code] = " " if unicodedata.category(chr(code))[0] == "P" else code
        return self[code]


_SPACED = _Spaced()


def normalise(text: str) -> str:
    """Return what two copies of a text share: no case, punctuation or runs of white space."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_SPACED)
    return " ".join(plain.split()) or text.strip()  # "?!" is not "..."


def shingles(normalised: str) -> set[str]:
    """Return the word 3-grams of a normalised text; a shorter text is one by itself."""
    words = normalised.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def find_duplicates(texts: Sequence[str], *, threshold: float) -> dict[int, tuple[int, bool]]:
    """Map the index of each repeated text to (index of the kept one, whether the copy is exact).

    Exact: the same after `normalise`. Near: Jaccard similarity of word 3-grams at or above
    `threshold`; 1.0 looks for exact copies only. No pair among the kept texts is that similar.
    """
    first: dict[str, int] = {}
    original = [first.setdefault(normalise(text), i) for i, text in enumerate(texts)]
    sets = {i: shingles(text) for text, i in first.items()}
    near = _near(sets, threshold) if threshold < 1 else {}
    exact = {i: (near.get(j, j), True) for i, j in enumerate(original) if i != j}
    return exact | {i: (j, False) for i, j in near.items()}


def _near(sets: dict[int, set[str]], threshold: float) -> dict[int, int]:
    # Prefix filtering loses no pair: two sets this similar share one of their rarest elements,
    # and of the smaller set a shorter prefix will do (Bayardo et al. 2007,
    # https://doi.org/10.1145/1242572.1242591; Xiao et al. 2008, the indexing prefix).
    frequency = Counter(shingle for each in sets.values() for shingle in each)
    by_long: dict[str, list[int]] = defaultdict(list)  # shingle -> kept texts
    by_short: dict[str, list[int]] = defaultdict(list)
    near: dict[int, int] = {}
    for i, own in sets.items():
        rarest = sorted(own, key=lambda s: (frequency[s], s))
        long = _prefix(rarest, threshold)
        short = _prefix(rarest, 2 * threshold / (1 + threshold))
        candidates = {j for shingle in long for j in by_short[shingle]}
        candidates |= {j for shingle in short for j in by_long[shingle]}
        for j in sorted(candidates):
            shared = len(own & sets[j])
            if shared >= threshold * (len(own) + len(sets[j]) - shared) - _EPSILON:
                near[i] = j
                break
        else:
            for index, prefix in ((by_long, long), (by_short, short)):
                for shingle in prefix:
                    index[shingle].append(i)
    return near


def _prefix(rarest: list[str], share: float) -> list[str]:
    return rarest[: len(rarest) - math.ceil(share * len(rarest) - _EPSILON) + 1]


def prompt_keys(prompts: Sequence[str]) -> list[str]:
    """Return a key for each row; rows with the same key belong into the same split.

    Otherwise training would show what the test asks. But a prompt of many rows is a fixed
    instruction, so those rows, like those without a prompt, have a key of their own.
    """
    keys = [normalise(prompt) for prompt in prompts]
    counts = Counter(keys)
    many = max(3, len(keys) // 100)
    return [key if key and counts[key] <= many else f"\n{i}" for i, key in enumerate(keys)]


def carve(
    rows: Sequence[T], keys: Sequence[str], shares: Mapping[str, float]
) -> dict[str, list[T]]:
    """Take each named share off the front of `rows`, keys held together; "train" is the rest."""
    groups: dict[str, list[T]] = {}
    for key, row in zip(keys, rows, strict=True):
        groups.setdefault(key, []).append(row)
    waiting = list(groups.values())[::-1]
    parts: dict[str, list[T]] = {}
    for split, share in shares.items():
        size = max(1, round(share * len(rows))) if share else 0
        parts[split] = []
        while len(parts[split]) < size and waiting:
            parts[split] += waiting.pop()
    return parts | {"train": [row for group in reversed(waiting) for row in group]}
