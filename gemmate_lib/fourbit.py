"""4-bit weights: how they are stored, what they need in memory, and the guard they need on CPUs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.adapters import RECORD, target_modules, write_json

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from gemmate_lib.models import LoadedModel


def nf4_settings(quantization: str, dtype: Any, *, sharded: bool = False) -> "BitsAndBytesConfig":
    """NF4 and double quantization (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

    sharded: store the codes as numbers of the dtype, as FSDP needs them; the same bits.
    """
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quantization == "nf4-double",
        bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
    )


def guard_4bit_cpu(model: Any) -> int:
    """Keep 4-bit layers from repacking their weights in eval mode; how many there are.

    bitsandbytes 0.50.2, nn/modules.py, `Linear4bit.forward`: on CPUs with AVX512-BF16 one eval
    forward repacks the weights, and every later backward and merge reads them wrongly. Delete
    this when the canary in tests/integration/test_four_bit_guard.py fails.
    """
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def save_4bit(loaded: "LoadedModel", directory: str | Path) -> None:
    """Save a base as it lies in memory; `load_base(ModelConfig(id=directory))` reads it again."""
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    write_json(Path(directory) / RECORD, loaded.base)


def predict_bytes(model: Any, quantization: str, *, dtype: str = "float32") -> int:
    """Bytes of a base's weights once loaded, from its shapes alone.

    model: a transformers config or a model. Measured in NF4 (blocks of 64 weights, one scale
    each): 4.5 bits a weight, or 4.127 with double quantization; embeddings, norms and biases
    stay in `dtype`. Activations, gradients and optimizer states come on top.
    """
    import torch
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    total, width = 0, getattr(torch, dtype).itemsize
    targets = set(target_modules(model, every=True)) if quantization != "none" else set()
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in targets:
            total += _nf4_bytes(parameter.numel(), double=quantization == "nf4-double")
        else:
            total += parameter.numel() * width
    return total


def _nf4_bytes(n: int, *, double: bool) -> int:
    scales = -(-n // 64)
    # Scales in fp32; or in 8 bits, with a fp32 scale per 256 of them, a table and an offset.
    return n // 2 + 64 + (scales + 4 * -(-scales // 256) + 1028 if double else 4 * scales)
