"""A budget: what hours and money come to, what is refused, and when its end is foretold."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemmate_lib.budget import STEPS, Budget, Spent, refuse_budget
from gemmate_lib.callbacks import Stopping
from gemmate_lib.config import BudgetConfig, Experiment, Facts, GemmateError, resolve
from gemmate_lib.ranks import Ranks
from gemmate_lib.trainer import train
from gemmate_lib.trials import prepare


def state(step: int, *, steps: int = 1000, epoch: float = 0.5) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=steps, epoch=epoch)


def test_the_smaller_limit_counts() -> None:
    assert BudgetConfig().hours is None
    assert BudgetConfig(max_hours=3).hours == 3
    both = {"max_cost": 10, "price_per_hour": 4}
    assert BudgetConfig(**both).hours == 2.5 == BudgetConfig(**both, max_hours=3).hours
    assert BudgetConfig(**both, max_hours=1).hours == 1
    assert BudgetConfig(price_per_hour=4).hours is None


def test_money_without_a_price_is_refused() -> None:
    with pytest.raises(GemmateError, match=r"without a price\. Set budget\.price_per_hour"):
        resolve("quotes", facts=Facts(), overrides=["max_cost=10"])
    for wrong in ("max_hours=0", "max_cost=-1", "max_hours=.inf"):
        with pytest.raises(GemmateError, match=r"budget\."):
            resolve("quotes", facts=Facts(), overrides=[wrong, "price_per_hour=1"])


def test_earlier_hours_count() -> None:
    settings = BudgetConfig(max_hours=2)
    budget = Budget(settings, began=time.perf_counter() - 3600, before=0.9)
    assert budget.spent == pytest.approx(1.9, abs=0.01) and not budget.over
    budget.check()
    spent = Budget(settings, began=time.perf_counter(), before=2.1)
    assert spent.over
    with pytest.raises(Spent, match=r"2\.1 h of 2 h.*--resume last and a larger budget\.max_hours"):
        spent.check()
    assert not Budget(BudgetConfig(), began=-1e9).over  # without one, nothing is too much


def test_the_cost_is_told() -> None:
    settings = BudgetConfig(max_cost=1.0, price_per_hour=4.0)
    budget = Budget(settings, began=time.perf_counter() - 900)
    said = str(budget.stopped(7, 100))
    assert (
        "after step 7 of 100: 0.25 h, 1 USD of 1 USD." in said and "larger budget.max_cost" in said
    )
    assert Spent("x").exit_code == 3


@pytest.mark.parametrize(("hours", "foretold"), [(0.5, True), (50.0, False)])
def test_a_budget_that_is_too_short_is_foretold_once(
    hours: float, foretold: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr("gemmate_lib.budget.time.perf_counter", lambda: now[0])
    budget = Budget(BudgetConfig(max_hours=hours), began=now[0])
    with caplog.at_level(logging.WARNING, logger="gemmate"):
        for step in range(1, 30):  # 36 s a step: a hundred an hour
            now[0] += 36 if step > 1 else 900
            budget.on_step_end(None, state(step), None)
            assert bool(budget.warning) == (foretold and step > STEPS)
    assert len(caplog.records) == foretold
    if foretold:
        assert "will end this run at about step 26 of 1000" in budget.warning


def test_it_stops_as_a_signal_does() -> None:
    def control() -> Any:
        return SimpleNamespace(should_save=False, should_training_stop=False)

    settings = BudgetConfig(max_hours=1)
    over = Budget(settings, began=time.perf_counter(), before=2.0)
    stopping, going, middle, last = Stopping(over), Stopping(), control(), control()
    stopping.on_step_end(None, state(10, steps=10), last)
    assert not last.should_training_stop and not stopping.by_budget  # it is done anyway
    stopping.on_step_end(None, state(4, epoch=1.0), middle)
    assert not middle.should_training_stop  # the epoch's own evaluation comes first
    stopping.on_epoch_end(None, state(4, epoch=1.0), middle)
    assert middle.should_save and middle.should_training_stop and stopping.by_budget
    going.on_step_end(None, state(4), last)
    assert not last.should_training_stop


@dataclass(frozen=True)
class Two(Ranks):
    """Two ranks of which the other one wishes something else."""

    world: int = 2
    other: int = 0

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize(("mine", "other", "number"), [(0, -1, 0), (2.0, 0, 0), (2.0, 15, 15)])
def test_several_ranks_end_at_the_same_step(mine: float, other: int, number: int) -> None:
    """No two clocks are alike, and a signal reaches one rank before another."""
    budget = Budget(BudgetConfig(max_hours=1), began=time.perf_counter(), before=mine)
    stopping = Stopping(budget, Two(other=other))
    assert not stopping.asked  # until it is agreed on
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stopping.on_step_end(None, state(4), control)
    assert control.should_save and control.should_training_stop and stopping.asked
    assert stopping.number == number and stopping.by_budget is not bool(number)
    quiet = Stopping(None, Two(other=0))
    quiet.on_step_end(None, state(4), control)
    assert not quiet.asked and not quiet.by_budget


def test_where_a_budget_would_be_ignored_it_is_refused(tmp_path: Path) -> None:
    refuse_budget(Experiment(), "A search")
    limited = Experiment(budget=BudgetConfig(max_hours=1))
    with pytest.raises(GemmateError, match="A search keeps no budget"):
        refuse_budget(limited, "A search")
    with pytest.raises(GemmateError, match="of several parts keeps no budget"):
        train(None, None, None, limited, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(GemmateError, match="A search keeps no budget"):
        prepare(limited)
