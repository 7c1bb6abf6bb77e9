"""Files to records: the splits of a folder; JSON, JSON Lines, CSV and TSV; names of columns."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError, among
from gemmate_lib.squad import read_squad

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
ALIASES = {"prompt": "input_text", "completion": "output_text"}
Tables = dict[str, list[dict[str, Any]]]  # split -> records
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON Lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the file of each split in a folder.

    Raises: GemmateError where there is no train file, or more than one file for a split.
    """
    files: dict[str, Path] = {}
    for split, stems in SPLITS.items():
        found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES and p.stem in stems]
        if len(found) > 1 or (split == "train" and not found):
            count = f"{len(found)} {split} files" if found else "no train file"
            raise GemmateError(f"{folder} holds {count}. Give one, such as {split}.jsonl.")
        if found:
            files[split] = found[0]
    return files


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file; the suffix tells the format.

    Raises:
        GemmateError: unknown suffix, no such file, not UTF-8, malformed, or without rows.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise GemmateError(f"{path} has an unknown format. Give one of {', '.join(SUFFIXES)}.")
    text = _read_text(path)
    if suffix == ".json":
        rows = _parse_json(path, text)
        if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
            rows = read_squad(path)[0]
    else:
        rows = list(_parse_jsonl(path, text) if suffix == ".jsonl" else _parse_csv(path, text))
    if not rows:
        raise GemmateError(f"{path} holds no rows. Give a file with data.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise GemmateError(f"{path}: row {number} is not an object with named fields. Mend it.")
    return rows


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise GemmateError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {raw[error.start]:#04x}"
        remedy = f"Convert it, perhaps by: iconv -f cp1252 -t utf-8 {path.name}"
        raise GemmateError(f"{path} is not UTF-8: {where}. {remedy}") from error


def _parse_json(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        misnamed = error.msg == "Extra data"  # a second document follows the first
        remedy = "If it is JSON Lines, name it .jsonl." if misnamed else "Mend it."
        raise GemmateError(f"{path}, line {error.lineno}: {error.msg}. {remedy}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in ("data", "rows") if key in value), None)
    if not isinstance(value, list):
        raise GemmateError(f'{path} holds no list of rows. Give a list, or {{"data": [...]}}.')
    return value


def _parse_jsonl(path: Path, text: str) -> Iterator[Any]:
    # Not splitlines(): a JSON string may hold U+2028 and its kin, which it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{path}, line {number}: {error.msg}"
                raise GemmateError(f"{problem}. Put one JSON object on each line.") from error


def _parse_csv(path: Path, text: str) -> Iterator[dict[str, Any]]:
    stream = io.StringIO(text, newline="")
    if path.suffix.lower() == ".tsv":  # TSV has no quoting: a quotation mark stands for itself
        reader = csv.DictReader(stream, restkey="(surplus)", delimiter="\t", quoting=csv.QUOTE_NONE)
    else:  # strict: otherwise an unclosed quotation mark swallows the rest of the file
        reader = csv.DictReader(stream, restkey="(surplus)", strict=True)
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise GemmateError(f"{path} names a column twice: {names}. Rename one.")
        yield from reader
    except csv.Error as error:
        problem = f"{path}, line {reader.reader.line_num}: {error}"
        raise GemmateError(f"{problem}. Mend it, or use .jsonl.") from error


def usual_columns(tables: Tables) -> set[str]:
    """Return the columns that more than half of the records have, so that one odd record adds none.

    Raises: GemmateError where there is no such column.
    """
    counts = Counter(key for table in tables.values() for record in table for key in record)
    total = sum(map(len, tables.values()))
    if usual := {key for key, count in counts.items() if 2 * count > total}:
        return usual
    raise GemmateError("Most records share no field. Name the fields alike in every record.")


def rename_columns(tables: Tables, columns: Mapping[str, str]) -> Tables:
    """Give the columns our names; `columns` maps ours to theirs.

    Raises: GemmateError where a column does not exist.
    """
    usual = usual_columns(tables)
    if not columns and set(ALIASES.values()) <= usual:
        columns = ALIASES
    gone = {*columns, *(among(theirs, usual, "column") for theirs in columns.values())}

    def rename(record: Mapping[str, Any]) -> dict[str, Any]:
        mapped = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        return {key: value for key, value in record.items() if key not in gone} | mapped

    return {split: [rename(record) for record in table] for split, table in tables.items()}
