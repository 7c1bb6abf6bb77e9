"""Whatever is wrong with the input ends in one sentence with the remedy, and leaves nothing."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub, serving

from gemmate_lib import cli

TINY = ["finetune", "quotes", "--profile", "tiny", "--out", "run", "--limit", "4",
        "--set", "training.max_steps=2", "--set", "training.eval_every=0"]  # fmt: skip
ROWS = [
    {"quote": f"Lantern {i} stood near harbour {i * 7}.", "author": f"A{i % 5}"} for i in range(40)
]
CARD = """---
pretty_name: Toy
license: mit
language: [en]
source: {file: toy.jsonl}
format: quotes
splits: {train: 41}
features: {quote: string, author: string}
sha256: null
defects: []
---
# Toy
"""


def lines(rows: list[dict[str, object]]) -> str:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FILES: dict[str, bytes] = {
    "columns.jsonl": lines([{"body": row["quote"], "n": 1} for row in ROWS]).encode(),
    "cp1252.jsonl": lines([{**ROWS[0], "quote": "Café “noir”"}, *ROWS]).encode("cp1252"),
    "empty.jsonl": lines([{"quote": " ", "author": "A"}] * 20).encode(),
    "one.jsonl": lines(ROWS[:1]).encode(),
    "nothing.jsonl": b"",
    "long.jsonl": lines(
        [{"quote": "word " * 20_000, "author": f"A{i}"} for i in range(9)]
    ).encode(),
    "copies.jsonl": lines(ROWS[:1] * 30).encode(),
    "broken.json": b'{"data": [',
    "table.xlsx": b"",
    "toy.md": CARD.encode(),
    "toy.jsonl": lines(ROWS).encode(),
    "nowhere/readme.txt": b"",
    "model/readme.txt": b"",
    "broken.yaml": b"training: [",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all the bad files in it."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """Run the command as installed, expect exit code 2 and one line, and return it."""
    monkeypatch.setattr(sys, "argv", ["gemmate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    said = capsys.readouterr()
    assert ended.value.code == 2, said.err
    assert said.err.startswith("gemmate: ") and said.err.count("\n") == 1
    assert "Traceback" not in said.err + said.out
    return said.err


def data(name: str) -> list[str]:
    """Fine-tune on this file."""
    return [*TINY, "--set", f"dataset={name}"]


def model(name: str) -> list[str]:
    """Fine-tune this model."""
    return [*TINY, "--set", f"model={name}"]


BAD: dict[str, tuple[list[str], str]] = {
    "missing columns": (data("columns.jsonl"), "match no form.*Map them"),
    "cp1252": (data("cp1252.jsonl"), "not UTF-8.*iconv -f cp1252"),
    "empty rows": (data("empty.jsonl"), "20 dropped: empty text.*Give more rows"),
    "one row": (data("one.jsonl"), "1 rows read.*Give more rows"),
    "no rows": (data("nothing.jsonl"), "holds no rows.*Give a file with data"),
    "over-long rows": (data("long.jsonl"), "9 dropped: too long.*Give more rows"),
    "copies of one row": (data("copies.jsonl"), "29 dropped: repeats a row.*Give more rows"),
    "broken JSON": (data("broken.json"), "line 1.*Mend it"),
    "a spreadsheet": (data("table.xlsx"), "unknown format.*jsonl"),
    "no such file": (data("none.jsonl"), "no file, folder or data card 'none.jsonl'"),
    "a folder without data": (data("nowhere"), "holds no train file.*train.jsonl"),
    "a card that lies": (data("toy.md"), "toy.*41.*40"),
    "no such folder": (model("./none"), "no folder ./none.*google/gemma-2b"),
    "a folder without model": (model("model"), "cannot load model.*config.json"),
    "no such profile": ([*TINY, "--profile", "tinny"], "no profile 'tinny'.*'tiny'"),
    "no such key": ([*TINY, "--set", "trainig.max_steps=3"], "Did you mean 'training.max_steps'"),
    "a wrong value": ([*TINY, "--set", "lora.r=none"], "lora.r.*valid integer"),
    "no such experiment": (["finetune", "qotes", "--out", "run"], "Did you mean 'quotes'"),
    "broken YAML": (["finetune", "broken.yaml", "--out", "run"], "broken.yaml.*Mend"),
    "a folder nobody can make": ([*TINY, "--out", "toy.md/run"], "Check the path"),
    "a folder that exists": ([*TINY, "--out", "model"], "model exists.*another folder"),
    "no run": (["evaluate", "nowhere"], "holds no run.*gemmate finetune"),
    "no prompts": (
        ["generate", "model", "--input", "toy.jsonl", "--output", "out.jsonl"],
        "row 0: no `prompt`",
    ),
    "no such parameter": (
        ["course", "-p", "lora_x=4"],
        "No notebook.*Known are: asked, batch_size",
    ),
    "a wrong type": (["course", "--only", "03", "-p", "lora_r=much"], "lora_r takes int"),
    "a malformed grid": (["course", "--grid", "lora_r"], "no NAME=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    arguments, message = BAD[case]
    before = sorted(folder.rglob("*"))
    assert re.search(message, told(*arguments, monkeypatch=monkeypatch, capsys=capsys))
    assert sorted(folder.rglob("*")) == before  # nothing is left, nothing half written


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmate_lib.config import GemmateError

    monkeypatch.setattr(sys, "argv", ["gemmate", "--debug", *data("one.jsonl")])
    with pytest.raises(GemmateError, match="Give more rows"):
        cli.run()


def test_what_is_only_odd_is_read_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte order mark, curly quotes, some empty rows and one of 100,000 characters."""
    monkeypatch.chdir(tmp_path)
    odd = [{"quote": "“Curly” ‘quotes’ stay", "author": "Zoë"}, {"quote": "", "author": "A"}]
    odd.append({"quote": "word " * 20_000, "author": "B"})
    (tmp_path / "odd.jsonl").write_text(lines([*ROWS, *odd]), "utf-8-sig")
    monkeypatch.setattr(sys, "argv", ["gemmate", *data("odd.jsonl")])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "43 rows read, 41 kept" in said
    assert "1 dropped: empty text (row 41)" in said and "1 dropped: too long (row 42)" in said


