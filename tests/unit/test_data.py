"""Loading: every row is accounted for, and no text stands in two splits."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import encode, load_dataset_splits
from gemmate_lib.splitting import normalise, shingles

DROPPED = ["missing_field", "empty", "refused_by_template", "over_long", "exact_duplicates"]
DROPPED += ["near_duplicates", "across_splits", "beyond_limit"]


class Words:
    """A tokenizer that gives each word a number."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, **_):
        return {"input_ids": [3 + len(word) for word in text.split()]}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, tokenizer=None, **settings):
    return load_dataset_splits(DatasetConfig(id=str(source), **settings), tokenizer=tokenizer)


def texts(*words, n=30):
    return [{"text": f"{' '.join(words)} number {i} of them all is {i * i}"} for i in range(n)]


def parts(splits):
    return [splits.train, splits.validation, splits.test]


def check_books(splits):
    """What was read is what was kept and what was dropped, and the examples fit the counts."""
    report = splits.report
    kept = sum(map(len, parts(splits)))
    dropped = {what: getattr(report, what) for what in DROPPED}
    if report.over_long_action == "cut":
        del dropped["over_long"]
    assert report.kept == kept == sum(report.splits.values())
    assert report.read == kept + sum(dropped.values())
    for what in (*DROPPED, "extra_keys"):
        assert len(report.examples.get(what, [])) == min(5, getattr(report, what))


def test_a_file_is_split_by_seed(tmp_path):
    path = save(tmp_path / "a.jsonl", texts("row", n=40))
    splits = load(path, validation_fraction=0.2, test_fraction=0.1)
    assert splits.report.splits == {"train": 28, "validation": 8, "test": 4}
    assert splits == load(path, validation_fraction=0.2, test_fraction=0.1)
    other = load(path, validation_fraction=0.2, test_fraction=0.1, split_seed=1)
    assert {r.source_row for r in other.test} != {r.source_row for r in splits.test}
    assert splits.checksums() != other.checksums()
    assert splits.checksums() == load(path, validation_fraction=0.2).checksums()
    check_books(splits)


def test_everything_dropped_is_counted_with_its_rows(tmp_path):
    rows = [
        *(
            {"quote": f"Saying {i} stands on its own", "author": "A", "tags": ["t"]}
            for i in range(20)
        ),
        {"quote": "saying 3, stands on its OWN!", "author": "B", "tags": ["t"]},
        {"quote": " ", "author": "A", "tags": ["t"]},
        {"quote": "No author here"},
        {"quote": "No tags and a stray key", "author": "A", "tags": [], "year": 1999},
        {"quote": " ".join(["long"] * 90), "author": "A", "tags": ["t"]},
        {"quote": "one two three four five six seven eight nine", "author": "A", "tags": ["t"]},
        {"quote": "one two three four five six seven eight nine ten", "author": "A", "tags": ["t"]},
    ]
    splits = load(save(tmp_path / "a.jsonl", rows), Words(), max_length=50, limit=15)
    report = splits.report
    assert report.as_dict()["examples"]["exact_duplicates"] == [20]
    assert (report.empty, report.missing_field, report.over_long) == (1, 1, 1)
    assert (report.exact_duplicates, report.near_duplicates, report.beyond_limit) == (1, 1, 7)
    assert (report.extra_keys, report.empty_optional) == (1, {"tags": 1})
    check_books(splits)
    lines = "\n".join(report.lines())
    assert "27 rows read, 15 kept: train 11, validation 2, test 2" in lines
    assert "1 dropped: too long (row 24)" in lines and "1 dropped: empty text (row 21)" in lines
    assert "1 noted: an extra key (row 23)" in lines and "1 noted: empty tags" in lines
    assert "7 dropped: beyond the limit" in lines and ", …)" in lines
    json.dumps(report.as_dict())


def test_long_rows_are_cut_where_asked_and_lengths_need_a_tokenizer(tmp_path):
    rows = [*texts("row"), {"text": " ".join(["long"] * 90)}]
    path = save(tmp_path / "a.jsonl", rows)
    cut = load(path, Words(), over_long="cut", max_length=50)
    assert (cut.report.over_long, cut.report.kept) == (1, 31)
    assert "1 cut: too long (row 30)" in cut.report.lines()
    check_books(cut)
    unchecked = load(path, max_length=50)
    assert unchecked.report.kept == 31
    assert "length not checked: no tokenizer" in unchecked.report.lines()
    row = next(r for part in parts(cut) for r in part if r.source_row == 30)
    assert len(encode(row, Words(), max_length=50, over_long="cut").input_ids) == 50


