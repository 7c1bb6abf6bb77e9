"""The training package alone, where nothing is installed but what it declares.

The environment is a new one. Into it come, file by file, the distributions that requirements.txt
names, taken from the environment of these tests at the versions that it names: so it is the very
one that pip would make from the lock, without fetching a gigabyte. What the package uses and does
not declare is not there.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gemmate_lib.config import Experiment
from gemmate_lib.packaged import build_package
from gemmate_lib.transfer import download, upload

pytestmark = pytest.mark.slow
# What torch's own build for GPUs asks for; here it may be the one for CPUs, which asks for nothing.
BUILD = re.compile(r"(nvidia|cuda|triton)")


def call(*command: object, **options: object) -> str:
    """Run a command and return what it printed; what it said is shown where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def lay(name: str, place: Path, here: Path) -> None:
    """Link the files of an installed distribution into another site-packages."""
    for file in metadata.files(name) or []:
        source = (here / file).resolve()
        if file.parts[0] == ".." or not source.is_file():  # a script, or bytecode
            continue
        target = place / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(source)


def also(name: str) -> set[str]:
    """The distributions of torch's own build, where this one has them."""
    needed = map(Requirement, metadata.requires(name) or [])
    found = {canonicalize_name(n.name) for n in needed if BUILD.match(n.name)}
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    return found & installed | {each for n in found & installed for each in also(n)}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, unpacked as the job unpacks it."""
    folder = tmp_path_factory.mktemp("package")
    with tarfile.open(build_package(folder / "package.tar.gz")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def python(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with what requirements.txt declares, and nothing besides."""
    folder = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    place = next(folder.glob("lib/python*/site-packages"))
    here = Path(str(metadata.distribution("torch").locate_file("")))
    lines = (package / "requirements.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate():
            installed = metadata.version(pin.name).split("+")[0]
            assert pin.specifier.contains(installed), f"{pin.name}: {installed} is not the lock's"
            lay(pin.name, place, here)
    for name in also("torch"):
        lay(name, place, here)
    return folder / "bin/python"


def test_what_is_declared_is_complete(python: Path) -> None:
    told = call(sys.executable, "-m", "pip", "--python", python, "check")
    assert "No broken requirements found" in told
    missing = "import importlib.util as u; print([n for n in ('optuna', 'kfp', 'pytest', 'gemmate"
    assert call(python, "-I", "-c", missing + "_lib') if u.find_spec(n)])").strip() == "[]"


def test_it_trains_there(
    package: Path, python: Path, experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    made = experiment(max_steps=3, eval_every=0, **{"dataset.limit": 40, "max_new_tokens": 4})
    (tmp_path / "input").mkdir()
    (tmp_path / "input/experiment.json").write_text(made.model_dump_json(), "utf-8")
    upload(tmp_path / "input", f"file://{tmp_path}/bucket/input")
    home = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    words = ["--experiment", f"file://{tmp_path}/bucket/input"]
    words += ["--out", f"file://{tmp_path}/bucket/run"]
    (tmp_path / "job").mkdir()
    told = call(python, package / "task.py", *words, cwd=tmp_path,
                env=home | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
                            "GEMMATE_WORK": str(tmp_path / "job")})  # fmt: skip
    assert "quote_perplexity" in told and "the run lies at" in told
    run = download(f"file://{tmp_path}/bucket/run", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    assert manifest["metrics"]["steps"] == 3 and manifest["lock_sha256"]


def test_the_same_sources_make_the_same_package(tmp_path: Path) -> None:
    first, second = (build_package(tmp_path / f"{n}.tar.gz").read_bytes() for n in "ab")
    assert first == second
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        names = archive.getnames()
    assert {
        "task.py",
        "requirements.txt",
        "gemmate_lib/data_cards/tiny_quotes.md",
        "gemmate_lib/assets/constraints.txt",
        "gemmate_lib/sft.py",
    } <= set(names)
    assert not [n for n in names if "__pycache__" in n or n.startswith(("/", ".."))]
