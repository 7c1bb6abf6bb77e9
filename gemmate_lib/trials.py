"""One trial of a search: what it draws, how it is trained and judged, and how it may end.

The test split is taken away before the first trial begins: nothing chosen here can have seen it.
"""

import dataclasses
import gc
import shutil
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gemmate_lib.budget import refuse_budget
from gemmate_lib.config import CheckpointConfig, Experiment, GemmateError
from gemmate_lib.crew import REASON
from gemmate_lib.data import Splits
from gemmate_lib.divergence import Diverged
from gemmate_lib.extras import need
from gemmate_lib.memory import OutOfMemory, asked_mib
from gemmate_lib.sft import finetune_model, load_splits

if TYPE_CHECKING:
    from optuna import Trial


TRIALS = "trials"  # the folder of those that are being trained


class Orphaned(KeyboardInterrupt):
    """A worker whose parent was killed: nobody waits for what it finds."""


def with_values(experiment: Experiment, values: dict[str, Any], **changes: Any) -> Experiment:
    """The experiment with other values of some dotted keys.

    Raises: pydantic.ValidationError where they do not go together.
    """
    content = experiment.model_dump(mode="json")
    for key, value in values.items():
        group, _, leaf = key.partition(".")
        content[group][leaf] = value
    return Experiment.model_validate(content).model_copy(update=changes)


def space_of(experiment: Experiment) -> dict[str, Any]:
    """What is searched; where every weight is trained, an adapter's settings are none of it."""
    full = experiment.method == "full"
    return {
        key: choice
        for key, choice in experiment.search.space.items()
        if not (full and key.startswith("lora."))
    }


def grid_size(experiment: Experiment) -> float:
    """How many trials there can be. Raises: GemmateError for a grid of a range."""
    if experiment.search.sampler != "grid":
        return float("inf")
    size = 1
    for key, choice in experiment.search.space.items():
        if not isinstance(choice, list):
            raise GemmateError(f"search.space: a grid needs {key} as a list, as in [0.001, 0.01].")
        size *= len(choice)
    return size


def _suggest(trial: "Trial", experiment: Experiment) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, choice in experiment.search.space.items():
        group, _, leaf = key.partition(".")
        if isinstance(choice, list):
            values[key] = trial.suggest_categorical(key, choice)
        elif isinstance(getattr(getattr(experiment, group), leaf), int):
            low, high = int(choice["low"]), int(choice["high"])
            values[key] = trial.suggest_int(key, low, high, log=choice["log"])
        else:
            values[key] = trial.suggest_float(key, choice["low"], choice["high"], log=choice["log"])
    return values


def objective(trial: "Trial", experiment: Experiment, splits: Splits, folder: Path) -> float:
    """Train one trial in a folder that is gone afterwards; its last validation loss, in nats.

    Raises: TrialPruned, also where it diverged; OutOfMemory; ValidationError for values that do
        not go together.
    """
    from optuna import TrialPruned

    values, last = _suggest(trial, experiment), experiment.training.max_steps

    def watch(record: dict[str, float]) -> None:
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            raise Orphaned
        step = int(record["step"])
        if "eval_loss" in record:
            trial.report(record["eval_loss"], step)
            if step != last and trial.should_prune():  # at the end nothing is left to save
                raise TrialPruned

    out = folder / TRIALS / f"{trial.number:04d}"
    try:
        untold = experiment.tracking.model_copy(update={"upload_model": False})
        chosen = with_values(experiment, values, checkpoint=CheckpointConfig(), tracking=untold)
        run = finetune_model(chosen, out=out, splits=splits, report=watch)
        stops = experiment.training.stops_early  # then the best weights are those that are kept
        return run.metrics["best_eval_loss" if stops else "eval_loss"]
    except Diverged as error:  # pruned, not failed: the sampler learns to stay away
        trial.set_user_attr(REASON, str(error))
        raise TrialPruned(str(error)) from None
    except (GemmateError, ValidationError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, OutOfMemory) or asked_mib(error) is not None
        if not memory and not isinstance(error, ValidationError):
            raise  # any other error is every trial's
        trial.set_user_attr(REASON, str(error))
        raise OutOfMemory(str(error)) if memory else error from None
    finally:
        shutil.rmtree(out, ignore_errors=True)
        gc.collect()  # a model refers to itself, and the next one wants its memory


def without_test(splits: Splits) -> Splits:
    """The splits that a search may see."""
    return dataclasses.replace(splits, test=[])


def prepare(experiment: Experiment) -> tuple[Experiment, Splits]:
    """The experiment with the space that is meant, and the rows of its trials.

    Raises: GemmateError where Optuna is missing, or a trial would have no validation loss.
    """
    refuse_budget(experiment, "A search")
    need("optuna", "A search", extra="search")
    search = experiment.search.model_copy(update={"space": space_of(experiment)})
    experiment, training = experiment.model_copy(update={"search": search}), experiment.training
    splits = without_test(load_splits(experiment))
    late = 0 < training.max_steps < training.eval_every
    if not training.eval_every or late or not splits.validation:
        remedy = "Set training.eval_every, at most max_steps, and dataset.validation_fraction"
        raise GemmateError(f"A search compares validation losses, and has none. {remedy}.")
    return experiment, splits
