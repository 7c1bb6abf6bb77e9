"""The watch on every step: what stops a run, which rows are named, what a scaler may overflow."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemmate_lib.callbacks import Stopping
from gemmate_lib.divergence import OVERFLOWS, Diverged, RowsOf, Watch, finite

Given = dict[str, Any]


@pytest.fixture
def given() -> Given:
    """What the trainer hands to a callback: a model of one layer and its optimizer."""
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5)}


def state(step: int = 4, epoch: float = 0.5) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, epoch=epoch, max_steps=10)


def args(*, fp16: bool = False) -> SimpleNamespace:
    return SimpleNamespace(fp16=fp16)


def test_finite_sees_every_entry() -> None:
    whole = [torch.ones(3), torch.zeros(2, 2)]
    assert finite(whole) and finite([])
    for bad in (float("nan"), float("inf"), -float("inf")):
        whole[1][1, 0] = bad
        assert not finite(whole)


def test_the_rows_of_the_step_are_named(given: Given) -> None:
    """Batches are fetched ahead of the steps, and evaluations use the same collator."""
    rows = RowsOf(lambda batch: batch, keep=6)
    watch = Watch(None, rows)
    for first in (10, 20, 30, 40):  # two a step, the next step's are there already
        assert rows([{"row": first, "x": 1}, {"row": first + 1, "x": 2}]) == [{"x": 1}, {"x": 2}]
    rows([{"x": 3}])
    for step in range(2):
        watch.on_step_begin(args(), state(step), None)
        watch.on_substep_end(args(), state(step), None)
        if step:
            given["model"].weight.grad[0, 0] = float("nan")
            with pytest.raises(Diverged, match=r"in step 2: the gradient .* rows 30, 31, 40, 41"):
                watch.on_pre_optimizer_step(args(), state(step), None, **given)
        else:
            watch.on_pre_optimizer_step(args(), state(step), None, **given)
            watch.on_step_end(args(), state(step + 1), None, **given)


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_a_logged_loss_stops(name: str, given: Given) -> None:
    with pytest.raises(Diverged, match=f"step 4: the {name} is not finite .learning rate 0.5"):
        Watch(None).on_log(args(), state(), None, logs={name: float("nan")}, **given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_looking_at_weights_copies_none(bad: float) -> None:
    """Summed as float32, the words of a 16-bit gemma-2b would be held twice more."""
    model = torch.nn.Embedding(1000, 1000, dtype=torch.bfloat16)
    model.register_parameter("nothing", torch.nn.Parameter(torch.empty(0)))
    with torch.profiler.profile(profile_memory=True) as profile:
        Watch(None).on_train_begin(args(), state(), None, model=model)
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 1000
    with torch.no_grad():
        model.weight[3, 7] = bad
    with pytest.raises(Diverged, match="weight is not finite before the first step"):
        Watch(None).on_train_begin(args(), state(), None, model=model)


def test_a_trained_weight_stops_and_a_frozen_one_is_looked_at_once(given: Given) -> None:
    watch, model = Watch(None), given["model"]
    model.bias.requires_grad_(False)
    model.bias[0] = float("inf")
    watch.on_step_end(args(), state(), None, **given)
    with pytest.raises(Diverged, match="bias is not finite before the first step"):
        watch.on_train_begin(args(), state(), None, **given)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(Diverged, match="a trained weight"):
        watch.on_step_end(args(), state(), None, **given)


def test_a_gradient_scaler_may_overflow_for_a_while(given: Given) -> None:
    """In fp16 the scale starts too high on purpose and is halved at each overflow."""
    watch, grad = Watch(None), given["model"].weight.grad
    grad[0, 0] = float("inf")
    for _ in range(OVERFLOWS):
        watch.on_pre_optimizer_step(args(fp16=True), state(), None, **given)
    with pytest.raises(Diverged):
        watch.on_pre_optimizer_step(args(fp16=True), state(), None, **given)
    again = Watch(None)
    for _ in range(2):
        grad[0, 0] = float("inf")
        for _ in range(OVERFLOWS):
            again.on_pre_optimizer_step(args(fp16=True), state(), None, **given)
        grad[0, 0] = 1.0
        again.on_pre_optimizer_step(args(fp16=True), state(), None, **given)


def test_a_signal_stops_at_the_end_of_a_step_or_epoch() -> None:
    def control() -> SimpleNamespace:
        return SimpleNamespace(should_save=False, should_training_stop=False)

    stopping = Stopping()
    with stopping.listening():
        signal.raise_signal(signal.SIGTERM)
    assert stopping.number == signal.SIGTERM
    middle, end, last = control(), control(), control()
    stopping.on_step_end(None, state(4, 0.5), middle)
    assert middle.should_save and middle.should_training_stop
    stopping.on_step_end(None, state(8, 1.0), end)
    assert not end.should_training_stop  # the epoch's own evaluation comes first
    stopping.on_epoch_end(None, state(8, 1.0), end)
    assert end.should_save and end.should_training_stop
    stopping.on_step_end(None, state(10, 1.25), last)
    assert not last.should_training_stop  # it is done anyway
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
