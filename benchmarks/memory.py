"""What a training step needs in memory: predicted from the configuration, and measured.

gemma-2b's true shape with random weights. Each configuration is a process of its own: the base is
loaded, two steps of full rows are trained, and the peak from the load on is read: the system's
(VmHWM, weight files mapped into memory included), the allocator's on a GPU. On a CPU freed memory
is given back at once for the measurement; the last column is what is held where the C library
keeps some of it for later, as it does by default. Two layers stand for eighteen where every weight
is trained, which no laptop holds, and in bfloat16, which few CPUs can multiply.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from common import (
    HIDDEN,
    full_rows,
    parser_for,
    peak,
    report,
    resident,
    start_peak,
    where,
    write,
)
from true_shape import make

WITHIN = 0.10
# Name -> rows, tokens, and settings beside the recipe's: rank 8, AdamW, float32, NF4.
CONFIGURATIONS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "1 x 128": (1, 128, {}),
    "4 x 128": (4, 128, {}),
    "2 x 256": (2, 256, {}),
    "4 x 128, recomputed": (4, 128, {"training.gradient_checkpointing": True}),
    "1 x 128, rank 128": (1, 128, {"lora.r": 128}),
    "1 x 128, rank 128, 8-bit state": (
        1, 128, {"lora.r": 128, "training.optim": "paged_adamw_8bit"}),
    "1 x 128, not quantized": (1, 128, {"model.quantization": "none"}),
    "1 x 64, 2 layers, not quantized, bfloat16": (
        1, 64, {"model.quantization": "none", "model.compute_dtype": "bfloat16"}),
    "1 x 128, 2 layers, every weight": (
        1, 128, {"model.quantization": "none", "method": "full"}),
}  # fmt: skip
AS_IT_RUNS = "1 x 128", "1 x 128, rank 128"  # measured once more, with what the C library keeps


def experiment(name: str, folder: Path) -> Any:
    """The settings of a configuration on the model in a folder."""
    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    rows, tokens, more = CONFIGURATIONS[name]
    facts = machine.read_facts()
    fixed = {"model": str(folder), "model.device": facts.device, "model.quantization": "nf4",
             "model.compute_dtype": "float32", "training.recipe": "fast", "training.max_steps": 2,
             "training.eval_every": 0, "training.batch_size": rows, "training.warmup_steps": 0,
             "dataset.max_length": tokens, "dataset.over_long": "cut"}  # fmt: skip
    return resolve("quotes", facts=facts, profile="tiny", overrides=fixed | more).experiment


def one(name: str, folder: Path, *, kept: bool) -> dict[str, Any]:
    """Train a configuration for two steps; GiB at the peak."""
    from gemmate_lib import machine, trainer
    from gemmate_lib.adapters import attach_lora, train_all
    from gemmate_lib.models import load_base

    found = experiment(name, folder)
    with mock.patch.object(machine, "_keep_memory", machine._keep_memory if kept else lambda: None):
        machine.prepare(seed=0, threads=1)
    before = resident("VmRSS")
    base = load_base(found.model)
    tuned = (train_all(base.model) if found.method == "full"
             else attach_lora(base.model, found.lora, seed=0))  # fmt: skip
    start_peak()
    with tempfile.TemporaryDirectory() as out:
        trainer.train(tuned, base.tokenizer, full_rows(2 * found.training.batch_size), found,
                      Path(out))  # fmt: skip
    return {"measured GiB": peak(above=before) / 2**30, "machine": where()}


def foretold(name: str, folder: Path) -> dict[str, Any]:
    """GiB as the library predicts them, and what they are for."""
    from gemmate_lib.footprint import predict
    from gemmate_lib.models import base_settings

    found = predict(experiment(name, folder), base_settings(str(folder)))
    parts = {part: value / 2**30 for part, value in vars(found).items()}
    return {"predicted GiB": found.total / 2**30, "parts": parts}


def fresh(*arguments: str) -> dict[str, Any]:
    """A configuration in a process of its own, whose peak memory is its own."""
    command = [sys.executable, __file__, *arguments]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def models(folder: Path) -> dict[str, Path]:
    """A folder for each model, as it would be loaded; what is there already is taken as it is."""
    from gemmate_lib import machine, models
    from gemmate_lib.config import ModelConfig

    paths = {name: folder / name for name in ("full", "small", "nf4")}
    machine.prepare(seed=0, threads=1)
    for name, layers in (("full", 18), ("small", 2)):
        if not paths[name].is_dir():
            paths[name].mkdir(parents=True)
            make(paths[name], layers)
    if not paths["nf4"].is_dir():
        config = ModelConfig(id=str(paths["full"]), quantization="nf4", device="cpu")
        models.save_4bit(models.load_base(config), paths["nf4"])
    return paths


def folder_of(name: str, paths: dict[str, Path]) -> Path:
    """Which model a configuration is for."""
    if "2 layers" in name:
        return paths["small"]
    return paths["full" if "not quantized" in name else "nf4"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where fewer than six predictions hold within a tenth."""
    parser = parser_for(__doc__)
    parser.add_argument("--only", help="names, joined by semicolons")
    parser.add_argument("--models", type=Path, help="folder that keeps the models, 15 GB")
    parser.add_argument("--one", help=HIDDEN)
    parser.add_argument("--kept", action="store_true", help=HIDDEN)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(one(given.one, given.models, kept=given.kept)))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="memory_") as temporary:
        paths = models(given.models or Path(temporary))
        for name in given.only.split(";") if given.only else CONFIGURATIONS:
            folder = folder_of(name, paths)
            asked = ["--one", name, "--models", str(folder)]
            measured = fresh(*asked)
            machine, row = measured.pop("machine"), foretold(name, folder) | measured
            row["measured / predicted"] = row["measured GiB"] / row["predicted GiB"]
            if name in AS_IT_RUNS:
                row["as it runs, GiB"] = fresh(*asked, "--kept")["measured GiB"]
            rows[name] = row
            told = {key: value for key, value in row.items() if key != "parts"}
            report([(f"{name:<42}", told)])
            sys.stdout.flush()
            write({"configurations": rows, "machine": machine}, given.out)
    held = [abs(row["measured / predicted"] - 1) <= WITHIN for row in rows.values()]
    print(f"within {WITHIN:.0%}: {sum(held)} of {len(held)}")
    return int(sum(held) < 6)


if __name__ == "__main__":
    sys.exit(main())
