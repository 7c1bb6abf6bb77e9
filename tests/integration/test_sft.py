"""Fine-tuning runs: found again, exact twice, nothing left behind, loud when they diverge."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemmate_lib.config import GemmateError
from gemmate_lib.generate import generate_texts
from gemmate_lib.models import load_base
from gemmate_lib.rows import token_rows
from gemmate_lib.sft import finetune_model, finetune_or_load, load_run, load_splits, open_run
from gemmate_lib.trainer import train

Make = Callable[..., Any]
SHORT = {"max_steps": 4, "eval_every": 2, "dataset.limit": 60, "training.warmup_steps": 1}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def test_two_runs_are_bit_identical(experiment: Make, tmp_path: Path) -> None:
    runs = [finetune_model(experiment(**SHORT), out=tmp_path / name) for name in "ab"]
    assert digest(runs[0].directory) == digest(runs[1].directory)
    assert runs[0].log == runs[1].log
    records = [run.manifest | {"created": "", "timings": {}} for run in runs]
    assert records[0] == records[1]
    other = finetune_model(experiment(**SHORT, seed=7), out=tmp_path / "c")
    assert digest(other.directory) != digest(runs[0].directory)


def test_a_run_is_found_by_its_configuration(experiment: Make) -> None:
    first = finetune_or_load(experiment(**SHORT))
    again = finetune_or_load(experiment(**SHORT))
    other = finetune_or_load(experiment(**SHORT, learning_rate=1e-3))
    assert (first.found, again.found, other.found) == (False, True, False)
    assert first.directory == again.directory != other.directory
    assert again.metrics["steps"] == 4 and again.metrics["last_loss"] < again.metrics["first_loss"]
    assert [r["step"] for r in again.log if "eval_loss" in r] == [2, 4]


def test_a_saved_run_generates_as_it_did_in_memory(experiment: Make, tmp_path: Path) -> None:
    run = finetune_model(experiment(**SHORT), out=tmp_path / "run")
    texts = []
    for _ in range(2):
        loaded = open_run(load_run(run.directory))
        found = generate_texts(
            loaded.model, loaded.tokenizer, ["Quote: Imagination"], max_new_tokens=8
        )
        texts.append(found[0].text)
    assert texts[0] == texts[1] != ""


def test_trained_parameters_stay_fp32(experiment: Make, tmp_path: Path) -> None:
    """TRL casts the adapter of a quantized model to bf16."""
    run = finetune_model(experiment(**SHORT), out=tmp_path / "run")
    assert run.experiment.model.quantization == "nf4"
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_every_row_ends_in_eos_and_starts_with_one_bos(experiment: Make) -> None:
    splits = load_splits(experiment())
    base = load_base(experiment().model)
    rows = token_rows(splits.test, base.tokenizer, max_length=128, over_long="drop")
    for row in rows:
        assert row["labels"][-1] == base.tokenizer.eos_token_id
        assert row["input_ids"].count(base.tokenizer.bos_token_id) == 1


def test_a_folder_that_exists_is_refused(experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="exists"):
        finetune_model(experiment(**SHORT), out=tmp_path)


def test_a_diverging_run_stops_and_leaves_nothing(experiment: Make, tmp_path: Path) -> None:
    """A loss that is not finite would otherwise be logged as 0.0."""
    wild = experiment(**SHORT, learning_rate=1e38, max_grad_norm=0)
    with pytest.raises(GemmateError, match=r"diverged in step 2: a trained weight is not"):
        finetune_model(wild, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_accumulation_and_batch_take_the_same_steps(experiment: Make, tmp_path: Path) -> None:
    """Recipes `original` (1 x 4) and `fast` (4 x 1): equal losses in fp32."""
    plain = {**SHORT, "model.quantization": "none", "optim": "adamw_torch", "learning_rate": 1e-3}
    one = finetune_model(
        experiment(**plain, training_batch_size=1, gradient_accumulation_steps=4),
        out=tmp_path / "1x4",
    )
    four = finetune_model(experiment(**plain, training_batch_size=4), out=tmp_path / "4x1")
    for a, b in zip(one.log, four.log, strict=True):
        key = "loss" if "loss" in a else "eval_loss"
        assert a[key] == pytest.approx(b[key], abs=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_packing_is_a_choice(experiment: Make, tmp_path: Path, packing: bool) -> None:
    run = finetune_model(experiment(**SHORT, packing=packing), out=tmp_path / "run")
    assert run.metrics["last_loss"] < run.metrics["first_loss"]


def test_early_stop_and_checkpoints(experiment: Make, tmp_path: Path) -> None:
    settings = {**SHORT, "max_steps": 12, "eval_every": 2, "save_every": 2}
    run = finetune_model(
        experiment(**settings, learning_rate=0.3, early_stopping_patience=1), out=tmp_path / "run"
    )
    assert run.metrics["steps"] < 12
    assert any((run.directory / "checkpoints").glob("checkpoint-*"))


def test_the_manifest_tells_what_decided_the_result(experiment: Make, tmp_path: Path) -> None:
    run = finetune_model(experiment(**SHORT), out=tmp_path / "run")
    manifest = json.loads((run.directory / "manifest.json").read_text("utf-8"))
    assert manifest["config"]["seed"] == run.experiment.seed
    assert set(manifest["data"]["checksums"]) == {"train", "validation", "test"}
    assert len(manifest["base"]["weights_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(manifest)


def test_train_takes_a_collator(experiment: Make, tmp_path: Path) -> None:
    """What knows of time brings its own collator; the loop knows nothing of it."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    settings = experiment(**SHORT)
    base = load_base(settings.model)
    from gemmate_lib.adapters import attach_lora

    model = attach_lora(base.model, settings.lora, seed=0)
    seen = []
    inner = DataCollatorForLanguageModeling(pad_token_id=0)

    def collate(rows: list[dict[str, Any]]) -> Any:
        seen.append(len(rows))
        return inner(rows)

    splits = load_splits(settings)
    train(model, base.tokenizer, splits, settings, tmp_path / "t", collator=collate)
    assert seen


def test_two_that_want_the_same_run_make_it_once(tmp_path: Path) -> None:
    """As two notebooks do that run side by side: one trains, the other waits and finds it."""
    code = (
        "from gemmate_lib.config import Facts, resolve\n"
        "from gemmate_lib.sft import finetune_or_load\n"
        "given = {'max_steps': 2, 'eval_every': 0, 'dataset.limit': 40}\n"
        "made = resolve('quotes', facts=Facts(), profile='tiny', overrides=given)\n"
        "print(finetune_or_load(made.experiment).found)\n"
    )
    env = os.environ | {"GEMMATE_RUNS": str(tmp_path)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in both) == ["False", "True"]
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 1
