"""Checkpoints that are whole, or do not exist: sealed, verified, chosen, kept and removed.

A trainer saves into a staging folder; `seal` lists every file with size and SHA-256 in a manifest,
writes that last, forces all of it to the disk, and renames the folder. So a kill at any moment
leaves the checkpoints before it as they were.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemmate_lib.config import GemmateError
from gemmate_lib.manifest import file_sha256
from gemmate_lib.settings import digest
from gemmate_lib.trust import only_tensors

MANIFEST = "checkpoint.json"
PREFIX = "checkpoint-"  # the number of optimizer steps follows, as the trainer has it
# The trainer pickles its arguments; nobody reads them, and a pickle is not to be loaded.
UNWANTED = ("training_args.bin", "README.md")
PICKLED = (".pt", ".pth")  # of the states that the trainer reads; nothing but tensors may be there


class BadCheckpoint(GemmateError):
    """A folder that is no checkpoint, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its folder, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest["step"]

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged and measured at this step."""
        return self.manifest["metrics"]

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the result of the run, by key."""
        return self.manifest["identity"]


def name_of(step: int) -> str:
    """The folder of a step's checkpoint, as the trainer names it."""
    return f"{PREFIX}{step}"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells; None where it is no checkpoint's name."""
    number = name.removeprefix(PREFIX)
    return int(number) if number != name and number.isdecimal() else None


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    if os.name == "nt" and path.is_dir():  # Windows cannot, and need not
        return
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(staged: Path, folder: Path, record: Mapping[str, Any]) -> Checkpoint:
    """Turn what a trainer saved in `staged` into the checkpoint of its step in `folder`.

    record: step, metrics, identity, optimizer (whether it can be resumed from).
    """
    for name in UNWANTED:
        (staged / name).unlink(missing_ok=True)
    files = sorted(file for file in staged.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # the disk and the hash, side by side
        synced = pool.map(_sync, files)
        hashes = list(pool.map(file_sha256, files))
        list(synced)  # raises what failed
    names = [file.relative_to(staged).as_posix() for file in files]
    sizes = [file.stat().st_size for file in files]
    listed = {n: [size, sha256] for n, size, sha256 in zip(names, sizes, hashes, strict=True)}
    manifest: dict[str, Any] = {**record, "files": listed}
    manifest["sha256"] = digest(manifest)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    _sync(staged / MANIFEST)
    for inner in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
        _sync(inner)
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / name_of(manifest["step"]), folder / f".replaced-{manifest['step']}"
    if final.exists():  # of a run that was resumed from an earlier step
        final.rename(aside)
    staged.rename(final)
    _sync(folder)
    shutil.rmtree(aside, ignore_errors=True)
    return Checkpoint(final, manifest)


def remove(path: Path) -> None:
    """Delete a checkpoint; its manifest first, so that no half of it counts as one."""
    if path.is_symlink():  # what it points to is not ours
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """A checkpoint by its manifest alone; its files are not looked at.

    Raises: BadCheckpoint where the manifest is missing or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        if manifest.pop("sha256") != digest(manifest):
            raise ValueError("altered")
        return Checkpoint(path, {**manifest, "step": int(manifest["step"])})
    except FileNotFoundError:
        raise BadCheckpoint(f"{path.name} has no manifest: it was never finished") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{path.name}: the manifest is damaged ({error})") from None


def verify(path: Path) -> Checkpoint:
    """A checkpoint whose every file is what was saved.

    Raises: BadCheckpoint naming the first file that is missing, cut or altered, or that could run
        code when it is read, whatever the manifest says of it.
    """
    found = read(path)
    listed = found.manifest["files"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if foreign := sorted(there - {*listed, MANIFEST}):
        raise BadCheckpoint(f"{path.name}: {foreign[0]} was put there by someone else")
    for name, (size, sha256) in listed.items():
        if name not in there:
            raise BadCheckpoint(f"{path.name}: {name} is missing")
        file = path / name
        if file.stat().st_size != size:
            there_are = f"{file.stat().st_size:,} bytes, not {size:,}"
            raise BadCheckpoint(f"{path.name}: {name} has {there_are}")
        if file_sha256(file) != sha256:
            raise BadCheckpoint(f"{path.name}: {name} is not what was saved")
    _refuse_code(path, there)
    return found


def _refuse_code(path: Path, names: set[str]) -> None:
    for name in sorted(names):
        if name.endswith(".bin"):
            raise BadCheckpoint(f"{path.name}: {name} is a pickle, and those are not read")
        if name.endswith(PICKLED) and "/" not in name and not only_tensors(path / name):
            raise BadCheckpoint(f"{path.name}: {name} holds more than tensors")


def paths(folder: Path) -> list[Path]:
    """The folders named as checkpoints, the latest step first, sound or not."""
    named = ((step_of(path.name), path) for path in folder.glob(f"{PREFIX}*"))
    found = [(step, path) for step, path in named if step is not None]
    return [path for _, path in sorted(found, reverse=True)]


def sealed(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints with a sound manifest, the latest first; their files are not looked at."""
    for path in paths(folder):
        try:
            yield read(path)
        except BadCheckpoint:
            continue


Mode = Literal["min", "max"]


def by_metric(found: Iterator[Checkpoint], metric: str, mode: Mode) -> list[Checkpoint]:
    """Those that measured the metric, the best first; of equals the earlier step."""
    sign = 1 if mode == "min" else -1
    measured = [each for each in found if metric in each.metrics]
    return sorted(measured, key=lambda each: (sign * each.metrics[metric], each.step))


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, and those passed over: each name with its fault."""

    checkpoint: Checkpoint
    skipped: list[str]


def choose(folder: Path, option: str, *, metric: str, mode: Mode) -> Choice:
    """The `last` or `best` checkpoint of a folder that verifies, or the one at a path.

    Raises: GemmateError where there is none; BadCheckpoint for a path that does not verify.
    """
    if option not in ("last", "best"):
        try:
            return Choice(verify(Path(option)), [])
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{error}. Name another, or use --resume last.") from error
    candidates = paths(folder)
    if option == "best":
        candidates = [each.path for each in by_metric(sealed(folder), metric, mode)]
    skipped: list[str] = []
    for path in candidates:
        try:
            return Choice(verify(path), skipped)
        except BadCheckpoint as error:
            skipped.append(str(error))
    why = f": {'; '.join(skipped)}" if skipped else ""
    raise GemmateError(f"No checkpoint in {folder} can be resumed from{why}. Start the run again.")


def prune(
    folder: Path, *, keep_last_n: int, keep_best_n: int, metric: str, mode: Mode
) -> list[Path]:
    """Remove what is neither among the last n nor among the best n; the paths removed."""
    found = list(sealed(folder))
    best = by_metric(iter(found), metric, mode)[:keep_best_n]
    kept = {each.path for each in (*found[:keep_last_n], *best)}
    gone = [each.path for each in found if each.path not in kept]
    for path in gone:
        remove(path)
    return gone


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two identities, with both values."""
    keys = sorted({*then, *now})
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
