"""A LoRA step against the limit: the arithmetic and the bytes it cannot do without.

How long the products of a step take at the rate that this machine multiplies matrices of the
model's own shapes, and its bytes at the rate that it copies; the slower of the two is the floor.
Model FLOPs utilisation is the floor of the arithmetic over the step as it was measured: ours, and
the original recipe's, five times by turns.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import parser_for, report, spread, where, write
from training import PAIRS, SIZES, lengths_of, models_here, run, settings_of

ARMS = "original", "ours", "weights in 32 bits"


def linear(text: Any) -> list[tuple[int, int]]:
    """In and out of the seven projections of a layer."""
    hidden, inner = text.hidden_size, text.intermediate_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    return [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
            (hidden, inner), (hidden, inner), (inner, hidden)]  # fmt: skip


def flops(text: Any, rows: Sequence[int], rank: int) -> float:
    """Floating-point operations of a step on rows of these lengths, padding left out.

    Frozen weights: forward, and the gradient of the input; the adapter: that of its weights too;
    attention: scores and mixture over the tokens before, backward twice as much.
    """
    tokens, layers = sum(rows), text.num_hidden_layers
    frozen = sum(a * b for a, b in linear(text)) * layers + text.vocab_size * text.hidden_size
    adapter = sum(rank * (a + b) for a, b in linear(text)) * layers
    width = text.num_attention_heads * text.head_dim
    attention = sum(n * n for n in rows) * width * layers  # half of the square, two products
    return tokens * (4 * frozen + 6 * adapter) + 3 * 2 * attention


def least_bytes(text: Any, rows: Sequence[int]) -> float:
    """Bytes of a step at least: 4-bit weights read twice; a layer's outputs written, read once."""
    layers = text.num_hidden_layers
    weights = 2 * sum(a * b for a, b in linear(text)) * layers * 4.5 / 8
    head = 2 * 4 * text.vocab_size * text.hidden_size
    outputs = 2 * 4 * sum(rows) * layers * sum(b for _, b in linear(text))
    return weights + head + outputs


def seconds_of(work: Callable[[], object]) -> float:
    """The median of seven, after one that does not count."""
    import torch

    gpu, times = torch.cuda.is_available(), []
    for _ in range(8):
        began = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return spread(times[1:])[0]


def rates(text: Any, tokens: int, dtype: Any, device: str) -> dict[str, float]:
    """GFLOP/s of the widest projection on so many tokens, of a large square, and GB/s of a copy."""
    import torch

    def products(n: int, inner: int, out: int) -> float:
        a, b = torch.randn(n, inner, device=device), torch.randn(out, inner, device=device)
        a, b = a.to(dtype), b.to(dtype)
        return 2e-9 * n * inner * out / seconds_of(lambda: torch.nn.functional.linear(a, b))

    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    copied = 2e-9 * source.nbytes / seconds_of(lambda: target.copy_(source))
    shape = products(tokens, text.hidden_size, text.intermediate_size)
    return {"of these shapes": shape, "of 2048 x 2048": products(2048, 2048, 2048), "copy": copied}


def compare(model: str, steps: int, folder: Path) -> dict[str, Any]:
    """The floors of a step, and each arm against them."""
    import torch

    from gemmate_lib.models import base_settings

    found = settings_of(model, "ours", steps)
    lengths = lengths_of(model)
    batches = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    text = base_settings(model).get_text_config()
    work = sum(flops(text, rows, found.lora.r) for rows in batches) / len(batches)
    moved = sum(least_bytes(text, rows) for rows in batches) / len(batches)
    tokens = sum(map(sum, batches)) // len(batches)
    dtype = getattr(torch, found.model.compute_dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = rates(text, tokens, dtype, device)
    floors = {"products ms": 1e-6 * work / rate["of 2048 x 2048"],
              "products of these shapes ms": 1e-6 * work / rate["of these shapes"],
              "bytes ms": 1e-6 * moved / rate["copy"]}  # fmt: skip
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(PAIRS):
        for arm in ARMS:
            seconds[arm].append(run(model, arm, steps, folder)[0])
    arms = {
        arm: {
            "ms a step": spread([1000 * s for s in each]),
            "GFLOP/s": spread([1e-9 * work / s for s in each]),
            "of the matrix rate": spread([floors["products ms"] / (1000 * s) for s in each]),
            "of these shapes' rate": spread(
                [floors["products of these shapes ms"] / (1000 * s) for s in each]
            ),
        }
        for arm, each in seconds.items()
    }
    step = {"GFLOP": 1e-9 * work, "MB": 1e-6 * moved, "tokens": tokens}
    return {"a step": step, "rates": rate, "floors": floors, "arms": arms}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rates and the steps."""
    given = parser_for(__doc__).parse_args(arguments)
    from gemmate_lib import machine

    machine.prepare(seed=0, threads=1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in models_here(folder).items():
            found[name] = compare(model, SIZES[name], folder)
            print(f"\n{name}")
            report([(key, found[name][key]) for key in ("a step", "rates", "floors")])
            report([*found[name]["arms"].items()])
    write({"models": found, "machine": where()}, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
