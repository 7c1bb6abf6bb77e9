"""Where a run begins: in a new folder, or at a checkpoint that belongs to the very same run."""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemmate_lib import checkpoints
from gemmate_lib.budget import Spent
from gemmate_lib.callbacks import Interrupted, Keeping
from gemmate_lib.config import Experiment, GemmateError, flatten
from gemmate_lib.journal import JOURNAL, Journal
from gemmate_lib.manifest import package_versions
from gemmate_lib.ranks import ALONE, Ranks
from gemmate_lib.storage import FsspecStorage

log = logging.getLogger("gemmate")
FOLDER, MARK = "checkpoints", ".unfinished"  # the mark is locked while a process writes the run
# Settings that decide what is kept, said or done afterwards, and not what is computed.
WITHOUT_EFFECT = {
    "name", "profile", "project_dir", "training.recipe", "checkpoint", "budget", "tracking",
    "generation", "search",
}  # fmt: skip
OPTIMIZER = "checkpoint.save_optim"  # what to allow in order to go on without its state

# Of the system, of safetensors, and of torch's two writers.
_FULL = re.compile(r"No space left|File too large|os error (27|28)\b|failed writing|iostream error")


def identity_of(
    experiment: Experiment,
    checksums: Mapping[str, Any],
    base: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """All that decides the result of a run, by key: settings, rows, base weights, packages.

    How many processes shared the batches does so only where dropout draws on each of them.
    """
    settings = json.loads(json.dumps(flatten(experiment)))  # as a manifest has them
    found = {
        key: value
        for key, value in settings.items()
        if not WITHOUT_EFFECT & {key, key.split(".")[0]}
    }
    found |= {f"rows.{split}": digest for split, digest in checksums.items()}
    found["base.weights_sha256"] = base["weights_sha256"]
    if ranks.several and experiment.lora.dropout:
        found["processes"] = ranks.world
    return found | {f"package.{name}": version for name, version in package_versions().items()}


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at step 0."""

    path: Path | None = None
    step: int = 0
    skipped: list[str] = field(default_factory=list)
    allowed: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any] | None:
        """For the manifest; None for a run that began at step 0."""
        if self.path is None:
            return None
        return {"step": self.step, "skipped": self.skipped, "allowed": self.allowed}


def unfinished(out: Path) -> bool:
    """Whether a folder holds a run that was begun and not ended."""
    return (out / MARK).is_file() and not (out / "manifest.json").is_file()


def check_new(out: Path, *, resume: str | None = None) -> None:
    """Raise GemmateError where a run may not be written to a folder."""
    begun = unfinished(out)
    if begun and not resume and checkpoints.paths(out / FOLDER):
        raise GemmateError(f"{out} holds a run that did not finish. Go on with --resume last, or "
                           "delete it.")  # fmt: skip
    if out.exists() and not begun:
        raise GemmateError(f"{out} exists. Give --out another folder, or delete it.")


@contextlib.contextmanager
def work_in(out: Path, ranks: Ranks = ALONE) -> Iterator[Path]:
    """The folder of a run, ours alone; gone again on a failure, but for its checkpoints.

    Of several ranks the first one owns it; it is left when every rank is done.
    """
    try:
        with _owned(out) if ranks.first else contextlib.nullcontext():
            if ranks.several:
                ranks.share(out)
            yield out
    except (Interrupted, Spent):
        ranks.wait()  # who ends before the first one is done has it ended, too
        raise
    ranks.wait()


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / MARK, timeout=0):
            _leave_checkpoints(out)  # what a killed process left half done
            yield
    except Timeout:
        raise GemmateError(f"{out} exists: another process is writing it. Wait for it.") from None
    except BaseException as error:
        _leave_checkpoints(out)
        if not checkpoints.paths(out / FOLDER):
            shutil.rmtree(out, ignore_errors=True)
        if _FULL.search(str(error)):
            remedy = "Free some, or give --out a folder on another disk."
            raise GemmateError(f"There is no room to write {out}. {remedy}") from error
        raise
    (out / MARK).unlink(missing_ok=True)


def _leave_checkpoints(out: Path) -> None:
    for path in out.iterdir():
        if path.name in (FOLDER, MARK, JOURNAL):  # what is left is still to be seen, and paid
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_start(
    out: Path,
    experiment: Experiment,
    identity: Mapping[str, Any],
    *,
    resume: str | None,
    allowed: Collection[str],
) -> Start:
    """The checkpoint to go on from, once it verifies and belongs to this run.

    Raises: GemmateError listing what differs, or where no checkpoint is sound.
    """
    if resume is None:
        return Start()
    folder, settings = out / FOLDER, experiment.checkpoint
    remote = settings.remote_path if settings.load_from_storage else None
    if remote and resume in ("last", "best"):
        fetch(FsspecStorage(remote), folder)
    if resume in ("last", "best") and not checkpoints.paths(folder):
        log.info("There is no checkpoint in %s: the run begins at the start.", folder)
        return Start()
    found = checkpoints.choose(
        folder,
        resume,
        metric=settings.metric,
        mode=settings.metric_mode,
    )
    for fault in found.skipped:
        log.warning("skipped %s", fault)
    changed = checkpoints.differences(found.checkpoint.identity, identity)
    if not found.checkpoint.manifest["optimizer"]:
        changed[OPTIMIZER] = (False, "needed to resume exactly")
    if refused := {key: both for key, both in changed.items() if key not in allowed}:
        lines = "; ".join(f"{key}: {then} then, {now} now" for key, (then, now) in refused.items())
        name = found.checkpoint.path.name
        raise GemmateError(f"{name} belongs to another run. {lines}. Set them back, or override "
                           "each with --allow-changed KEY.")  # fmt: skip
    kept = {key: list(both) for key, both in changed.items()}
    return Start(found.checkpoint.path, found.checkpoint.step, found.skipped, kept)


def hours_spent(out: Path, start: Start) -> float:
    """Hours that earlier processes spent on a run: by its checkpoint, or by its journal if more.

    A process that was killed spent more than its last checkpoint knows; a checkpoint that was
    fetched from a storage comes without a journal.
    """
    record = checkpoints.read(start.path).manifest if start.path else {}
    return max(float(record.get("spent_hours", 0.0)), Journal(out).update().spent)


def fetch(storage: FsspecStorage, folder: Path) -> None:
    """Fetch the newest checkpoint of a storage, where it is newer than what is here."""
    here = [path.name for path in checkpoints.paths(folder)[:1]]
    there = storage.names()[:1]
    newest = max(here + there, key=lambda name: checkpoints.step_of(name) or 0, default=None)
    if newest is not None and newest not in here:
        storage.load_from_storage(newest, folder)


def keeping_for(experiment: Experiment, out: Path, identity: dict[str, Any]) -> Keeping:
    """What is kept of a run's checkpoints; early stopping goes back to the best, so it stays."""
    settings = experiment.checkpoint
    remote = settings.remote_path if settings.sync_to_storage else None
    return Keeping(
        folder=out / FOLDER,
        identity=identity,
        keep_last_n=settings.keep_last_n,
        keep_best_n=max(settings.keep_best_n, experiment.training.stops_early),
        metric=settings.metric,
        mode=settings.metric_mode,
        optimizer=settings.save_optim,
        epochs=settings.save_every_epochs,
        storage=FsspecStorage(remote) if remote else None,
    )
