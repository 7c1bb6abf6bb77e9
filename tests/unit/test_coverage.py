"""The 95 % intervals that are reported cover the truth in 93 to 97 of 100 evaluations.

Each evaluation has fresh rows from a known truth, and the intervals come from the library's own
functions with their own seed. Fewer resamples (999) keep this affordable always; `make release`
takes the library's 4,999. One thousand evaluations tell a share of 95 % to ± 1.4 points.

Known to fall short: rows of which a few outweigh all others; a test below says by how much.
"""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest

from gemmate_lib import stats
from gemmate_lib.evaluate import _ratio
from gemmate_lib.stats import Interval, bootstrap, over_seeds, paired_bootstrap, wilson

EVALUATIONS, N, FEWER = 1_000, 200, 999
REACHED, FALSE_ALARMS = (0.93, 0.97), (0.035, 0.065)
Draw = Callable[[np.random.Generator, int], Interval]
LIBRARY_RESAMPLING = stats._resampling


@pytest.fixture(autouse=True)
def resamples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All as the library does it, but for fewer resamples in tests that do not ask for all."""
    every = "all_resamples" in request.fixturenames
    if not every:
        fewer = {"n_resamples": FEWER}
        monkeypatch.setattr(stats, "_resampling", lambda *a: LIBRARY_RESAMPLING(*a) | fewer)
    yield
    if every:  # what was simulated with them must not stand in for the others
        bounds.cache_clear()
        comparisons.cache_clear()


@pytest.fixture
def all_resamples() -> None:
    """The library's own number of resamples."""
    bounds.cache_clear()
    comparisons.cache_clear()


def share_of_yes(p: float) -> Draw:
    """What `evaluate` reports of a yes or no in each generated text."""
    return lambda rng, n: wilson(int((rng.random(n) < p).sum()), n)


def ratio_of_sums(rng: np.random.Generator, n: int) -> Interval:
    """Mean loss of a token: rows of 10 to 80 tokens, and the longer the easier (r = -0.4)."""
    tokens = rng.integers(10, 81, n)
    losses = tokens * (4 - 0.03 * tokens) * rng.gamma(4, 0.25, n)
    return _ratio(losses, tokens, seed=0)


def heavy_ratio(rng: np.random.Generator, n: int) -> Interval:
    """Token counts with a long tail, and the longer the harder: a few rows decide the sum."""
    tokens = 4 + rng.geometric(1 / 20, n)
    losses = tokens * (1 + 0.02 * tokens) * rng.gamma(4, 0.25, n)
    return _ratio(losses, tokens, seed=0)


LENGTHS = np.arange(10, 81)
UNIFORM = float((LENGTHS * (4 - 0.03 * LENGTHS)).sum() / LENGTHS.sum())
HEAVY = (24 + 0.02 * (24**2 + 380)) / 24  # the mean of those counts is 24, their variance 380

# What is reported -> how it comes from n fresh rows, and the truth.
WILSON: dict[str, tuple[Draw, float]] = {
    f"wilson {p}": (share_of_yes(p), p) for p in (0.5, 0.9, 0.97)
}
BOOTSTRAP: dict[str, tuple[Draw, float]] = {
    "mean, normal": (lambda rng, n: bootstrap(rng.normal(5, 2, n)), 5.0),
    "mean, exponential": (lambda rng, n: bootstrap(rng.exponential(size=n)), 1.0),
    "mean, 0 or 1": (lambda rng, n: bootstrap(rng.random(n) < 0.9), 0.9),
    "ratio of sums": (ratio_of_sums, UNIFORM),
}


@cache
def bounds(name: str, n: int = N, evaluations: int = EVALUATIONS) -> tuple[np.ndarray, float]:
    """Value, low and high [E, 3] of the evaluations of one kind, and the truth."""
    draw, truth = (WILSON | BOOTSTRAP | {"heavy ratio": (heavy_ratio, HEAVY)})[name]
    rng = np.random.default_rng(0)
    found = [draw(rng, n) for _ in range(evaluations)]
    return np.array([(each.value, each.low, each.high) for each in found]), truth


def covered(found: np.ndarray, truth: float, *, width: float = 1.0) -> float:
    """The share of intervals that hold the truth, each made `width` times as wide."""
    value, low, high = found.T
    below, above = value - width * (value - low), value + width * (high - value)
    return float(np.mean((below <= truth) & (truth <= above)))


def reaches(share: float, limits: tuple[float, float] = REACHED) -> bool:
    return limits[0] <= share <= limits[1]


