"""4-bit on CPUs: evaluating, generating, saving or merging must never change later training.

bitsandbytes 0.50.2 repacks 4-bit weights in the first eval forward on CPUs with AVX512-BF16, for
a faster kernel; that kernel has no gradient. Other CPUs are made to look like such a one here:
bitsandbytes' own repacking runs, and its kernel is imitated in Python.
"""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from peft import get_peft_model_state_dict

from gemmate_lib import models
from gemmate_lib.config import LoraSettings, ModelConfig
from gemmate_lib.generate import generate_texts
from gemmate_lib.models import (
    attach_lora,
    load_adapter,
    load_base,
    merge_adapter,
    save_4bit,
    save_adapter,
)

IDS = torch.tensor([[2, 30, 40, 50, 60, 70, 80, 90], [2, 95, 85, 75, 65, 55, 45, 35]])
pytestmark = pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel")


def imitated_kernel(a, weight, out=None, transposed_A=False, transposed_B=False, state=None):
    """What the AVX512-BF16 kernel computes: right for repacked weights, and without a gradient."""
    plain = copy.copy(state)
    plain.original_nested = False
    weight, plain = functional._convert_weight_packed_for_cpu_inverse(weight.data, plain)
    plain.absmax = state.absmax.T.reshape(-1).float()
    with torch.no_grad():
        return torch.nn.functional.linear(a, functional.dequantize_4bit(weight, plain).to(a.dtype))


@pytest.fixture
def avx512_bf16(monkeypatch):
    """A CPU on which bitsandbytes repacks."""
    if functional.has_avx512bf16():
        return  # a real one, with the real kernel
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(functional, "gemv_4bit", imitated_kernel)


@pytest.fixture
def no_guard(monkeypatch):
    monkeypatch.setattr(models, "guard_4bit_cpu", lambda model: 0)


def loaded(quantization="nf4"):
    return load_base(ModelConfig(quantization=quantization, device="cpu"))


def train(directory, *, interrupted, quantization="nf4"):
    """Four steps; between the second and the third, everything that only looks at the model."""
    base = loaded(quantization)
    model = attach_lora(base.model, LoraSettings(), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(4):
        if interrupted and step == 2:
            model.eval()
            with torch.no_grad():
                model(input_ids=IDS, labels=IDS)
            model.train()
            generate_texts(model, base.tokenizer, ["Quote: a", "b"], max_new_tokens=3)
            save_adapter(model, directory, base.base)
            merge_adapter(directory, "tiny-gemma")
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def gradients(model):
    model.train()
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def differing(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_every_4bit_layer_is_guarded(avx512_bf16, tmp_path, quantization):
    base = loaded(quantization)
    save_4bit(base, tmp_path / "copy")
    model = attach_lora(base.model, LoraSettings(), seed=0)
    save_adapter(model, tmp_path / "adapter", base.base)
    again = load_base(ModelConfig(id=str(tmp_path / "copy"), device="cpu"))
    for guarded in (model, again.model, load_adapter(again, tmp_path / "adapter")):
        layers = [m for m in guarded.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_looking_at_a_model_never_changes_its_training(avx512_bf16, tmp_path, quantization):
    straight = train(tmp_path, interrupted=False, quantization=quantization)
    looked_at = train(tmp_path, interrupted=True, quantization=quantization)
    assert len(straight) > 0 and differing(straight, looked_at) == []


def test_without_the_guard_it_does(avx512_bf16, no_guard, tmp_path):
    """So that the test above can fail."""
    straight = train(tmp_path, interrupted=False)
    looked_at = train(tmp_path, interrupted=True)
    assert len(differing(straight, looked_at)) == len(straight)


def test_and_the_loss_does_not_show_it(avx512_bf16, no_guard):
    """Which is why a guard is needed: same loss to three digits, most gradients far off."""
    model = attach_lora(loaded().model, LoraSettings(), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    loss, right = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    later, wrong = gradients(model)
    off = [((right[n] - wrong[n]).norm() / right[n].norm()).item() for n in right]
    assert later == pytest.approx(loss, rel=1e-3)
    assert sum(o > 0.1 for o in off) > 0.8 * len(off)


def test_canary_upstream_still_has_the_defect():
    """Fails when bitsandbytes has mended it: delete `guard_4bit_cpu` and this file then."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer = layer.to("cpu")  # quantizes
    layer.support_avx512bf16_for_cpu = True  # every CPU repacks if told that it can

    def gradient():
        x = torch.ones(1, 64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch may warn that the kernel has no gradient
            layer.train()(x).sum().backward()
        return x.grad

    before = gradient()
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    after = gradient()
    mended = after is not None and torch.allclose(before, after)
    assert not mended, "bitsandbytes no longer needs guard_4bit_cpu: delete it, and this file"
