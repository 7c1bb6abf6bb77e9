"""What can be set: one frozen model per group of settings, together an experiment."""

import difflib
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=0.5)]


class GemmateError(Exception):
    """What the user can mend: one clear sentence, then the remedy."""


def digest(value: Any) -> str:
    """SHA-256 of what can be written as JSON, whatever the order of its keys: hexadecimal.

    Raises: ValueError for a number that is not finite.
    """
    canonical = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are refused, a plain string is the group's id."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"id": str(value)} if isinstance(value, str | Path) else value


class ModelConfig(Settings):
    """Which base, and how it is held in memory."""

    id: str = "tiny-gemma"  # embedded name, preset, Hub id, or local directory
    revision: str | None = None
    quantization: Literal["none", "nf4", "nf4-double"] = "none"
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    # GemmaTE's encoder: log, signed_log, fourier, calendar, or several joined by +
    temporal_kind: str | None = None
    temporal_tau: Annotated[float, Field(gt=0)] = 0.1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class DatasetConfig(Settings):
    """Which rows, how they are split, and how long they may be (in tokens)."""

    id: str = "tiny_quotes"  # name of a card, local file, or folder
    revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: dict[str, str] = {}  # our name -> theirs; also "quote=content author=author"
    template: str | None = None
    labels: dict[str, str] = {}  # the table's label -> its name, as in {0: negative, 1: positive}
    timestamp: str | None = None  # the field that says when: milliseconds or ISO 8601
    validation_fraction: Share = 0.1
    test_fraction: Share = 0.1
    split_seed: Count = 0
    max_length: Annotated[int, Field(ge=2)] = 128
    over_long: Literal["drop", "cut"] = "drop"
    # Jaccard of word 3-grams at which two rows are one; 1.0: exact, after normalisation
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8
    limit: Positive | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not all("=" in pair for pair in value.split()):
            raise ValueError('write columns as "quote=content author=author"')
        return dict(pair.split("=", 1) for pair in value.split())


class LoraSettings(Settings):
    """The low-rank adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    r: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"


class TrainingConfig(Settings):
    """The optimisation; durations are in optimizer steps."""

    recipe: str = "fast"
    batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 1
    max_steps: Positive | Literal[-1] = 100  # -1: by epochs
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    warmup_steps: Count = 2  # whole: the trainer reads 0.1 as a fraction of all steps
    lr_scheduler: str = "linear"
    optim: str = "adamw_torch_fused"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    eval_every: Count = 25  # 0: off
    save_every: Count = 0  # steps between checkpoints; 0: none but when the run is interrupted
    save_strategy: Literal["steps", "epoch"] = "steps"  # epoch: one at the end of each
    save_optim: bool = True  # without the optimizer's state a run cannot be resumed exactly
    keep_last_n: Count = 2
    keep_best_n: Count = 0
    checkpoint_metric: Literal["eval_loss", "loss"] = "eval_loss"  # best by this
    checkpoint_metric_mode: Literal["min", "max"] = "min"
    remote_path: str | None = None  # checkpoints are copied there: any fsspec URL
    early_stopping_patience: Count = 0  # evaluations without gain; 0: off
    packing: bool = False
    gradient_checkpointing: bool = False
    tracker: str = "none"

    @property
    def stops_early(self) -> bool:
        """Whether evaluations without gain may end the run."""
        return self.early_stopping_patience > 0 and self.eval_every > 0

    @field_validator("remote_path")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if re.search(r"://[^/@]*:[^/@]*@", value or ""):  # it would stand in every manifest
            problem = "training.remote_path holds a password"
            raise GemmateError(f"{problem}. Keep it in the settings of that storage's client.")
        return value

    @model_validator(mode="after")
    def _something_stays(self) -> "TrainingConfig":
        if not self.keep_last_n and not self.keep_best_n:
            raise ValueError("keep_last_n=0 needs keep_best_n of 1 or more, or nothing is kept")
        by_steps = self.save_strategy == "steps" and self.save_every
        if self.keep_best_n and self.checkpoint_metric == "eval_loss":
            if not self.eval_every:
                raise ValueError("keep_best_n needs evaluations: set eval_every")
            if by_steps and self.save_every % self.eval_every:
                raise ValueError("keep_best_n needs save_every to be a multiple of eval_every")
        return self


class GenerationSettings(Settings):
    """How texts are generated."""

    max_new_tokens: Positive = 64
    batch_size: Positive = 32


class Experiment(Settings):
    """Everything that decides what a run computes, apart from the machine."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "unnamed"  # it names a folder
    profile: str = "tiny"
    method: Literal["lora", "full"] = "lora"  # an adapter, or every weight of the base
    seed: Count = 0
    threads: Positive | None = None  # None: leave as it is
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    lora: LoraSettings = LoraSettings()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationSettings = GenerationSettings()

    def hash(self) -> str:
        """16 hexadecimal digits that name this configuration."""
        return digest(self.model_dump(mode="json"))[:16]


@dataclass(frozen=True)
class Facts:
    """What the machine can do; memory in GiB, capability as NVIDIA counts it."""

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    capability: tuple[int, int] | None = None
    gpu_memory_gib: float | None = None
    ram_gib: float = 0.0
    gpu_count: int = 0


def flatten(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, in the order of the fields."""
    flat: dict[str, Any] = {}
    for name, value in settings:
        group = isinstance(value, BaseModel)
        flat |= flatten(value, f"{prefix}{name}.") if group else {f"{prefix}{name}": value}
    return flat


KEYS = tuple(key for key in flatten(Experiment()) if key != "profile")
GROUPS = {key.split(".")[0] for key in KEYS if "." in key}


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
    found = [key for key in KEYS if name in (key, key.replace(".", "_"))]
    found = found or [key for key in KEYS if name == key.split(".")[-1]]
    if len(found) > 1:
        raise GemmateError(f"The setting {name!r} is ambiguous. Write {' or '.join(found)}.")
    return found[0] if found else among(name, KEYS, "setting")
