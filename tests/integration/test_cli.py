"""The command line, on the embedded model and on real files."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemmate_lib import cli

SHORT = ["--set", "training.max_steps=3", "--set", "training.eval_every=0"]
SMALL = ["--set", "dataset.limit=80", "--limit", "8"]


def call(*arguments: object) -> str:
    """Run a command in this process and return what it printed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fails(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the command as installed and expect exit code 2."""
    monkeypatch.setattr(sys, "argv", ["gemmate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run made by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    told = call("finetune", "quotes", "--profile", "tiny", *SHORT, *SMALL, "--out", folder)
    assert "nearly repeats a row" in told and "quote_perplexity" in told
    return folder


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "gemmate_lib", "--help"], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - began)
    for command in ("course", "finetune", "evaluate", "compare", "generate", "push", "doctor",
                    "tiny", "card", "search"):  # fmt: skip
        assert command in done.stdout
    heavy = (
        "import sys, gemmate_lib.cli; print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    assert min(seconds) < 1.0  # 0.5 s on a machine that does nothing else


def test_the_same_numbers_as_the_library(run: Path, experiment: Callable[..., object]) -> None:
    from gemmate_lib.sft import finetune_or_load, load_run

    same = finetune_or_load(experiment(**{"max_steps": 3, "eval_every": 0, "dataset.limit": 80}))
    assert same.log == load_run(run).log


def test_evaluate_and_compare_as_json(run: Path) -> None:
    metrics = json.loads(call("evaluate", run, "--json", "--limit", 8))
    assert metrics["quote_perplexity"]["n"] == 8
    assert (run / "predictions.jsonl").is_file()
    found = json.loads(call("compare", "base", run, "--json", "--limit", 8))
    assert found["quote_nll"]["difference"]["value"] < 0
    assert "quote_nll" in call("compare", run, run, "--limit", 8)
    told = call("compare", "base", run, "--limit", 8, "--changed", "distinct_2")
    assert "\n\n'Quote: " in told and told.count("  before ") == told.count("   after ") <= 10
    rows = json.loads(
        call("compare", "base", run, "--json", "--limit", 8, "--changed", "distinct_2")
    )
    assert len(set(rows["changed"][0]["distinct_2"])) == 2


def test_generate_one_and_many(run: Path, tmp_path: Path) -> None:
    text = call("generate", run, "--prompt", "Quote: Imagination is more", "--max-new-tokens", 5)
    assert text.startswith("Quote: Imagination is more ")
    rows = [{"prompt": "Quote: A", "id": 7}, {"prompt": "Quote: Without money"}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    call("generate", run, "--input", source, "--output", output, "--max-new-tokens", 5)
    done = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k != "completion"} for row in done] == rows
    assert all(row["completion"] for row in done)


def test_push_is_a_dry_run(run: Path) -> None:
    told = call("push", run, "someone/quotes")
    assert "adapter_model.safetensors" in told and "dry run" in told
    assert "training_args" not in told and "predictions" not in told


def test_cards_and_doctor() -> None:
    assert "english_quotes" in call("card", "list")
    assert "synthetic" in call("card", "show", "tiny_quotes")
    assert "training.batch_size" in call("config", "show", "sst2", "--profile", "t4")
    shown = json.loads(call("config", "show", "sst2", "--set", "lora.r=2", "--json"))
    assert shown["lora"]["r"] == 2 and shown["seed"] == 23
    told = call("doctor")
    assert "profile    tiny" in told and "ampere" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "qotes", "--out", "x"], "Did you mean 'quotes'"),
        (["finetune", "quotes", "--set", "training.max_step=3", "--out", "x"], "max_steps"),
        (["finetune", "quotes", "--profile", "tinny", "--out", "x"], "Did you mean 'tiny'"),
        (["evaluate", "nowhere"], "holds no run"),
        (["generate", "nowhere"], "--prompt TEXT"),
        (["course", "-p", "lora_r"], "NAME=VALUE"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails(monkeypatch, *arguments)
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and "Traceback" not in told


def test_real_quotes_by_a_column_mapping(real: Callable[[str], Path], tmp_path: Path) -> None:
    told = call(
        "finetune", "quotes", "--profile", "tiny", *SHORT, "--limit", 8, "--out", tmp_path / "run",
        "--set", f"dataset={real('quotable_2127.json')}",
        "--set", "dataset.columns=quote=content author=author tags=tags",
    )  # fmt: skip
    assert "2127 rows read" in told
    assert "empty tags" in told
    assert "repeats a row" in told and "quote_perplexity" in told


def test_real_instructions(real: Callable[[str], Path], tmp_path: Path) -> None:
    told = call(
        "finetune", "quotes", "--profile", "tiny", *SHORT, *SMALL, "--out", tmp_path / "run",
        "--set", f"dataset={real('instructions_toolformer.json')}",
        "--set", "dataset.over_long=cut",
    )  # fmt: skip
    assert "(instruction)" in told and "an extra key" in told and "exact_match" in told


def test_a_text_file_and_a_folder_of_three_splits(tmp_path: Path) -> None:
    """Any of the usual shapes; the files of a folder stay the splits they are."""
    texts = [{"text": f"The {i}th lantern stood near harbour number {i * 7}."} for i in range(60)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts), "utf-8")
    folder = tmp_path / "splits"
    folder.mkdir()
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = [
            {"input_text": f"Say the word for {start + i}:", "output_text": f" word{start + i}"}
            for i in range(20)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    for source, expected in ((tmp_path / "plain.jsonl", "(text)"), (folder, "train 20, valid")):
        told = call(
            "finetune", "quotes", "--profile", "tiny", *SHORT, "--limit", 4,
            "--set", f"dataset={source}", "--out",
            tmp_path / f"run-{source.stem}",
        )  # fmt: skip
        assert expected in told and "completion_perplexity" in told
