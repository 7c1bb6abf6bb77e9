"""The thinnest time-aware Gemma-2: one learned direction, scaled by the time, in every embedding.

Shapes: `B` batch, `T` tokens, `D` hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    initialization,
)

from gemmate_lib.config import GemmateError
from gemmate_lib.temporal.encoding import TAU, log_encoding

KINDS = ("log",)


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, so that what it is added to starts unchanged."""

    def reset_parameters(self) -> None:
        """Start at zero instead of at random; a weight just loaded from a file is left alone."""
        initialization.zeros_(self.weight)


class TemporalEncoder(nn.Module):
    """timestamps int64 [B] (ms since the Unix epoch, UTC) -> what to add to embeddings [B, 1, D].

    Raises: GemmateError for an unknown kind.
    """

    def __init__(self, kind: str, hidden_size: int, *, tau: float = TAU) -> None:
        super().__init__()
        if kind not in KINDS:
            raise GemmateError(f"There is no temporal encoder {kind!r}. Use {' or '.join(KINDS)}.")
        self.kind, self.tau = kind, tau
        # No bias: a feature of 0, which is all that dates before the reference have, adds nothing.
        # In bf16 the feature would stand still for years (see `resolution`), so this stays in fp32.
        self.projection = ZeroLinear(1, hidden_size, bias=False, dtype=torch.float32)

    def forward(self, timestamps: torch.Tensor) -> torch.Tensor:
        """Encode in float64, project in the weights' type."""
        feature = log_encoding(timestamps, self.tau).to(self.projection.weight.dtype)
        return self.projection(feature[:, None, None])


class TemporalGemma2Config(Gemma2Config):
    """Gemma-2's configuration with the kind of encoder and its tau."""

    model_type = "temporal_gemma2"
    temporal_kind: str = "log"
    temporal_tau: float = TAU

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read also a plain Gemma-2: it is a time-aware one whose encoder is still zero."""
        found, rest = super().get_config_dict(*args, **kwargs)
        if found.get("model_type") == Gemma2Config.model_type:
            found = found | {"model_type": cls.model_type}
        return found, rest


class TemporalGemma2ForCausalLM(Gemma2ForCausalLM):
    """Gemma-2 that knows when: without `timestamps`, or untrained, it is Gemma-2 to the bit."""

    config_class = TemporalGemma2Config
    # Counts for weights found in a file; the encoder's own dtype, for those that are missing.
    _keep_in_fp32_modules_strict = frozenset({"temporal"})

    def __init__(self, config: TemporalGemma2Config) -> None:
        super().__init__(config)
        self.temporal = TemporalEncoder(
            config.temporal_kind, config.hidden_size, tau=config.temporal_tau
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained calls this for weights that a file lacks, and a plain nn.Linear would be
        # drawn at random here, whatever it was set to before.
        if isinstance(module, ZeroLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

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
        **kwargs: Any,
    ) -> Any:
        """Compute logits [B, T, V] and, with labels, the loss.

        timestamps: int64 [B], one per row, in milliseconds since the Unix epoch, UTC.
        Every argument is named because `generate` and Trainer read this signature: a position_ids
        hidden in **kwargs would give left-padded prompts wrong positions without a word.
        Raises: GemmateError unless there is one int64 timestamp per row.
        """
        if timestamps is not None:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            if timestamps.shape != inputs_embeds.shape[:1]:  # one too few would be broadcast
                rows, shape = len(inputs_embeds), list(timestamps.shape)
                raise GemmateError(f"timestamps are {shape}. Pass one per row: [{rows}].")
            inputs_embeds = inputs_embeds + self.temporal(timestamps).to(inputs_embeds.dtype)
            input_ids = None
        return super().forward(
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


AutoConfig.register(TemporalGemma2Config.model_type, TemporalGemma2Config, exist_ok=True)
AutoModelForCausalLM.register(TemporalGemma2Config, TemporalGemma2ForCausalLM, exist_ok=True)
