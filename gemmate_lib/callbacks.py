"""How a training ends early and goes on: signals, a spent budget, and checkpoints."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from gemmate_lib import checkpoints
from gemmate_lib.budget import Budget
from gemmate_lib.ranks import ALONE, Ranks
from gemmate_lib.storage import Storage

KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm")  # of what the trainer logs
log = logging.getLogger("gemmate")


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop, and did so at the end of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.exit_code, self.step = 128 + number, step
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped and saved after step {step}.")


@dataclass
class Keeping:
    """Which checkpoints stay, and what is written down beside them."""

    folder: Path
    identity: dict[str, Any]
    keep_last_n: int
    keep_best_n: int
    metric: str
    mode: checkpoints.Mode
    optimizer: bool = True
    epochs: int = 1  # between checkpoints, where those are counted in epochs
    storage: Storage | None = None


@dataclass
class Checkpointing(TrainerCallback):
    """Seals what the trainer saved, keeps the last and the best, and copies them away."""

    keeping: Keeping
    stopping: "Stopping"
    ranks: Ranks = ALONE
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A resumed state names its best checkpoint by the place that it was staged in.

        Raises: BadCheckpoint where that one, to which an early stop goes back, is damaged.
        """
        best = self.keeping.folder / checkpoints.name_of(state.best_global_step)
        there = isinstance(state.best_global_step, int) and best.is_dir()
        state.best_model_checkpoint = str(checkpoints.verify(best).path) if there else None

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remember what this step measured."""
        found = {key: given["logs"][key] for key in KEPT if key in given["logs"]}
        self.metrics = {state.global_step: self.metrics.get(state.global_step, {}) | found}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The best epoch can only be told where each is measured; half of one is no epoch."""
        whole = float(state.epoch) % self.keeping.epochs == 0
        if args.save_strategy == "epoch":
            control.should_evaluate = whole and self.keeping.keep_best_n > 0
            control.should_save = whole

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Seal, copy, and remove what need not stay: rank 0, once the others have written."""
        self.ranks.wait()
        if self.ranks.first:
            self._keep(args, state)
        self.ranks.wait()
        if state.best_global_step == state.global_step:
            best = self.keeping.folder / checkpoints.name_of(state.global_step)
            state.best_model_checkpoint = str(best)

    def _keep(self, args: Any, state: Any) -> None:
        keep, name = self.keeping, checkpoints.name_of(state.global_step)
        record = {
            "step": state.global_step,
            "metrics": self.metrics.get(state.global_step, {}),
            "identity": keep.identity,
            "optimizer": keep.optimizer,
        }
        if self.stopping.budget:
            record["spent_hours"] = self.stopping.budget.spent
        made = checkpoints.seal(Path(args.output_dir) / name, keep.folder, record)
        with self._copying(name):
            if keep.storage:
                keep.storage.sync_to_storage(made)
        if self.stopping.asked:  # it is what the run goes on from
            return
        gone = checkpoints.prune(
            keep.folder, keep_last_n=keep.keep_last_n, keep_best_n=keep.keep_best_n,
            metric=keep.metric, mode=keep.mode,
        )  # fmt: skip
        for path in gone:
            with self._copying(path.name):
                if keep.storage:
                    keep.storage.remove(path.name)

    @contextlib.contextmanager
    def _copying(self, name: str) -> Iterator[None]:
        """A storage that fails is told of, and never fails the training."""
        try:
            yield
        except Exception as error:
            where = self.keeping.storage.remote_path if self.keeping.storage else ""
            log.warning("%s was not copied to %s: %s", name, where, error)


class Stopping(TrainerCallback):
    """Turns SIGTERM and SIGINT into a checkpoint at the end of the step; a second one is obeyed.

    budget: ends the run in the same way once it is spent.
    """

    def __init__(self, budget: Budget | None = None, ranks: Ranks = ALONE) -> None:
        self.budget, self.ranks, self._told, self._agreed = budget, ranks, 0, 0
        self.by_budget = False  # once it has stopped the run

    @property
    def number(self) -> int:
        """The signal that ends the run, 0 for none; several ranks must have agreed on it."""
        return max(0, self._agreed) if self.ranks.several else self._told

    @property
    def asked(self) -> bool:
        """Whether the run is to stop."""
        return bool(self._agreed if self.ranks.several else self._wish)

    @property
    def _wish(self) -> int:
        """The signal that came to this rank, or -1 where its budget is spent, or 0."""
        return self._told or -int(self.budget is not None and self.budget.over)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while training; only a process's main thread may."""
        previous: dict[int, Any] = {}
        with contextlib.suppress(ValueError):
            for number in (int(signal.SIGTERM), int(signal.SIGINT)):
                previous[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = number
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save and stop, unless the run is at its end anyway, or at that of an epoch."""
        if not float(state.epoch).is_integer():
            self._stop(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Here an epoch's own evaluation and checkpoint come first."""
        if float(state.epoch).is_integer():
            self._stop(state, control)

    def _stop(self, state: Any, control: Any) -> None:
        # It may have reached one of them a step before another, and no two clocks are alike.
        wishes = self.ranks.gather(self._wish)
        self._agreed = max(wishes) or min(wishes)
        if self._agreed and state.global_step < state.max_steps:
            self.by_budget = self._agreed < 0
            control.should_save = control.should_training_stop = True
