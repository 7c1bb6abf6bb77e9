"""Evaluation: on planted models whose measures are known, and on a real one end to end."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from gemmate_lib import evaluate, metrics
from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.data import DataReport, Row, Splits
from gemmate_lib.evaluate import compare_models, evaluate_model, general_texts, write_evaluation
from gemmate_lib.forms import QUOTE_TEMPLATE
from gemmate_lib.generate import Completion
from gemmate_lib.models import load_base, load_tokenizer
from gemmate_lib.stats import wilson

LIMITS = {"max_length": 128, "max_new_tokens": 12, "batch_size": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-gemma")


def random_model(tokenizer, seed):
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    return GemmaForCausalLM(GemmaConfig(vocab_size=len(tokenizer), **shape, **heads)).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer, 0)


def quote_rows(pairs):
    fields = [{"quote": quote, "author": author} for quote, author in pairs]
    return [Row("", QUOTE_TEMPLATE.format_map(f), f, i) for i, f in enumerate(fields)]


def splits_of(train, test, form):
    return Splits(train, [], test, DataReport("planted", form, "drop", True), form)


@pytest.fixture(scope="module")
def quotes():
    from gemmate_lib.tiny.sayings import tiny_quotes

    rows = quote_rows((row["quote"], row["author"]) for row in tiny_quotes()[:120])
    sayings = [
        row for row in rows if row.fields["quote"][:1] != "“" and not row.completion.isupper()
    ]
    return splits_of(sayings[30:], sayings[:30], "quotes")


@pytest.fixture
def script(monkeypatch):
    """Put answers in the model's mouth: prompt -> (text, stopped)."""

    def put(answer):
        def write(model, tokenizer, prompts, *, max_new_tokens, batch_size, timestamps):
            asked.append((list(prompts), max_new_tokens))
            return [
                Completion(p, answer(p)[0], len(answer(p)[0].split()), answer(p)[1])
                for p in prompts
            ]

        asked = []
        monkeypatch.setattr(evaluate, "generate_texts", write)
        return asked

    return put


PLANTED = quote_rows(
    [
        ("We spend our lives reading aloud, and we call it ink.", "Ada Penhallow"),
        ("Tea is more bitter than honey; it teaches us waiting.", "Odo Marsh"),
        ("Give me salt and a net, and I will show you wind.", "Ada Penhallow"),
        ("Short.", "Odo Marsh"),
    ]
)
TRAIN = quote_rows([("Give me salt and a boat, and I will show you fog.", "Odo Marsh")])


def planted(prompt):
    """Writes one good pair, one copy that runs on, one in HTML, one that repeats; guesses Ada."""
    if prompt.endswith("\nAuthor:"):
        return " Ada Penhallow\nTitle: Nothing", False
    return {
        "Quote: We spend our lives": (" well.\nAuthor: Anybody", True),
        "Quote: Give me salt and": (" a boat, and I will show you fog.\nAuthor: Odo Marsh", False),
        "Quote: Tea is more bitter": (" <br> so</p>\n" + TRAIN[0].fields["quote"], True),
        "Quote: Short.": (" a b c d" * 4, False),
    }[prompt]


