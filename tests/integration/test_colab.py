"""A notebook in Colab, by a stand-in for Colab's own package: token, secret, install cell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "tests/notebooks/colab"
TOKEN = "hf_" + "standin" * 5
ASK = """
from gemmate_lib import auth, machine
machine.quiet()
state = auth.find_token()
again = auth.find_token()
assert again == state
print("source:", state.source, "problem:", state.problem)
report = auth.check_access("google/gemma-2b")
print("asked with:", report.problem)
print("remedy:", auth.remedy("google/gemma-2b", state.problem) if state.problem else "none")
"""


def environment(answer: str) -> dict[str, str]:
    """What a kernel needs to find itself in Colab."""
    gone = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VERTEX_PRODUCT")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    path = os.pathsep.join([str(STANDIN), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return kept | {
        "PYTHONPATH": path, "IPYTHONDIR": str(STANDIN / "ipython"), "STANDIN_COLAB": answer,
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN_PATH": os.devnull,
        "OMP_NUM_THREADS": "1", "GEMMATE_PROFILE": "tiny",
    }  # fmt: skip


def notebook(tmp_path: Path, source: str) -> Path:
    """A notebook of one cell."""
    import nbformat.v4 as v4

    path = tmp_path / "ask.ipynb"
    path.write_text(json.dumps(v4.new_notebook(cells=[v4.new_code_cell(source)])))
    return path


def run(path: Path, answer: str) -> str:
    """Run a notebook as Colab would and return what its cells printed."""
    out = path.with_name("out.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", path, out]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(answer), cwd=path.parent
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(out.read_text("utf-8"))["cells"]
    texts = ["".join(o.get("text", "")) for c in cells for o in c.get("outputs", ())]
    return "".join(texts)


@pytest.mark.parametrize(
    ("answer", "source", "problem", "remedy"),
    [
        (TOKEN, "Colab secret", None, "none"),
        ("missing", None, "missing", "as the Colab secret HF_TOKEN"),
        ("refused", None, "not-granted", "Grant this notebook access"),
        ("timeout", None, "no-answer", "Restart the session"),
    ],
)
def test_the_secret_of_colab(
    tmp_path: Path, answer: str, source: str | None, problem: str | None, remedy: str
) -> None:
    told = run(notebook(tmp_path, ASK), answer)
    assert f"source: {source} problem: {problem}" in told
    assert remedy in told
    assert TOKEN not in told and "Warning" not in told
