"""The twins of SST-2 and SQuAD v2: their columns, and a best score that holds."""

import random
import re
from collections import Counter

import pytest

from gemmate_lib.cards import read_card, verify
from gemmate_lib.floors import baselines, twin_floors
from gemmate_lib.forms import render
from gemmate_lib.splitting import normalise
from gemmate_lib.tiny import twins
from gemmate_lib.tiny.sayings import world
from gemmate_lib.tiny.tasks import opinion


@pytest.mark.parametrize("name", ["tiny_reviews", "tiny_questions"])
def test_a_twin_is_as_its_card_says(name):
    rows = getattr(twins, name)()
    verify(read_card(name), rows)
    assert rows == getattr(twins, name)(2006) != getattr(twins, name)(2007)


def test_no_review_or_paragraph_comes_twice():
    assert max(Counter(normalise(r["sentence"]) for r in twins.tiny_reviews()).values()) == 1
    assert max(Counter(r["context"] for r in twins.tiny_questions()).values()) == 1


def test_both_labels_are_common_and_some_reviews_tell_nothing():
    rows = twins.tiny_reviews()
    assert 0.45 < sum(r["label"] for r in rows) / len(rows) < 0.55
    unsure = [r for r in rows if twins.positive_chance(r["sentence"]) is not None]
    assert 0.03 < len(unsure) / len(rows) < 0.09


def test_a_review_that_tells_is_not_taken_for_lukewarm():
    rng = random.Random(5)
    for _ in range(3000):
        text, _ = opinion(rng)
        assert twins.positive_chance(text) is None


def test_the_ceiling_is_what_the_ideal_reader_gets():
    """Lukewarm reviews are drawn anew in great number; the share of positive ones is as said."""
    drawn = [r for seed in range(40) for r in twins.tiny_reviews(seed)]
    chances = [twins.positive_chance(r["sentence"]) for r in drawn]
    for _, share in twins.LUKEWARM:
        labels = [r["label"] for r, c in zip(drawn, chances, strict=True) if c == share]
        assert len(labels) > 200
        assert sum(labels) / len(labels) == pytest.approx(share, abs=0.1)
    right = [
        r["label"] == (c >= 0.5) if c is not None else True
        for r, c in zip(drawn, chances, strict=True)
    ]
    ceiling = twins.accuracy_ceiling([r["sentence"] for r in drawn])
    assert sum(right) / len(right) == pytest.approx(ceiling, abs=0.003) and 0.95 < ceiling < 0.995


def test_an_answer_stands_where_it_is_said_to():
    rows = twins.tiny_questions()
    none = [r for r in rows if not r["answers"]["text"]]
    assert 0.3 < len(none) / len(rows) < 0.4
    for row in rows:
        for text, start in zip(*row["answers"].values(), strict=True):
            assert row["context"].startswith(text, start)


def pattern(template):
    """A template as a regular expression; no slot is filled with a full stop in it."""
    return re.compile("[^.?]+".join(re.escape(part) for part in re.split(r"{[^}]+}", template)))


def test_a_question_has_an_answer_where_the_paragraph_states_its_fact():
    """By another road: the question's template is recognised, then its statement looked for."""
    facts = [(pattern(s), [pattern(q) for q in asked]) for s, asked in world()["facts"]]
    for row in twins.tiny_questions():
        told = [
            statement
            for statement, asked in facts
            if any(question.fullmatch(row["question"]) for question in asked)
        ]
        assert told
        assert any(s.search(row["context"]) for s in told) == bool(row["answers"]["text"])


def test_a_rule_that_knows_the_grammar_finds_every_answer_it_should():
    births = [r for r in twins.tiny_questions() if r["question"].startswith("When was ")
              and r["question"].endswith(" born?")]  # fmt: skip
    assert len(births) > 40
    for row in births:
        name = row["question"].split()[2]
        told = row["context"].partition(f"{name} was born in ")[2][:4]
        assert ([told] if told else []) == row["answers"]["text"]


def rows_of(records, form):
    return [render(r, form, template=None, tokenizer=None, source_row=i,
                   labels={"0": "negative", "1": "positive"})
            for i, r in enumerate(records)]  # fmt: skip


def test_floors_are_known_for_the_twins_alone():
    reviews = rows_of(twins.tiny_reviews()[:300], "classification")
    assert 0.95 < twin_floors("tiny_reviews", reviews)["accuracy"] < 1
    assert twin_floors("tiny_questions", []) == {"exact": 1.0, "f1": 1.0}
    assert twin_floors("sst2", reviews) == {}


def test_baselines_need_no_language_model():
    reviews = rows_of(twins.tiny_reviews(), "classification")
    found = baselines(reviews[:1900], reviews[1900:])
    truth = [row.fields["label"] for row in reviews[1900:]]
    assert len(set(found["majority"])) == 1
    share = sum(a == b for a, b in zip(found["tfidf"], truth, strict=True)) / len(truth)
    assert 0.75 < share < 0.97  # it reads words and pairs of words, not negation at a distance
    one = [row for row in reviews if row.fields["label"] == "positive"]
    assert list(baselines(one[:50], one[50:60])) == ["majority"]
