"""One training loop: rows to token ids, settings to TRL's, and a watch on every number it logs."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState

from gemmate_lib import machine
from gemmate_lib.budget import Budget, refuse_budget
from gemmate_lib.callbacks import (
    KEPT,
    Checkpointing,
    Interrupted,
    Keeping,
    Report,
    RowsOf,
    Stopping,
    Watch,
)
from gemmate_lib.checkpoints import name_of, verify
from gemmate_lib.cloud_metrics import cloud_metrics
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.data import Row, Splits, encode
from gemmate_lib.memory import said_in_numbers
from gemmate_lib.monitor import Monitor
from gemmate_lib.ranks import ALONE, Ranks
from gemmate_lib.sampling import ByLength
from gemmate_lib.sharding import trainer_settings
from gemmate_lib.sharing import Together, share_rows, shares
from gemmate_lib.temporal.blur import Blur
from gemmate_lib.temporal.collate import collator_for
from gemmate_lib.tracking import tracking


def token_rows(
    rows: list[Row], tokenizer: Any, *, max_length: int, over_long: str, numbered: bool = False
) -> Any:
    """Return a data set of `input_ids` and `labels` (-100 where no loss is taken).

    Where the rows have times, also of `timestamps`: each token's, for GemmaTE's collator;
    `numbered`: also of `row`, its number in the source.

    Raises: GemmateError where a row would teach nothing, or never to stop.
    """
    from datasets import Dataset

    encoded = [encode(row, tokenizer, max_length=max_length, over_long=over_long) for row in rows]
    kept = [ids for ids in encoded if ids is not None]
    for ids in kept:
        if not ids.cut and ids.labels[-1] != tokenizer.eos_token_id:
            raise GemmateError("A row does not end in EOS: the model would never learn to stop.")
    if not any(label != -100 for ids in kept for label in ids.labels):
        raise GemmateError("No row has a label: raise dataset.max_length.")
    numbers = [row.source_row for row, ids in zip(rows, encoded, strict=True) if ids is not None]
    columns: dict[str, list[Any]] = {"row": numbers} if numbered else {}
    columns |= {"input_ids": [i.input_ids for i in kept], "labels": [i.labels for i in kept]}
    if kept[0].timestamps:
        columns["timestamps"] = [i.timestamps or [] for i in kept]
    return Dataset.from_dict(columns)


def train(
    model: Any,
    tokenizer: Any,
    splits: Splits,
    experiment: Experiment,
    directory: Path,
    *,
    report: Report | None = None,
    collator: Any = None,
    keeping: Keeping | None = None,
    resume_from: Path | None = None,
    ranks: Ranks = ALONE,
    budget: Budget | None = None,
    monitor: Monitor | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place with TRL; return the log, one record a step or evaluation.

    keeping: where checkpoints go and which of them stay; None: none are written.
    resume_from: a checkpoint that has been verified, to go on from.
    ranks: the processes that share each batch; only the first one reports.
    monitor: writes the run's journal, and tells trackers what is used.
    Raises: GemmateError where a time-aware model has rows without times, or the reverse; Diverged
        for a number that is not finite; Interrupted after SIGTERM or SIGINT, and Spent at the end
        of the budget, once it has saved.
    """
    if budget is None:
        refuse_budget(experiment, "A training of several parts")
    stopping = Stopping(budget, ranks)
    with _known_training_warnings(), tracking(experiment, first=ranks.first) as tracker:
        trainer = _build(
            model, tokenizer, splits, experiment, directory, collator=collator, ranks=ranks
        )
        rows = None
        if not experiment.training.packing:
            held = 2 * trainer.args.gradient_accumulation_steps + 2
            rows = trainer.data_collator = RowsOf(trainer.data_collator, keep=held)
            if experiment.training.blurs:
                trainer.data_collator = Blur(rows, experiment)
                trainer.add_callback(trainer.data_collator)
        kept = [stopping, Checkpointing(keeping, stopping, ranks)] if keeping else []
        watch = Watch(report if ranks.first else None, rows)
        if tracker and monitor:
            tracker.more = monitor.told
        cloud = cloud_metrics(experiment, monitor)
        for callback in [budget, monitor, tracker, cloud, watch, *kept]:
            if callback is not None:
                trainer.add_callback(callback)
        listening = stopping.listening() if keeping else contextlib.nullcontext()
        with listening, said_in_numbers(experiment):
            if not (resume_from and _take_the_end(trainer, resume_from)):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if stopping.number and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(stopping.number, trainer.state.global_step)
    if stopping.by_budget and budget:
        raise budget.stopped(trainer.state.global_step, trainer.state.max_steps)
    history = [
        {"step": r["step"]} | {k: r[k] for k in KEPT if k in r} for r in trainer.state.log_history
    ]
    return [record for record in history if len(record) > 1]


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


