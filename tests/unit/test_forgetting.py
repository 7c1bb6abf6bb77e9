"""Matrices of task by time, and the measures of what was forgotten: by hand, from the papers."""

import math

import numpy as np
import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.forgetting import (
    MEASURES,
    History,
    average,
    backward_transfer,
    differences,
    forgetting,
    forward_transfer,
    lines,
    measure,
    summary,
)

# Row 0: the base. Three tasks; the first is best after the second one.
SCORES = np.array([[0.1, 0.2, 0.3], [0.8, 0.25, 0.2], [0.9, 0.7, 0.5], [0.4, 0.6, 0.9]])


def test_the_measures_are_those_of_the_papers() -> None:
    assert average(SCORES) == pytest.approx((0.4 + 0.6 + 0.9) / 3)
    assert backward_transfer(SCORES) == pytest.approx(((0.4 - 0.8) + (0.6 - 0.7)) / 2)
    assert forward_transfer(SCORES) == pytest.approx(((0.25 - 0.2) + (0.5 - 0.3)) / 2)
    assert forgetting(SCORES) == pytest.approx(((0.9 - 0.4) + (0.7 - 0.6)) / 2)


def test_what_the_base_could_is_no_best_to_fall_from() -> None:
    scores = SCORES.copy()
    scores[0] = 1.0
    assert forgetting(scores) == forgetting(SCORES)
    assert backward_transfer(scores) == backward_transfer(SCORES)


@pytest.mark.parametrize(
    "scores", [SCORES[1:], SCORES[:2, :1], np.where(SCORES == 0.9, np.nan, SCORES)]
)
def test_what_is_no_sequence_is_refused(scores: np.ndarray) -> None:
    for of in (average, backward_transfer, forward_transfer, forgetting):
        with pytest.raises(GemmateError, match="no sequence"):
            of(scores)


def history(gain: float = 0.0) -> History:
    """Two tasks of two rows: 2 and 3 tokens, 1 and 1."""
    losses = {
        "a": np.array([[4.0, 6.0], [1.0, 1.5], [2.0 - gain, 3.0 - gain]]),
        "b": np.array([[1.0, 1.0], [2.0, 2.0], [0.5, 0.1]]),
    }
    right = {"a": np.array([[0, 1], [2, 3], [1, 1]]), "b": np.array([[0, 0], [0, 0], [1, 1]])}
    return History(losses, right, {"a": np.array([2, 3]), "b": np.array([1, 1])})


def test_long_rows_weigh_more_than_short_ones() -> None:
    found = history()
    assert found.tasks == ["a", "b"]
    np.testing.assert_allclose(found.loss(), [[2, 1], [0.5, 2], [1, 0.3]])
    np.testing.assert_allclose(found.accuracy(), [[0.2, 0], [1, 0], [0.4, 1]])
    assert MEASURES["earlier_loss"][0](found) == 1.0
    assert MEASURES["forgetting_nats"][0](found) == pytest.approx(0.5)
    assert MEASURES["backward_transfer_nats"][0](found) == pytest.approx(-0.5)
    assert MEASURES["forward_transfer_nats"][0](found) == pytest.approx(-1.0)
    assert MEASURES["forgetting"][0](found) == pytest.approx(0.6)


def test_differences_are_paired_by_seed() -> None:
    before = [history(gain) for gain in (0.0, 0.5, 1.0)]
    after = [history(gain + 0.25) for gain in (0.0, 0.5, 1.0)]
    alone, change = measure(before)["earlier_loss"], differences(before, after)["earlier_loss"]
    assert alone.low < 1.0 < alone.high and alone.n == 3
    # Each seed gained the same, however far the seeds are apart.
    assert (change.low, change.value, change.high) == pytest.approx((-0.1, -0.1, -0.1))
    with pytest.raises(GemmateError, match="3 seeds before, 2 after"):
        differences(before, after[:2])


def test_a_summary_is_plain_and_pairs_with_the_one_named() -> None:
    found = {"none": [history()], "ewc": [history(0.5)]}
    told = summary(found, against="none")
    change = told["ewc"]["differences"]["earlier_loss"]
    assert change["value"] == pytest.approx(-0.2) and change["low"] is None
    assert told["none"]["differences"]["loss"]["value"] == 0.0
    assert set(told["ewc"]["measures"]) == set(MEASURES)
    assert math.isclose(told["none"]["loss"][0][1][0], 0.5)
    assert "loss on earlier tasks, ewc against none: -0.200" in lines(found)[-1]
