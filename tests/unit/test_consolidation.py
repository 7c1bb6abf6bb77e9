"""Elastic weight consolidation: the Fisher estimate, the penalty and its gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gemmate_lib.config import GemmateError, LoraSettings, ModelConfig
from gemmate_lib.consolidation import (
    Anchor,
    anchor_of,
    empirical_fisher,
    held_to,
    penalty,
    row_losses,
    trained_weights,
)
from gemmate_lib.data import Row, encode
from gemmate_lib.metrics import token_losses
from gemmate_lib.models import attach_lora, load_base

SIGMA = 0.5


def linear_rows(n: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [N, 3] of unequal spread, the true weights, and answers drawn with noise SIGMA."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=draw, dtype=torch.float64) * torch.tensor([0.5, 1.0, 3.0])
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    noise = SIGMA * torch.randn(n, generator=draw, dtype=torch.float64)
    return x, w, x @ w + noise


def gaussian(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """-log p of each answer under y ~ N(w x, SIGMA^2), but for a constant."""
    return [0.5 * (b - a @ w).square() / SIGMA**2 for a, b in zip(x, y, strict=True)]


def test_the_empirical_fisher_of_a_linear_model_is_the_analytic_one() -> None:
    """d/dw of -log p is -(y - w x) x / sigma^2, wherever the weights are."""
    x, _, y = linear_rows(50)
    w = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64, requires_grad=True)
    found = empirical_fisher({"w": w}, gaussian(w, x, y))["w"]
    residuals = y - x @ w.detach()
    expected = ((residuals[:, None] * x / SIGMA**2) ** 2).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert w.grad is None


def test_at_the_truth_it_comes_near_the_fisher_information() -> None:
    """There E[(y - w x)^2] is sigma^2, so that F is E[x^2] / sigma^2."""
    x, true, y = linear_rows(10_000)
    w = true.clone().requires_grad_(True)
    found = empirical_fisher({"w": w}, gaussian(w, x, y))["w"]
    # The estimate spreads by sqrt(6 / N), a fortieth of itself.
    torch.testing.assert_close(found, (x**2).mean(0) / SIGMA**2, rtol=0.1, atol=0)


def test_the_square_of_a_batchs_mean_gradient_would_be_another_number() -> None:
    x, true, y = linear_rows(64)
    w = true.clone().requires_grad_(True)
    rows = empirical_fisher({"w": w}, gaussian(w, x, y))["w"]
    batch = empirical_fisher({"w": w}, [torch.stack(gaussian(w, x, y)).mean()])["w"]
    assert (batch < rows / 5).all()


def test_a_fisher_needs_rows_that_are_finite() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(GemmateError, match="needs rows"):
        empirical_fisher({"w": w}, [])
    with pytest.raises(GemmateError, match="finite"):
        empirical_fisher({"w": w}, [(w / 0.0).sum()])


def anchors(weights: dict[str, Any], n: int = 2) -> list[Anchor]:
    draw = torch.Generator().manual_seed(5)

    def like(weight: torch.Tensor) -> torch.Tensor:
        return torch.rand(weight.shape, generator=draw, dtype=weight.dtype)

    return [
        Anchor({k: like(w) for k, w in weights.items()}, {k: like(w) for k, w in weights.items()})
        for _ in range(n)
    ]


def small_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_(True)
        for name, shape in {"a": (2, 3), "b": (4,)}.items()
    }


def task_loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return weights["a"].sin().sum() * weights["b"].square().sum()


def test_the_hook_adds_what_autograd_and_differences_say_the_penalty_adds() -> None:
    weights, strength, step = small_weights(), 7.0, 1e-6
    held = anchors(weights)
    whole = task_loss(weights) + strength * penalty(weights, held)
    expected = torch.autograd.grad(whole, list(weights.values()))
    with held_to(weights, held, strength):
        task_loss(weights).backward()
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            for place in range(weight.numel()):
                ends = []
                for sign in (1, -1):
                    moved = {k: v.clone() for k, v in weights.items()}
                    moved[name].view(-1)[place] += sign * step
                    ends.append(task_loss(moved) + strength * penalty(moved, held))
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(weight.grad.view(-1)[place]) == pytest.approx(float(slope), rel=1e-6)


def test_backward_passes_of_one_step_share_the_penalty() -> None:
    one, two = small_weights(), small_weights()
    held = anchors(one)
    with held_to(one, held, 3.0):
        task_loss(one).backward()
    with held_to(two, held, 3.0, parts=2):
        for _ in range(2):
            (task_loss(two) / 2).backward()
    for name in one:
        torch.testing.assert_close(one[name].grad, two[name].grad, rtol=1e-12, atol=1e-12)


def test_without_strength_or_anchors_or_afterwards_the_gradient_is_as_it_was() -> None:
    plain = small_weights()
    task_loss(plain).backward()
    for held, strength in ((anchors(plain), 0.0), ([], 9.0)):
        weights = small_weights()
        with held_to(weights, held, strength):
            task_loss(weights).backward()
        assert all(torch.equal(weights[name].grad, plain[name].grad) for name in plain)
    weights = small_weights()
    with held_to(weights, anchors(weights), 9.0):
        pass
    task_loss(weights).backward()
    assert all(torch.equal(weights[name].grad, plain[name].grad) for name in plain)


def test_anchors_of_other_weights_are_refused() -> None:
    weights = small_weights()
    with (
        pytest.raises(GemmateError, match="another adapter"),
        held_to({"a": weights["a"]}, anchors(weights), 1.0),
    ):
        pass


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Any, list[Any]]:
    base = load_base(ModelConfig())
    model = attach_lora(base.model, LoraSettings(dropout=0.5), seed=0)
    torch.manual_seed(0)
    for name, weight in trained_weights(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    rows = [Row(f"{i} and", f" {i + 1}, so", {}, i) for i in range(3)]
    encoded = [encode(row, base.tokenizer, max_length=32, over_long="drop") for row in rows]
    return model, base.tokenizer, encoded


def test_row_losses_are_those_that_evaluation_reports(adapted: Any) -> None:
    model, tokenizer, rows = adapted
    model.eval()
    found = [float(loss.detach()) for loss in row_losses(model, tokenizer, rows)]
    sums, _ = token_losses(model, tokenizer, rows, batch_size=2)
    assert found == pytest.approx(sums.tolist(), rel=1e-5)


def test_anchoring_leaves_the_model_as_it_was_and_is_found_again(
    adapted: Any, tmp_path: Path
) -> None:
    model, tokenizer, rows = adapted
    model.train()
    before = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    made = anchor_of(model, tokenizer, rows, file=tmp_path / "fisher.safetensors")
    assert model.training and all(w.grad is None for w in trained_weights(model).values())
    assert all(torch.equal(made.weights[k], w) for k, w in before.items())
    assert all(torch.equal(w.detach(), before[k]) for k, w in trained_weights(model).items())
    # Dropout is off, or two estimates would differ.
    again = anchor_of(model, tokenizer, rows)
    assert all(torch.equal(again.fisher[k], each) for k, each in made.fisher.items())
    assert sum(float(each.sum()) for each in made.fisher.values()) > 0
    found = anchor_of(model, tokenizer, [], file=tmp_path / "fisher.safetensors")
    assert all(torch.equal(found.fisher[k], each) for k, each in made.fisher.items())
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]