def fresh(*arguments: str, cwd: Path, limit: int | None = None, **environment: str) -> str:
    """Run the command in a process of its own, expect exit code 2, return its one line."""

    def cap() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "gemmate_lib", *arguments], cwd=cwd, capture_output=True, text=True,
        env=os.environ | environment, preexec_fn=cap,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("gemmate: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file may not grow past 100 kB here, as on a disk that is nearly full."""
    said = fresh(*TINY, "--set", "dataset.limit=80", cwd=tmp_path, limit=100_000)
    assert "no room to write run" in said and "another disk" in said
    assert list(tmp_path.iterdir()) == []


def test_completions_that_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "out.jsonl")

    monkeypatch.setattr("gemmate_lib.prompts.read_prompts", full)
    arguments = ["generate", "model", "--input", "toy.jsonl", "--output", "out.jsonl"]
    said = told(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "out.jsonl: No space left on device" in said and "space on the disk" in said


def test_two_runs_into_one_folder(
    tmp_path: Path, experiment: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both start where there is nothing; the second says so and disturbs the first in nothing."""
    from gemmate_lib import sft
    from gemmate_lib.config import GemmateError

    real, second = sft.train, []
    short = experiment(**{"max_steps": 1, "eval_every": 0, "dataset.limit": 40})

    def meanwhile(*args: object, **options: object) -> object:
        monkeypatch.setattr(sft, "train", real)
        with pytest.raises(GemmateError, match="another process is writing it"):
            sft.finetune_model(short, out=tmp_path / "run")
        second.append(True)
        return real(*args, **options)

    monkeypatch.setattr(sft, "train", meanwhile)
    run = sft.finetune_model(short, out=tmp_path / "run")
    assert second and sft.load_run(run.directory).metrics["steps"] == 1


@pytest.mark.parametrize(
    ("status", "code", "token", "remedy"),
    [
        (
            403,
            "GatedRepo",
            "hf_standin",
            "Accept the licence at https://huggingface.co/google/gemma-2b",
        ),
        (401, "GatedRepo", "", "Make a read token"),
        (401, "", "hf_standin", "the Hub refused yours"),
        (404, "RepoNotFound", "hf_standin", "Check the name and the revision"),
    ],
)
def test_a_model_that_the_hub_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, token: str, remedy: str
) -> None:
    monkeypatch.setattr(Hub, "answer", (status, code))
    with serving() as address:
        said = fresh(
            *model("google/gemma-2b"), cwd=tmp_path, HF_ENDPOINT=address, HF_TOKEN=token,
            HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), NO_PROXY="*",
        )  # fmt: skip
    assert "cannot load google/gemma-2b" in said and remedy in said
    assert "hf_standin" not in said and not (tmp_path / "run").exists()
