"""What training needs in memory: the parts, one by one, against what is really held."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GemmaConfig, GPT2Config, LlamaConfig, Trainer
from typer.testing import CliRunner

from gemmate_lib.adapters import attach_lora
from gemmate_lib.cli import app
from gemmate_lib.config import GemmateError
from gemmate_lib.doctor import USABLE, most_rows
from gemmate_lib.footprint import ADAM_STATE, GEMMA_2B, count, of_rows, predict
from gemmate_lib.models import base_settings, load_base

ROOT = Path(__file__).parents[2]
Make = Callable[..., Any]


def gemma(hidden: int, inner: int, heads: int, keys: int, width: int) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=width,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 256, 4, 1, 32), (96, 128, 2, 2, 16), (32, 512, 8, 4, 8)])
@pytest.mark.parametrize("r", [4, 16])
def test_gemmas_layer_keeps_what_one_counts_by_hand(
    shape: tuple[int, ...], r: int, experiment: Make
) -> None:
    """Floats a token: residual and normed streams twice, queries and mixture, keys and values,

    four of the MLP, what lies between A and B in seven adapters, the sums of softmax and norms.
    """
    hidden, inner, heads, keys, width = shape
    floats = 4 * hidden + 2 * (heads + keys) * width + 4 * inner + 7 * r + heads + 2
    counted = count(gemma(*shape), experiment(lora__r=r))
    assert counted.b == pytest.approx(4 * floats, rel=1e-6)
    assert counted.c == pytest.approx(0, abs=1e-6)
    linear = [(hidden, heads * width), (hidden, keys * width), (hidden, keys * width),
              (heads * width, hidden), (hidden, inner), (hidden, inner),
              (inner, hidden)]  # fmt: skip
    assert counted.trained == 3 * r * sum(a + b for a, b in linear)


def test_half_precision_keeps_less_and_attention_that_is_not_fused_a_square(
    experiment: Make,
) -> None:
    shape = gemma(64, 256, 4, 1, 32)
    for dtype in ("bfloat16", "float16"):
        half = count(shape, experiment(model__compute_dtype=dtype, model__device="auto"))
        assert 0.5 < half.b / count(shape, experiment()).b < 0.7
        assert half.a < 2 * half.trained  # adapters cast, and no frozen weight
    eager = Gemma2Config(**{k: getattr(shape, k) for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim")})  # fmt: skip
    eager._attn_implementation = "eager"
    assert count(eager, experiment()).c > 4 * 4  # one score a head and pair of tokens, at least


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2),
        GPT2Config(vocab_size=256, n_embd=64, n_layer=4, n_head=4, n_positions=256),
    ],
    ids=["llama", "gpt2"],
)  # fmt: skip
def test_other_families(config: Any, experiment: Make) -> None:
    small, large = (predict(experiment(batch_size=b), config) for b in (2, 8))
    assert small.activations > 0 and large.activations == pytest.approx(
        4 * small.activations, rel=0.01
    )
    assert small.base == large.base > 0 and small.trained == large.trained


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_real_forward_keeps_what_was_foretold(quantization: str, experiment: Make) -> None:
    found = experiment(model__quantization=quantization, batch_size=3, dataset__max_length=48)
    base = load_base(found.model)
    model = attach_lora(base.model, found.lora, seed=0).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Any] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(4, 2000, (3, 48))
    inner = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        inner(input_ids=ids, use_cache=False)
    really = sum(storage.nbytes() for storage in held.values())
    config = base_settings(found.model.id)
    foretold = of_rows(found, config, count(config, found), 3)
    assert foretold["activations"] == pytest.approx(really, rel=0.03)


@pytest.mark.parametrize(("optim", "tolerance"), [("adamw_torch_fused", 0.001),
                                                  ("adamw_bnb_8bit", 0.05)])  # fmt: skip
def test_the_optimizers_state(optim: str, tolerance: float, experiment: Make) -> None:
    from transformers import TrainingArguments

    # bitsandbytes keeps what is below 4,096 values in 32 bits: a layer above it.
    weight = torch.nn.Parameter(torch.zeros(512, 512))
    arguments = TrainingArguments(output_dir="x", optim=optim, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([weight], **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
    held = sum(t.nbytes for t in tensors)
    assert held == pytest.approx(ADAM_STATE[optim] * weight.numel(), rel=tolerance)


def test_an_optimizer_that_is_not_known_is_said(experiment: Make) -> None:
    with pytest.raises(GemmateError, match=r"The state of lion_8bit is not known here\. Known: "):
        predict(experiment(optim="lion_8bit"), gemma(64, 256, 4, 1, 32))


def test_what_recomputing_and_tuning_every_weight_change(experiment: Make) -> None:
    config = gemma(64, 256, 4, 1, 32)
    plain, again = (
        predict(experiment(training__gradient_checkpointing=on), config) for on in (False, True)
    )
    assert again.activations < 0.7 * plain.activations and again.base == plain.base
    full = predict(experiment(method="full", model__quantization="none"), config)
    assert full.base == 0 and full.optimizer == 2 * full.trained
    words = 4 * config.vocab_size * config.hidden_size  # the tied head's, before they are added
    assert full.gradients == max(0, full.trained + words - full.activations)
    twice = predict(experiment(gradient_accumulation_steps=2), config)
    assert twice.gradients == twice.trained and plain.gradients == 0  # from the batch before


def test_the_most_rows_that_fit(experiment: Make) -> None:
    config, found = GemmaConfig(**GEMMA_2B), experiment(model__quantization="nf4")
    counted = count(config, found)
    footprint = predict(found, config, counted)
    rooms = [gib * 2**30 for gib in (2, 4, 8, 16)]
    rows = [most_rows(found, config, counted, footprint, room) for room in rooms]
    assert rows[0] == 0 and rows == sorted(rows) and rows[-1] >= 8
    for room, most in zip(rooms[1:], rows[1:], strict=True):
        fixed = footprint.base + footprint.trained + footprint.optimizer
        assert fixed + sum(of_rows(found, config, counted, most).values()) <= room
        assert fixed + sum(of_rows(found, config, counted, 2 * most).values()) > room


def test_the_doctor_says_what_fits() -> None:
    told = CliRunner().invoke(app, ["doctor", "--fit", "tiny-gemma", "--set", "lora.r=4"])
    lines = told.output.splitlines()
    assert lines[0].startswith("tiny-gemma in float32 on a ")
    assert lines[1].startswith("MiB at the peak of a step of 16 x 128 tokens")
    assert len(lines) == 3 + 8
    for line in lines[3:]:
        base, trained, activations, working, total, rows = line.split()[-6:]
        parts = map(float, (base, trained, activations, working))
        assert sum(parts) == pytest.approx(float(total), abs=0.03) and int(rows) >= 16
    assert lines[3].startswith("LoRA, r=4") and lines[-1].startswith("every weight")


def test_the_prediction_holds_in_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks/memory.json").read_text("utf-8"))["configurations"]
    held = [abs(row["measured / predicted"] - 1) <= 0.1 for row in found.values()]
    assert sum(held) >= 6
    for row in found.values():
        assert sum(row["parts"].values()) == pytest.approx(row["predicted GiB"])
        if "as it runs, GiB" in row:  # what the doctor leaves room for
            assert row["as it runs, GiB"] * USABLE["cpu"] < row["predicted GiB"]
