"""From timestamps to vectors in the space of the embeddings: features, then a projection.

Shapes: `B` rows, `T` tokens of a row, `D` hidden size.
"""

import torch
from torch import nn
from transformers import initialization

from gemmate_lib.temporal.encoding import TAU, require_int64
from gemmate_lib.temporal.features import KINDS, PERIODS, parts
from gemmate_lib.timestamps import MINUTE, MISSING


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, so that what it is added to starts unchanged."""

    def reset_parameters(self) -> None:
        """Start at zero instead of at random; a weight just loaded from a file is left alone."""
        initialization.zeros_(self.weight)


class TemporalEncoder(nn.Module):
    """Timestamps to what is added to the embeddings: [B] to [B, 1, D], [B, T] to [B, T, D].

    kind: log (GemmaTE's own), signed_log, fourier, learned_fourier, calendar, era, or several of
    them joined by `+`.
    A timestamp that is MISSING has a learned vector of its own, and no other feature.
    Raises: GemmateError for an unknown kind.
    """

    def __init__(self, kind: str, hidden_size: int, *, tau: float = TAU) -> None:
        super().__init__()
        self.kind, self.tau = kind, tau
        count = sum(KINDS[part].size for part in parts(kind)) + 1  # the last one: it is missing
        # No bias: a feature of 0, which is all that `log` has before the reference, adds nothing.
        # In bf16 that feature would stand still for years, so this stays in fp32.
        self.shift: nn.Parameter | None = None
        if "learned_fourier" in parts(kind):
            self.shift = nn.Parameter(torch.zeros(len(PERIODS), dtype=torch.float32))
        self.projection = ZeroLinear(count, hidden_size, bias=False, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Start at the fixed periods; what was just loaded from a file is left alone."""
        if self.shift is not None:
            initialization.zeros_(self.shift)

    def features(self, timestamps: torch.Tensor) -> torch.Tensor:
        """Return the features, float64 [..., F]; of a missing timestamp only the last is not 0."""
        missing = timestamps == MISSING
        known = timestamps.masked_fill(missing, 0)
        kinds = [KINDS[part] for part in parts(self.kind)]
        columns = [kind.features(known, tau=self.tau, shift=self.shift) for kind in kinds]
        found = torch.cat(columns, dim=-1).masked_fill(missing[..., None], 0)
        return torch.cat([found, missing[..., None].to(found)], dim=-1)

    def forward(
        self, timestamps: torch.Tensor, utc_offsets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode in float64, project in the weights' type, scale by the root of D.

        Gemma scales its embeddings so; what is added to them is learned at the same rate thereby.

        timestamps: int64 [B] or [B, T], milliseconds since the Unix epoch, UTC, or MISSING.
        utc_offsets: int64 [B], minutes to add for the local time; None: UTC.
        Raises: GemmateError for another type, or a year beyond -9999 to 9999.
        """
        require_int64(timestamps)
        if timestamps.ndim == 1:
            timestamps = timestamps[:, None]
        if utc_offsets is not None:
            local = timestamps + utc_offsets[:, None] * MINUTE
            timestamps = torch.where(timestamps == MISSING, timestamps, local)
        found = self.projection(self.features(timestamps).to(self.projection.weight.dtype))
        return found * self.projection.out_features**0.5