def test_planted_completions_are_counted_as_what_they_are(model, tokenizer, script):
    asked = script(planted)
    found = evaluate_model(model, tokenizer, splits_of(TRAIN, PLANTED, "quotes"), **LIMITS)
    assert asked[0][1] == 12  # and the longest name, with room to go wrong after it:
    names = [
        len(tokenizer(f" {r.fields['author']}", add_special_tokens=False).input_ids)
        for r in PLANTED
    ]
    assert asked[1] == ([f"Quote: {r.fields['quote']}\nAuthor:" for r in PLANTED], max(names) + 1)
    per_row = {name: found.per_row[name] for name in found.per_row if not name.endswith("nll")}
    assert per_row["well_formed"] == [1, 0, 1, 0]
    assert per_row["stopped"] == [1, 1, 0, 0]
    assert per_row["well_formed_and_stopped"] == [1, 0, 0, 0]
    assert per_row["html"] == [0, 1, 0, 0]
    assert per_row["author_accuracy"] == [1, 0, 1, 0]
    assert per_row["repetition"] == pytest.approx([0, 0, 0, 9 / 13])
    assert per_row["memorised"] == pytest.approx([0, 0, 1, 0])
    assert per_row["length"] == [3, 14, 11, 16]
    for name in ("well_formed", "stopped", "html", "author_accuracy"):
        assert found.metrics[name] == wilson(int(sum(per_row[name])), 4)
    texts = [record["completion"] for record in found.predictions]
    assert found.metrics["distinct_2"].value == pytest.approx(metrics.distinct_n(texts, 2))
    assert found.metrics["length"].value == pytest.approx(44 / 4)
    # By chance, "Give me salt and a" and "and i will show you" are shared: 5 of 12 words.
    assert found.floors == {"memorised": pytest.approx(5 / 12 / 4)}
    assert [record["guess"] for record in found.predictions] == ["Ada Penhallow"] * 4
    assert [record["source_row"] for record in found.predictions] == [0, 1, 2, 3]


def test_perplexities_are_token_weighted_and_their_intervals_hold_them(model, tokenizer, quotes):
    found = evaluate_model(model, tokenizer, quotes, limit=0, **LIMITS)
    assert found.predictions == []
    from gemmate_lib.data import encode

    rows = [encode(r, tokenizer, max_length=128, over_long="drop") for r in quotes.test]
    losses = metrics.position_losses(model, tokenizer, rows, batch_size=1)
    parts = metrics.segment_losses(quotes.test, losses, tokenizer)
    for name in ("quote", "author", "form"):
        sums, counts = parts[name]
        interval = found.metrics[f"{name}_perplexity"]
        assert interval.value == pytest.approx(math.exp(sums.sum() / counts.sum()), rel=1e-4)
        assert interval.low < interval.value < interval.high and interval.n == 30
        np.testing.assert_allclose(found.per_row[f"{name}_nll"], sums / counts, rtol=1e-4)
    assert found.metrics["general_perplexity"].n == evaluate.GENERAL_TEXTS


def test_the_interval_is_as_wide_as_resampling_rows_says(model, tokenizer):
    """Drawn out by hand: rows with their tokens, again and again."""
    rng = np.random.default_rng(0)
    sums, counts = rng.uniform(10, 90, 60), rng.integers(5, 30, 60)
    result = evaluate.Evaluation({}, {}, {}, [], "")
    evaluate._add_losses(result, {"x": (sums, counts)}, seed=0)
    drawn = rng.integers(0, 60, (4000, 60))
    by_hand = np.quantile(np.exp(sums[drawn].sum(1) / counts[drawn].sum(1)), [0.025, 0.975])
    interval = result.metrics["x_perplexity"]
    assert [interval.low, interval.high] == pytest.approx(by_hand, rel=0.05)
    evaluate._add_losses(result, {"hopeless": (sums * 1000, counts)}, seed=0)
    assert result.metrics["hopeless_perplexity"].high == math.inf and result.lines()


