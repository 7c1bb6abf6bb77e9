"""What this machine can do for the course: versions, device, token, and what each profile needs."""

import shutil
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from gemmate_lib import auth, machine
from gemmate_lib.config import PROFILES, Experiment, Facts, ModelConfig, choose_profile
from gemmate_lib.footprint import GEMMA_2B, Counted, Footprint, count, of_rows, predict
from gemmate_lib.manifest import versions_against_lock

# Minutes for 100 steps of 4 quotes; None: not measured yet.
MINUTES = {"tiny": 0.2, "t4": 4.5, "ampere": None, "full": None}


def examine() -> list[str]:
    """Return the findings, one a line."""
    machine.quiet()
    facts = machine.read_facts()
    profile, why = choose_profile(facts)
    token = auth.find_token()
    lines = [
        f"device     {facts.device}, {facts.ram_gib:.1f} GiB of memory, {_disk():.0f} GiB of disk",
        f"profile    {profile}: {why}",
        f"token      {token.source or 'none'}",
        f"gated      {gated_model()}",
    ]
    lines += [f"versions   {line}" for line in version_lines()]
    return lines + [f"needs      {line}" for line in needs()]


def _disk() -> float:
    return shutil.disk_usage(Path.cwd()).free / 2**30


def version_lines() -> list[str]:
    """Return what is installed otherwise than in the lock, or that nothing is."""
    found = versions_against_lock()
    differing = [f"{name}: lock {lock}, here {here}" for name, lock, here in found]
    return differing or ["as in the lock"]


def gated_model(model: str = "google/gemma-2b") -> str:
    """Return whether the gated model can be reached, else the remedy; never raises."""
    report = auth.check_access(model)
    return f"{model}: can be downloaded" if report.ok else f"{model}: {report.remedy}"


def weights_gib(profile: str) -> float:
    """Return the GiB that the weights of a profile's base take once loaded."""
    from gemmate_lib.models import predict_bytes

    model = ModelConfig(**PROFILES[profile]()["model"])
    return predict_bytes(shape_of(model), model.quantization, dtype=model.compute_dtype) / 2**30


def needs() -> list[str]:
    """Return one line a profile: base, GiB of weights, minutes of the original recipe."""
    lines = []
    for name, profile in PROFILES.items():
        model, minutes = profile()["model"], MINUTES[name]
        held = f"{model['id']} in {model['quantization']}/{model['compute_dtype']}"
        time = "not measured" if minutes is None else f"about {minutes} minutes"
        lines.append(f"{name:<7} {held:<40} {weights_gib(name):>6.2f} GiB of weights, {time}")
    return lines


# Of a device's memory: a driver and other programs take some; on a CPU the C library keeps a third
# more than is asked of it (benchmarks/memory.json).
USABLE = {"cpu": 0.65, "cuda": 0.9, "mps": 0.65}
WAYS = (("lora", "none"), ("lora", "nf4"), ("lora", "nf4-double"), ("full", "none"))


def fits(experiment: Experiment, facts: Facts) -> list[str]:
    """What fine-tuning this experiment's model takes on a machine, by ways, and the most rows."""
    model = experiment.model
    room = USABLE[facts.device] * 2**30 * (facts.gpu_memory_gib or facts.ram_gib)
    config = shape_of(model)
    counts: dict[str, Counted] = {}
    found: list[tuple[Experiment, Footprint, int]] = []
    for (method, quantization), recomputed in product(WAYS, (False, True)):
        way = _with(experiment, method=method, model={"quantization": quantization},
                    training={"gradient_checkpointing": recomputed})  # fmt: skip
        if method not in counts:
            counts[method] = count(config, _with(way, model={"quantization": "none"}))
        footprint = predict(way, config, counts[method])
        found.append((way, footprint, most_rows(way, config, counts[method], footprint, room)))
    rows, length = experiment.training.batch_size, experiment.dataset.max_length
    name, unit = ("GiB", 2**30) if found[0][1].total >= 2**30 else ("MiB", 2**20)
    device = "GPU" if facts.gpu_memory_gib else "CPU"
    return [
        f"{model.id} in {model.compute_dtype} on a {device}, {room / 2**30:.1f} GiB to count on.",
        f"{name} at the peak of a step of {rows} x {length} tokens, and the most rows that fit:",
        f"{'trained':<13}{'base held in':<14}{'activations':<13}{'base':>7}{'trained':>9}"
        f"{'activations':>13}{'working':>9}{'total':>8}{'rows':>7}",
    ] + [_line(*each, unit=unit) for each in found]


def _line(way: Experiment, found: Footprint, most: int, *, unit: int) -> str:
    what = f"LoRA, r={way.lora.r}" if way.method == "lora" else "every weight"
    plain = "float32" if way.method == "full" else way.model.compute_dtype
    held = plain if way.model.quantization == "none" else way.model.quantization
    kept = "recomputed" if way.training.gradient_checkpointing else "kept"
    trained = found.trained + found.gradients + found.optimizer
    parts = (found.base, trained, found.activations, found.working, found.total)
    base, learned, activations, working, total = (f"{part / unit:.2f}" for part in parts)
    return (
        f"{what:<13}{held:<14}{kept:<13}{base:>7}{learned:>9}{activations:>13}{working:>9}"
        f"{total:>8}{most or 'none':>7}"
    )


def _with(experiment: Experiment, **changes: Any) -> Experiment:
    """The experiment with other values, a mapping for those of a group."""
    values = experiment.model_dump()
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    return Experiment.model_validate(values)


def shape_of(model: ModelConfig) -> Any:
    """A base's configuration; gemma-2b's is public, and known here without a token."""
    from transformers import GemmaConfig

    from gemmate_lib.models import base_settings

    if model.id == "google/gemma-2b":
        return GemmaConfig(**GEMMA_2B)
    return base_settings(model.id, model.revision)


def most_rows(
    experiment: Experiment, config: Any, counted: Counted, found: Footprint, room: float
) -> int:
    """The most rows of a step, a power of two, whose peak fits in `room` bytes; 0: not even one."""
    fixed = found.base + found.trained + found.optimizer
    steps = (of_rows(experiment, config, counted, 2**power) for power in range(13))
    needs = (fixed + sum(step.values()) for step in steps)
    fitting = sum(1 for _ in takewhile(lambda need: need <= room, needs))
    return 2 ** (fitting - 1) if fitting else 0
