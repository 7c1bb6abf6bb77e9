"""Versions by the command line: what is worse beyond noise is not promoted, and all is recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import call, fails
from typer.testing import CliRunner

from gemmate_lib import cli
from gemmate_lib.promotion import weigh
from gemmate_lib.sft import Run, finetune_model
from gemmate_lib.stats import Comparison, Interval

SHORT = {"training.max_steps": 12, "training.eval_every": 0, "dataset.limit": 120,
         "generation.max_new_tokens": 8}  # fmt: skip


@pytest.fixture(scope="module")
def runs(experiment: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A good run, and one that a far too high learning rate has ruined."""
    home = tmp_path_factory.mktemp("runs")
    ruin = {"training.learning_rate": 0.3, "training.warmup_steps": 0}
    return [
        finetune_model(experiment(**SHORT), out=home / "good"),
        finetune_model(experiment(**(SHORT | ruin)), out=home / "bad"),
    ]


def test_promote_and_roll_back(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMATE_REGISTRY", str(tmp_path / "models"))
    good, bad = (run.directory for run in runs)
    assert "is empty" in call("registry", "list")
    fails(monkeypatch, "registry", "promote")  # no candidate
    fails(monkeypatch, "registry", "rollback")
    assert "candidate: nothing -> " in call("registry", "tag", bad, "candidate")
    told = call("registry", "promote")
    assert "no production yet" in told and "production: nothing -> " in told
    call("registry", "tag", good, "candidate")
    told = call("registry", "promote", "--limit", 1)  # of one text there is no interval
    assert "quote_nll" in told and "better" in told and "WORSE" not in told
    digest = call("registry", "add", bad).strip()
    refused = CliRunner().invoke(cli.app, ["registry", "promote", digest[:8], "--limit", "4"])
    assert refused.exit_code == 1 and "is worse than production in" in refused.output
    assert "WORSE" in refused.output
    arguments = ("registry", "promote", digest[:8], "--limit", 4, "--force", "to compare live")
    assert "WORSE" in call(*arguments)
    assert call("registry", "rollback", "--why", "done").startswith(
        f"production: {digest[:12]} -> "
    )
    moves = json.loads(call("registry", "log", "--json"))
    assert [move["act"] for move in moves] == ["promote", "promote", "promote", "rollback"]
    assert moves[2]["why"] == "forced: to compare live"
    assert moves[2]["evidence"]["quote_nll"]["worse"] is True
    assert moves[1]["evidence"]["quote_nll"]["worse"] is False and moves[3]["why"] == "done"
    listed = call("registry", "list")
    assert "candidate, production" in listed and digest[:12] in listed
    found = json.loads(call("registry", "list", "--json"))
    assert len(found["versions"]) == 2 and found["tags"].keys() == {"candidate", "production"}
    assert "rollback" in call("registry", "log")
    fails(monkeypatch, "registry", "log", "staging")
    fails(monkeypatch, "registry", "tag", "../good", "candidate")
    fails(monkeypatch, "registry", "tag", good, "../candidate")


def test_other_test_rows_are_not_compared(
    runs: list[Run], tmp_path: Path, experiment: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("GEMMATE_REGISTRY", str(tmp_path / "models"))
    other = SHORT | {"dataset.split_seed": 1, "training.max_steps": 1}
    finetune_model(experiment(**other), out=tmp_path / "other")
    call("registry", "tag", runs[0].directory, "production")
    call("registry", "tag", tmp_path / "other", "candidate")
    fails(monkeypatch, "registry", "promote")
    assert "made with different test rows" in capsys.readouterr().err
    assert "not compared" in call("registry", "promote", "--force", "other data")


def comparison(p: float, low: float, high: float, *, higher: bool = False) -> Comparison:
    return Comparison(Interval((low + high) / 2, low, high, 50), p, 1, 1, 0, higher)


def test_what_decides_is_corrected_for_its_number() -> None:
    worse, equal = comparison(0.03, 0.1, 0.3), comparison(0.9, -0.1, 0.1)
    assert weigh({"quote_nll": worse}).worse == ("quote_nll",)
    assert weigh({"quote_nll": worse, "author_nll": equal, "accuracy": equal}).worse == ()
    clear = comparison(0.0004, 0.1, 0.3)
    found = {"quote_nll": clear, "author_nll": worse, "general_nll": clear}
    found["accuracy"] = comparison(0.0004, 0.1, 0.3, higher=True)
    judged = weigh(found)
    assert judged.worse == ("quote_nll", "author_nll")  # the last of three at 0.05
    assert judged.deciding == ("accuracy", "quote_nll", "author_nll")  # in the order of MAIN
    assert weigh(found, ["general_nll"]).worse == ("general_nll",)
    higher = comparison(0.0004, -0.3, -0.1, higher=True)
    assert weigh({"accuracy": higher}).worse == ("accuracy",)