@pytest.mark.parametrize("name", [*WILSON, *BOOTSTRAP])
def test_an_interval_covers_the_truth(name: str) -> None:
    share = covered(*bounds(name))
    assert reaches(share), f"{name}: {share:.1%}"


@pytest.mark.parametrize("name", [*WILSON, *BOOTSTRAP])
@pytest.mark.parametrize(("level", "width"), [(90, 1.645 / 1.96), (99, 2.576 / 1.96)])
def test_an_interval_of_another_level_would_be_caught(name: str, level: int, width: float) -> None:
    share = covered(*bounds(name), width=width)
    assert not reaches(share), f"{name} at {level} %: {share:.1%}"
    assert share == pytest.approx(level / 100, abs=0.035)


def seeds(n: int) -> np.ndarray:
    """Value, low and high of evaluations by n runs each, whose results are normal."""
    rng = np.random.default_rng(0)
    found = [over_seeds(rng.normal(5, 2, n)) for _ in range(EVALUATIONS)]
    return np.array([(each.value, each.low, each.high) for each in found])


@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_interval_over_a_few_seeds_covers_the_truth(n: int) -> None:
    assert reaches(covered(seeds(n), 5.0))


def test_a_bootstrap_of_three_seeds_or_a_normal_quantile_would_be_caught() -> None:
    assert not reaches(covered(seeds(3), 5.0, width=1.96 / 4.303))
    rng = np.random.default_rng(0)
    drawn = [bootstrap(rng.normal(5, 2, 3)) for _ in range(200)]
    assert covered(np.array([(d.value, d.low, d.high) for d in drawn]), 5.0) < 0.85


def paired(rng: np.random.Generator, *, gain: float) -> stats.Comparison:
    """Two models on the same rows, whose difficulty they share."""
    hard, noise = rng.normal(size=N), rng.normal(size=(2, N))
    return paired_bootstrap(hard + noise[0], hard + noise[1] + gain)


@cache
def comparisons(gain: float) -> list[stats.Comparison]:
    rng = np.random.default_rng(0)
    return [paired(rng, gain=gain) for _ in range(EVALUATIONS)]


def covering(found: list[stats.Comparison], truth: float, *, width: float = 1.0) -> float:
    triples = [(c.difference.value, c.difference.low, c.difference.high) for c in found]
    return covered(np.array(triples), truth, width=width)


def below(found: list[stats.Comparison], level: float, *, times: float = 1.0) -> float:
    return float(np.mean([c.p_value * times < level for c in found]))


def check_paired(found: list[stats.Comparison]) -> None:
    """Without a difference: the interval holds 0, and each p-value is as likely as any other."""
    from scipy.stats import kstest

    assert reaches(covering(found, 0.0))
    assert reaches(below(found, 0.05), FALSE_ALARMS)
    assert kstest([c.p_value for c in found], "uniform").pvalue > 0.01
    false = np.mean([c.verdict() != "within noise" for c in found])
    assert false <= FALSE_ALARMS[1]


def test_two_equal_models_differ_by_chance_as_often_as_said() -> None:
    check_paired(comparisons(0.0))


def test_wrong_intervals_and_p_values_of_a_difference_would_be_caught() -> None:
    found = comparisons(0.0)
    assert not reaches(covering(found, 0.0, width=1.645 / 1.96))
    assert not reaches(covering(found, 0.15))  # the interval is not merely wide
    for times in (0.5, 2.0):  # a one-sided test for a two-sided one, and the other way round
        assert not reaches(below(found, 0.05, times=times), FALSE_ALARMS)


def test_few_rows_that_outweigh_the_others_are_known_to_fall_short() -> None:
    """BCa's limit, not a slip: with a skewness near 9, 200 rows reach 92 %, not 95."""
    found, truth = bounds("heavy ratio")
    assert 0.89 <= covered(found, truth) < 0.94
    assert np.mean(found[:, 2] < truth) > np.mean(found[:, 1] > truth)  # too low more often


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("name", BOOTSTRAP)
def test_all_the_resamples_of_the_library_cover_as_well(name: str, all_resamples: None) -> None:
    assert LIBRARY_RESAMPLING(N, 0)["n_resamples"] == 4_999
    found, truth = bounds(name)
    assert reaches(covered(found, truth))
    assert not reaches(covered(found, truth, width=1.645 / 1.96))


@pytest.mark.slow
@pytest.mark.release
def test_equal_models_by_all_the_resamples_of_the_library(all_resamples: None) -> None:
    check_paired(comparisons(0.0))


@pytest.mark.slow
@pytest.mark.release
def test_heavy_rows_reach_it_with_two_thousand() -> None:
    assert reaches(covered(*bounds("heavy ratio", n=2_000)))
