"""A budget of hours or money: it ends a run at the end of a step, saved, and says so early."""

import logging
import time
from typing import Any

from transformers import TrainerCallback

from gemmate_lib.config import BudgetConfig, Experiment, GemmateError

log = logging.getLogger("gemmate")
STEPS = 5  # measured before the end is foretold; the very first one is slower and does not count


class Spent(GemmateError):
    """A run that its budget ended at the end of a step, once it had saved."""

    exit_code = 3


class Budget(TrainerCallback):
    """The hours that a run may take, and those it has taken.

    began: `time.perf_counter()` of when this process began with the run.
    before: hours spent on it by earlier processes.
    """

    def __init__(self, settings: BudgetConfig, *, began: float, before: float = 0.0) -> None:
        self.settings, self.before, self.began = settings, before, began
        self.warning = ""
        self._first: tuple[int, float] | None = None

    @property
    def spent(self) -> float:
        """Hours, with those before a resume."""
        return self.before + (time.perf_counter() - self.began) / 3600

    @property
    def over(self) -> bool:
        """Whether there is a budget, and nothing left of it."""
        return self.settings.hours is not None and self.spent >= self.settings.hours

    def check(self) -> None:
        """Raise Spent where a run is to go on and its budget is used up."""
        if self.settings.hours is not None and self.before >= self.settings.hours:
            raise Spent(f"The budget of this run is spent: {self}. {self._remedy()}")

    def stopped(self, step: int, steps: int) -> Spent:
        """What to raise for a run that was ended after a step, and saved."""
        said = f"The run was stopped by its budget after step {step} of {steps}: {self}."
        return Spent(f"{said} {self._remedy()}")

    def __str__(self) -> str:
        paid, price = "", self.settings.price_per_hour
        if price:
            paid = f", {self.spent * price:.3g} USD"
        limits = {"h": self.settings.max_hours, "USD": self.settings.max_cost}
        allowed = " and ".join(f"{limit:g} {unit}" for unit, limit in limits.items() if limit)
        return f"{self.spent:.3g} h{paid} of {allowed or 'no limit'}"

    def _remedy(self) -> str:
        keys = [f"budget.{k}" for k in ("max_hours", "max_cost") if getattr(self.settings, k)]
        return f"Go on with --resume last and a larger {' and '.join(keys)}."

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the first steps, say once where the budget will end, if that is too early."""
        hours, now = self.settings.hours, time.perf_counter()
        if hours is None or self.warning:
            return
        if self._first is None:
            self._first = (state.global_step, now)
            return
        step, since = self._first
        done, left = state.global_step - step, state.max_steps - state.global_step
        if done != STEPS or left <= 0:
            return
        pace = (now - since) / done / 3600
        if self.spent + left * pace > hours:
            reach = state.global_step + max(0, int((hours - self.spent) / pace))
            self.warning = (
                f"The budget of {hours:.3g} h will end this run at about step {reach} of "
                f"{state.max_steps}, which would take {self.spent + left * pace:.3g} h."
            )
            log.warning("%s It can be resumed with a larger one.", self.warning)


def refuse_budget(experiment: Experiment, what: str) -> None:
    """Raise GemmateError where a budget would be ignored."""
    if experiment.budget.hours is not None:
        problem = f"{what} keeps no budget"
        raise GemmateError(f"{problem}. Leave budget.max_hours and budget.max_cost out.")
