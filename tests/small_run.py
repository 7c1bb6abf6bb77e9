"""A run as fine-tuning leaves it, without the fine-tuning: an adapter that changes what is said."""

from pathlib import Path

import torch

from gemmate_lib.config import Experiment, LoraSettings, ModelConfig
from gemmate_lib.manifest import write_manifest
from gemmate_lib.models import attach_lora, load_base, save_adapter
from gemmate_lib.publish import last_logits


def make_run(directory: Path, model: ModelConfig, prompt: str) -> list[float]:
    """Write the run; the logits after the prompt that it had in memory."""
    loaded = load_base(model)
    adapted = attach_lora(loaded.model, LoraSettings(), seed=0)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, directory / "adapter", loaded.base)
    loaded.tokenizer.save_pretrained(directory / "adapter")
    write_manifest(
        directory,
        kind="sft",
        experiment=Experiment(name="quotes", model=model),
        facts={},
        data={},
        base=loaded.base,
        metrics={"last_loss": 2.0},
        timings={},
    )
    return last_logits(adapted, loaded.tokenizer, prompt)
