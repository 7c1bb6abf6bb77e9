"""What watches over training: numbers that are not finite, signals, and checkpoints."""

import contextlib
import logging
import math
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from gemmate_lib import checkpoints
from gemmate_lib.budget import Budget
from gemmate_lib.config import GemmateError
from gemmate_lib.ranks import ALONE, Ranks
from gemmate_lib.sharding import own_part, packed
from gemmate_lib.storage import Storage

Report = Callable[[dict[str, float]], None]
KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm")  # of what the trainer logs
log = logging.getLogger("gemmate")
# A gradient scaler (fp16) starts at 2**16 and halves with each overflow: so many are no failure.
OVERFLOWS = 20


class Diverged(GemmateError):
    """A loss, gradient or parameter that is no longer finite."""


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop, and did so at the end of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.exit_code, self.step = 128 + number, step
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped and saved after step {step}.")


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no entry is infinite or NaN: one pass, one answer from the device."""
    parts = [own_part(tensor) for tensor in tensors]
    return not parts or bool(torch.nn.utils.get_total_norm(parts).isfinite())


class RowsOf:
    """A collator that remembers the numbers of the rows in the latest training batches."""

    def __init__(self, collator: Any, keep: int) -> None:
        self.collator, self.batches = collator, 0
        self._rows: deque[tuple[int, list[int]]] = deque(maxlen=keep)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Collate; rows of an evaluation have no number."""
        if rows and "row" in rows[0]:
            rows = [dict(row) for row in rows]
            self._rows.append((self.batches, [row.pop("row") for row in rows]))
            self.batches += 1
        return self.collator(rows)

    def between(self, first: int, last: int) -> list[int]:
        """The rows of the batches first <= i < last, as far as they are remembered."""
        return [row for i, rows in self._rows if first <= i < last for row in rows]


class Watch(TrainerCallback):
    """Stops at the first number that is not finite, names it, and hands every record on."""

    def __init__(self, report: Report | None, rows: RowsOf | None = None) -> None:
        self.report, self.rows = report, rows
        self._done = self._began = 0  # micro-batches, and those before this step
        self._overflows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at every weight once: attention can hide one that is NaN behind finite scores."""
        model = given["model"]
        codes = {name for name, _ in packed(model)}  # in 4 bits, perhaps stored as floats
        for name, weight in model.named_parameters():
            mine = own_part(weight.detach())
            known = name not in codes and mine.is_floating_point() and mine.numel()
            ends = mine.aminmax() if known else ()  # NaN where one is; no copy
            if not all(bool(end.isfinite()) for end in ends):
                raise Diverged(f"{name} is not finite before the first step. Load another base.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remember where this step's micro-batches begin."""
        self._began = self._done

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count a micro-batch."""
        self._done += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the gradients while the weights are still those of the step before."""
        self._done += 1
        grads = [p.grad for p in given["model"].parameters() if p.grad is not None]
        if finite(grads):
            self._overflows = 0
            return
        self._overflows += 1
        if not args.fp16 or self._overflows > OVERFLOWS:
            self._stop("the gradient", state.global_step + 1, given)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the trained weights."""
        trained = [p.detach() for p in given["model"].parameters() if p.requires_grad]
        if not finite(trained):
            self._stop("a trained weight", state.global_step, given)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at one record of the log."""
        logs = given.get("logs") or {}
        for name in ("loss", "eval_loss"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                self._stop(f"the {name}", state.global_step, given)
        if self.report:
            self.report({"step": state.global_step} | logs)

    def _stop(self, what: str, step: int, given: Mapping[str, Any]) -> None:
        rate = max(group["lr"] for group in given["optimizer"].param_groups)
        rows = self.rows.between(self._began, self._done) if self.rows else []
        where = f", rows {', '.join(map(str, rows))}" if rows else ""
        raise Diverged(
            f"The run diverged in step {step}: {what} is not finite (learning rate {rate:.2g}"
            f"{where}). Lower training.learning_rate, compute in bfloat16 or float32, or look at "
            "these rows. Checkpoints from before this step are sound."
        )


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
