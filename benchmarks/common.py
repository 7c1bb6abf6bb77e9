"""What the benchmarks share: medians with their ranges, paired ratios, a table, a JSON file."""

import argparse
import json
import re
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

HIDDEN = argparse.SUPPRESS  # the help of an option that a script calls itself with
WARM = 2  # steps that are not timed
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    ordered = sorted(values)
    return [ordered[len(ordered) // 2], ordered[0], ordered[-1]]


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Median, smallest and largest of first / second, pair by pair."""
    return spread([a / b for a, b in zip(first, second, strict=True)])


def where() -> dict[str, Any]:
    """The machine and the versions that the figures are from."""
    from gemmate_lib import machine

    return machine.describe() | {"versions": {name: metadata.version(name) for name in PACKAGES}}


def with_block(text: str, name: str, block: str) -> str:
    """Put a generated block between the marks <!-- name --> and <!-- /name --> of Markdown."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)


def random_gemma(folder: Path, hidden: int, layers: int) -> str:
    """A random Gemma, heads of 128 and an inner width of 4 x hidden, with the tiny's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GemmaConfig

    from gemmate_lib.models import EMBEDDED

    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": 1, "head_dim": 128}
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=2048, bos_token_id=2, eos_token_id=1, pad_token_id=0,
                         **shape, **heads)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for source in EMBEDDED["tiny-gemma"].glob("tokenizer*"):
        shutil.copy(source, folder)
    return str(folder)


def full_rows(number: int) -> Any:
    """Rows that are longer than any limit here, to be cut at `dataset.max_length`."""
    from gemmate_lib.data import Row, Splits

    rows = [Row("", f"{i} " + "a word and another " * 400, {}, i) for i in range(number)]
    return Splits(rows, [], [], report=mock.Mock(), form=mock.Mock())


def timed(experiment: Any, splits: Any, folder: Path) -> tuple[float, list[float]]:
    """Train as the course does; seconds of a step, and the loss after each."""
    from transformers import TrainerCallback

    from gemmate_lib import machine, trainer
    from gemmate_lib.adapters import attach_lora
    from gemmate_lib.models import load_base

    machine.prepare(seed=0, threads=experiment.threads)
    base = load_base(experiment.model)
    tuned = attach_lora(base.model, experiment.lora, seed=0)
    clock, times = TrainerCallback(), [0.0]
    clock.on_step_end = lambda *_, **__: times.append(time.perf_counter())
    build = trainer.build_trainer

    def clocked(*given: Any, **named: Any) -> Any:
        made = build(*given, **named)
        made.add_callback(clock)
        return made

    with mock.patch.object(trainer, "build_trainer", clocked):
        log = trainer.train(tuned, base.tokenizer, splits, experiment, folder)
    losses = [record["loss"] for record in log if "loss" in record]
    return (times[-1] - times[WARM]) / (len(times) - 1 - WARM), losses


def resident(key: str) -> int:
    """Bytes of this process, from /proc: VmRSS, or VmHWM, the most since it was set back."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def start_peak() -> None:
    """Forget the most memory that was held so far."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # sets VmHWM back


def peak(*, above: int = 0) -> int:
    """The most bytes since `start_peak`: of the GPU's allocator, or above some resident ones."""
    import torch

    gpu = torch.cuda.is_available()
    return torch.cuda.max_memory_allocated() if gpu else resident("VmHWM") - above


def shown(value: Any) -> str:
    """A spread as `median (smallest to largest)`, numbers with three digits."""
    if isinstance(value, list) and len(value) == 3:
        middle, low, high = map(shown, value)
        return f"{middle} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser


def report(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print a table: a line for each row, a column for each of its values."""
    columns = list(dict.fromkeys(key for _, values in rows for key in values))
    width = max(len(name) for name, _ in rows)
    print(" " * width, *(f"{column:>24}" for column in columns))
    for name, values in rows:
        print(f"{name:<{width}}", *(f"{shown(values.get(column, '')):>24}" for column in columns))


def write(found: dict[str, Any], out: Path | None) -> None:
    """Write the results where they are asked for."""
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