def test_a_folder_and_separate_files_stay_apart(tmp_path):
    save(tmp_path / "train.jsonl", texts("train"))
    save(tmp_path / "valid.jsonl", texts("valid", n=5))
    both = load(tmp_path)
    assert both.report.splits == {"train": 27, "validation": 5, "test": 3}
    assert all("valid" in row.completion for row in both.validation)
    held_out = save(tmp_path / "exam.jsonl", texts("exam", n=4))
    named = load(tmp_path / "train.jsonl", test=held_out)
    assert sorted(row.source_row for row in named.test) == [0, 1, 2, 3]
    explicit = load("mine", train=str(tmp_path / "train.jsonl"), test=held_out)
    assert explicit.test == named.test
    assert explicit.report.source.endswith("train.jsonl")


def test_test_wins_over_validation_wins_over_train(tmp_path):
    shared = {"text": "This very line stands everywhere, in all three files"}
    near = {"text": "This very line stands everywhere, in all three files here"}
    save(tmp_path / "train.jsonl", [*texts("train"), shared, near])
    save(tmp_path / "val.jsonl", [*texts("val", n=5), shared])
    save(tmp_path / "test.jsonl", [*texts("test", n=5), shared, shared])
    splits = load(tmp_path)
    where = [sum("very line" in row.completion for row in part) for part in parts(splits)]
    assert where == [0, 0, 1]
    assert (splits.report.across_splits, splits.report.exact_duplicates) == (3, 1)
    check_books(splits)


def test_a_prompt_stands_in_one_split_only(tmp_path):
    rows = [
        {"prompt": f"Is {i} even, odd, or none of these?", "completion": answer}
        for i in range(40)
        for answer in ("yes", "no")
    ]
    splits = load(save(tmp_path / "a.jsonl", rows), near_duplicate=1.0)
    owners = [{normalise(row.prompt) for row in part} for part in parts(splits)]
    assert splits.report.kept == 80
    assert sum(map(len, owners)) == 40 and all(owners)
    (tmp_path / "a.jsonl").rename(tmp_path / "train.jsonl")
    save(
        tmp_path / "test.jsonl", [{"prompt": "Is 7 even, odd or none of these", "completion": "?"}]
    )
    assert load(tmp_path, near_duplicate=1.0).report.across_splits == 2


def test_a_fixed_instruction_binds_nothing(tmp_path):
    rows = [{"prompt": "Tell me more:", "completion": t["text"]} for t in texts("row")]
    assert load(save(tmp_path / "a.jsonl", rows)).report.splits["test"] == 3


def test_a_quote_is_one_whoever_said_it(tmp_path):
    rows = [{"quote": f"Saying {i} stands on its own", "author": "A"} for i in range(20)]
    rows.append(rows[0] | {"author": "Someone Else Entirely"})
    assert load(save(tmp_path / "a.jsonl", rows)).report.exact_duplicates == 1


def test_columns_templates_and_aliases(tmp_path):
    rows = [{"content": t["text"], "by": "A", "id": 1} for t in texts("row")]
    mapped = load(save(tmp_path / "a.jsonl", rows), columns="quote=content author=by")
    assert mapped.form == "quotes" and mapped.report.unused_columns == ["id"]
    assert mapped.train[0].completion.endswith("\nAuthor: A")
    shaped = load(tmp_path / "a.jsonl", template="{by} says {content}")
    assert shaped.form == "text" and shaped.train[0].completion.startswith("A says row number")
    pairs = [{"input_text": t["text"], "output_text": "ok"} for t in texts("row")]
    aliased = load(save(tmp_path / "b.jsonl", pairs))
    assert aliased.form == "prompt-completion" and aliased.train[0].completion == "ok"


@pytest.mark.parametrize(
    ("source", "settings", "told"),
    [
        (
            "tiny_qoutes",
            {},
            "no file, folder or data card 'tiny_qoutes'. Did you mean 'tiny_quotes'",
        ),
        ("a.jsonl", {"test": "nowhere.csv"}, r"nowhere\.csv cannot be read"),
        ("a.jsonl", {"columns": "text=txt"}, "no column 'txt'. Did you mean 'text'"),
        ("two.jsonl", {}, "A split is left empty: .*2 rows read, 2 kept: train 0"),
        ("bare.jsonl", {}, "match no form"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path, monkeypatch, source, settings, told):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.jsonl", texts("row"))
    save(tmp_path / "two.jsonl", texts("row", n=2))
    save(tmp_path / "bare.jsonl", [{"headline": "x", "label": 1}])
    with pytest.raises(GemmateError, match=told):
        load(source, **settings)


def test_chats_are_counted_when_their_template_refuses_them(tmp_path):
    from jinja2 import TemplateError

    def template(turns, *, tokenize, add_generation_prompt=False):
        if turns[0]["role"] == "system":
            raise TemplateError("no system role")
        return "".join(turn["content"] for turn in turns)

    words = Words()
    words.chat_template, words.bos_token, words.apply_chat_template = "…", None, template
    chat = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "x"}]
    rows = [{"messages": [chat[0], chat[1] | {"content": t["text"]}]} for t in texts("row")]
    rows.append({"messages": [{"role": "system", "content": "Be brief."}, *chat]})
    splits = load(save(tmp_path / "a.jsonl", rows), words)
    assert (splits.form, splits.report.refused_by_template) == ("messages", 1)
    check_books(splits)


