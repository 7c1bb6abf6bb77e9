"""Hyperparameter search: short runs, judged on the validation split by Optuna.

The space is the experiment's own, `search.space`. The test split is for gemmate_lib/winner.py.
With one worker a study is reproducible, even if it was killed on the way; with more the trials end
in another order each time, and each draws on those before it.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.crew import ATTEMPTS, REASON, Tally, Worker, tally
from gemmate_lib.data import Splits
from gemmate_lib.memory import OutOfMemory
from gemmate_lib.models import base_record
from gemmate_lib.resume import identity_of
from gemmate_lib.settings import digest
from gemmate_lib.sft import home_of, run_key
from gemmate_lib.studies import open_study, read_record, shown, sign
from gemmate_lib.trials import Orphaned, grid_size, objective, prepare
from gemmate_lib.trust import experiment_of

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

Say = Callable[["FrozenTrial"], None]
POLL = 0.2  # how often one who waits looks again. [seconds]


@dataclass(frozen=True)
class Job:
    """What each worker is told: the study, how many trials it is to have, and by when."""

    folder: Path
    wanted: float
    deadline: float  # [seconds since the epoch]
    storage: str | None = field(repr=False)  # it may hold a password


@dataclass(frozen=True)
class Search:
    """A study in its folder, and the experiment whose settings it searches."""

    directory: Path
    experiment: Experiment
    study: "Study"

    @cached_property
    def tally(self) -> Tally:
        """Its trials: told, running, lost."""
        return tally(self.study)

    @property
    def best(self) -> "FrozenTrial":
        """The completed trial of the lowest validation loss.

        Raises: GemmateError where none was completed.
        """
        found = [t for t in self.tally.told if t.state.name == "COMPLETE"]
        if not found:
            reasons = {t.user_attrs[REASON] for t in self.tally.told if REASON in t.user_attrs}
            why = f" {sorted(reasons)[0]}" if reasons else ""
            raise GemmateError(f"No trial was completed.{why} Narrow search.space, or run more.")
        return min(found, key=lambda t: (t.value, t.number))


def _identity(experiment: Experiment, splits: Splits, storage: str | None) -> dict[str, Any]:
    rows = {k: v for k, v in splits.checksums().items() if k != "test"}
    found = identity_of(experiment, rows, base_record(experiment.model))
    search = {f"search.{key}": value for key, value in experiment.search}
    # Machines that share a study need not have the very same packages.
    found = {k: v for k, v in found.items() if not k.startswith("package.")}
    return found | search | {"storage": shown(storage)}


def optimize_hyperparameters(
    experiment: Experiment,
    n_trials: int | None = None,
    *,
    timeout: float | None = None,
    out: str | Path | None = None,
    workers: int = 1,
    storage: str | None = None,
    report: Say | None = None,
) -> Search:
    """Search the experiment's space until its study has `n_trials` told trials, and return it.

    timeout: in seconds; no trial begins after that.
    out: the study's folder; one with the same study is gone on with. Default: named by all that
        decides its trials, this code too, under `home_of` the experiment.
    workers: processes side by side. Other machines may join with the same `out` or `storage`.
    storage: the URL of a database that Optuna knows, instead of a journal in `out`.
    report: told of each trial as it ends, those of other workers too.
    Raises: GemmateError where nothing says when to stop, the folder holds another study, or what
        is wrong would be so in every trial.
    """
    experiment, splits = prepare(experiment)
    wanted = min(n_trials or float("inf"), grid_size(experiment))
    if wanted == float("inf") and timeout is None:
        raise GemmateError("A search needs an end. Give n_trials (--trials), or a timeout.")
    identity = _identity(experiment, splits, storage)
    name = f"{experiment.name}-{digest(identity)[:12]}"
    own = home_of(experiment) / f"search-{experiment.name}-{run_key(experiment, splits)}"
    folder = Path(out) if out else own
    sign(folder, identity, experiment, name)
    deadline = time.time() + timeout if timeout is not None else float("inf")
    job = Job(folder, wanted, deadline, storage)
    if workers == 1:
        work(job, experiment, splits, report=report)
    else:
        _supervise(job, experiment, workers, report=report)
    return load_search(folder, storage=storage)


def load_search(folder: str | Path, *, storage: str | None = None) -> Search:
    """Read the study in a folder. Raises: GemmateError where it holds none."""
    folder = Path(folder)
    experiment = experiment_of(read_record(folder))
    return Search(folder, experiment, open_study(folder, storage=storage))


def work(job: Job, experiment: Experiment, splits: Splits, *, report: Say | None = None) -> None:
    """Take trials until the study has what is wanted, or no one's time is left."""
    study = open_study(job.folder, storage=job.storage)
    run = partial(objective, experiment=experiment, splits=splits, folder=job.folder)
    seen = {t.number for t in tally(study).told}
    shared, parent = job.storage is not None, parent_process()
    with Worker(job.folder, study, experiment, shared=shared) as worker:
        while time.time() < job.deadline and (parent is None or parent.is_alive()):
            outcome = worker.take(job.wanted, run, (OutOfMemory, ValidationError))
            _tell(study, seen, report)
            if outcome == "done":
                return
            if outcome == "wait":  # should another worker die, its trial is ours
                time.sleep(POLL)


def _tell(study: "Study", seen: set[int], report: Say | None) -> None:
    for trial in tally(study).told:
        if trial.number not in seen:
            seen.add(trial.number)
            if report:
                report(trial)


def _member(job: Job, experiment: Experiment, errors: Any) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends us
    try:
        work(job, *prepare(experiment))
    except Orphaned:
        return
    except GemmateError as error:
        errors.put(str(error))


def _supervise(job: Job, experiment: Experiment, workers: int, *, report: Say | None) -> None:
    """Keep so many processes at work; one that was killed is replaced while there is work.

    Raises: GemmateError that a worker met.
    """
    context = get_context("spawn")  # a fork would inherit CUDA, and the locks
    errors, spare = context.SimpleQueue(), ATTEMPTS * workers
    study = open_study(job.folder, storage=job.storage)
    seen, crew = {t.number for t in tally(study).told}, []

    def hire() -> None:
        crew.append(context.Process(target=_member, args=(job, experiment, errors), daemon=True))
        crew[-1].start()

    try:
        for _ in range(workers):
            hire()
        while crew and errors.empty():
            time.sleep(POLL)
            _tell(study, seen, report)
            for ended in [each for each in crew if each.exitcode is not None]:
                crew.remove(ended)
                code = ended.exitcode or 0
                if code > 0:
                    raise GemmateError("A worker failed: its error stands above. Mend that first.")
                if code < 0 and spare and tally(study).done < job.wanted:
                    spare -= 1
                    hire()
    finally:
        for each in crew:
            each.terminate()
            each.join()
    if not errors.empty():
        raise GemmateError(errors.get())
    _tell(study, seen, report)
