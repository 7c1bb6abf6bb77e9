"""A study on disk: what is searched, and the record of its trials that several processes share.

The folder holds study.json (what is searched), journal.log (Optuna's record, where no database is
named), claim.lock (one worker at a time takes a trial) and workers/ (a lock for each living one;
the kernel lets go of it when the process ends, however it ends).
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from gemmate_lib.checkpoints import differences
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.manifest import write_whole

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

RECORD, JOURNAL, CLAIMS = "study.json", "journal.log", "claim.lock"
HEARTBEAT, GRACE = 10, 60  # of workers that share a database. [seconds]


class KernelLock:
    """The journal's lock, held by the kernel: it ends with its process.

    optuna 5.0.0, storages/journal/_file.py: its own locks are files. A killed process leaves them
    behind, and the others wait for 30 s; a line that it wrote by half gets the next one appended,
    and then nobody can read the journal. Delete this once both are mended there.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock = FileLock(journal.with_suffix(".lock"))

    def acquire(self) -> bool:
        """Wait for the lock; cut off the half line of a writer that was killed."""
        self._lock.acquire()
        if self._journal.is_file() and self._journal.stat().st_size:
            with self._journal.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let the others write."""
        self._lock.release()


def shown(storage: str | None) -> str:
    """Where a study is kept, fit to be printed and written down: no password, no parameters.

    Raises: GemmateError for what is no URL of a database.
    """
    if storage is None:
        return "journal"
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(storage).set(query={}).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        example = "postgresql://USER@HOST/NAME"
        raise GemmateError(f"The storage is no URL of a database. Write {example}.") from None


def _open_storage(folder: Path, storage: str | None) -> "BaseStorage":
    from optuna import storages
    from optuna.storages.journal import JournalFileBackend

    if storage is None:
        journal = folder / JOURNAL
        lock: Any = KernelLock(journal)
        return storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
    try:
        return storages.RDBStorage(storage, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except Exception as error:  # its text may hold the password
        kind = getattr(error, "name", None) or type(error).__name__
        problem = f"The storage {shown(storage)} cannot be opened ({kind})"
        raise GemmateError(f"{problem}. Check its address, and install its driver.") from None


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """No word from Optuna but its errors: we tell of each trial ourselves."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        # Heartbeats, and failing what no longer has one, are called experimental since 2.9.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)


def sign(folder: Path, identity: dict[str, Any], experiment: Experiment, name: str) -> None:
    """Write down what a folder's study searches, or check that it is the same.

    Raises: GemmateError naming what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, path = json.loads(json.dumps(identity)), folder / RECORD
    with FileLock(folder / CLAIMS):
        if path.is_file():
            theirs = read_record(folder)["identity"]
            if changed := differences(theirs, record):
                both = (f"{key}: {then} then, {now} now" for key, (then, now) in changed.items())
                lines = "; ".join(both)
                remedy = "Set them back, or give --out another folder"
                raise GemmateError(f"{folder} holds another study. {lines}. {remedy}.")
            return
        content = {"name": name, "identity": record, "config": experiment.model_dump(mode="json")}
        write_whole(path, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder's study searches. Raises: GemmateError where it holds none."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        return {key: record[key] for key in ("name", "identity", "config")}
    except (OSError, ValueError, LookupError, TypeError):
        said = f"{folder} holds no study. Make one with: gemmate search quotes --out {folder}"
        raise GemmateError(said) from None


def open_study(folder: Path, *, storage: str | None = None) -> "Study":
    """Open the study of a folder that has been signed."""
    import optuna

    name = read_record(folder)["name"]
    with quiet_optuna():
        opened = _open_storage(folder, storage)
        return optuna.create_study(storage=opened, study_name=name, load_if_exists=True)
