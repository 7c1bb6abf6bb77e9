"""One frozen experiment from profile, recipe, YAML and overrides, and the reason for each value.

A setting has a dotted key, such as `training.learning_rate`. Layers, later ones win: the profile
for the machine, the recipe, the experiment file, its section for the profile, your overrides. A
recipe among your overrides stands right below them.
"""

import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gemmate_lib.keys import (  # noqa: F401  (names and models belong to this interface)
    GROUPS,
    KEYS,
    among,
    flatten,
    read_setting,
)
from gemmate_lib.settings import (  # noqa: F401
    BudgetConfig,
    CheckpointConfig,
    DatasetConfig,
    Experiment,
    Facts,
    GemmateError,
    GenerationSettings,
    LoraSettings,
    ModelConfig,
    PromptSettings,
    TrackingConfig,
    TrainingConfig,
)

# The same bytes for every reader; other models stay unpinned unless `model.revision` is set.
PRESETS = {
    "google/gemma-2b": "9cf48e52b224239de00d483ec8eb84fb8d0f3a3a",
    "google/gemma-1.1-2b-it": "d750f5eceb83e978c09e2b3597c2a8784e381022",
    "google/gemma-2-2b": "c5ebcd40d208330abc697524c919956e692655cf",
}


def tiny() -> dict[str, Any]:
    """A laptop without GPU, token or network."""
    model = {"id": "tiny-gemma", "quantization": "nf4", "compute_dtype": "float32", "device": "cpu"}
    return {"threads": 1, "model": model, "training": {"recipe": "fast"}}


def t4() -> dict[str, Any]:
    """The free GPU of Colab: 15 GiB, compute capability 7.5."""
    model = {"id": "google/gemma-2b", "quantization": "nf4-double", "compute_dtype": "float16"}
    training = {"recipe": "original", "gradient_checkpointing": True}
    return {"model": model | {"device": "cuda"}, "training": training}


def ampere() -> dict[str, Any]:
    """A GPU of compute capability 8 or more."""
    return {"model": t4()["model"] | {"compute_dtype": "bfloat16"}, "training": {"recipe": "fast"}}


def full() -> dict[str, Any]:
    """A large GPU: the base stays in bfloat16, unquantized."""
    return ampere() | {"model": ampere()["model"] | {"quantization": "none"}}


PROFILES = {"tiny": tiny, "t4": t4, "ampere": ampere, "full": full}

# What a profile's value does not say by itself.
WHY = {
    "tiny": {
        "threads": "on a shared machine a second thread costs more than it brings",
        "model.quantization": "the arithmetic of the large profiles",
        "model.compute_dtype": "half precision gains nothing on a CPU",
    },
    "t4": {
        "model.quantization": "4 bits leave room for activations in 15 GiB",
        "model.compute_dtype": "no bf16 below compute capability 8",
        "training.gradient_checkpointing": "memory before speed in 15 GiB",
    },
    "ampere": {
        "model.quantization": "below 40 GiB the base is held in 4 bits",
        "model.compute_dtype": "bf16 does not overflow where fp16 does",
    },
    "full": {"model.quantization": "from 40 GiB the base fits unquantized"},
}


def original() -> dict[str, Any]:
    """The optimisation of the classic Gemma QLoRA notebook: one row at a time, four to a step."""
    lora = {"r": 8, "alpha": 16, "target_modules": "auto"}  # auto: Gemma's seven projections
    length = {"max_steps": 100, "learning_rate": 2e-4, "warmup_steps": 2}
    batch = {"batch_size": 1, "gradient_accumulation_steps": 4, "optim": "paged_adamw_8bit"}
    return {"lora": lora, "training": length | batch}


def fast() -> dict[str, Any]:
    """The same trajectory, four rows at once."""
    faster = {"batch_size": 4, "gradient_accumulation_steps": 1, "optim": "adamw_torch_fused"}
    return original() | {"training": original()["training"] | faster}


RECIPES = {"original": original, "fast": fast}


def choose_profile(
    facts: Facts, requested: str = "auto", *, environ: Mapping[str, str] = os.environ
) -> tuple[str, str]:
    """The profile and why: as requested, or GEMMATE_PROFILE, or what fits the machine."""
    if requested != "auto":
        return among(requested, PROFILES, "profile"), "set by you"
    if environ.get("GEMMATE_PROFILE", "auto") != "auto":
        return among(environ["GEMMATE_PROFILE"], PROFILES, "profile"), "GEMMATE_PROFILE is set"
    if facts.capability is None:
        return "tiny", "no CUDA GPU"
    capability, memory = ".".join(map(str, facts.capability)), facts.gpu_memory_gib or 0.0
    if facts.capability < (8, 0):
        return "t4", f"compute capability {capability} is below 8"
    name = "full" if memory >= 40 else "ampere"
    return name, f"compute capability {capability}, {memory:.0f} GiB"


def experiments() -> list[str]:
    """The names of the experiments that come with the library."""
    files = (resources.files("gemmate_lib") / "experiments").iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".yaml"))


