"""How a step's time and memory grow with length, batch, rank, width and depth.

Random Gemmas around 512 x 8 layers with LoRA of rank 8 on NF4 weights, full rows. Every point is a
process of its own, the points take turns, and a line in the log-log plane is put through each
axis: its slope is the exponent, next to the one that the arithmetic foretells.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    HIDDEN,
    full_rows,
    parser_for,
    peak,
    random_gemma,
    report,
    resident,
    spread,
    start_peak,
    timed,
    where,
    write,
)

ROUNDS, STEPS = 3, 5
START = {"length": 128, "batch": 2, "rank": 8, "width": 512, "layers": 8}
# Axis -> its points, and the exponents of time and memory where nothing else counts.
AXES: dict[str, tuple[tuple[int, ...], float, float]] = {
    "length": ((64, 128, 256, 512), 1, 1),
    "batch": ((1, 2, 4, 8), 1, 1),
    "rank": ((8, 32, 128, 512), 0, 0),
    "width": ((128, 256, 512, 1024), 2, 1),
    "layers": ((2, 4, 8, 16), 1, 1),
}


def point(axis: str, value: int, model: str) -> dict[str, float]:
    """Milliseconds of a step, and MiB at its peak above what a process holds for any training."""
    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    at, facts = START | {axis: value}, machine.read_facts()
    settings = {"model.device": facts.device, "threads": 1, "recipe": "fast",
                "training.max_steps": STEPS, "training.eval_every": 0, "lora.r": at["rank"],
                "training.batch_size": at["batch"], "dataset.max_length": at["length"],
                "dataset.over_long": "cut"}  # fmt: skip

    def steps(**own: Any) -> float:
        found = resolve("quotes", facts=facts, profile="tiny", overrides=settings | own).experiment
        with tempfile.TemporaryDirectory() as folder:
            rows = full_rows(STEPS * found.training.batch_size)
            return timed(found, rows, Path(folder))[0]

    least = {"training.batch_size": 1, "dataset.max_length": 16}
    steps(model="tiny-gemma", **least)  # what every process holds, whatever it trains
    before = resident("VmRSS")
    start_peak()
    seconds = steps(model=model)
    return {"ms": 1000 * seconds, "MiB": peak(above=before) / 2**20}


def model_of(axis: str, value: int, folder: Path) -> str:
    """The folder of a point's model, made where it is not there yet."""
    at = START | {axis: value}
    path = folder / f"{at['width']}x{at['layers']}"
    return str(path) if path.is_dir() else random_gemma(path, at["width"], at["layers"])


def fresh(axis: str, value: int, model: str) -> dict[str, float]:
    """A point in a process of its own."""
    command = [sys.executable, __file__, "--point", axis, str(value), model]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def exponent(values: Sequence[int], found: Sequence[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    x, y = ([math.log(v) for v in each] for each in (values, found))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return across / sum((a - mx) ** 2 for a in x)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every axis."""
    parser = parser_for(__doc__)
    parser.add_argument("--point", nargs=3, help=HIDDEN)
    given = parser.parse_args(arguments)
    if given.point:
        axis, value, model = given.point
        print(json.dumps(point(axis, int(value), model)))
        return 0
    points = [(axis, value) for axis, (values, *_) in AXES.items() for value in values]
    runs: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in points}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for axis, value in points:
                model = model_of(axis, value, Path(folder))
                runs[axis, value].append(fresh(axis, value, model))
    found: dict[str, Any] = {}
    for axis, (values, time, memory) in AXES.items():
        each = {v: {k: spread([run[k] for run in runs[axis, v]]) for k in ("ms", "MiB")}
                for v in values}  # fmt: skip
        print(f"\n{axis}; the others: {START}")
        report([(str(value), row) for value, row in each.items()])
        slopes = {k: exponent(values, [each[v][k][0] for v in values]) for k in ("ms", "MiB")}
        print(f"exponent of the time {slopes['ms']:.2f}, expected {time}; "
              f"of the memory {slopes['MiB']:.2f}, expected {memory}")  # fmt: skip
        found[axis] = {"points": each, "exponents": slopes,
                       "expected": {"ms": time, "MiB": memory}}  # fmt: skip
    write({"start": START, "axes": found, "machine": where()}, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
