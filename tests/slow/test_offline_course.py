"""The whole course, kernels included, where there is no network."""

import json
import subprocess
import sys
from pathlib import Path

import offline
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.mark.skipif(not offline.possible(), reason="this system forbids network namespaces")
def test_the_course_runs_without_a_network(tmp_path: Path) -> None:
    out = tmp_path / "course"
    done = subprocess.run(
        [sys.executable, ROOT / "tests/offline.py", sys.executable, "-m", "gemmate_lib", "course",
         "--profile", "tiny", "--out", out],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(file.read_text("utf-8")) for file in (out / "manifests").glob("*.json")]
    assert len(records) >= 7
    assert (out / "report.html").is_file() and list((out / "figures").rglob("*.png"))
