"""Intervals and paired comparisons, so that noise is not taken for progress."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gemmate_lib.config import GemmateError


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval, from n rows."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Show "0.912 [0.88, 0.94] (n=250)", with more decimals where all three are small."""
        largest = max(abs(x) for x in (self.value, self.low, self.high, 0.0) if math.isfinite(x))
        digits = 3 if not 0 < largest < 0.1 else 2 - math.floor(math.log10(largest))
        bounds = f"[{self.low:.{digits - 1}f}, {self.high:.{digits - 1}f}]"
        return f"{self.value:.{digits}f} {bounds} (n={self.n})"


@dataclass(frozen=True)
class Comparison:
    """After minus before on the same rows; the difference is that of the means."""

    difference: Interval
    p_value: float
    wins: int
    losses: int
    ties: int
    higher_is_better: bool

    def verdict(self) -> str:
        """Return "better" or "worse" only where the interval and the test both exclude noise."""
        low, high = self.difference.low, self.difference.high
        if self.p_value >= 0.05 or low <= 0 <= high:
            return "within noise"
        return "better" if (low > 0) == self.higher_is_better else "worse"


def bootstrap(values: ArrayLike, statistic: Any = np.mean, *, seed: int = 0) -> Interval:
    """Return a statistic of [N] values with its BCa interval; one value alone bounds nothing.

    Raises: GemmateError where there are no values, or one is not finite.
    Efron 1987, https://doi.org/10.1080/01621459.1987.10478410
    """
    from scipy import stats

    data = _finite(values)
    if len(data) == 1:
        return Interval(float(statistic(data)), -math.inf, math.inf, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the degenerate case is handled below
        result = stats.bootstrap((data,), statistic, method="BCa", **_resampling(len(data), seed))
    bounds = result.confidence_interval
    if not np.isfinite(bounds).all():  # BCa is undefined where all values are equal, say
        bounds = np.quantile(result.bootstrap_distribution, (0.025, 0.975))
    return Interval(float(statistic(data)), float(bounds[0]), float(bounds[1]), len(data))


def over_seeds(values: ArrayLike) -> Interval:
    """Return the mean of a few runs that differ by their seed, with Student's t interval.

    Three values are too few to draw from, as a bootstrap does; the t interval is exact where they
    are normal, and wide: 4.3 standard errors to either side for three. One alone bounds nothing.
    Raises: GemmateError where there are no values, or one is not finite.
    Student 1908, https://doi.org/10.1093/biomet/6.1.1
    """
    from scipy import stats

    data = _finite(values)
    n, mean = len(data), float(data.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf(0.975, n - 1) * data.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def wilson(successes: int, n: int) -> Interval:
    """Return a proportion with its Wilson score interval; no trials leave it open.

    Raises: GemmateError unless 0 <= successes <= n.
    """
    from scipy import stats

    if not 0 <= successes <= n:
        raise GemmateError(f"{successes} successes in {n} trials cannot be. Check the counts.")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    low, high = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return Interval(successes / n, float(low), float(high), n)


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, *, seed: int = 0, higher_is_better: bool = True
) -> Comparison:
    """Compare two models row by row: bootstrap interval and sign-flip permutation test.

    Raises: GemmateError for different lengths, no rows, or a value that is not finite.
    """
    from scipy import stats

    first, second = _finite(before), _finite(after)
    if len(first) != len(second):
        raise GemmateError(f"{len(first)} rows before, {len(second)} after. Compare the same rows.")
    change = second - first
    up, down = int((change > 0).sum()), int((change < 0).sum())
    p_value = 1.0  # of one row, or where nothing changed
    if len(change) > 1 and up + down:
        options = {"permutation_type": "samples", **_resampling(len(change), seed)}
        p_value = float(stats.permutation_test((change,), np.mean, **options).pvalue)
    counts = (up, down) if higher_is_better else (down, up)
    ties = len(change) - up - down
    return Comparison(bootstrap(change, seed=seed), p_value, *counts, ties, higher_is_better)


def _resampling(n: int, seed: int) -> dict[str, Any]:
    batch = max(1, 2_000_000 // n)  # 10,000 rows at once would take a gigabyte
    return {"n_resamples": 4_999, "batch": batch, "rng": np.random.default_rng(seed)}


def _finite(values: ArrayLike) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise GemmateError("Statistics need finite values, at least one. Did a run diverge?")
    return data
