"""One training loop: settings to TRL's, and a watch on every number it logs."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from gemmate_lib.budget import Budget, refuse_budget
from gemmate_lib.callbacks import (
    KEPT,
    Checkpointing,
    Interrupted,
    Keeping,
    Stopping,
)
from gemmate_lib.checkpoints import name_of, verify
from gemmate_lib.cloud_metrics import cloud_metrics
from gemmate_lib.config import Experiment
from gemmate_lib.data import Splits
from gemmate_lib.divergence import Report, RowsOf, Watch
from gemmate_lib.memory import said_in_numbers
from gemmate_lib.monitor import Monitor
from gemmate_lib.ranks import ALONE, Ranks
from gemmate_lib.temporal.blur import Blur
from gemmate_lib.tracking import tracking
from gemmate_lib.trl_trainer import build_trainer


@dataclass(frozen=True)
class TrainContext:
    """What stands around a training: where it is kept, who shares it, what it may spend.

    keeping: where checkpoints go and which of them stay; None: none are written.
    resume_from: a checkpoint that has been verified, to go on from.
    ranks: the processes that share each batch; only the first one reports.
    budget: what may be spent; None: the experiment may not ask for one.
    monitor: writes the run's journal, and tells trackers what is used.
    """

    keeping: Keeping | None = None
    resume_from: Path | None = None
    ranks: Ranks = ALONE
    budget: Budget | None = None
    monitor: Monitor | None = None


def train(
    model: Any,
    tokenizer: Any,
    splits: Splits,
    experiment: Experiment,
    directory: Path,
    *,
    report: Report | None = None,
    collator: Any = None,
    around: TrainContext | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place with TRL; return the log, one record a step or evaluation.

    around: None: one process alone, without checkpoints, budget or journal.
    Raises: GemmateError where a time-aware model has rows without times, or the reverse; Diverged
        for a number that is not finite; Interrupted after SIGTERM or SIGINT, and Spent at the end
        of the budget, once it has saved.
    """
    around = around or TrainContext()
    budget, ranks, resume_from = around.budget, around.ranks, around.resume_from
    if budget is None:
        refuse_budget(experiment, "A training of several parts")
    stopping = Stopping(budget, ranks)
    with _known_training_warnings(), tracking(experiment, first=ranks.first) as tracker:
        trainer = build_trainer(
            model, tokenizer, splits, experiment, directory, collator=collator, ranks=ranks
        )
        rows = _numbered_rows(trainer, experiment)
        watch = Watch(report if ranks.first else None, rows)
        if tracker and around.monitor:
            tracker.more = around.monitor.told
        cloud = cloud_metrics(experiment, around.monitor)
        kept = [stopping, Checkpointing(around.keeping, stopping, ranks)] if around.keeping else []
        for callback in [budget, around.monitor, tracker, cloud, watch, *kept]:
            if callback is not None:
                trainer.add_callback(callback)
        listening = stopping.listening() if around.keeping else contextlib.nullcontext()
        with listening, said_in_numbers(experiment):
            if not (resume_from and _take_the_end(trainer, resume_from)):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    _say_why_it_stopped(trainer.state, stopping, budget)
    history = [
        {"step": r["step"]} | {k: r[k] for k in KEPT if k in r} for r in trainer.state.log_history
    ]
    return [record for record in history if len(record) > 1]


def _numbered_rows(trainer: Any, experiment: Experiment) -> RowsOf | None:
    """Remember which rows a batch is of, and blur their times if asked; packed rows: neither."""
    if experiment.training.packing:
        return None
    held = 2 * trainer.args.gradient_accumulation_steps + 2
    rows = trainer.data_collator = RowsOf(trainer.data_collator, keep=held)
    if experiment.training.blurs:
        trainer.data_collator = Blur(rows, experiment)
        trainer.add_callback(trainer.data_collator)
    return rows


def _say_why_it_stopped(state: TrainerState, stopping: Stopping, budget: Budget | None) -> None:
    """Raise Interrupted or Spent where a signal or the budget ended the training."""
    if stopping.number and state.global_step < state.max_steps:
        raise Interrupted(stopping.number, state.global_step)
    if stopping.by_budget and budget:
        raise budget.stopped(state.global_step, state.max_steps)


def _take_the_end(trainer: Any, checkpoint: Path) -> bool:
    """Whether a checkpoint is the end of its run; then its weights and log are taken over.

    transformers 5.23, `Trainer._run_epoch`, looks whether a run is over after each step and not
    before the first: resumed at its last step, it would take one more.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    limit, patience = trainer.args.max_steps, state.stateful_callbacks.get("EarlyStoppingCallback")
    waited = patience["attributes"]["early_stopping_patience_counter"] if patience else 0
    stopped = bool(patience) and waited >= patience["args"]["early_stopping_patience"]
    if not stopped and state.global_step < (limit if limit > 0 else state.max_steps):
        return False
    trainer.state = state
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end:
        best = verify(checkpoint.with_name(name_of(state.best_global_step)))
        trainer._load_from_checkpoint(str(best.path))
    return True


@contextlib.contextmanager
def _known_training_warnings() -> Iterator[None]:
    """Silence what is known and harmless while training; each with its reason."""
    with warnings.catch_warnings():
        # bitsandbytes has no paged optimizer state on CPUs and uses the plain one instead, which
        # computes the same.
        warnings.filterwarnings("ignore", message=".*[Pp]aged optimizers.*")
        yield
