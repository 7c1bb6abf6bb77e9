"""The record of a run: what went in, on which machine, and what came out."""

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gemmate_lib.settings import Experiment, GemmateError, digest

_HUB = ("accelerate", "datasets", "huggingface-hub", "peft", "transformers", "trl")
PACKAGES = (*_HUB, "bitsandbytes", "torch")
_HERE = Path(__file__).parent


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """The versions that decide a run's result; None where a package is not installed."""
    return {name: _installed(name) for name in PACKAGES}


def lock_file() -> Path | None:
    """constraints.txt: the checkout's own, else the one shipped with the package."""
    places = (_HERE.parent / "constraints.txt", _HERE / "assets" / "constraints.txt")
    return next((place for place in places if place.is_file()), None)


def versions_against_lock() -> list[tuple[str, str, str]]:
    """The installed packages not as locked (+cpu aside): (package, locked, installed)."""
    from packaging.requirements import Requirement

    lock = lock_file()
    text = lock.read_text(encoding="utf-8") if lock else ""
    pins = [Requirement(line) for line in re.findall(r"^\w[^\s=]*==[^#\\\n]+", text, re.MULTILINE)]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    rows = [(pin.name, str(pin.specifier)[2:], _installed(pin.name) or "") for pin in here]
    return [row for row in rows if row[2] and row[2].split("+")[0] != row[1].split("+")[0]]


def git_commit() -> str | None:
    """The checkout's commit, `-dirty` where files differ; None for an installed package."""
    if not (_HERE.parent / ".git").exists():  # else git would name whatever lies around us
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return answer.stdout.strip() or None


def write_manifest(
    directory: str | Path,
    *,
    kind: str,
    experiment: Experiment,
    facts: Mapping[str, Any],
    data: Mapping[str, Any],
    base: Mapping[str, Any],
    metrics: Mapping[str, Any],
    timings: Mapping[str, Any],
    resumed: Mapping[str, Any] | None = None,
    processes: Mapping[str, Any] | None = None,
) -> Path:
    """Write manifest.json, whole or not at all. Raises: GemmateError for a number not finite."""
    lock, path = lock_file(), Path(directory) / "manifest.json"
    record = {
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": experiment.model_dump(mode="json"),
        "config_hash": experiment.hash(),
        "seed": experiment.seed,
        "git_commit": git_commit(),
        "packages": package_versions(),
        "lock_sha256": file_sha256(lock) if lock else None,
    } | {"machine": facts, "data": data, "base": base, "metrics": metrics, "timings": timings}
    record |= {"resumed": resumed} if resumed else {}
    record |= {"processes": processes} if processes else {}
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False, default=float)
    except ValueError as error:
        raise GemmateError(f"{path}: {error}. See where the run diverged.") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> Path:
    """Write a file that is whole or not there, whenever the process ends."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    return draft.replace(path)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest in a run's directory. Raises: GemmateError where it is missing or altered."""
    path = Path(directory) / "manifest.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if digest(record["config"])[:16] != record["config_hash"]:
            raise ValueError("its config was changed after the run")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise GemmateError(f"No sound manifest at {path}: {error}. Run it again.") from None
    return record
