"""Several processes train as one does, or say why they cannot: two of them, over gloo."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemmate_lib.sft import Run, finetune_model, load_run

Make = Callable[..., Any]
WORKER = Path(__file__).parents[1] / "ranked_jobs.py"
# 43 texts leave 34 to train on: the ninth step of an epoch has two rows, and rank 1 none of them.
SMALL = {
    "training.max_steps": 12, "training.batch_size": 4, "training.eval_every": 4,
    "training.warmup_steps": 1, "dataset.limit": 43, "checkpoint.save_every": 4,
    "checkpoint.keep_last_n": 9,
}  # fmt: skip
SHORT = {"training.max_steps": 2, "training.batch_size": 4, "dataset.limit": 24,
         "training.eval_every": 0}  # fmt: skip
EXACT = 1e-5  # of each number, in fp32


def largest(one: Run, other: Run, key: str) -> float:
    """How far two runs lie apart in what every record of them says."""
    assert [r.keys() for r in one.log] == [r.keys() for r in other.log]
    return max(abs(a[key] - b[key]) for a, b in zip(one.log, other.log, strict=True) if key in a)


def order(name: str, experiment: Any, out: Path, **given: Any) -> dict[str, Any]:
    """A job for two processes."""
    plain = {"resume": None, "allow_changed": [], "world": 2, "strategy": "ddp", "show": False}
    config = experiment.model_dump(mode="json")
    return plain | {"name": name, "experiment": config, "out": str(out)} | given


class Two:
    """What became of the jobs of two processes."""

    def __init__(self, folder: Path, jobs: list[dict[str, Any]]) -> None:
        self.folder = folder
        (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr=localhost", "--nproc-per-node=2", str(WORKER), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.errors = done.stderr[-4000:]

    def said(self, name: str, rank: int = 0) -> str:
        """What a rank said in the end."""
        file = self.folder / f"{name}-{rank}.json"
        assert file.is_file(), self.errors
        return str(json.loads(file.read_text("utf-8")))

    def run(self, name: str) -> Run:
        """The run of a job that both did."""
        assert [self.said(name, rank) for rank in (0, 1)] == ["done", "done"]
        return load_run(self.folder / name)


@pytest.fixture(scope="module")
def alone(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune_model(experiment(**SMALL), out=tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def two(alone: Run, experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("two")
    jobs = [order("quotes", experiment(**SMALL), folder / "quotes")]
    yield Two(folder, jobs)


def test_two_processes_train_to_the_curve_of_one(two: Two, alone: Run) -> None:
    run = two.run("quotes")
    assert len(run.log) == 15
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        assert largest(run, alone, key) <= EXACT, key
    assert run.manifest["processes"] == {
        "world": 2, "strategy": "ddp", "backend": "gloo", "rows_at_a_time": 2,
        "batches_to_a_step": 1,
    }  # fmt: skip
