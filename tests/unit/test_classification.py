"""Scores of labels agree with counts made by hand; an answer that is no label is a wrong one."""

import math
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmate_lib import classification
from gemmate_lib.classification import calibration, classify, parse_label, plot_confusion
from gemmate_lib.config import GemmateError
from gemmate_lib.stats import Interval, wilson

LABELS = ["negative", "neutral", "positive"]
EXPECTED = ["negative"] * 4 + ["neutral"] * 3 + ["positive"] * 5
PREDICTED = ["negative", "negative", "neutral", None, "neutral", "positive", "neutral"]
PREDICTED += ["positive", "positive", "positive", "negative", None]
SURE = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.05, 0.0, 0.95], [1 / 3, 1 / 3, 1 / 3]])
cheap = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def no_bootstrap(values, statistic=np.mean, *, seed=0):
    """The statistic itself, in the place of the value that scikit-learn computes."""
    value = float(statistic(np.asarray(values, dtype=float)))
    return Interval(value, value, value, len(values))


quick = patch.object(classification, "bootstrap", no_bootstrap)


def by_counts(predicted, expected, labels):
    """Precision, recall and F1 of each label from its counts; nothing where it is divided by 0."""
    found = {}
    for label in labels:
        pairs = [(p == label, e == label) for p, e in zip(predicted, expected, strict=True)]
        right, false, missed = (
            pairs.count(x) for x in [(True, True), (True, False), (False, True)]
        )
        found[f"precision/{label}"] = right / (right + false) if right + false else math.nan
        found[f"recall/{label}"] = right / (right + missed) if right + missed else math.nan
        whole = 2 * right + false + missed
        found[f"f1/{label}"] = 2 * right / whole if whole else math.nan
    found["macro_f1"] = np.nanmean([found[f"f1/{label}"] for label in labels])
    right = sum(p == e for p, e in zip(predicted, expected, strict=True))
    said = sum(p is not None for p in predicted)
    found["micro_f1"] = 2 * right / (said + len(expected))  # 2 P R / (P + R) of all labels
    found["accuracy"] = right / len(expected)
    found["unparsed"] = 1 - said / len(expected)
    return found


def test_scores_made_by_hand():
    found = classify(PREDICTED, EXPECTED, LABELS)
    assert found.confusion == [[2, 1, 0, 1], [0, 2, 1, 0], [1, 0, 3, 1]]
    assert found.support == {"negative": 4, "neutral": 3, "positive": 5}
    assert found.per_row == [1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0]
    assert found.accuracy == wilson(7, 12) and found.unparsed == wilson(2, 12)
    assert found.precision["negative"].value == pytest.approx(2 / 3)
    assert found.recall["negative"].value == pytest.approx(2 / 4)
    assert found.f1["negative"].value == pytest.approx(4 / 7)
    assert found.macro_f1.value == pytest.approx((4 / 7 + 4 / 6 + 6 / 9) / 3)
    assert found.micro_f1.value == pytest.approx(2 * 7 / (10 + 12))
    rows = {name: each["neutral"].n for name, each in vars(found).items() if name in _PER_LABEL}
    assert rows == {"precision": 3, "recall": 3, "f1": 4}
    assert found.calibration is None
    for interval in found.metrics().values():
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


_PER_LABEL = ("precision", "recall", "f1")


def test_metrics_names_every_interval():
    probabilities = np.full((12, 3), 1 / 3)
    found = classify(PREDICTED, EXPECTED, LABELS, probabilities=probabilities, seed=3)
    assert found.calibration == calibration(probabilities, EXPECTED, LABELS, seed=3)
    metrics = found.metrics()
    assert set(metrics) == {
        *("accuracy", "macro_f1", "micro_f1", "unparsed", "calibration_error"),
        *(f"{name}/{label}" for name in _PER_LABEL for label in LABELS),
    }
    assert metrics["calibration_error"].value == pytest.approx(
        0, abs=1e-12
    )  # 4 of 12 right, 1/3 sure
    assert metrics["recall/neutral"] == found.recall["neutral"]


answers = st.lists(
    st.tuples(st.sampled_from([*"abc", None]), st.sampled_from("abc")), min_size=1, max_size=20
)


@settings(cheap, max_examples=30)
@given(rows=answers)
@quick
def test_scores_are_those_of_the_counts(rows):
    """scikit-learn's values and our resampled statistic, on the rows as they are, are the same."""
    predicted, expected = zip(*rows, strict=True)
    found = classify(predicted, expected, ["a", "b", "c", "d"]).metrics()
    for name, value in by_counts(predicted, expected, "abcd").items():
        assert found[name].value == pytest.approx(value, nan_ok=True)
        if found[name].n and name not in ("accuracy", "unparsed"):
            assert found[name].low == pytest.approx(value) == found[name].high
    assert found["f1/d"] == found["recall/d"] == found["precision/d"]
    assert str(found["f1/d"]) == "nan [0.00, 1.00] (n=0)"


