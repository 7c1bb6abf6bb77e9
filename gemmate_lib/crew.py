"""Who does what in a study: each trial is one worker's, and what the dead left is made up for.

A trial is *told* when its result is in the study: it was completed, pruned, or failed for a reason
of its own. One whose worker died is *lost*: recorded as failed without a reason, and done again.
"""

import re
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

from gemmate_lib.config import Experiment
from gemmate_lib.settings import digest
from gemmate_lib.studies import CLAIMS, quiet_optuna

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

REASON, SLOT, WORKER = "reason", "slot", "worker"  # what we note of a trial
ATTEMPTS = 3  # a trial that killed so many workers counts as failed


@dataclass(frozen=True)
class Tally:
    """The trials of a study: told, running and lost, and the slots that are given up.

    A slot is a place among the requested trials; a trial that makes up for another takes its slot.
    """

    told: "list[FrozenTrial]"
    running: "list[FrozenTrial]"
    lost: "list[FrozenTrial]"
    given_up: frozenset[int]

    @property
    def done(self) -> int:
        """How many of the requested trials need no more work."""
        return len(self.told) + len(self.given_up)

    def free_slot(self) -> int:
        """The smallest that is neither told, running nor given up."""
        taken = {t.user_attrs.get(SLOT) for t in (*self.told, *self.running)} | self.given_up
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)


def tally(study: "Study") -> Tally:
    """Count the trials of a study."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    failed = [t for t in trials if t.state == TrialState.FAIL]
    lost = [t for t in failed if REASON not in t.user_attrs]
    whole = (TrialState.COMPLETE, TrialState.PRUNED)
    told = [t for t in trials if t.state in whole or (t in failed and t not in lost)]
    deaths = Counter(t.user_attrs[SLOT] for t in lost if SLOT in t.user_attrs)
    filled = {t.user_attrs.get(SLOT) for t in told}
    given_up = {slot for slot, n in deaths.items() if n >= ATTEMPTS and slot not in filled}
    running = [t for t in trials if t.state == TrialState.RUNNING]
    return Tally(told, running, lost, frozenset(given_up))


class Worker:
    """One process's part in a study: it takes a trial at a time, and sees who has died."""

    def __init__(
        self, folder: Path, study: "Study", experiment: Experiment, *, shared: bool
    ) -> None:
        self.folder, self.study, self.search = folder, study, experiment.search
        self.seed, self.shared = experiment.seed, shared  # shared: in a database
        self.name = uuid.uuid4().hex
        (folder / "workers").mkdir(exist_ok=True)
        self._claims = FileLock(folder / CLAIMS)
        self._life = FileLock(self._lock_of(self.name))

    def __enter__(self) -> "Worker":
        """Be alive."""
        self._life.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        """Be no longer."""
        self._life.release()
        self._lock_of(self.name).unlink(missing_ok=True)

    def _lock_of(self, name: str) -> Path:
        return self.folder / "workers" / f"{name}.lock"

    def _alive(self, trial: "FrozenTrial") -> bool:
        name = str(trial.user_attrs.get(WORKER))
        if not re.fullmatch("[0-9a-f]{32}", name):  # killed before it signed
            return False
        try:
            with FileLock(self._lock_of(name), timeout=0):
                return False
        except Timeout:
            return True

    def settle(self) -> Tally:
        """Fail the trials whose worker is dead, put their points of a grid back, and count.

        Only who holds the claims may, so that a trial without a worker's name is a dead one's.
        """
        import optuna

        failed = optuna.trial.TrialState.FAIL
        if self.shared:
            optuna.storages.fail_stale_trials(self.study)
        else:
            for trial in tally(self.study).running:
                if not self._alive(trial):
                    self.study.tell(trial.number, state=failed, skip_if_finished=True)
        found = tally(self.study)
        if self.search.sampler == "grid":
            self._put_back(found)
        return found

    def _put_back(self, found: Tally) -> None:
        """Queue each lost point once: to GridSampler a failed trial has visited its own."""
        import optuna

        waiting = self.study.get_trials(states=(optuna.trial.TrialState.WAITING,))
        kept = {t.system_attrs.get("grid_id") for t in (*found.told, *found.running, *waiting)}
        for trial in found.lost:
            grid_id = trial.system_attrs.get("grid_id")
            if grid_id in kept or trial.user_attrs.get(SLOT) in found.given_up:
                continue
            kept.add(grid_id)
            attrs = {k: trial.system_attrs[k] for k in ("grid_id", "search_space")}
            again = optuna.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs=attrs)
            self.study.add_trial(again)

    def take(
        self,
        wanted: float,
        run: "Callable[[Trial], float]",
        catch: tuple[type[Exception], ...],
    ) -> Literal["done", "wait", "ran"]:
        """Run one trial, if the study needs one more that nobody is at."""
        with quiet_optuna():
            try:
                self._claims.acquire()
                found = self.settle()
                if found.done >= wanted:
                    return "done"
                if found.done + len(found.running) >= wanted:
                    return "wait"
                slot = found.free_slot()

                def begun(trial: "Trial") -> float:
                    trial.set_user_attr(SLOT, slot)
                    trial.set_user_attr(WORKER, self.name)
                    self._claims.release()
                    return run(trial)

                self.study.sampler, self.study.pruner = self._sampler(slot), self._pruner()
                self.study.optimize(begun, n_trials=1, catch=catch)
                return "ran"
            finally:
                if self._claims.is_locked:
                    self._claims.release()

    def _pruner(self) -> "BasePruner":
        from optuna import pruners

        if self.search.pruner == "none":
            return pruners.NopPruner()
        settings = self.search
        return pruners.MedianPruner(settings.startup_trials, n_warmup_steps=settings.prune_after)

    def _sampler(self, slot: int) -> "BaseSampler":
        """Seeded by the slot: what is drawn hangs on the trials before, not on who was killed."""
        from optuna import samplers

        if self.search.sampler == "grid":
            return samplers.GridSampler(self.search.space, seed=self.seed)
        salt = [self.name] if self.shared else []  # two machines may take one slot at a time
        seed = int(digest([self.seed, slot, *salt])[:8], 16)
        if self.search.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=self.search.startup_trials)
