"""Does fine-tuning gemma-2b fit into 8 GiB of memory, without a GPU?

A Gemma of the true shape with random weights (what it writes is noise, what it costs is not) is
written to a temporary directory (5 GB), then loaded in NF4 in a fresh process, trained for two
steps and saved. Prints a table; `--out FILE` writes JSON; fails where the peak reaches 8 GiB.
While it loads, the peak counts the 4.7 GiB of weight files mapped into memory as well, which the
system drops when it needs the room.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from common import HIDDEN, parser_for

LIMIT_GIB = 8.0
TOKENS = 32
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def make(directory: Path, layers: int = 18) -> None:
    """Write a random gemma-2b as bfloat16 safetensors, one shard a layer: never whole in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GemmaConfig

    from gemmate_lib.footprint import GEMMA_2B
    from gemmate_lib.models import EMBEDDED

    shape = GEMMA_2B | {"num_hidden_layers": layers}
    config = GemmaConfig(**shape, dtype="bfloat16", architectures=["GemmaForCausalLM"])
    config.save_pretrained(directory)
    for source in EMBEDDED["tiny-gemma"].glob("tokenizer*"):  # any tokenizer will do
        shutil.copy(source, directory)
    with torch.device("meta"):
        shapes = {
            n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    shards: dict[str, list[str]] = {}  # "model.layers.0" -> names of its tensors
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for i, names in enumerate(shards.values(), start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weights = {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02) for n in names}
        save_file(weights, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    content = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(content)


def peak_gib() -> float:
    """The most memory this process has held, in GiB (not machine.py's, which prefers the GPU's)."""
    from resource import RUSAGE_SELF, getrusage

    peak = getrusage(RUSAGE_SELF).ru_maxrss  # macOS counts in bytes, Linux in KiB
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def measure(directory: Path, dtype: Any) -> dict[str, Any]:
    """Load, two LoRA steps, save; seconds, bytes, and this process's peak memory in GiB."""
    seconds, peaks = {}, {}

    def lap(name: str, since: float) -> float:
        seconds[name] = round(time.perf_counter() - since, 2)
        peaks[name] = round(peak_gib(), 3)
        return time.perf_counter()

    start = time.perf_counter()
    from gemmate_lib import machine, models
    from gemmate_lib.config import LoraSettings, ModelConfig

    machine.prepare(seed=0, threads=int(os.environ.get("OMP_NUM_THREADS", "1")))
    import torch

    start = lap("import", start)
    config = ModelConfig(id=str(directory), quantization="nf4", compute_dtype=dtype, device="cpu")
    base = models.load_base(config)
    start = lap("load", start)
    model = models.attach_lora(base.model, LoraSettings(r=8), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids, losses = torch.randint(4, 2000, (1, TOKENS)), []
    for name in ("first step", "second step"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        start = lap(name, start)
    models.save_adapter(model, directory / "adapter", base.base)
    lap("save", start)
    predicted = models.predict_bytes(base.model.config, "nf4", dtype=dtype) / 2**30
    return {
        "device": base.device,
        "compute_dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seconds": seconds,
        "peak_rss_gib": peaks,
        "predicted_weights_gib": round(predicted, 3),
        "adapter_bytes": (directory / "adapter" / "adapter_model.safetensors").stat().st_size,
        "losses": losses,
    }


def run_fresh(*arguments: str) -> None:
    """Run a part of this script in a process of its own, whose peak memory is its own."""
    subprocess.run([sys.executable, __file__, *arguments], check=True)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'phase':<14}{'seconds':>10}{'peak GiB':>10}")
    for name, value in result["seconds"].items():
        print(f"{name:<14}{value:>10.2f}{result['peak_rss_gib'][name]:>10.2f}")
    print(f"\nadapter: {result['adapter_bytes'] / 2**20:.1f} MiB")
    print(f"weights in memory: {result['predicted_weights_gib']:.2f} GiB (predicted from shapes)")
    print(f"{result['device']}, {result['compute_dtype']}, {result['threads']} thread(s)")


def main() -> int:
    """Make the model, measure in a fresh process, report."""
    parser = parser_for(__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=18, help="fewer, to see that it runs")
    parser.add_argument("--make", type=Path, help=HIDDEN)
    parser.add_argument("--measure", type=Path, help=HIDDEN)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers)
        return 0
    if options.measure:
        options.out.write_text(json.dumps(measure(options.measure, options.dtype), indent=2))
        return 0
    with tempfile.TemporaryDirectory(prefix="true_shape_") as directory:
        figures = Path(directory) / "figures.json"
        run_fresh("--make", directory, "--layers", str(options.layers))
        run_fresh("--measure", directory, "--dtype", options.dtype, "--out", str(figures))
        result = json.loads(figures.read_text())
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    peak = max(result["peak_rss_gib"].values())
    print(f"peak {peak:.2f} GiB, limit {LIMIT_GIB:.0f} GiB: {'ok' if peak < LIMIT_GIB else 'over'}")
    return int(peak >= LIMIT_GIB)


if __name__ == "__main__":
    sys.exit(main())
