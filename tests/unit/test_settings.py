"""Every setting: documented, and understood under the names of published experiments."""

from pathlib import Path
from typing import Any

import pytest

from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.keys import KEYS, PUBLISHED, find_key, flatten, settings_table
from gemmate_lib.settings import Experiment

# SST-2 as it was published, in one flat file.
FLAT = {
    "dataset_id": "sst2", "model_name": "google/gemma-1.1-2b-it", "max_length": 32,
    "dtype": "bfloat16", "learning_rate": 6e-5, "batch_size": 4, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "num_epochs": 1, "max_steps": -1, "optim": "adamw_torch",
    "weight_decay": 0.0, "warmup_steps": 2, "max_grad_norm": 1.0, "fp16": False, "bf16": True,
    "log_level": "INFO", "tracker": "none", "project": "gemmate", "run_name": None, "tags": [],
    "watch_mode": "all", "log_frequency": 1000, "upload_model": False, "steps_freq": 10,
    "epoch_freq": 1, "val_steps_freq": 50, "resume_from_checkpoint": False,
    "resume_option": "last", "checkpoint_path": None, "checkpoint_metric": "eval/loss",
    "checkpoint_metric_mode": "min", "keep_last_n": 3, "keep_best_n": 3, "save_strategy": "epoch",
    "project_dir": None, "save_optim": False, "storage_backend": "local", "sync_to_storage": True,
    "load_from_storage": True, "remote_path": None, "seed": 23, "deterministic": False,
    "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_bias": "none",
    "lora_target_modules": "all-linear", "lora_task_type": "CAUSAL_LM", "quantization": "none",
    "packing": False, "early_stopping_patience": 0, "framework": "pytorch", "device": "cuda",
}  # fmt: skip


def test_every_setting_is_documented_in_the_table() -> None:
    table = Path("gemmate_lib/experiments/README.md").read_text("utf-8")
    assert table == settings_table() + "\n", "run `make settings`"
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS) + 1  # the profile is none of the keys that can be set
    for row in rows:
        key, others, default, _, meaning = [cell.strip() for cell in row.split("|")[1:-1]]
        assert default and len(meaning) > 10, row
        assert all(
            find_key(name.strip("`")) == key.strip("`") for name in others.split(", ") if name
        )


def test_the_published_experiment_is_ours(tmp_path: Path) -> None:
    import yaml

    from gemmate_lib.config import read_experiment

    path = tmp_path / "sst2.yaml"
    shipped = read_experiment("sst2")["dataset"]
    own = {key: shipped[key] for key in ("labels", "over_long", "near_duplicate")}
    path.write_text(yaml.safe_dump(FLAT | {"max_new_tokens": 12} | own), encoding="utf-8")
    theirs = resolve(path, facts=Facts(), profile="full").experiment
    ours = resolve("sst2", facts=Facts(), profile="full").experiment
    assert theirs == ours


