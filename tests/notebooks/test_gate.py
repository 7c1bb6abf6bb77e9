"""Every notebook is in order, and every fault that is planted in one is reported by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gate
import pytest
import stamp

SOURCE = stamp.ROOT / "notebooks/03_lora_sft_english_quotes.ipynb"
Notebook = dict[str, Any]


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A copy to spoil."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return Path(shutil.copy(SOURCE, folder))


def code(notebook: Notebook) -> list[Notebook]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def printed(notebook: Notebook) -> Notebook:
    """The first output that is a text."""
    return next(o for c in code(notebook) for o in c["outputs"] if o["output_type"] == "stream")


def shown(notebook: Notebook) -> Notebook:
    """The first output that is an image."""
    outputs = (o for c in code(notebook) for o in c["outputs"])
    return next(o for o in outputs if "image/png" in o.get("data", {}))


def strip(notebook: Notebook) -> None:
    for cell in code(notebook):
        cell["execution_count"], cell["outputs"] = None, []


def swap(notebook: Notebook) -> None:
    first, second = code(notebook)[:2]
    first["execution_count"], second["execution_count"] = 2, 1


def compare_nothing(notebook: Notebook) -> None:
    for cell in code(notebook):
        cell["metadata"].setdefault("tags", []).append("nbval-ignore-output")


def fail(notebook: Notebook) -> None:
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    code(notebook)[3]["outputs"] = [error]


def widget(notebook: Notebook) -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    display = {"output_type": "display_data", "data": view, "metadata": {}}
    code(notebook)[4]["outputs"] = [display]


def append(text: str) -> Callable[[Notebook], None]:
    """Add a text to what a cell printed."""
    return lambda notebook: printed(notebook)["text"].append(text)


def write(text: str) -> Callable[[Notebook], None]:
    """Add a Markdown cell."""
    cell = {"cell_type": "markdown", "id": "planted", "metadata": {}, "source": [text]}
    return lambda notebook: notebook["cells"].append(cell)


def lengthen(notebook: Notebook) -> None:
    code(notebook)[3]["source"] = ["x = 1\n"] * 26


def move(notebook: Notebook) -> None:
    for cell in notebook["cells"]:
        cell["source"] = [line.replace("blob/main", "blob/other") for line in cell["source"]]


def reinstall(notebook: Notebook) -> None:
    cell = next(c for c in code(notebook) if stamp.COLAB in "".join(c["source"]))
    cell["source"].append("\n    %pip install -U torch")


PLANTED: dict[str, tuple[Callable[[Notebook], object], str]] = {
    "stripped": (strip, "never executed"),
    "out of order": (swap, "code cell 1 has the execution count 2"),
    "nothing compared": (compare_nothing, "no cell has an output that is compared"),
    "error": (fail, "ends in an error: ValueError"),
    "widget": (widget, "displays a widget"),
    "widget state": (lambda n: n["metadata"].update(widgets={}), "metadata holds widget state"),
    "token": (append("hf_" + "a" * 34), "holds what looks like a secret"),
    "key": (write("AKIA" + "ABCDEFGH" * 2), "holds what looks like a secret"),
    "path": (append("/home/someone/model"), "absolute path /home/someone"),
    "no alt text": (lambda n: shown(n)["metadata"].clear(), "image without alt text"),
    "no alt in Markdown": (write("![](a.png)"), "image without alt text"),
    "no alt in HTML": (write('<img src="a.png">'), "image without alt text"),
    "no parameters": (
        lambda n: [c["metadata"].pop("tags", None) for c in n["cells"]],
        "0 cells are tagged `parameters`",
    ),
    "long cell": (lengthen, "has 26 lines of code"),
    "badge": (move, "badge does not point to itself"),
    "install cell": (reinstall, "install cell is not as `make stamp` writes it"),
    "size": (write("a" * 500_000), "bytes, more than 500,000"),
}


def test_every_notebook_is_in_order() -> None:
    notebooks = sorted((stamp.ROOT / "notebooks").rglob("*.ipynb"))
    assert len(notebooks) >= 14
    assert {path.name: gate.faults(path) for path in notebooks if gate.faults(path)} == {}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_reported(fault: str, notebook: Path) -> None:
    assert gate.faults(notebook) == []
    plant, message = PLANTED[fault]
    content = stamp.read(notebook)
    plant(content)
    stamp.write(notebook, content)
    assert any(message in found for found in gate.faults(notebook)), gate.faults(notebook)


def test_a_broken_file_and_a_wrong_name_are_reported(notebook: Path) -> None:
    renamed = notebook.rename(notebook.with_name("LoRA.ipynb"))
    assert "it is not named as 03_some_words.ipynb" in gate.faults(renamed)
    renamed.write_text("{")
    assert gate.faults(renamed) == ["it is no valid notebook: NotJSONError"]


def test_the_command_names_the_notebook_and_fails(notebook: Path) -> None:
    content = stamp.read(notebook)
    append("hf_" + "b" * 34)(content)
    stamp.write(notebook, content)
    script = stamp.ROOT / "tests/notebooks/gate.py"
    done = subprocess.run([sys.executable, script, notebook], capture_output=True, text=True)
    assert done.returncode == 1 and f"{notebook}: cell" in done.stdout
    assert "secret" in done.stdout and "bbbb" not in done.stdout


def test_a_fork_stamps_its_own_address(notebook: Path) -> None:
    url = "https://github.com/someone/fork"
    assert stamp.stamp(notebook, url) and not stamp.stamp(notebook, url)
    text = json.dumps(stamp.read(notebook))
    assert "colab/github" not in text and f"git+{url}" in text
    assert "research.google.com/github/someone/fork/blob/main/notebooks/03_" in text
    assert stamp.repository() not in text
    assert stamp.stamp(notebook, stamp.repository()) and gate.faults(notebook) == []
