"""Evaluate a model on the test split, and compare two models on the same rows."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from gemmate_lib import metrics as m
from gemmate_lib import squad
from gemmate_lib.classification import classify
from gemmate_lib.config import GemmateError, among
from gemmate_lib.data import Row, Splits, encode
from gemmate_lib.evaluation import (
    HIGHER_IS_BETTER,
    METRICS,
    Evaluation,
    changed_most,
    compare_models,
    register_metric,
    write_evaluation,
)
from gemmate_lib.floors import baselines, is_standard, quote_floors, twin_floors
from gemmate_lib.generate import generate_texts
from gemmate_lib.models import load_base
from gemmate_lib.predictions import (
    Asker,
    predict_answers,
    predict_labels,
    predict_quotes,
    predict_spans,
)
from gemmate_lib.settings import digest
from gemmate_lib.sft import Run, load_splits, open_run
from gemmate_lib.stats import Interval, bootstrap, wilson
from gemmate_lib.texts import chrf, rouge

__all__ = [
    "Evaluation", "changed_most", "compare_models", "evaluate_model", "evaluate_run",
    "evaluate_texts", "general_texts", "register_metric", "write_evaluation",
]  # fmt: skip
GENERAL_SEED, GENERAL_TEXTS = 40_406, 64  # pre-training drew its documents from seed 2006


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
    """Measure a model on the test split, by what its rows ask; the model is left as it was.

    Losses are taken on all test rows, and on general texts to show what was forgotten; texts are
    generated greedily for the first `limit` rows. The seed is the bootstrap's.
    Raises: GemmateError where no test row fits `max_length`, or a loss is not finite.
    """
    quotes = splits.form == "quotes" and all(map(is_standard, splits.test))
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
    asker = _asker(model, tokenizer, batch_size, max_length, max_new_tokens)
    found = _ask(splits, chosen, asker, quotes=quotes)
    asked = digest([[ids.input_ids for ids in encoded], len(chosen), max_new_tokens])
    result = Evaluation({}, {}, {}, found, asked)
    _add_losses(result, sums | rest, seed=seed)
    if found:
        _add_counts(result, seed=seed)
        _add_scores(result, splits, chosen, seed=seed)
    if quotes:
        result.floors.update(quote_floors(rows, chosen, sums))
    return result


def _asker(
    model: Any, tokenizer: Any, batch_size: int, max_length: int, max_new_tokens: int
) -> Asker:
    def score(rows: list[Row]) -> np.ndarray:
        cut = partial(encode, tokenizer=tokenizer, max_length=max_length, over_long="cut")
        encoded = [ids for row in rows if (ids := cut(row))]
        return -m.token_losses(model, tokenizer, encoded, batch_size=batch_size)[0]

    write = partial(generate_texts, model, tokenizer, batch_size=batch_size)
    return Asker(write, score, tokenizer, max_length, max_new_tokens)


def _ask(splits: Splits, rows: list[Row], asker: Asker, *, quotes: bool) -> list[dict[str, Any]]:
    if quotes:
        return predict_quotes(rows, asker, train=splits.train)
    if splits.form == "classification":
        return predict_labels(rows, asker, labels=_labels(splits))
    if splits.form == "reading":
        return predict_spans(rows, asker)
    return predict_answers(rows, asker)


def _labels(splits: Splits) -> list[str]:
    return sorted({row.fields["label"] for row in (*splits.train, *splits.test)})


def _add_scores(result: Evaluation, splits: Splits, rows: list[Row], *, seed: int) -> None:
    """Add what is computed over all answers at once, and what could be had without a model."""
    records = result.predictions
    if splits.form == "classification":
        labels = _labels(splits)
        predicted, expected = ([r[key] for r in records] for key in ("predicted", "expected"))
        shares = np.array([[r["probabilities"][label] for label in labels] for r in records])
        scores = classify(predicted, expected, labels, probabilities=shares, seed=seed)
        result.metrics.update(scores.metrics())
        for name, guesses in baselines(splits.train, rows).items():
            right = sum(guess == label for guess, label in zip(guesses, expected, strict=True))
            result.metrics[f"{name}_accuracy"] = wilson(right, len(rows))
    elif splits.form == "reading":
        answers, golds, nulls = (
            {str(i): record[key] for i, record in enumerate(records)}
            for key in ("answer", "golds", "no_answer")
        )
        result.metrics.update(squad.score(answers, golds, no_answer=nulls).metrics(seed))
    elif "expected" in records[0]:
        pairs = [[record[key] for record in records] for key in ("completion", "expected")]
        for name, score in (rouge(*pairs, seed=seed) | {"chrf": chrf(*pairs, seed=seed)}).items():
            result.metrics[name], result.per_row[name] = score.interval, score.per_row
    result.floors.update(twin_floors(splits.report.source, rows))


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
    """Summarise what was counted in each prediction."""
    records = result.predictions
    for name in [key for key in (*HIGHER_IS_BETTER, "length") if key in records[0]]:
        _add_column(result, name, [record[name] for record in records], seed=seed)
    points, bigrams = m.distinct_points([record["completion"] for record in records], 2)
    result.metrics["distinct_2"] = _ratio(points, bigrams, seed=seed)
    result.per_row["distinct_2"] = (points / np.maximum(bigrams, 1)).tolist()
    if "shared_by_truth" in records[0]:
        result.floors["memorised"] = float(np.mean([r["shared_by_truth"] for r in records]))


def _add_column(result: Evaluation, name: str, column: Sequence[float], *, seed: int) -> None:
    """Summarise a number for each row: yes and no as a share, others as a mean."""
    if len(column) != len(result.predictions):
        problem = f"{name} gave {len(column)} numbers for {len(result.predictions)} texts"
        raise GemmateError(f"{problem}. Return one for each.")
    share = all(isinstance(value, bool) for value in column)
    found = wilson(int(sum(column)), len(column)) if share else bootstrap(column, seed=seed)
    result.metrics[name], result.per_row[name] = found, [float(value) for value in column]


def evaluate_texts(
    generate: Callable[[list[str]], Sequence[str]],
    prompts: Sequence[str],
    references: Sequence[str],
    *,
    metrics: Sequence[str] = ("rougeL",),
    seed: int = 0,
) -> Evaluation:
    """Measure whatever turns prompts into texts: a remote model, another library, a rule.

    metrics: names in METRICS, one's own among them; see `register_metric`.
    Raises: GemmateError for an unknown metric, other numbers of texts, or one that is no text.
    """
    prompts, references = list(prompts), list(references)
    texts = list(generate(prompts))
    if not len(texts) == len(prompts) == len(references) or not prompts:
        counts = f"{len(prompts)} prompts, {len(references)} references, {len(texts)} texts"
        raise GemmateError(f"There are {counts}. Give one of each, for one prompt at least.")
    if odd := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise GemmateError(f"The text for prompt {odd[0]} is none. Return a str for each prompt.")
    records = [
        {"source_row": i, "prompt": prompt, "completion": text, "expected": reference}
        for i, (prompt, text, reference) in enumerate(zip(prompts, texts, references, strict=True))
    ]
    result = Evaluation({}, {}, {}, records, digest([prompts, references]))
    for name in metrics:
        scores = METRICS[among(name, METRICS, "metric")](texts, references)
        _add_column(result, name, scores, seed=seed)
    return result


def evaluate_run(
    run: Run, *, limit: int | None = None, base_only: bool = False, save: bool = True
) -> Evaluation:
    """Measure a run, or with `base_only` the base it started from, on the run's test split.

    With `save`, metrics.json and predictions.jsonl are written into the run's folder.
    """
    experiment = run.experiment
    full = experiment.method == "full"
    loaded = load_base(experiment.model) if base_only and full else open_run(run)
    base_of = loaded.model.disable_adapter if base_only and not full else contextlib.nullcontext
    with base_of():
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
