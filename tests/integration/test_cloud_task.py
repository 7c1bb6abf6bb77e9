"""What runs in the job, with a folder in the bucket's place."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemmate_lib import cloud_task
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.remote import for_the_cloud
from gemmate_lib.sft import finetune_model, load_run
from gemmate_lib.transfer import download, upload

SHORT = {"max_steps": 6, "eval_every": 0, "batch_size": 4, "dataset.limit": 40,
         "max_new_tokens": 4}  # fmt: skip


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that stands for a bucket, with rows in it."""
    folder = tmp_path_factory.mktemp("bucket")
    rows = [{"quote": f"The {i}th lantern stood near harbour {i * 7}.", "author": f"Author {i % 7}"}
            for i in range(80)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    upload(folder / "rows.jsonl", f"file://{folder}/data")
    return f"file://{folder}"


@pytest.fixture(scope="module")
def job(bucket: str, experiment: Callable[..., Experiment],
        tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:  # fmt: skip
    """The experiment of a job, whose input lies in the bucket, and the folder it works in."""
    asked = experiment(**SHORT | {"dataset": f"{bucket}/data"})
    chosen = for_the_cloud(asked, f"{bucket}/job")
    input_ = tmp_path_factory.mktemp("input")
    (input_ / "experiment.json").write_text(chosen.model_dump_json(), "utf-8")
    upload(input_, f"{bucket}/job/input")
    return chosen, tmp_path_factory.mktemp("work")


def test_a_job_that_was_taken_away_goes_on_elsewhere(
    job: tuple[Experiment, Path], bucket: str, tmp_path: Path, capsys: Any
) -> None:
    """SIGTERM after three steps, then an empty machine; the losses are those of one training."""
    chosen, work = job
    assert chosen.checkpoint.save_every == 1

    def preempt(record: dict[str, float]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    laid = cloud_task.fetch_inputs(chosen, work)
    with pytest.raises(SystemExit) as stopped:
        cloud_task.train(laid, f"{bucket}/job/run", work / "run", report=preempt)
    assert stopped.value.code == 128 + signal.SIGTERM
    shutil.rmtree(work)
    work.mkdir()
    words = ["--experiment", f"{bucket}/job/input", "--out", f"{bucket}/job/run"]
    cloud_task.main(words, work=work)
    steps = [json.loads(x)["step"] for x in capsys.readouterr().out.splitlines() if '"loss"' in x]
    run = load_run(download(f"{bucket}/job/run", tmp_path / "run"))
    saved = run.manifest["resumed"]["step"]  # the signal is heeded at the end of a step
    assert 3 <= saved <= 4 and steps == list(range(saved + 1, 7))
    assert (run.directory / "metrics.json").is_file()
    whole = finetune_model(laid.model_copy(update={"checkpoint": Experiment().checkpoint}),
                           out=tmp_path / "whole")  # fmt: skip
    assert [r["loss"] for r in run.log if "loss" in r] == [
        r["loss"] for r in whole.log if "loss" in r
    ]


def test_no_experiment_there(tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match=r"holds no experiment\.json that can be read"):
        cloud_task.read_experiment(f"file://{tmp_path}")
    (tmp_path / "experiment.json").write_text('{"name": "x", "speed": 3}')
    with pytest.raises(GemmateError, match="speed"):
        cloud_task.read_experiment(f"file://{tmp_path}")


def test_what_is_kept_for_a_job(experiment: Callable[..., Experiment]) -> None:
    made = for_the_cloud(experiment(), "gs://b/home", max_hours=2)
    assert made.checkpoint.remote_path == "gs://b/home/checkpoints"
    assert made.checkpoint.save_every == made.training.eval_every and made.budget.max_hours == 2
    own = for_the_cloud(experiment(**{"checkpoint.save_every": 7}), "gs://b/home")
    assert own.checkpoint.save_every == 7 and own.budget.max_hours is None
    none = for_the_cloud(experiment(eval_every=0, max_steps=5000), "gs://b/home")
    assert none.checkpoint.save_every == 100
