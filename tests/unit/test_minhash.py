"""MinHash against the exact Jaccard similarity, and near pairs against an exact search."""

import random

import numpy as np
import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.minhash import HASHES, PRIME, candidates, near_pairs, signatures
from gemmate_lib.splitting import find_duplicates, normalise, shingles


def alike(share, size=200, seed=0):
    """Two sets with this Jaccard similarity."""
    shared = round(share * size)
    rest = size - shared
    both = {f"{seed}-both-{i}" for i in range(shared)}
    return (
        both | {f"{seed}-a-{i}" for i in range(rest // 2)},
        both | {f"{seed}-b-{i}" for i in range(rest - rest // 2)},
    )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_the_estimate_is_the_jaccard_similarity(share):
    """Unbiased over 40 pairs, and as wide as K trials allow."""
    hashes = 256
    errors = []
    for seed in range(40):
        a, b = alike(share, seed=seed)
        exact = len(a & b) / len(a | b)
        first, second = signatures([a, b], hashes=hashes, seed=seed)
        errors.append(float((first == second).mean()) - exact)
    sigma = np.sqrt(max(share * (1 - share), 1e-4) / hashes)
    assert abs(np.mean(errors)) < 4 * sigma / np.sqrt(len(errors)) + 1e-3
    assert max(np.abs(errors)) < 4.5 * sigma


def test_the_prime_is_one_and_nothing_overflows():
    assert all(PRIME % n for n in range(2, 65_537)) and PRIME > 2**32
    assert (2**32 - 1) * (2**32 - 1) + 2**32 - 1 < 2**64


def test_signatures_are_the_same_in_every_process():
    found = signatures([{"one two three"}], hashes=2, seed=0)
    assert found.dtype == np.uint64 and found.tolist() == [[4226420088, 1080335931]]


def test_an_empty_set_is_refused():
    with pytest.raises(GemmateError, match="Text 1 has no shingle"):
        signatures([{"a"}, set()])


def test_bands_must_fill_the_signature():
    with pytest.raises(GemmateError, match="no bands of 5"):
        list(candidates(np.zeros((2, HASHES), np.uint64), rows=5))


def test_candidates_share_a_band():
    found = np.arange(12, dtype=np.uint64).reshape(3, 4)
    found[2, 2:] = found[0, 2:]
    assert list(candidates(found, rows=2)) == [(0, 2)]


def worded(rng, n=40):
    return [f"w{rng.randrange(10_000)}" for _ in range(n)]


def test_near_pairs_are_those_of_an_exact_search():
    rng = random.Random(1)
    texts = []
    for _ in range(60):
        words = worded(rng)
        texts.append(" ".join(words))
        for changes in (1, 3, 8):
            other = list(words)
            for place in rng.sample(range(len(words)), changes):
                other[place] = f"x{rng.randrange(10_000)}"
            texts.append(" ".join(other))
    exact = set()
    sets = [shingles(normalise(text)) for text in texts]
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j]):
                exact.add((i, j))
    assert len(exact) >= 40
    found = near_pairs(texts, threshold=0.8)
    assert {pair[:2] for pair in found} == exact
    assert all(pair.jaccard >= 0.8 and abs(pair.estimate - pair.jaccard) < 0.2 for pair in found)
    copies = find_duplicates(texts, threshold=0.8)
    assert {i for i, (_, same) in copies.items() if not same} <= {p.second for p in found}


def test_copies_are_compared_once():
    text = "the quick brown fox jumps over the lazy dog every day of the week in spring"
    close = text + " again"
    assert [pair[:2] for pair in near_pairs([text, close, text.upper()])] == [(0, 1)]
