"""Several processes train as one does, or say why they cannot: two of them, over gloo."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_jobs import cut_off

from gemmate_lib.adapters import load_adapter
from gemmate_lib.config import Facts, GemmateError, ModelConfig, resolve
from gemmate_lib.models import load_base
from gemmate_lib.sft import Run, finetune_model, load_run
from gemmate_lib.temporal.questions import as_row, questions

pytestmark = pytest.mark.slow  # half a minute of processes that begin

Make = Callable[..., Any]
WORKER = Path(__file__).parents[1] / "ranked_jobs.py"
# 41 texts leave 33 to train on: the ninth step of an epoch has one row, and rank 1 none of it.
SMALL = {
    "training.max_steps": 12, "training.batch_size": 4, "training.eval_every": 4,
    "training.warmup_steps": 1, "dataset.limit": 41, "checkpoint.save_every": 4,
    "checkpoint.keep_last_n": 9,
}  # fmt: skip
SHORT = SMALL | {"training.max_steps": 2, "training.eval_every": 0, "checkpoint.save_every": 0}
SHARDED = [
    ("shared-gemma", {"id": "tiny-gemma", "device": "cpu"}),
    ("shared-gemmate", {"id": "tiny-gemma2", "device": "cpu", "temporal_kind": "calendar"}),
]
EXACT = 1e-5  # of each number, in fp32
SAME = "Give every process the same experiment, files, versions and machine."

# What rank 1 alone does otherwise, or both do: by name, and what all of them then say.
PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "one-alone": (
        {"environment": {"WORLD_SIZE": "1"}},
        r"2 processes were asked for, and rank \d finds a world of 1\. Start them by",
    ),
    "too-few": ({"world": 3}, r"3 processes were asked for, and rank \d finds a world of 2"),
    "other-code": ({"second": {"fault": "code"}}, "Rank 1 has another code than rank 0: another"),
    "other-package": (
        {"second": {"fault": "package"}},
        "Rank 1 has another package.accelerate than rank 0: None there",
    ),
    "other-gpu": (
        {"second": {"fault": "machine"}},
        "Rank 1 has another machine.device than rank 0: Tesla T4 there, cpu here. " + SAME,
    ),
    "other-base": (
        {"second": {"fault": "base"}}, "Rank 1 has another base.weights_sha256 than rank 0: 0000"
    ),
    "other-rows": ({"second": {"fault": "rows"}}, "Rank 1 has another rows.train than rank 0"),
    "other-seed": ({"seed": 1}, "Rank 1 has another experiment than rank 0"),
    "own-disk": ({"own_disk": True}, "Rank 1 does not see .* Give --out a folder that every"),
    "unwrapped": (
        {"fault": "unwrapped"},
        r"Rank \d should train by ddp, and its gradients are shared by nobody",
    ),
    "ddp-for-fsdp": (
        {"strategy": "fsdp2"},
        r"Rank \d should train by fsdp2, and its gradients are shared by DistributedDataParallel",
    ),
    "drift": (
        {"second": {"fault": "drift"}},
        "Rank 1 has another state of the weights after step 2 than rank 0",
    ),
    "uneven": ({"batch": 3}, "3 rows to a step cannot be shared evenly by 2 processes"),
}  # fmt: skip


def largest(one: Run, other: Run, key: str) -> float:
    """How far two runs lie apart in a number that is logged; of large ones, relatively."""
    assert [r.keys() for r in one.log] == [r.keys() for r in other.log]
    pairs = [(a[key], b[key]) for a, b in zip(one.log, other.log, strict=True) if key in a]
    return max(abs(a - b) / max(1, abs(a)) for a, b in pairs)


def same_curve(one: Run, other: Run) -> None:
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        assert largest(one, other, key) <= EXACT, key


def order(name: str, experiment: Any, folder: Path, **given: Any) -> dict[str, Any]:
    """A job for two processes."""
    plain = {"resume": None, "allow_changed": [], "world": 2, "strategy": "ddp", "show": False}
    config = experiment.model_dump(mode="json")
    return plain | {"name": name, "experiment": config, "out": str(folder / name)} | given


def planted(name: str, experiment: Make, folder: Path) -> dict[str, Any]:
    """The job that goes wrong."""
    given = dict(PLANTED[name][0])
    batch = {"training.batch_size": given.pop("batch", 4)}
    job = order(name, experiment(**SHORT | batch), folder)
    if "seed" in given:
        other = experiment(**SHORT | {"seed": given.pop("seed")})
        given["second"] = {"experiment": other.model_dump(mode="json")}
    if given.pop("own_disk", False):
        given["second"] = {"out": str(folder / "elsewhere" / name)}
    return job | given


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
def temporal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GemmaTE on some dated questions."""
    path = tmp_path_factory.mktemp("rows") / "dated.jsonl"
    found = (as_row(dialogue) for dialogue in islice(questions(5), 60))
    path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    short = {"dataset": str(path), "max_steps": 3, "warmup_steps": 0, "batch_size": 4,
             "eval_every": 3}  # fmt: skip
    return resolve("temporal", facts=Facts(), profile="tiny", overrides=short).experiment


