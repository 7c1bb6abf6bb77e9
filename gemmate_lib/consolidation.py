"""Elastic weight consolidation: weights that an earlier task hangs on are held where they are.

The loss of a later task gets a penalty, lambda / 2 * sum of F_i (w_i - w*_i)^2, where w* are the
weights after the earlier task and F the diagonal of its Fisher information: Kirkpatrick et al.
2017, https://arxiv.org/abs/1612.00796.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemmate_lib.config import GemmateError
from gemmate_lib.data import Encoded
from gemmate_lib.generate import evaluating
from gemmate_lib.metrics import logits_of

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Anchor:
    """Weights after a task, and the Fisher information of each of them: name -> tensor."""

    weights: dict[str, torch.Tensor]
    fisher: dict[str, torch.Tensor]


def trained_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by name: those of the adapter."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def empirical_fisher(weights: Weights, losses: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of the squared gradients of each row's loss: the empirical Fisher's diagonal.

    losses: -log p of one row's answer each, a scalar that hangs on the weights. One row at a time,
    since the square of a batch's mean gradient is another, smaller number. The answers are those
    of the data, not drawn from the model: Kunstner et al. 2019, https://arxiv.org/abs/1905.12558.
    Raises: GemmateError where there is no row, or a gradient is not finite.
    """
    total, count = {name: torch.zeros_like(weight) for name, weight in weights.items()}, 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.square()
        count += 1
    if not count or not all(bool(each.isfinite().all()) for each in total.values()):
        raise GemmateError("A Fisher estimate needs rows with finite losses. Did the run diverge?")
    return {name: each / count for name, each in total.items()}


def row_losses(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> Iterator[torch.Tensor]:
    """Yield -log p of each row's completion in nats, a scalar with its graph."""
    for row in rows:
        logits = logits_of(model, tokenizer, [row])[0, : len(row.labels) - 1].float()
        target = torch.tensor(row.labels[1:], device=logits.device)  # -100 is left out
        yield torch.nn.functional.cross_entropy(logits, target, reduction="sum")


def anchor_of(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], *, file: Path | None = None
) -> Anchor:
    """Anchor a model where it is, by the Fisher information of these rows; its mode stays.

    file: where the estimate is kept, or was before.
    """
    from safetensors.torch import load_file, save_file

    weights = trained_weights(model)
    place = {name: weight.detach().clone() for name, weight in weights.items()}
    if file is not None and file.is_file():
        return Anchor(place, load_file(file, device=str(next(iter(place.values())).device)))
    with evaluating(model):
        fisher = empirical_fisher(weights, row_losses(model, tokenizer, rows))
    if file is not None:
        draft = file.with_suffix(".part")
        save_file(fisher, draft)
        draft.replace(file)
    return Anchor(place, fisher)


def penalty(weights: Weights, anchors: Sequence[Anchor]) -> torch.Tensor:
    """Half the squared distance from the anchors, each weight's by its Fisher information."""
    return 0.5 * sum(
        (a.fisher[name] * (weight - a.weights[name]).square()).sum()
        for a in anchors
        for name, weight in weights.items()
    )


@contextlib.contextmanager
def held_to(
    weights: Weights, anchors: Sequence[Anchor], strength: float, *, parts: int = 1
) -> Iterator[None]:
    """Inside, every backward pass adds the gradient of `strength` times the penalty.

    By a hook on each weight, so that any training loop stays as it is: its clipping and its watch
    see the whole gradient, its log the loss of the task alone.
    parts: backward passes to one optimizer step; each adds its share.
    Raises: GemmateError where the anchors are of other weights.
    """
    if any(set(a.weights) != set(weights) for a in anchors):
        raise GemmateError("The anchors are of another adapter. Take them from this one.")
    hooks = [
        weight.register_hook(partial(_pulled, weight, name, anchors, strength / parts))
        for name, weight in weights.items()
        if anchors
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pulled(
    weight: torch.Tensor, name: str, anchors: Sequence[Anchor], share: float, grad: torch.Tensor
) -> torch.Tensor:
    """The gradient with that of the penalty added."""
    place = weight.detach()
    return grad + share * sum(a.fisher[name] * (place - a.weights[name]) for a in anchors)
