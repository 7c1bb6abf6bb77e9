"""Each fault that fine-tuning meets, injected: what becomes of the run, and what its user reads.

`make faults` prints the table; `tests/faults/table.py` makes it from the properties noted here.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flip, truncate
from hub import Hub, serving
from kills import PHASES

from gemmate_lib import callbacks, checkpoints, divergence
from gemmate_lib.adapters import load_adapter
from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.models import load_base, model_path
from gemmate_lib.sft import Run, finetune_model, load_splits

Make = Callable[..., Any]
Note = Callable[[str, str, object], None]
FAST = {"training.max_steps": 4, "training.batch_size": 2, "training.eval_every": 0,
        "checkpoint.save_every": 1, "training.warmup_steps": 1, "dataset.limit": 20}  # fmt: skip
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune_model(experiment(**FAST), out=tmp_path_factory.mktemp("whole") / "run")


# Kills, at every phase of a save and at any time


def kill(folder: Path, trials: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "kills.py"), str(folder), trials]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = kill(tmp_path_factory.mktemp("kills"), "phases")
    return {trial["phase"]: trial for trial in found}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_save(phase: str, killed: dict[str, dict[str, Any]], note: Note) -> None:
    trial = killed[phase]
    assert trial["killed"] and trial["equal"] and not trial["lost"]
    assert trial["resumed"] == (6 if phase == "after it" else 5)
    note(f"kill -9 in a save, {phase}", f"goes on after step {trial['resumed']}; bit-identical")


@pytest.mark.slow
@pytest.mark.release
def test_killed_fifty_times(tmp_path: Path, note: Note) -> None:
    trials = kill(tmp_path, "50")
    assert sum(trial["killed"] for trial in trials) == 50
    note(
        "kill -9 at any time, 50 times", "50 of 50 bit-identical; only unsaved steps are done again"
    )


# Checkpoints that are not what was saved


def cut_off(run: Run, out: Path) -> Path:
    shutil.copytree(run.directory / "checkpoints", out / "checkpoints")
    (out / ".unfinished").touch()
    return out / "checkpoints" / "checkpoint-4"


PARTS = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "checkpoint.json")  # fmt: skip


@pytest.mark.parametrize("damage", [truncate, flip], ids=["cut", "flipped"])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_checkpoint(part: str, damage: Callable[[Path], None], whole: Run,
                              tmp_path: Path, note: Note) -> None:  # fmt: skip
    newest = cut_off(whole, tmp_path / "run")
    damage(newest / part)
    found = checkpoints.choose(newest.parent, "last", metric="eval_loss", mode="min")
    assert found.checkpoint.step == 3 and len(found.skipped) == 1
    what = "cut in half" if damage is truncate else "with one bit flipped"
    note(f"{part} {what}", "goes on from the one before", f"skipped {found.skipped[0]}")


def test_an_empty_newest_folder(whole: Run, experiment: Make, tmp_path: Path, note: Note,
                                caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    newest = cut_off(whole, tmp_path / "run")
    newest.with_name("checkpoint-9").mkdir()
    shutil.rmtree(newest)
    run = finetune_model(experiment(**FAST), out=tmp_path / "run", resume="last")
    assert run.log == whole.log and run.manifest["resumed"]["step"] == 3
    note("an empty newest folder", "goes on from the one before; bit-identical", caplog.messages[0])


def test_a_disk_that_fills(whole: Run, tmp_path: Path, note: Note) -> None:
    """A file may not grow past 1.2 MB here: the adapter fits, the optimizer's state does not."""
    newest = cut_off(whole, tmp_path / "run")
    shutil.rmtree(newest)
    settings = [part for item in FAST.items() for part in ("--set", "{}={}".format(*item))]
    largest = max(file.stat().st_size for file in whole.directory.rglob("*") if file.is_file())
    limit = largest - 1000
    done = subprocess.run(
        [sys.executable, "-m", "gemmate_lib", "finetune", "quotes", "--profile", "tiny", "--out",
         "run", "--resume", "last", *settings],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2 and "There is no room to write run" in done.stderr, done.stderr
    left = tmp_path / "run"
    assert {path.name for path in left.iterdir()} == {"checkpoints", ".unfinished", "monitor.jsonl"}
    assert checkpoints.verify(left / "checkpoints" / "checkpoint-3").step == 3
    assert len(checkpoints.paths(left / "checkpoints")) == 1
    note("the disk fills in a save", "stops; older checkpoints whole, no half one", done.stderr)


# Numbers that are not finite


class Poison(callbacks.TrainerCallback):
    """Puts NaN into a gradient or a weight in step 3."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step != 2:
            return
        model = given["model"]
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.what == "gradient":
            trained[0].register_hook(lambda grad: grad * float("nan"))
        elif self.what == "weight":
            with torch.no_grad():
                trained[0][0] = float("nan")
        else:  # what the rows are multiplied into: every loss of this step
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(float("inf"))


@pytest.mark.parametrize("what", ["gradient", "weight", "data"])
def test_nan(what: str, experiment: Make, tmp_path: Path, note: Note,
             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from gemmate_lib import trainer

    real = trainer.build_trainer

    def poisoned(*given: Any, **named: Any) -> Any:
        built = real(*given, **named)
        built.add_callback(Poison(what))
        return built

    monkeypatch.setattr(trainer, "build_trainer", poisoned)
    settings = experiment(**FAST)
    with pytest.raises(divergence.Diverged, match=r"in step 3: .* rows \d+, \d+") as error:
        finetune_model(settings, out=tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.paths(folder)] == ["checkpoint-2", "checkpoint-1"]
    assert checkpoints.verify(folder / "checkpoint-2")
    named = {int(n) for n in str(error.value).split("rows ")[1].split(")")[0].split(", ")}
    assert named <= {row.source_row for row in load_splits(settings).train}
    note(f"NaN in the {what}", "stops before the step is saved", error.value)


def test_nan_in_the_base(experiment: Make, tmp_path: Path, note: Note) -> None:
    base = shutil.copytree(model_path("tiny-gemma"), tmp_path / "base")
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name][0, 0] = float("nan")  # behind finite scores: attention hides it
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    settings = experiment(**FAST | {"model.id": str(base), "model.quantization": "none"})
    with pytest.raises(divergence.Diverged, match="not finite before the first step") as error:
        finetune_model(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    note("NaN in the base", "does not start", error.value)


def test_out_of_memory(experiment: Make, tmp_path: Path, note: Note,
                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*given: Any, **named: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8)  # a petabyte: torch's own error

    monkeypatch.setattr(divergence.Watch, "on_substep_end", full)
    monkeypatch.setattr(divergence.Watch, "on_pre_optimizer_step", full)
    settings = experiment(**FAST | {"training.batch_size": 4})
    with pytest.raises(GemmateError, match="Out of memory: 4 rows of up to") as error:
        finetune_model(settings, out=tmp_path / "run")
    assert "training.batch_size=" in str(error.value)
    assert not (tmp_path / "run").exists()
    note("out of memory", "stops; says which batch takes the same steps", error.value)


# Models and adapters that do not belong together


def test_a_tokenizer_of_another_model(tmp_path: Path, note: Note) -> None:
    base = shutil.copytree(model_path("tiny-gemma"), tmp_path / "base")
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    top = max(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"] |= {f"more{i}": top + 1 + i for i in range(50)}
    file.write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(GemmateError, match="they are of two models") as error:
        load_base(ModelConfig(id=str(base)))
    note("a tokenizer of another model", "does not start", error.value)


def test_an_adapter_of_another_base(whole: Run, tmp_path: Path, note: Note) -> None:
    base = shutil.copytree(model_path("tiny-gemma"), tmp_path / "base")
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    other = load_base(ModelConfig(id=str(base)))
    with pytest.raises(GemmateError, match="was trained on tiny-gemma") as error:
        load_adapter(other, whole.adapter)
    assert load_adapter(other, whole.adapter, force=True) is not None
    said = str(error.value).replace(str(whole.directory), "run")
    note("an adapter of another base", "refused; force=True overrides", said)


def test_a_wrong_dtype(note: Note) -> None:
    with pytest.raises(GemmateError, match="float16 on a CPU overflows") as error:
        load_base(ModelConfig(compute_dtype="float16", device="cpu"))
    note("float16 where it overflows", "does not start", error.value)


def test_no_padding_token(experiment: Make, tmp_path: Path, note: Note) -> None:
    """As GPT-2: EOS pads, and is learned all the same."""
    base = shutil.copytree(model_path("tiny-gemma"), tmp_path / "base")
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings.pop("pad_token", None)
    file.write_text(json.dumps(settings), "utf-8")
    loaded = load_base(ModelConfig(id=str(base)))
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    run = finetune_model(experiment(**FAST | {"model.id": str(base)}), out=tmp_path / "run")
    assert run.metrics["last_loss"] < run.metrics["first_loss"]
    note("no padding token", "EOS pads; a row still ends in a learned EOS")


# Data


ROWS = {
    "no rows": ("", "rows.jsonl holds no rows", "an empty data set"),
    "copies": ('{"quote": "One and the same.", "author": "A"}\n' * 30,
               "29 dropped: repeats a row", "only copies of a row"),
    "broken": (
        '{"quote": "A", "author": "B"}\n{"quote": \n', r"rows.jsonl, line 2: .*JSON object",
        "a row that cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows(name: str, experiment: Make, tmp_path: Path, note: Note) -> None:
    content, said, fault = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(content, "utf-8")
    settings = experiment(**FAST | {"dataset.id": str(tmp_path / "rows.jsonl")})
    with pytest.raises(GemmateError, match=said) as error:
        finetune_model(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    note(fault, "does not start", error.value)


# The Hub, before a run

REFUSED = {
    "no token": (401, "GatedRepo", "", "Make a read token"),
    "a gated model, not yet granted": (403, "GatedRepo", "hf_standin", "Accept the licence"),
    "a token that is refused": (401, "", "hf_standin", "the Hub refused yours"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_the_hub_refuses(fault: str, tmp_path: Path, note: Note) -> None:
    status, code, token, said = REFUSED[fault]
    Hub.answer = (status, code)
    with serving() as address:
        done = subprocess.run(
            [sys.executable, "-m", "gemmate_lib", "finetune", "quotes", "--profile", "tiny",
             "--out", "run", "--set", "model=google/gemma-2b"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
                              "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"},
        )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
    note(fault, "does not start", done.stderr)
