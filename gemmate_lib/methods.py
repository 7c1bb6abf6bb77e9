"""Fine-tuning methods by name: what each one trains, what it cannot go with, and why.

Two families. LoRA and its kin change what a layer computes, by few weights beside the frozen
ones, and can be merged into them. Prefix, prompt and p-tuning change no layer: they put learned
vectors in front of the text, which is here called a soft prompt.
"""

from dataclasses import dataclass
from typing import Any

from gemmate_lib.adapters import ENCODER, attach_lora, encoder_of, known_peft_warnings, train_all
from gemmate_lib.config import Experiment, GemmateError, PromptSettings


@dataclass(frozen=True)
class Method:
    """What a method is; `merges`: its result can be written into the base's own weights."""

    title: str
    trains: str
    source: str
    soft: bool = False

    @property
    def merges(self) -> bool:
        """Whether there are layers that the result can be added to."""
        return not self.soft


METHODS = {
    "lora": Method("LoRA", "two thin matrices beside each layer", "arxiv.org/abs/2106.09685"),
    "qlora": Method("QLoRA", "the same, beside layers held in 4 bits", "arxiv.org/abs/2305.14314"),
    "dora": Method("DoRA", "the same, and the length of each row", "arxiv.org/abs/2402.09353"),
    "rslora": Method("rsLoRA", "LoRA scaled by the root of its rank", "arxiv.org/abs/2312.03732"),
    "prefix": Method(
        "prefix tuning", "keys and values in front, each layer", "arxiv.org/abs/2101.00190", True
    ),
    "prompt": Method(
        "prompt tuning", "embeddings in front of the text", "arxiv.org/abs/2104.08691", True
    ),
    "p-tuning": Method(
        "p-tuning", "a small net that makes such embeddings", "arxiv.org/abs/2103.10385", True
    ),
    "full": Method("full fine-tuning", "every weight of the base", "none: it is the plain way"),
}  # fmt: skip


def check_method(experiment: Experiment) -> None:
    """Refuse what a method cannot go with, before anything is loaded.

    Raises: GemmateError with the reason and the remedy.
    """
    method, training = METHODS[experiment.method], experiment.training
    if not method.soft:
        return
    if experiment.model.temporal_kind:
        raise GemmateError(_no_encoder(method))
    if experiment.method == "prefix" and training.gradient_checkpointing:
        # transformers 5.23, modeling_layers.py: a layer that is computed twice drops the cache,
        # and the prefix is in it.
        problem = "Under gradient checkpointing no layer reads the cache that holds the prefix"
        raise GemmateError(f"{problem}: set training.gradient_checkpointing=false.")
    if training.packing:
        problem = f"Packed rows need their own positions, which PEFT drops in {method.title}"
        raise GemmateError(f"{problem}. Set training.packing=false.")
    keep = experiment.checkpoint
    saves = keep.save_every or keep.save_strategy == "epoch" or keep.resume_from_checkpoint
    if saves or training.stops_early:
        problem = f"PEFT cannot go on training a saved {method.title}, so checkpoints are of no use"
        keys = "checkpoint.save_every=0 and training.early_stopping_patience=0"
        raise GemmateError(f"{problem}. Set {keys}, with checkpoint.save_strategy=steps.")


def attach(model: Any, experiment: Experiment) -> Any:
    """Make a loaded base trainable by the experiment's method, with the seed of the experiment.

    Raises: GemmateError where the model cannot be trained so.
    """
    name = experiment.method
    if name == "full":
        return train_all(model)
    if name == "qlora" and not getattr(model, "is_quantized", False):
        problem = "method=qlora is LoRA on a base in 4 bits, and this one is not quantized"
        raise GemmateError(f"{problem}. Set model.quantization=nf4, or method=lora.")
    if METHODS[name].soft:
        return attach_prompt(model, name, experiment.prompt, seed=experiment.seed)
    return attach_lora(model, experiment.lora, seed=experiment.seed, kind=name)


def attach_prompt(model: Any, name: str, settings: PromptSettings, *, seed: int) -> Any:
    """Put a fresh soft prompt, drawn from `seed`, in front of all that the model will read.

    name: prefix, prompt or p-tuning.
    Raises: GemmateError for a time-aware model, or one that is adapted already.
    """
    from peft import PeftModel, get_peft_model
    from transformers import set_seed

    if isinstance(model, PeftModel):
        raise GemmateError("The model has another adapter already. Load the base again first.")
    if encoder_of(model) is not None:
        raise GemmateError(_no_encoder(METHODS[name]))
    set_seed(seed)
    with known_peft_warnings():
        return get_peft_model(model, _prompt_config(model, name, settings))


def _prompt_config(model: Any, name: str, settings: PromptSettings) -> Any:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": settings.virtual_tokens}
    if name == "prefix":
        return PrefixTuningConfig(**common)
    if name == "prompt":
        start = "SAMPLE_VOCAB" if settings.start == "vocabulary" else "RANDOM"
        return PromptTuningConfig(prompt_tuning_init=start, **common)
    width = settings.hidden_size or model.config.get_text_config().hidden_size
    return PromptEncoderConfig(encoder_hidden_size=width, **common)


def behind_soft_prompt(model: Any) -> bool:
    """Whether learned vectors stand in front of what the model reads."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning


def refuse_unmerged(config: Any) -> None:
    """Raise GemmateError for the settings of a saved adapter that is no change of any weight."""
    if config.is_prompt_learning:
        raise GemmateError(
            f"{config.peft_type.value} puts learned vectors in front of the text and changes no "
            "layer: there is nothing to merge. Use the adapter as it is, on its base."
        )


def _no_encoder(method: Method) -> str:
    return (
        f"{method.title} trains no weight of the model, and PEFT saves none beside it: GemmaTE's "
        f"{ENCODER} encoder would stay as it is. Set method=lora, dora or rslora."
    )


def trained(model: Any) -> int:
    """How many weights are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
