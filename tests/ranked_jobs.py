"""What two processes do in tests/integration/test_launch.py: one import of torch pays for all.

torchrun starts this with a folder. Every job in its jobs.json is an order as gemmate_lib/launch.py
writes it, perhaps with what rank 1 alone does otherwise; what becomes of it goes to
NAME-RANK.json, so that a job that is refused does not keep the next one from its start.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gemmate_lib import machine, ranked, ranks, resume, sft, sharing
from gemmate_lib.config import GemmateError

RANK = int(os.environ.get("RANK", 0))
OTHER = {"id": "tiny-gemma", "revision": None, "weights_sha256": "0" * 64}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Make this process go wrong as the fault says, from now on."""
    patches: dict[str, Any] = {
        "code": lambda: mock.patch.object(sft, "code_hash", lambda: "another"),
        "package": lambda: mock.patch.object(resume, "package_versions", lambda: {"trl": "0.1"}),
        "machine": lambda: mock.patch.object(
            machine, "describe", lambda: {"device": "Tesla T4", "platform": "", "python": ""}
        ),
        "base": lambda: mock.patch.object(sft, "base_record", lambda config: OTHER),
        "rows": lambda: mock.patch.object(sft, "load_splits", fewer_rows),
        "unwrapped": lambda: mock.patch("accelerate.Accelerator.prepare_model", unwrapped),
        "drift": lambda: mock.patch.object(sharing.Together, "on_step_end", drift),
    }
    with patches[fault]() if fault else contextlib.nullcontext():
        yield


real_splits = sft.load_splits


def fewer_rows(experiment: Any) -> Any:
    found = real_splits(experiment)
    del found.train[-1]
    return found


def unwrapped(accelerator: Any, model: Any, *args: Any, **given: Any) -> Any:
    accelerator._models.append(model)
    return model


def drift(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
    with torch.no_grad():
        next(p for p in given["model"].parameters() if p.requires_grad).add_(1e-3)


def do(job: dict[str, Any]) -> str:
    here = job | (job.get("second", {}) if RANK else {})
    if "cut_off" in job:
        if RANK == 0:
            cut_off(*map(Path, job["cut_off"]), Path(job["out"]))
        ranks.join("cpu").wait()
    before = dict(os.environ)
    try:
        os.environ |= here.get("environment", {})
        with planted(here.get("fault")):
            ranked.work(here)
    except GemmateError as error:
        return str(error)
    finally:
        os.environ |= before
    return "done"


def cut_off(run: Path, checkpoint: Path, out: Path) -> None:
    """Leave the folder of a run as a kill after this checkpoint would have."""
    (out / "checkpoints").mkdir(parents=True)
    (out / ".unfinished").touch()
    shutil.copytree(run / "checkpoints" / checkpoint, out / "checkpoints" / checkpoint)


def main(folder: Path) -> None:
    machine.quiet()
    for job in json.loads((folder / "jobs.json").read_text("utf-8")):
        said = do(job)
        (folder / f"{job['name']}-{RANK}.json").write_text(json.dumps(said), "utf-8")
    ranked._leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
