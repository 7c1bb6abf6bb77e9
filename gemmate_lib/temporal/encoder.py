"""From timestamps to vectors in the space of the embeddings: features, then a projection.

Shapes: `B` rows, `T` tokens of a row, `D` hidden size.
"""

import torch
from torch import nn
from transformers import initialization

from gemmate_lib.temporal.encoding import MINUTE, TAU, require_int64
from gemmate_lib.temporal.features import KINDS, parts

# In place of a timestamp that is not known. No calendar reaches so far back.
MISSING = torch.iinfo(torch.int64).min


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, so that what it is added to starts unchanged."""

    def reset_parameters(self) -> None:
        """Start at zero instead of at random; a weight just loaded from a file is left alone."""
        initialization.zeros_(self.weight)


class TemporalEncoder(nn.Module):
    """Timestamps to what is added to the embeddings: [B] to [B, 1, D], [B, T] to [B, T, D].

    kind: log (GemmaTE's own), signed_log, fourier, calendar, or several joined by `+`.
    A timestamp that is MISSING has a learned vector of its own, and no other feature.
    Raises: GemmateError for an unknown kind.
    """

    def __init__(self, kind: str, hidden_size: int, *, tau: float = TAU) -> None:
        super().__init__()
        self.kind, self.tau = kind, tau
        count = sum(KINDS[part][1] for part in parts(kind)) + 1  # the last one: it is missing
        # No bias: a feature of 0, which is all that `log` has before the reference, adds nothing.
        # In bf16 that feature would stand still for years, so this stays in fp32.
        self.projection = ZeroLinear(count, hidden_size, bias=False, dtype=torch.float32)

    def features(self, timestamps: torch.Tensor) -> torch.Tensor:
        """Return the features, float64 [..., F]; of a missing timestamp only the last is not 0."""
        missing = timestamps == MISSING
        known = timestamps.masked_fill(missing, 0)
        columns = [
            KINDS[part][0](known, self.tau) if "log" in part else KINDS[part][0](known)
            for part in parts(self.kind)
        ]
        found = torch.cat(columns, dim=-1).masked_fill(missing[..., None], 0)
        return torch.cat([found, missing[..., None].to(found)], dim=-1)

    def forward(
        self, timestamps: torch.Tensor, utc_offsets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode in float64, project in the weights' type.

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
        return self.projection(self.features(timestamps).to(self.projection.weight.dtype))
