"""Instruction tuning from the command line: real rows with their odd one, and rows of ours."""

import json

from typer.testing import CliRunner

from gemmate_lib.cli import app
from gemmate_lib.sft import load_run

FEW = ["training.max_steps=4", "training.batch_size=2", "training.eval_every=2"]


def finetune(file, out, *more):
    settings = (*FEW, f"dataset={file}", "model.quantization=none", *more)
    given = [f"--set={item}" for item in settings]
    done = CliRunner().invoke(
        app, ["finetune", "quotes", "--out", str(out), "--limit=2", *given], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output, load_run(out)


def test_real_instructions_train_and_report_their_odd_row(real, tmp_path):
    file = real("instructions_toolformer.json")
    said, run = finetune(file, tmp_path / "run", "dataset.max_length=320", "dataset.limit=40")
    assert "1 noted: an extra key (row 1486)" in said
    assert "noted: empty input" in said
    data = run.manifest["data"]
    assert (data["form"], data["read"], data["extra_keys"]) == ("instruction", 2_396, 1)
    assert data["examples"]["extra_keys"] == [1_486]
    assert run.metrics["steps"] == 4 and run.metrics["last_loss"] < 20
    assert not list(tmp_path.rglob("instructions_toolformer*")), "the file is never copied"


def test_instructions_as_a_chat_train_and_answer(tmp_path):
    rows = [
        {"instruction": f"Write {i} twice.", "input": "<noinput>", "output": f"{i} {i}"}
        for i in range(40)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    said, run = finetune(file, tmp_path / "run", "dataset.chat=true")
    assert "40 noted: an input that says it is none, as <noinput>, is read as none" in said
    assert "exact_match" in said and run.experiment.dataset.chat
    shown = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(shown[0])
    assert first["prompt"].startswith("<start_of_turn>user\nWrite ")
    assert first["prompt"].endswith("<start_of_turn>model\n") and "noinput" not in first["prompt"]
