"""Near-duplicates by MinHash: signatures of sets, and the pairs of texts that are worth a look.

Shapes: `N` texts, `K` hash functions.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from gemmate_lib.config import GemmateError
from gemmate_lib.splitting import normalise, shingles

PRIME = 4_294_967_311  # the first above 2^32, so that a * x + b stays below 2^64
HASHES, ROWS = 128, 4  # 32 bands of 4 rows: of pairs this alike, 0.8, one in 10^7 is missed

CROWD = 100  # so many texts in one bucket are compared with their neighbours alone


class Pair(NamedTuple):
    """Two texts by index, first < second, and their Jaccard similarity: counted, estimated."""

    first: int
    second: int
    jaccard: float
    estimate: float


def signatures(sets: Sequence[set[str]], *, hashes: int = HASHES, seed: int = 0) -> np.ndarray:
    """Return the least value of each hash function over each set: uint64 [N, K].

    Of two sets, each column is equal with a probability of their Jaccard similarity.
    Raises: GemmateError for an empty set, which is like no other.
    Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900
    """
    rng = np.random.default_rng(seed)
    a, b = rng.integers(1, 2**32, hashes, np.uint64), rng.integers(0, 2**32, hashes, np.uint64)
    found = np.empty((len(sets), hashes), np.uint64)
    for row, items in enumerate(sets):
        if not items:
            raise GemmateError(f"Text {row} has no shingle. Leave out texts without a word.")
        numbers = np.array([_number(item) for item in items], np.uint64)[:, None]
        found[row] = ((a * numbers + b) % np.uint64(PRIME)).min(axis=0)
    return found


def _number(item: str) -> int:
    """32 bits of a text, the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(item.encode(), digest_size=4).digest(), "big")


def candidates(found: np.ndarray, *, rows: int = ROWS) -> Iterator[tuple[int, int]]:
    """Yield each pair of signatures [N, K] once that agrees in a whole band of `rows` columns.

    Raises: GemmateError where the bands do not fill the signature.
    Leskovec, Rajaraman and Ullman 2014, http://www.mmds.org, section 3.4
    """
    if rows < 1 or found.shape[1] % rows:
        raise GemmateError(f"{found.shape[1]} hashes make no bands of {rows}. Let it divide them.")
    seen: set[tuple[int, int]] = set()
    for start in range(0, found.shape[1], rows):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for row, band in enumerate(found[:, start : start + rows]):
            buckets[band.tobytes()].append(row)
        for members in buckets.values():
            crowd = len(members) > CROWD
            for pair in pairwise(members) if crowd else combinations(members, 2):
                if pair not in seen:
                    seen.add(pair)
                    yield pair


def near_pairs(texts: Sequence[str], *, threshold: float = 0.8, seed: int = 0) -> list[Pair]:
    """Return the pairs of texts whose word 3-grams are this alike, the most alike first.

    MinHash proposes, the true Jaccard similarity decides: no pair is wrong, few are missed. Copies,
    the same after `normalise`, are compared once: by the first of them.
    """
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(normalise(text), i)
    sets = [shingles(text) for text in first]
    places, found, pairs = list(first.values()), signatures(sets, seed=seed), []
    for i, j in candidates(found):
        shared = len(sets[i] & sets[j])
        jaccard = shared / (len(sets[i]) + len(sets[j]) - shared)
        if jaccard >= threshold:
            estimate = float((found[i] == found[j]).mean())
            pairs.append(Pair(places[i], places[j], jaccard, estimate))
    return sorted(pairs, key=lambda pair: (-pair.jaccard, pair.first, pair.second))
