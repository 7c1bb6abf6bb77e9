"""What was measured of a model, written down, and two of them compared row by row."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError, among
from gemmate_lib.stats import Comparison, Interval, paired_bootstrap
from gemmate_lib.texts import bleu, chrf, rouge, similarity

# What is measured in each text, and whether more is better; losses are better lower.
HIGHER_IS_BETTER = {"well_formed": True, "stopped": True, "well_formed_and_stopped": True}
HIGHER_IS_BETTER |= {"author_accuracy": True, "exact_match": True, "distinct_2": True}
HIGHER_IS_BETTER |= {"accuracy": True, "exact": True, "f1": True, "unparsed": False}
HIGHER_IS_BETTER |= {"rouge1": True, "rouge2": True, "rougeL": True, "chrf": True}
HIGHER_IS_BETTER |= {"html": False, "repetition": False, "memorised": False}

# What a task is for; the rest (forms, repetition, forgetting) is there to be looked at.
MAIN = (
    "accuracy", "author_accuracy", "well_formed_and_stopped", "exact_match", "exact", "f1",
    "rougeL", "chrf", "completion_nll", "quote_nll", "author_nll",
)  # fmt: skip

# From predictions and references to a number for each row: the user's own, and some of ours.
Metric = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
METRICS: dict[str, Metric] = {
    "exact_match": lambda texts, references: [
        text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)
    ],
    "rouge1": lambda texts, references: rouge(texts, references)["rouge1"].per_row,
    "rouge2": lambda texts, references: rouge(texts, references)["rouge2"].per_row,
    "rougeL": lambda texts, references: rouge(texts, references)["rougeL"].per_row,
    "sentence_bleu": lambda texts, references: bleu(texts, references).per_row,
    "sentence_chrf": lambda texts, references: chrf(texts, references).per_row,
    "similarity": lambda texts, references: similarity(texts, references).per_row,
    "words": lambda texts, _: [float(len(text.split())) for text in texts],
}
HIGHER_IS_BETTER |= {"sentence_bleu": True, "sentence_chrf": True, "similarity": True}
OURS = frozenset(HIGHER_IS_BETTER) | frozenset(METRICS)


def register_metric(name: str, metric: Metric, *, higher_is_better: bool = True) -> None:
    """Make one's own metric known by a name: from predictions and references to a number a row.

    Raises: GemmateError for a name of ours; one's own may be given anew.
    """
    if name in OURS:
        raise GemmateError(f"There is a metric {name!r} already. Give yours another name.")
    METRICS[name], HIGHER_IS_BETTER[name] = metric, higher_is_better


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and a number for each row to pair with another model's.

    floors: what the best possible model reaches on these very rows, where that is known; for
        `memorised`, what the true quotes of these rows share with the training ones by chance.
    per_row: `*_nll` is the mean -log p of a row's tokens, in nats; of yes and no, 1 and 0.
    predictions: one record for each generated text.
    rows: sha256 of the tokens and limits it was evaluated with; equal means comparable.
    """

    metrics: dict[str, Interval]
    floors: dict[str, float]
    per_row: dict[str, list[float]]
    predictions: list[dict[str, Any]]
    rows: str

    def as_dict(self) -> dict[str, Any]:
        """Return all but the predictions, ready for JSON: an infinite bound is None."""
        result = {k: v for k, v in asdict(self).items() if k != "predictions"}
        for interval in result["metrics"].values():
            interval |= {k: None for k, v in interval.items() if not math.isfinite(v)}
        return result

    def lines(self) -> list[str]:
        """Return one line for each metric, for people."""
        words = dict.fromkeys(self.floors, "at best") | {"memorised": "unseen quotes"}
        best = {name: f"  ({words[name]} {value:.3g})" for name, value in self.floors.items()}
        return [f"{name:<24}{x}{best.get(name, '')}" for name, x in self.metrics.items()]


def compare_models(
    before: Evaluation, after: Evaluation, *, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two evaluations row by row: losses in place of perplexities, and no lengths.

    Raises: GemmateError where they are not of the same rows, tokens and limits.
    """
    _require_same_rows(before, after)
    pairs = {name: (values, after.per_row[name]) for name, values in before.per_row.items()}
    return {
        name: paired_bootstrap(*pair, seed=seed, higher_is_better=HIGHER_IS_BETTER.get(name, False))
        for name, pair in pairs.items()
        if name != "length"
    }


def _require_same_rows(before: Evaluation, after: Evaluation) -> None:
    if before.rows != after.rows:
        raise GemmateError("The rows, tokens or limits differ. Evaluate both models alike.")


def changed_most(
    before: Evaluation, after: Evaluation, metric: str, *, n: int = 10
) -> list[dict[str, Any]]:
    """Return the n rows whose number changed most, either way: prompt, both texts, both numbers.

    Raises: GemmateError where the rows differ, or have no such number or no text.
    """
    _require_same_rows(before, after)
    first, second = (
        each.per_row[among(metric, each.per_row, "metric")] for each in (before, after)
    )
    if not len(first) == len(before.predictions) == len(after.predictions):
        raise GemmateError(f"{metric} is not of the texts alone. Choose one that is: exact_match.")
    order = sorted(range(len(first)), key=lambda i: -abs(second[i] - first[i]))
    return [
        {
            "prompt": before.predictions[i]["prompt"],
            "before": before.predictions[i]["completion"],
            "after": after.predictions[i]["completion"],
            metric: (first[i], second[i]),
        }
        for i in order[:n]
        if first[i] != second[i]
    ]


def write_evaluation(evaluation: Evaluation, directory: str | Path) -> None:
    """Write metrics.json and predictions.jsonl: the same evaluation gives the same bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dump = partial(json.dumps, ensure_ascii=False, sort_keys=True, allow_nan=False)
    lines = [f"{dump(record)}\n" for record in evaluation.predictions]
    text = dump(evaluation.as_dict(), indent=1)
    (directory / "metrics.json").write_text(f"{text}\n", "utf-8", newline="\n")
    (directory / "predictions.jsonl").write_text("".join(lines), "utf-8", newline="\n")
