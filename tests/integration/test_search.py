"""A search with real trials: what it may see, how they may end, and what the winner is worth."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemmate_lib import cli, trials
from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.search import Search, load_search, optimize_hyperparameters
from gemmate_lib.search_plots import importances, write_plots
from gemmate_lib.splitting import normalise
from gemmate_lib.winner import best_experiment, finetune_with_best_params

SHORT = {
    "training.max_steps": 4, "training.eval_every": 2, "training.warmup_steps": 1,
    "dataset.limit": 60, "search.startup_trials": 2,
}  # fmt: skip
RATE = {"training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "lora.r": [4, 8]}
Make = Callable[..., Any]


def short(**overrides: Any) -> Any:
    given = SHORT | {"search.space": RATE} | overrides
    return resolve("quotes", facts=Facts(), profile="tiny", overrides=given).experiment


def facts_of(search: Search) -> list[Any]:
    return [(t.state.name, t.params, t.intermediate_values, t.value) for t in search.tally.told]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return optimize_hyperparameters(short(), 3, out=tmp_path_factory.mktemp("search") / "study")


def test_trials_are_measured_at_each_evaluation(found: Search) -> None:
    assert len(found.tally.told) == 3
    for trial in found.tally.told:
        assert list(trial.intermediate_values) in ([2], [2, 4])
        assert trial.value == list(trial.intermediate_values.values())[-1]
        assert 1e-3 <= trial.params["training.learning_rate"] <= 1e-1
    assert found.best.value == min(t.value for t in found.tally.told if t.state.name == "COMPLETE")
    assert list((found.directory / "trials").iterdir()) == []


def test_a_finished_study_is_read_and_not_run_again(
    found: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(trials, "objective")
    again = optimize_hyperparameters(short(), 3, out=found.directory)
    assert facts_of(again) == facts_of(found) == facts_of(load_search(found.directory))
    with pytest.raises(GemmateError, match=r"another study.*training.max_steps: 4 then, 6 now"):
        optimize_hyperparameters(short(**{"training.max_steps": 6}), 3, out=found.directory)


def test_the_search_cannot_read_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no rows of it, and with others in their place all trials are the same to the bit."""
    from gemmate_lib.tiny.sayings import tiny_quotes

    rows = list({normalise(row["quote"]): row for row in tiny_quotes(1)}.values())
    for name, part in (("rest", rows[:200]), ("a", rows[200:300]), ("b", rows[300:])):
        lines = [json.dumps({"quote": r["quote"], "author": r["author"]}) + "\n" for r in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    given, real = [], trials.finetune_model

    def noted(*args: Any, splits: Any, **named: Any) -> Any:
        given.append(splits.test)
        return real(*args, splits=splits, **named)

    monkeypatch.setattr(trials, "finetune_model", noted)
    results = []
    for name in ("a", "b"):
        files = {"dataset.train": str(tmp_path / "rest.jsonl"), "dataset.near_duplicate": 1.0}
        files["dataset.test"] = str(tmp_path / f"{name}.jsonl")
        results.append(optimize_hyperparameters(short(**files), 2, out=tmp_path / name))
    assert given == [[]] * 4
    assert facts_of(results[0]) == facts_of(results[1])


def test_the_winner_is_measured_once_on_the_test_split(found: Search) -> None:
    verdict = finetune_with_best_params(found)
    assert verdict.seed == found.experiment.seed + 1 == best_experiment(found).seed
    assert verdict.trial == found.best.number and verdict.found == found.best.value
    assert verdict.comparison.difference.n == verdict.test.n > 1
    gap = verdict.test.value - verdict.default.value
    assert verdict.comparison.difference.value == pytest.approx(gap)
    assert "on the test split" in "\n".join(verdict.lines())
    before = (found.directory / "verdict.json").stat().st_mtime_ns
    assert finetune_with_best_params(found) == verdict
    assert (found.directory / "verdict.json").stat().st_mtime_ns == before
    with pytest.raises(GemmateError, match="opened for trial"):
        finetune_with_best_params(found, seed=9)
    with pytest.raises(GemmateError, match="is that of the trials"):
        finetune_with_best_params(found, seed=0)


def test_every_picture_is_drawn(found: Search) -> None:
    finetune_with_best_params(found)
    names = [path.name for path in write_plots(found)]
    assert names == ["history.png", "importances.png", "parallel.png", "verdict.png"]
    assert all((found.directory / "plots" / name).stat().st_size > 5_000 for name in names)
    assert sum(importances(found).values()) == pytest.approx(1)


def test_a_trial_that_diverges_or_needs_too_much_never_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trials.finetune_model

    def small(experiment: Any, **named: Any) -> Any:
        if experiment.lora.r == 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(experiment, **named)

    monkeypatch.setattr(trials, "finetune_model", small)
    space = {"training.learning_rate": [1e-2, 1e30], "lora.r": [4, 8]}
    wild = short(**{"search.space": space, "search.sampler": "grid"})
    told = []
    search = optimize_hyperparameters(wild, out=tmp_path / "study", report=told.append)
    ends = {(t.params["training.learning_rate"], t.params["lora.r"]): t for t in told}
    assert {key: t.state.name for key, t in ends.items()} == {
        (1e-2, 4): "COMPLETE", (1e30, 4): "PRUNED", (1e-2, 8): "FAIL", (1e30, 8): "FAIL",
    }  # fmt: skip
    assert "diverged" in ends[1e30, 4].user_attrs["reason"]
    assert "out of memory" in ends[1e-2, 8].user_attrs["reason"]
    assert search.best.params["training.learning_rate"] == 1e-2 and not search.tally.lost


def test_an_error_of_every_trial_ends_the_study_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **named: Any) -> Any:
        raise GemmateError("The disk is full. Free some.")

    monkeypatch.setattr(trials, "finetune_model", broken)
    with pytest.raises(GemmateError, match="disk is full"):
        optimize_hyperparameters(short(), 3, out=tmp_path / "study")
    monkeypatch.undo()
    assert len(optimize_hyperparameters(short(), 1, out=tmp_path / "study").tally.told) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.eval_every": 0}, "compares validation losses"),
        ({"training.eval_every": 5}, "compares validation losses"),
        ({"search.sampler": "grid"}, "a grid needs training.learning_rate as a list"),
    ],
)
def test_what_cannot_be_searched_is_said_before(
    overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(GemmateError, match=said):
        optimize_hyperparameters(short(**overrides), 2, out=tmp_path / "study")
    with pytest.raises(GemmateError, match="needs an end"):
        optimize_hyperparameters(short(), out=tmp_path / "study")


def test_without_optuna_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GemmateError, match=r"gemmate-course\[search\]"):
        trials.prepare(short())


