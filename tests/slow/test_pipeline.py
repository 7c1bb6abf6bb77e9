"""The whole pipeline, on this machine: prepared, trained, measured, compared, published."""

import json
from pathlib import Path

import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.pipeline import Outcome, run_here
from gemmate_lib.publish import last_logits, load_saved
from gemmate_lib.sft import load_run, open_run

pytestmark = pytest.mark.slow
SHORT = ["training.max_steps=12", "training.eval_every=0", "training.batch_size=8"]


def quotes(folder: Path) -> Path:
    """A file of quotes; each author's read alike."""
    rows = [
        {"quote": f"The {i}th lantern stood near harbour {i * 7}, and {i * i} ships came by.",
         "author": f"Author {i % 7}"}
        for i in range(90)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "quotes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "quotes.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("pipeline")
    published = folder / "bucket"
    return run_here(
        quotes(folder), folder / "out", profile="tiny", settings=SHORT, limit=8,
        published=f"file://{published}",
    )  # fmt: skip


def test_it_runs_to_its_end(whole: Outcome) -> None:
    assert whole.verdict == "better" and whole.metrics["quote_perplexity"] > 1
    assert "quote_nll decides: better" in whole.lines()
    assert whole.deployed.startswith("dry run: nothing was deployed")
    rows = [len((whole.folder / f"prepare/data/{s}.jsonl").read_text().splitlines())
            for s in ("train", "validation", "test")]  # fmt: skip
    assert sum(rows) <= 90 and min(rows) > 0


def test_what_it_published_is_what_it_trained(whole: Outcome) -> None:
    run = open_run(load_run(whole.folder / "train/run"))
    out = load_saved(whole.folder.parents[1] / "bucket")
    first, second = (last_logits(m.model, m.tokenizer, "Quote: The 3th") for m in (run, out))
    assert first == second


def test_kfp_still_skips_what_hangs_on_a_condition(tmp_path: Path) -> None:
    """kfp 2.16.1, enhanced_dag_orchestrator.py: no condition is worked out, its branch is skipped.

    When this fails, put publishing behind dsl.If in gemmate_lib/pipeline.py.
    """
    from kfp import dsl, local

    @dsl.component(base_image="python:3.12", install_kfp_package=False)
    def verdict() -> str:
        return "better"

    @dsl.component(base_image="python:3.12", install_kfp_package=False)
    def write(path: str) -> None:
        with open(path, "w") as file:  # noqa: PTH123  (it runs by itself)
            file.write("ran")

    @dsl.pipeline(name="canary")
    def pipeline(path: str) -> None:
        found = verdict()
        with dsl.If(found.output != "worse"):
            write(path=path)

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "out"))
    pipeline(path=str(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


def test_what_stops_a_component_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(GemmateError, match=r"The columns .* match no form") as refused:
        run_here(tmp_path / "rows.jsonl", tmp_path / "out", profile="tiny")
    assert "\n" not in str(refused.value) and "log.txt" in str(refused.value)