def test_a_published_name_outranks_an_ambiguous_end() -> None:
    found = resolve("quotes", facts=Facts(), overrides=["batch_size=3"]).experiment
    assert (found.training.batch_size, found.generation.batch_size) == (3, 32)
    assert set(PUBLISHED.values()) <= set(KEYS)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("fp16=true", "model.compute_dtype", "float16"),
        ("bf16=true", "model.compute_dtype", "bfloat16"),
        ("dtype=bfloat16", "model.compute_dtype", "bfloat16"),
        ("use_wandb=true", "tracking.tracker", "wandb"),
        ("tracker=on", "tracking.tracker", "trackio"),
        ("tracker=off", "tracking.tracker", "none"),
        ("wandb_tags=[a, b]", "tracking.tags", ("a", "b")),
        ("tags=a b", "tracking.tags", ("a", "b")),
        ("checkpoint_metric=train/loss", "checkpoint.metric", "loss"),
        ("save_strategy=step", "checkpoint.save_strategy", "steps"),
        ("resume_option=best", "checkpoint.resume_option", "best"),
    ],
)
def test_names_and_values(override: str, key: str, value: Any) -> None:
    found = resolve("quotes", facts=Facts(), profile="tiny", overrides=[override])
    assert flatten(found.experiment)[key] == value
    assert found.reasons[key] == "set by you"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("storage_backend=s3", "checkpoint.remote_path to a URL"),
        ("fp16=yes please", "true or false"),
        ("framework=jax", "pytorch"),
        ("lora_task_type=SEQ_CLS", "CAUSAL_LM"),
        ("log_level=LOUD", "tracking.log_level"),
        ("watch_mode=some", "tracking.watch_mode"),
        ("remote_path=s3://me:" + "secret@bucket", "holds a password"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str) -> None:
    with pytest.raises(GemmateError, match=said):
        resolve("quotes", facts=Facts(), overrides=[override])


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("{}", "search.space"),
        ("{training.learning_rate: 3}", "write a list, or low and high"),
        ("{training.learning_rate: []}", "one plain value or more"),
        ("{training.learning_rate: [0.1, 0.1]}", "each once"),
        ("{training.learning_rate: {low: 0.1, high: 0.01}}", "low must be below high"),
        ("{training.learning_rate: {low: 0, high: 0.01, log: true}}", "above 0 where log"),
        ("{training.learning_rate: {low: 0, high: 0.01}}", "training.learning_rate: .* not 0.0"),
        ("{training.learning_rat: [0.1]}", "training.learning_rat cannot be searched"),
        ("{dataset.limit: [10]}", "leave rows and base as they are"),
        ("{training.eval_every: [1, 2]}", "cannot be searched"),
        ("{lora.r: [4, 0]}", "lora.r: .* not 0"),
        ("{lora.r: {low: 1, high: 4.5}}", "lora.r: .* not 4.5"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space: str, said: str) -> None:
    with pytest.raises(GemmateError, match=said):
        resolve("quotes", facts=Facts(), overrides=[f"search.space={space}"])


def test_the_default_space_and_a_shipped_one() -> None:
    default = Experiment().search.space
    assert default["training.learning_rate"] == {"low": 1e-5, "high": 1e-2, "log": True}
    assert {"training.batch_size", "lora.r", "lora.alpha"} <= {
        key for key, choice in default.items() if isinstance(choice, list)
    }
    for key in ("lora.dropout", "training.weight_decay"):
        assert default[key]["log"] is False and default[key]["low"] == 0
    tiny = resolve("quotes", facts=Facts(), profile="tiny").experiment
    assert tiny.search.space["training.learning_rate"]["high"] == 0.05
    assert resolve("quotes", facts=Facts(), profile="t4").experiment.search.space == default


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"resume_from_checkpoint": True}, "last"),
        ({"resume_from_checkpoint": True, "resume_option": "best"}, "best"),
        ({"resume_from_checkpoint": True, "resume_option": "path", "path": "a/b"}, "a/b"),
        ({"resume_option": "best"}, None),
    ],
)
def test_what_is_gone_on_with(settings: dict[str, Any], expected: str | None) -> None:
    assert Experiment(checkpoint=settings).checkpoint.resume == expected


def test_the_level_of_messages(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from gemmate_lib import machine

    log = logging.getLogger("gemmate")
    try:
        for level, heard in (("INFO", True), ("WARNING", False)):
            machine.speak(level)
            assert log.isEnabledFor(logging.INFO) == heard
            assert machine.transformers_level(level) == ("info" if heard else "error")
    finally:
        log.setLevel(logging.NOTSET)
        log.handlers.clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_algorithms_are_asked_for_or_not(wanted: bool) -> None:
    import torch

    from gemmate_lib import machine

    try:
        machine.prepare(seed=0, threads=1, deterministic=wanted)
        assert torch.are_deterministic_algorithms_enabled() is wanted
    finally:
        machine.prepare(seed=0, threads=1)


def test_runs_are_kept_where_the_experiment_says(tmp_path: Path) -> None:
    from gemmate_lib import machine
    from gemmate_lib.sft import home_of

    own = resolve("quotes", facts=Facts(), overrides={"project_dir": str(tmp_path)}).experiment
    assert home_of(own) == tmp_path and home_of(Experiment()) == machine.runs_home()


@pytest.mark.parametrize(
    ("settings", "installed", "said"),
    [
        ({}, False, "needs torch_xla, which is not installed"),
        ({"quantization": "nf4"}, True, "no 4-bit kernels for xla"),
    ],
)
def test_what_xla_cannot_do_here_is_said(
    settings: dict[str, str], installed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from gemmate_lib.models import load_base
    from gemmate_lib.settings import ModelConfig

    if installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(GemmateError, match=said):
        load_base(ModelConfig(device="xla", **settings))
