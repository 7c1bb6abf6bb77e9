"""Runs that were cut off go on as if nothing had happened, or say why they cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemmate_lib import checkpoints, sft
from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.sft import Run, finetune_model, load_run
from gemmate_lib.temporal.blur import Blur

Make = Callable[..., Any]
# 40 texts leave 32 to train on: eight steps of two times two an epoch, so that its end lies inside.
SMALL = {
    "training.max_steps": 12, "training.batch_size": 2, "training.gradient_accumulation_steps": 2,
    "training.eval_every": 2, "checkpoint.save_every": 1, "checkpoint.keep_last_n": 99,
    "training.warmup_steps": 1, "lora.dropout": 0.1, "dataset.limit": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune_model(experiment(**SMALL), out=tmp_path_factory.mktemp("whole") / "run")


def cut_off_after(step: int, run: Run, out: Path) -> Path:
    """The folder of the run as a kill after this step would have left it."""
    (out / "checkpoints").mkdir(parents=True)
    (out / ".unfinished").touch()
    (out / "trainer").mkdir()
    (out / "trainer" / "half.tmp").touch()
    for k in range(1, step + 1):
        name = f"checkpoints/checkpoint-{k}"
        shutil.copytree(run.directory / name, out / name)
    return out


def state(run: Run, step: int = 12) -> dict[str, torch.Tensor]:
    """Adapter and optimizer after a step, tensor by tensor."""
    folder = run.directory / "checkpoints" / f"checkpoint-{step}"
    tensors = load_file(folder / "adapter_model.safetensors")
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    for i, each in optimizer.items():
        tensors |= {f"{i}.{name}": value for name, value in each.items()}
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_an_epoch_ends_inside(whole: Run) -> None:
    assert len(load_run(whole.directory).log) == 18
    assert whole.manifest["data"]["kept"] >= 32 and "resumed" not in whole.manifest


@pytest.mark.parametrize("step", range(1, 13))
def test_resume_after_every_step(step: int, whole: Run, experiment: Make, tmp_path: Path) -> None:
    out = cut_off_after(step, whole, tmp_path / "run")
    run = finetune_model(experiment(**SMALL), out=out, resume="last")
    assert run.log == whole.log
    assert same(state(run), state(whole))
    ends = [(r.directory / "adapter/adapter_model.safetensors").read_bytes() for r in (run, whole)]
    assert ends[0] == ends[1]
    assert run.manifest["resumed"] == {"step": step, "skipped": [], "allowed": {}}
    assert not (out / ".unfinished").exists() and not (out / "trainer").exists()


@pytest.fixture(scope="module")
def grouped(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    alike = experiment(**SMALL | {"training.group_by_length": True})
    return finetune_model(alike, out=tmp_path_factory.mktemp("grouped") / "run")


@pytest.fixture(scope="module")
def temporal_whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("temporal")
    rows = "".join(
        json.dumps({"prompt": f"What was {i}?", "completion": f" It was {i}.", "when": i * 10**11})
        + "\n"
        for i in range(40)
    )
    (folder / "dated.jsonl").write_text(rows, "utf-8")
    dated = {"dataset": str(folder / "dated.jsonl"), "dataset.timestamp": "when"}
    split = {"dataset.validation_fraction": 0.1, "dataset.test_fraction": 0.1}
    blur = {"training.timestamp_blur": 4, "training.timestamp_withheld": 0.2}
    found = resolve(
        "temporal", facts=Facts(), profile="tiny", overrides=SMALL | dated | split | blur
    )
    return finetune_model(found.experiment, out=folder / "run")


def test_blurred_times_teach_something_else(
    temporal_whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another draw in each pass: here all of them leave the times alone."""
    passes = []
    monkeypatch.setattr(
        Blur, "_drawn", lambda self, row: passes.append(self.epoch) or row["timestamps"]
    )
    run = finetune_model(temporal_whole.experiment, out=tmp_path / "run")
    assert passes[0] == 0 and passes[-1] == 1
    # The encoder still says nothing at first, so that only what it learns is another.
    assert run.log[0]["loss"] == temporal_whole.log[0]["loss"]
    assert run.log[0]["grad_norm"] != temporal_whole.log[0]["grad_norm"]
    assert not same(state(run), state(temporal_whole))


