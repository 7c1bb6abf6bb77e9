"""The course's headline: one tiny run before and after, on held-out rows, against known bests.

`python tests/integration/test_results.py` measures again, and writes tests/golden/quotes.json and
the two generated tables of the README.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/quotes.json"
LABELS = {
    "quote_perplexity": "perplexity of the quote",
    "author_perplexity": "perplexity of the author's name",
    "author_accuracy": "author named rightly",
    "well_formed_and_stopped": "well-formed pair that stops by itself",
    "general_perplexity": "perplexity of general text (forgetting)",
}
# How far a metric may be from its golden value on another machine, in its own unit.
TOLERANCE = {
    "quote_perplexity": 0.08,
    "author_perplexity": 0.05,
    "author_accuracy": 0.03,
    "well_formed_and_stopped": 0.03,
    "general_perplexity": 0.3,
    "memorised": 0.01,
}
BEFORE = {"author_perplexity": 0.4, "quote_perplexity": 0.1, "general_perplexity": 0.05}


def measure() -> dict[str, dict[str, float]]:
    """Fine-tune with the tiny profile's defaults and evaluate base and run."""
    from gemmate_lib.config import Facts, resolve
    from gemmate_lib.evaluate import evaluate_run
    from gemmate_lib.sft import finetune_or_load

    run = finetune_or_load(resolve("quotes", facts=Facts(), profile="tiny").experiment)
    before = evaluate_run(run, base_only=True, save=False)
    after = evaluate_run(run, save=False)
    found: dict[str, dict[str, float]] = {"best": after.floors}
    for name, evaluation in (("before", before), ("after", after)):
        found[name] = {key: evaluation.metrics[key].value for key in LABELS}
    return {part: {k: round(v, 4) for k, v in row.items()} for part, row in found.items()}


def results_table(found: dict[str, dict[str, float]]) -> str:
    """Render the README's table of results."""
    lines = [
        "| on held-out rows | before | after | best possible |",
        "| --- | ---: | ---: | ---: |",
    ]
    for key, label in LABELS.items():
        best = f"{found['best'][key]:.3g}" if key in found["best"] else "–"
        lines.append(
            f"| {label} | {found['before'][key]:.3g} | {found['after'][key]:.3g} | {best} |"
        )
    return "\n".join(lines)


def profiles_table() -> str:
    """Render the README's table of profiles."""
    from gemmate_lib.config import PROFILES
    from gemmate_lib.doctor import MINUTES, weights_gib

    lines = ["| profile | for | base | held in | weights | 100 steps of 4 |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: |")
    for name, profile in PROFILES.items():
        model, minutes = profile()["model"], MINUTES[name]
        time = "not measured" if minutes is None else f"{minutes:g} min"
        what = (profile.__doc__ or "").rstrip(".")
        held = f"{model['quantization']}, {model['compute_dtype']}"
        gib = weights_gib(name)
        size = f"{gib * 1024:.1f} MiB" if gib < 0.1 else f"{gib:.2f} GiB"
        lines.append(f"| `{name}` | {what} | {model['id']} | {held} | {size} | {time} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMATE_RUNS", str(tmp_path_factory.mktemp("runs")))
        return measure()


def test_what_the_course_promises(found: Any) -> None:
    before, after, best = found["before"], found["after"], found["best"]
    assert before["well_formed_and_stopped"] <= 0.05
    assert after["well_formed_and_stopped"] >= 0.95
    assert after["quote_perplexity"] <= 1.5 * best["quote_perplexity"]
    assert after["author_accuracy"] >= 0.9 * best["author_accuracy"]


def differences(
    found: dict[str, dict[str, float]], golden: dict[str, dict[str, float]]
) -> list[str]:
    """Name every metric that is missing, or further from its golden value than it may be."""
    told = []
    for part, row in golden.items():
        for key, value in row.items():
            allowed = {**TOLERANCE, **(BEFORE if part == "before" else {})}[key]
            here = found.get(part, {}).get(key)
            if here is None or not abs(here - value) <= allowed:
                told.append(f"{part}.{key}: {here}, golden {value}, tolerance {allowed}")
    return told


def test_the_numbers_are_the_golden_ones(found: Any) -> None:
    assert differences(found, json.loads(GOLDEN.read_text("utf-8"))) == []


def test_a_changed_golden_value_is_named() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert differences(golden, golden) == []
    for part, row in golden.items():
        for key in row:
            planted = json.loads(GOLDEN.read_text("utf-8"))
            planted[part][key] += 0.41
            assert [line.split(":")[0] for line in differences(golden, planted)] == [
                f"{part}.{key}"
            ]
            planted[part][key] = float("nan")
            assert len(differences(golden, planted)) == 1
    assert len(differences({}, golden)) == sum(map(len, golden.values()))


def test_the_readme_is_not_stale() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert results_table(golden) in text, "run: make readme"
    assert profiles_table() in text, "run: make readme"


if __name__ == "__main__":
    sys.path.append(str(ROOT / "benchmarks"))
    from common import with_block

    measured = measure()
    GOLDEN.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    readme = ROOT / "README.md"
    page = with_block(readme.read_text("utf-8"), "results", results_table(measured))
    readme.write_text(with_block(page, "profiles", profiles_table()), "utf-8")
