"""Eyes on a run and a budget over it, on the embedded model: seen live, changed in nothing."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemmate_lib import checkpoints, cli, monitor
from gemmate_lib.budget import Spent
from gemmate_lib.config import BudgetConfig, GemmateError, TrackingConfig
from gemmate_lib.divergence import Diverged
from gemmate_lib.journal import JOURNAL, Journal, read_journal
from gemmate_lib.monitor import Monitor
from gemmate_lib.resume import identity_of
from gemmate_lib.sft import Run, finetune_model, finetune_or_load, load_run, load_splits, run_key
from gemmate_lib.tracking import Tracking

Make = Callable[..., Any]
SMALL = {"training.max_steps": 6, "training.batch_size": 2, "training.eval_every": 3,
         "training.warmup_steps": 1, "dataset.limit": 24, "lora.dropout": 0.1,
         "checkpoint.save_every": 3}  # fmt: skip
BUDGET = {"budget.max_hours": 1e-9, "budget.price_per_hour": 2.0}


@pytest.fixture(scope="module")
def watched(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a look at the machine at every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "EVERY", 0.0)
        return finetune_model(experiment(**SMALL), out=tmp_path_factory.mktemp("watched") / "run")


def same(run: Run, other: Run) -> bool:
    weights = [(r.adapter / "adapter_model.safetensors").read_bytes() for r in (run, other)]
    return run.log == other.log and weights[0] == weights[1]


def test_the_journal_says_what_the_log_does_and_more(watched: Run) -> None:
    run = read_journal(watched.directory)
    assert run.state == "finished" and (run.name, run.step, run.steps) == ("quotes", 6, 6)
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        logged = [(r["step"], r[name]) for r in watched.log if name in r]
        assert run.curves[name] == logged and logged
    assert run.checkpoints == [3, 6]
    for name in ("cpu_percent", "rss_mib", "available_mib", "tokens_per_second", "step_seconds"):
        assert len(run.curves[name]) >= 6 and min(v for _, v in run.curves[name]) >= 0, name
    assert 50 < run.use["rss_mib"] < 20_000
    lines = [json.loads(line) for line in (watched.directory / JOURNAL).read_text().splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds[0] == "begin" and kinds[-1] == "end" and lines[-1]["state"] == "trained"
    assert [line["seconds"] > 0 for line in lines if line["event"] == "epoch"] == [True]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    timings = watched.manifest["timings"]
    assert timings["tokens_per_second"] > 0 and timings["peak_rss_mib"] >= 50
    assert timings["hours"] == pytest.approx((timings["load"] + timings["train"]) / 3600, rel=0.2)


def test_a_monitor_that_fails_changes_nothing_and_is_named_once(
    watched: Run, experiment: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def full(self: Monitor, event: str, **record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Monitor, "_write", full)
    run = finetune_model(experiment(**SMALL), out=tmp_path / "run")
    assert same(run, watched)
    said = [r.getMessage() for r in caplog.records if "monitor failed" in r.getMessage()]
    assert len(said) == 1 and "writes nothing more" in said[0]


def test_a_look_at_the_machine_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from gemmate_lib.budget import Budget

    now = [50.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    watch = Monitor(tmp_path, name="x", budget=Budget(BudgetConfig(), began=0.0))
    args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=3, world_size=1)
    state = SimpleNamespace(global_step=0, max_steps=99, epoch=0.0, is_world_process_zero=True)
    watch.on_train_begin(args, state, None)
    for number in range(1, 41):  # ten seconds
        state.global_step = number
        watch.on_step_begin(args, state, None)
        now[0] += 0.25
        watch.on_step_end(args, state, None)
        watch.on_log(args, state, None, logs={"loss": 1.0, "num_tokens": 100.0 * number})
    tracker, heard = Tracking(None, TrackingConfig()), []
    tracker.more = watch.told
    tracker._tell = lambda *given, logs: heard.append(logs)  # type: ignore[assignment]
    for _ in range(2):  # a look at the machine is told once
        tracker.on_log(args, state, None, logs={"loss": 1.0})
    assert heard[0]["monitor/tokens_per_second"] == 400.0 and heard[1] == {"loss": 1.0}
    with watch.watching():
        pass
    run = read_journal(tmp_path)
    assert run.curves["examples_per_second"] == [(4 * n, 24.0) for n in range(1, 11)]
    assert run.curves["step_seconds"][0] == (4, 0.25)
    assert watch.summary["tokens_per_second"] == 400.0 and watch.summary["rows_per_second"] == 24.0
    (tmp_path / "no").mkdir()
    second = Monitor(tmp_path / "no", name="x", budget=Budget(BudgetConfig(), began=0.0))
    state.is_world_process_zero = False
    second.on_train_begin(args, state, None)
    second.on_log(args, state, None, logs={"loss": 1.0})
    assert not (tmp_path / "no" / JOURNAL).exists()


def test_a_gpu_is_read_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the driver: there is none here."""
    from types import SimpleNamespace

    import pynvml
    import torch

    from gemmate_lib.usage import Usage

    assert not any(key.startswith("gpu") for key in Usage().read())
    found: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(used=2**30, total=2**34),
        "nvmlDeviceGetUtilizationRates": lambda h: SimpleNamespace(gpu=int(h[-1])),
    }
    for name, answer in found.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"u{n}")
    )
    use = Usage().read()
    assert use["gpu0_used_mib"] == 1024 and use["gpu1_total_mib"] == 16384
    assert (use["gpu0_percent"], use["gpu1_percent"]) == (0.0, 1.0)

    def unknown(handle: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", unknown)  # a slice, by MIG
    assert "gpu0_percent" not in Usage().read() and Usage().read()["gpu0_used_mib"] == 1024
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: unknown(""))
    assert "gpu0_used_mib" not in Usage().read()


