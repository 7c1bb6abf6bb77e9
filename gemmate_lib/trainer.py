"""One training loop: rows to token ids, settings to TRL's, and a watch on every number it logs."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from gemmate_lib import machine
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.data import Row, Splits, encode

Report = Callable[[dict[str, float]], None]
KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm")


def token_rows(rows: list[Row], tokenizer: Any, *, max_length: int, over_long: str) -> Any:
    """Return a data set of `input_ids` and `labels` (-100 where no loss is taken).

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
    columns = {"input_ids": [i.input_ids for i in kept], "labels": [i.labels for i in kept]}
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
) -> list[dict[str, float]]:
    """Train `model` in place with TRL; return the log, one record a step or evaluation."""
    from trl import SFTTrainer

    data = experiment.dataset
    tokens = partial(token_rows, tokenizer=tokenizer, max_length=data.max_length)
    wants_eval = bool(experiment.training.eval_every) and bool(splits.validation)
    with _known_training_warnings():
        trainer = SFTTrainer(
            model=model,
            args=_arguments(experiment, directory, evaluate=wants_eval),
            train_dataset=tokens(splits.train, over_long=data.over_long),
            eval_dataset=tokens(splits.validation, over_long=data.over_long)
            if wants_eval
            else None,
            processing_class=tokenizer,
            data_collator=collator,
            callbacks=_callbacks(experiment, report),
        )
        trainer.remove_callback(PrinterCallback)
        # TRL casts every trainable parameter of a quantized model to bf16, which a T4 lacks and
        # a resumed run does not repeat: back to fp32.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer.train()
    history = [
        {"step": r["step"]} | {k: r[k] for k in KEPT if k in r} for r in trainer.state.log_history
    ]
    return [record for record in history if len(record) > 1]


def _arguments(experiment: Experiment, directory: Path, *, evaluate: bool) -> Any:
    from trl import SFTConfig

    settings, model = experiment.training, experiment.model
    stops_early = evaluate and settings.early_stopping_patience > 0
    every = settings.save_every or (settings.eval_every if stops_early else 0)
    on_cpu = model.device == "cpu" or (
        model.device == "auto" and machine.read_facts().device == "cpu"
    )
    return SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(settings.batch_size, 16),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
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
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=2,
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if evaluate else None,
        seed=experiment.seed,
        data_seed=experiment.seed,
        use_cpu=on_cpu,
        bf16=model.compute_dtype == "bfloat16",
        fp16=model.compute_dtype == "float16",
        gradient_checkpointing=settings.gradient_checkpointing,
        packing=settings.packing,
        max_length=experiment.dataset.max_length if settings.packing else None,
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would write a diverged loss down as 0.0
        report_to=_tracker(settings.tracker),
        run_name=experiment.name,
        disable_tqdm=True,
    )


def _tracker(name: str) -> str | list[str]:
    """What `report_to` takes; a tracker that cannot be initialised is an error, not a shrug."""
    if name == "none":
        return "none"
    from transformers.integrations import get_available_reporting_integrations

    found = get_available_reporting_integrations()
    if name not in found:
        raise GemmateError(
            f"The tracker {name} is not installed; here are {', '.join(found) or 'none'}. "
            f"Install it with pip, or set training.tracker=none."
        )
    return [name]


class Watch(TrainerCallback):
    """Stops at the first loss or gradient that is not finite; hands every record on."""

    def __init__(self, report: Report | None) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Look at one record of the log."""
        logs = given.get("logs") or {}
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise GemmateError(
                    f"The {name} is {logs[name]} at step {state.global_step}. Lower "
                    "training.learning_rate, or compute in bfloat16 or float32."
                )
        if self.report:
            self.report({"step": state.global_step} | logs)


def _callbacks(experiment: Experiment, report: Report | None) -> list[TrainerCallback]:
    patience = experiment.training.early_stopping_patience
    stops = patience and experiment.training.eval_every
    return [Watch(report), *([EarlyStoppingCallback(patience)] if stops else [])]


@contextlib.contextmanager
def _known_training_warnings() -> Iterator[None]:
    """Silence what is known and harmless while training; each with its reason."""
    with warnings.catch_warnings():
        # bitsandbytes has no paged optimizer state on CPUs and uses the plain one instead, which
        # computes the same.
        warnings.filterwarnings("ignore", message=".*[Pp]aged optimizers.*")
        yield