def test_a_resample_is_a_data_set():
    """What the bootstrap is given scores the rows drawn, in which a label may be missing."""
    with patch.object(classification, "bootstrap", side_effect=no_bootstrap) as asked:
        classify(PREDICTED, EXPECTED, LABELS)
    macro = asked.call_args_list[-1].args[1]
    drawn = np.array([[0, 0, 1, 3, 7, 10], [7, 8, 7, 8, 9, 9], [0, 1, 2, 3, 4, 5]])
    counted = [
        by_counts([PREDICTED[i] for i in d], [EXPECTED[i] for i in d], LABELS)["macro_f1"]
        for d in drawn
    ]
    assert macro(drawn.astype(float), axis=-1) == pytest.approx(counted)
    assert counted[1] == 1.0  # only positive ones, and all right


def test_intervals_cover_what_they_should():
    """Of an accuracy of 3/4 among many rows, micro F1's interval is about Wilson's."""
    rng = np.random.default_rng(0)
    expected = rng.choice(LABELS, 300)
    wrong = rng.random(300) < 0.25
    predicted = [LABELS[LABELS.index(e) - w] for e, w in zip(expected, wrong, strict=True)]
    found = classify(predicted, expected, LABELS)
    assert (found.micro_f1.low, found.micro_f1.high) == pytest.approx(
        (found.accuracy.low, found.accuracy.high), abs=0.01
    )
    assert found == classify(predicted, expected, LABELS) and found.micro_f1.n == 300
    assert found.macro_f1.low < found.macro_f1.value < found.macro_f1.high


@settings(cheap, max_examples=25)
@given(rows=answers, data=st.data())
@quick
def test_the_order_of_the_rows_changes_nothing(rows, data):
    again = data.draw(st.permutations(rows))
    scores = [classify(*zip(*each, strict=True), list("abc")) for each in (rows, again)]
    one, other = ({k: v.value for k, v in each.metrics().items()} for each in scores)
    assert one == pytest.approx(other, nan_ok=True)
    assert scores[0].confusion == scores[1].confusion


@settings(cheap, max_examples=25)
@given(rows=answers, data=st.data())
@quick
def test_an_unparsed_answer_never_improves_a_share_of_all_rows(rows, data):
    row = data.draw(st.integers(0, len(rows) - 1))
    predicted, expected = map(list, zip(*rows, strict=True))
    before = classify(predicted, expected, list("abc"))
    predicted[row] = None
    after = classify(predicted, expected, list("abc"))
    assert after.accuracy.value <= before.accuracy.value
    assert all(after.recall[x].value <= before.recall[x].value for x in set(expected))
    assert after.unparsed.value >= before.unparsed.value and after.per_row[row] == 0
    assert np.sum(after.confusion) == len(rows)  # none is dropped


@settings(cheap, max_examples=10)
@given(expected=st.lists(st.sampled_from("abc"), min_size=2, max_size=20))
def test_perfect_predictions(expected):
    """Also with a label that is rare: the resamples without it are perfect too."""
    found = classify(expected, expected, list("abcd"))
    assert set(found.per_row) == {1.0} and found.accuracy.value == 1
    assert (found.macro_f1.low, found.macro_f1.value) == (1, 1)
    assert all(found.f1[label].value == 1 for label in expected)
    assert found.unparsed.value == 0


def test_one_row_and_all_unparsed():
    found = classify([None], ["a"], ["a", "b"])
    assert found.confusion == [[0, 0, 1], [0, 0, 0]]
    assert found.recall["a"] == Interval(0.0, 0.0, 1.0, 1)
    assert math.isnan(found.precision["a"].value) and found.f1["a"].value == 0
    assert found.macro_f1.value == found.micro_f1.value == 0


def test_labels_that_are_none_are_refused():
    with pytest.raises(GemmateError, match="Row 1 has the label 'c'"):
        classify(["a", "a"], ["a", "c"], ["a", "b"])
    with pytest.raises(GemmateError, match="Row 0 has the label None"):
        classify(["a"], [None], ["a", "b"])
    with pytest.raises(GemmateError, match="Row 0 has the label 'A'"):
        classify(["A"], ["a"], ["a", "b"])
    for rows in (([], []), (["a"], ["a", "b"]), (["a", "b"], ["a"])):
        with pytest.raises(GemmateError, match="each its label"):
            classify(*rows, ["a", "b"])
    for labels in ([], ["a", "a"], ["a", "unparsed"], "ab"):
        with pytest.raises(GemmateError, match="no labels"):
            classify(["a"], ["a"], labels)


