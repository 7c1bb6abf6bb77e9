"""Versions of runs: each named by the SHA-256 of the hashes of its files, and never changed.

versions/<digest>/version.json     the files and their hashes; written last
versions/<digest>/manifest.json, log.jsonl, adapter/… or model/…
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.evaluation import MAIN
from gemmate_lib.hub import UPLOADED
from gemmate_lib.machine import runs_home
from gemmate_lib.manifest import file_sha256
from gemmate_lib.place import Place
from gemmate_lib.settings import digest
from gemmate_lib.sft import Run
from gemmate_lib.stats import Interval
from gemmate_lib.tags import short
from gemmate_lib.trust import experiment_of, inside

RECORD, MANIFEST, LOG = "version.json", "manifest.json", "log.jsonl"
DIGEST = re.compile(r"[0-9a-f]{64}")
FILE = re.compile(r"(adapter|model)/([^/\\:]+)")


class BadVersion(GemmateError):
    """A version that is not what was added, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Version {short(name)} is refused: {why}. Add its run again.")


class Measured(BaseModel):
    """A metric as metrics.json has it: an infinite bound is None."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        """As `gemmate evaluate` prints it."""
        value = math.inf if self.value is None else self.value
        low = -math.inf if self.low is None else self.low
        return str(Interval(value, low, math.inf if self.high is None else self.high, self.n))


class Note(BaseModel):
    """What the digest does not cover: it is there to be read, and decides nothing.

    added: when (UTC); metrics: what `gemmate evaluate` had measured by then.
    """

    added: str
    metrics: dict[str, Measured] = {}


@dataclass(frozen=True)
class Version:
    """A version: its digest, the hashes of its files, its manifest, and what was noted."""

    digest: str
    files: dict[str, str]
    manifest: dict[str, Any]
    note: Note

    @cached_property
    def experiment(self) -> Experiment:
        """What it was trained by."""
        return experiment_of(self.manifest)

    @property
    def metrics(self) -> dict[str, Measured]:
        """What its task is for, as noted; a loss as perplexity."""
        wanted, noted = (name.replace("_nll", "_perplexity") for name in MAIN), self.note.metrics
        return {name: noted[name] for name in wanted if name in noted}


class Versions:
    """The versions in a place."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def add(self, run: Run) -> Version:
        """Put a run in, whole or not at all, and read it back; what is sound there stays.

        Raises: GemmateError for files that are no part of a run, or where none holds weights.
        """
        files = files_of(run)
        name = digest(files)
        with contextlib.suppress(BadVersion):  # not there, cut off or damaged: then it is mended
            return self.verify(name)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = Note(added=now, metrics=_measured(run)).model_dump()
        record = {"digest": name, "files": files, "note": note}
        if self.place.local:
            self._rename_in(run, name, record)
        else:
            self._put(run, name, record)
        return self.verify(name)

    def _put(self, run: Run, folder: str, record: Mapping[str, Any]) -> None:
        for file in record["files"]:
            self.place.put(run.directory / file, "versions", folder, file)
        self.place.replace(json.dumps(record, indent=1) + "\n", "versions", folder, RECORD)

    def _rename_in(self, run: Run, name: str, record: Mapping[str, Any]) -> None:
        """Put it there by one rename; who comes second finds the same, which is verified next."""
        final = Path(self.place.at("versions", name))
        staged, aside = (final.with_name(f".{uuid.uuid4().hex}") for _ in range(2))
        try:
            self._put(run, staged.name, record)
            with contextlib.suppress(OSError):
                final.rename(aside)  # a damaged one
            with contextlib.suppress(OSError):
                staged.rename(final)
        finally:
            for left in (staged, aside):
                shutil.rmtree(left, ignore_errors=True)

    def names(self) -> list[str]:
        """The digests of all versions, sound or not."""
        return [name for name in self.place.names("versions") if DIGEST.fullmatch(name)]

    def read(self, name: str) -> Version:
        """A version by its record and its manifest; its weights are not looked at.

        Raises: BadVersion where it was never finished, or one of the two is not what was added.
        """
        record, manifest = (self.place.read("versions", name, x) for x in (RECORD, MANIFEST))
        if record is None or manifest is None:
            raise BadVersion(name, "it was never finished")
        try:
            found = json.loads(record)
            files, note = dict(found["files"]), Note.model_validate(found["note"])
            if not found["digest"] == name == digest(files) or not all(map(_known, files)):
                raise ValueError("its list of files was altered")
            if hashlib.sha256(manifest).hexdigest() != files[MANIFEST]:
                raise ValueError("its manifest was altered")
            return Version(name, files, dict(json.loads(manifest)), note)
        except (ValueError, LookupError, TypeError) as error:
            raise BadVersion(name, str(error).splitlines()[0].rstrip(".")) from None

    def verify(self, name: str) -> Version:
        """A version whose every file is what was added.

        Raises: BadVersion naming the first file that is not.
        """
        found = self.read(name)
        for file, sha256 in found.files.items():
            if self.place.sha256("versions", name, file) != sha256:
                raise BadVersion(name, f"{file} is not what was added")
        return found

    def fetch(self, version: Version, cache: Path) -> Path:
        """The folder of a version in a cache of this machine, fetched if need be, and verified.

        Raises: BadVersion where what came is not what was added; nothing of it is left behind.
        """
        folder = cache / version.digest
        if _hashes(folder) == version.files:
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
            staged = Path(temporary) / "version"
            for file, sha256 in version.files.items():
                here = inside(staged, file)
                self.place.get(here, "versions", version.digest, file)
                if not here.is_file() or file_sha256(here) != sha256:
                    raise BadVersion(version.digest, f"{file} is not what was added")
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            with contextlib.suppress(OSError):  # another process was there first, with the same
                staged.rename(folder)
        return folder


def cache_home() -> Path:
    """Where this machine keeps the versions that it fetched."""
    return runs_home() / ".versions"


def _known(name: str) -> bool:
    """Whether a file may be part of a version: no pickle, and nothing that leads elsewhere."""
    match = FILE.fullmatch(name)
    named = match and any(fnmatchcase(match[2], pattern) for pattern in UPLOADED)
    return name in (MANIFEST, LOG) or bool(named)


def files_of(run: Run) -> dict[str, str]:
    """What a version takes of a run, and its hashes.

    Raises: GemmateError for files that are no part of a run, or where none holds weights.
    """
    weights = run.directory / ("model" if run.experiment.method == "full" else "adapter")
    there = [p.relative_to(run.directory).as_posix() for p in weights.rglob("*") if not p.is_dir()]
    if odd := [name for name in there if not _known(name)]:
        raise GemmateError(f"{run.directory}/{odd[0]} is no part of a run. Take it out of there.")
    if not any(name.endswith(".safetensors") for name in there):
        raise GemmateError(f"{run.directory} holds no weights. Name a finished run.")
    log = [LOG] * (run.directory / LOG).is_file()
    names = sorted((*there, *log, MANIFEST))
    return {name: file_sha256(inside(run.directory, name)) for name in names}


def _measured(run: Run) -> dict[str, Measured]:
    """The metrics that `gemmate evaluate` left in a run's folder; none where it was not run."""
    file = run.directory / "metrics.json"
    try:
        found = json.loads(file.read_text("utf-8"))["metrics"] if file.is_file() else {}
        return {name: Measured.model_validate(metric) for name, metric in found.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        said = f"{file} is not what gemmate evaluate wrote"
        raise GemmateError(f"{said}. Evaluate the run again.") from None


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder; none where there is no folder."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
