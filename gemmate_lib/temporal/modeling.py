"""Gemma and Gemma-2 that know what time it is: an encoding of the time in every embedding.

The encoding is added before Gemma's scaling of the embeddings by the root of the width: in effect,
since that scaling sits inside `embed_tokens`, and the encoder does its own. Where tokens have times
of their own, a generated token carries the time of the last one.

Shapes: `B` batch, `T` tokens, `D` hidden size, `V` words of the vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
)

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal.backbone import (
    GemmaTE2Config,
    GemmaTE2Model,
    GemmaTEConfig,
    GemmaTEModel,
    TimedBackbone,
)
from gemmate_lib.temporal.encoder import MISSING, TemporalEncoder
from gemmate_lib.temporal.encoding import TAU
from gemmate_lib.timestamps import now

__all__ = [
    "MISSING", "GemmaTE2Config", "GemmaTE2ForCausalLM", "GemmaTEConfig", "GemmaTEForCausalLM",
    "TemporalEncoder", "from_base",
]  # fmt: skip


class _TimeAware:
    """For a causal language model: timestamps on their way to the backbone."""

    # Counts for weights found in a file; the encoder's own dtype, for those that are missing.
    _keep_in_fp32_modules_strict = frozenset({"temporal"})
    backbone: type[TimedBackbone]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.backbone(config)
        self.post_init()  # type: ignore[attr-defined]

    @property
    def temporal(self) -> TemporalEncoder:
        """The encoder of time."""
        return self.model.temporal

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
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            timestamps=timestamps,
            utc_offsets=utc_offsets,
            **kwargs,
        )

    # What a single prompt without a timestamp is asked at; None: it has no time. Yours to set.
    clock: Callable[[], int] | None = staticmethod(now)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base generates; `timestamps` as in `forward`.

        A single prompt without timestamps is asked now; several are asked at no time at all.
        """
        prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        given = next((tensor for tensor in prompts if tensor is not None), None)
        single = given is not None and given.shape[0] == 1
        if single and self.clock and kwargs.get("timestamps") is None:
            kwargs["timestamps"] = torch.tensor([self.clock()], device=self.device)  # type: ignore[attr-defined]
        times = kwargs.get("timestamps")
        if times is not None and times.ndim == 1:  # once, not again for each token
            with torch.no_grad():
                self.model.encoded = times, self.temporal(times, kwargs.get("utc_offsets"))
        try:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.model.encoded = None

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


class GemmaTEForCausalLM(_TimeAware, GemmaForCausalLM):
    """Gemma that knows when: without `timestamps`, or untrained, it is Gemma to the bit."""

    config_class, backbone = GemmaTEConfig, GemmaTEModel


class GemmaTE2ForCausalLM(_TimeAware, Gemma2ForCausalLM):
    """Gemma-2 that knows when: without `timestamps`, or untrained, it is Gemma-2 to the bit."""

    config_class, backbone = GemmaTE2Config, GemmaTE2Model


TWINS: dict[str, tuple[Any, Any]] = {
    GemmaConfig.model_type: (GemmaTEConfig, GemmaTEForCausalLM),
    Gemma2Config.model_type: (GemmaTE2Config, GemmaTE2ForCausalLM),
}


def twin_of(config: Any, *, kind: str, tau: float) -> tuple[Any, Any]:
    """The time-aware configuration for a plain one of Gemma or Gemma-2, and its class of model."""
    config_class, twin = TWINS[config.model_type]
    content = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    return config_class(**content, temporal_kind=kind, temporal_tau=tau), twin


def from_base(model: Any, *, kind: str = "log", tau: float = TAU) -> Any:
    """Return a time-aware twin of a loaded base, whose modules it takes over, quantized or not.

    Raises: GemmateError for a model that is neither Gemma nor Gemma-2, and for an unknown kind.
    """
    if model.config.model_type not in TWINS:
        raise GemmateError(f"{type(model).__name__} has no time-aware twin. Use Gemma or Gemma-2.")
    config, twin = twin_of(model.config, kind=kind, tau=tau)
    config._attn_implementation = model.config._attn_implementation
    made = _over_modules_of(model, twin, config)
    made.model.temporal = TemporalEncoder(kind, config.hidden_size, tau=tau).to(model.device)
    return made


def beside(model: Any, *, kind: str, tau: float = TAU) -> Any:
    """Return a time-aware model over the modules of another, with an encoder of its own.

    The other one may be time-aware itself: then the encoder starts as a copy of its own.
    Raises: GemmateError as `from_base` does.
    """
    own = getattr(model, "temporal", None)
    if own is None:
        return from_base(model, kind=kind, tau=tau)
    made = _over_modules_of(model, type(model), model.config)
    made.model.temporal = copy.deepcopy(own)
    return made


def _over_modules_of(model: Any, twin: Any, config: Any) -> Any:
    with torch.device("meta"):  # its own weights are never needed
        made = twin(config)
    for name, module in model.model.named_children():
        setattr(made.model, name, module)
    made.lm_head = model.lm_head
    made.generation_config = model.generation_config
    for name in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(model, name):  # what Trainer and PEFT ask a quantized model
            setattr(made, name, getattr(model, name))
    return made.train(model.training)


for config_class, twin in TWINS.values():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, twin, exist_ok=True)