SENTENCES = st.lists(st.sampled_from(["a", "b", "B!", "c", "d.", "é"]), max_size=9).map(" ".join)
TABLE = st.lists(SENTENCES.map(lambda text: {"text": text}), max_size=20)


def assert_no_text_twice(splits, threshold):
    kept = [
        (n, shingles(normalise(r.completion))) for n, part in enumerate(parts(splits)) for r in part
    ]
    keys = [normalise(row.completion) for part in parts(splits) for row in part]
    assert len(set(keys)) == len(keys)
    for i, (_, own) in enumerate(kept):
        for _, other in kept[:i]:
            assert len(own & other) / len(own | other) < threshold


@settings(max_examples=60, deadline=None)
@given(
    train=TABLE,
    test=st.none() | TABLE,
    seed=st.integers(0, 3),
    threshold=st.sampled_from([0.4, 0.8, 1.0]),
    limit=st.none() | st.integers(3, 9),
)
def test_no_text_stands_in_two_splits_and_no_row_vanishes(train, test, seed, threshold, limit):
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "train.jsonl", [*train, *texts("only in train", n=12)])
        if test is not None:
            save(Path(folder) / "test.jsonl", [*test, *texts("only in test", n=3)])
        splits = load(folder, split_seed=seed, near_duplicate=threshold, limit=limit)
    assert_no_text_twice(splits, threshold)
    check_books(splits)


def test_labels_are_named_and_conflicts_are_noted(tmp_path):
    rows = [{"sentence": f"row number {i} ", "label": i % 2} for i in range(40)]
    rows += [{"sentence": "Row, number 3!", "label": 0}, {"sentence": "hidden", "label": -1}]
    settings = {"labels": {0: "negative", 1: "positive"}, "near_duplicate": 1.0}
    splits = load(save(tmp_path / "a.jsonl", rows), test_fraction=0, validation_fraction=0,
                  **settings)  # fmt: skip
    check_books(splits)
    assert {row.fields["label"] for row in splits.train} == {"negative", "positive"}
    assert splits.report.conflicts == 1 and splits.report.missing_field == 1
    assert splits.report.kept == 41  # noted, not dropped: which of the two is right, nobody knows
    assert "1 noted: has a text that stands there with another label (row" in "\n".join(
        splits.report.lines()
    )


def test_questions_about_a_paragraph_stay_in_one_split(tmp_path):
    rows = [
        {"context": f"Paragraph {i // 3} says {i // 3}.", "question": f"What is {i}?",
         "answers": {"text": [str(i // 3)], "answer_start": [10]}}
        for i in range(300)
    ]  # fmt: skip
    path = save(tmp_path / "a.jsonl", rows)
    splits = load(path, validation_fraction=0.2, test_fraction=0.2, near_duplicate=1.0)
    check_books(splits)
    seen = [{row.fields["context"] for row in rows} for rows in parts(splits)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert [len(part) for part in parts(splits)] == [180, 60, 60]


def test_real_questions_in_squads_own_nested_file(real):
    path = real("squad_v2_cs224n_dev.json")
    splits = load(path, near_duplicate=1.0)
    check_books(splits)
    report = splits.report
    assert (report.form, report.read) == ("reading", 6078)
    rows = [row for part in parts(splits) for row in part]
    assert sum(row.completion == " unanswerable" for row in rows) == pytest.approx(3168, abs=5)
    assert all(row.soft.keep for row in rows if row.completion != " unanswerable")


def test_real_quotes(real):
    splits = load(real("quotable_2127.json"), columns="quote=content author=author")
    report = splits.report
    assert (splits.form, report.read, report.empty_optional) == ("quotes", 2_127, {"tags": 16})
    assert report.exact_duplicates >= 4 and report.kept >= 2_100
    assert report.unused_columns == ["_id"]
    quotes = [normalise(row.fields["quote"]) for part in parts(splits) for row in part]
    assert len(set(quotes)) == len(quotes)
    check_books(splits)


def test_real_instructions_with_an_odd_row(real):
    splits = load(real("instructions_toolformer.json"))
    assert (splits.form, splits.report.read) == ("instruction", 2_396)
    assert splits.report.extra_keys == 1 and splits.report.empty_optional == {"input": 1_959}
    assert not any("example_input" in row.fields for row in splits.train)
    check_books(splits)


def test_real_sentiment_files(real):
    splits = load(
        real("sst2_train_8000.tsv"),
        columns="prompt=sentence completion=label",
        test=str(real("sst2_dev_872.tsv")),
    )
    assert (splits.report.read, splits.form) == (8_872, "prompt-completion")
    assert {row.completion for row in splits.train} == {"0", "1"}
    owners = [{normalise(row.prompt) for row in part} for part in parts(splits)]
    assert len(set.union(*owners)) == sum(map(len, owners))
    check_books(splits)