def _build(
    model: Any,
    tokenizer: Any,
    splits: Splits,
    experiment: Experiment,
    directory: Path,
    *,
    collator: Any,
    ranks: Ranks,
) -> Any:
    from trl import SFTTrainer

    data, training = experiment.dataset, experiment.training
    tokens = partial(token_rows, tokenizer=tokenizer, max_length=data.max_length)
    wants_eval = bool(training.eval_every) and bool(splits.validation)
    stops = [EarlyStoppingCallback(training.early_stopping_patience)]
    trainer = SFTTrainer(
        model=model,
        args=_arguments(experiment, directory, evaluate=wants_eval, ranks=ranks),
        train_dataset=tokens(splits.train, over_long=data.over_long, numbered=not training.packing),
        eval_dataset=tokens(splits.validation, over_long=data.over_long) if wants_eval else None,
        processing_class=tokenizer,
        data_collator=collator or collator_for(model, tokenizer, experiment),
        callbacks=stops if training.stops_early else None,
    )
    trainer.remove_callback(PrinterCallback)
    sampler = None
    if training.group_by_length:
        sampler = ByLength(
            [len(ids) for ids in trainer.train_dataset["input_ids"]],
            batch_size=training.batch_size * training.gradient_accumulation_steps,
            seed=experiment.seed,
        )
        trainer._get_train_sampler = lambda *_: sampler
    if ranks.several:
        share_rows(trainer, ranks, seed=experiment.seed, order=sampler)
        trainer.add_callback(Together(trainer, ranks))
    # TRL casts every trainable parameter of a quantized model to bf16, which a T4 lacks and
    # a resumed run does not repeat: back to fp32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _arguments(experiment: Experiment, directory: Path, *, evaluate: bool, ranks: Ranks) -> Any:
    from trl import SFTConfig

    settings, keep, model = experiment.training, experiment.checkpoint, experiment.model
    rows, batches = shares(settings.batch_size, settings.gradient_accumulation_steps, ranks.world)
    stops_early = evaluate and settings.stops_early
    every = keep.save_every or (settings.eval_every if stops_early else 0)
    saves = keep.save_strategy if every or keep.save_strategy == "epoch" else "no"
    on_cpu = model.device == "cpu" or (
        model.device == "auto" and machine.read_facts().device == "cpu"
    )
    return SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=max(settings.batch_size, 16),
        gradient_accumulation_steps=batches,
        ddp_find_unused_parameters=False,
        max_steps=settings.max_steps,
        num_train_epochs=settings.num_epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_scheduler,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every or None,
        save_strategy=saves,
        save_steps=every or 500,
        save_only_model=not keep.save_optim,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if evaluate else None,
        seed=experiment.seed,
        data_seed=experiment.seed,
        use_cpu=on_cpu,
        bf16=model.compute_dtype == "bfloat16",
        fp16=model.compute_dtype == "float16",
        **trainer_settings(ranks.strategy, checkpointing=settings.gradient_checkpointing),
        packing=settings.packing,
        max_length=experiment.dataset.max_length if settings.packing else None,
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would write a diverged loss down as 0.0
        report_to="none",  # trackers are told by gemmate_lib.tracking
        project=experiment.tracking.project,
        run_name=experiment.tracking.run_name or experiment.name,
        log_level=machine.transformers_level(experiment.tracking.log_level),
        log_level_replica="error",  # what rank 0 says is enough
        disable_tqdm=True,
    )


@contextlib.contextmanager
def _known_training_warnings() -> Iterator[None]:
    """Silence what is known and harmless while training; each with its reason."""
    with warnings.catch_warnings():
        # bitsandbytes has no paged optimizer state on CPUs and uses the plain one instead, which
        # computes the same.
        warnings.filterwarnings("ignore", message=".*[Pp]aged optimizers.*")
        yield
