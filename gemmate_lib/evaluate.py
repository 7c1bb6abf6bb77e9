"""Evaluate a model on the test split, and compare two models on the same rows."""

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gemmate_lib import metrics as m
from gemmate_lib.config import GemmateError
from gemmate_lib.data import Row, Splits, encode
from gemmate_lib.generate import generate_texts
from gemmate_lib.predictions import predict_answers, predict_quotes
from gemmate_lib.rows import QUOTE_TEMPLATE
from gemmate_lib.sft import Run, load_splits, open_run
from gemmate_lib.stats import Comparison, Interval, bootstrap, paired_bootstrap, wilson

GENERAL_SEED, GENERAL_TEXTS = 40_406, 64  # pre-training drew its documents from seed 2006
# Counted in each generated text, and whether more is better; losses are better lower.
COUNTED = {"well_formed": True, "stopped": True, "well_formed_and_stopped": True}
COUNTED |= {"author_accuracy": True, "exact_match": True, "distinct_2": True}
COUNTED |= {"html": False, "repetition": False, "memorised": False}


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


def evaluate_model(
    model: Any,
    tokenizer: Any,
    splits: Splits,
    *,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a model on the test split; the model is left as it was.

    Losses are taken on all test rows, and on general texts to show what was forgotten; texts are
    generated greedily for the first `limit` rows. The seed is the bootstrap's.
    Raises: GemmateError where no test row fits `max_length`, or a loss is not finite.
    """
    quotes = splits.form == "quotes" and all(map(_is_standard, splits.test))
    cut = partial(encode, tokenizer=tokenizer, max_length=max_length, over_long="cut")
    test = [(row, ids) for row in splits.test if (ids := cut(row)) and not (quotes and ids.cut)]
    if not test:  # a quote that is cut has lost its author
        raise GemmateError("There is no test row to evaluate. Raise test_fraction or max_length.")
    rows, chosen = [row for row, _ in test], [row for row, _ in test[:limit]]
    general = [ids for text in general_texts() if (ids := cut(Row("", text, {}, 0)))]
    encoded = [ids for _, ids in test] + general
    losses = m.position_losses(model, tokenizer, encoded, batch_size=batch_size)
    own, rest = losses[: len(rows)], {"general": m.row_sums(losses[len(rows) :])}
    sums = m.segment_losses(rows, own, tokenizer) if quotes else {"completion": m.row_sums(own)}
    write = partial(generate_texts, model, tokenizer, batch_size=batch_size)
    ask = partial(predict_quotes, train=splits.train) if quotes else predict_answers
    found = ask(chosen, tokenizer, write, length=max_new_tokens)
    asked = json.dumps([[ids.input_ids for ids in encoded], len(chosen), max_new_tokens])
    result = Evaluation({}, {}, {}, found, hashlib.sha256(asked.encode()).hexdigest())
    _add_losses(result, sums | rest, seed=seed)
    if found:
        _add_counts(result, seed=seed)
    if quotes:
        result.floors.update(_floors(rows, chosen, sums))
    return result


def _is_standard(row: Row) -> bool:
    """Other templates have no author's line to ask for: their rows are evaluated as plain texts."""
    return row.completion == QUOTE_TEMPLATE.format_map(row.fields)


def general_texts() -> list[str]:
    """Return held-out documents of the kinds that the embedded models were pre-trained on."""
    from gemmate_lib.tiny.corpus import documents

    return list(islice(documents(GENERAL_SEED), GENERAL_TEXTS))


def _add_losses(result: Evaluation, losses: dict[str, m.Sums], *, seed: int) -> None:
    for name, (sums, counts) in losses.items():
        mean = _ratio(sums, counts, seed=seed)
        low, high = (math.exp(x) if x < 700 else math.inf for x in (mean.low, mean.high))
        value = m.perplexity(sums, counts)
        result.metrics[f"{name}_perplexity"] = Interval(value, low, high, mean.n)
        result.per_row[f"{name}_nll"] = (sums / counts).tolist()


def _ratio(above: np.ndarray, below: np.ndarray, *, seed: int) -> Interval:
    """Bootstrap a ratio of sums over rows: a row is drawn with both its numbers."""

    def ratio(drawn: np.ndarray, axis: int = -1) -> Any:
        rows = drawn.astype(int)
        return above[rows].sum(axis) / np.maximum(below[rows].sum(axis), 1)

    return bootstrap(np.arange(len(above)), ratio, seed=seed)


def _add_counts(result: Evaluation, *, seed: int) -> None:
    """Summarise the predictions: yes and no as a share, numbers as a mean."""
    records = result.predictions
    for name in [key for key in (*COUNTED, "length") if key in records[0]]:
        column = [record[name] for record in records]
        share = isinstance(column[0], bool)
        found = wilson(sum(column), len(column)) if share else bootstrap(column, seed=seed)
        result.metrics[name], result.per_row[name] = found, [float(value) for value in column]
    points, bigrams = m.distinct_points([record["completion"] for record in records], 2)
    result.metrics["distinct_2"] = _ratio(points, bigrams, seed=seed)
    result.per_row["distinct_2"] = (points / np.maximum(bigrams, 1)).tolist()
    if "shared_by_truth" in records[0]:
        result.floors["memorised"] = float(np.mean([r["shared_by_truth"] for r in records]))


def _floors(rows: list[Row], chosen: list[Row], losses: dict[str, m.Sums]) -> dict[str, float]:
    """Return what the grammar behind `tiny_quotes` would reach; nothing for other quotes.

    A row that it could not have written, one in capitals say, counts as free: floors stay floors.
    """
    from gemmate_lib.tiny.sayings import posterior, surprisal

    best, foreign = [], 0
    for row in rows:
        try:
            chance = posterior(row.fields["quote"])
            author = -math.log(chance[row.fields["author"]])
            best.append((surprisal(row.fields["quote"]), author, max(chance.values())))
        except (ValueError, KeyError, ZeroDivisionError):  # no saying, or author, of the grammar
            best.append((0.0, 0.0, 1.0))
            foreign += 1
    if foreign > 0.1 * len(rows):
        return {}
    quote, author, _ = np.sum(best, axis=0)
    return {
        "quote_perplexity": math.exp(quote / losses["quote"][1].sum()),
        "author_perplexity": math.exp(author / losses["author"][1].sum()),
        "author_accuracy": float(np.mean(best[: len(chosen) or None], axis=0)[2]),
    }


def compare_models(
    before: Evaluation, after: Evaluation, *, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two evaluations row by row: losses in place of perplexities, and no lengths.

    Raises: GemmateError where they are not of the same rows, tokens and limits.
    """
    if before.rows != after.rows:
        raise GemmateError("The rows, tokens or limits differ. Evaluate both models alike.")
    pairs = {name: (values, after.per_row[name]) for name, values in before.per_row.items()}
    return {
        name: paired_bootstrap(*pair, seed=seed, higher_is_better=COUNTED.get(name, False))
        for name, pair in pairs.items()
        if name != "length"
    }


def write_evaluation(evaluation: Evaluation, directory: str | Path) -> None:
    """Write metrics.json and predictions.jsonl: the same evaluation gives the same bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dump = partial(json.dumps, ensure_ascii=False, sort_keys=True, allow_nan=False)
    lines = [f"{dump(record)}\n" for record in evaluation.predictions]
    text = dump(evaluation.as_dict(), indent=1)
    (directory / "metrics.json").write_text(f"{text}\n", "utf-8", newline="\n")
    (directory / "predictions.jsonl").write_text("".join(lines), "utf-8", newline="\n")


def evaluate_run(
    run: Run, *, limit: int | None = None, base_only: bool = False, save: bool = True
) -> Evaluation:
    """Measure a run, or with `base_only` the base it started from, on the run's test split.

    With `save`, metrics.json and predictions.jsonl are written into the run's folder.
    """
    experiment = run.experiment
    loaded = open_run(run)
    context = loaded.model.disable_adapter() if base_only else contextlib.nullcontext()
    with context:
        found = evaluate_model(
            loaded.model,
            loaded.tokenizer,
            load_splits(experiment),
            max_length=experiment.dataset.max_length,
            max_new_tokens=experiment.generation.max_new_tokens,
            batch_size=experiment.generation.batch_size,
            limit=limit,
        )
    if save and not base_only:
        write_evaluation(found, run.directory)
    return found
