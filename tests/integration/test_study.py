"""A study is a folder: trained once, the same results.json each time, mistakes named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemmate_lib import study as module
from gemmate_lib.cli import app
from gemmate_lib.config import Facts, GemmateError
from gemmate_lib.methods import METHODS
from gemmate_lib.study import read_study, run_study, summary
from gemmate_lib.tiny.sayings import tiny_quotes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two variants, two seeds, two steps."""
    rows = tmp_path / "quotes.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_quotes()[:60]), "utf-8")
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "defaults.yaml").write_text(
        f"experiment: quotes\nseeds: [0, 1]\nsettings: {{dataset: {rows}, max_steps: 2, "
        "eval_every: 0, model.quantization: none, training.batch_size: 2}\n"
    )
    (folder / "lora.yaml").write_text("lora.r: 2\n")
    (folder / "prompt.yaml").write_text("method: prompt\nprompt.virtual_tokens: 3\n")
    return folder


def read(folder: Path) -> Any:
    return read_study(folder, facts=Facts(), profile="tiny")


def test_a_second_call_trains_nothing_and_writes_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "results.json", list[str]()
    found = run_study(read(folder), out=out, report=told.append)
    assert told == ["lora, seed 0", "lora, seed 1", "prompt, seed 0", "prompt, seed 1"]
    assert {k: len(v) for k, v in found["variants"].items()} == {"lora": 2, "prompt": 2}
    first, second = found["variants"]["prompt"]
    for record in (first, second):
        assert record["trained"] == 3 * 128 and record["step_seconds"] > 0
        assert record["forgotten"] == record["general"] - record["base"][1]
        assert record["peak_bytes"] > 4 * 1_394_304  # the weights alone
    assert first["loss"] != second["loss"]
    assert found["variants"]["lora"][0]["bytes"] > first["bytes"] > 4 * first["trained"]
    before = out.read_bytes()

    def none(*given: Any, **named: Any) -> Any:
        raise AssertionError("nothing is trained or measured again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", none)
        assert run_study(read(folder), out=out) == found and out.read_bytes() == before
    (folder / "lora.yaml").write_text("lora.r: 3\n")
    told.clear()
    changed = run_study(read(folder), out=out, report=told.append)
    assert told == ["lora, seed 0", "lora, seed 1"]
    assert changed["variants"]["prompt"] == found["variants"]["prompt"]


def test_the_command_writes_beside_the_runs(folder: Path) -> None:
    (folder / "lora.yaml").unlink()
    called = CliRunner().invoke(app, ["methods", str(folder), "--profile", "tiny"])
    assert called.exit_code == 0, called.output
    file = Path(called.output.rsplit("results: ", 1)[1].strip())
    assert json.loads(file.read_text("utf-8"))["study"] == "small"
    again = CliRunner().invoke(app, ["methods", str(folder), "--profile", "tiny"])
    assert "prompt, seed 0" in called.output and "prompt, seed 0" not in again.output
    assert called.output.endswith(again.output)


def test_the_shipped_study_compares_every_method() -> None:
    found = read_study("methods", facts=Facts(), profile="tiny")
    assert {name: seeds[0].method for name, seeds in found.variants.items()} == {
        name: name for name in METHODS
    }
    assert all(list(seeds) == [0, 1, 2] for seeds in found.variants.values())
    rows = {
        e.dataset.model_dump_json() for seeds in found.variants.values() for e in seeds.values()
    }
    steps = {e.training.max_steps for seeds in found.variants.values() for e in seeds.values()}
    assert len(rows) == len(steps) == 1
    listed = CliRunner().invoke(app, ["methods"]).output
    assert [line.split()[0] for line in listed.splitlines()] == list(METHODS)


def _without_seeds(folder: Path) -> None:
    (folder / "defaults.yaml").write_text("experiment: quotes\n")


def _alone(folder: Path) -> None:
    for name in ("lora", "prompt"):
        (folder / f"{name}.yaml").unlink()


@pytest.mark.parametrize(("spoil", "why"), [
    (_without_seeds, "is no study: it needs defaults.yaml"),
    (_alone, "a NAME.yaml for each variant"),
    (lambda f: (f / "lora.yaml").write_text("- a list"), "is no mapping"),
    (lambda f: (f / "lora.yaml").write_text("a: [b"), "Cannot read"),
    (lambda f: (f / "lora.yaml").write_text("methodx: lora"), "Did you mean 'method'"),
])  # fmt: skip
def test_a_mistake_in_a_folder_is_named(folder: Path, spoil: Callable[..., Any], why: str) -> None:
    spoil(folder)
    with pytest.raises(GemmateError, match=why):
        read(folder)


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(GemmateError, match="Did you mean 'methods'"):
        read_study("methodsx", facts=Facts())


def test_an_interval_over_seeds_is_students() -> None:
    results = {"variants": {"a": [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], "b": [{"x": 1.0}]}}
    found = summary(results, "x")
    assert found["a"].value == 2.0 and found["a"].n == 3
    # scipy.stats.ttest_1samp([1, 2, 3], 0).confidence_interval()
    assert (found["a"].low, found["a"].high) == pytest.approx((-0.48413771, 4.48413771))
    assert found["b"].low == float("-inf")
