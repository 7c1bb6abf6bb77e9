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
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gemmate_lib import (
    divergence,
    machine,
    ranked,
    ranks,
    resume,
    sft,
    sharding,
    sharing,
)
from gemmate_lib.config import GemmateError, LoraSettings, ModelConfig
from gemmate_lib.models import attach_lora, load_base, save_adapter

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


def one_step(loaded: Any, model: Any, rows: torch.Tensor, share: int) -> None:
    """AdamW on the rows; the gradient is that of the whole batch, whoever has its rows."""
    given = {"timestamps": rows[:, 0] * 10**12} if hasattr(loaded.model, "temporal") else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    watch = divergence.Watch(None)
    watch.on_train_begin(None, None, None, model=model)
    logits = model(input_ids=rows, use_cache=False, **given).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")
    (loss / (4 * 15) * share).backward()
    fp16 = SimpleNamespace(fp16=False)
    watch.on_pre_optimizer_step(fp16, SimpleNamespace(global_step=0), None, model=model)
    optimizer.step()
    watch.on_step_end(fp16, SimpleNamespace(global_step=1), None, model=model)


def adapted(settings: dict[str, Any]) -> tuple[Any, Any]:
    loaded = load_base(ModelConfig.model_validate(settings))
    return loaded, attach_lora(loaded.model, LoraSettings(), seed=0)


def shard(job: dict[str, Any]) -> str:
    """One step on weights that two ranks share, against the same step of one: how far apart."""
    rows = torch.arange(64).view(4, 16) * 7 % 250 + 4
    loaded, model = adapted(job["model"])
    one_step(loaded, model, rows, 1)
    expected = sharding.put_together(model)
    both = ranks.Ranks(RANK, 2, "fsdp2")
    loaded, model = adapted(job["model"])
    mesh = init_device_mesh("cpu", (2,))
    for layer in loaded.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharing.check_wrapping(model, both)
    one_step(loaded, model, rows[2 * RANK : 2 * RANK + 2], 2)
    sums = both.gather(sharing.checksum(model))
    found = sharding.put_together(model)
    assert found.keys() == expected.keys() and sums[0] == sums[1]
    if both.first:
        save_adapter(model, job["out"], loaded.base, weights=found)
    return str(max(float((found[n] - expected[n]).abs().max()) for n in found))


def do(job: dict[str, Any]) -> str:
    if "model" in job:
        return shard(job)
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
