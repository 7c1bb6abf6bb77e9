"""Studies that several processes share: who takes which trial, and what the dead leave behind.

The trials here cost nothing; studies, journals, processes and kills are real.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.crew import ATTEMPTS, SLOT, Worker, tally
from gemmate_lib.studies import JOURNAL, KernelLock, open_study, shown, sign

RATE = {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
GRID = {"training.learning_rate": [1e-4, 1e-3, 1e-2], "lora.r": [4, 8]}
PLANTED = "pass" + "word7"


def make(folder: Path, storage: str | None = None, **search: Any) -> Experiment:
    """Sign a folder for an experiment with these settings of the search."""
    experiment = Experiment(search={"space": RATE} | search)
    identity = {f"search.{k}": v for k, v in experiment.search} | {"storage": shown(storage)}
    sign(folder, identity, experiment, "study")
    return experiment


def cheap(trial: Any) -> float:
    """A loss with its lowest at 1e-2."""
    rate = trial.suggest_float("training.learning_rate", 1e-4, 1e-1, log=True)
    return (rate - 1e-2) ** 2


def point(trial: Any) -> float:
    """A loss over GRID."""
    rate = trial.suggest_categorical("training.learning_rate", GRID["training.learning_rate"])
    return rate * trial.suggest_categorical("lora.r", GRID["lora.r"])


def slow(run: Callable[[Any], float], seconds: float) -> Callable[[Any], float]:
    """The same, with time to be killed in."""

    def wait(trial: Any) -> float:
        value = run(trial)
        time.sleep(random.Random(trial.number).uniform(0, seconds))
        trial.report(value, 1)
        return value

    return wait


def work(
    folder: Path,
    wanted: int,
    run: Callable[[Any], float] = cheap,
    storage: str | None = None,
) -> None:
    """Take trials to the end, in this process."""
    experiment = make_again(folder)
    study = open_study(folder, storage=storage)
    end = time.monotonic() + 60
    with Worker(folder, study, experiment, shared=storage is not None) as worker:
        while (outcome := worker.take(wanted, run, (ArithmeticError,))) != "done":
            assert time.monotonic() < end, "the study does not end"
            if outcome == "wait":
                time.sleep(0.01)
            else:  # what this process has been told is safe
                best = tally(study).told[-1]
                with (folder / f"told-{os.getpid()}.txt").open("a") as file:
                    file.write(f"{best.number} {best.value}\n")


def make_again(folder: Path) -> Experiment:
    """The experiment a folder was signed for."""
    config = json.loads((folder / "study.json").read_text("utf-8"))["config"]
    return Experiment.model_validate(config)


def fork(action: Callable[[], object]) -> int:
    """Do something in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def until(holds: Callable[[], object]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def kill(pids: list[int], after: float) -> None:
    """End processes at once: no handler runs, nothing is flushed."""
    time.sleep(after)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def check(folder: Path, wanted: int, storage: str | None = None) -> Any:
    """So many trials are told, each once, and nothing that was told before is gone."""
    found = tally(open_study(folder, storage=storage))
    assert len(found.told) == wanted and not found.running
    assert sorted(t.user_attrs[SLOT] for t in found.told) == list(range(wanted))
    values = {t.number: t.value for t in found.told}
    for file in folder.glob("told-*.txt"):
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for number, value in (line.split() for line in whole):
            assert values[int(number)] == float(value)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_two_workers_killed_twice_end_with_what_was_asked(tmp_path: Path, seed: int) -> None:
    make(tmp_path)
    rng = random.Random(seed)
    for _ in range(2):
        pids = [fork(lambda: work(tmp_path, 40, slow(cheap, 0.2))) for _ in range(2)]
        kill(pids, rng.uniform(0.1, 0.5))
    assert tally(open_study(tmp_path)).done < 40
    pids = [fork(lambda: work(tmp_path, 40)) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    check(tmp_path, 40)
    work(tmp_path, 40)  # and is done
    check(tmp_path, 40)


def test_one_of_two_is_killed_and_the_other_makes_up_for_it(tmp_path: Path) -> None:
    make(tmp_path)
    first = fork(lambda: work(tmp_path, 3, lambda trial: time.sleep(60) or 0.0))
    until(lambda: tally(open_study(tmp_path)).running)
    second = fork(lambda: work(tmp_path, 3))
    until(lambda: tally(open_study(tmp_path)).done == 2)
    kill([first], 0)
    assert os.waitpid(second, 0)[1] == 0
    assert len(check(tmp_path, 3).lost) == 1


def test_no_more_trials_than_asked_though_all_want_the_last(tmp_path: Path) -> None:
    make(tmp_path)
    pids = [fork(lambda: work(tmp_path, 5, slow(cheap, 0.1))) for _ in range(4)]
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert not check(tmp_path, 5).lost


def test_one_worker_draws_the_same_trials_killed_or_not(tmp_path: Path) -> None:
    def drawn(folder: Path) -> list[float]:
        told = sorted(check(folder, 12).told, key=lambda t: t.user_attrs[SLOT])
        return [t.params["training.learning_rate"] for t in told]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make(whole)
    work(whole, 12)
    make(broken)
    kill([fork(lambda: work(broken, 12, slow(cheap, 0.1)))], 0.3)
    assert tally(open_study(broken)).done < 12
    work(broken, 12)
    assert drawn(whole) == drawn(broken) and len(set(drawn(whole))) == 12


def test_every_point_of_a_grid_once_though_killed(tmp_path: Path) -> None:
    make(tmp_path, space=GRID, sampler="grid")
    for stop in (2, 4):
        pid = fork(lambda n=stop: work(tmp_path, 6, _hangs_at(tmp_path, n)))
        until(lambda n=stop: (t := tally(open_study(tmp_path))).done == n and t.running)
        kill([pid], 0)
    work(tmp_path, 6, point)
    found = check(tmp_path, 6)
    points = {(t.params["training.learning_rate"], t.params["lora.r"]) for t in found.told}
    assert len(points) == 6 and len(found.lost) == 2


def _hangs_at(folder: Path, n: int) -> Callable[[Any], float]:
    def run(trial: Any) -> float:
        value = point(trial)
        if tally(open_study(folder)).done >= n:
            time.sleep(60)
        return value

    return run


def test_a_trial_that_kills_its_worker_each_time_is_given_up(tmp_path: Path) -> None:
    make(tmp_path)

    def deadly(trial: Any) -> float:
        if trial.user_attrs[SLOT] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return cheap(trial)

    ends = [os.waitpid(fork(lambda: work(tmp_path, 3, deadly)), 0)[1] for _ in range(ATTEMPTS + 1)]
    assert ends == [signal.SIGKILL] * ATTEMPTS + [0]
    found = tally(open_study(tmp_path))
    assert found.given_up == {1} and len(found.told) == 2 and found.done == 3
    assert [t.state.name for t in found.lost] == ["FAIL"] * ATTEMPTS


@pytest.mark.parametrize(
    ("search", "pruned"),
    [
        ({"pruner": "none"}, []),
        ({"startup_trials": 2}, [2, 3, 4]),
        ({"startup_trials": 4}, [4]),
        ({"startup_trials": 2, "prune_after": 9}, []),
    ],
)
def test_what_is_worse_than_the_median_is_pruned(
    search: dict[str, Any], pruned: list[int], tmp_path: Path
) -> None:
    make(tmp_path, **search)

    def worse(trial: Any) -> float:
        trial.report(float(trial.number), 1)
        if trial.should_prune():
            raise optuna.TrialPruned
        return float(trial.number)

    work(tmp_path, 5, worse)
    told = check(tmp_path, 5).told
    assert [t.number for t in told if t.state.name == "PRUNED"] == pruned


def test_a_line_written_by_half_is_cut_off(tmp_path: Path) -> None:
    make(tmp_path)
    work(tmp_path, 2)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":6,"worker_')  # killed in the middle of the write
    work(tmp_path, 4)
    check(tmp_path, 4)


def test_with_its_own_lock_optuna_could_no_longer_read_that_journal(tmp_path: Path) -> None:
    """When this fails, upstream has mended it: see KernelLock."""
    journal = tmp_path / JOURNAL

    def open_theirs() -> None:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        optuna.create_study(storage=storage, study_name="study", load_if_exists=True)

    open_theirs()
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,"worker_')
    with pytest.raises(ValueError):
        for _ in range(3):
            open_theirs()


def test_who_is_killed_with_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    lock = KernelLock(tmp_path / JOURNAL)

    def hold() -> None:
        KernelLock(tmp_path / JOURNAL).acquire()
        (tmp_path / "held").touch()
        time.sleep(60)

    pid = fork(hold)
    until((tmp_path / "held").exists)
    kill([pid], 0)
    began = time.perf_counter()
    assert lock.acquire() and time.perf_counter() - began < 5
    lock.release()


def test_another_study_in_the_same_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path)
    with pytest.raises(GemmateError, match=r"another study\. search.sampler: tpe then, random"):
        make(tmp_path, sampler="random")
    with pytest.raises(GemmateError, match=r"search.space: .*0.1.* then, .*0.2.* now"):
        make(tmp_path, space={"training.learning_rate": {"low": 1e-4, "high": 0.2, "log": True}})
    with pytest.raises(GemmateError, match=r"storage: journal then, sqlite:///x\.db now"):
        make(tmp_path, storage="sqlite:///x.db")
    with pytest.raises(GemmateError, match="holds no study"):
        open_study(tmp_path / "other")


def test_a_database_is_shared_by_two_folders(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        make(folder, storage)
    work(here, 3, storage=storage)
    work(there, 5, storage=storage)
    found = tally(open_study(here, storage=storage))
    assert found.done == 5 and len({t.params["training.learning_rate"] for t in found.told}) == 5


def test_a_password_is_neither_printed_nor_stored(tmp_path: Path) -> None:
    url = f"postgresql+nodriver://me:{PLANTED}@host/db?sslpassword={PLANTED}"
    assert shown(url) == "postgresql+nodriver://me:***@host/db"
    make(tmp_path, url)
    with pytest.raises(GemmateError) as error:
        open_study(tmp_path, storage=url)
    assert "me:***@host/db cannot be opened" in str(error.value)
    assert PLANTED not in str(error.value) and error.value.__suppress_context__
    assert all(PLANTED not in f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    with pytest.raises(GemmateError, match="no URL of a database") as error:
        shown(f"host:{PLANTED}")
    assert PLANTED not in str(error.value)
