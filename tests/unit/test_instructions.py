"""Instructions as they are published: odd keys, placeholders, empty outputs; plain and chat."""

import json

import pytest

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import encode, load_dataset_splits
from gemmate_lib.forms import says_nothing
from gemmate_lib.models import load_tokenizer

TOKENIZER = load_tokenizer("tiny-gemma", None)
ASKED = {"instruction": "Name three colours.", "input": "", "output": "red, blue, green"}


def load(path, tokenizer=TOKENIZER, **settings):
    config = DatasetConfig(id=str(path), max_length=1_000, **settings)
    return load_dataset_splits(config, tokenizer=tokenizer)


def save(tmp_path, rows):
    plain = [
        {"instruction": f"Write {i} in words.", "input": f"number {i}", "output": f"it is {i * i}"}
        for i in range(30)
    ]
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps([*plain, *rows]))
    return path


def every(splits):
    return [*splits.train, *splits.validation, *splits.test]


def learnt(row, tokenizer=TOKENIZER):
    ids = encode(row, tokenizer, max_length=1_000, over_long="drop")
    return ids, tokenizer.decode([token for token in ids.labels if token != -100])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<noinput>", True), ("<noInput>", True), (" < no input >\n", True), ("No input", True),
        ("<nooutput>", True), ("", False), ("<noinput> twice", False), ("input", False),
        (None, False), (["<noinput>"], False),
    ],
)  # fmt: skip
def test_a_placeholder_is_told_from_text(text, said):
    assert says_nothing(text) is said


def test_the_mess_is_read_and_reported(tmp_path):
    odd = [
        ASKED | {"input": "<noinput>"},
        ASKED | {"instruction": "Reverse: a b", "output": ""},
        ASKED | {"instruction": "Count to 2.", "output": "<nooutput>"},
        ASKED | {"instruction": "Name a tree.", "output": "an oak", "example_input": "a wood"},
        {"instruction": "Name a bird.", "output": "a wren"},
        {"instruction": "Name a river.", "input": "", "output": None},
    ]
    report = load(save(tmp_path, odd)).report
    assert (report.form, report.read, report.kept) == ("instruction", 36, 33)
    assert report.examples["placeholders"] == [30] and report.examples["extra_keys"] == [33]
    assert report.examples["empty"] == [31, 32] and report.examples["missing_field"] == [35]
    assert report.empty_optional == {"input": 3}
    said = "\n".join(report.lines())
    assert "1 noted: an extra key (row 33)" in said
    assert "1 noted: an input that says it is none, as <noinput>, is read as none (row 30)" in said
    assert "2 dropped: empty text (row 31, 32)" in said


def test_a_placeholder_is_never_shown_to_the_model(tmp_path):
    rows = every(load(save(tmp_path, [ASKED | {"input": "<noinput>"}])))
    assert len(rows) == 31
    assert not any("noinput" in row.prompt for row in rows)
    assert "Instruction: Name three colours.\nResponse:" in [row.prompt for row in rows]


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_is_on_the_completion_only(tmp_path, chat):
    end = "<end_of_turn><eos>" if chat else "<eos>"
    for row in every(load(save(tmp_path, [ASKED]), chat=chat)):
        ids, text = learnt(row)
        assert text == ("" if chat else " ") + row.fields["output"] + end
        assert ids.input_ids.count(TOKENIZER.bos_token_id) == 1
        assert ids.input_ids[0] == TOKENIZER.bos_token_id
        first = next(i for i, label in enumerate(ids.labels) if label != -100)
        assert ids.labels[first:] == ids.input_ids[first:] and set(ids.labels[:first]) == {-100}


def test_a_chat_is_what_the_tokenizers_own_template_writes(tmp_path):
    for row in every(load(save(tmp_path, [ASKED]), chat=True)):
        asked = "\n\n".join(filter(None, [row.fields["instruction"], row.fields["input"]]))
        turns = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": row.fields["output"]},
        ]
        whole = TOKENIZER.apply_chat_template(turns, tokenize=True, return_dict=False)
        ids, _ = learnt(row)
        # The template ends the turn with a newline; a row ends with eos instead.
        newline = TOKENIZER("\n", add_special_tokens=False)["input_ids"]
        assert ids.input_ids == [*whole[: -len(newline)], TOKENIZER.eos_token_id]


def test_a_chat_needs_a_template(tmp_path):
    with pytest.raises(GemmateError, match="chat template"):
        load(save(tmp_path, []), tokenizer=None, chat=True)


def test_real_instructions_are_read_both_ways(real):
    path = real("instructions_toolformer.json")
    plain, chat = load(path), load(path, chat=True)
    for splits in (plain, chat):
        assert splits.report.read == 2_396
        assert splits.report.extra_keys == 1 and splits.report.examples["extra_keys"] == [1_486]
        assert not any("example_input" in row.fields for row in every(splits))
        for row in every(splits)[:200]:
            ids, text = learnt(row)
            assert ids.input_ids.count(TOKENIZER.bos_token_id) == 1
            assert (
                text.removesuffix("<eos>").removesuffix("<end_of_turn>").strip()
                == (row.fields["output"])
            )
    assert "1 noted: an extra key (row 1486)" in plain.report.lines()
