"""A metric and a way to generate of one's own go through the same evaluation and comparison."""

import pytest

from gemmate_lib import evaluation
from gemmate_lib.config import GemmateError
from gemmate_lib.evaluate import (
    changed_most,
    compare_models,
    evaluate_texts,
    register_metric,
)

ARTICLES = [
    f"The {place} of {town} was built in {year}. It rained on the day it opened."
    for place, town, year in (
        ("mill", "Marlow", 1753), ("chapel", "Oshima", 1772), ("cabin", "Norvik", 1920),
        ("harbour", "Ashford", 1709), ("school", "Juniper", 1840), ("bridge", "Redstone", 1888),
    )
]  # fmt: skip
SUMMARIES = [text.partition(".")[0] + "." for text in ARTICLES]


def first_sentence(prompts):
    return [prompt.partition(".")[0] + "." for prompt in prompts]


def last_sentence(prompts):
    return ["It rained." if "Marlow" not in p else p.partition(".")[0] + "." for p in prompts]


@pytest.fixture
def years(monkeypatch):
    """Whether a summary keeps the year: a metric of the user's own."""
    for table in ("METRICS", "HIGHER_IS_BETTER"):
        monkeypatch.setattr(evaluation, table, dict(getattr(evaluation, table)))
    monkeypatch.setattr("gemmate_lib.evaluate.METRICS", evaluation.METRICS)

    def kept(predictions, references):
        return [r.split()[-1] in p for p, r in zip(predictions, references, strict=True)]

    register_metric("year_kept", kept)
    return kept


def test_a_summary_is_measured_by_the_users_own_metric(years):
    good = evaluate_texts(first_sentence, ARTICLES, SUMMARIES, metrics=["year_kept", "rougeL"])
    bad = evaluate_texts(last_sentence, ARTICLES, SUMMARIES, metrics=["year_kept", "rougeL"])
    assert good.per_row["year_kept"] == [1.0] * 6 and bad.per_row["year_kept"] == [1.0] + [0.0] * 5
    assert good.metrics["year_kept"].n == 6 and good.metrics["year_kept"].low > 0.5  # Wilson's
    assert good.metrics["rougeL"].value == 1
    found = compare_models(bad, good)["year_kept"]
    assert (found.wins, found.losses, found.ties) == (5, 0, 1)
    assert found.higher_is_better and found.difference.value == pytest.approx(5 / 6)


def test_what_changed_most_stands_side_by_side(years):
    pair = [
        evaluate_texts(generate, ARTICLES, SUMMARIES, metrics=["year_kept"])
        for generate in (last_sentence, first_sentence)
    ]
    rows = changed_most(*pair, "year_kept", n=3)
    assert [row["prompt"] for row in rows] == ARTICLES[1:4]
    assert rows[0]["before"] == "It rained." and rows[0]["after"] == SUMMARIES[1]
    assert rows[0]["year_kept"] == (0.0, 1.0)
    assert len(changed_most(*pair, "year_kept")) == 5  # what did not change is no example
    with pytest.raises(GemmateError, match=r"There is no metric 'year'. Did you mean 'year_kept'"):
        changed_most(*pair, "year")


def test_other_rows_are_not_compared():
    one = evaluate_texts(first_sentence, ARTICLES, SUMMARIES)
    other = evaluate_texts(first_sentence, ARTICLES[1:], SUMMARIES[1:])
    with pytest.raises(GemmateError, match="rows, tokens or limits differ"):
        compare_models(one, other)
    with pytest.raises(GemmateError, match="rows, tokens or limits differ"):
        changed_most(one, other, "rougeL")


def test_names_are_not_taken_twice(years):
    for name in ("rougeL", "accuracy", "memorised"):
        with pytest.raises(GemmateError, match=f"There is a metric '{name}' already"):
            register_metric(name, years)
    register_metric("year_kept", years, higher_is_better=False)  # one's own, changed
    assert evaluation.HIGHER_IS_BETTER["year_kept"] is False


@pytest.mark.parametrize(
    ("generate", "references", "said"),
    [
        (lambda prompts: prompts[1:], SUMMARIES, "6 prompts, 6 references, 5 texts"),
        (first_sentence, SUMMARIES[1:], "6 prompts, 5 references, 6 texts"),
        (lambda prompts: [None] * len(prompts), SUMMARIES, "The text for prompt 0 is none"),
    ],
)
def test_what_generates_must_answer_each_prompt(generate, references, said):
    with pytest.raises(GemmateError, match=said):
        evaluate_texts(generate, ARTICLES, references)


def test_a_metric_must_give_a_number_a_row(years, monkeypatch):
    register_metric("broken", lambda predictions, references: [1.0])
    with pytest.raises(GemmateError, match="broken gave 1 numbers for 6 texts"):
        evaluate_texts(first_sentence, ARTICLES, SUMMARIES, metrics=["broken"])
    with pytest.raises(GemmateError, match=r"There is no metric 'rougel'. Did you mean 'rouge"):
        evaluate_texts(first_sentence, ARTICLES, SUMMARIES, metrics=["rougel"])


@pytest.mark.parametrize("name", sorted(evaluation.METRICS))
def test_every_metric_of_ours_gives_a_number_a_row(name):
    found = evaluate_texts(last_sentence, ARTICLES, SUMMARIES, metrics=[name])
    assert len(found.per_row[name]) == 6
    assert found.per_row[name][0] >= max(found.per_row[name][1:])  # the one that is right
