"""The record of a run: complete, atomic, and sound when read back."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gemmate_lib import manifest
from gemmate_lib.settings import Experiment, GemmateError


def write(folder: Path, **changed: Any) -> Path:
    parts: dict[str, Any] = {
        "kind": "sft",
        "experiment": Experiment(name="quotes", seed=7),
        "facts": {"threads": 1, "capability": "AVX2"},
        "data": {"tiny_quotes": "ab12"},
        "base": {"weights": None},
        "metrics": {"perplexity": 3.5},
        "timings": {"train_s": 1.25},
    }
    return manifest.write_manifest(folder, **(parts | changed))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "runs" / "one")
    record = manifest.read_manifest(path.parent)
    assert path.name == "manifest.json" and list(path.parent.iterdir()) == [path]
    assert record["config_hash"] == Experiment(name="quotes", seed=7).hash()
    assert Experiment.model_validate(record["config"]).hash() == record["config_hash"]
    assert (record["kind"], record["seed"], record["metrics"]) == ("sft", 7, {"perplexity": 3.5})
    assert record["machine"]["capability"] == "AVX2"
    assert record["packages"]["peft"] == manifest.package_versions()["peft"] is not None
    keys = {"created", "git_commit", "lock_sha256", "data", "base", "timings"}
    assert keys <= record.keys()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    write(tmp_path, metrics={"loss": numpy.float32(0.5)})
    assert manifest.read_manifest(tmp_path)["metrics"] == {"loss": 0.5}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_the_old_manifest_stays(
    tmp_path: Path, loss: float
) -> None:
    before = write(tmp_path).read_bytes()
    with pytest.raises(GemmateError, match="diverged"):
        write(tmp_path, metrics={"loss": loss})
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_write_that_dies_leaves_the_old_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(tmp_path).read_bytes()
    whole = Path.write_text

    def full_disk(self: Path, text: str, **options: Any) -> int:
        whole(self, text[:50], **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, kind="other")
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_an_altered_or_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="No sound manifest"):
        manifest.read_manifest(tmp_path)
    path = write(tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"]["training"]["learning_rate"] = 0.5
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(GemmateError, match="changed after the run"):
        manifest.read_manifest(tmp_path)
    for broken in ("{", "[]", "{}"):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(GemmateError, match="No sound manifest"):
            manifest.read_manifest(tmp_path)


def test_the_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = b"quotes\n" * 10_000
    (tmp_path / "data").write_bytes(content)
    assert manifest.file_sha256(tmp_path / "data") == hashlib.sha256(content).hexdigest()


def test_versions_that_are_not_as_locked_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.13.0+cpu", "trl": "1.16.0", "peft": "0.21.2"}
    lock = tmp_path / "constraints.txt"
    lock.write_text(
        "# the lock\ntorch==2.13.0\ntrl[peft]==1.15.0  # via us\npeft==0.21.2\nabsent==1.0\n"
        "peft==0.1 ; python_version < '3'\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(manifest, "lock_file", lambda: lock)
    monkeypatch.setattr(manifest, "_installed", versions.get)
    assert manifest.versions_against_lock() == [("trl", "1.15.0", "1.16.0")]
    monkeypatch.setattr(manifest, "lock_file", lambda: None)
    assert manifest.versions_against_lock() == []


def test_the_lock_is_found_in_the_checkout_and_then_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "gemmate_lib" / "assets" / "constraints.txt"
    shipped.parent.mkdir(parents=True)
    monkeypatch.setattr(manifest, "_HERE", tmp_path / "gemmate_lib")
    assert manifest.lock_file() is None
    shipped.touch()
    assert manifest.lock_file() == shipped
    (tmp_path / "constraints.txt").touch()
    assert manifest.lock_file() == tmp_path / "constraints.txt"


def test_the_commit_is_that_of_the_checkout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "gemmate_lib"
    package.mkdir()
    (package / "one.py").write_text("1", encoding="utf-8")
    monkeypatch.setattr(manifest, "_HERE", package)
    assert manifest.git_commit() is None
    git("init")
    assert manifest.git_commit() is None  # nothing committed yet
    git("add", ".")
    git("commit", "-m", "one")
    assert manifest.git_commit() == git("rev-parse", "HEAD")
    (package / "one.py").write_text("2", encoding="utf-8")
    assert manifest.git_commit() == git("rev-parse", "HEAD") + "-dirty"
    # Installed below somebody else's project: its commit is not ours.
    inner = package / "site-packages" / "gemmate_lib"
    inner.mkdir(parents=True)
    monkeypatch.setattr(manifest, "_HERE", inner)
    assert manifest.git_commit() is None