def ece_by_a_loop(probabilities, expected, labels, bins):
    error = 0.0
    for b in range(bins):
        inside = []
        for row, truth in zip(probabilities, expected, strict=True):
            confidence = max(row)
            # (b / bins, (b + 1) / bins], and the first bin holds its lower edge
            if b / bins < confidence <= (b + 1) / bins or (b == 0 and confidence == 0):
                inside.append((confidence, labels[list(row).index(confidence)] == truth))
        if inside:
            gap = abs(sum(c for c, _ in inside) - sum(right for _, right in inside))
            error += gap / len(expected)
    return error


@settings(cheap, max_examples=30)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(1, 99), min_size=3, max_size=3), st.sampled_from(LABELS)),
        min_size=1,
        max_size=30,
    ),
    bins=st.integers(1, 12),
)
@quick
def test_calibration_is_its_definition(rows, bins):
    weights, expected = zip(*rows, strict=True)
    probabilities = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    # An edge of a bin is rounded: 0.7000000000000001. Rows on one are in the next test.
    if (abs(probabilities.max(axis=1) * bins % 1 - 0.5) > 0.4999).any():
        return
    found = calibration(probabilities, expected, LABELS, bins=bins)
    assert found.error.value == pytest.approx(
        ece_by_a_loop(probabilities.tolist(), expected, LABELS, bins)
    )
    assert sum(found.count) == len(rows) and len(found.count) <= bins
    gaps = np.abs(np.subtract(found.confidence, found.accuracy)) * found.count
    assert found.error.value == pytest.approx(gaps.sum() / len(rows))


def test_calibration_made_by_hand():
    found = calibration(SURE, ["negative", "positive", "positive", "neutral"], LABELS)
    assert found.confidence == pytest.approx([1 / 3, 0.7, 0.95])  # 0.7 is of (0.6, 0.7]
    assert found.accuracy == pytest.approx([0, 0.5, 1]) and found.count == [1, 2, 1]
    assert found.error.value == pytest.approx((1 / 3 + 2 * 0.2 + 0.05) / 4)
    assert 0 <= found.error.low <= found.error.value <= found.error.high <= 1
    halves = calibration([[0.5, 0.5], [0.51, 0.49]], ["a", "a"], ["a", "b"], bins=2)
    assert halves.count == [1, 1]  # 0.5 is of (0, 0.5]


def test_a_perfectly_calibrated_model_has_an_interval_from_zero():
    """Resampling alone would put the whole interval above it."""
    rows = [[0.8, 0.2]] * 50
    found = calibration(rows, ["a"] * 40 + ["b"] * 10, ["a", "b"]).error
    assert found.value == pytest.approx(0, abs=1e-12) and found.low <= found.value
    assert 0.05 < found.high < 0.25
    rows = [[0.6, 0.4]] * 10 + [[0.75, 0.25]] * 8 + [[0.9, 0.1]] * 10 + [[0.5, 0.5]] * 8
    right = [*"aaaaaabbbb", *"aaaaaabb", *"aaaaaaaaab", *"aaaabbbb"]
    several = calibration(rows, right, ["a", "b"]).error
    assert several.low <= several.value == pytest.approx(0, abs=1e-12)
    certain = calibration([[1.0, 0.0]] * 5, ["a"] * 5, ["a", "b"])
    assert (certain.error.value, certain.error.high, certain.count) == (0, 0, [5])


@pytest.mark.parametrize(
    "row", [[0.5, 0.4], [0.5, 0.500002], [math.nan, 1.0], [math.inf, 0.0], [1.5, -0.5]]
)
def test_a_row_is_a_distribution(row):
    calibration([[0.5, 0.5], [0.5, 0.5000005]], ["a", "b"], ["a", "b"])
    with pytest.raises(GemmateError, match="sum to 1"):
        calibration([[0.5, 0.5], row], ["a", "b"], ["a", "b"])


