"""Loading gemma-2b in 4 bits: from the full weights, or from the 4-bit copy that was saved of it.

A Gemma of the true shape with random weights is written to a temporary folder (5 GB, and 2 GB for
the copy). Each load is a process of its own, with its first forward; the two take turns. The peak
of the first counts the 4.7 GiB of weight files mapped into memory as well, which the system drops
when it needs the room.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import HIDDEN, parser_for, ratios, report, spread, where, write
from true_shape import make

LIMIT_GIB, FASTER = 4.0, 15


def held_gib() -> float:
    """The most GiB held so far."""
    from gemmate_lib import machine

    return machine.peak_memory_mib() / 2**10


def load(folder: Path, *, quantize: bool, save: Path | None = None) -> dict[str, Any]:
    """Seconds and peaks of one load and its first forward."""
    from gemmate_lib import machine, models
    from gemmate_lib.config import ModelConfig

    machine.prepare(seed=0, threads=1)
    import torch

    quantization, device = "nf4" if quantize else "none", machine.read_facts().device
    config = ModelConfig(
        id=str(folder), quantization=quantization, compute_dtype="bfloat16", device=device
    )
    began = time.perf_counter()
    base = models.load_base(config)
    loaded = time.perf_counter()
    found: dict[str, Any] = {"load s": loaded - began, "GiB before the forward": held_gib()}
    ids = torch.arange(4, 36, device=device)[None]
    with torch.inference_mode():
        logits = base.model(input_ids=ids).logits.float()
    found |= {"first forward s": time.perf_counter() - loaded, "GiB": held_gib()}
    found |= {"logits": logits[0, -1, :5].tolist(), "machine": where()}
    if save:
        models.save_4bit(base, save)
    return found


def fresh(*arguments: str) -> dict[str, Any]:
    """A part of this script in a process of its own, whose peak memory is its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where reloading is less than 15 times as fast, or peaks at 4 GiB or more."""
    parser = parser_for(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--load", type=Path, help=HIDDEN)
    parser.add_argument("--save", type=Path, help=HIDDEN)
    given = parser.parse_args(arguments)
    if given.load:
        copied = (given.load / "gemmate_base.json").is_file()
        print(json.dumps(load(given.load, quantize=not copied, save=given.save)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {"quantized again": [], "4-bit copy": []}
    with tempfile.TemporaryDirectory(prefix="loading_") as temporary:
        full, copy = Path(temporary, "full"), Path(temporary, "copy")
        full.mkdir()
        make(full)
        fresh("--load", str(full), "--save", str(copy))
        for _ in range(given.pairs):
            runs["quantized again"].append(fresh("--load", str(full)))
            runs["4-bit copy"].append(fresh("--load", str(copy)))
    took = {name: [run["load s"] for run in each] for name, each in runs.items()}
    keys = ("load s", "first forward s", "GiB before the forward", "GiB")
    rows = {name: {key: spread([r[key] for r in each]) for key in keys}
            for name, each in runs.items()}  # fmt: skip
    rows["4-bit copy"]["times as fast"] = ratios(took["quantized again"], took["4-bit copy"])
    report([*rows.items()])
    every = [run["logits"] for each in runs.values() for run in each]
    equal = all(logits == every[0] for logits in every)
    print(f"the same logits: {equal}")
    machine = runs["4-bit copy"][0]["machine"]
    write({"ways": rows, "same logits": equal, "machine": machine}, given.out)
    fast = rows["4-bit copy"]["times as fast"][0] >= FASTER
    small = rows["4-bit copy"]["GiB"][2] < LIMIT_GIB
    return 0 if fast and small and equal else 1


if __name__ == "__main__":
    sys.exit(main())
