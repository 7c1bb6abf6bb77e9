"""Tables, folders of texts and PDF files, as rows in splits."""

import json
from pathlib import Path

import pytest

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import load_dataset_splits
from gemmate_lib.models import load_tokenizer
from gemmate_lib.preparation import find_documents, pieces, prepare_rows, read_document


def write_pdf(path: Path, *texts: str, password: str | None = None) -> None:
    """A PDF with a page for each text, written by hand: pypdf writes no text."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    name = NameObject
    font = DictionaryObject({name("/Type"): name("/Font"), name("/Subtype"): name("/Type1"),
                             name("/BaseFont"): name("/Helvetica")})  # fmt: skip
    for text in texts:
        page = writer.add_blank_page(width=400, height=200)
        fonts = DictionaryObject({name("/F1"): writer._add_object(font)})
        page[name("/Resources")] = DictionaryObject({name("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
        page[name("/Contents")] = writer._add_object(stream)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)


def story(number: int, lines: int = 12) -> str:
    """A text unlike the others, in paragraphs."""
    return "\n\n".join(
        f"In chapter {line} of book {number} the {number * 7 + line}th ship left harbour "
        f"{line * line + number}. Nobody saw it again before {1900 + number * line}."
        for line in range(lines)
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of texts and PDF files."""
    folder = tmp_path / "library"
    (folder / "more").mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.txt").write_text(story(number), "utf-8")
    (folder / "more/nine.md").write_text(story(9), "utf-8")
    write_pdf(folder / "ten.PDF", *(f"The page {i} of the tenth book has words." for i in range(9)))
    return folder


def rows_of(folder: Path, split: str) -> list[dict[str, str]]:
    lines = (folder / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_documents_stay_in_one_split(library: Path, tmp_path: Path) -> None:
    config = DatasetConfig(max_length=102, near_duplicate=1)
    counts = prepare_rows(library, tmp_path / "out", dataset=config)
    rows = {split: rows_of(tmp_path / "out", split) for split in counts}
    assert {split: len(rows[split]) for split in counts} == counts and min(counts.values()) > 0
    names = {split: {row["source"] for row in rows[split]} for split in counts}
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]
    assert set().union(*names.values()) == {*(f"{i}.txt" for i in range(8)), "nine.md", "ten.PDF"}
    assert all(len(row["text"]) < 303 for each in rows.values() for row in each)
    loaded = load_dataset_splits(DatasetConfig(id=str(tmp_path / "out")))
    assert loaded.form == "text" and len(loaded.train) == counts["train"]


def test_pieces_are_as_long_as_a_row_may_be(library: Path, tmp_path: Path) -> None:
    """Counted by the tokenizer that training counts with: none is dropped as too long."""
    tokenizer, config = load_tokenizer("tiny-gemma"), DatasetConfig(max_length=64, near_duplicate=1)
    prepare_rows(library, tmp_path / "out", dataset=config, tokenizer=tokenizer)
    config = config.model_copy(update={"id": str(tmp_path / "out")})
    found = load_dataset_splits(config, tokenizer=tokenizer).report
    assert found.length_checked and found.over_long == 0
    words = [len(tokenizer(row["text"])["input_ids"]) for row in rows_of(tmp_path / "out", "train")]
    assert sum(words) / len(words) > 32  # and they are no crumbs


def test_nothing_of_a_document_is_lost(library: Path) -> None:
    texts = [read_document(path) for path in find_documents(library)]
    for text in [*texts, "x" * 1000, "One. " + "y" * 300 + " two", "a\u00a0b\n \n\tc"]:
        found = list(pieces(text, 120))
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(0 < len(piece) <= 120 for piece in found)


def test_a_table_is_cleaned_and_split_as_the_course_does_it(tmp_path: Path) -> None:
    rows = [{"q": f"The {i}th lantern stood at {i * 7}.", "a": f"A {i}"} for i in range(50)]
    rows += [rows[3], {"q": "", "a": "nobody"}]
    lines = [f"{row['q']},{row['a']}" for row in rows]
    (tmp_path / "t.csv").write_text("\n".join(["q,a", *lines]) + "\n", "utf-8")
    config = DatasetConfig(columns={"quote": "q", "author": "a"}, near_duplicate=1)
    counts = prepare_rows(tmp_path / "t.csv", tmp_path / "out", dataset=config)
    assert sum(counts.values()) == 50 and counts["test"] == counts["validation"] == 5
    texts = [row["q"] for split in counts for row in rows_of(tmp_path / "out", split)]
    assert len(set(texts)) == 50
    again = load_dataset_splits(config.model_copy(update={"id": str(tmp_path / "out")}))
    assert again.report.kept == 50


def test_splits_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for split, start in (("train", 0), ("test", 100)):
        rows = [{"text": f"The {start + i}th lantern, {i * 7} steps away."} for i in range(20)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"in/{split}.jsonl").write_text(text, "utf-8")
    config = DatasetConfig(near_duplicate=1)
    counts = prepare_rows(tmp_path / "in", tmp_path / "out", dataset=config)
    assert counts == {"train": 18, "validation": 2, "test": 20}
    assert all("The 1" in row["text"] for row in rows_of(tmp_path / "out", "test"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
        ("a.txt", b" \n", "a.txt holds no text"),
        ("a.pdf", b"%PDF-1.7 nonsense", "a.pdf cannot be read as PDF"),
        ("a.docx", b"x", "holds no file to train on"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(GemmateError, match=said):
        prepare_rows(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scanned_and_a_locked_pdf(tmp_path: Path) -> None:
    write_pdf(tmp_path / "scan.pdf", "")
    with pytest.raises(GemmateError, match="may be scanned"):
        read_document(tmp_path / "scan.pdf")
    write_pdf(tmp_path / "locked.pdf", "A secret.", password="x")
    with pytest.raises(GemmateError, match="without a password"):
        read_document(tmp_path / "locked.pdf")


def test_too_little_to_split(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("One line.")
    with pytest.raises(GemmateError, match="too little text"):
        prepare_rows(tmp_path / "in", tmp_path / "out")
