"""Refuse a notebook that nbval could not check, or that is not fit to be read.

    python tests/notebooks/gate.py [NOTEBOOK ...]

nbval passes a notebook without outputs, and compares nothing where there is nothing: so what it
needs is required here, and what a reader needs as well. Each fault is a line that names the
notebook and the cell; the exit status is 1 if there is one.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import stamp

MAX_BYTES, MAX_LINES = 500_000, 25
NAME = re.compile(r"\d\d_[a-z0-9]+(_[a-z0-9]+)*\.ipynb")
# Tags of nbval under which the output of a cell is not compared.
UNCOMPARED = {"nbval-ignore-output", "nbval-skip", "raises-exception"}
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|AIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
ABSOLUTE = re.compile(
    r"(?<![\w./~:-])/(?:home|root|Users|tmp|var|opt|usr|mnt|content|work|private)/[\w.-]+"
    r"|\b[A-Z]:\\+(?:Users|Program|Windows)"
)
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\([^)]*\)|<img\b(?P<tag>[^>]*)>")
Cell = dict[str, Any]


def texts(cell: Cell) -> Iterator[str]:
    """All text of a cell: its source, and what it printed, displayed or raised."""
    yield cell["source"]
    for output in cell.get("outputs", ()):
        yield str(output.get("text", ""))
        yield "\n".join(output.get("traceback", ()))
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield str(data)


def order(code: list[Cell]) -> Iterator[str]:
    """Faults in the execution counts of the code cells that are not empty."""
    counts = [cell["execution_count"] for cell in code]
    if not any(counts):
        yield "it was never executed: no cell has an execution count"
    elif counts != list(range(1, len(counts) + 1)):
        wrong = next(i for i, count in enumerate(counts) if count != i + 1)
        yield f"code cell {wrong + 1} has the execution count {counts[wrong]}: run it from the top"


def compared(code: list[Cell]) -> Iterator[str]:
    """A fault where nbval would compare nothing."""
    kept = (c for c in code if not UNCOMPARED & set(c["metadata"].get("tags", ())))
    if not any("text" in output or "data" in output for c in kept for output in c["outputs"]):
        yield "no cell has an output that is compared"


def widgets(notebook: Cell, code: list[Cell]) -> Iterator[str]:
    """Faults of widget state, which GitHub refuses to show and nbval cannot compare."""
    if "widgets" in notebook["metadata"]:
        yield "its metadata holds widget state"
    for number, cell in enumerate(code, start=1):
        kinds = [kind for output in cell["outputs"] for kind in output.get("data", ())]
        if any("widget" in kind for kind in kinds):
            yield f"code cell {number} displays a widget"


def outputs(code: list[Cell]) -> Iterator[str]:
    """Faults in what the cells gave: errors, and images that a screen reader cannot tell of."""
    for number, cell in enumerate(code, start=1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"code cell {number} ends in an error: {output['ename']}"
            for kind in output.get("data", ()):
                meta = output["metadata"].get(kind, {})
                if kind.startswith("image/") and not str(meta.get("alt", "")).strip():
                    yield f"code cell {number} shows an image without alt text"


def sources(cells: list[Cell]) -> Iterator[str]:
    """Faults in any cell: secrets, absolute paths, long code, images without alt text."""
    for number, cell in enumerate(cells, start=1):
        text = "\n".join(texts(cell))
        if SECRET.search(text):
            yield f"cell {number} holds what looks like a secret"
        if found := ABSOLUTE.search(text):
            yield f"cell {number} holds the absolute path {found[0]}"
        lines = len(cell["source"].splitlines())
        if cell["cell_type"] == "code" and lines > MAX_LINES:
            yield f"cell {number} has {lines} lines of code, more than {MAX_LINES}"
        for image in IMAGE.finditer(cell["source"]) if cell["cell_type"] == "markdown" else ():
            tag = re.search(r"alt\s*=\s*[\"']([^\"']*)", image["tag"] or "")
            if not (image["alt"] or (tag[1] if tag else "")).strip():
                yield f"cell {number} shows an image without alt text"


def stamped(path: Path, cells: list[Cell]) -> Iterator[str]:
    """Faults in what `make stamp` writes, and in the cell that papermill needs."""
    url = stamp.repository()
    badges = [b for c in cells if c["cell_type"] == "markdown" for b in _badges(c)]
    if badges != [stamp.badge(path, url)]:
        yield "its Colab badge does not point to itself: run make stamp"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if [c["source"] for c in code if stamp.COLAB in c["source"]] != [stamp.install(url, path)]:
        yield "its install cell is not as `make stamp` writes it"
    if (count := sum("parameters" in c["metadata"].get("tags", ()) for c in code)) != 1:
        yield f"{count} cells are tagged `parameters`, not one"


def _badges(cell: Cell) -> list[str]:
    return [match[0] for match in stamp.BADGE.finditer(cell["source"])]


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook; nothing for one that is in order."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds
        return [f"it is no valid notebook: {type(error).__name__}"]
    cells = notebook["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and c["source"].strip()]
    found = [*order(code), *compared(code), *widgets(notebook, code), *outputs(code)]
    found += [*sources(cells), *stamped(path, cells)]
    if (size := path.stat().st_size) > MAX_BYTES:
        found.append(f"it has {size:,} bytes, more than {MAX_BYTES:,}")
    if not NAME.fullmatch(path.name):
        found.append("it is not named as 03_some_words.ipynb")
    return found


def main(names: list[str]) -> int:
    """Check the notebooks named, or all; print each fault."""
    everything = sorted((stamp.ROOT / "notebooks").rglob("[!.]*.ipynb"))
    notebooks = [Path(name) for name in names] or everything
    found = [f"{path}: {fault}" for path in notebooks for fault in faults(path)]
    print("\n".join(found) or f"{len(notebooks)} notebooks in order")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
