"""Prompts from the command line or a file, some with a time, and their completions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmate_lib import timestamps
from gemmate_lib.config import GemmateError
from gemmate_lib.formats import read_table
from gemmate_lib.generate import generate_texts

Rows = Sequence[dict[str, Any]]


def read_prompts(source: Path) -> Rows:
    """Read rows with `prompt`, and perhaps with `timestamp`, from a file.

    Raises: GemmateError naming the row that lacks a prompt, or whose time cannot be read.
    """
    rows = read_table(source)
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise GemmateError(f"{source}, row {number}: no `prompt`. Give each row one.")
        timestamps.parse(row.get("timestamp"), where=f"{source}, row {number}: timestamp")
    return rows


def complete_rows(model: Any, tokenizer: Any, rows: Rows, **options: Any) -> list[dict[str, Any]]:
    """Return the rows with `completion` added; options as of `generate_texts`.

    A time-aware model asks a row at its `timestamp`; a row without one has no time.
    Raises: GemmateError for times that a plain model cannot read.
    """
    times = [timestamps.parse(row.get("timestamp")) for row in rows]
    if times != [timestamps.MISSING] * len(times):
        options["timestamps"] = times
    texts = generate_texts(model, tokenizer, [row["prompt"] for row in rows], **options)
    return [row | {"completion": text.text} for row, text in zip(rows, texts, strict=True)]
