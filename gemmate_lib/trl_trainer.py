"""From the experiment's settings and rows to TRL's trainer."""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback

from gemmate_lib import machine
from gemmate_lib.config import Experiment
from gemmate_lib.data import Splits
from gemmate_lib.ranks import Ranks
from gemmate_lib.rows import token_rows
from gemmate_lib.sampling import ByLength
from gemmate_lib.sharding import trainer_settings
from gemmate_lib.sharing import Together, share_rows, shares
from gemmate_lib.temporal.collate import collator_for


def build_trainer(
    model: Any,
    tokenizer: Any,
    splits: Splits,
    experiment: Experiment,
    directory: Path,
    *,
    collator: Any,
    ranks: Ranks,
) -> Any:
    """Return TRL's SFTTrainer for the model: rows encoded, its share of each batch, fp32 to train.

    collator: in place of the one that the model's kind asks for.
    Raises: GemmateError where a time-aware model has rows without times, or the reverse.
    """
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
