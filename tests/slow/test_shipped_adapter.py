"""The command that makes the time-aware adapter starts as it did when the shipped one was made."""

import json
from pathlib import Path

import pytest

from gemmate_lib.config import Facts, resolve
from gemmate_lib.models import SHIPPED
from gemmate_lib.sft import finetune_model


@pytest.mark.slow
def test_its_first_steps_are_its_record(tmp_path: Path) -> None:
    """Six steps lie within the warm-up, so that the rates are those of the whole run."""
    record = json.loads((SHIPPED["tiny-gemma-te"] / "build.json").read_text("utf-8"))
    short = resolve("temporal", facts=Facts(), profile="tiny", overrides={"max_steps": 6})
    run = finetune_model(short.experiment, out=tmp_path / "run")
    losses = [step["loss"] for step in run.log]
    assert losses == pytest.approx(record["first"], abs=2e-3)
    assert record["first"][-1] < record["first"][0]
