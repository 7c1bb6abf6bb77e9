"""The wheel alone, in an empty environment and an empty directory, in a stand-in for Colab."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stamp
from printed import printed

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def call(*command: object, **options: object) -> str:
    """Run a command and return what it printed; what it said is shown where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; skipped where no package index can be reached to build it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Could not find a version that satisfies the requirement hatchling" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("gemmate_course-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the locked dependencies and the wheel."""
    folder = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    lock = ROOT / "constraints.txt"
    for package in ("torch", wheel):  # torch first and alone: a CPU build may come from elsewhere
        call(python, "-m", "pip", "install", "-q", "-c", lock, package)
    return python


@pytest.fixture
def colab(tmp_path: Path) -> dict[str, str]:
    """The environment of a kernel that finds itself in Colab, with nothing of this checkout."""
    standin = tmp_path / "standin"
    shutil.copytree(ROOT / "tests/notebooks/colab", standin)
    (tmp_path / "content").mkdir()
    kept = ("HOME", "LANG", "PATH", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONPATH": str(standin), "IPYTHONDIR": str(standin / "ipython"),
        "STANDIN_COLAB": "hf_" + "standin" * 5, "GEMMATE_PROFILE": "tiny",
    }  # fmt: skip


def test_all_seven_notebooks_run_from_the_wheel(
    python: Path, colab: dict[str, str], tmp_path: Path
) -> None:
    empty = tmp_path / "content"
    where = call(
        python, "-c", "import gemmate_lib; print(gemmate_lib.__file__)", cwd=empty, env=colab
    )
    assert str(python.parents[1]) in where
    assert "generation" in call(python.with_name("gemmate"), "bench", cwd=empty, env=colab)
    told = call(python.with_name("gemmate"), "course", "--profile", "tiny", cwd=empty, env=colab)
    records = [json.loads(f.read_text("utf-8")) for f in empty.glob("runs/course/*/manifests/*")]
    assert len(records) == 7 and all(r["ok"] for r in records), told
    written = [f.read_bytes() for f in empty.rglob("*") if f.is_file()]
    assert not any(colab["STANDIN_COLAB"].encode() in content for content in written)
    setup = printed(next(empty.glob("runs/course/*/notebooks/00_setup.ipynb")))
    assert "token: Colab secret" in setup


def test_the_install_cell_leaves_torch_alone(
    python: Path, colab: dict[str, str], tmp_path: Path
) -> None:
    """Its address is led to this checkout, so that pip clones, builds and installs for real."""
    import nbformat.v4 as v4

    call(python, "-m", "pip", "uninstall", "-q", "-y", "gemmate-course")
    versions = "from importlib.metadata import version; print(version('torch'), version('numpy'))"
    before = call(python, "-c", versions)
    cells = [v4.new_code_cell(text) for text in (stamp.install(stamp.repository()), versions)]
    content = tmp_path / "content"
    (content / "in.ipynb").write_text(json.dumps(v4.new_notebook(cells=cells)))
    led = {"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
           "GIT_CONFIG_VALUE_0": stamp.repository(),
           "GIT_CONFIG_KEY_1": "safe.directory", "GIT_CONFIG_VALUE_1": "*"}  # fmt: skip
    command = (python, "-m", "papermill", "--no-progress-bar", "-k", "python3")
    call(*command, "in.ipynb", "out.ipynb", cwd=content, env=colab | led)
    out = json.loads((content / "out.ipynb").read_text("utf-8"))
    told = ["".join(o.get("text", "")) for c in out["cells"] for o in c.get("outputs", ())]
    assert told[-1] == before
    assert "as in the lock" in "".join(told)