@pytest.fixture(scope="module")
def alone(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process's run."""
    return finetune_model(experiment(**SMALL), out=tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def two(
    alone: Run, experiment: Make, temporal: Any, tmp_path_factory: pytest.TempPathFactory
) -> Two:
    folder = tmp_path_factory.mktemp("two")
    small, dropout = experiment(**SMALL), {"lora.dropout": 0.1, "checkpoint.save_every": 2}
    last = {"resume": "last"}
    jobs = [
        order("quotes", small, folder),
        order("temporal", temporal, folder),
        order("one-two", small, folder, cut_off=[str(alone.directory), "checkpoint-8"], **last),
        order("two-two", small, folder, cut_off=[str(folder / "quotes"), "checkpoint-8"], **last),
        order("dropout", experiment(**SHORT | dropout), folder),
        *({"name": name, "model": model, "out": str(folder / name)} for name, model in SHARDED),
        *(planted(name, experiment, folder) for name in PLANTED),
    ]
    return Two(folder, jobs)


def test_two_processes_train_to_the_curve_of_one(two: Two, alone: Run) -> None:
    run = two.run("quotes")
    assert len(run.log) == 15 and sum("eval_loss" in record for record in run.log) == 3
    same_curve(run, alone)
    assert run.manifest["processes"] == {
        "world": 2, "strategy": "ddp", "backend": "gloo", "rows_at_a_time": 2,
        "batches_to_a_step": 1,
    }  # fmt: skip
    assert "processes" not in alone.manifest
    assert run.manifest["config_hash"] == alone.manifest["config_hash"]


def test_rank_0_alone_writes(two: Two, alone: Run) -> None:
    def files(run: Run) -> set[str]:
        found = {path.relative_to(run.directory).as_posix() for path in run.directory.rglob("*")}
        return {name for name in found if "rng_state" not in name}

    assert files(two.run("quotes")) == files(alone)


def test_gemmate_and_its_collator_train_on_two(two: Two, temporal: Any, tmp_path: Path) -> None:
    run = finetune_model(temporal, out=tmp_path / "run")
    assert any("eval_loss" in record for record in run.log)
    same_curve(two.run("temporal"), run)


@pytest.mark.parametrize("name", ["one-two", "two-two"])
def test_two_go_on_from_one_and_from_two(name: str, two: Two, alone: Run) -> None:
    run = two.run(name)
    assert run.manifest["resumed"]["step"] == 8
    same_curve(run, alone)


def test_one_goes_on_from_two(two: Two, alone: Run, experiment: Make, tmp_path: Path) -> None:
    cut_off(two.run("quotes").directory, Path("checkpoint-8"), tmp_path / "run")
    run = finetune_model(experiment(**SMALL), out=tmp_path / "run", resume="last")
    assert run.manifest["resumed"]["step"] == 8
    same_curve(run, alone)


def test_each_rank_drops_out_on_its_own(two: Two, experiment: Make, tmp_path: Path) -> None:
    """So such a run is not that of one process, and one process does not go on with it."""
    run = two.run("dropout")
    folder = run.directory / "checkpoints/checkpoint-2"
    drawn = [torch.load(folder / f"rng_state_{rank}.pth", weights_only=False) for rank in (0, 1)]
    assert not torch.equal(drawn[0]["cpu"], drawn[1]["cpu"])
    cut_off(run.directory, Path("checkpoint-2"), tmp_path / "run")
    with pytest.raises(GemmateError, match=r"another run\. processes: 2 then, None now"):
        finetune_model(run.experiment, out=tmp_path / "run", resume="last")


@pytest.mark.parametrize(("name", "model"), SHARDED)
def test_a_step_on_shared_weights_is_that_of_one(
    name: str, model: dict[str, Any], two: Two
) -> None:
    """FSDP2's own engine over a mesh of CPUs; accelerate's trainer refuses to use it there."""
    assert float(two.said(name)) <= EXACT and two.said(name) == two.said(name, 1)
    loaded = load_base(ModelConfig.model_validate(model))
    saved = load_adapter(loaded, two.folder / name)
    assert any(float(w.abs().max()) > 0 for n, w in saved.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_is_refused_by_its_rank(name: str, two: Two) -> None:
    for rank in (0, 1):
        said = two.said(name, rank)
        assert re.search(PLANTED[name][1], said), said
        assert said.count(". ") == 1 and said.endswith("."), said
    assert not (two.folder / name).exists()
