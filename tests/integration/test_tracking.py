"""Trackers are truly told, change nothing, and fail alone."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.sft import Run, finetune_model
from gemmate_lib.tracking import Tracking

Make = Callable[..., Any]
SHORT = {"training.max_steps": 3, "training.batch_size": 2, "training.eval_every": 2,
         "training.warmup_steps": 1, "dataset.limit": 24}  # fmt: skip
ASKED = {"tracking.project": "letters", "tracking.run_name": "first", "tracking.tags": ("a", "b"),
         "tracking.watch_mode": "all", "tracking.log_frequency": 2}  # fmt: skip


@pytest.fixture(scope="module")
def plain(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune_model(experiment(**SHORT), out=tmp_path_factory.mktemp("plain") / "run")


def same(run: Run, other: Run) -> bool:
    weights = [(r.adapter / "adapter_model.safetensors").read_bytes() for r in (run, other)]
    return run.log == other.log and weights[0] == weights[1]


def test_trackio_is_told_all(plain: Run, tmp_path: Path) -> None:
    """In a process of its own, as its store is chosen when it is imported."""
    settings = {**SHORT, **ASKED, "tracker": "on", "tracking.upload_model": True}
    args = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, "-m", "gemmate_lib", "finetune", "quotes", "--profile", "tiny",
               "--out", str(tmp_path / "run"), "--limit", "2"]  # fmt: skip
    for arg in args:
        command += ["--set", arg]
    store = tmp_path / "store"
    env = os.environ | {
        "TRACKIO_DIR": str(store),
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_" + "x" * 30,
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    from gemmate_lib.sft import load_run

    assert same(load_run(tmp_path / "run"), plain)
    with sqlite3.connect(store / "letters.db") as base:
        told = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (config,) = base.execute("select config from configs").fetchone()
    assert {name for name, *_ in told} == {"first"}
    records = [json.loads(metrics) for *_, metrics in told]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses == [record["loss"] for record in plain.log if "loss" in record]
    watched = [r["train/global_step"] for r in records if any("gradients/" in k for k in r)]
    assert watched == [1, 3]
    assert sum("parameters/" in key for key in records[0]) == 6 * 7 * 2  # LoRA's A and B
    assert json.loads(config)["tags"] == ["a", "b"]
    files = [path.read_bytes() for path in store.rglob("*") if path.is_file()]
    assert (plain.adapter / "adapter_model.safetensors").read_bytes() in files
    assert not any(b"x" * 30 in content for content in files)


def test_tensorboard_is_told(experiment: Make, plain: Run, tmp_path: Path) -> None:
    run = finetune_model(experiment(**SHORT, tracker="tensorboard"), out=tmp_path / "run")
    assert list(run.directory.rglob("events.out.tfevents.*")) and same(run, plain)


@pytest.mark.parametrize(
    "event", ["__init__", "on_train_begin", "on_log", "on_evaluate", "on_train_end"]
)
def test_a_tracker_that_fails_never_fails_the_training(
    event: str, experiment: Make, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    def fails(*given: Any, **named: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(INTEGRATION_TO_CALLBACK["tensorboard"], event, fails)
    run = finetune_model(experiment(**SHORT, tracker="tensorboard"), out=tmp_path / "run")
    assert same(run, plain)
    assert len(caplog.messages) == 1 and "no route to host" in caplog.messages[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tracker": "nosuch"}, "nosuch is not installed"),
        ({"tracker": "tensorboard", "tags": ("a",)}, r"numbers alone\. Leave tracking\.tags out"),
        ({"tracker": "tensorboard", "upload_model": True}, r"Leave tracking\.upload_model out"),
    ],
)
def test_what_a_tracker_cannot_do_is_an_error(
    settings: dict[str, Any], said: str, experiment: Make, tmp_path: Path
) -> None:
    with pytest.raises(GemmateError, match=said):
        finetune_model(experiment(**SHORT, **settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_but_events_is_handed_on(experiment: Make) -> None:
    told = Tracking(object(), experiment().tracking)
    with pytest.raises(AttributeError):
        told.state  # noqa: B018