@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (2,), (0, 2)])
def test_probabilities_have_a_number_for_each_row_and_label(shape):
    with pytest.raises(GemmateError, match="Give one number"):
        calibration(np.full(shape, 0.5), ["a", "b"], ["a", "b"])
    with pytest.raises(GemmateError, match="Give one number"):
        calibration(np.full((2, 2), 0.5), ["a", "b"], ["a", "b"], bins=0)
    with pytest.raises(GemmateError, match="Row 0"):
        calibration(np.full((1, 2), 0.5), ["c"], ["a", "b"])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (' {"label": "positive"}', "positive"),
        ('{"label":"positive"}\n\n', "positive"),
        ('{\n  "label": "positive"\n}<eos>', "positive"),
        (' {"label": "positive"} <end_of_turn>\n<eos>', "positive"),
        ('{"label": "positive", "why": ["x", {"label": "negative"}]}', "positive"),
        (" positive", "positive"),
        ("\tpositive\n<eos>", "positive"),
        ("very positive", "very positive"),
        ('{"label": "Positive"}', None),
        ("Positive", None),
        ("positive.", None),
        ('"positive"', None),
        ("positive negative", None),
        ('{"label": "positive"} and more', None),
        ('{"label": "positive"}<eos>{"label": "negative"}', None),
        ('{"label": "positive"}{"label": "negative"}', None),
        ('{"label": "positive", "label": "negative"}', None),
        ('{"label": "positive", "label": "positive"}', None),
        ('Label: {"label": "positive"}', None),
        ("<eos>positive", None),
        ('{"label": " positive"}', None),
        ('{"label": ["positive"]}', None),
        ('{"label": null}', None),
        ('{"label": 1}', None),
        ('{"answer": "positive"}', None),
        ('{"answer": {"label": "positive"}}', None),
        ('[["label", "positive"]]', None),
        ("{'label': 'positive'}", None),
        ('{"label": "positive"', None),
        ('{"label": "unknown"}', None),
        ("unparsed", None),
        ("{}", None),
        ("", None),
        ('{"a":' * 100_000, None),
        ('{"label": ' + "[" * 100_000, None),
        ('{"label": ' + "9" * 10_000 + "}", None),
    ],
)
def test_parse_label(text, label):
    assert parse_label(text, ["positive", "negative", "very positive"]) == label


@cheap
@given(label=st.text(min_size=1).filter(lambda t: t == t.strip()), other=st.text())
def test_any_label_comes_back_from_its_json(label, other):
    import json

    text = f" {json.dumps({'label': label})}\n"
    assert parse_label(text, ["x", label]) == (None if "<eos>" in label else label)
    assert parse_label(other, ["never so"]) is None


def texts_of(figure):
    axes, bar = figure.axes
    cells = np.array([[int(t.get_text()), *t.get_position()] for t in axes.texts])
    across, down = (
        [t.get_text() for t in each] for each in (axes.get_xticklabels(), axes.get_yticklabels())
    )
    return axes, bar, cells, across, down


def test_the_figure_shows_each_count_where_it_belongs():
    scores = classify(PREDICTED, EXPECTED, LABELS)
    axes, bar, cells, across, down = texts_of(plot_confusion(scores))
    assert across == [*LABELS, "unparsed"] and down == LABELS
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted label", "expected label")
    assert axes.get_title(loc="left") and bar.get_ylabel() == "share of the expected label"
    drawn = np.full((3, 4), -1)
    for count, column, row in cells:
        drawn[row, column] = count
    assert drawn.tolist() == scores.confusion
    shares = np.array(scores.confusion) / [[4], [3], [5]]
    np.testing.assert_allclose(axes.images[0].get_array(), shares)


def test_a_column_of_unparsed_answers_only_where_there_are_any():
    scores = classify([p or "neutral" for p in PREDICTED], EXPECTED, LABELS)
    axes, _, cells, across, _ = texts_of(plot_confusion(scores))
    assert across == LABELS and cells.shape == (9, 3) and not axes.lines


def test_every_count_stands_out_from_its_cell():
    """WCAG 2: a contrast of 4.5 or more, for each share of 50 rows."""
    matrix = [[n, 50 - n, 0] for n in range(51)] + [[0, 0, 0]]
    labels = tuple(f"l{i}" for i in range(52))
    wide = [[*row[:2], *[0] * 51] for row in matrix]
    scores = patch.object(classification.ClassificationScores, "__init__", lambda self: None)
    with scores:
        blank = classification.ClassificationScores()
    object.__setattr__(blank, "labels", labels)
    object.__setattr__(blank, "confusion", wide)
    axes = plot_confusion(blank).axes[0]
    assert len(axes.texts) == 100  # no zeros, of many labels
    image = axes.images[0]

    def light(colour):
        parts = np.array(mpl.colors.to_rgb(colour))
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return parts @ (0.2126, 0.7152, 0.0722) + 0.05

    for text in axes.texts:
        column, row = text.get_position()
        cell = light(image.to_rgba(image.get_array()[row, column], norm=True)[:3])
        contrast = light(text.get_color()) / cell
        assert max(contrast, 1 / contrast) >= 4.5


def test_the_figure_is_drawn_whatever_the_labels_and_leaves_no_trace(tmp_path):
    import matplotlib.pyplot as plt

    before, labels = dict(mpl.rcParams), ["cost $5", "a $\\bad{$", "a very long label indeed"]
    figure = plot_confusion(classify(labels, labels, labels))
    figure.savefig(tmp_path / "confusion.png")
    assert dict(mpl.rcParams) == before and not plt.get_fignums()
    assert [t.get_rotation() for t in figure.axes[0].get_xticklabels()] == [40] * 3
