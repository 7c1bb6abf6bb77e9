"""Intervals cover, comparisons do not cry wolf, and degenerate data warns nobody."""

import numpy as np
import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.stats import Interval, bootstrap, over_seeds, paired_bootstrap, wilson


def test_an_interval_reads_well():
    assert str(Interval(0.912, 0.88, 0.94, 250)) == "0.912 [0.88, 0.94] (n=250)"
    assert str(Interval(0.00123, -0.0004, 0.0029, 9)) == "0.00123 [-0.0004, 0.0029] (n=9)"
    assert str(Interval(23.456, 20.1, 25.3, 9)) == "23.456 [20.10, 25.30] (n=9)"
    assert str(Interval(0.0, 0.0, 0.0, 3)) == "0.000 [0.00, 0.00] (n=3)"


def test_three_seeds_have_students_interval():
    found = over_seeds([1.0, 2.0, 6.0])
    half = 4.302653 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert (found.value, found.n) == (3.0, 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    alone = over_seeds([0.5])
    assert (alone.value, alone.low, alone.high) == (0.5, -np.inf, np.inf)
    assert over_seeds([2.0, 2.0]).low == over_seeds([2.0, 2.0]).high == 2.0
    for wrong in ([], [1.0, np.nan]):
        with pytest.raises(GemmateError, match="finite"):
            over_seeds(wrong)


def test_bootstrap_agrees_with_the_t_interval_on_normal_data():
    from scipy import stats

    data = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(data)
    low, high = stats.t.interval(0.95, 399, data.mean(), stats.sem(data))
    assert found.value == pytest.approx(data.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    assert found.n == 400


def test_bootstrap_takes_other_statistics_and_is_seeded():
    data = np.random.default_rng(1).exponential(size=60)
    assert bootstrap(data, np.median).value == np.median(data)
    assert bootstrap(data, seed=3) == bootstrap(list(data), seed=3)
    assert bootstrap(data, seed=3) != bootstrap(data, seed=4)


def test_skewed_data_gets_a_skewed_interval():
    found = bootstrap(np.random.default_rng(2).exponential(size=40) ** 2)
    assert found.high - found.value > 1.2 * (found.value - found.low)


def test_degenerate_data_falls_back_without_a_warning():
    assert bootstrap([1, 1, 1]) == Interval(1.0, 1.0, 1.0, 3)
    assert bootstrap([2.5]) == Interval(2.5, -np.inf, np.inf, 1)
    assert bootstrap([0, 0, 0, 1]).low == 0.0
    flat = bootstrap([3, 3, 3, 3, 9], np.median)  # jackknife values do not vary: no BCa
    assert flat.low <= flat.value == 3 <= flat.high


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_values_must_be_finite(values):
    with pytest.raises(GemmateError, match="finite"):
        bootstrap(values)
    with pytest.raises(GemmateError, match="finite"):
        paired_bootstrap(values, values)


def test_wilson_against_a_known_value():
    found = wilson(9, 10)  # (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n)
    assert (found.value, found.n) == (0.9, 10)
    assert (found.low, found.high) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert wilson(10, 10).low < 0.75 < wilson(10, 10).high == 1.0
    assert str(wilson(0, 0)) == "nan [0.00, 1.00] (n=0)"
    with pytest.raises(GemmateError, match="cannot be"):
        wilson(11, 10)


def test_a_clear_change_is_found_in_either_direction():
    before = np.random.default_rng(0).normal(size=100)
    after = before + 0.5 + np.random.default_rng(1).normal(scale=0.5, size=100)
    gain = paired_bootstrap(before, after)
    assert gain.verdict() == "better" and gain.p_value < 0.01
    assert gain.difference.low < 0.5 < gain.difference.high
    assert (gain.wins + gain.losses + gain.ties, gain.wins > gain.losses) == (100, True)
    loss = paired_bootstrap(before, after, higher_is_better=False)
    assert loss.verdict() == "worse" and (loss.wins, loss.losses) == (gain.losses, gain.wins)
    assert paired_bootstrap(after, before).verdict() == "worse"
    assert paired_bootstrap(after, before, higher_is_better=False).verdict() == "better"


def test_noise_is_called_noise():
    same = paired_bootstrap([1.0, 2.0], [1.0, 2.0])
    assert (same.p_value, same.ties, same.verdict()) == (1.0, 2, "within noise")
    assert paired_bootstrap([1.0], [2.0]).verdict() == "within noise"
    few = paired_bootstrap([0] * 250, [1] * 3 + [0] * 247)  # the interval alone would say better
    assert few.difference.low > 0 and few.verdict() == "within noise"


def test_false_alarms_are_rare():
    rng = np.random.default_rng(0)
    pairs = [rng.normal(size=(2, 30)) for _ in range(60)]
    verdicts = [paired_bootstrap(*pair).verdict() for pair in pairs]
    assert verdicts.count("within noise") >= 54  # 57 expected at 95 %


def test_pairing_finds_what_means_alone_would_not():
    before = np.random.default_rng(0).normal(scale=10, size=50)
    assert paired_bootstrap(before, before + 0.1).verdict() == "better"


def test_the_same_rows_are_required_and_the_seed_decides():
    with pytest.raises(GemmateError, match="same rows"):
        paired_bootstrap([1.0, 2.0], [1.0])
    data = np.random.default_rng(0).normal(size=(2, 50))
    assert paired_bootstrap(*data, seed=1) == paired_bootstrap(*data, seed=1)


def test_many_rows_need_little_memory():
    import tracemalloc

    data = np.random.default_rng(0).random(10_000)
    tracemalloc.start()
    bootstrap(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20