def test_a_budget_ends_a_run_and_a_larger_one_goes_on(
    watched: Run, experiment: Make, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Spent, match=r"after step 1 of 6: .* USD of 1e-09 h\. Go on with --resume"):
        finetune_model(experiment(**SMALL, **BUDGET), out=out)
    kept = checkpoints.verify(out / "checkpoints" / "checkpoint-1")
    hours = kept.manifest["spent_hours"]
    assert 0 < hours < 1 and not (out / "manifest.json").exists()
    assert read_journal(out).state == "budget" and read_journal(out).checkpoints == [1]
    with pytest.raises(GemmateError, match="holds no run"):
        load_run(out)
    with pytest.raises(Spent, match="The budget of this run is spent"):
        finetune_model(experiment(**SMALL, **BUDGET), out=out, resume="last")
    assert checkpoints.paths(out / "checkpoints")  # refused, and nothing lost
    run = finetune_model(experiment(**SMALL), out=out, resume="last")
    assert same(run, watched) and run.manifest["resumed"]["step"] == 1
    assert run.manifest["resumed"]["allowed"] == {}
    timings = run.manifest["timings"]
    assert timings["hours"] > hours + timings["train"] / 3600
    journal = read_journal(out)
    assert journal.state == "finished" and len(journal.curves["loss"]) == 6
    assert "stopped by its budget after step 1" in journal.events[0][1]


def test_what_was_cut_is_not_found_as_finished(
    experiment: Make, tmp_path: Path, watched: Run
) -> None:
    settings = SMALL | {"project_dir": str(tmp_path)}
    short, long = experiment(**settings, **BUDGET), experiment(**settings, max_hours=9.0)
    splits = load_splits(short)
    assert run_key(short, splits) == run_key(long, splits) != run_key(watched.experiment, splits)
    bases = {"weights_sha256": ""}
    assert identity_of(short, {}, bases) == identity_of(long, {}, bases)
    with pytest.raises(Spent):
        finetune_or_load(short, splits=splits)
    run = finetune_or_load(long, splits=splits)
    assert not run.found and same(run, watched) and run.manifest["resumed"]["step"] == 1
    assert finetune_or_load(short, splits=splits).found


def test_by_the_command_line(tmp_path: Path) -> None:
    def call(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    out, settings = tmp_path / "run", [f"--set={k}={v}" for k, v in {**SMALL, **BUDGET}.items()]
    cut = call("finetune", "quotes", "--profile", "tiny", *settings, "--out", out)
    assert cut.exit_code == 3 and "stopped by its budget after step 1 of 6" in cut.output
    frame = call("watch", out, "--once")
    assert "stopped by its budget after step 1 of 6" in " ".join(frame.output.split())
    assert json.loads(call("watch", out, "--json").output)["state"] == "budget"
    assert "after step 1 of 6" in " ".join(call("watch", out).output.split())  # over: it ends
    page = tmp_path / "page.html"
    assert str(page) in call("report", out, "--out", page).output and page.is_file()
    nothing = call("watch", tmp_path / "nothing", "--once")
    assert isinstance(nothing.exception, GemmateError)


def test_a_soft_prompt_has_no_checkpoint_and_so_no_budget(experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match=r"by prompt, which has no checkpoints, keeps no budget"):
        plain = SMALL | BUDGET | {"checkpoint.save_every": 0, "method": "prompt"}
        finetune_model(experiment(**plain), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so(experiment: Make, tmp_path: Path) -> None:
    wild = SMALL | {"training.learning_rate": 1e30, "training.max_grad_norm": 0.0,
                    "checkpoint.save_every": 1, "training.eval_every": 0}  # fmt: skip
    with pytest.raises(Diverged):
        finetune_model(experiment(**wild), out=tmp_path / "run")
    run = Journal(tmp_path / "run").update()
    assert run.state == "failed" and "not finite" in run.events[-1][1]


def test_seen_live_and_killed(tmp_path: Path) -> None:
    """From another process: it trains; then nobody is there to say that it ended."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gemmate_lib", "finetune", "quotes", "--profile", "tiny",
               "--out", str(out), "--set", "max_steps=100000", "--set", "eval_every=0",
               "--set", "dataset.limit=24", "--set", "save_every=2"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        run, until = Journal(out), time.monotonic() + 120
        while run.update().step < 3 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.1)
        seen = (run.state, run.steps, run.over)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert seen == ("training", 100000, False)
    assert run.update().state == "gone" and run.over
    assert "ended without a word" in run.sentence() and "Go on with --resume last" in run.sentence()
    assert run.spent > 0
