"""Labels that a model wrote: how often right, which confused, how sure. `N` rows, `L` labels."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmate_lib.config import GemmateError
from gemmate_lib.plots import COLOURS, style
from gemmate_lib.stats import Interval, bootstrap, wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Names = Sequence[str]
Answers = Sequence[str | None]  # None where a model wrote no label
UNPARSED = "unparsed"
_SHADES = ("white", COLOURS[0], "#003A5C")  # of a share from 0 to 1
_END = re.compile(r"<eos>|<end_of_turn>|</s>|<\|endoftext\|>")


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, 0..1; of each bin that holds a row, its means and size."""

    error: Interval
    confidence: list[float]
    accuracy: list[float]
    count: list[int]


@dataclass(frozen=True)
class ClassificationScores:
    """What was counted, each share with its 95 % interval.

    precision, recall, f1: of each label, n being the rows that bear on it; NaN where none does.
    confusion: [L][L + 1] rows, by expected label and by predicted one, unparsed last.
    per_row: 1.0 where the label is right, else 0.0: to compare two models on the same rows.
    """

    labels: tuple[str, ...]
    accuracy: Interval
    macro_f1: Interval
    micro_f1: Interval
    unparsed: Interval
    precision: dict[str, Interval]
    recall: dict[str, Interval]
    f1: dict[str, Interval]
    support: dict[str, int]
    confusion: list[list[int]]
    per_row: list[float]
    calibration: Calibration | None = None

    def metrics(self) -> dict[str, Interval]:
        """Return every interval by name: "accuracy", … and "precision/positive", …"""
        found = {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "micro_f1": self.micro_f1}
        found["unparsed"] = self.unparsed
        if self.calibration:
            found["calibration_error"] = self.calibration.error
        for name in ("precision", "recall", "f1"):
            found |= {f"{name}/{label}": each for label, each in getattr(self, name).items()}
        return found


def classify(
    predicted: Answers, expected: Names, labels: Names, *, probabilities: Any = None, seed: int = 0
) -> ClassificationScores:
    """Score predicted labels; None, an answer that is no label, counts as wrong, never as absent.

    probabilities: float [N, L], of the labels in their order; where given, for `calibration`.
    Macro F1 is the mean over the labels that occur, expected or predicted: of others nothing is
    known. An interval of a label resamples the rows that bear on it; see n where it is narrow.
    Raises: GemmateError for other labels, no rows, or lengths that differ.
    """
    from sklearn import metrics as sk

    names = _names(labels)
    truth, said = _indices(expected, names), _indices(predicted, (*names, None))
    if len(truth) != len(said) or len(truth) == 0:
        problem = f"There are {len(said)} predictions and {len(truth)} expected labels"
        raise GemmateError(f"{problem}. Give one or more rows, and each its label.")
    given, correct = probabilities is not None, truth == said
    matrix = sk.confusion_matrix(truth, said, labels=range(len(names) + 1))[:-1]
    return ClassificationScores(
        labels=names,
        accuracy=wilson(int(correct.sum()), len(truth)),
        unparsed=wilson(int(matrix[:, -1].sum()), len(truth)),
        **_intervals(truth, said, names, seed=seed),
        support=dict(zip(names, matrix.sum(axis=1).tolist(), strict=True)),
        confusion=matrix.tolist(),
        per_row=correct.astype(float).tolist(),
        calibration=calibration(probabilities, expected, names, seed=seed) if given else None,
    )


def _intervals(
    truth: np.ndarray, said: np.ndarray, names: tuple[str, ...], *, seed: int
) -> dict[str, Any]:
    """Return precision, recall and F1 of each label, macro and micro F1, with their intervals."""
    from sklearn import metrics as sk

    every = np.arange(len(names))
    counted: Any = {"labels": every, "zero_division": np.nan}
    each = sk.precision_recall_fscore_support(truth, said, **counted)
    is_truth, is_said = (np.equal.outer(column, every).astype(float) for column in (truth, said))
    hits, both = is_truth * is_said, is_truth + is_said
    # Each is a ratio of sums over rows: these numbers of a row above, those below.
    parts = {"precision": (hits, is_said), "recall": (hits, is_truth), "f1": (2 * hits, both)}
    found: dict[str, Any] = {}
    for values, (part, (above, below)) in zip(each, parts.items(), strict=False):  # not support
        columns = [_bounded(values[i], above[:, [i]], below[:, [i]], seed=seed) for i in every]
        found[part] = dict(zip(names, columns, strict=True))
    micro, macro = (sk.f1_score(truth, said, average=a, **counted) for a in ("micro", "macro"))
    sums = 2 * hits.sum(axis=1, keepdims=True), both.sum(axis=1, keepdims=True)
    found["micro_f1"] = _bounded(micro, *sums, seed=seed)
    return found | {"macro_f1": _bounded(macro, 2 * hits, both, seed=seed)}


def _bounded(value: float, above: np.ndarray, below: np.ndarray, *, seed: int) -> Interval:
    """Bound the mean of ratios of sums, float [N, ratios]; in a resample, of those it holds."""
    bears = below.any(axis=1)  # other rows change nothing; without them no resample has 0 / 0
    if not bears.any():
        return Interval(np.nan, 0.0, 1.0, 0)
    above, below = above[bears], below[bears]

    def mean(times: np.ndarray) -> Any:
        sums = times @ below
        return (times @ above / np.maximum(sums, 1)).sum(axis=-1) / (sums > 0).sum(axis=-1)

    return _interval(float(value), mean, len(below), seed=seed)


