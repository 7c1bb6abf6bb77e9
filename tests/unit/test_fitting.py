"""Rows that are too long: a review or paragraph is shortened, a question or answer never."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmate_lib.config import GemmateError
from gemmate_lib.forms import find_form, render
from gemmate_lib.models import load_tokenizer
from gemmate_lib.rows import encode, fit, windows

LABELS = {"0": "negative", "1": "positive"}
TEXT = """a charming and often affecting journey of the unflinchingly bleak and desperate kind that
allows us to hope for more of it , 日本 and é too , before it ends"""
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-gemma")


def review(text, label=1):
    record = {"sentence": text, "label": label}
    return render(record, "classification", template=None, tokenizer=None, source_row=3,
                  labels=LABELS)  # fmt: skip


def question(context, answer=None, start=0):
    answers = {"text": [answer] if answer else [], "answer_start": [start] if answer else []}
    record = {"context": context, "question": "Who was it?", "answers": answers}
    return render(record, "reading", template=None, tokenizer=None, source_row=5)


def test_a_review_asks_for_a_label_in_json():
    row = review("it 's a charming journey . ", 1)
    assert row.prompt == "Review: it 's a charming journey .\nOutput:"
    assert row.completion == ' {"label": "positive"}'
    assert find_form(["sentence", "label"], mapped=(), template=None)[0] == "classification"
    assert review("fine", -1) == "missing_field"  # GLUE hides the labels of its test split
    assert review("  ") == "empty"
    assert render({"sentence": "fine", "label": "good"}, "classification", template=None,
                  tokenizer=None, source_row=0).fields["label"] == "good"  # fmt: skip


def test_a_question_is_answered_by_words_of_its_context_or_not_at_all():
    row = question("Ada met Ben. Ben left.", "Ben", 13)
    assert row.prompt == "Context: Ada met Ben. Ben left.\nQuestion: Who was it?\nAnswer:"
    assert row.completion == " Ben" and json.loads(row.fields["golds"]) == ["Ben"]
    assert row.prompt[slice(*row.soft.keep)] == "Ben" and row.soft.keep[0] == 9 + 13
    assert question("Ada met Ben.", "Ben", 5).soft.keep == (17, 20)  # a wrong start is put right
    assert question("Ada met Ben.", "Cleo", 0).soft.keep is None
    none = question("Ada met Ben.")
    assert none.completion == " unanswerable" and json.loads(none.fields["golds"]) == []
    assert find_form(["context", "question", "answers"], mapped=(), template=None)[0] == "reading"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), st.integers(24, 90))
def test_a_review_is_cut_and_its_answer_is_not(words, limit):
    tokenizer, row = load_tokenizer("tiny-gemma"), review(" ".join(words))
    found = encode(row, tokenizer, max_length=limit, over_long="cut")
    whole = encode(row, tokenizer, max_length=10_000, over_long="cut")
    assert found.cut == (len(whole.input_ids) > limit) and len(found.input_ids) <= limit
    assert [x for x in found.labels if x != -100] == [x for x in whole.labels if x != -100]
    prompt = fit(row, tokenizer, max_length=limit).prompt
    assert prompt.startswith("Review: ") and prompt.endswith("\nOutput:")
    assert row.prompt[8:].startswith(prompt[8 : -len("\nOutput:")])
    if found.cut:  # no more is cut off than must be: a token or two where a cut splits one
        assert len(found.input_ids) >= limit - 2


def test_what_cannot_be_short_enough_is_cut_as_before(tokenizer):
    row = review("a charming journey")
    found = encode(row, tokenizer, max_length=6, over_long="cut")
    assert len(found.input_ids) == 6 and found.cut
    assert encode(row, tokenizer, max_length=6, over_long="drop") is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 59), st.integers(60, 120))
def test_the_window_for_training_holds_the_answer(place, limit):
    tokenizer = load_tokenizer("tiny-gemma")
    words = [WORDS[i % len(WORDS)] for i in range(60)]
    words[place] = "Zebedee"
    context = " ".join(words)
    row = question(context, "Zebedee", context.index("Zebedee"))
    short = fit(row, tokenizer, max_length=limit)
    assert len(encode(short, tokenizer, max_length=limit, over_long="drop").input_ids) <= limit
    assert short.prompt[slice(*short.soft.keep)] == "Zebedee"
    assert short.prompt[slice(*short.soft[:2])] in context
    assert short.prompt.endswith("\nQuestion: Who was it?\nAnswer:")
    shown = short.prompt[slice(*short.soft[:2])]
    if not context.startswith(shown) and not context.endswith(shown):  # in the middle
        start, end, keep = short.soft
        left, right = (
            len(tokenizer(short.prompt[part], add_special_tokens=False)["input_ids"])
            for part in (slice(start, keep[0]), slice(keep[1], end))
        )
        assert abs(left - right) <= 4  # tokens; characters that would be split are left out


def test_windows_show_all_of_a_paragraph(tokenizer):
    context = " ".join(f"{word}{i}" for i, word in enumerate(WORDS * 4))
    row = question(context)
    found = windows(row, tokenizer, max_length=90, stride=16)
    shown = [w.prompt[slice(*w.soft[:2])] for w in found]
    assert len(found) > 3 and all(text in context for text in shown)
    for w in found:
        assert encode(w, tokenizer, max_length=90, over_long="drop") is not None
    covered = 0
    for text in shown:
        at = context.index(text)
        assert at <= covered  # no gap, and some words twice
        covered = max(covered, at + len(text))
    assert covered == len(context)
    assert windows(question("Short."), tokenizer, max_length=90, stride=16) == [question("Short.")]
    with pytest.raises(GemmateError, match=r"Row 5 leaves .* tokens for its context. Raise"):
        windows(row, tokenizer, max_length=24, stride=16)
