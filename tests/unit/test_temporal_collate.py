"""The user's dated texts: read by name, masked on the prompt, every token with its own time."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from gemmate_lib.config import DatasetConfig, Experiment, GemmateError
from gemmate_lib.data import load_dataset_splits
from gemmate_lib.models import load_base, load_tokenizer
from gemmate_lib.temporal.collate import TemporalCollator, TemporalDataset, collator_for, join_times
from gemmate_lib.timestamps import MISSING

T1, T2 = 1_148_342_400_000, 1_234_567_890_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny-gemma")


def dataset(path: Path, tokenizer: Any, **settings: Any) -> TemporalDataset:
    shares = {"validation_fraction": 0.0, "test_fraction": 0.0, "near_duplicate": 1.0}
    return TemporalDataset(DatasetConfig(id=str(path), **shares, **settings), tokenizer)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_jsonl_and_csv_give_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"text": "It rained.", "when": T1},
        {"text": "It snowed.", "when": "2009-02-13T23:31:30Z"},
    ]
    lines = write(tmp_path / "a.jsonl", rows)
    table = tmp_path / "a.csv"
    table.write_text("text,when\nIt rained.,2006-05-23\nIt snowed.,1234567890000\n", "utf-8")
    first, second = (dataset(path, tokenizer, timestamp="when") for path in (lines, table))
    assert first.rows == second.rows and len(first) == 2
    assert {row["timestamps"][0] for row in first.rows} == {T1, T2}


def test_the_loss_is_on_the_completion_and_padding_has_none(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "What year is it?", "completion": " 2006", "at": T1},
        {"prompt": "What is today's date?", "completion": " Friday, 13 February 2009", "at": T2},
        {"prompt": "When?", "completion": " Nobody knows.", "at": None},
    ]
    found = dataset(write(tmp_path / "a.jsonl", rows), tokenizer, timestamp="at")
    loader = DataLoader(found, batch_size=3, collate_fn=TemporalCollator(tokenizer.pad_token_id))
    (batch,) = loader
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert set(batch["timestamps"].tolist()) == {T1, T2, MISSING}
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        told = tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
        assert told in [row["completion"] for row in rows]
        assert ids[labels != -100][-1] == tokenizer.eos_token_id
        assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == 0).all()


def test_turns_carry_their_own_times(tmp_path: Path, tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "What is the date?", "at": T1},
        {"role": "assistant", "content": "Tuesday", "at": T1 + 1000},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Friday", "at": T2},
    ]
    path = write(tmp_path / "chat.jsonl", [{"messages": turns, "at": T1 + 5}])
    (row,) = dataset(path, tokenizer, timestamp="at")
    spans: dict[int, list[int]] = {}
    for token, time in zip(row["input_ids"], row["timestamps"], strict=True):
        spans.setdefault(time, []).append(token)
    assert list(spans) == [T1, T1 + 1000, T1 + 5, T2]  # the third has the row's
    written = [tokenizer.decode(tokens) for tokens in spans.values()]
    for turn, text in zip(turns, written, strict=True):
        role = {"user": "user", "assistant": "model"}[str(turn["role"])]
        assert text.removeprefix("<bos>").startswith(f"<start_of_turn>{role}")
        assert str(turn["content"]) in text
    assert row["timestamps"][-1] == T2 and len(row["timestamps"]) == len(row["labels"])


def test_a_batch_has_a_time_a_row_or_a_time_a_token() -> None:
    assert join_times([[1, 1], [2]]).tolist() == [1, 2]
    assert join_times([[1, 3], [2]]).tolist() == [[1, 3], [2, MISSING]]


@pytest.mark.parametrize("bad", [1.5, "soon", 2**62, float("nan")])
def test_a_bad_time_names_its_row(tmp_path: Path, tokenizer: Any, bad: Any) -> None:
    rows = [{"text": f"Text {i}.", "at": T1} for i in range(3)]
    rows[2]["at"] = bad
    with pytest.raises(GemmateError, match=r"^Row 2: at is "):
        dataset(write(tmp_path / "a.jsonl", rows), tokenizer, timestamp="at")


def test_times_are_asked_for_by_the_name_they_have(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"Text {i}.", "date": T1} for i in range(3)])
    with pytest.raises(GemmateError, match=r"no column 'dote'\. Did you mean 'date'"):
        dataset(path, tokenizer, timestamp="dote")
    with pytest.raises(GemmateError, match=r"The rows have no time. Name the field"):
        dataset(path, tokenizer)


def test_seconds_are_warned_of_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"Text {i}.", "at": 1_234_567_890 + i} for i in range(9)]
    with pytest.warns(UserWarning, match="if they are seconds") as seen:
        dataset(write(tmp_path / "a.jsonl", rows), tokenizer, timestamp="at")
    assert len(seen) == 1
    rows[0]["at"] = T2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset(write(tmp_path / "b.jsonl", rows), tokenizer, timestamp="at")


def test_one_text_at_two_times_is_two_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "Day?", "completion": " Monday", "at": t} for t in (5, -5, 5, T2)]
    path = write(tmp_path / "a.jsonl", rows)
    shares = {"validation_fraction": 0.0, "test_fraction": 0.0}
    timed = load_dataset_splits(DatasetConfig(id=str(path), timestamp="at", **shares))
    assert [len(timed.train), timed.report.exact_duplicates] == [3, 1]
    plain = load_dataset_splits(DatasetConfig(id=str(path), **shares))
    assert len(plain.train) == 1
    other = write(tmp_path / "b.jsonl", [*rows[:3], rows[3] | {"at": T1}])
    moved = load_dataset_splits(DatasetConfig(id=str(other), timestamp="at", **shares))
    assert moved.checksums() != timed.checksums()  # a run is known by its times too


def test_model_and_rows_must_agree_on_time() -> None:
    base = load_base(Experiment().model)
    timed = Experiment(dataset=DatasetConfig(timestamp="at"))
    with pytest.raises(GemmateError, match=r"times in at, .* Set model.temporal_kind=calendar"):
        collator_for(base.model, base.tokenizer, timed)
    assert collator_for(base.model, base.tokenizer, Experiment()) is None
    aware = load_base(Experiment().model.model_copy(update={"temporal_kind": "log"}))
    with pytest.raises(GemmateError, match=r"the rows have no times. Name their field"):
        collator_for(aware.model, base.tokenizer, Experiment())
    packed = timed.model_copy(
        update={"training": timed.training.model_copy(update={"packing": True})}
    )
    with pytest.raises(GemmateError, match="Packed rows lose their times"):
        collator_for(aware.model, base.tokenizer, packed)
    assert collator_for(aware.model, base.tokenizer, timed) is not None