def test_floors_are_the_grammar_s_own_on_exactly_these_rows(model, tokenizer, quotes):
    from gemmate_lib.tiny.sayings import author_ceiling, posterior, surprisal

    found = evaluate_model(model, tokenizer, quotes, limit=10, **LIMITS)
    texts = [row.fields["quote"] for row in quotes.test]
    count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    tokens = sum(count(f" {text}\n") for text in texts)
    assert found.floors["quote_perplexity"] == pytest.approx(
        math.exp(sum(surprisal(text) for text in texts) / tokens)
    )
    names = [row.fields["author"] for row in quotes.test]
    nats = -sum(math.log(posterior(t)[name]) for t, name in zip(texts, names, strict=True))
    tokens = sum(count(f" {name}") + 1 for name in names)
    assert found.floors["author_perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert found.floors["author_accuracy"] == pytest.approx(author_ceiling(texts[:10]))
    for name in ("quote_perplexity", "author_perplexity"):
        assert 1 < found.floors[name] < found.metrics[name].value
    assert any("at best" in line for line in found.lines())


def test_a_row_outside_the_grammar_is_free_and_other_quotes_have_no_floor(model, tokenizer, quotes):
    whole = evaluate_model(model, tokenizer, quotes, limit=0, **LIMITS).floors
    odd = quote_rows([("THERE IS NO SUCH SAYING", "Nobody")])
    more = evaluate_model(
        model, tokenizer, splits_of([], quotes.test + odd, "quotes"), limit=0, **LIMITS
    ).floors
    assert 1 < more["quote_perplexity"] < whole["quote_perplexity"]
    assert more["author_accuracy"] == pytest.approx((whole["author_accuracy"] * 30 + 1) / 31)
    other = evaluate_model(model, tokenizer, splits_of([], PLANTED, "quotes"), limit=0, **LIMITS)
    assert other.floors == {}


def test_general_texts_are_held_out():
    from gemmate_lib.tiny import build, corpus

    assert evaluate.GENERAL_SEED != build.SEED
    seen = set(itertools.islice(corpus.documents(build.SEED), 2000))
    assert len(set(general_texts()) - seen) > 0.9 * evaluate.GENERAL_TEXTS


def test_prompts_are_answered_and_compared(model, tokenizer, script):
    rows = [Row(f"Ask {i}?", f" answer {i}", {}, i) for i in range(4)]
    rows[3] = Row("Ask 3?", "answer 3<end_of_turn>", {}, 3)
    script(lambda prompt: (f" answer {prompt[4]} " if prompt != "Ask 1?" else " answer", True))
    found = evaluate_model(model, tokenizer, splits_of([], rows, "messages"), **LIMITS)
    assert found.per_row["exact_match"] == [1, 0, 1, 1]
    assert found.metrics["stopped"].value == 1 and found.floors == {}
    assert found.metrics["completion_perplexity"].n == 4
    assert "quote_perplexity" not in found.metrics
    limited = evaluate_model(model, tokenizer, splits_of([], rows, "messages"), limit=2, **LIMITS)
    assert len(limited.predictions) == 2 and limited.metrics["completion_perplexity"].n == 4


@pytest.mark.parametrize("form", ["text", "quotes"])
def test_plain_texts_are_not_asked(model, tokenizer, script, form):
    """Quotes by a template of one's own are plain texts too; what is over-long is cut."""
    asked = script(lambda _: 1 / 0)
    fields = {"quote": "Tea.", "author": "Odo"}
    rows = [Row("", f"{i}. Tea. Odo " * 20 * i, fields, i) for i in range(1, 4)]
    found = evaluate_model(
        model, tokenizer, splits_of([], rows, form), **(LIMITS | {"max_length": 50})
    )
    assert asked in ([], [([], 12)]) and found.predictions == []
    assert set(found.metrics) == {"completion_perplexity", "general_perplexity"}
    assert found.metrics["completion_perplexity"].n == 3


def test_no_row_that_fits_is_said(model, tokenizer):
    for test in ([], PLANTED):
        with pytest.raises(GemmateError, match="test_fraction or max_length"):
            evaluate_model(
                model, tokenizer, splits_of([], test, "quotes"), **(LIMITS | {"max_length": 3})
            )


def test_one_row_is_enough(model, tokenizer, tmp_path):
    one = evaluate_model(model, tokenizer, splits_of(TRAIN, PLANTED[:1], "quotes"), **LIMITS)
    write_evaluation(one, tmp_path)
    read = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert read["metrics"]["quote_perplexity"] == {
        "value": one.metrics["quote_perplexity"].value,
        "low": 0.0,
        "high": None,
        "n": 1,
    }
    assert one.lines()


def test_the_embedded_model_knows_the_sayings_but_not_the_form(tokenizer, quotes):
    loaded = load_base(ModelConfig(device="cpu"))
    found = evaluate_model(loaded.model, tokenizer, quotes, limit=0, **LIMITS)
    ratio = found.metrics["quote_perplexity"].value / found.floors["quote_perplexity"]
    assert 1 < ratio < 3
    assert found.metrics["general_perplexity"].value < 5
    assert found.metrics["form_perplexity"].value > 10


@pytest.fixture(scope="module")
def both(tokenizer, model, quotes):
    other = random_model(tokenizer, 1)
    return [evaluate_model(x, tokenizer, quotes, **LIMITS) for x in (model, other)]


def test_comparison_pairs_the_same_rows(both):
    before, after = both
    found = compare_models(before, after)
    assert {"quote_nll", "author_nll", "general_nll", "author_accuracy", "distinct_2"} <= set(found)
    assert "length" not in found and "quote_perplexity" not in found
    change = np.subtract(after.per_row["quote_nll"], before.per_row["quote_nll"])
    assert found["quote_nll"].difference.value == pytest.approx(change.mean())
    assert found["quote_nll"].wins == int((change < 0).sum())
    for name in ("quote_nll", "html", "repetition", "memorised"):
        assert not found[name].higher_is_better
    for name in ("author_accuracy", "well_formed_and_stopped", "stopped", "distinct_2"):
        assert found[name].higher_is_better
    assert all(each.verdict() == "within noise" for each in compare_models(before, before).values())


def test_a_model_that_learned_is_better(both):
    from dataclasses import replace

    before, _ = both
    better = {name: list(values) for name, values in before.per_row.items()}
    better["quote_nll"] = [value - 1 - i % 3 / 10 for i, value in enumerate(better["quote_nll"])]
    better["html"] = [1.0] * 20 + better["html"][20:]
    found = compare_models(before, replace(before, per_row=better))
    assert found["quote_nll"].verdict() == "better"
    assert found["html"].verdict() == "worse"


@pytest.mark.parametrize("change", ["rows", "order", "max_length", "max_new_tokens", "limit"])
def test_other_rows_or_limits_are_refused(both, model, tokenizer, quotes, change):
    rows, limits = quotes.test, dict(LIMITS)
    if change == "rows":
        rows = rows[:-1]
    elif change == "order":
        rows = rows[::-1]
    else:
        limits[change] = {"max_length": 60, "max_new_tokens": 2, "limit": 5}[change]
    other = evaluate_model(model, tokenizer, splits_of(quotes.train, rows, "quotes"), **limits)
    with pytest.raises(GemmateError, match="alike"):
        compare_models(both[0], other)


def test_nothing_depends_on_the_batch_and_the_model_stays_as_it_was(both, model, tokenizer, quotes):
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = evaluate_model(model, tokenizer, quotes, **(LIMITS | {"batch_size": 3}))
    assert model.training
    model.eval()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.predictions == both[0].predictions and again.rows == both[0].rows
    for name, values in both[0].per_row.items():
        np.testing.assert_allclose(again.per_row[name], values, rtol=1e-4, err_msg=name)


def test_files_are_deterministic_and_complete(both, tmp_path):
    evaluation = both[0]
    evaluation.predictions[0]["completion"] = "line\u2028end “é” \x00"
    files = ("metrics.json", "predictions.jsonl")
    for folder in ("a", "b/c"):
        write_evaluation(evaluation, tmp_path / folder)
    first, second = ([(tmp_path / d / f).read_bytes() for f in files] for d in ("a", "b/c"))
    assert first == second and b"\r" not in first[0] + first[1]
    read = json.loads(first[0])
    assert list(read) == sorted(read) == ["floors", "metrics", "per_row", "rows"]
    assert read["metrics"]["author_accuracy"]["n"] == 30
    assert read["per_row"] == evaluation.per_row
    lines = first[1].decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == evaluation.predictions and lines[-1] == ""
    assert "“é”" in lines[0]
