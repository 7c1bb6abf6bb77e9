"""Write badge and install cell into the notebooks, from the repository's URL in pyproject.toml.

    python tests/notebooks/stamp.py [NOTEBOOK ...]

Run by `make stamp` after the project moved, so that a fork's badges open the fork's notebooks.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
COLAB = "google.colab"  # a cell with it is the install cell
INSTALL = """\
import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("gemmate_lib") is None:
    from importlib.metadata import version
    from pathlib import Path

    keep = [f"{name}=={version(name)}" for name in ("torch", "numpy")]
    Path("keep.txt").write_text("\\n".join(keep))  # Colab's own builds stay
    %pip install -q -c keep.txt "gemmate-course{extras} @ git+{url}"
    from gemmate_lib.doctor import version_lines

    print(*version_lines(), sep="\\n")"""


# What an elective needs besides, by its number: extras of pyproject.toml.
EXTRAS = {"10": "[search]", "13": "[serve]", "14": "[cloud]"}


def repository() -> str:
    """The URL of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return str(project["urls"]["Repository"])


def badge(notebook: Path, url: str) -> str:
    """The badge that opens this very notebook in Colab."""
    parts = notebook.resolve().parts  # from the innermost `notebooks`, wherever the checkout is
    place = "/".join(parts[len(parts) - 1 - parts[::-1].index("notebooks") :])
    target = url.removeprefix("https://github.com/")
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    page = f"https://colab.research.google.com/github/{target}/blob/main/{place}"
    return f"[![Open in Colab]({picture})]({page})"


def install(url: str, notebook: Path = Path()) -> str:
    """The source of a notebook's install cell, with the extras that it needs."""
    extras = EXTRAS.get(notebook.name[:2], "")
    return INSTALL.replace("{url}", url).replace("{extras}", extras)


def read(notebook: Path) -> dict[str, Any]:
    """The notebook as it is on disk."""
    return json.loads(notebook.read_text("utf-8"))


def write(notebook: Path, content: dict[str, Any]) -> None:
    """Write a notebook as Jupyter writes it."""
    text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
    notebook.write_text(text + "\n", "utf-8")


def stamp(notebook: Path, url: str) -> bool:
    """Write badge and install cell; return whether anything changed. Times are taken out too."""
    content = read(notebook)
    before = json.dumps(content, sort_keys=True)
    for cell in content["cells"]:
        cell["metadata"].pop("execution", None)
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # As a function, for the badge is text and no pattern.
            source = BADGE.sub(lambda _: badge(notebook, url), source)
        elif COLAB in source:
            source = install(url, notebook)
        cell["source"] = source.splitlines(keepends=True)
    write(notebook, content)
    return json.dumps(content, sort_keys=True) != before


def main(names: list[str]) -> None:
    """Stamp the notebooks named, or all."""
    url = repository()
    notebooks = [Path(name) for name in names] or sorted((ROOT / "notebooks").rglob("*.ipynb"))
    for notebook in notebooks:
        if stamp(notebook, url):
            print(f"stamped {notebook.resolve().relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
