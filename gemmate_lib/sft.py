"""Supervised fine-tuning, one run a folder: prepare, load, read, attach, train, save.

A run is named by everything that decides its result: the experiment, the rows, the base's
weights, the versions of the libraries and of this one. What was run before is found again by
that name, and a run that did not finish leaves nothing behind.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from gemmate_lib import machine
from gemmate_lib.adapters import attach_lora, load_adapter, save_adapter
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.data import Splits, load_dataset_splits
from gemmate_lib.manifest import package_versions, read_manifest, write_manifest
from gemmate_lib.models import LoadedModel, base_record, load_base, load_tokenizer
from gemmate_lib.trainer import Report, train


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run on disk; `found` if it was there before."""

    directory: Path
    experiment: Experiment
    manifest: dict[str, Any]
    found: bool

    @property
    def adapter(self) -> Path:
        """The folder with adapter and tokenizer."""
        return self.directory / "adapter"

    @property
    def metrics(self) -> dict[str, float]:
        """First and last losses, and the number of steps."""
        return self.manifest["metrics"]

    @property
    def log(self) -> list[dict[str, float]]:
        """One record a step: step, loss, learning_rate, grad_norm; at evaluations eval_loss."""
        lines = (self.directory / "log.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


def load_run(directory: str | Path) -> Run:
    """Read a run's folder.

    Raises: GemmateError where it holds none.
    """
    directory = Path(directory)
    if not (directory / "manifest.json").is_file():
        raise GemmateError(f"{directory} holds no run. Make one with: gemmate finetune quotes")
    manifest = read_manifest(directory)
    return Run(directory, Experiment.model_validate(manifest["config"]), manifest, found=True)


def open_run(run: Run, *, force: bool = False) -> LoadedModel:
    """Load a run's base with its adapter on it, ready to generate."""
    machine.prepare(seed=run.experiment.seed, threads=run.experiment.threads)
    base = load_base(run.experiment.model)
    model = load_adapter(base, run.adapter, force=force).eval()
    return LoadedModel(model, base.tokenizer, base.device, base.reasons, base.base)


@cache
def _code_hash() -> str:
    """sha256 of this library's sources: a run made by other code is another run."""
    root = Path(__file__).parent
    files = sorted(f for f in root.rglob("*") if f.suffix in (".py", ".yaml"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_key(experiment: Experiment, splits: Splits) -> str:
    """12 hexadecimal digits over all that decides the result of a run."""
    parts = {
        "experiment": experiment.hash(),
        "rows": splits.checksums(),
        "base": base_record(experiment.model),
        "packages": package_versions(),
        "code": _code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def load_splits(experiment: Experiment) -> Splits:
    """Read an experiment's data set, lengths checked by the model's own tokenizer."""
    tokenizer = load_tokenizer(experiment.model.id, experiment.model.revision)
    return load_dataset_splits(experiment.dataset, tokenizer=tokenizer)


def finetune_or_load(experiment: Experiment, *, report: Report | None = None) -> Run:
    """Return the run of an experiment: the one made before, or a new one under `runs_home()`."""
    splits = load_splits(experiment)
    directory = machine.runs_home() / f"{experiment.name}-{run_key(experiment, splits)}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Notebooks that run side by side want the same run: one makes it, the others wait for it.
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if not (directory / "manifest.json").is_file():
            return finetune_model(experiment, out=directory, splits=splits, report=report)
    return load_run(directory)


def check_new(out: Path) -> None:
    """Raise GemmateError where the folder of a run exists already."""
    if out.exists():
        raise GemmateError(f"{out} exists. Give --out another folder, or delete it.")


def finetune_model(
    experiment: Experiment,
    *,
    out: str | Path,
    splits: Splits | None = None,
    report: Report | None = None,
) -> Run:
    """Fine-tune a LoRA adapter and write the run to `out`.

    Raises: GemmateError for a folder that exists, rows that cannot be trained on, or a loss,
        gradient or parameter that is no longer finite.
    """
    out, began = Path(out), time.perf_counter()
    check_new(out)
    machine.prepare(seed=experiment.seed, threads=experiment.threads)
    splits = splits or load_splits(experiment)
    base = load_base(experiment.model)
    model = attach_lora(base.model, experiment.lora, seed=experiment.seed)
    loaded = time.perf_counter()
    with _staging(out) as staging:
        log = train(model, base.tokenizer, splits, experiment, staging / "trainer", report=report)
        trained = time.perf_counter()
        save_adapter(model, staging / "adapter", base.base)
        base.tokenizer.save_pretrained(staging / "adapter")
        lines = (json.dumps(record) + "\n" for record in log)
        (staging / "log.jsonl").write_text("".join(lines), "utf-8")
        if not experiment.training.save_every and experiment.training.tracker == "none":
            shutil.rmtree(staging / "trainer", ignore_errors=True)
        write_manifest(
            staging,
            kind="sft",
            experiment=experiment,
            facts=machine.describe(),
            data=splits.report.as_dict() | {"checksums": splits.checksums()},
            base=base.base,
            metrics=_summary(log),
            timings={"load": loaded - began, "train": trained - loaded},
        )
    return Run(out, experiment, read_manifest(out), found=False)


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all went well and disappears when not."""
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        yield staging
        check_new(out)  # another run may have been quicker
        staging.rename(out)
    except Exception as error:
        if re.search(r"No space left|File too large|os error (27|28)\b", str(error)):
            remedy = "Free some, or give --out a folder on another disk."
            raise GemmateError(f"There is no room to write {out}. {remedy}") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _summary(log: list[dict[str, float]]) -> dict[str, float]:
    losses = [record["loss"] for record in log if "loss" in record]
    checks = [record["eval_loss"] for record in log if "eval_loss" in record]
    summary = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
    return summary | ({"best_eval_loss": min(checks), "eval_loss": checks[-1]} if checks else {})
