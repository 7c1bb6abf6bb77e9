"""Weights shared out among GPUs (FSDP2): the settings that are shipped, what they need, and back.

Reference: Zhao et al. 2023, https://arxiv.org/abs/2304.11277; FSDP2 is torch's `fully_shard`.
No GPU was at hand where this was written: what a CPU can show is tested, the rest is not.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from gemmate_lib.config import Experiment, Facts, GemmateError, among

Strategy = Literal["ddp", "fsdp2", "fsdp-qlora"]
STRATEGIES = get_args(Strategy)
FILES = Path(__file__).parent / "assets" / "launch"


def configuration(strategy: str, *, nodes: int = 1) -> Path:
    """The accelerate configuration of a strategy, for one machine or for several.

    Raises: GemmateError for an unknown strategy.
    """
    name = among(strategy, STRATEGIES, "strategy")
    return FILES / f"{name}{'-nodes' if nodes > 1 else ''}.yaml"


def is_sharded(strategy: str) -> bool:
    """Whether a strategy shares out the weights, and not the rows alone."""
    return strategy.startswith("fsdp")


def trainer_settings(strategy: str, *, checkpointing: bool) -> dict[str, Any]:
    """What transformers' TrainingArguments take of a configuration; nothing for ddp.

    checkpointing: compute activations twice; FSDP does so itself, and the trainer then must not.
    """
    if not is_sharded(strategy):
        return {"gradient_checkpointing": checkpointing}
    held = yaml.safe_load(configuration(strategy).read_text("utf-8"))["fsdp_config"]
    settings = {key.removeprefix("fsdp_"): value for key, value in held.items()}
    settings |= {"activation_checkpointing": checkpointing}
    # TRL's own default is to checkpoint; with both, transformers ends the run.
    return {"fsdp": True, "fsdp_config": settings, "gradient_checkpointing": False}


def check_strategy(strategy: str, experiment: Experiment, facts: Facts, *, processes: int) -> None:
    """Raise GemmateError where a strategy cannot train an experiment on this machine.

    processes: on this machine.
    """
    among(strategy, STRATEGIES, "strategy")
    on_gpu = facts.device == "cuda" and experiment.model.device in ("auto", "cuda")
    if on_gpu and processes > facts.gpu_count:
        problem = f"{processes} processes need a GPU each, and this machine has {facts.gpu_count}"
        raise GemmateError(f"{problem}. Set --processes {facts.gpu_count}.")
    if not is_sharded(strategy):
        return
    if not on_gpu:
        # accelerate 1.15, AcceleratorState: FSDP is looked for on accelerators alone.
        problem = "accelerate shards weights on GPUs alone, and on CPUs falls back without a word"
        raise GemmateError(f"{problem}. Take --strategy ddp here.")
    quantized = experiment.model.quantization != "none"
    if quantized != (strategy == "fsdp-qlora"):
        other = "fsdp2, or set model.quantization=nf4" if not quantized else "fsdp-qlora"
        held = "in 4 bits" if quantized else "not in 4 bits"
        raise GemmateError(f"The base is held {held}. Take --strategy {other}.")
    keep, training = experiment.checkpoint, experiment.training
    if keep.save_every or keep.save_strategy == "epoch" or keep.resume or training.stops_early:
        problem = "Of sharded weights no checkpoints are kept"
        raise GemmateError(f"{problem}. Set checkpoint.save_every=0, or take --strategy ddp.")


def packed(model: Any) -> list[tuple[str, Any]]:
    """The weights held in 4 bits, by name: numbers that are none until they are unpacked."""
    layers = ((n, m) for n, m in model.named_modules() if hasattr(m, "quant_state"))
    return [(f"{name}.weight", layer.weight) for name, layer in layers]


def check_storage(model: Any, dtype: Any) -> None:
    """Raise GemmateError for 4-bit weights stored in another type than the model computes in.

    accelerate 1.15, `fsdp2_prepare_model`, leaves those whole on every GPU and only warns.
    """
    for name, weight in packed(model):
        if weight.dtype != dtype:
            problem = f"{name} is stored in {weight.dtype}, and FSDP shares out {dtype} alone"
            raise GemmateError(f"{problem}. Load the base with bnb_4bit_quant_storage={dtype}.")


def own_part(weight: Any) -> Any:
    """What a rank holds of a tensor: of one that is shared out its share, else all of it."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def put_together(model: Any) -> dict[str, Any]:
    """The trained weights by name, whole; every rank must ask, for each gives its share."""
    trained = ((n, p.detach()) for n, p in model.named_parameters() if p.requires_grad)
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p) for n, p in trained}
