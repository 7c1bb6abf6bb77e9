"""Checkpoints: sealed, verified to the byte, chosen, kept and removed by their rules."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip

from gemmate_lib import checkpoints
from gemmate_lib.checkpoints import BadCheckpoint, choose, prune, read, seal, verify
from gemmate_lib.config import Facts, GemmateError, resolve


def make(folder: Path, step: int, loss: float | None = None) -> checkpoints.Checkpoint:
    staged = folder.parent / "trainer" / f"checkpoint-{step}"
    (staged / "inner").mkdir(parents=True)
    (staged / "adapter_model.safetensors").write_bytes(bytes(range(256)) * step)
    (staged / "inner" / "optimizer.pt").write_text("state")
    (staged / "training_args.bin").write_text("a pickle")
    metrics = {} if loss is None else {"eval_loss": loss}
    record = {"step": step, "metrics": metrics, "identity": {"seed": 1}, "optimizer": True}
    return seal(staged, folder, record)


def test_a_sealed_checkpoint_verifies_and_has_no_pickled_arguments(tmp_path: Path) -> None:
    made = make(tmp_path / "c", 3, 0.5)
    again = verify(made.path)
    assert (again.step, again.metrics, again.identity) == (3, {"eval_loss": 0.5}, {"seed": 1})
    assert set(again.manifest["files"]) == {"adapter_model.safetensors", "inner/optimizer.pt"}
    assert not (made.path / "training_args.bin").exists()
    assert not any((tmp_path / "trainer").iterdir())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "checkpoint.json").unlink(), "no manifest"),
    "a cut manifest": (lambda p: (p / "checkpoint.json").write_text("{"), "manifest is damaged"),
    "an edited manifest": (
        lambda p: (p / "checkpoint.json").write_text(
            json.dumps(json.loads((p / "checkpoint.json").read_text()) | {"step": 4})
        ),
        "altered",
    ),
    "a flipped bit": (lambda p: flip(p / "adapter_model.safetensors"), "not what was saved"),
    "a cut file": (
        lambda p: (p / "adapter_model.safetensors").write_bytes(b"short"),
        "5 bytes, not 768",
    ),
    "a missing file": (
        lambda p: (p / "inner" / "optimizer.pt").unlink(),
        "optimizer.pt is missing",
    ),
    "a planted file": (
        lambda p: (p / "adapter_model.bin").write_text("evil"),
        "adapter_model.bin was put there",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, said = DAMAGE[name]
    made = make(tmp_path / "c", 3)
    damage(made.path)
    with pytest.raises(BadCheckpoint, match=said):
        verify(made.path)


def test_the_newest_that_verifies_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for step in (2, 4, 10, 12):
        make(folder, step, 1 / step)
    flip(folder / "checkpoint-12" / "adapter_model.safetensors")
    (folder / "checkpoint-10" / "checkpoint.json").unlink()
    (folder / "checkpoint-99").mkdir()
    found = choose(folder, "last", metric="eval_loss", mode="min")
    assert found.checkpoint.step == 4
    assert [fault.split(":")[0].split(" ")[0] for fault in found.skipped] == [
        "checkpoint-99", "checkpoint-12", "checkpoint-10",
    ]  # fmt: skip
    best = choose(folder, "best", metric="eval_loss", mode="max")
    assert best.checkpoint.step == 2
    assert choose(folder, str(folder / "checkpoint-2"), metric="", mode="min").checkpoint.step == 2
    with pytest.raises(BadCheckpoint, match="checkpoint-12"):
        choose(folder, str(folder / "checkpoint-12"), metric="", mode="min")
    for step in (2, 4):
        flip(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    with pytest.raises(GemmateError, match=r"No checkpoint .* checkpoint-2: .*Start the run again"):
        choose(folder, "last", metric="eval_loss", mode="min")


def steps(folder: Path) -> list[int]:
    return sorted(each.step for each in checkpoints.sealed(folder))


@pytest.mark.parametrize(
    ("last", "best", "mode", "kept"),
    [
        (2, 0, "min", [5, 6]),
        (1, 1, "min", [2, 6]),  # the best is no victim of the last-n rule
        (0, 1, "min", [2]),
        (0, 2, "max", [1, 4]),
        (1, 2, "min", [2, 5, 6]),
        (9, 0, "min", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_stays(last: int, best: int, mode: str, kept: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.8, 5: 0.2, 6: None}
    for step, loss in losses.items():
        make(folder, step, loss)
        prune(folder, keep_last_n=last, keep_best_n=best, metric="eval_loss", mode=mode)  # type: ignore[arg-type]
    assert steps(folder) == kept
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{k}" for k in kept]


def test_the_same_step_twice_keeps_the_later(tmp_path: Path) -> None:
    make(tmp_path / "c", 3, 0.5)
    make(tmp_path / "c", 3, 0.4)
    assert read(tmp_path / "c" / "checkpoint-3").metrics == {"eval_loss": 0.4}
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_last_n": 0}, "nothing is kept"),
        ({"keep_best_n": 1, "val_steps_freq": 0}, "set eval_every"),
        ({"keep_best_n": 1, "val_steps_freq": 2, "save_every": 3}, "multiple of eval_every"),
        ({"resume_option": "path"}, "needs checkpoint.path"),
    ],
)
def test_rules_that_could_not_hold_are_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(GemmateError, match=said):
        resolve("quotes", facts=Facts(), overrides=settings)
