"""What can be set: one frozen model per group of settings, together an experiment.

The docstring below each setting is its documentation: gemmate_lib/keys.py makes the table of all
of them. A unit stands in brackets at its end.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=0.5)]
# What a search compares its trials at, and what is an abbreviation for other settings.
FIXED = ("training.eval_every", "training.recipe")


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
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"id": str(value)} if isinstance(value, str | Path) else value


class ModelConfig(Settings):
    """Which base, and how it is held in memory."""

    id: str = "tiny-gemma"
    """The base: an embedded model's name, a Hub id, or a local folder."""
    revision: str | None = None
    """Commit of a base from the Hub; the presets are pinned."""
    quantization: Literal["none", "nf4", "nf4-double"] = "none"
    """How the frozen weights are stored: as loaded, in 4 bits, or with quantized constants too."""
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The type that is computed in; adapters are trained in float32 whatever it is."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """How attention is computed; auto: what fits the machine."""
    temporal_kind: str | None = None
    """GemmaTE's encoder of time: log, signed_log, fourier, calendar, era; several joined by +."""
    temporal_tau: Annotated[float, Field(gt=0)] = 0.1
    """The factor of the log encodings."""
    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = "auto"
    """Where it is computed; xla: what TPUs and Tenstorrent's cards need, with torch_xla."""


class DatasetConfig(Settings):
    """Which rows, how they are split, and how long they may be."""

    id: str = "tiny_quotes"
    """The data: the name of a card, a local file, or a folder."""
    revision: str | None = None
    """Commit of data from the Hub; cards are pinned."""
    train: str | None = None
    """A file of training rows of your own."""
    validation: str | None = None
    """A file of validation rows of your own."""
    test: str | None = None
    """A file of test rows of your own."""
    columns: dict[str, str] = {}
    """Our name -> the file's; also written as "quote=content author=author"."""
    template: str | None = None
    """The text of a row, with {column} where a column's value goes."""
    chat: bool = False
    """Put an instruction by the chat template of the tokenizer, not as plain text."""
    labels: dict[str, str] = {}
    """A label in the file -> its name, as in {0: negative, 1: positive}."""
    timestamp: str | None = None
    """The column that says when: milliseconds since 1970, or ISO 8601."""
    validation_fraction: Share = 0.1
    """Held out for validation, where there is no such split. [share of the rows]"""
    test_fraction: Share = 0.1
    """Held out for the test, where there is no such split. [share of the rows]"""
    split_seed: Count = 0
    """Draws what is held out."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """The longest row. [tokens]"""
    over_long: Literal["drop", "cut"] = "drop"
    """What becomes of a longer row; a prompt is cut where its form allows, an answer never."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Rows this alike are one; 1: only equal ones. [Jaccard of word 3-grams]"""
    limit: Positive | None = None
    """Take the first so many. [rows]"""

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
    """Rank of the update."""
    alpha: Positive = 16
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained beside it; Gemma has none."""
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """Which layers get one: a list of names, all-linear, or auto: the seven projections."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What PEFT wraps; this course trains causal language models alone."""


class PromptSettings(Settings):
    """What prefix, prompt and p-tuning learn: vectors in front of the text, no layer's weights."""

    virtual_tokens: Positive = 16
    """How many are put in front of each text. [tokens]"""
    start: Literal["vocabulary", "random"] = "vocabulary"
    """What prompt tuning begins with: embeddings of random words, or random numbers."""
    hidden_size: Positive | None = None
    """Width of the net that makes them in p-tuning; none: the model's own."""