def test_where_all_weights_are_trained_an_adapters_settings_are_not_searched() -> None:
    space = trials.space_of(short(method="full"))
    assert list(space) == ["training.learning_rate"] and "lora.r" in trials.space_of(short())


ARGUMENTS = ["--profile", "tiny", "--set", f"search.space={json.dumps(RATE)}"] + [
    part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")
]


def test_the_command(found: Search) -> None:
    given = ["search", "quotes", "--trials", "3", "--out", str(found.directory), *ARGUMENTS]
    result = CliRunner().invoke(cli.app, given, catch_exceptions=False)
    assert result.exit_code == 0 and "3 trials in" in result.output
    assert f"--set lora.r={found.best.params['lora.r']}" in result.output
    result = CliRunner().invoke(cli.app, [*given, "--best", "--json"], catch_exceptions=False)
    assert json.loads(result.output)["loss"] == found.best.value


@pytest.mark.slow
def test_two_processes_killed_twice_end_with_what_was_asked(tmp_path: Path) -> None:
    """`gemmate search --workers 2`, all of it killed with -9 while trials run, and begun again."""
    out = tmp_path / "study"
    command = [sys.executable, "-m", "gemmate_lib", "search", "quotes", "--workers", "2",
               "--trials", "8", "--out", str(out), *ARGUMENTS]  # fmt: skip
    safe: list[Any] = []
    for wanted in (1, 3):
        running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 200
        while time.monotonic() < end:
            time.sleep(0.3)
            if (out / "study.json").is_file():
                tally = load_search(out).tally
                if len(tally.told) >= wanted and tally.running:
                    break
        signal_group(running)
        safe = facts_of(load_search(out))
        assert wanted <= len(safe) < 8
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    search = load_search(out)
    assert len(search.tally.told) == 8 and not search.tally.running and search.tally.lost
    assert all(each in facts_of(search) for each in safe)


def signal_group(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_rows_are_those_of_the_splits(experiment: Make) -> None:
    from gemmate_lib.sft import load_splits

    splits = load_splits(short())
    seen = trials.without_test(splits)
    assert seen == dataclasses.replace(splits, test=[]) and splits.test and seen.train
