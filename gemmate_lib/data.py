"""Data sets: through their card or from files, without duplicates, split by seed, all counted."""

import importlib
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemmate_lib import timestamps
from gemmate_lib.cards import Card, Source, card_checksum, card_paths, read_card, verify
from gemmate_lib.config import DatasetConfig, GemmateError, among
from gemmate_lib.formats import (
    SPLITS,
    Tables,
    find_splits,
    read_table,
    rename_columns,
    usual_columns,
)
from gemmate_lib.forms import OPTIONAL, Form, find_form, render, says_nothing
from gemmate_lib.rows import Encoded, Row, encode
from gemmate_lib.splitting import carve, find_duplicates, normalise, prompt_keys

__all__ = ["DataReport", "Encoded", "Form", "Row", "Splits", "encode", "load_dataset_splits"]

Parts = dict[str, list[Row]]  # split -> rows
_COUNTS = {
    "missing_field": "a field is missing or no text",
    "empty": "empty text",
    "refused_by_template": "refused by the chat template",
    "over_long": "too long",
    "exact_duplicates": "repeats a row but for case, punctuation or space",
    "near_duplicates": "nearly repeats a row",
    "across_splits": "stands in another split as well",
    "beyond_limit": "beyond the limit",
    "conflicts": "has a text that stands there with another label",
    "extra_keys": "an extra key",
    "placeholders": "an input that says it is none, as <noinput>, is read as none",
}