def _interval(value: float, statistic: Any, n: int, *, seed: int) -> Interval:
    """Bootstrap a share, a function of how many times each of n rows is drawn, float [..., n]."""

    def of_rows(drawn: np.ndarray, axis: int = -1) -> Any:
        rows = drawn.astype(int).reshape(-1, drawn.shape[axis])
        shifted = rows + n * np.arange(len(rows))[:, None]
        times = np.bincount(shifted.ravel(), minlength=n * len(rows)).astype(float)
        return statistic(times.reshape(*drawn.shape[:-1], n))

    found = bootstrap(np.arange(n), of_rows, seed=seed)
    return Interval(value, max(found.low, 0.0), min(found.high, 1.0), n)


def calibration(
    probabilities: Any, expected: Names, labels: Names, *, bins: int = 10, seed: int = 0
) -> Calibration:
    """Return how far confidence and accuracy lie apart, over bins of equal width, (low, high].

    probabilities: [N, L], of the labels in their order; the largest of a row is its confidence.
    Few rows make the error look large, and resampling adds to it: compare like with like.
    Raises: GemmateError unless every row is finite, within 0..1 and sums to 1.
    Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    names = _names(labels)
    truth, table = _indices(expected, names), np.asarray(probabilities, dtype=np.float64)
    if table.shape != (len(truth), len(names)) or len(truth) == 0 or bins < 1:
        problem = f"Probabilities {table.shape} in {bins} bins for {len(truth)} rows"
        raise GemmateError(f"{problem} of {len(names)} labels. Give one number a row and label.")
    # A comparison with NaN is false, so it is asked whether they are right, not whether wrong.
    if not ((table >= 0).all() and (abs(table.sum(axis=1) - 1) <= 1e-6).all()):
        raise GemmateError("A row of probabilities does not sum to 1. Take a softmax over labels.")
    confidence, correct = table.max(axis=1), table.argmax(axis=1) == truth
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    held = np.equal.outer(place, np.unique(place)).astype(float)
    gaps, n, rng = held * (correct - confidence)[:, None], len(truth), np.random.default_rng(seed)
    drawn = [np.abs(gaps[rng.integers(0, n, n)].sum(axis=0)).sum() / n for _ in range(1_999)]
    value = float(np.abs(gaps.sum(axis=0)).sum() / n)
    # Not BCa: it takes a model without error for one that can have none. Resampled errors may all
    # be above the value, which the interval is to hold.
    low, high = np.quantile([*drawn, value], (0.025, 0.975)) if n > 1 else (0.0, 1.0)
    found = Interval(value, min(float(low), value), max(float(high), value), n)
    mean, right = ((each @ held / held.sum(axis=0)).tolist() for each in (confidence, correct))
    return Calibration(found, mean, right, held.sum(axis=0).astype(int).tolist())


def parse_label(text: str, labels: Names) -> str | None:
    """Return the label in a completion, `{"label": "positive"}` or the bare word, else None.

    White space and an end-of-sequence mark may surround it; more text is a wrong answer, and so
    is another case. An object may have other keys, and "label" once: two answers are none.
    """
    answer, *rest = _END.split(text)
    found: Any = "" if "".join(rest).strip() else answer.strip()
    if found.startswith("{"):
        try:
            [found] = (v for k, v in json.loads(found, object_pairs_hook=list) if k == "label")
        except (ValueError, RecursionError):  # a model may repeat a bracket until it is stopped
            return None
    return found if isinstance(found, str) and found in labels else None


def plot_confusion(scores: ClassificationScores) -> "Figure":
    """Draw the counts, shaded by the share of the expected label; for `plots.show`.

    Unparsed answers have a column where there are any. Of many labels, zeros are not written.
    """
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    counts, many = np.array(scores.confusion), len(scores.labels) > 20
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    columns = [*scores.labels, UNPARSED][: len(counts) + bool(counts[:, -1].any())]
    shades = LinearSegmentedColormap.from_list("", list(zip((0, 0.8, 1), _SHADES, strict=True)))
    cell, long = 0.3 if many else 0.6, many or max(map(len, columns)) > 9  # inches; letters
    plain: Any = {"parse_math": False}  # a label with $ in it is no formula
    turned: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    with mpl.rc_context():
        style()
        # Not of pyplot, which would keep it, and show it a second time in a notebook.
        figure = Figure(figsize=(3.2 + cell * len(columns), 1.4 + cell * len(counts)))
        axes = figure.subplots()
        image = axes.imshow(shares[:, : len(columns)], shades, vmin=0, vmax=1, aspect="auto")
        for row, column in np.argwhere(counts[:, : len(columns)] >= many):
            colour = "white" if shares[row, column] > 0.75 else "black"  # contrast 4.5 or more
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
        if UNPARSED in columns:  # what is right of the line is no label
            axes.axvline(len(counts) - 0.5, color="0.4", lw=0.8)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(len(columns)), columns, **(turned if long else {}), **plain)
        axes.set_yticks(range(len(counts)), scores.labels, **plain)
        axes.set(xlabel="predicted label", ylabel="expected label", title="Confusion matrix")
        figure.colorbar(image, label="share of the expected label")
    return figure


def _names(labels: Names) -> tuple[str, ...]:
    names = () if isinstance(labels, str) else tuple(labels)  # a word is no list of its letters
    if not names or len(set(names)) < len(names) or UNPARSED in names:
        raise GemmateError(f"{labels!r} are no labels. Give different words, none {UNPARSED!r}.")
    return names


def _indices(column: Answers, names: Answers) -> np.ndarray:
    """Return the place of each among the names, int64 [N]."""
    places = {name: i for i, name in enumerate(names)}
    for row, each in enumerate(column):
        if each not in places:
            raise GemmateError(f"Row {row} has the label {each!r}. Give one of {names}.")
    return np.array([places[each] for each in column], dtype=np.int64)
