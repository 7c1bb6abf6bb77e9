"""Gemma and Gemma-2 that know what time it is: an encoding of the time in every embedding.

The encoding is added after Gemma's scaling of the embeddings by the root of the width, which sits
inside `embed_tokens`: it keeps the size it was learned with. Where tokens have times of their own,
a generated token carries the time of the last one.

Shapes: `B` batch, `T` tokens, `D` hidden size, `V` words of the vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
)

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal.encoder import MISSING, TemporalEncoder, ZeroLinear
from gemmate_lib.temporal.encoding import TAU

__all__ = [
    "MISSING", "GemmaTE2Config", "GemmaTE2ForCausalLM", "GemmaTEConfig", "GemmaTEForCausalLM",
    "TemporalEncoder", "from_base",
]  # fmt: skip


class _ReadsItsBase:
    """For a configuration: read also a plain base, whose encoder is still zero."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if found.get("model_type") in (GemmaConfig.model_type, Gemma2Config.model_type):
            found = found | {"model_type": cls.model_type}  # type: ignore[attr-defined]
        return found, rest


class GemmaTEConfig(_ReadsItsBase, GemmaConfig):
    """Gemma's configuration with the kind of encoder and its tau."""

    model_type = "gemma_te"
    temporal_kind: str = "log"
    temporal_tau: float = TAU


class GemmaTE2Config(_ReadsItsBase, Gemma2Config):
    """Gemma-2's configuration with the kind of encoder and its tau."""

    model_type = "gemma2_te"
    temporal_kind: str = "log"
    temporal_tau: float = TAU


class _TimeAware:
    """For a causal language model: the encoder, and timestamps on their way to it."""

    # Counts for weights found in a file; the encoder's own dtype, for those that are missing.
    _keep_in_fp32_modules_strict = frozenset({"temporal"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        kind, tau = config.temporal_kind, config.temporal_tau
        self.temporal = TemporalEncoder(kind, config.hidden_size, tau=tau)
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained calls this for weights that a file lacks, and a plain nn.Linear would be
        # drawn at random here, whatever it was set to before.
        if isinstance(module, ZeroLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        timestamps: torch.Tensor | None = None,
        utc_offsets: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits [B, T, V] and, with labels, the loss; without timestamps as the base does.

        timestamps: int64 [B], or [B, T] where every token has its own; milliseconds since the
        Unix epoch, UTC, or MISSING. utc_offsets: int64 [B], minutes from UTC to the local time.
        Every argument is named because `generate` and Trainer read this signature: a position_ids
        hidden in **kwargs would give left-padded prompts wrong positions without a word.
        Raises: GemmateError for another shape or type.
        """
        if timestamps is not None:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
            timestamps = _fitting(timestamps, inputs_embeds)
            time = self.temporal(timestamps, utc_offsets)
            inputs_embeds = inputs_embeds + time.to(inputs_embeds.dtype)
            input_ids = None
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: Any, **rest: Any
    ) -> Any:
        """Give the token just generated the time of the one before it."""
        known = model_kwargs.get("timestamps")
        if known is not None and known.ndim == 2:
            model_kwargs["timestamps"] = torch.cat([known, known[:, -1:]], dim=1)
        go_on = super()._update_model_kwargs_for_generation  # type: ignore[misc]
        return go_on(outputs, model_kwargs, **rest)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """Keep the times of those tokens that this step computes; the others are in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if (times := inputs.get("timestamps")) is not None and times.ndim == 2:
            given = inputs.get("inputs_embeds")
            given = inputs["input_ids"] if given is None else given
            inputs["timestamps"] = times[:, -given.shape[1] :]
        return inputs


def _fitting(timestamps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """The timestamps, if there is one a row [B] or one a token [B, T]."""
    rows, tokens = embeds.shape[:2]
    if timestamps.shape not in ((rows,), (rows, tokens)):  # one too few would be broadcast
        shape = list(timestamps.shape)
        raise GemmateError(f"timestamps are {shape}. Pass one per row: [{rows}], "
                           f"or one per token: [{rows}, {tokens}].")  # fmt: skip
    return timestamps


class GemmaTEForCausalLM(_TimeAware, GemmaForCausalLM):
    """Gemma that knows when: without `timestamps`, or untrained, it is Gemma to the bit."""

    config_class = GemmaTEConfig


class GemmaTE2ForCausalLM(_TimeAware, Gemma2ForCausalLM):
    """Gemma-2 that knows when: without `timestamps`, or untrained, it is Gemma-2 to the bit."""

    config_class = GemmaTE2Config


_TWINS: dict[str, tuple[Any, Any]] = {
    GemmaConfig.model_type: (GemmaTEConfig, GemmaTEForCausalLM),
    Gemma2Config.model_type: (GemmaTE2Config, GemmaTE2ForCausalLM),
}


def from_base(model: Any, *, kind: str = "log", tau: float = TAU) -> Any:
    """Return a time-aware twin of a loaded base, whose modules it takes over, quantized or not.

    Raises: GemmateError for a model that is neither Gemma nor Gemma-2, and for an unknown kind.
    """
    if model.config.model_type not in _TWINS:
        raise GemmateError(f"{type(model).__name__} has no time-aware twin. Use Gemma or Gemma-2.")
    config_class, twin = _TWINS[model.config.model_type]
    content = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    config = config_class(**content, temporal_kind=kind, temporal_tau=tau)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):  # its own weights are never needed
        made = twin(config)
    made.model, made.lm_head = model.model, model.lm_head
    made.temporal = TemporalEncoder(kind, config.hidden_size, tau=tau).to(model.device)
    made.generation_config = model.generation_config
    for name in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(model, name):  # what Trainer and PEFT ask a quantized model
            setattr(made, name, getattr(model, name))
    return made.train(model.training)


for config_class, twin in _TWINS.values():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, twin, exist_ok=True)