@dataclass
class DataReport:
    """What became of every row: `read` is `kept` plus all that was dropped."""

    source: str
    form: Form
    over_long_action: str  # "dropped" or "cut"
    length_checked: bool
    read: int = 0
    kept: int = 0
    missing_field: int = 0
    empty: int = 0
    refused_by_template: int = 0
    over_long: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    across_splits: int = 0
    beyond_limit: int = 0
    conflicts: int = 0
    extra_keys: int = 0
    placeholders: int = 0
    empty_optional: dict[str, int] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)  # the first rows of each count

    def count(self, what: str, source_row: int) -> None:
        """Count a row under one of the names above."""
        setattr(self, what, getattr(self, what) + 1)
        self.examples[what] = [*self.examples.get(what, []), source_row][:5]

    def lines(self) -> list[str]:
        """Return the report for people; row numbers count from 0."""
        shares = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        lines = [f"{self.source} ({self.form}): {self.read} rows read, {self.kept} kept: {shares}"]
        actions = dict.fromkeys(("extra_keys", "conflicts", "placeholders"), "noted")
        actions["over_long"] = self.over_long_action
        for what, why in _COUNTS.items():
            if number := getattr(self, what):
                rows = ", ".join(map(str, self.examples[what])) + ", …" * (number > 5)
                lines.append(f"{number} {actions.get(what, 'dropped')}: {why} (row {rows})")
        lines += [f"{number} noted: empty {name}" for name, number in self.empty_optional.items()]
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        return lines if self.length_checked else [*lines, "length not checked: no tokenizer"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Splits:
    """The rows of each split, shuffled by the split's seed, and how they came to be."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    report: DataReport
    form: Form

    def checksums(self) -> dict[str, str]:
        """Return the sha256 of each split: its prompts, completions and times, in order."""
        return {
            split: card_checksum(map(_content, rows))
            for split, rows in zip(SPLITS, (self.train, self.validation, self.test), strict=True)
        }


def _content(row: Row) -> dict[str, Any]:
    times = {"times": row.times} if row.times else {}
    return {"prompt": row.prompt, "completion": row.completion} | times


def load_dataset_splits(config: DatasetConfig, *, tokenizer: Any = None) -> Splits:
    """Load, check, clean and split a data set; lengths are checked where a tokenizer is given.

    Splits that come as files stay what they are (`limit` holds for each); the others are taken
    from the train rows.

    Raises:
        GemmateError: an unknown data set, one unlike its card, or without usable rows.
    """
    tables = rename_columns(read_tables(config), config.columns)
    columns = usual_columns(tables)
    form, required = find_form(columns, mapped=config.columns, template=config.template)
    used = {*required, *OPTIONAL.get(form, ())}
    if config.timestamp and (form != "messages" or config.timestamp in columns):
        used.add(among(config.timestamp, columns, "column"))  # turns may have it instead
    action = "cut" if config.over_long == "cut" else "dropped"
    report = DataReport(config.train or config.id, form, action, tokenizer is not None)
    report.unused_columns = sorted(columns - used)
    parts: Parts = {}
    for split, table in tables.items():
        for number, record in enumerate(table):
            if record.keys() - columns - used:
                report.count("extra_keys", number)
        parts[split] = _rows(table, config, tokenizer=tokenizer, report=report)
    times = [t for rows in parts.values() for row in rows for _, t in row.times or ()]
    timestamps.warn_of_seconds(times, where=report.source)
    _drop_copies(parts, config.near_duplicate, report)
    parts = _split(parts, config, report)
    report.splits = {split: len(parts[split]) for split in SPLITS}
    report.kept = sum(report.splits.values())
    if not all(parts[split] for split in tables):
        raise GemmateError(f"A split is left empty: {'; '.join(report.lines())}. Give more rows.")
    return Splits(**parts, report=report, form=form)


def read_tables(config: DatasetConfig) -> Tables:
    """Read the records of each split as they are: from a card, a folder or files.

    Raises: GemmateError for an unknown data set, or one unlike its card.
    """
    origin, tables = Path(config.id).expanduser(), Tables()
    named = {split: getattr(config, split) for split in SPLITS}
    files = {split: Path(name).expanduser() for split, name in named.items() if name}
    if "train" not in files:
        if config.id in card_paths() or origin.suffix == ".md":
            tables = _through_card(read_card(config.id), config.revision)
        elif origin.is_dir():
            files = find_splits(origin) | files
        elif origin.is_file():
            files["train"] = origin
        else:
            among(config.id, card_paths(), "file, folder or data card")
    return tables | {split: read_table(path) for split, path in files.items()}


def _through_card(card: Card, revision: str | None) -> Tables:
    source, tables = card.source, {}
    for split in card.splits:
        if source.file:
            tables[split] = read_table(card.path.parent / source.file)
        elif source.generator:
            module, _, name = source.generator.partition(":")
            rows = getattr(importlib.import_module(module), name)(source.seed)
            tables[split] = [dict(row) for row in rows]
        else:
            tables[split] = _from_hub(source, revision or source.revision, split)
        verify(card, tables[split], split=split)
    return tables


def _from_hub(source: Source, revision: str | None, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    named = [name for name in (source.hub_id, source.config) if name]
    theirs = source.names.get(split, split)
    try:
        return load_dataset(*named, revision=revision, split=theirs).to_list()
    except (OSError, ValueError) as error:  # unreachable, unknown or gated; no such split
        problem = f"{source.hub_id} cannot be loaded from the Hub ({error})"
        remedy = "Check the network, or use an embedded twin: tiny_quotes."
        raise GemmateError(f"{problem}. {remedy}") from error


def _rows(
    table: list[dict[str, Any]], config: DatasetConfig, *, tokenizer: Any, report: DataReport
) -> list[Row]:
    rows: list[Row] = []
    report.read += len(table)
    shape = {
        "template": config.template, "tokenizer": tokenizer, "timestamp": config.timestamp,
        "labels": config.labels, "chat": config.chat,
    }  # fmt: skip
    for number, record in enumerate(table):
        row = render(record, report.form, **shape, source_row=number)
        if isinstance(row, str):
            report.count(row, number)
        elif tokenizer is None or _fits(row, config, tokenizer=tokenizer, report=report):
            rows.append(row)
            if report.form == "instruction" and says_nothing(record.get("input")):
                report.count("placeholders", number)
            for name in OPTIONAL.get(report.form, ()):
                if not row.fields.get(name):
                    report.empty_optional[name] = report.empty_optional.get(name, 0) + 1
    return rows


def _fits(row: Row, config: DatasetConfig, *, tokenizer: Any, report: DataReport) -> bool:
    ids = encode(row, tokenizer, max_length=config.max_length, over_long=config.over_long)
    if ids is None or ids.cut:
        report.count("over_long", row.source_row)
    return ids is not None


def _drop_copies(parts: Parts, threshold: float, report: DataReport) -> None:
    order = [(s, row) for s in ("test", "validation", "train") for row in parts.get(s, [])]
    quotes = report.form == "quotes"  # one quote, whoever it is ascribed to
    texts = [r.fields["quote"] if quotes else f"{r.prompt}\n{r.completion}" for _, r in order]
    for i, (_, row) in enumerate(order):
        if row.times:  # the same text at another time is another text; before 1970 no less
            texts[i] += f"\n{row.times}".replace("-", "before ")
    prompts = _keys([row for _, row in order])
    copies = find_duplicates(texts, threshold=threshold)
    home: dict[str, str] = {}  # prompt -> its split
    parts.update({split: [] for split in parts})
    for i, (split, row) in enumerate(order):
        original, exact = copies.get(i, (i, True))
        if order[original][0] != split:
            report.count("across_splits", row.source_row)
        elif original != i:
            report.count("exact_duplicates" if exact else "near_duplicates", row.source_row)
        elif home.setdefault(prompts[i], split) != split:
            report.count("across_splits", row.source_row)
        else:
            parts[split].append(row)
    if report.form == "classification":
        _note_conflicts(parts["train"], report)


def _note_conflicts(rows: list[Row], report: DataReport) -> None:
    """Count the rows whose text stands there with another label: nothing can learn both."""
    first: dict[str, str] = {}
    for row in rows:
        if first.setdefault(normalise(row.prompt), row.completion) != row.completion:
            report.count("conflicts", row.source_row)


def _split(parts: Parts, config: DatasetConfig, report: DataReport) -> Parts:
    for split, rows in parts.items():
        random.Random(config.split_seed).shuffle(rows)
        for row in rows[config.limit or len(rows) :]:
            report.count("beyond_limit", row.source_row)
        parts[split] = rows[: config.limit]
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    missing = {split: share for split, share in shares.items() if split not in parts}
    rows = parts["train"]
    return parts | carve(rows, _keys(rows), missing)


def _keys(rows: list[Row]) -> list[str]:
    """What holds rows together in one split: their prompt, or the paragraph they ask about."""
    return prompt_keys([row.fields.get("context", row.prompt) for row in rows])
