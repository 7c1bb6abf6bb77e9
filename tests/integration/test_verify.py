"""A run made again: bit-exact here, and the first differing step where it is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemmate_lib import cli
from gemmate_lib.config import GemmateError
from gemmate_lib.sft import Run, finetune_model, load_run
from gemmate_lib.verify import verify_run

Make = Callable[..., Any]
SHORT = {"max_steps": 4, "eval_every": 2, "dataset.limit": 40, "lora.dropout": 0.1}


@pytest.fixture
def run(experiment: Make, tmp_path: Path) -> Run:
    return finetune_model(experiment(**SHORT), out=tmp_path / "run")


def edit(run: Run, **changes: Any) -> Run:
    """The run with its manifest edited, as another machine would have written it."""
    path = run.directory / "manifest.json"
    record = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        record[key] |= value
    path.write_text(json.dumps(record), "utf-8")
    return load_run(run.directory)


def log(run: Run, change: Callable[[dict[str, float]], None]) -> Run:
    records = run.log
    for record in records:
        change(record)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run.directory / "log.jsonl").write_text(lines, "utf-8")
    return run


def test_the_same_machine_gives_the_same_bits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_run(run).outcome == "bit-exact"
    found = verify_run(edit(run, machine={"capability": "AVX1"}, packages={"torch": "1.0"}))
    assert list(found.then_now) == ["machine.capability", "packages.torch"]
    assert any("packages.torch: 1.0 then" in line for line in found.lines())


def test_a_step_that_differs_is_named(run: Run) -> None:
    def more(share: float) -> Callable[[dict[str, float]], None]:
        def change(record: dict[str, float]) -> None:
            if record["step"] == 3 and "loss" in record:
                record["loss"] *= 1 + share

        return change

    near = verify_run(log(run, more(1e-5)))
    assert (near.outcome, near.step) == ("within tolerance", 3) and near.largest < 2e-5
    far = verify_run(log(run, more(0.1)))
    assert (far.outcome, far.step) == ("different", 3)
    assert far.lines()[0].startswith("different from step 3 on")


def test_other_rows_or_a_changed_resume_cannot_be_verified(run: Run) -> None:
    with pytest.raises(GemmateError, match="not those of the run: train differ"):
        verify_run(edit(run, data={"checksums": run.manifest["data"]["checksums"] | {"train": ""}}))
    record = json.loads((run.directory / "manifest.json").read_text("utf-8"))
    record["resumed"] = {"step": 2, "allowed": {"seed": [0, 1]}}
    (run.directory / "manifest.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(GemmateError, match="resumed with changed settings"):
        verify_run(load_run(run.directory))


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def code(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["gemmate", "verify", str(run.directory), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run()
        return int(ended.value.code or 0)

    assert code() == 0 and "bit-exact" in capsys.readouterr().out
    log(run, lambda record: record.update(loss=9.0) if "loss" in record else None)
    assert code("--json") == 1
    assert json.loads(capsys.readouterr().out)["outcome"] == "different"