def read_experiment(name: str | Path) -> dict[str, Any]:
    """The content of an experiment file: a shipped one by its name, or yours by its path."""
    file: Any = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        among(str(name), experiments(), "experiment")
        file = resources.files("gemmate_lib") / "experiments" / f"{name}.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GemmateError(f"Cannot read the experiment {name}: {error}. Mend the file.") from None
    sections = content.get("profiles", {}) if isinstance(content, dict) else None
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise GemmateError(f"The experiment {name} is no mapping. Write KEY: VALUE lines.")
    return {"name": file.name.rsplit(".", 1)[0]} | content


def _parse(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return {key: value for key, value in overrides.items() if value is not None}
    parsed: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        try:
            parsed[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise GemmateError(f"{item!r} is no KEY=VALUE. Write it as training.max_steps=20.")
    return parsed


# One layer: dotted key -> its value and the reason for it.
Layer = dict[str, tuple[Any, str]]


def _layer(settings: Mapping[str, Any], reason: str, group: str = "") -> Layer:
    layer: Layer = {}
    for name, value in settings.items():
        if not group and name in GROUPS and isinstance(value, Mapping):
            layer |= _layer(value, reason, f"{name}.")
        elif not group and name in ("model", "dataset"):
            layer[f"{name}.id"] = (str(value) if isinstance(value, Path) else value, reason)
        else:
            found = read_setting(f"{group}{name}", value)
            layer |= {key: (value, reason) for key, value in found.items()}
    return layer


def _layers(file: dict[str, Any], profile: str, yours: Mapping[str, Any]) -> list[Layer]:
    sections = file.pop("profiles", {})
    for section in sections:
        among(section, PROFILES, "profile")
    base = _layer(PROFILES[profile](), f"profile {profile}")
    base |= {key: (base[key][0], f"profile {profile}: {why}") for key, why in WHY[profile].items()}
    above = [
        _layer(file, f"experiment {file['name']}"),
        _layer(sections.get(profile, {}), f"experiment {file['name']}, profile {profile}"),
        _layer(yours, "set by you"),
    ]
    chosen = ChainMap(*reversed(above), base)
    held = chosen.get("model.quantization", ("none",))[0]
    if chosen.get("method", ("",))[0] == "qlora" and held == "none":
        above.insert(-1, {"model.quantization": ("nf4", "method qlora: a base in 4 bits")})
    recipe = among(ChainMap(*reversed(above), base)["training.recipe"][0], RECIPES, "recipe")
    layer = _layer(RECIPES[recipe](), f"recipe {recipe}")
    if "training.recipe" in above[-1]:  # a recipe that you name outranks the experiment
        return [base, *above[:-1], layer, above[-1]]
    return [base, layer, *above]


def _merge(layers: list[Layer]) -> Layer:
    merged: Layer = {}
    for layer in layers:
        for group in ("model", "dataset"):
            new = layer.get(f"{group}.id")
            if new and new[0] != merged.get(f"{group}.id", new)[0]:
                merged.pop(f"{group}.revision", None)  # it named a state of the old id
        merged |= layer
    model = str(merged["model.id"][0])
    reason = f"preset {model}" if model in PRESETS else "unpinned: not a Hub preset"
    return {"model.revision": (PRESETS.get(model), reason)} | merged


class Table(list[tuple[str, str, str]]):
    """Rows of (key, value, reason) that print as aligned columns."""

    def __str__(self) -> str:
        key, value = (max(len(row[column]) for row in self) for column in (0, 1))
        return "\n".join(f"{row[0]:{key}}  {row[1]:{value}}  {row[2]}" for row in self)


@dataclass(frozen=True)
class Resolved:
    """An experiment and, for each dotted key, the reason for its value."""

    experiment: Experiment
    reasons: dict[str, str]

    def table(self) -> Table:
        """One row per setting, to print."""
        settings = flatten(self.experiment).items()
        return Table((k, str(v).replace("\n", "\\n"), self.reasons[k]) for k, v in settings)


def resolve(
    experiment: str | Path,
    *,
    facts: Facts,
    profile: str = "auto",
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Resolved:
    """One checked experiment from its layers; overrides of None are left out.

    Raises: GemmateError for a setting that is unknown, ambiguous or out of range.
    """
    file, yours = read_experiment(experiment), _parse(overrides)
    name, why = choose_profile(facts, yours.pop("profile", profile))
    merged = _merge(_layers(file, name, yours)) | {"profile": (name, why)}
    nested: dict[str, Any] = {}
    for key, (value, _) in merged.items():
        group, _, leaf = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[leaf] = value
    try:
        valid = Experiment.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][:2]))
        reason = merged.get(key, ("", "default"))[1]
        raise GemmateError(f"{key}: {first['msg']}, not {first['input']!r} ({reason}).") from None
    reasons = {key: merged[key][1] if key in merged else "default" for key in flatten(valid)}
    return Resolved(valid, reasons)
