"""What a notebook printed."""

from pathlib import Path

import nbformat


def printed(notebook: Path) -> str:
    """All that its cells wrote to stdout and stderr: a busy kernel splits one line into pieces."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [each for cell in cells for each in cell.get("outputs", [])]
    return "".join(each.text for each in outputs if each.output_type == "stream")
