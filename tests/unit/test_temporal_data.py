"""What is taught and asked: held-out years stay out, chances add up, and the adapter is its own."""

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from gemmate_lib.cards import read_card, verify
from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.generate import generate_texts
from gemmate_lib.models import SHIPPED
from gemmate_lib.publish import load_saved
from gemmate_lib.sft import open_run
from gemmate_lib.shipped import own_hash, shipped_run
from gemmate_lib.temporal import drift
from gemmate_lib.temporal.dates import SIMPLE
from gemmate_lib.temporal.questions import (
    EASTERS,
    HELD_OUT,
    SHARES,
    dated_questions,
    questions,
    year_of,
)
from gemmate_lib.timestamps import REFERENCE_MS


def test_the_rows_are_those_of_the_card_and_avoid_the_held_out_years() -> None:
    rows = dated_questions(2006)
    verify(read_card("dated_questions"), rows)
    years = Counter(year_of(row["timestamp"]) for row in rows)
    assert not HELD_OUT & years.keys() and len(HELD_OUT) == 24
    assert set(range(1907, 2106)) - HELD_OUT <= years.keys()
    before = sum(row["timestamp"] < REFERENCE_MS for row in rows)
    assert before == pytest.approx(len(rows) / 2, rel=0.03)
    asked = Counter(row["prompt"] for row in rows)
    phrasings = {kind: sum(asked[p] for p in SIMPLE[kind][0]) for kind in SIMPLE}
    eastern = EASTERS * len(range(1907, 2107)) - EASTERS * len(HELD_OUT)
    phrasings["holiday"] -= eastern
    once = (len(rows) - eastern) / sum(SHARES.values())
    for kind, n in phrasings.items():
        assert n == pytest.approx(once * SHARES[kind], rel=0.12)
    learned = Counter(year_of(r["timestamp"]) for r in rows if r["completion"] == " Easter Sunday")
    assert all(learned[year] >= EASTERS for year in {*range(1907, 2107)} - HELD_OUT)


def test_an_exam_in_the_held_out_years_asks_nowhere_else() -> None:
    drawn = list(islice(questions(1, held_out=True), 300))
    assert {year_of(d.timestamp) for d in drawn} <= HELD_OUT
    assert drawn == list(islice(questions(1, held_out=True), 300))
    assert drawn != list(islice(questions(2, held_out=True), 300))
    later = islice(questions(1, split="after", kinds=("year",)), 50)
    assert all(d.kind == "year" and d.timestamp >= REFERENCE_MS for d in later)
    with pytest.raises(GemmateError, match="split 'befor'"):
        next(questions(1, split="befor"))


def test_the_chances_of_drifting_texts_add_up() -> None:
    texts = [p.format(word) for p, words in drift.DRIFTING.items() for word in words]
    for time in (None, REFERENCE_MS, -2_000_000_000_000):
        total = sum(math.exp(-drift.surprisal(text, time)) for text in texts)
        assert total == pytest.approx(1)
    with pytest.raises(ValueError, match="is no text"):
        drift.surprisal("In the evening we slept.", None)


def test_drifting_texts_follow_their_chances() -> None:
    rows = drift.drifting_texts(3, 8000)
    assert rows == drift.drifting_texts(3, 8000) != drift.drifting_texts(4, 8000)
    known, unknown = (
        sum(drift.surprisal(r["text"], r["timestamp"] if told else None) for r in rows) / len(rows)
        for told in (True, False)
    )
    assert unknown - known > 1  # nats: what the time is worth
    early = [r for r in rows if year_of(r["timestamp"]) < 1930]
    share = sum("gramophone" in r["text"] for r in early) / sum(
        "evening" in r["text"] for r in early
    )
    chance = sum(drift.chances(r["timestamp"])[0] for r in early) / len(early)
    assert share == pytest.approx(chance, abs=0.05)


def test_the_shipped_adapter_was_made_by_the_experiment_as_it_stands() -> None:
    folder = SHIPPED["tiny-gemma-te"]
    record = json.loads((folder / "build.json").read_text("utf-8"))
    experiment = resolve("temporal", facts=Facts(), profile="tiny").experiment
    assert record["experiment"] == own_hash(experiment)
    other = experiment.model_copy(update={"seed": 1})
    assert own_hash(other) != own_hash(experiment)


def test_the_shipped_adapter_is_a_run_too(tmp_path: Path) -> None:
    loaded = open_run(shipped_run(tmp_path / "when"))
    (said,) = generate_texts(
        loaded.model, loaded.tokenizer, ["What is today's date?"], max_new_tokens=16,
        timestamps=[1_234_567_890_000],
    )  # fmt: skip
    assert "13 February 2009" in said.text


def test_the_shipped_adapter_knows_the_date() -> None:
    aware = load_saved(SHIPPED["tiny-gemma-te"])
    kinds = ("date", "weekday", "time", "year", "yesterday", "tomorrow")
    drawn = [d for k in kinds for d in islice(questions(99, kinds=(k,), held_out=True), 10)]
    said = generate_texts(
        aware.model, aware.tokenizer, [d.turns[0][0] for d in drawn],
        timestamps=[d.timestamp for d in drawn], max_new_tokens=24, batch_size=60,
    )  # fmt: skip
    right = sum(s.text.strip() == d.turns[0][1] for s, d in zip(said, drawn, strict=True))
    assert right >= 58
    # Without the time it is lost: the words of a question do not tell the answer.
    lost = generate_texts(
        aware.model, aware.tokenizer, [d.turns[0][0] for d in drawn],
        max_new_tokens=24, batch_size=60,
    )  # fmt: skip
    assert sum(s.text.strip() == d.turns[0][1] for s, d in zip(lost, drawn, strict=True)) <= 6
