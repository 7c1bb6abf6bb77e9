"""What it costs to survive: the watch on every step, and a checkpoint against a plain copy.

The watch is timed within the steps of one training, every weight of the tiny model trained; sealed
checkpoints and copies of the same bytes by turns. Prints medians and ranges; `--out FILE` writes
JSON.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import parser_for, spread, write

STEPS, PAIRS, MEGABYTES = 41, 7, 256


def watched_steps() -> dict[str, Any]:
    """Processor seconds of a step, of the watch within it, and its share, step by step."""
    from transformers import TrainerCallback

    from gemmate_lib import divergence, trainer
    from gemmate_lib.config import Facts, resolve
    from gemmate_lib.sft import finetune_model

    settings = {"method": "full", "model.quantization": "none", "training.eval_every": 0,
                "training.max_steps": STEPS, "training.batch_size": 128}  # fmt: skip
    experiment = resolve("quotes", facts=Facts(), profile="tiny", overrides=settings).experiment
    steps: list[float] = []
    watch: list[float] = [0.0]
    began = 0.0

    def begin(*given: Any, **named: Any) -> None:  # noqa: ARG001
        nonlocal began
        began = time.process_time()

    def end(*given: Any, **named: Any) -> None:  # noqa: ARG001
        steps.append(time.process_time() - began)
        watch.append(0.0)

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any, **named: Any) -> None:
            entered = time.process_time()
            method(*given, **named)
            watch[-1] += time.process_time() - entered

        return call

    names = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end")
    for name in names:
        setattr(divergence.Watch, name, timed(getattr(divergence.Watch, name)))
    first, last = TrainerCallback(), TrainerCallback()
    first.on_step_begin, last.on_step_end = begin, end
    real = trainer.build_trainer

    def clocked(*given: Any, **named: Any) -> Any:
        built = real(*given, **named)
        train = built.train

        def go(**options: Any) -> Any:
            built.add_callback(last)  # behind the watch
            return train(**options)

        built.add_callback(first)
        built.train = go
        return built

    trainer.build_trainer = clocked
    with tempfile.TemporaryDirectory() as folder:
        finetune_model(experiment, out=Path(folder) / "run")
    shares = [w / (s - w) for w, s in zip(watch, steps, strict=False)]
    return {"step s": spread(steps), "watch s": spread(watch[:-1]), "share": spread(shares[1:])}


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def writes(folder: Path) -> dict[str, Any]:
    """Seconds to save and seal a checkpoint, and to copy its bytes with fsync, by turns."""
    import torch
    from safetensors.torch import save_file

    from gemmate_lib.checkpoints import seal, verify

    half = MEGABYTES * 2**20 // 8
    weights, state = ({"w": torch.randn(half)} for _ in range(2))
    sealed, copied = [], []
    for i in range(PAIRS):
        staged = folder / "staged"
        began = time.perf_counter()
        staged.mkdir()
        save_file(weights, staged / "model.safetensors")
        torch.save(state, staged / "optimizer.pt")
        record = {"step": i, "metrics": {}, "identity": {}, "optimizer": True}
        made = seal(staged, folder / "checkpoints", record)
        sealed.append(time.perf_counter() - began)
        os.sync()
        began = time.perf_counter()
        (copy := folder / "copy").mkdir()
        for file in made.path.iterdir():
            shutil.copyfile(file, copy / file.name)
            sync(copy / file.name)
        sync(copy)
        copied.append(time.perf_counter() - began)
        verify(made.path)
        shutil.rmtree(copy)
        shutil.rmtree(made.path)
        os.sync()
    ratios = [b / a for a, b in zip(sealed, copied, strict=True)]
    return {"MB": MEGABYTES, "sealed s": spread(sealed), "copied s": spread(copied),
            "speed against a copy": spread(ratios)}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both; 1 where a limit is passed: 3 % of a step, half the speed of a copy."""
    parser = parser_for(__doc__)
    parser.add_argument("--folder", type=Path, help="where to write; default: beside this file")
    given = parser.parse_args(arguments)
    from gemmate_lib import machine

    machine.quiet()
    with tempfile.TemporaryDirectory(dir=given.folder or Path(__file__).parent) as folder:
        found = {"step": watched_steps(), "checkpoint": writes(Path(folder))}
    found["machine"] = machine.describe()
    for name, part in found.items():
        for key, value in part.items():
            shown = value if not isinstance(value, list) else (
                f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"
            )  # fmt: skip
            print(f"{name:>10}  {key:<22} {shown}")
    write(found, given.out)
    slow = found["step"]["share"][0] > 0.03 or found["checkpoint"]["speed against a copy"][0] < 0.5
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
