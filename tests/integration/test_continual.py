"""Sequences of tasks on the embedded model: shared stages, exact where nothing is added."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gemmate_lib import cli, consolidation, continual
from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.continual import (
    Chain,
    Strategy,
    compare_strategies,
    learn_in_sequence,
    sequence_of,
    strategies,
)
from gemmate_lib.forgetting import History, differences
from gemmate_lib.sft import finetune_model

SHORT = {"max_steps": 3, "training.batch_size": 4, "training.warmup_steps": 1}
SHORT |= {"dataset.limit": 40, "learning_rate": 1e-2, "method": "lora"}
SHORT |= {"model.quantization": "none", "dataset.max_length": 64, "lora.dropout": 0.1}
ROWS = 6


def task(name: str, **more: Any) -> Any:
    return resolve(name, facts=Facts(), profile="tiny", overrides=SHORT | more).experiment


@pytest.fixture(scope="module")
def sequence() -> Any:
    return sequence_of([task("quotes"), task("sst2")])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def plain(sequence: Any, home: Path) -> History:
    experiment, tasks = sequence
    return learn_in_sequence(tasks, experiment, Strategy(), out=home, rows=ROWS)


def adapters(home: Path) -> dict[str, str]:
    """The sha256 of the weights of each stage."""
    return {
        path.parents[1].name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.glob("stages/*/adapter/adapter_model.safetensors")
    }


def same(one: History, two: History) -> bool:
    return all(np.array_equal(one.losses[task], two.losses[task]) for task in one.losses)


def test_the_first_task_is_learned_as_any_run_is(
    sequence: Any, plain: History, home: Path, tmp_path: Path
) -> None:
    """By the same trainer, with all its guards: the adapter of a run has the same bytes."""
    experiment, tasks = sequence
    run = finetune_model(experiment, out=tmp_path / "run", splits=tasks["quotes"])
    saved = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(saved).hexdigest() in adapters(home).values()
    assert plain.loss().shape == (3, 2) and len(adapters(home)) == 2


@pytest.mark.parametrize(
    "nothing", [Strategy(replay=0, replay_share=0.5), Strategy(ewc=0.0, fisher_rows=4)]
)
def test_size_and_lambda_of_zero_are_plain_training_to_the_bit(
    sequence: Any, plain: History, home: Path, tmp_path: Path, nothing: Strategy
) -> None:
    """In a folder of its own, where no stage could be found."""
    experiment, tasks = sequence
    found = learn_in_sequence(tasks, experiment, nothing, out=tmp_path, rows=ROWS)
    assert same(found, plain) and adapters(tmp_path) == adapters(home)


def test_a_penalty_without_strength_changes_no_bit(
    sequence: Any, plain: History, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road of EWC itself, Fisher estimate and hooks included, at strength 0."""
    experiment, tasks = sequence
    real, strengths = consolidation.held_to, []

    def without(weights: Any, anchors: Any, strength: float, **more: Any) -> Any:
        strengths.append((strength, len(anchors)))
        return real(weights, anchors, 0.0, **more)

    monkeypatch.setattr(continual, "held_to", without)
    found = learn_in_sequence(tasks, experiment, Strategy(ewc=5.0), out=tmp_path, rows=ROWS)
    assert strengths == [(5.0, 0), (5.0, 1)]
    assert same(found, plain)
    assert set(adapters(tmp_path).values()) == set(adapters(home).values())


