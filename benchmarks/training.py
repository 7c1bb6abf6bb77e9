"""The original recipe against ours, and each lever alone: the same steps, how much faster?

The original recipe: NF4, LoRA of rank 8, one row at a time and four to an optimizer step, AdamW
with its state in 8 bits. Every arm trains the same rows from the same start, in float32 arithmetic;
the arms take turns, in one process, and a ratio is that of the times a row, side by side. The
models: the embedded tiny Gemma, and a random one of 512 x 8 layers; gemma-2b's shape on a GPU.
"""

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from common import parser_for, random_gemma, ratios, report, spread, timed, where, write
from true_shape import make

PAIRS = 5
ORIGINAL = {"training.recipe": "original", "training.batch_size": 1,
            "training.gradient_accumulation_steps": 4, "training.optim": "paged_adamw_8bit",
            "model.quantization": "nf4"}  # fmt: skip
REAL = {"training.batch_size": 4, "training.gradient_accumulation_steps": 1}
ASKED_FOR = "ours, compiled"  # minutes before the first step: left out unless it is named
# Name -> what it changes in the original recipe.
ARMS: dict[str, dict[str, Any]] = {
    "original": {},
    "four rows at once": REAL,
    "fused AdamW, 32 bits": {"training.optim": "adamw_torch_fused"},
    "like lengths": {"training.group_by_length": True},
    "two threads": {"threads": 2},
    "activations recomputed": {"training.gradient_checkpointing": True},
    "weights in 32 bits": {"model.quantization": "none"},
    "ours": REAL | {"training.optim": "adamw_torch_fused"},
    "ours, like lengths": REAL
    | {"training.optim": "adamw_torch_fused", "training.group_by_length": True},
    "ours, packed": REAL | {"training.optim": "adamw_torch_fused", "training.packing": True},
    ASKED_FOR: REAL | {"training.optim": "adamw_torch_fused", "trl.torch_compile": True},
}
# What only a GPU has; left out where its package is missing.
GPU_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, Liger": ("liger_kernel", ARMS["ours"] | {"trl.use_liger_kernel": True}),
    "ours, FlashAttention": ("flash_attn", ARMS["ours"] | {"model.attention": "flash_attention_2"}),
}
# Other rows to a step, or other weights.
OTHER_STEPS = ("like lengths", "weights in 32 bits", "ours, like lengths", "ours, packed")
SIZES = {"tiny": 32, "512 x 8": 10, "gemma-2b": 20}  # steps of a run


def wide(folder: Path) -> str:
    """The random Gemma of 512 x 8 layers."""
    return random_gemma(folder, 512, 8)


def models_here(folder: Path) -> dict[str, str]:
    """The models that fit this machine: two small ones, or gemma-2b's shape on a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"tiny": "tiny-gemma", "512 x 8": wide(folder / "wide")}
    (folder / "gemma-2b").mkdir()
    make(folder / "gemma-2b")
    return {"gemma-2b": str(folder / "gemma-2b")}


def arms_here() -> list[str]:
    """Every arm that this machine has the means for, and does not wait minutes for."""
    import torch

    if torch.cuda.is_available():
        for name, (package, settings) in GPU_ARMS.items():
            if importlib.util.find_spec(package):
                ARMS[name] = settings
    return [arm for arm in ARMS if arm != ASKED_FOR]


def settings_of(model: str, arm: str, steps: int) -> Any:
    """The experiment of an arm."""
    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    facts = machine.read_facts()
    half = "bfloat16" if facts.device == "cuda" else "float32"
    fixed = {"model": model, "training.max_steps": steps, "training.eval_every": 0,
             "training.learning_rate": 2e-4, "model.compute_dtype": half, "threads": 1,
             "model.device": facts.device, "dataset": "tiny_quotes"}  # fmt: skip
    given = {key: value for key, value in ARMS[arm].items() if not key.startswith("trl.")}
    overrides = fixed | ORIGINAL | given
    return resolve("quotes", facts=facts, profile="tiny", overrides=overrides).experiment


def lengths_of(model: str) -> list[int]:
    """The lengths of the training rows, in tokens, in the order of the data."""
    from gemmate_lib.models import load_tokenizer
    from gemmate_lib.rows import encode_all
    from gemmate_lib.sft import load_splits

    tokenizer, rows = load_tokenizer(model), load_splits(settings_of(model, "ours", 1)).train
    encoded = encode_all(rows, tokenizer, max_length=128, over_long="drop")
    return [len(ids.input_ids) for ids in encoded]


def run(model: str, arm: str, steps: int, folder: Path) -> tuple[float, list[float]]:
    """Seconds of a step, and the loss after each."""
    import torch

    from gemmate_lib import trl_trainer
    from gemmate_lib.sft import load_splits

    found = settings_of(model, arm, steps)
    extra = {key[4:]: value for key, value in ARMS[arm].items() if key.startswith("trl.")}
    arguments = trl_trainer._arguments

    def with_extra(*given: Any, **named: Any) -> Any:
        return dataclasses.replace(arguments(*given, **named), **extra)

    torch.compiler.reset()  # nothing compiled before helps this run
    with mock.patch.object(trl_trainer, "_arguments", with_extra):
        return timed(found, load_splits(found), folder / "trainer")


def compare(model: str, steps: int, arms: Sequence[str], folder: Path) -> dict[str, Any]:
    """Every arm in turn, PAIRS times over."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    losses: dict[str, list[float]] = {}
    for _ in range(PAIRS):
        for arm in arms:
            took, losses[arm] = run(model, arm, steps, folder)
            seconds[arm].append(took)
    lengths, found = lengths_of(model), {}
    for arm in arms:
        packed = "packed" in arm  # four sequences of 128 tokens hold more than four rows
        rows = 4 * 128 * len(lengths) / sum(lengths) if packed else 4
        gaps = [abs(a - b) for a, b in zip(losses[arm], losses["original"], strict=True)]
        found[arm] = {
            "ms a step": spread([1000 * s for s in seconds[arm]]),
            "rows a step": rows,
            "times as fast": ratios(
                [s / 4 for s in seconds["original"]], [s / rows for s in seconds[arm]]
            ),
            "largest loss gap": "other steps" if arm in OTHER_STEPS else max(gaps),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where ours is less than 1.5 times as fast, or takes other steps."""
    parser = parser_for(__doc__)
    parser.add_argument("--arms", help=f"names, joined by semicolons; default: no '{ASKED_FOR}'")
    given = parser.parse_args(arguments)
    from gemmate_lib import machine

    machine.quiet()
    arms = ["original", *given.arms.split(";")] if given.arms else arms_here()
    found: dict[str, Any] = {"pairs": PAIRS, "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in models_here(folder).items():
            found["models"][name] = compare(model, SIZES[name], arms, folder)
            print(f"\n{name}, {SIZES[name]} steps of four rows")
            report([*found["models"][name].items()])
    found["machine"] = where()
    write(found, given.out)
    ours = [model["ours"] for model in found["models"].values()]
    return int(any(o["times as fast"][0] < 1.5 or o["largest loss gap"] > 1e-3 for o in ours))


if __name__ == "__main__":
    sys.exit(main())
