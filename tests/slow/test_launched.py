"""Processes that are really started, from the command line and from Python, and what ends them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.launch import launch
from gemmate_lib.sft import Run, finetune_model, load_run

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
SMALL = {
    "training.max_steps": 20, "training.batch_size": 4, "training.eval_every": 2,
    "training.warmup_steps": 1, "dataset.limit": 41, "checkpoint.save_every": 10,
}  # fmt: skip
COMMAND = [sys.executable, "-u", "-m", "gemmate_lib", "finetune", "quotes", "--profile", "tiny",
           "--limit", "1", "--out", "run"]  # fmt: skip
for setting in SMALL.items():
    COMMAND += ["--set", "{}={}".format(*setting)]


@pytest.fixture(scope="module")
def alone(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune_model(experiment(**SMALL), out=tmp_path_factory.mktemp("alone") / "run")


def until_step_4(folder: Path, act: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Start two processes, do something to them after the fourth step, and let them end."""
    with subprocess.Popen(
        [*COMMAND, "--processes", "2"], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as run:  # fmt: skip
        assert run.stdout
        said = ""
        for line in run.stdout:
            said += line
            if line.split()[:2] == ["step", "4"]:
                act(run)
                break
        said += run.stdout.read()
    return run.returncode, said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_a_signal_saves_on_two_and_two_machines_go_on(alone: Run, tmp_path: Path) -> None:
    """The machines are one, but they meet by an address as several do."""
    code, said = until_step_4(tmp_path, lambda run: run.send_signal(signal.SIGTERM))
    assert code == 143, said
    assert "SIGTERM: stopped and saved after step" in said and "--resume last" in said
    assert "torch/distributed" not in said and not (tmp_path / "run/manifest.json").exists()
    more = ["--resume", "last", "--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}"]

    def machine(rank: int) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *more, "--node-rank", str(rank)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(machine, (0, 1))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "went on after step" in first.stdout and "form_perplexity" in first.stdout
    assert "trained" not in second.stdout
    run = load_run(tmp_path / "run")
    assert run.manifest["processes"]["world"] == 2
    for key in ("loss", "eval_loss"):
        found = [[record[key] for record in each.log if key in record] for each in (run, alone)]
        assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_rank_that_is_killed_is_named_and_ends_the_others(tmp_path: Path) -> None:
    def kill(run: subprocess.Popen[str]) -> None:
        family = psutil.Process(run.pid).children(recursive=True)
        next(each for each in family if each.environ().get("RANK") == "1").kill()
        left.extend(family)

    left: list[psutil.Process] = []
    code, said = until_step_4(tmp_path, kill)
    assert code == 2 and len(left) >= 2
    assert "gemmate: Rank 1 was ended by SIGKILL, and the others with it. Look whether" in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()
    assert not any(each.is_running() for each in left)


def test_launch_from_python_and_by_torchrun(alone: Run, experiment: Make, tmp_path: Path) -> None:
    """As a notebook does it; and by hand, where rank 0 alone speaks."""
    run = launch(experiment(**SMALL), out=tmp_path / "run")
    assert not run.found and run.manifest["processes"]["strategy"] == "ddp"
    assert [r.keys() for r in run.log] == [r.keys() for r in alone.log]
    with pytest.raises(GemmateError, match=r"run exists\. Give --out another folder"):
        launch(experiment(**SMALL), out=tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--local-addr=localhost", "--nproc-per-node=2", "-m"]  # fmt: skip
    (tmp_path / "by-hand").mkdir()
    done = subprocess.run(
        torchrun + COMMAND[3:], cwd=tmp_path / "by-hand", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("trained 20 steps") == 1, done.stderr
    assert load_run(tmp_path / "by-hand/run").manifest["processes"]["world"] == 2


def test_canary_accelerate_starts_one_on_a_cpu(tmp_path: Path) -> None:
    """accelerate 1.15: when this fails, `join` need no longer count for its sake."""
    script = tmp_path / "count.py"
    script.write_text("import os; print('world', os.environ.get('WORLD_SIZE', 'of one'))", "utf-8")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", str(script)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0 and done.stdout.count("world") == 1, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp-qlora"])
def test_two_gpus_train_as_one(strategy: str, tmp_path: Path) -> None:
    """Never run so far: no machine with two GPUs was at hand."""
    held = "nf4" if strategy == "fsdp-qlora" else "none"
    given = {"model": "tiny-gemma2", "model.device": "cuda", "model.quantization": held,
             "model.compute_dtype": "float32", "training.max_steps": 4, "training.batch_size": 4,
             "dataset.limit": 24, "training.eval_every": 2}  # fmt: skip
    made = resolve("quotes", facts=Facts(), profile="tiny", overrides=given).experiment
    one = finetune_model(made, out=tmp_path / "one")
    two = launch(made, out=tmp_path / "two", strategy=strategy)  # type: ignore[arg-type]
    for a, b in zip(one.log, two.log, strict=True):
        assert {k: v for k, v in b.items() if "loss" in k} == pytest.approx(
            {k: v for k, v in a.items() if "loss" in k}, rel=1e-3
        )