def test_strategies_share_what_they_have_in_common(
    sequence: Any, plain: History, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, tasks = sequence
    trained = []
    real = continual.train
    monkeypatch.setattr(
        continual, "train", lambda *a, **k: trained.append(len(a[2].train)) or real(*a, **k)
    )
    chosen = strategies(replay=8, ewc=100.0)
    found = compare_strategies(tasks, experiment, chosen, out=home, seeds=[0], rows=ROWS)
    own = len(tasks["sst2"].train)
    assert trained == [own + round(own / 3), own, own + round(own / 3), own]  # not quotes again
    results = (home / "results.json").read_bytes()
    again = compare_strategies(tasks, experiment, chosen, out=home, seeds=[0], rows=ROWS)
    assert len(trained) == 4 and (home / "results.json").read_bytes() == results
    assert all(same(found[name][0], again[name][0]) for name in chosen)
    assert json.loads(results)["strategies"]["none"]["measures"]["loss"]["n"] == 1
    assert same(found["none"][0], plain)
    # What was learned with a strategy differs from the second task on, and there alone.
    for name in ("replay", "ewc", "both"):
        assert np.array_equal(found[name][0].loss()[:2], plain.loss()[:2])
        assert not np.array_equal(found[name][0].loss()[2], plain.loss()[2])
    held = differences(found["none"], found["ewc"])["earlier_loss"]
    assert held.value < 0


def test_an_adapter_of_its_own_forgets_nothing_and_is_asked_for_its_own_task(
    sequence: Any, plain: History, home: Path
) -> None:
    experiment, tasks = sequence
    alone = learn_in_sequence(tasks, experiment, Strategy(separate=True), out=home, rows=ROWS)
    loss = alone.loss()
    assert loss[1, 0] == loss[2, 0] == plain.loss()[1, 0]
    assert loss[0, 1] == loss[1, 1] == plain.loss()[0, 1]  # before it has one, the base
    assert loss[2, 1] < loss[1, 1]


def test_a_stage_that_was_cut_off_is_learned_again_to_the_same_bits(
    sequence: Any, plain: History, home: Path, tmp_path: Path
) -> None:
    experiment, tasks = sequence
    shutil.copytree(home / "stages", tmp_path / "stages")
    chain = Chain(tasks, experiment, Strategy(), tmp_path, ROWS)
    last = tmp_path / "stages" / chain.keys[-1]
    for name in ("log.json", *(path.name for path in last.glob("losses_*"))):
        (last / name).unlink()
    (last / ".unfinished").touch()  # as a killed process leaves it
    assert same(learn_in_sequence(tasks, experiment, Strategy(), out=tmp_path, rows=ROWS), plain)
    assert adapters(tmp_path) == adapters(home)


def test_a_longer_sequence_and_other_rows_find_what_was_learned(
    sequence: Any, plain: History, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer, tasks = sequence_of([task("quotes"), task("sst2"), task("squad_v2")])
    assert longer == sequence[0]
    names = [stage.name for stage in (home / "stages").iterdir()]
    assert set(Chain(tasks, longer, Strategy(), home).keys[:3]) <= set(names)
    monkeypatch.setattr(continual, "train", None)
    more = learn_in_sequence(sequence[1], sequence[0], Strategy(), out=home, rows=2)
    assert len(more.tokens["quotes"]) == 2


def test_a_diverging_stage_stops_and_leaves_nothing(sequence: Any, tmp_path: Path) -> None:
    experiment, tasks = sequence
    wild = {"learning_rate": 1e38, "max_grad_norm": 0.0}
    training = experiment.training.model_copy(update=wild)
    broken = experiment.model_copy(update={"training": training})
    with pytest.raises(GemmateError, match="diverged"):
        learn_in_sequence(tasks, broken, Strategy(), out=tmp_path, rows=ROWS)
    assert not list(tmp_path.glob("stages/*/adapter"))


def test_what_cannot_be_learned_in_sequence_is_refused(sequence: Any, tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="two or more, each once"):
        sequence_of([task("quotes")])
    with pytest.raises(GemmateError, match="two or more, each once"):
        sequence_of([task("quotes"), task("quotes")])
    with pytest.raises(GemmateError, match="Set method=lora"):
        sequence_of([task("quotes", method="full"), task("sst2")])
    experiment, tasks = sequence
    half = experiment.model.model_copy(update={"compute_dtype": "float16"})
    scaled = experiment.model_copy(update={"model": half})
    with pytest.raises(GemmateError, match="unscaled gradients"):
        learn_in_sequence(tasks, scaled, Strategy(ewc=1.0), out=tmp_path)


def test_the_command_says_what_the_library_finds(
    sequence: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Callable[..., Any] = CliRunner().invoke
    given = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    given += ["--profile", "tiny", "--replay", "8", "--seeds", "1", "--rows", str(ROWS)]
    line = ["continual", "quotes", "sst2", "--out", str(home), *given]
    experiment, tasks = sequence
    compare_strategies(
        tasks, experiment, strategies(replay=8, ewc=100.0), out=home, seeds=[0], rows=ROWS
    )
    results = (home / "results.json").read_text("utf-8")
    monkeypatch.setattr(continual, "train", None)  # all of it is there
    done = call(cli.app, line, catch_exceptions=False)
    assert done.exit_code == 0 and "ewc against none" in done.output
    told = call(cli.app, [*line, "--json"], catch_exceptions=False)
    assert json.loads(told.output) == json.loads(results)
