"""Labels and spans: from what a model writes, and how likely it holds each answer, to a score."""

import json
import math

import numpy as np
import pytest

from gemmate_lib.forms import render
from gemmate_lib.generate import Completion
from gemmate_lib.models import load_tokenizer
from gemmate_lib.predictions import Asker, predict_labels, predict_spans

LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-gemma")


def asker(tokenizer, answer, score=lambda row: 0.0, max_length=96):
    def write(prompts, *, max_new_tokens, timestamps):
        return [Completion(p, answer(p), 3, stopped=True) for p in prompts]

    def scores(rows):
        return np.array([score(row) for row in rows])

    return Asker(write, scores, tokenizer, max_length, 16)


def review(text, label, number=0):
    record = {"sentence": text, "label": label}
    return render(record, "classification", template=None, tokenizer=None, source_row=number)


def question(context, *answers, number=0):
    starts = [context.find(answer) for answer in answers]
    record = {"context": context, "question": "Who was it?",
              "answers": {"text": list(answers), "answer_start": starts}}  # fmt: skip
    return render(record, "reading", template=None, tokenizer=None, source_row=number)


def test_a_label_is_right_wrong_or_none_at_all(tokenizer):
    said = {"good": ' {"label": "positive"}', "bad": ' {"label": "positive"}', "odd": " Well."}
    rows = [review(text, "negative" if text == "bad" else "positive") for text in said]
    found = predict_labels(
        rows, asker(tokenizer, lambda p: said[p[8:].split("\n")[0]]), labels=LABELS
    )
    assert [r["accuracy"] for r in found] == [True, False, False]
    assert [r["predicted"] for r in found] == ["positive", "positive", None]
    assert [r["unparsed"] for r in found] == [False, False, True]
    assert [r["expected"] for r in found] == ["positive", "negative", "positive"]


def test_probabilities_are_those_of_whole_answers(tokenizer):
    scores = {' {"label": "negative"}': math.log(0.02), ' {"label": "positive"}': math.log(0.06)}
    rows = [review("good", "positive")]
    found = predict_labels(
        rows, asker(tokenizer, str, lambda row: scores[row.completion]), labels=LABELS
    )
    assert found[0]["probabilities"] == pytest.approx({"negative": 0.25, "positive": 0.75})


def test_the_cut_of_a_review_does_not_tell_its_label(tokenizer):
    text = "a charming journey " * 20
    shown = [
        predict_labels([review(text, label)], asker(tokenizer, str, max_length=40), labels=LABELS)
        for label in LABELS
    ]
    assert shown[0][0]["prompt"] == shown[1][0]["prompt"]
    assert shown[0][0]["prompt"].endswith("\nOutput:") and len(shown[0][0]["prompt"]) < len(text)


def test_an_answer_is_scored_and_none_is_one(tokenizer):
    rows = [question("Ada met Ben.", "Ben"), question("Ada met Ben."), question("Ada.", "Ada")]
    said = iter([" the Ben", " unanswerable", " unanswerable"])
    found = predict_spans(rows, asker(tokenizer, lambda p: next(said), lambda r: math.log(0.2)))
    assert [r["answer"] for r in found] == ["the Ben", "", ""]
    assert [r["exact"] for r in found] == [True, True, False]
    assert [r["f1"] for r in found] == [1, 1, 0]
    assert [r["no_answer"] for r in found] == pytest.approx([0.2] * 3)
    assert [r["windows"] for r in found] == [1, 1, 1] and found[0]["golds"] == ["Ben"]


def test_the_window_that_is_surest_answers(tokenizer):
    """A long paragraph names Zoe at its end; other windows answer too, or see nothing."""
    context = "Ada met Ben. " + "It rained on the town all day. " * 30 + "Then Zoe came."
    rows = [question(context, "Zoe"), question("Ada.", "Ada", number=1)]

    def answer(prompt):
        return " Zoe" if "Zoe" in prompt else " Ben" if "Ben" in prompt else " unanswerable"

    def score(row):
        return math.log(0.1 if "Zoe" in row.prompt else 0.3 if "Ben" in row.prompt else 0.9)

    found = predict_spans(rows, asker(tokenizer, answer, score, max_length=128))
    assert len(found) == 2 and found[0]["windows"] > 3
    assert found[0]["answer"] == "Zoe" and found[0]["exact"] and "Zoe" in found[0]["prompt"]
    assert found[0]["no_answer"] == pytest.approx(0.1)
    assert found[1]["answer"] == "" and found[1]["windows"] == 1


def test_a_surer_window_that_has_no_answer_gives_none(tokenizer):
    context = "Ada met Ben. " + "It rained on the town all day. " * 30

    def score(row):
        return math.log(0.4 if "Ben" in row.prompt else 0.2)

    def answer(prompt):
        return " Ben" if "Ben" in prompt else " unanswerable"

    found = predict_spans([question(context, "Ben")], asker(tokenizer, answer, score, 128))
    assert found[0]["answer"] == "Ben"  # of those that answer at all
    assert found[0]["no_answer"] == pytest.approx(0.2)
    assert json.dumps(found)  # it is written as JSON Lines
