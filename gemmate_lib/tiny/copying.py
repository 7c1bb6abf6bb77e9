"""Teach a small model to copy from its context, which reading and repeating are built on.

To continue "A B ... A" by "B", one attention head has to look at the token before and a later one
for the same token (Olsson et al. 2022, https://arxiv.org/abs/2209.11895). In a model this small
they do not form by themselves within millions of tokens of text. So the heads of the first layer
start out looking back, and training starts with echoes.

Shapes: `B` rows, `T` tokens of a row, `D` hidden size.
"""

from typing import Any

import torch

IGNORED = -100  # the label on which no loss is taken


@torch.no_grad()
def look_back(model: Any, *, offsets: tuple[int, ...] = (1, 2, 3), strength: float = 1.2) -> None:
    """Let the first heads of the first layer start out looking so many tokens back.

    One coordinate of every embedding is made the same. Keys and queries built on it know nothing
    of the tokens; the rotation by position (Su et al. 2021, https://arxiv.org/abs/2104.09864)
    makes their product largest at the offset by which the query is turned. Under tied embeddings
    the coordinate adds the same to every logit, which changes no probability.
    """
    frequencies = model.model.rotary_emb.inv_freq[:5]  # the fast ones tell neighbours apart
    model.get_input_embeddings().weight[:, 0] = 0.1
    attention = model.model.layers[0].self_attn
    width, fast = attention.head_dim, len(frequencies)
    attention.k_proj.weight[:, 0] = 0
    attention.k_proj.weight[:fast, 0] = strength
    for head, offset in enumerate(offsets):
        query = attention.q_proj.weight[head * width : (head + 1) * width]
        query[:fast, 0] = strength * torch.cos(offset * frequencies)
        query[width // 2 : width // 2 + fast, 0] = -strength * torch.sin(offset * frequencies)


def echoes(
    rows: int, length: int, generator: torch.Generator, *, vocabulary: int, words: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random tokens that repeat; return ids and labels, int64 [B, T] each.

    The period of a row is between an eighth and half of it, so that no fixed distance helps. The
    labels of the first period are ignored: nothing foretells it.
    """
    ids = torch.empty(rows, length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, label in zip(ids, labels, strict=True):
        period = int(torch.randint(length // 8, length // 2 + 1, (), generator=generator))
        drawn = torch.randint(vocabulary, (words,), generator=generator)
        segment = drawn[torch.randint(words, (period,), generator=generator)]
        row.copy_(segment.repeat(length // period + 1)[:length])
        label[period:] = row[period:]
    return ids, labels
