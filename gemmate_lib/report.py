"""One self-contained HTML page of a run of the course: what ran, what came out, with what.

No text in it is trusted: a model may write anything, a script included. What the template
prints is escaped, what notebooks render is cleaned, and the page itself forbids scripts and
every request.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.config import GemmateError
from gemmate_lib.manifest import read_manifest
from gemmate_lib.stats import Interval
from gemmate_lib.trust import inside

if TYPE_CHECKING:
    from nbformat import NotebookNode

# nbconvert's own list knows no headings and no paragraphs: it shows their tags as text.
_TAGS = "a abbr b blockquote br caption code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i"
_TAGS += " img kbd li ol p pre span strong sub summary sup table tbody td th thead tr ul"
_ATTRIBUTES = {"alt", "class", "colspan", "id", "open", "rowspan", "title"}
_LINK = re.compile(r"https?://|mailto:|#|[\w./%-]+(#|$)")


def _allowed(tag: str, name: str, value: str) -> bool:
    if (tag, name) == ("a", "href"):
        return bool(_LINK.match(value))
    if (tag, name) == ("img", "src"):  # what lies elsewhere would be a request
        return value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
    return name in _ATTRIBUTES


def clean(html: Any) -> str:
    """HTML without scripts, styles, handlers and foreign images; unknown tags become text."""
    import bleach

    text = html.decode() if isinstance(html, bytes) else str(html)
    text = re.sub(r"(?is)<style\b.*?</style>", "", text)  # pandas puts one before each table
    return bleach.clean(
        text, tags=_TAGS.split(), attributes=_allowed, protocols=[*bleach.ALLOWED_PROTOCOLS, "data"]
    )


def plain(value: Any) -> str:
    """A setting or a metric as text; 4 significant digits, an interval with its bounds."""
    if isinstance(value, Mapping):
        return str(Interval(**value))
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> text, of nested settings or metrics."""
    rows: dict[str, str] = {}
    for key, value in record.items():
        nested = isinstance(value, Mapping) and set(value) != {"value", "low", "high", "n"}
        rows |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": plain(value)}
    return rows


def _figures(notebook: "NotebookNode") -> Iterator[dict[str, str]]:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    for output in outputs:
        for kind in ("image/png", "image/jpeg"):
            if kind in output.data:
                known = output.metadata.get(kind, {}).get("alt") or output.metadata.get("alt")
                source = f"data:{kind};base64,{''.join(output.data[kind].split())}"
                yield {"source": source, "alt": known or "A figure without a description."}


def _title(notebook: "NotebookNode") -> str | None:
    lines = [
        line for c in notebook.cells if c.cell_type == "markdown" for line in c.source.split("\n")
    ]
    return next((line[2:].strip() for line in lines if line.startswith("# ")), None)


def _page(notebook: "NotebookNode", title: str, file: Path) -> None:
    from markupsafe import Markup
    from nbconvert import HTMLExporter

    # `basic` is the notebook alone: no scripts from elsewhere, and a figure keeps its alt text.
    exporter = HTMLExporter(
        template_name="basic", sanitize_html=True, filters={"clean_html": clean}
    )
    body, _ = exporter.from_notebook_node(notebook)
    # All of it once more: nbconvert 7.17 cleans what a cell shows, and puts an image's width,
    # without quotes, and frames around it.
    file.write_text(render_page(title=title, body=Markup(clean(body))), encoding="utf-8")


def _notebook(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the report shows of a notebook, from its manifest and its executed copy."""
    import nbformat

    name = str(record["notebook"])
    entry = record | {"title": name, "figures": [], "page": None}
    entry["parameters"] = flat(record["parameters"])
    executed = inside(folder, f"notebooks/{Path(name).name}.ipynb")
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (OSError, ValueError):  # skipped, or killed while it was written
        return entry
    entry |= {"title": _title(notebook) or name, "figures": list(_figures(notebook))}
    page = f"notebooks/{executed.stem}.html"
    _page(notebook, entry["title"], inside(folder, page))
    return entry | {"page": page}


def _run(folder: Path) -> dict[str, Any]:
    """What the report shows of a run, from its manifest."""
    try:
        record = read_manifest(folder)
    except GemmateError as error:
        return {"name": folder.name, "problem": str(error)}
    parts = {key: flat(record.get(key) or {}) for key in ("metrics", "timings", "machine", "data")}
    about = {key: plain(record.get(key)) for key in ("kind", "created", "seed", "git_commit")}
    return {"name": folder.name, "settings": flat(record["config"])} | about | parts


def render_page(template: str = "report.html.j2", /, **content: Any) -> str:
    """Render one of our templates with the style that all pages share; all else is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    assets = resources.files("gemmate_lib") / "assets"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((assets / "report.css").read_text("utf-8"))
    page = environment.from_string((assets / template).read_text("utf-8"))
    return page.render(style=style, **content)


def write_report(directory: str | Path) -> Path:
    """Write report.html into the folder of a run of the course, or into a folder of runs.

    The executed notebooks are written beside themselves as HTML.
    Raises: GemmateError where the folder has neither notebooks nor runs.
    """
    folder = Path(directory)
    manifests = sorted((folder / "manifests").glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in manifests]
    runs = sorted((folder / "runs" if manifests else folder).glob("*/manifest.json"))
    if not manifests and not runs:
        raise GemmateError(f"{folder} holds no runs. Run `gemmate course` first.")
    notebooks = [_notebook(folder, record) for record in records]
    content = {"notebooks": notebooks, "runs": [_run(file.parent) for file in runs]}
    text = render_page(title="GemmaTE Course: the report", body=None, **content)
    page = inside(folder, "report.html")
    page.write_text(text, encoding="utf-8")
    return page
