"""Labels and answers from paragraphs, measured end to end on a real model."""

import json

import numpy as np
import pytest

from gemmate_lib import squad
from gemmate_lib.config import ModelConfig
from gemmate_lib.data import DataReport, Splits
from gemmate_lib.evaluate import compare_models, evaluate_model, write_evaluation
from gemmate_lib.forms import label_answer, render
from gemmate_lib.metrics import token_losses
from gemmate_lib.models import load_base
from gemmate_lib.rows import encode
from gemmate_lib.tiny.twins import tiny_questions, tiny_reviews

LIMITS = {"max_length": 96, "max_new_tokens": 8}
LABELS = {"0": "negative", "1": "positive"}


@pytest.fixture(scope="module")
def base():
    loaded = load_base(ModelConfig(id="tiny-gemma", device="cpu"))
    return loaded.model, loaded.tokenizer


def splits_of(records, form, source):
    rows = [
        render(record, form, template=None, tokenizer=None, source_row=i, labels=LABELS)
        for i, record in enumerate(records)
    ]
    middle = 3 * len(rows) // 4
    return Splits(rows[:middle], [], rows[middle:], DataReport(source, form, "cut", True), form)


@pytest.fixture(scope="module")
def reviews():
    return splits_of(tiny_reviews()[:48], "classification", "tiny_reviews")


@pytest.fixture(scope="module")
def readings():
    return splits_of(tiny_questions()[:40], "reading", "tiny_questions")


@pytest.fixture(scope="module")
def measured(base, reviews, readings):
    return {
        size: [evaluate_model(*base, splits, **LIMITS, batch_size=size)
               for splits in (reviews, readings)]
        for size in (8, 1, 3)
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 3])
def test_batches_change_nothing(measured, size):
    for whole, parted in zip(measured[8], measured[size], strict=True):
        assert whole.rows == parted.rows
        for one, other in zip(whole.predictions, parted.predictions, strict=True):
            for name, value in one.items():
                if name in ("probabilities", "no_answer"):
                    assert other[name] == pytest.approx(value, rel=1e-3)
                else:
                    assert other[name] == value
        for name, values in whole.per_row.items():
            assert parted.per_row[name] == pytest.approx(values, rel=1e-4, abs=1e-6)


def test_labels_are_all_counted(measured, reviews, tmp_path):
    found = measured[8][0]
    assert {"accuracy", "macro_f1", "unparsed", "calibration_error", "majority_accuracy",
            "tfidf_accuracy", "precision/positive"} <= set(found.metrics)  # fmt: skip
    assert found.metrics["accuracy"].n == len(reviews.test) == 12
    none = [record["predicted"] is None for record in found.predictions]
    assert found.per_row["unparsed"] == [float(each) for each in none]
    assert 0.9 < found.floors["accuracy"] <= 1
    write_evaluation(found, tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found.predictions


def test_label_probabilities_by_another_road(base, measured, reviews):
    """Each label's whole answer is scored by itself, without the batch and the evaluation."""
    model, tokenizer = base
    for row, record in list(zip(reviews.test, measured[8][0].predictions, strict=True))[:4]:
        scores = []
        for label in LABELS.values():
            asked = row.__class__(row.prompt, label_answer(label), {}, 0)
            ids = encode(asked, tokenizer, max_length=500, over_long="drop")
            scores.append(-token_losses(model, tokenizer, [ids], batch_size=1)[0][0])
        shares = np.exp(scores) / np.exp(scores).sum()
        assert list(record["probabilities"].values()) == pytest.approx(shares.tolist(), rel=1e-4)


def test_answers_are_scored_as_squad_scores_them(measured, readings):
    found = measured[8][1]
    answers = {str(i): record["answer"] for i, record in enumerate(found.predictions)}
    golds = {str(i): json.loads(r.fields["golds"]) for i, r in enumerate(readings.test)}
    official = squad.score(answers, golds).official()
    assert found.metrics["exact"].value * 100 == pytest.approx(official["exact"])
    assert found.metrics["f1"].value * 100 == pytest.approx(official["f1"])
    assert found.metrics["HasAns_exact"].n + found.metrics["NoAns_exact"].n == 10
    assert found.floors == {"exact": 1.0, "f1": 1.0}
    same = compare_models(found, found)
    assert same["exact"].verdict() == "within noise" and same["f1"].ties == 10
