"""Strategies against forgetting: the reservoir keeps all alike, and replay mixes as it says."""

from collections import Counter

import pytest
from scipy.stats import chisquare

from gemmate_lib.config import GemmateError
from gemmate_lib.data import Row
from gemmate_lib.strategies import Strategy, reservoir, strategies, with_replay

ITEMS, SIZE, DRAWS = 20, 5, 4_000


def uniformity(kept: list[list[int]]) -> float:
    """p-value of a chi-square test that each item is kept as often as any other."""
    counts = Counter(item for each in kept for item in each)
    return float(chisquare([counts[item] for item in range(ITEMS)]).pvalue)


def test_each_item_of_a_stream_is_kept_with_the_same_chance() -> None:
    kept = [reservoir(range(ITEMS), SIZE, seed=seed) for seed in range(DRAWS)]
    assert all(len(set(each)) == SIZE for each in kept)
    assert uniformity(kept) > 0.01


def test_a_reservoir_that_prefers_the_late_or_the_early_would_be_caught() -> None:
    import random

    def biased(seed: int, more: int) -> list[int]:
        rng, kept = random.Random(seed), list(range(SIZE))
        for seen in range(SIZE, ITEMS):
            if (place := rng.randrange(seen + more)) < SIZE:
                kept[place] = seen
        return kept

    assert uniformity([biased(seed, 0) for seed in range(DRAWS)]) < 1e-3
    assert uniformity([biased(seed, 2) for seed in range(DRAWS)]) < 1e-3


def test_pairs_are_kept_alike_too() -> None:
    """Single items alike could still come in fixed company."""
    kept = [set(reservoir(range(6), 3, seed=seed)) for seed in range(DRAWS)]
    pairs = Counter((a, b) for each in kept for a in each for b in each if a < b)
    assert len(pairs) == 15 and chisquare(list(pairs.values())).pvalue > 0.01


def test_a_reservoir_holds_what_it_would_hold_of_the_stream_so_far() -> None:
    """So it is the buffer that was filled on the way, task after task."""
    long = iter(range(1000))
    seen = [next(long) for _ in range(100)]
    assert reservoir(seen, 200, seed=3) == seen
    assert reservoir(range(100), 0, seed=3) == []
    online = reservoir(range(100), 7, seed=3)
    assert online == reservoir(iter(range(100)), 7, seed=3)
    later = reservoir(range(130), 7, seed=3)
    kept = [new for old, new in zip(online, later, strict=True) if old == new]
    assert kept and all(new >= 100 for new in set(later) - set(kept))


def rows(n: int, start: int = 0) -> list[Row]:
    return [Row("", f"row {i}", {}, i) for i in range(start, start + n)]


def test_replayed_rows_are_the_share_that_was_asked_for() -> None:
    own, buffer = rows(75), rows(10, 1000)
    mixed = with_replay(own, buffer, share=0.25)
    assert mixed[:75] == own and len(mixed) == 100
    counts = Counter(row.source_row for row in mixed[75:])
    assert set(counts) == {row.source_row for row in buffer}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert with_replay(own, [], share=0.25) == own


def test_only_what_changes_the_training_counts() -> None:
    """Size 0 and lambda 0 are plain sequential training, whatever else is set."""
    plain = Strategy().in_effect()
    assert plain == Strategy(replay_share=0.5, fisher_rows=9).in_effect() == {}
    assert Strategy(separate=True).in_effect() == {}
    assert Strategy(replay=3).in_effect() == {"replay": 3, "replay_share": 0.25}
    assert Strategy(ewc=2.0).in_effect() == {"ewc": 2.0, "fisher_rows": 32}
    found = strategies(replay=8, ewc=10.0)
    assert list(found) == ["none", "replay", "ewc", "both", "separate"]
    assert found["both"].in_effect() == found["replay"].in_effect() | found["ewc"].in_effect()


@pytest.mark.parametrize(
    "given",
    [{"replay": -1}, {"ewc": -0.1}, {"fisher_rows": 0}, {"replay_share": 1.0},
     {"replay_share": 0.0}, {"separate": True, "ewc": 1.0}],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(GemmateError):
        Strategy(**given)
