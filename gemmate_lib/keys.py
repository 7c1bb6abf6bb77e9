"""The names of settings: dotted keys, their short forms, and those of published experiments.

A setting has a dotted key, such as `training.max_steps`. It may be written `training_max_steps`,
or `max_steps` where only one ends so. The names under which experiments were published elsewhere
are understood as well, with their values.
"""

import difflib
import re
from collections.abc import Callable, Collection
from typing import Any

from pydantic import BaseModel

from gemmate_lib.settings import Experiment, GemmateError


def flatten(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, in the order of the fields."""
    flat: dict[str, Any] = {}
    for name, value in settings:
        group = isinstance(value, BaseModel)
        flat |= flatten(value, f"{prefix}{name}.") if group else {f"{prefix}{name}": value}
    return flat


KEYS = tuple(key for key in flatten(Experiment()) if key != "profile")
GROUPS = {key.split(".")[0] for key in KEYS if "." in key}
# Published name -> ours, where they are not the same but for the group.
PUBLISHED = {
    "dataset_id": "dataset.id",
    "model_name": "model.id",
    "dtype": "model.compute_dtype",
    "fp16": "model.compute_dtype",
    "bf16": "model.compute_dtype",
    "batch_size": "training.batch_size",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_bias": "lora.bias",
    "lora_target_modules": "lora.target_modules",
    "lora_task_type": "lora.task_type",
    "val_steps_freq": "training.eval_every",
    "steps_freq": "checkpoint.save_every",
    "epoch_freq": "checkpoint.save_every_epochs",
    "checkpoint_path": "checkpoint.path",
    "checkpoint_metric": "checkpoint.metric",
    "checkpoint_metric_mode": "checkpoint.metric_mode",
    "storage_backend": "checkpoint.remote_path",
    "use_wandb": "tracking.tracker",
    "wandb_project": "tracking.project",
    "wandb_run_name": "tracking.run_name",
    "wandb_tags": "tracking.tags",
    "wandb_watch_mode": "tracking.watch_mode",
    "wandb_log_freq": "tracking.log_frequency",
    "model_to_wandb": "tracking.upload_model",
}
Read = Callable[[Any], Any]  # None: the value asks for nothing, as fp16=false does


def _if_true(meaning: str) -> Read:
    def read(value: Any) -> Any:
        if not isinstance(value, bool):
            raise GemmateError(f"Write true or false, not {value!r}, where {meaning} is meant.")
        return meaning if value else None

    return read


def _local(value: Any) -> None:
    if value != "local":
        raise GemmateError(
            f"storage_backend={value} says not where to. Set checkpoint.remote_path to a URL, as "
            "s3://bucket/folder: its scheme names the backend."
        )


_READ: dict[str, Read] = {
    "fp16": _if_true("float16"),
    "bf16": _if_true("bfloat16"),
    "use_wandb": _if_true("wandb"),
    "storage_backend": _local,
}


def among(name: Any, options: Collection[str], kind: str) -> str:
    """`name`, if it is one of the options; else a GemmateError that names the nearest."""
    if str(name) in options:
        return str(name)
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.0)
    raise GemmateError(f"There is no {kind} {name!r}. Did you mean {near[0]!r}?")


def find_key(name: str) -> str:
    """The dotted key for `training.max_steps`, `training_max_steps` or, where unique, `max_steps`.

    Raises: GemmateError where no key or more than one fits.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    found = [key for key in KEYS if name in (key, key.replace(".", "_"))]
    found = found or [key for key in KEYS if name == key.split(".")[-1]]
    if len(found) > 1:
        raise GemmateError(f"The setting {name!r} is ambiguous. Write {' or '.join(found)}.")
    return found[0] if found else among(name, KEYS, "setting")


def read_setting(name: str, value: Any) -> dict[str, Any]:
    """A setting under any of its names as {dotted key: value}; empty where it asks for nothing.

    Raises: GemmateError for a name that is unknown or ambiguous, or a value without a meaning.
    """
    key = find_key(name)
    if name not in _READ:
        return {key: value}
    meant = _READ[name](value)
    return {} if meant is None else {key: meant}


def _row(key: str, group: type[BaseModel], default: Any) -> str:
    said = group.model_fields[key.split(".")[-1]].description or ""
    meaning, unit = re.fullmatch(r"(.*?)(?: \[(.*)\])?", said.replace("\n", " ")).groups()  # type: ignore[union-attr]
    others = ", ".join(f"`{name}`" for name, ours in PUBLISHED.items() if ours == key)
    empty = default is None or default == {} or default == ()
    shown = "none" if empty else str(default).lower() if isinstance(default, bool) else default
    return f"| `{key}` | {others} | {shown} | {unit or ''} | {meaning} |".replace("|  |", "| |")


HEAD = """# Settings of an experiment

Written by `make settings` from what `gemmate_lib/settings.py` says. An experiment is a YAML file
with groups, such as

    training:
      max_steps: 20

and each setting can be set for one run: `gemmate finetune quotes --set training.max_steps=20`. It
may be written `training_max_steps`, or `max_steps` where only one ends so, or as published
elsewhere. `gemmate config show EXPERIMENT` prints what all of them come to here, and why: above
these defaults stand those of the profile, of the recipe and of the experiment.
"""


def settings_table() -> str:
    """Every setting in Markdown: key, published names, default, unit and meaning."""
    rows = [HEAD, "| setting | published as | default | unit | meaning |", "|---|---|---|---|---|"]
    whole = Experiment()
    for key, default in flatten(whole).items():
        group = getattr(whole, key.split(".")[0]) if "." in key else whole
        rows.append(_row(key, type(group), default))
    return "\n".join(rows)
