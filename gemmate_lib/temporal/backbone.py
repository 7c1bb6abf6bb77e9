"""Gemma's and Gemma-2's layers with the time in every embedding, and their configurations.

The encoding is added before Gemma's scaling of the embeddings by the root of the width: in effect,
since that scaling sits inside `embed_tokens`, and the encoder does its own.

Shapes: `B` batch, `T` tokens, `D` hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal.encoder import TemporalEncoder, ZeroLinear
from gemmate_lib.temporal.encoding import TAU


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


class TimedBackbone:
    """For the model below the language model's head: the encoder, and the sum.

    It sits here because TRL replaces the forward of the whole by one that calls the backbone and
    never computes all logits at once (1.16, `add_fused_lm_head`): what were added above would not
    be trained, without a word.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        kind, tau = config.temporal_kind, config.temporal_tau
        self.temporal = TemporalEncoder(kind, config.hidden_size, tau=tau)
        # While texts are generated: the times of all rows and what they were encoded to.
        self.encoded: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained calls this for weights that a file lacks, and a plain nn.Linear would be
        # drawn at random here, whatever it was set to before.
        if isinstance(module, TemporalEncoder | ZeroLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        timestamps: torch.Tensor | None = None,
        utc_offsets: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute hidden states [B, T, D]; timestamps as for the whole model."""
        if timestamps is not None:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
            timestamps = _fitting(timestamps, inputs_embeds)
            if self.encoded and self.encoded[0] is timestamps:
                time = self.encoded[1]
            else:
                time = self.temporal(timestamps, utc_offsets)
            inputs_embeds = inputs_embeds + time.to(inputs_embeds.dtype)
            input_ids = None
        whole = super().forward  # type: ignore[misc]
        return whole(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class GemmaTEModel(TimedBackbone, GemmaModel):
    """Gemma's layers, with the time in every embedding."""

    config_class = GemmaTEConfig


class GemmaTE2Model(TimedBackbone, Gemma2Model):
    """Gemma-2's layers, with the time in every embedding."""

    config_class = GemmaTE2Config


def _fitting(timestamps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """The timestamps, if there is one a row [B] or one a token [B, T]."""
    rows, tokens = embeds.shape[:2]
    if timestamps.shape not in ((rows,), (rows, tokens)):  # one too few would be broadcast
        shape = list(timestamps.shape)
        raise GemmateError(f"timestamps are {shape}. Pass one per row: [{rows}], "
                           f"or one per token: [{rows}, {tokens}].")  # fmt: skip
    return timestamps
