"""What this machine can do for the course: versions, device, token, and what each profile needs."""

import shutil
from pathlib import Path
from typing import Any

from gemmate_lib import auth, machine
from gemmate_lib.config import PROFILES, choose_profile
from gemmate_lib.manifest import versions_against_lock

# google/gemma-2b, as in its config.json.
GEMMA_2B: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
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
    from transformers import GemmaConfig

    from gemmate_lib.models import base_settings, model_path, predict_bytes

    model = PROFILES[profile]()["model"]
    embedded = Path(model_path(model["id"]))
    config = base_settings(model["id"]) if embedded.is_dir() else GemmaConfig(**GEMMA_2B)
    return predict_bytes(config, model["quantization"], dtype=model["compute_dtype"]) / 2**30


def needs() -> list[str]:
    """Return one line a profile: base, GiB of weights, minutes of the original recipe."""
    lines = []
    for name, profile in PROFILES.items():
        model, minutes = profile()["model"], MINUTES[name]
        held = f"{model['id']} in {model['quantization']}/{model['compute_dtype']}"
        time = "not measured" if minutes is None else f"about {minutes} minutes"
        lines.append(f"{name:<7} {held:<40} {weights_gib(name):>6.2f} GiB of weights, {time}")
    return lines
