"""The benchmarks: listed, told apart from their helpers, and the README's table is theirs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemmate_lib.cli import app

ROOT = Path(__file__).parents[2]
NAMES = ("training", "memory", "generation", "loading", "startup", "scaling", "peers", "limit",
         "survival", "temporal", "serving")  # fmt: skip


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_they_are_listed_each_with_what_it_asks() -> None:
    told = CliRunner().invoke(app, ["bench"])
    lines = dict(line.split(maxsplit=1) for line in told.output.splitlines())
    assert {*NAMES, "true_shape"} == {*lines}
    assert all(len(said) > 30 for said in lines.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_explains_itself_and_hands_on_its_exit_code(name: str) -> None:
    gemmate = [sys.executable, "-m", "gemmate_lib", "bench", name]
    run = lambda *more: subprocess.run(  # noqa: E731
        [*gemmate, *more], capture_output=True, text=True, check=False
    )
    told = run("--", "--help")
    assert told.returncode == 0 and "--out" in told.stdout
    wrong = run("--nosuch")
    assert wrong.returncode == 2 and "unrecognized arguments: --nosuch" in wrong.stderr


def test_a_median_and_its_range_and_ratios_pair_by_pair() -> None:
    from common import ratios, shown, spread

    assert spread([3.0, 1.0, 2.0, 9.0, 4.0]) == [3.0, 1.0, 9.0]
    assert ratios([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == [2.0, 1.0, 3.0]
    assert shown([3.0, 1.0, 9.0]) == "3 (1 to 9)" and shown("as it is") == "as it is"


def test_the_arithmetic_of_a_step_is_what_is_counted() -> None:
    """torch's own counter leaves the CPU's fused attention out, and the first layer needs less."""
    import torch
    from limit import flops
    from torch.utils.flop_counter import FlopCounterMode

    from gemmate_lib.adapters import attach_lora
    from gemmate_lib.config import LoraSettings, ModelConfig
    from gemmate_lib.models import load_base

    base = load_base(ModelConfig(id="tiny-gemma", quantization="none", device="cpu"))
    model = attach_lora(base.model, LoraSettings(r=16), seed=0).train()
    text, ids = base.model.config, torch.randint(4, 2000, (4, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert flops(text, [8] * 4, 16) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert flops(text, [64], 16) > 2 * flops(text, [32], 16)  # attention grows with the square


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    from scaling import exponent

    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([1, 2, 4, 8], [5, 5, 5, 5]) == pytest.approx(0)


def test_the_readmes_table_of_performance_is_the_measured_one(tmp_path: Path) -> None:
    from performance import table

    assert table() in (ROOT / "README.md").read_text("utf-8"), "run `make performance`"
    for name in ("training", "peers", "limit", "generation", "serving", "memory", "loading"):
        found = json.loads((ROOT / f"benchmarks/{name}.json").read_text("utf-8"))
        assert found["machine"]["versions"]["torch"] and found["machine"]["threads"]
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert table(tmp_path) == table()
    found["ways"]["4-bit copy"]["times as fast"][0] = 12.25
    (tmp_path / "loading.json").write_text(json.dumps(found))
    assert "12.2 (" in table(tmp_path)


def test_what_the_table_tells_holds_in_the_files() -> None:
    """The limits that the scripts end with 1 for, in what was committed."""
    found = {
        name: json.loads((ROOT / f"benchmarks/{name}.json").read_text("utf-8"))
        for name in ("training", "generation", "loading")
    }
    for arms in found["training"]["models"].values():
        assert arms["ours"]["times as fast"][0] >= 1.5 and arms["ours"]["largest loss gap"] < 1e-3
    ways = found["generation"]["ways"]
    assert ways["ours, batches of 32"]["times as fast"][0] >= 5
    assert all(way["other texts"] == 0 for way in ways.values())
    served = json.loads((ROOT / "benchmarks/serving.json").read_text("utf-8"))
    assert served["other texts"] == 0
    assert served["arms"]["mixed batches"]["16"]["times as fast"][0] > 1
    copy = found["loading"]["ways"]["4-bit copy"]
    assert copy["times as fast"][0] >= 15 and copy["GiB"][2] < 4 and found["loading"]["same logits"]


def test_real_events_are_taught_a_little_off_and_alike_in_every_arm() -> None:
    from temporal_runs import as_seen, taught

    from gemmate_lib.timestamps import MISSING, YEAR

    rows = [{"text": f"Event {i}.", "timestamp": -i * 10**12} for i in range(10)]
    job = {"seed": 1, "steps": 100, "kind": "era", "data": "events"}
    drawn = taught(rows, job)
    assert drawn == taught(rows, job | {"kind": None, "text": True})
    assert len(drawn) == 3200 and [row["text"] for row in drawn[:20]] == [
        row["text"] for row in rows * 2
    ]
    known = [row for row in drawn if row["timestamp"] != MISSING]
    assert 0.87 < len(known) / len(drawn) < 0.93
    own = {row["text"]: row["timestamp"] for row in rows}
    off = [(row["timestamp"] - own[row["text"]]) / YEAR for row in known]
    assert (sum(x * x for x in off) / len(off)) ** 0.5 == pytest.approx(4, rel=0.05)
    text = job | {"kind": None, "text": True}
    assert as_seen(rows[0], text).prompt == "Thursday, 1 January 1970. "
    assert as_seen(rows[0], text, MISSING).prompt == "" == as_seen(rows[0], job).prompt
    assert as_seen(rows[0], job, MISSING).times == ((0, MISSING),)


def test_what_time_gains_is_told_of_the_mean_of_several_trainings() -> None:
    from temporal_report import failures, lines, report

    def run(true: float, **others: float) -> dict[str, dict[str, list[float]]]:
        means = {"true": true} | others
        return {"losses": {t: [m, m + 1, m + 2, m + 4] for t, m in means.items()}}

    found = report({
        "events none 0": run(9.0), "events none 1": run(11.0), "events text 0": run(7.0),
        "events era 0": run(8.0, shuffled=12.0, missing=9.5),
        "events era 1": run(9.0, shuffled=14.0, missing=9.5),
    })  # fmt: skip
    part = found["language"]["events"]
    assert part["n"] == 4 and part["seeds"]["era"] == [9.75, 10.75]
    gains = {name: value for name, (value, _, _) in part["gain"].items()}
    assert gains == pytest.approx({
        "era, true against era, shuffled": -4.5, "era, true against era, missing": -1.0,
        "era, true against none, true": -1.5, "era, true against text, true": 1.5,
    })  # fmt: skip
    each = part["gain over trainings"]
    assert set(each) == {f"era, true against {n}" for n in ("era, shuffled", "era, missing",
                                                            "none, true")}  # fmt: skip
    assert each["era, true against none, true"] == pytest.approx(  # -1 and -2: t of one degree
        [-1.5, -1.5 - 12.706 * 0.5, -1.5 + 12.706 * 0.5], rel=1e-4
    )
    assert failures(found) == []  # what is written into the prompt may be better
    assert "| none, true, each training | 10.75, 12.75 | |" in "\n".join(
        lines(found | {"headline": {}, "questions": {}})
    )
    for name in ("era, shuffled", "era, missing", "none, true"):
        worse = json.loads(json.dumps(found))
        worse["language"]["events"]["gain"][f"era, true against {name}"] = [-0.5, -1.0, 0.0]
        assert failures(worse) == [f"events: era, true against {name} shows no gain"]
        gain = worse["language"]["events"]["gain"]
        gain |= {f"calendar{k[3:]}": [-1, -2, -0.5] for k in gain}
        assert failures(worse) == []  # one encoding that gains is enough
