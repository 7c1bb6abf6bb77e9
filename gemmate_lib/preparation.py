"""From what one has to rows in splits: a table, or a folder of texts and PDF files.

The result is a folder with train.jsonl, validation.jsonl and test.jsonl, which `dataset=FOLDER`
reads. A table goes through the course's own checks first; pieces of one document stay in one split.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import load_dataset_splits, read_tables
from gemmate_lib.formats import SPLITS, SUFFIXES, write_rows
from gemmate_lib.splitting import carve

TEXTS = (".txt", ".md")
Rows = list[dict[str, Any]]


def prepare_rows(
    source: str | Path,
    out: str | Path,
    *,
    dataset: DatasetConfig | None = None,
    characters: int = 400,
) -> dict[str, int]:
    """Write the splits of a source as JSON Lines to a new folder; the number of rows of each.

    source: a table (.json, .jsonl, .csv, .tsv), a folder of such splits, a data card's name, or a
        folder of .txt, .md and .pdf files, cut into pieces of at most so many characters.
    dataset: the shares held out, the seed, and how columns are called.
    Raises: GemmateError for what cannot be read, or a folder that is there already.
    """
    folder = Path(out)
    if folder.exists():
        raise GemmateError(f"{folder} exists. Give another folder, or delete it.")
    config = (dataset or DatasetConfig()).model_copy(update={"id": str(source)})
    documents = find_documents(Path(source))
    parts = split_documents(documents, config, characters) if documents else split_table(config)
    folder.mkdir(parents=True)
    for split in SPLITS:
        write_rows(folder / f"{split}.jsonl", parts[split])
    return {split: len(parts[split]) for split in SPLITS}


def split_table(config: DatasetConfig) -> dict[str, Rows]:
    """The records of a table that the course's checks leave, in their splits, as they were."""
    found, tables = load_dataset_splits(config), read_tables(config)
    # A split that came as no file of its own was taken from the train rows.
    records = {split: tables.get(split) or tables["train"] for split in SPLITS}
    rows = {split: getattr(found, split) for split in SPLITS}
    return {split: [records[split][row.source_row] for row in rows[split]] for split in SPLITS}


def find_documents(source: Path) -> list[Path]:
    """The text and PDF files of a folder, in the order of their names; none for anything else."""
    if not source.is_dir() or any(path.suffix in SUFFIXES for path in source.iterdir()):
        return []
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in (*TEXTS, ".pdf"))
    if not found:
        kinds = ", ".join((*TEXTS, ".pdf", *SUFFIXES))
        raise GemmateError(f"{source} holds no file to train on. Put some there: {kinds}.")
    return found


def split_documents(
    documents: list[Path], config: DatasetConfig, characters: int
) -> dict[str, Rows]:
    """Pieces of documents as rows `text` and `source`; a document stays in one split.

    Fewer than three documents cannot be kept apart: then pieces are drawn, whatever they are from.
    """
    rows = [
        {"text": piece, "source": path.name}
        for path in documents
        for piece in pieces(read_document(path), characters)
    ]
    random.Random(config.split_seed).shuffle(rows)
    apart = len(documents) > 2
    keys = [row["source"] if apart else str(number) for number, row in enumerate(rows)]
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    parts = carve(rows, keys, shares)
    if not parts["train"]:
        raise GemmateError(f"{documents[0].parent} holds too little text to split. Add documents.")
    return parts


def read_document(path: Path) -> str:
    """The text of a file. Raises: GemmateError naming a file that holds none, or is not UTF-8."""
    try:
        text = _pdf(path) if path.suffix.lower() == ".pdf" else path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GemmateError(f"{path} is not UTF-8: {error.reason}. Convert it.") from None
    if not text.strip():
        scanned = " It may be scanned: recognise its text first." * (path.suffix.lower() == ".pdf")
        raise GemmateError(f"{path} holds no text. Take it out of the folder.{scanned}")
    return text


def _pdf(path: Path) -> str:
    import logging

    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        remedy = 'Run pip install "gemmate-course[cloud]".'
        said = f"Reading {path} needs pypdf, which is not installed"
        raise GemmateError(f"{said}. {remedy}") from None
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each oddity of a file
    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    except (PyPdfError, ValueError, OSError) as error:
        raise GemmateError(f"{path} cannot be read as PDF: {error}. Take it out, or save it anew "
                           "without a password.") from None  # fmt: skip


def pieces(text: str, characters: int) -> Iterator[str]:
    """A text as whole paragraphs, or sentences of a long one, of at most so many characters."""
    held = ""
    for part in _sentences(text, characters):
        if held and len(held) + 1 + len(part) > characters:
            yield held
            held = ""
        held = f"{held} {part}".strip()
    if held:
        yield held


def _sentences(text: str, characters: int) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        parts = [line] if len(line) <= characters else re.split(r"(?<=[.!?])\s+", line)
        for part in filter(None, parts):
            yield from (part[i : i + characters] for i in range(0, len(part), characters))