@pytest.mark.parametrize("step", [3, 8, 10])
def test_resume_where_rows_of_like_length_stand_together(
    step: int, grouped: Run, whole: Run, experiment: Make, tmp_path: Path
) -> None:
    """Before, at and after the end of an epoch; the second one has an order of its own."""
    out = cut_off_after(step, grouped, tmp_path / "run")
    alike = experiment(**SMALL | {"training.group_by_length": True})
    run = finetune_model(alike, out=out, resume="last")
    assert run.log == grouped.log != whole.log
    assert same(state(run), state(grouped))


@pytest.mark.parametrize("step", [3, 8, 10])
def test_resume_where_times_are_blurred(step: int, temporal_whole: Run, tmp_path: Path) -> None:
    """Before, at and after the end of a pass: the second one draws other times than the first."""
    out = cut_off_after(step, temporal_whole, tmp_path / "run")
    run = finetune_model(temporal_whole.experiment, out=out, resume="last")
    assert run.log == temporal_whole.log
    assert same(state(run), state(temporal_whole))


def test_without_the_rng_another_result_comes_out(
    whole: Run, experiment: Make, tmp_path: Path
) -> None:
    """Dropout draws from it: so the comparison above can fail."""
    out = cut_off_after(5, whole, tmp_path / "run")
    newest = out / "checkpoints" / "checkpoint-5"
    newest.rename(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "rng_state.pth").unlink()
    record = checkpoints.read(tmp_path / "checkpoint-5").manifest
    (tmp_path / "checkpoint-5" / "checkpoint.json").unlink()
    checkpoints.seal(tmp_path / "checkpoint-5", out / "checkpoints", record)
    run = finetune_model(experiment(**SMALL), out=out, resume="last")
    assert run.log != whole.log


def test_full_fine_tuning_resumes(experiment: Make, tmp_path: Path) -> None:
    full = SMALL | {"method": "full", "model.quantization": "none", "training.max_steps": 4}
    run = finetune_model(experiment(**full), out=tmp_path / "run")
    again = cut_off_after(3, run, tmp_path / "again")
    other = finetune_model(experiment(**full), out=again, resume="last")
    assert other.log == run.log
    assert same(*(load_file(r.model / "model.safetensors") for r in (run, other)))


def test_a_damaged_newest_is_passed_over_and_named(
    whole: Run, experiment: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = cut_off_after(6, whole, tmp_path / "run")
    (out / "checkpoints/checkpoint-6/optimizer.pt").unlink()
    run = finetune_model(experiment(**SMALL), out=out, resume="last")
    assert run.log == whole.log and run.manifest["resumed"]["step"] == 5
    assert "skipped checkpoint-6: optimizer.pt is missing" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("training.batch_size", 4),
        ("training.gradient_accumulation_steps", 1),
        ("training.learning_rate", 1e-3),
        ("dataset.split_seed", 1),
        ("model.quantization", "none"),
    ],
)
def test_another_run_is_refused(
    key: str, value: Any, whole: Run, experiment: Make, tmp_path: Path
) -> None:
    out = cut_off_after(2, whole, tmp_path / "run")
    with pytest.raises(GemmateError, match=f"checkpoint-2 belongs to another run.*{key}: "):
        finetune_model(experiment(**SMALL | {key: value}), out=out, resume="last")
    assert [path.name for path in checkpoints.paths(out / "checkpoints")] == [
        "checkpoint-2", "checkpoint-1",
    ]  # fmt: skip