class TrainingConfig(Settings):
    """The optimisation."""

    recipe: str = "fast"
    """Defaults by name: original, the classic notebook's, or fast, the same trajectory sooner."""
    batch_size: Positive = 4
    """Rows at a time. [rows]"""
    gradient_accumulation_steps: Positive = 1
    """Batches to an optimizer step. [batches]"""
    max_steps: Positive | Literal[-1] = 100
    """Length of the training; -1: by num_epochs. [optimizer steps]"""
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Length of the training, where max_steps is -1. [passes over the rows]"""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The highest one of the schedule."""
    warmup_steps: Count = 2  # whole: the trainer reads 0.1 as a fraction of all steps
    """Until the highest learning rate. [optimizer steps]"""
    lr_scheduler: str = "linear"
    """How the learning rate falls: a name that transformers knows."""
    optim: str = "adamw_torch_fused"
    """The optimizer: a name that transformers knows."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Each step takes this share, times the learning rate, off the trained weights."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """A longer gradient is scaled down to this length; 0: never."""
    eval_every: Count = 25
    """Between measurements of the validation loss; 0: none. [optimizer steps]"""
    early_stopping_patience: Count = 0
    """Stop after so many without gain, and go back to the best; 0: off. [evaluations]"""
    group_by_length: bool = False
    """Rows of like length to one step: less padding, batches less mixed."""
    packing: bool = False
    """Several rows to one sequence of max_length, each blind to the others."""
    timestamp_blur: Annotated[float, Field(ge=0)] = 0.0
    """Move each row's time by a normal draw, anew in each pass. [years, one standard deviation]"""
    timestamp_withheld: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Take the time from rows by chance, anew in each pass. [share of the rows]"""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""

    @property
    def blurs(self) -> bool:
        """Whether training sees other times than the rows have."""
        return self.timestamp_blur > 0 or self.timestamp_withheld > 0

    @property
    def stops_early(self) -> bool:
        """Whether evaluations without gain may end the run."""
        return self.early_stopping_patience > 0 and self.eval_every > 0

    @model_validator(mode="after")
    def _one_remedy(self) -> "TrainingConfig":
        if self.packing and self.group_by_length:
            raise ValueError("packing leaves no padding: set group_by_length=false")
        return self


class CheckpointConfig(Settings):
    """What is kept of a run on its way, where, and whether one is gone on with."""

    save_strategy: Literal["steps", "epoch"] = "steps"
    """Whether checkpoints are counted by save_every or by save_every_epochs."""
    save_every: Count = 0
    """Between checkpoints; 0: none but when the run is interrupted. [optimizer steps]"""
    save_every_epochs: Positive = 1
    """Between checkpoints where save_strategy is epoch. [epochs]"""
    save_optim: bool = True
    """Keep the optimizer's state; without it a run cannot be resumed exactly."""
    keep_last_n: Count = 2
    """The newest that stay. [checkpoints]"""
    keep_best_n: Count = 0
    """The best that stay besides. [checkpoints]"""
    metric: Literal["eval_loss", "loss"] = "eval_loss"
    """The best are best by this; also written eval/loss, val/loss, train/loss."""
    metric_mode: Literal["min", "max"] = "min"
    """Whether less of it is better, or more."""
    resume_from_checkpoint: bool = False
    """Go on from a checkpoint of the run's folder, as `--resume` does."""
    resume_option: Literal["last", "best", "path"] = "last"
    """Which one: the newest, the best, or that of checkpoint.path."""
    path: str | None = None
    """Its folder, where resume_option is path."""
    remote_path: str | None = None
    """Where copies go and come from: a URL that fsspec knows, as s3://bucket/folder."""
    sync_to_storage: bool = True
    """Copy each checkpoint to remote_path."""
    load_from_storage: bool = True
    """Fetch from remote_path what is newer there when a run is gone on with."""

    @property
    def resume(self) -> str | None:
        """What `--resume` would say."""
        option = self.path if self.resume_option == "path" else self.resume_option
        return option if self.resume_from_checkpoint else None

    @field_validator("metric", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        names = {"eval/loss": "eval_loss", "val/loss": "eval_loss", "train/loss": "loss"}
        return names.get(value, value) if isinstance(value, str) else value

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _plural(cls, value: Any) -> Any:
        return "steps" if value == "step" else value

    @field_validator("remote_path")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if re.search(r"://[^/@]*:[^/@]*@", value or ""):  # it would stand in every manifest
            problem = "checkpoint.remote_path holds a password"
            raise GemmateError(f"{problem}. Keep it in the settings of that storage's client.")
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> "CheckpointConfig":
        if not self.keep_last_n and not self.keep_best_n:
            raise ValueError("keep_last_n=0 needs keep_best_n of 1 or more, or nothing is kept")
        if self.resume_option == "path" and not self.path:
            raise ValueError("resume_option=path needs checkpoint.path, the checkpoint's folder")
        return self


class BudgetConfig(Settings):
    """What ends a run early, saved and ready to go on; nothing here changes what it computes."""

    max_hours: Annotated[float, Field(gt=0)] | None = None
    """End a run after so long, its loading and what was spent before a resume included. [hours]"""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """End a run when so much is spent, at price_per_hour. [USD]"""
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """What the machine costs. [USD per hour]"""

    @property
    def hours(self) -> float | None:
        """What both limits come to; None: there is none."""
        bought = self.max_cost / self.price_per_hour if self.max_cost and self.price_per_hour else 0
        return min((each for each in (self.max_hours, bought) if each), default=None)

    @model_validator(mode="after")
    def _has_a_price(self) -> "BudgetConfig":
        if self.max_cost and not self.price_per_hour:
            remedy = "Set budget.price_per_hour to what the machine costs, in USD"
            raise GemmateError(f"budget.max_cost says nothing without a price. {remedy}.")
        return self


class TrackingConfig(Settings):
    """Who is told of the run while it trains; nothing here changes what it computes."""

    tracker: str = "none"
    """none, trackio (local files; also written `on`), or what the Trainer's report_to takes."""
    project: str = "gemmate"
    """The project that the tracker files the run under."""
    run_name: str | None = None
    """The run's name there; none: the experiment's."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    watch_mode: Literal["none", "gradients", "parameters", "all"] = "none"
    """Of what the tracker gets the length, for each trained tensor."""
    log_frequency: Positive = 100
    """Between what watch_mode asks for. [optimizer steps]"""
    upload_model: bool = False
    """Hand what was trained to the tracker at the end."""
    cloud_monitoring: str | None = None
    """The Google Cloud project whose Cloud Monitoring gets the curves; none: told nothing."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    """Messages of the library and of the Trainer below this are not printed."""

    @field_validator("tracker", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {"True": "trackio", "on": "trackio", "False": "none", "off": "none"}.get(
            str(value), value
        )

    @field_validator("tags", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value


class GenerationSettings(Settings):
    """How texts are generated."""

    max_new_tokens: Positive = 64
    """The longest answer. [tokens]"""
    batch_size: Positive = 32
    """Prompts at a time. [prompts]"""


class Range(Settings):
    """Numbers between two bounds, drawn evenly, or evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _spans(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 where log is true")
        return self


class SearchConfig(Settings):
    """How hyperparameters are searched for; nothing here changes what a run computes."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """What draws the trials: tpe learns from those before it, random and grid do not."""
    pruner: Literal["median", "none"] = "median"
    """median: end a trial whose validation loss is above the median of those before it."""
    startup_trials: Count = 5
    """So many are drawn at random, and none is pruned, before they guide the others. [trials]"""
    prune_after: Count = 0
    """No trial is pruned before. [optimizer steps]"""
    space: dict[str, Any] = {
        "training.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "training.batch_size": [4, 8, 16, 32],
        "training.weight_decay": {"low": 0.0, "high": 0.1, "log": False},
        "lora.r": [4, 8, 16, 32],
        "lora.alpha": [8, 16, 32, 64],
        "lora.dropout": {"low": 0.0, "high": 0.2, "log": False},
    }
    """Key -> a list to choose from, or low and high, with log where the exponent is drawn."""

    @field_validator("space", mode="before")
    @classmethod
    def _choices_or_ranges(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value:
            raise ValueError("write space as {training.learning_rate: {low: 1.0e-4, high: 0.01}}")
        return {key: _choice(key, choice) for key, choice in value.items()}


def _choice(key: str, value: Any) -> Any:
    """A list as it is, or what a Range has: plain values, for manifests."""
    if isinstance(value, list | tuple):
        plain = all(isinstance(each, str | int | float | bool) for each in value)
        if not value or not plain or len(set(value)) < len(value):
            raise ValueError(f"{key}: list one plain value or more, each once")
        return list(value)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: write a list, or low and high")
    return Range.model_validate(value).model_dump()


class Experiment(Settings):
    """Everything that decides what a run computes, apart from the machine."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "unnamed"  # it names a folder
    """The experiment's name, and its folder's."""
    profile: str = "tiny"
    """The machine that the defaults are for: auto, tiny, t4, ampere or full."""
    framework: Literal["pytorch"] = "pytorch"
    """What computes; there is no other."""
    method: Literal["lora", "qlora", "dora", "rslora", "prefix", "prompt", "p-tuning", "full"] = (
        "lora"
    )
    """What is trained: an adapter, a soft prompt, or every weight; `gemmate methods` lists them."""
    seed: Count = 0
    """Draws the adapter's start, the order of the rows and the dropout."""
    deterministic: bool = True
    """Ask torch for algorithms that give the same bits each time; off: on a GPU faster ones."""
    threads: Positive | None = None
    """Of the CPU; none: leave as it is. [threads]"""
    project_dir: str | None = None
    """Where runs are put that no `--out` names; none: GEMMATE_RUNS, or the folder `runs`."""
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    lora: LoraSettings = LoraSettings()
    prompt: PromptSettings = PromptSettings()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    budget: BudgetConfig = BudgetConfig()
    tracking: TrackingConfig = TrackingConfig()
    generation: GenerationSettings = GenerationSettings()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Experiment":
        keep, every = self.checkpoint, self.training.eval_every
        if keep.keep_best_n and keep.metric == "eval_loss":
            if not every:
                raise ValueError("checkpoint.keep_best_n needs evaluations: set eval_every")
            if keep.save_strategy == "steps" and keep.save_every and keep.save_every % every:
                problem = "checkpoint.keep_best_n needs save_every to be a multiple of eval_every"
                raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _space_is_of_settings(self) -> "Experiment":
        for key, choice in self.search.space.items():
            group, _, leaf = key.partition(".")
            settings = getattr(self, group) if group in ("training", "lora") else None
            if settings is None or leaf not in type(settings).model_fields or key in FIXED:
                problem = f"search.space: {key} cannot be searched"
                remedy = "Name settings of training and lora, which leave rows and base as they are"
                raise GemmateError(f"{problem}. {remedy}: training.learning_rate.")
            ends = choice if isinstance(choice, list) else (choice["low"], choice["high"])
            for value in ends:
                try:
                    type(settings).model_validate({leaf: value})
                except ValidationError as error:
                    said = error.errors()[0]["msg"]
                    raise GemmateError(f"search.space: {key}: {said}, not {value!r}.") from None
        return self

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
