"""Rows that are generated for together, one token a step; they join and leave between steps.

Shapes: `B` rows, `T` tokens in the cache, padded on the left, `V` words of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from gemmate_lib.generate import left_padded

Forward = Callable[[Sequence["Row"], dict[str, Any]], torch.Tensor]


@dataclass(eq=False)
class Row:
    """One text that grows: its prompt, and how its next token is chosen."""

    ids: list[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    time: int | None = None
    adapter: Any = None
    generator: torch.Generator | None = field(default=None, init=False)
    broken: bool = field(default=False, init=False)  # no token could be drawn

    def choose(self, scores: torch.Tensor) -> int:
        """A token drawn as `generate` draws it for this prompt alone; scores: float [1, V]."""
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        ids = torch.empty(1, 0, dtype=torch.int64)  # which neither of the two reads
        if self.temperature != 1:
            scores = TemperatureLogitsWarper(self.temperature)(ids, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(ids, scores)
        shares = scores.softmax(dim=-1)
        if not shares.isfinite().all():  # else its neighbours would fail, and a GPU altogether
            self.broken = True
            return 0
        return int(torch.multinomial(shares, 1, generator=self.generator))


class Batch:
    """Rows, the keys and values of what they have read, and the token each reads next."""

    def __init__(self, rows: Sequence[Row], forward: Forward, *, pad_id: int, device: Any) -> None:
        """Read the prompts; each row has its first token then."""
        from transformers import DynamicCache

        self.rows, self._forward = list(rows), forward
        ids, mask = (x.to(device) for x in left_padded([row.ids for row in rows], pad_id))
        # Without the model's configuration every layer keeps all it has read, those with a
        # sliding window too: only so can rows of different lengths be put together.
        self.cache, self.mask = DynamicCache(), mask
        self.positions = mask.sum(dim=1)
        self.tokens = self._read(ids, (mask.cumsum(dim=1) - 1).clamp(min=0))

    def step(self) -> None:
        """Read the last tokens; each row has one more."""
        tokens = torch.tensor(self.tokens, device=self.mask.device)[:, None]
        self.mask = pad(self.mask, (0, 1), value=1)
        positions = self.positions[:, None]
        self.positions = self.positions + 1
        self.tokens = self._read(tokens, positions)

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> list[int]:
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions,
                  "past_key_values": self.cache, "use_cache": True}  # fmt: skip
        scores = self._forward(self.rows, inputs)[:, -1].float()
        tokens: list[int] = scores.argmax(dim=-1).tolist()
        for i, row in enumerate(self.rows):
            if row.temperature > 0:
                tokens[i] = row.choose(scores[i : i + 1])
        return tokens

    def keep(self, numbers: list[int]) -> None:
        """Let the other rows go, and the padding that only the longest of them needed."""
        at = torch.tensor(numbers, device=self.mask.device)
        self.mask, self.positions = self.mask[at], self.positions[at]
        self.rows, self.tokens = [self.rows[i] for i in numbers], [self.tokens[i] for i in numbers]
        start = self.mask.shape[1] - int(self.positions.max())
        self.mask = self.mask[:, start:]
        for layer in self.cache.layers:
            layer.keys, layer.values = (x[at, :, start:] for x in (layer.keys, layer.values))

    def join(self, other: "Batch") -> None:
        """Take the rows of another batch in."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        both = (self, other)
        self.mask = torch.cat([pad(b.mask, (width - b.mask.shape[1], 0)) for b in both])
        self.positions = torch.cat([b.positions for b in both])
        self.rows, self.tokens = self.rows + other.rows, self.tokens + other.tokens
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = (getattr(layer, name) for layer in (mine, theirs))
                wide = [pad(x, (0, 0, width - x.shape[2], 0)) for x in parts]
                setattr(mine, name, torch.cat(wide))
