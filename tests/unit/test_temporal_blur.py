"""Blurred times: by one draw a row and pass, in training alone, and never out of the calendar."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from gemmate_lib.config import Facts, GemmateError, ModelConfig, TrainingConfig, resolve
from gemmate_lib.models import load_base
from gemmate_lib.temporal.blur import Blur, blurred
from gemmate_lib.temporal.collate import collator_for
from gemmate_lib.timestamps import EARLIEST, LATEST, MISSING, YEAR


def experiment(**training: Any) -> Any:
    overrides = {f"training.{key}": value for key, value in training.items()}
    return resolve("temporal", facts=Facts(), profile="tiny", overrides=overrides).experiment


def blur(**training: Any) -> Blur:
    """One that shows the rows that it hands on."""
    return Blur(list, experiment(**training))


def row(number: int, *times: int) -> dict[str, Any]:
    return {"row": number, "input_ids": [2] * len(times), "timestamps": list(times)}


def times(found: list[dict[str, Any]]) -> list[list[int]]:
    return [each["timestamps"] for each in found]


def test_a_draw_is_normal_and_some_are_withheld() -> None:
    rng = random.Random(0)
    drawn = [blurred([0, 1000], rng, years=4, withheld=0.1) for _ in range(20_000)]
    kept = [pair for pair in drawn if pair[0] != MISSING]
    assert 0.09 < 1 - len(kept) / len(drawn) < 0.11
    assert all(pair == [MISSING, MISSING] for pair in drawn if pair[0] == MISSING)
    assert {second - first for first, second in kept} == {1000}  # a row moves as a whole
    years = [first / YEAR for first, _ in kept]
    assert abs(sum(years) / len(years)) < 0.1
    assert (sum(y * y for y in years) / len(years)) ** 0.5 == pytest.approx(4, rel=0.03)


def test_the_ends_of_the_calendar_and_an_unknown_time_hold() -> None:
    for seed in range(20):
        found = blurred([EARLIEST, MISSING, LATEST], random.Random(seed), years=40, withheld=0)
        assert found[1] == MISSING
        assert found[0] >= EARLIEST and found[2] <= LATEST
        assert found[0] == EARLIEST or found[2] == LATEST
    assert blurred([7], random.Random(0), years=0, withheld=0) == [7]


def test_it_depends_on_seed_row_and_pass_alone() -> None:
    one, other = blur(timestamp_blur=2), blur(timestamp_blur=2)
    rows = [row(5, 0, 0), row(6, 0, 0), row(5, 0)]
    first = times(one(rows))
    assert first[0] == [*first[2], *first[2]] != first[1]
    assert times(other(rows[1:]))[0] == first[1]  # whatever was drawn before
    one.on_epoch_begin(None, SimpleNamespace(epoch=1.25), None)
    assert times(one(rows))[0] != first[0]
    one.on_epoch_begin(None, SimpleNamespace(epoch=None), None)
    assert times(one(rows)) == first
    assert times(Blur(list, experiment(timestamp_blur=2).model_copy(update={"seed": 1}))(rows)) != (
        first
    )


def test_rows_of_an_evaluation_keep_their_times_and_rows_stay_as_they_are() -> None:
    rows = [{"input_ids": [2], "timestamps": [0]}]
    assert blur(timestamp_blur=9)(rows) == rows
    numbered = [row(0, 0)]
    assert times(blur(timestamp_blur=9)(numbered)) != [[0]]
    assert numbered == [row(0, 0)]
    assert times(blur(timestamp_withheld=0.999)(numbered)) == [[MISSING]]


def test_there_must_be_times_to_blur() -> None:
    base = load_base(ModelConfig(device="cpu"))
    for setting in ("timestamp_blur", "timestamp_withheld"):
        told = {f"training.{setting}": 0.5}
        asked = resolve("quotes", facts=Facts(), profile="tiny", overrides=told).experiment
        with pytest.raises(GemmateError, match="are for rows with times"):
            collator_for(base.model, base.tokenizer, asked)
    for setting, value in (("timestamp_blur", -1), ("timestamp_withheld", 1)):
        with pytest.raises(ValidationError):
            TrainingConfig(**{setting: value})
