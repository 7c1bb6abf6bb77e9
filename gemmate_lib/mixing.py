"""Several tasks at once: mixed by temperature, one after the other, or an adapter for each.

A task is an experiment: its rows, its lengths, its seed. All three ways take the same number of
optimizer steps over all, and start from the same base with the same fresh adapter.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gemmate_lib.adapters import attach_lora
from gemmate_lib.config import Experiment, GemmateError, among
from gemmate_lib.data import Row, Splits
from gemmate_lib.evaluate import evaluate_model
from gemmate_lib.evaluation import Evaluation
from gemmate_lib.machine import prepare
from gemmate_lib.models import load_base
from gemmate_lib.sft import load_splits
from gemmate_lib.stats import Interval
from gemmate_lib.trainer import train

Model = tuple[Any, Any]  # a model and its tokenizer
Way = Literal["mixed", "in turn", "apart"]
WAYS: tuple[Way, ...] = ("mixed", "in turn", "apart")
# What is asked of a task, by the form of its rows.
MAIN = {"classification": "accuracy", "reading": "exact", "quotes": "author_accuracy"}


@dataclass(frozen=True)
class Task:
    """An experiment and its rows."""

    name: str
    experiment: Experiment
    splits: Splits

    @property
    def metric(self) -> str:
        """The name of its main metric; other forms are asked for the very text."""
        return MAIN.get(self.splits.form, "exact_match")


def load_tasks(experiments: Mapping[str, Experiment]) -> dict[str, Task]:
    """Read the rows of each task.

    Raises: GemmateError for fewer than two tasks, or bases that differ.
    """
    bases = {experiment.model for experiment in experiments.values()}
    if len(experiments) < 2 or len(bases) > 1:
        problem = f"{len(experiments)} tasks over {len(bases)} bases cannot be mixed"
        raise GemmateError(f"{problem}. Give two or more, all with the same model settings.")
    return {name: Task(name, each, load_splits(each)) for name, each in experiments.items()}


def shares(sizes: Mapping[str, int], *, temperature: float = 1.0) -> dict[str, float]:
    """Return how often each task is drawn: its size to the power of 1 / temperature, as a share.

    1: in proportion to the sizes; the higher, the more alike; infinity: all alike.
    Raises: GemmateError for a temperature or a size that is not above 0.
    Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019; Raffel et al. 2020, section 3.5.2
    """
    if not temperature > 0 or not all(size > 0 for size in sizes.values()):
        raise GemmateError(f"Temperature {temperature}, sizes {dict(sizes)}: give more than 0.")
    weights = {
        name: (size / max(sizes.values())) ** (1 / temperature) for name, size in sizes.items()
    }
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def interleave(
    tables: Mapping[str, Sequence[Row]], *, temperature: float = 1.0, rows: int, seed: int = 0
) -> list[tuple[str, Row]]:
    """Draw `rows` rows from the tasks by `shares`, each with the name of its task.

    A task's rows come in an order drawn by the seed, and again from the start once all were there.
    Raises: GemmateError for no rows.
    """
    from datasets import Dataset, interleave_datasets

    if rows < 1:
        raise GemmateError(f"{rows} rows are none to train on. Ask for 1 or more.")
    chances = shares({name: len(table) for name, table in tables.items()}, temperature=temperature)
    places: list[Dataset] = []
    found: list[tuple[str, int]] = []
    for name, table in tables.items():
        order = Dataset.from_dict({"task": [name] * len(table), "at": range(len(table))})
        places.append(order.shuffle(seed=seed))
    # "all_exhausted" goes on until the last task was seen whole; as often as it takes.
    while len(found) < rows:
        mixed = interleave_datasets(
            places,
            probabilities=[chances[name] for name in tables],
            seed=seed + len(found),
            stopping_strategy="all_exhausted",
        )
        found += list(zip(mixed["task"], mixed["at"], strict=True))
    return [(name, tables[name][at]) for name, at in found[:rows]]


def train_tasks(
    tasks: Mapping[str, Task],
    way: Way,
    *,
    steps: int,
    temperature: float = 2.0,
    seed: int = 0,
) -> dict[str, Model]:
    """Train for `steps` optimizer steps over all; return each task's model and tokenizer.

    mixed: one adapter, on rows drawn from all tasks. in turn: one adapter, a task after the other
    in the order given. apart: an adapter for each task. The last two give each task its share of
    the steps, alike. Settings that are not the rows' are those of the first task.
    Raises: GemmateError for an unknown way, or fewer steps than tasks.
    """
    among(way, WAYS, "way to train on several tasks")
    if steps < len(tasks):
        raise GemmateError(f"{steps} steps for {len(tasks)} tasks. Give each at least one.")
    model = _fresh(tasks, seed=seed)
    if way == "mixed":
        splits = mix(tasks, temperature=temperature, steps=steps, seed=seed)
        _train(model, splits, tasks, steps=steps, seed=seed)
        return dict.fromkeys(tasks, model)
    cuts = [round(i * steps / len(tasks)) for i in range(len(tasks) + 1)]
    found: dict[str, Model] = {}
    for (name, task), (start, end) in zip(tasks.items(), pairwise(cuts), strict=True):
        if way == "apart" and found:
            model = _fresh(tasks, seed=seed)
        _train(model, task.splits, tasks, steps=end - start, seed=seed)
        found[name] = model
    return found if way == "apart" else dict.fromkeys(tasks, model)


def mix(tasks: Mapping[str, Task], *, temperature: float, steps: int, seed: int) -> Splits:
    """Return splits whose training rows are drawn from all tasks, as many as the steps take."""
    first = next(iter(tasks.values()))
    settings = first.experiment.training
    rows = steps * settings.batch_size * settings.gradient_accumulation_steps
    tables = {name: task.splits.train for name, task in tasks.items()}
    drawn = interleave(tables, temperature=temperature, rows=rows, seed=seed)
    return replace(first.splits, train=[row for _, row in drawn])


def counts(drawn: Sequence[tuple[str, Row]]) -> dict[str, int]:
    """Return how many rows of each task were drawn."""
    return dict(Counter(name for name, _ in drawn).most_common())


def _fresh(tasks: Mapping[str, Task], *, seed: int) -> Model:
    experiment = next(iter(tasks.values())).experiment
    prepare(seed=seed, threads=experiment.threads, deterministic=experiment.deterministic)
    base = load_base(experiment.model)
    return attach_lora(base.model, experiment.lora, seed=seed), base.tokenizer


def _train(
    loaded: Model, splits: Splits, tasks: Mapping[str, Task], *, steps: int, seed: int
) -> None:
    first = next(iter(tasks.values())).experiment
    longest = max(task.experiment.dataset.max_length for task in tasks.values())
    update = {"max_steps": steps, "eval_every": 0, "early_stopping_patience": 0}
    experiment = first.model_copy(
        update={
            "seed": seed,
            "training": first.training.model_copy(update=update),
            "dataset": first.dataset.model_copy(update={"max_length": longest, "over_long": "cut"}),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        train(*loaded, splits, experiment, Path(folder))


def evaluate_tasks(
    tasks: Mapping[str, Task], models: Mapping[str, Model], *, limit: int | None = None
) -> dict[str, Evaluation]:
    """Measure each task's model on its test split; texts for the first `limit` rows."""
    found = {}
    for name, task in tasks.items():
        settings = task.experiment
        found[name] = evaluate_model(
            *models[name],
            replace(task.splits, test=task.splits.test[:limit]),
            max_length=settings.dataset.max_length,
            max_new_tokens=settings.generation.max_new_tokens,
            batch_size=settings.generation.batch_size,
        )
    return found


def main_metrics(tasks: Mapping[str, Task], found: Mapping[str, Evaluation]) -> dict[str, Interval]:
    """Return the main metric of each task, with its interval."""
    return {name: found[name].metrics[task.metric] for name, task in tasks.items()}
