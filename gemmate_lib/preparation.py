"""From what one has to rows in splits: a table, or a folder of texts and PDF files.

The result is a folder with train.jsonl, validation.jsonl and test.jsonl, which `dataset=FOLDER`
reads. A table goes through the course's own checks first; pieces of one document stay in one split.
"""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import load_dataset_splits, read_tables
from gemmate_lib.extras import need
from gemmate_lib.formats import SPLITS, SUFFIXES, write_rows
from gemmate_lib.splitting import carve

TEXTS = (".txt", ".md")
Rows = list[dict[str, Any]]


def prepare_rows(
    source: str | Path,
    out: str | Path,
    *,
    dataset: DatasetConfig | None = None,
    tokenizer: Any = None,
) -> dict[str, int]:
    """Write the splits of a source as JSON Lines to a new folder; the number of rows of each.

    source: a table (.json, .jsonl, .csv, .tsv), a folder of such splits, a data card's name, or a
        folder of .txt, .md and .pdf files, which are cut into pieces.
    dataset: the shares held out, the seed, how columns are called, and the longest row.
    tokenizer: counts how long a piece is; None: three characters are taken for a token.
    Raises: GemmateError for what cannot be read, or a folder that is there already.
    """
    folder = Path(out)
    if folder.exists():
        raise GemmateError(f"{folder} exists. Give another folder, or delete it.")
    config = (dataset or DatasetConfig()).model_copy(update={"id": str(source)})
    documents = find_documents(Path(source))
    parts = split_documents(documents, config, tokenizer) if documents else split_table(config)
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
    documents: list[Path], config: DatasetConfig, tokenizer: Any = None
) -> dict[str, Rows]:
    """Pieces of documents as rows `text` and `source`; a document stays in one split.

    Fewer than three documents cannot be kept apart: then pieces are drawn, whatever they are from.
    """

    def length(text: str) -> int:
        if tokenizer is None:
            return len(text) // 3
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    rows = [
        {"text": piece, "source": path.name}
        for path in documents
        for piece in pieces(read_document(path), config.max_length - 2, length)  # bos and eos
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

    need("pypdf", f"Reading {path}", extra="cloud")
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each oddity of a file
    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    except (PyPdfError, ValueError, OSError) as error:
        raise GemmateError(f"{path} cannot be read as PDF: {error}. Take it out, or save it anew "
                           "without a password.") from None  # fmt: skip


def pieces(text: str, most: int, size: Callable[[str], int] = len) -> Iterator[str]:
    """A text as pieces of at most such a size: whole paragraphs, else sentences, else words."""
    held = ""
    for part in _parts(text, most, size):
        joined = f"{held} {part}".strip()
        if held and size(joined) > most:
            yield held
            joined = part
        held = joined
    if held:
        yield held


def _parts(text: str, most: int, size: Callable[[str], int]) -> Iterator[str]:
    for pattern in (r"\n\s*\n", r"(?<=[.!?])\s+", r"\s+"):
        found = [" ".join(part.split()) for part in re.split(pattern, text)]
        if len(found := list(filter(None, found))) > 1:
            for part in found:
                yield from [part] if size(part) <= most else _parts(part, most, size)
            return
    line = " ".join(text.split())
    half = len(line) // 2  # of a word without end, as a table of numbers may be
    if size(line) <= most or not half:
        yield line
    else:
        yield from (*_parts(line[:half], most, size), *_parts(line[half:], most, size))
