"""Reading files: every format, every encoding trap, and errors that name file and place."""

import json

import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.formats import find_splits, read_table, rename_columns, usual_columns

ROWS = [{"text": "one"}, {"text": "two"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"version": 2, "rows": ROWS})),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'),
        ("a.jsonl", '{"text": "one"}\r\n{"text": "two"}'),
        ("a.csv", "text\none\ntwo\n"),
        ("a.CSV", 'text\r\n"one"\r\ntwo\r\n'),
        ("a.tsv", "text\none\ntwo\n"),
        ("a.csv", b"\xef\xbb\xbftext\none\ntwo\n"),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    ],
)
def test_formats_give_the_same_records(tmp_path, name, content):
    assert read_table(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "x", "unknown format"),
        ("a.json", b'[{"text": "caf\xe9"}]', "not UTF-8: byte 14 is 0xe9"),
        ("a.csv", "text\nÿ".encode("utf-16"), "not UTF-8: byte 0"),
        ("a.csv", b"\xef\xbb\xbftext\n\xff\n", "not UTF-8: byte 8 is 0xff"),
        ("a.json", "[{]", "line 1"),
        ("a.json", '{"text": 1}\n{"text": 2}\n', r"name it \.jsonl"),
        ("a.json", '{"a": 1}', "holds no list of rows"),
        ("a.json", '{"data": {"a": 1}}', "holds no list of rows"),
        ("a.json", '[{"text": "a"}, "b"]', "row 1 is not an object"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", '{"text": 1}\n\n{"text": \n', "line 3"),
        ("a.csv", "text\n", "holds no rows"),
        ("a.csv", "text,text\n1,2\n", "names a column twice"),
        ("a.csv", 'text\n"one\ntwo\n', "line 3: unexpected end"),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, told):
    with pytest.raises(GemmateError, match=told) as caught:
        read_table(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(GemmateError, match=r"nowhere\.json cannot be read"):
        read_table(tmp_path / "nowhere.json")


def test_line_separators_inside_json_strings_end_no_line(tmp_path):
    text = "one\u2028two\u0085three\x0cfour"
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert read_table(write(tmp_path / "a.jsonl", line + "\n")) == [{"text": text}]


def test_quotation_marks_in_tsv_stand_for_themselves(tmp_path):
    content = 'text\tlabel\n"an open one\t1\n" and another\t0\n'
    rows = read_table(write(tmp_path / "a.tsv", content))
    assert [row["text"] for row in rows] == ['"an open one', '" and another']


def test_csv_keeps_line_breaks_in_quotes_and_shows_surplus_and_missing_cells(tmp_path):
    rows = read_table(write(tmp_path / "a.csv", 'a,b\n"x\r\ny",1\n2\n3,4,5\n'))
    assert rows[0] == {"a": "x\r\ny", "b": "1"}
    assert rows[1] == {"a": "2", "b": None}
    assert rows[2] == {"a": "3", "b": "4", "(surplus)": ["5"]}


def test_folder_by_the_usual_names(tmp_path):
    for name in ("train.jsonl", "dev.csv", "test.tsv", "notes.md", "train_old.csv"):
        write(tmp_path / name, "")
    names = {split: path.name for split, path in find_splits(tmp_path).items()}
    assert names == {"train": "train.jsonl", "validation": "dev.csv", "test": "test.tsv"}


@pytest.mark.parametrize(
    ("names", "told"),
    [(["test.csv"], "no train file"), (["train.csv", "val.csv", "dev.csv"], "2 validation files")],
)
def test_folder_must_be_unambiguous(tmp_path, names, told):
    for name in names:
        write(tmp_path / name, "")
    with pytest.raises(GemmateError, match=told):
        find_splits(tmp_path)


def test_columns_are_renamed_and_an_odd_record_adds_none():
    tables = {"train": [{"content": "a", "quote": "old"}, {"content": "b", "quote": "old", "x": 1}]}
    renamed = rename_columns(tables, {"quote": "content"})
    assert renamed == {"train": [{"quote": "a"}, {"quote": "b", "x": 1}]}
    assert usual_columns({"train": [{"a": 1}, {"a": 1, "x": 1}], "test": [{"a": 1}]}) == {"a"}


def test_unknown_column_names_the_nearest():
    with pytest.raises(GemmateError, match=r"no column 'contents'. Did you mean 'content'"):
        rename_columns({"train": [{"content": "a"}]}, {"quote": "contents"})
    with pytest.raises(GemmateError, match="share no field"):
        usual_columns({"train": [{"a": 1}, {"b": 1}]})
