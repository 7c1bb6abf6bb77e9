"""nbval, as `make notebooks` calls it, reports a changed output by notebook and cell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gate
import stamp

SANITIZE = stamp.ROOT / "tests/notebooks/sanitize.cfg"


def nbval(notebook: Path) -> subprocess.CompletedProcess[str]:
    """Compare a notebook with its stored outputs."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-sanitize-with", SANITIZE,
               "--nbval-cell-timeout=300", "-W", "ignore", "-p", "no:cacheprovider", "-q",
               "--rootdir", notebook.parent, notebook]  # fmt: skip
    env = os.environ | {"GEMMATE_PROFILE": "tiny", "PYTHONPATH": str(stamp.ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=notebook.parent, env=env)


def test_a_changed_output_is_reported_by_name(tmp_path: Path) -> None:
    """One digit of one stored output, in a notebook of the course."""
    (tmp_path / "notebooks").mkdir()
    source = stamp.ROOT / "notebooks/00_setup.ipynb"
    notebook = Path(shutil.copy(source, tmp_path / "notebooks"))
    text = notebook.read_text("utf-8")
    assert text.count("1.39 million parameters, 6 layers") == 1
    notebook.write_text(text.replace("1.39 million parameters, 6", "1.93 million parameters, 6"))
    done = nbval(notebook)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "00_setup.ipynb" in done.stdout and "1.93 million" in done.stdout
    assert "1 failed" in done.stdout
    assert gate.faults(notebook) == []  # the gate sees nothing: it takes a run to know


def test_what_nbval_lets_pass_the_gate_refuses(tmp_path: Path) -> None:
    """A notebook without its outputs: nothing is compared, so nothing differs."""
    (tmp_path / "notebooks").mkdir()
    notebook = Path(shutil.copy(stamp.ROOT / "notebooks/00_setup.ipynb", tmp_path / "notebooks"))
    content = stamp.read(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"], cell["outputs"] = None, []
            cell["source"] = [] if cell["metadata"].get("tags") != ["parameters"] else cell["source"]
    stamp.write(notebook, content)
    assert nbval(notebook).returncode == 0
    assert any("never executed" in fault for fault in gate.faults(notebook))
