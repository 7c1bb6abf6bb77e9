"""`gemmate cloud` as it is typed, and the pipeline's stages as plain functions."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import make_run
from typer.testing import CliRunner

from gemmate_lib import cli, stages
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.evaluation import Evaluation, read_evaluation, write_evaluation
from gemmate_lib.stats import Interval


def call(*arguments: object) -> str:
    """Run a command in this process and return what it printed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_submit_is_a_dry_run() -> None:
    told = call("cloud", "submit", "quotes", "--spot", "--bucket", "gs://mine", "--project", "p1",
                "--max-hours", 2)  # fmt: skip
    assert "dry run: nothing was sent" in told and "strategy: SPOT" in told
    assert "to projects/p1/locations/us-central1/customJobs:" in told
    assert "note: google/gemma-2b lies behind a licence" in told
    assert "n1-standard-8" in told and "a3-highgpu-1g" in told and "10% to 40%" in told
    shown = yaml.safe_load(told[told.index("displayName") : told.index("note:")])
    as_json = json.loads(call("cloud", "submit", "quotes", "--spot", "--bucket", "gs://mine",
                              "--project", "p1", "--max-hours", 2, "--json"))  # fmt: skip
    assert as_json["specification"] == shown
    fits = {each["machine"]: each for each in as_json["estimates"]}
    assert fits["n1-standard-8"]["profile"] == "t4" and fits["a2-ultragpu-1g"]["profile"] == "full"
    assert fits["n1-standard-8"]["gib"] < 14.6 and fits["a3-highgpu-1g"]["usd"] is None


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    row = {"machine": "my-box", "accelerator": "NVIDIA_L4", "count": 1, "capability": [8, 9],
           "memory_gib": 22, "tflops": 121, "usd": 0.5, "usd_spot": None, "as_of": "2026-11-01",
           "regions": ["us-east1"]}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"machines": [row]}))
    mine = ["--prices", tmp_path / "mine.yaml"]
    assert [each["machine"] for each in json.loads(call("cloud", "prices", *mine, "--json"))] == [
        "my-box"
    ]
    told = call("cloud", "submit", "quotes", "--machine", "my-box", "--region", "us-east1", *mine)
    assert "machineType: my-box" in told and "a2-highgpu" not in told


def test_prices_say_their_day() -> None:
    told = call("cloud", "prices")
    assert "NVIDIA_H100_80GB" in told and "as of" in told and "cloud.google.com" in told


def test_convert_tune_and_copy(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}"} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    out = tmp_path / "out.jsonl"
    told = call("cloud", "convert", tmp_path / "in.jsonl", "--out", out, "--system", "Count.")
    assert "3 examples" in told and '"systemInstruction"' in out.read_text("utf-8")
    assert "1 files" in call("cloud", "upload", out, f"file://{tmp_path}/bucket")
    call("cloud", "download", f"file://{tmp_path}/bucket", "--out", tmp_path / "back")
    assert (tmp_path / "back/out.jsonl").read_bytes() == out.read_bytes()
    told = call("cloud", "tune", "gs://bucket/out.jsonl", "--epochs", 2)
    assert "nothing was sent" in told and '"epoch_count": 2' in told


def test_package_and_pipeline_are_written(tmp_path: Path) -> None:
    assert len(call("cloud", "package", "--out", tmp_path / "p.tar.gz").split()[0]) == 64
    call("cloud", "pipeline", "--out", tmp_path / "p.yaml", "--image", "python:3.12")
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["pipelineInfo"]["name"] == "gemmate"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "quotes", "--submit"], "A job needs a project and a bucket"),
        (["submit", "quotes", "--submit", "--project", "p"], "Give --project and --bucket"),
        (["submit", "quotes", "--bucket", "mine"], "'mine' is no bucket"),
        (["submit", "qotes"], "Did you mean 'quotes'"),
        (
            ["submit", "quotes", "--region", "moon-1"],
            "moon-1 has no g2-standard-8 as far as is known",
        ),
        (["submit", "quotes", "--set", "dataset=rows.jsonl"], "which the job will not see"),
        (["convert", "nowhere.jsonl", "--out", "x.jsonl"], "nowhere.jsonl cannot be read"),
        (["upload", "nowhere", "file:///tmp/x"], "holds no file to copy"),
        (["pipeline", "rows.jsonl", "--out", "."], ". exists"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setattr(sys, "argv", ["gemmate", "cloud", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.count("\n") == 1


def measured(nll: list[float], **more: Any) -> Evaluation:
    interval = Interval(sum(nll) / len(nll), 0.0, float("inf"), len(nll))
    return Evaluation({"quote_perplexity": interval}, {}, {"quote_nll": nll} | more, [], "rows")


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = measured([1.0, 2.0])
    made.predictions.append({"prompt": "a\u2028b", "completion": "c"})
    write_evaluation(made, tmp_path)
    assert read_evaluation(tmp_path) == made
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(GemmateError, match="holds no evaluation"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(-0.5, "better"), (0.5, "worse"), (0.0, "within noise")]
)
def test_the_comparison_decides_by_the_loss(shift: float, verdict: str, tmp_path: Path) -> None:
    before = [2.0 + i / 7 % 1 for i in range(40)]
    # That general texts become worse is what fine-tuning does; it does not decide.
    write_evaluation(measured(before, general_nll=[1.0] * 40), tmp_path / "before")
    after = [x + shift + (0.01 if i % 2 else -0.01) for i, x in enumerate(before)]
    write_evaluation(measured(after, general_nll=[3.0] * 40), tmp_path / "after")
    found, lines = stages.compare(tmp_path / "before", tmp_path / "after")
    assert found == verdict and lines[-1] == f"quote_nll decides: {verdict}"


def test_what_is_worse_is_not_published(experiment: Callable[..., Experiment],
                                        tmp_path: Path) -> None:  # fmt: skip
    make_run(tmp_path / "run", experiment().model, "Quote: A")
    write_evaluation(measured([1.0, 2.0]), tmp_path / "after")
    with pytest.raises(GemmateError, match="worse than its base beyond noise"):
        stages.publish(tmp_path / "run", tmp_path / "after", tmp_path / "out", verdict="worse")
    assert not (tmp_path / "out").exists()
    files = stages.publish(
        tmp_path / "run", tmp_path / "after", tmp_path / "out", verdict="within noise",
        url=f"file://{tmp_path}/bucket",
    )  # fmt: skip
    assert set(files) <= {path.name for path in (tmp_path / "bucket").iterdir()}
    told = stages.register(tmp_path / "out", tmp_path / "model", url="gs://b/f", cloud={})
    assert told.startswith("dry run") and "gs://b/f" in told
    assert stages.deploy(tmp_path / "model", cloud={"service_account": "a@b"}).startswith("dry run")


def test_vertex_takes_what_registering_and_deploying_give(tmp_path: Path) -> None:
    """Never sent from here: that the client's methods have these parameters is what is known."""
    from google.cloud.aiplatform import Model

    (tmp_path / "out").mkdir()
    manifest = {"config": {"name": "x"}, "config_hash": "1"}
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    stages.register(tmp_path / "out", tmp_path / "model", url="gs://b/f", cloud={"image": "i"})
    request = json.loads((tmp_path / "model/request.json").read_text())
    inspect.signature(Model.upload).bind(**request, project="p", location="l")
    inspect.signature(Model.deploy).bind(None, **stages.MACHINE, service_account="a")
