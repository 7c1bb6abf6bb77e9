"""A run as fine-tuning leaves it, without the fine-tuning: an adapter that changes what is said."""

from pathlib import Path
from typing import Any

import torch

from gemmate_lib.config import Experiment, LoraSettings, ModelConfig
from gemmate_lib.manifest import write_manifest
from gemmate_lib.models import attach_lora, load_base, save_adapter
from gemmate_lib.publish import last_logits


def make_run(
    directory: Path,
    model: ModelConfig,
    prompt: str,
    *,
    weights: int = 1,
    kind: str = "lora",
    lora: LoraSettings | None = None,
    **settings: Any,
) -> list[float]:
    """Write the run; the logits after the prompt that it had in memory.

    weights: the seed they are drawn by, an encoder's too. settings: more of the experiment's.
    """
    loaded = load_base(model)
    adapted = attach_lora(loaded.model, lora or LoraSettings(), seed=0, kind=kind)
    torch.manual_seed(weights)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or ("modules_to_save" in name and "temporal" in name):
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, directory / "adapter", loaded.base)
    loaded.tokenizer.save_pretrained(directory / "adapter")
    write_manifest(
        directory,
        kind="sft",
        experiment=Experiment(name="quotes", model=model, method=kind, **settings),
        facts={},
        data={},
        base=loaded.base,
        metrics={"last_loss": 2.0},
        timings={},
    )
    return last_logits(adapted, loaded.tokenizer, prompt)
