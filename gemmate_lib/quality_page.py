"""A data set's quality as one self-contained HTML page with plots, and the draft of a data card.

No text of a data set is trusted: it is escaped, and what looks like personal data left out.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gemmate_lib.cards import card_checksum, features_of, read_card
from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import read_tables
from gemmate_lib.patterns import redact
from gemmate_lib.plots import embedded
from gemmate_lib.quality import Quality
from gemmate_lib.report import render_page
from gemmate_lib.verdicts import findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST, LETTERS = 10, 160  # groups of rows shown, and how much of each
_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~>-])")
CATEGORIES = {"classification": "text-classification", "reading": "question-answering"}


def write_page(quality: Quality, out: Path) -> Path:
    """Write the page of a data set's quality.

    Raises: GemmateError for a file that is not named .html.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise GemmateError(f"{out} is to be a page. Name it .html.")
    found = findings(quality)
    page = render_page(
        "quality.html.j2",
        title=f"Data quality: {Path(quality.source).name}",
        form=quality.form,
        rows=len(quality.records),
        look=sum(finding.level == "look" for finding in found),
        findings=found,
        figures=list(figures(quality)),
        groups=list(_groups(quality)),
        report=[redact(line) for line in quality.report],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8", newline="\n")
    return out


def excerpt(text: str) -> str:
    """The beginning of a text, in one line, without what looks like personal data."""
    line = " ".join(redact(text).split())
    return line if len(line) <= LETTERS else f"{line[:LETTERS]}…"


def _groups(quality: Quality) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A title and the rows below it: near duplicates, conflicts, topics, what the task misses."""
    texts = {each.row: each.text for each in quality.examples}
    for pair in quality.near[:MOST]:
        title = f"Nearly the same: Jaccard {pair.jaccard:.2f}, by MinHash {pair.estimate:.2f}"
        yield title, [(f"row {row}", excerpt(texts[row])) for row in pair[:2]]
    for rows in quality.conflicts[:MOST]:
        yield "Same input, other output", [(f"row {row}", excerpt(texts[row])) for row in rows[:4]]
    if quality.topics:
        lines = [(f"{topic.rows:,} rows", " ".join(topic.words)) for topic in quality.topics]
        yield "Topics, by the words that set them apart", lines
    if quality.relevance and quality.relevance.missing:
        yield "Of the task, but in no row", [("words", " ".join(quality.relevance.missing))]


def figures(quality: Quality) -> Iterator[dict[str, str]]:
    """Yield each plot as a data URL with its description."""
    yield embedded(
        [lambda axes: _histogram(axes, quality.characters, "characters"),
         lambda axes: _histogram(axes, quality.tokens, "tokens")],
        "How long the rows are, in characters and in tokens; the dashed line is the median.",
    )  # fmt: skip
    if quality.balance:
        names = [redact(name) for name in list(quality.balance)[:20]]
        rows = list(quality.balance.values())[:20]
        yield embedded([lambda axes: _bars(axes, names, rows)], "How many rows each class has.")
    if quality.topics:
        names = [", ".join(topic.words[:3]) for topic in quality.topics]
        rows = [topic.rows for topic in quality.topics]
        yield embedded([lambda axes: _bars(axes, names, rows)], "How many rows each topic has.")
    if quality.near:
        values = [pair.jaccard for pair in quality.near]
        text = "How alike the pairs of near duplicates are."
        yield embedded([lambda axes: _histogram(axes, values, "Jaccard similarity")], text)


def _histogram(axes: "Axes", values: list[Any], unit: str) -> None:
    axes.hist(values, bins=min(30, max(1, len(set(values)))))
    axes.axvline(sorted(values)[len(values) // 2], color="black", lw=1, ls="--")
    axes.set(xlabel=unit, ylabel="rows")


def _bars(axes: "Axes", names: Iterable[str], rows: list[int]) -> None:
    plain: Any = {"parse_math": False}  # a name with $ in it is no formula
    axes.barh(range(len(rows)), rows)
    short = [name if len(name) <= 40 else f"{name[:40]}…" for name in names]
    axes.set_yticks(range(len(rows)), short, **plain)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set(xlabel="rows")


def markdown(text: str) -> str:
    """Escape a text for one line of Markdown: it opens no tag, link, list or table."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKS.sub(r"\\\1", line)


def draft_card(quality: Quality, config: DatasetConfig, out: Path) -> Path:
    """Write the draft of a data card beside or above its file; licence and origin stay to be told.

    Raises: GemmateError where the data is no file, the card exists, or is not named .md.
    """
    file = Path(config.train or config.id).expanduser()
    if not file.is_file() or file.suffix == ".md":
        raise GemmateError(f"{config.id} is no data file. Draft a card for one, say rows.jsonl.")
    if out.suffix != ".md" or out.exists():
        raise GemmateError(f"{out} exists, or is not named .md. Choose another --card.")
    table = read_tables(config)["train"]
    found = findings(quality)
    matter = {
        "pretty_name": file.stem.replace("_", " ").capitalize(),
        "license": "unknown",
        "language": ["und"],  # undetermined, in ISO 639
        "task_categories": [CATEGORIES.get(quality.form, "text-generation")],
        "source": {"file": os.path.relpath(file.resolve(), out.parent.resolve())},
        "format": quality.form,
        "splits": {"train": len(table)},
        "features": features_of(table),
        "sha256": _checksum(table),
        "defects": [f"{f.title}: {f.text}" for f in found if f.level == "look"],
    }
    text = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=100)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"---\n{text}---\n{_body(quality, file)}", "utf-8", newline="\n")
    read_card(out)  # it must be one
    return out


def _checksum(table: list[dict[str, Any]]) -> str | None:
    try:
        return card_checksum(table)
    except UnicodeEncodeError:  # half a character is in no UTF-8
        return None


def _body(quality: Quality, file: Path) -> str:
    lines = [f"# {markdown(file.stem)}", "", "A draft: tell who made these rows, when and how, and"]
    lines += ["put their licence and language into the front matter.", "", "## Measured", ""]
    lines += [f"- {f.title} ({f.level}): {markdown(f.text)}" for f in findings(quality)]
    if quality.balance:
        shown = list(quality.balance.items())[:20]
        lines += ["", "## Classes", "", "| class | rows |", "| --- | ---: |"]
        lines += [f"| {markdown(redact(name))} | {rows:,} |" for name, rows in shown]
    lines += ["", "## What the library checks", ""]
    lines += ["The number of rows, the kinds of every field, and the sha256 of the rows."]
    return "\n".join(lines) + "\n"
