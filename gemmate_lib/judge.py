"""Blind human evaluation: a sheet of two runs' completions side by side, for a judge.

The sheet tells nobody which run wrote what: that stands in the key, a file of its own. No text in
a sheet is trusted: in HTML it is escaped, in CSV no cell begins a formula.
"""

import csv
import hashlib
import io
import json
import random
import re
from base64 import b64encode
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from gemmate_lib.config import GemmateError
from gemmate_lib.formats import read_table

COLUMNS = ("pair", "prompt", "left", "right", "choice")
CHOICES = ("left", "right", "tie", "skip")
Pair = tuple[str, str, str]  # prompt, and what A and B wrote
Row = tuple[int, str, str, str]  # pair, prompt, left, right
# A spreadsheet may take these for a formula, behind spaces too; an apostrophe makes them text.
# Where apostrophes stand already one more is put, so that taking one off restores every text.
_FORMULA = re.compile(r"'*(\s*[=+\-@＝＋－＠]|[\t\r\n])")


class Entry(BaseModel):
    """Which run wrote each side of a pair; sha256 of the prompt, the left and the right text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    left: Literal["A", "B"]
    right: Literal["A", "B"]
    sha256: tuple[str, str, str]


class Key(BaseModel):
    """What the sheet hides, by the pair's number; `equal` of the `paired` are not on it: ties."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    run_a: str
    run_b: str
    seed: int
    paired: int
    equal: int
    pairs: dict[str, Entry]

    def __str__(self) -> str:
        """Say how many pairs there are."""
        found = f"{self.paired} pairs with the same prompt, {self.equal} of them equal (ties)"
        return f"{found}; {len(self.pairs)} of the other {self.paired - self.equal} to judge"


def write_sheet(
    run_a: Path, run_b: Path, out: Path, *, limit: int | None = None, seed: int = 0
) -> Key:
    """Write a sheet, .html or .csv, and its key beside it; `limit` draws from unequal pairs.

    A prompt that both runs met more than once is paired in the order of the rows; the same
    prompt with the same two texts is one pair.
    Raises: GemmateError where a file exists, predictions are missing, or there is nothing to judge.
    """
    if out.suffix.lower() not in (".html", ".csv"):
        raise GemmateError(f"{out} is neither HTML nor CSV. Name it .html or .csv.")
    for file in (out, key_of(out)):
        if file.exists():
            raise GemmateError(f"{file} exists, and answers may need it. Choose another --out.")
    first, second = _completions(run_a), _completions(run_b)
    met = [(at[0], text, second[at]) for at, text in first.items() if at in second]
    pairs = list(dict.fromkeys(met))
    different = [pair for pair in pairs if pair[1] != pair[2]]
    if not different:
        problem = "share no prompt. Evaluate both on the same rows."
        if pairs:
            problem = f"have {len(pairs)} pairs, all equal. Choose runs that differ."
        raise GemmateError(f"{run_a} and {run_b} {problem}")
    rows, entries = draw(different, limit=limit, seed=seed)
    names = [run.resolve().name for run in (run_a, run_b)]
    if names[0] == names[1]:
        names = [str(run_a), str(run_b)]
    counts = {"paired": len(pairs), "equal": len(pairs) - len(different)}
    key = Key(run_a=names[0], run_b=names[1], seed=seed, pairs=entries, **counts)
    text = _page(rows) if out.suffix.lower() == ".html" else _table(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    key_of(out).write_text(key.model_dump_json(indent=1) + "\n", "utf-8", newline="\n")
    out.write_text(text, "utf-8", newline="")
    return key


def key_of(sheet: Path) -> Path:
    """Return where the key of a sheet lies: beside it."""
    return sheet.with_suffix(".key.json")


def draw(pairs: list[Pair], *, limit: int | None, seed: int) -> tuple[list[Row], dict[str, Entry]]:
    """Draw pairs, their order and their sides; each run is on the left in half of them.

    Raises: GemmateError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise GemmateError(f"A sheet of {limit} pairs has nothing to judge. Give 1 or more.")
    chance = random.Random(seed)
    drawn = chance.sample(pairs, min(limit or len(pairs), len(pairs)))
    odd = chance.getrandbits(1)  # who is left once more, in an odd number of pairs
    swapped = [bool((i + odd) % 2) for i in range(len(drawn))]
    chance.shuffle(swapped)
    rows: list[Row] = []
    entries = {}
    for number, ((prompt, a, b), swap) in enumerate(zip(drawn, swapped, strict=True), start=1):
        left, right = (b, a) if swap else (a, b)
        rows.append((number, prompt, left, right))
        entries[str(number)] = Entry(
            left="B" if swap else "A",
            right="A" if swap else "B",
            sha256=(text_hash(prompt), text_hash(left), text_hash(right)),
        )
    return rows, entries


def _completions(run: Path) -> dict[tuple[str, int], str]:
    """(prompt, how often it came before) -> completion."""
    file = run / "predictions.jsonl"
    if not file.is_file():
        raise GemmateError(f"{run} holds no predictions.jsonl. Run `gemmate evaluate {run}` first.")
    found: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for number, record in enumerate(read_table(file)):
        prompt, text = record.get("prompt"), record.get("completion")
        if not isinstance(prompt, str) or not isinstance(text, str):
            problem = f"{file}, row {number}: no `prompt` and `completion`"
            raise GemmateError(f"{problem}. Run `gemmate evaluate {run}` again.")
        # Half of a surrogate pair is in no UTF-8.
        prompt, text = (x.encode("utf-8", "replace").decode() for x in (prompt, text))
        found[prompt, seen[prompt]] = text
        seen[prompt] += 1
    return found


def text_hash(text: str) -> str:
    """Hash a text whatever a spreadsheet made of its line ends."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.sha256(plain.encode()).hexdigest()


def _table(rows: list[Row]) -> str:
    stream = io.StringIO(newline="")
    lines = [COLUMNS, *([*_cells(row), ""] for row in rows)]
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(lines)
    return "\ufeff" + stream.getvalue()  # without this mark Excel does not take it for UTF-8


def _cells(row: Row) -> list[str]:
    return [f"'{text}" if _FORMULA.match(text) else text for text in map(str, row)]


def text_of(cell: str) -> str:
    """Return what a cell held before it was kept from being a formula."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _visible(text: str) -> Markup:
    """Escape a text; mark its line ends, its tabs and the space around it."""
    marks = {" ": "·", "\t": "⇥\t", "\n": "↵\n"}
    parts = re.split(r"(^\s+|\s+$|[\n\t])", text.replace("\r\n", "\n").replace("\r", "\n"))
    for i in range(1, len(parts), 2):
        parts[i] = Markup("<i>{}</i>").format("".join(marks.get(x, "␣") for x in parts[i]))
    return Markup("").join(parts) if text else Markup("<i>(empty)</i>")


def _page(rows: list[Row]) -> str:
    assets = resources.files("gemmate_lib") / "assets"
    page, style, script = (
        (assets / name).read_text("utf-8") for name in ("judge.html.j2", "judge.css", "judge.js")
    )
    content: dict[str, Any] = {"rows": rows, "choices": CHOICES}
    for name, source in (("style", style), ("script", script)):
        found = b64encode(hashlib.sha256(source.encode()).digest()).decode()
        content |= {name: Markup(source), f"{name}_hash": f"sha256-{found}"}
    data = json.dumps([COLUMNS, *map(_cells, rows)]).replace("<", r"\u003c")  # nor </script>
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = _visible
    return environment.from_string(page).render(data=Markup(data), **content)