def test_other_rows_or_weights_are_refused(
    whole: Run, experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cut_off_after(2, whole, tmp_path / "run")
    real = sft.identity_of
    monkeypatch.setattr(
        sft,
        "identity_of",
        lambda e, rows, base, ranks: real(e, {"train": "x"}, {"weights_sha256": "y"}),
    )
    with pytest.raises(GemmateError, match=r"base\.weights_sha256.*rows\.train: "):
        finetune_model(experiment(**SMALL), out=out, resume="last")


def test_what_is_allowed_by_name_is_recorded(whole: Run, experiment: Make, tmp_path: Path) -> None:
    out = cut_off_after(11, whole, tmp_path / "run")
    longer = experiment(**SMALL | {"training.max_steps": 13, "training.learning_rate": 1e-4})
    keys = ["training.max_steps", "training.learning_rate"]
    with pytest.raises(GemmateError, match=r"training\.learning_rate"):
        finetune_model(longer, out=out, resume="last", allow_changed=keys[:1])
    run = finetune_model(longer, out=out, resume="last", allow_changed=keys)
    assert run.manifest["resumed"]["allowed"]["training.max_steps"] == [12, 13]
    assert run.metrics["steps"] == 13


def test_without_the_optimizer_resuming_is_refused(experiment: Make, tmp_path: Path) -> None:
    small = SMALL | {"checkpoint.save_optim": False, "training.max_steps": 3}
    run = finetune_model(experiment(**small), out=tmp_path / "run")
    out = cut_off_after(2, run, tmp_path / "again")
    assert not (out / "checkpoints/checkpoint-2/optimizer.pt").exists()
    with pytest.raises(GemmateError, match=r"checkpoint\.save_optim"):
        finetune_model(experiment(**small), out=out, resume="last")
    allowed = ["checkpoint.save_optim"]
    again = finetune_model(experiment(**small), out=out, resume="last", allow_changed=allowed)
    assert list(again.manifest["resumed"]["allowed"]) == allowed


def test_the_best_stays_and_can_be_gone_back_to(experiment: Make, tmp_path: Path) -> None:
    """At this rate the loss falls, then rises: the best is not the last."""
    rising = {"training.learning_rate": 2e-2, "checkpoint.keep_last_n": 1,
              "checkpoint.keep_best_n": 1, "checkpoint.save_every": 2,
              "training.lr_scheduler": "constant"}  # fmt: skip
    run = finetune_model(experiment(**SMALL | rising), out=tmp_path / "run")
    losses = {r["step"]: r["eval_loss"] for r in run.log if "eval_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    kept = {each.step for each in checkpoints.sealed(run.directory / "checkpoints")}
    assert best != 12 and kept == {best, 12}
    (run.directory / "manifest.json").unlink()
    (run.directory / ".unfinished").touch()
    again = finetune_model(experiment(**SMALL | rising), out=run.directory, resume="best")
    assert again.manifest["resumed"]["step"] == best and again.log == run.log


def test_a_run_that_stopped_early_has_stopped(experiment: Make, tmp_path: Path) -> None:
    """Killed between its last step and its end, it takes its best and no more steps."""
    early = {"training.learning_rate": 0.3, "training.early_stopping_patience": 1,
             "checkpoint.save_every": 2, "training.lr_scheduler": "constant"}  # fmt: skip
    run = finetune_model(experiment(**SMALL | early), out=tmp_path / "run")
    assert run.metrics["steps"] < 12
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    (run.directory / "manifest.json").unlink()
    (run.directory / ".unfinished").touch()
    again = finetune_model(experiment(**SMALL | early), out=run.directory, resume="last")
    assert again.log == run.log and again.manifest["resumed"]["step"] == run.metrics["steps"]
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == weights


def test_one_checkpoint_an_epoch(experiment: Make, tmp_path: Path) -> None:
    by_epoch = {"checkpoint.save_strategy": "epoch", "checkpoint.save_every": 0,
                "checkpoint.keep_best_n": 1, "training.max_steps": 16}  # fmt: skip
    run = finetune_model(experiment(**SMALL | by_epoch), out=tmp_path / "run")
    found = list(checkpoints.sealed(run.directory / "checkpoints"))
    assert [each.step for each in found] == [16, 8]
    assert all("eval_loss" in each.metrics for each in found)


def test_copies_go_to_storage_and_come_back(
    experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from gemmate_lib.storage import FsspecStorage

    remote = {"checkpoint.remote_path": "memory://bucket/run", "checkpoint.keep_last_n": 2,
              "training.max_steps": 4}  # fmt: skip
    run = finetune_model(experiment(**SMALL | remote), out=tmp_path / "run")
    assert FsspecStorage("memory://bucket/run").names() == ["checkpoint-4", "checkpoint-3"]
    FsspecStorage("memory://bucket/run").remove("checkpoint-4")
    again = finetune_model(experiment(**SMALL | remote), out=tmp_path / "new", resume="last")
    assert again.manifest["resumed"]["step"] == 3 and again.log == run.log

    def refuse(*args: object) -> None:
        raise PermissionError("no such bucket")

    monkeypatch.setattr(FsspecStorage, "sync_to_storage", refuse)
    third = finetune_model(experiment(**SMALL | remote), out=tmp_path / "third")
    assert third.log == run.log
    assert "checkpoint-4 was not copied to memory://bucket/run: no such bucket" in caplog.text


def test_copies_go_and_come_only_where_asked_for(experiment: Make, tmp_path: Path) -> None:
    from gemmate_lib.storage import FsspecStorage

    remote = {"checkpoint.remote_path": "memory://other/run", "training.max_steps": 2}
    kept = SMALL | remote | {"checkpoint.sync_to_storage": False}
    finetune_model(experiment(**kept), out=tmp_path / "kept")
    assert FsspecStorage("memory://other/run").names() == []
    finetune_model(experiment(**SMALL | remote), out=tmp_path / "copied")
    assert FsspecStorage("memory://other/run").names() == ["checkpoint-2", "checkpoint-1"]
    alone = SMALL | remote | {"checkpoint.load_from_storage": False}
    run = finetune_model(experiment(**alone), out=tmp_path / "alone", resume="last")
    assert "resumed" not in run.manifest


@pytest.mark.parametrize("option", ["last", "path"])
def test_a_setting_goes_on_as_well(
    option: str, whole: Run, experiment: Make, tmp_path: Path
) -> None:
    out = cut_off_after(5, whole, tmp_path / "run")
    asked = {"checkpoint.resume_from_checkpoint": True, "checkpoint.resume_option": option,
             "checkpoint.path": str(out / "checkpoints/checkpoint-4")}  # fmt: skip
    run = finetune_model(experiment(**SMALL | asked), out=out)
    assert run.manifest["resumed"]["step"] == (5 if option == "last" else 4)
    assert same(state(run), state(whole))


def test_a_checkpoint_every_second_epoch(experiment: Make, tmp_path: Path) -> None:
    every = {"training.max_steps": -1, "training.num_epochs": 3, "training.eval_every": 0,
             "checkpoint.save_strategy": "epoch", "checkpoint.save_every_epochs": 2}  # fmt: skip
    run = finetune_model(experiment(**SMALL | every), out=tmp_path / "run")
    found = list(checkpoints.sealed(run.directory / "checkpoints"))
    assert run.metrics["steps"] == 24 and [each.step for each in found] == [16]


COMMAND = [
    sys.executable, "-u", "-m", "gemmate_lib", "finetune", "quotes", "--profile", "tiny",
    "--limit", "4", "--out", "run",
]  # fmt: skip
for setting in (SMALL | {"checkpoint.save_every": 0}).items():
    COMMAND += ["--set", "{}={}".format(*setting)]


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_saves_stops_and_is_gone_on_from(
    number: signal.Signals, code: int, whole: Run, tmp_path: Path
) -> None:
    with subprocess.Popen(
        COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout
        for line in run.stdout:
            if line.split()[:2] == ["step", "4"]:
                run.send_signal(number)
                break
        said = run.stdout.read()
    assert run.returncode == code, said
    assert f"{number.name}: stopped and saved after step" in said and "--resume last" in said
    assert not (tmp_path / "run/manifest.json").exists()
    refused = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "did not finish. Go on with --resume last" in refused.stderr
    done = subprocess.run(
        [*COMMAND, "--resume", "last"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0 and "went on after step" in done.stdout, done.stderr
    assert load_run(tmp_path / "run").log == whole.log
