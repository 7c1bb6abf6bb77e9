"""Out of memory: which errors count, and the batch that takes the same steps in less."""

import pytest
import torch

from gemmate_lib.config import Experiment
from gemmate_lib.memory import OutOfMemory, asked_mib, said_in_numbers, smaller_batch


def test_the_messages_of_torch_are_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    assert asked_mib(error.value) == pytest.approx(2**30)
    said = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 14.7 GiB"
    assert asked_mib(torch.OutOfMemoryError(said)) == 1536
    assert asked_mib(MemoryError()) == 0
    assert asked_mib(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize(
    ("batch", "need", "room", "fits"),
    [(8, 900, 600, 4), (8, 900, 320, 2), (8, 900, 100, 1), (6, 700, 500, 3), (2, 900, 999, 1)],
)
def test_the_largest_divisor_that_fits(batch: int, need: int, room: int, fits: int) -> None:
    found, mib = smaller_batch(batch, base=100, need=need, room=room)
    assert found == fits and mib == pytest.approx(100 + (need - 100) * fits / batch)


def test_the_advice_keeps_the_rows_of_a_step() -> None:
    training = {"batch_size": 4, "gradient_accumulation_steps": 3}
    for settings, said in (
        (training, r"training\.batch_size=2 training\.gradient_accumulation_steps=6"),
        (training | {"batch_size": 1}, r"gradient_checkpointing=true, or dataset\.max_length=64"),
    ):
        experiment = Experiment.model_validate({"training": settings})
        with pytest.raises(OutOfMemory, match=said), said_in_numbers(experiment):
            raise MemoryError


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), said_in_numbers(Experiment()):
        raise RuntimeError("shapes do not fit")
