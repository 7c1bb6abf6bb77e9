"""Metrics: losses that no batch moves, segments that are the whole, counts of what is there."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmate_lib import metrics as m
from gemmate_lib.config import GemmateError
from gemmate_lib.data import Encoded, Row, encode
from gemmate_lib.forms import QUOTE_TEMPLATE
from gemmate_lib.models import load_tokenizer

QUOTES = [
    ("Never trust silence that has no meaning.", "Ada Penhallow"),
    ("“Ünïcode” — 引用 🙂", "Ö. Ñandú"),
    ("Two\nlines, and\n\na third: Author of none", "J. K. O'Neil, The Book: Part 2"),
    ("It said “Author: Someone”\nAuthor: is a word, too", "X"),
    ("word " * 30 + "end", "Y Z"),
]
cheap = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-gemma")


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = GemmaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape, **heads)
    config.attention_dropout = 0.5  # so that training mode would be seen in the losses
    return GemmaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def rows():
    fields = [{"quote": quote, "author": author} for quote, author in QUOTES]
    return [Row("", QUOTE_TEMPLATE.format_map(f), f, i) for i, f in enumerate(fields)]


@pytest.fixture(scope="module")
def encoded(rows, tokenizer):
    answer = encode(Row("What?", " This.", {}, 9), tokenizer, max_length=99, over_long="cut")
    return [encode(r, tokenizer, max_length=250, over_long="drop") for r in rows] + [answer]


def direct(model, row):
    """One row by itself, in the words of the definition: -log softmax(logits)[next token]."""
    with torch.no_grad():
        probabilities = (
            model(input_ids=torch.tensor([row.input_ids])).logits[0].double().softmax(-1)
        )
    taken = [t for t in range(1, len(row.labels)) if row.labels[t] != -100]
    return [-math.log(probabilities[t - 1, row.input_ids[t]]) for t in taken]


def test_losses_are_those_of_the_definition(model, tokenizer, encoded):
    sums, counts = m.token_losses(model, tokenizer, encoded, batch_size=4)
    alone = [direct(model, row) for row in encoded]
    assert sums.dtype == np.float64 and counts.tolist() == [len(row) for row in alone]
    np.testing.assert_allclose(sums, [sum(row) for row in alone], rtol=1e-5)
    every = [nll for row in alone for nll in row]
    assert m.perplexity(sums, counts) == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)


def test_only_the_completion_bears_a_loss(model, tokenizer, encoded):
    answer = m.position_losses(model, tokenizer, encoded, batch_size=2)[-1]
    taken = [label != -100 for label in encoded[-1].labels]
    assert np.isfinite(answer).tolist() == taken and 0 < sum(taken) < len(taken)


def test_the_first_position_has_no_prediction(model, tokenizer):
    """As of tokenizers without BOS, whose labels begin at once."""
    sums, counts = m.token_losses(
        model, tokenizer, [Encoded([5, 6, 7], [5, 6, 7], False)], batch_size=1
    )
    assert counts.tolist() == [2]
    assert sums[0] == pytest.approx(
        sum(direct(model, Encoded([5, 6, 7], [5, 6, 7], False))), rel=1e-5
    )


@settings(cheap, max_examples=15)
@given(order=st.permutations(range(6)), batch_size=st.integers(1, 7))
def test_batch_order_and_padding_change_nothing(model, tokenizer, encoded, order, batch_size):
    sums, counts = m.token_losses(model, tokenizer, encoded, batch_size=1)
    shuffled = [encoded[i] for i in order]
    again, numbers = m.token_losses(model, tokenizer, shuffled, batch_size=batch_size)
    np.testing.assert_allclose(again, sums[order], rtol=1e-5)
    assert numbers.tolist() == counts[order].tolist()


def test_packing_changes_nothing(model, tokenizer, encoded):
    """All rows in one sequence, told apart by their positions alone, as packed rows are trained."""
    sums, _ = m.token_losses(model, tokenizer, encoded, batch_size=1)
    ids = torch.tensor([[token for row in encoded for token in row.input_ids]])
    positions = torch.tensor([[i for row in encoded for i in range(len(row.input_ids))]])
    with torch.no_grad():
        isolated = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        mixed = model(input_ids=ids, use_cache=False).logits[0]

    def of_rows(logits):
        start, found = 0, []
        for row in encoded:
            losses = np.full(len(row.input_ids), np.nan)
            m._take_losses(losses, logits[start : start + len(losses)], row.labels)
            start, found = start + len(losses), [*found, np.nansum(losses)]
        return found

    np.testing.assert_allclose(of_rows(isolated), sums, rtol=1e-5)
    assert not np.allclose(of_rows(mixed)[1:], sums[1:], rtol=1e-3)  # the test can fail


@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_is_restored_and_dropout_is_off(model, tokenizer, encoded, fails, monkeypatch):
    evaluated, _ = m.token_losses(model, tokenizer, encoded, batch_size=3)
    model.train()
    model.model.layers[0].eval()  # a part that its owner froze
    before = [module.training for module in model.modules()]
    if fails:
        monkeypatch.setattr(m, "_take_losses", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            m.token_losses(model, tokenizer, encoded, batch_size=3)
    else:
        trained, _ = m.token_losses(model, tokenizer, encoded, batch_size=3)
        np.testing.assert_array_equal(trained, evaluated)
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_low_precision_logits_keep_large_token_ids(model, tokenizer, encoded):
    """bfloat16 has no integers above 256: labels must not pass through the type of the logits."""
    import copy

    coarse = copy.deepcopy(model).to(torch.bfloat16)
    assert max(encoded[0].input_ids) > 256
    sums, _ = m.token_losses(coarse, tokenizer, encoded[:1], batch_size=1)
    assert sums[0] == pytest.approx(sum(direct(coarse, encoded[0])), rel=1e-5)


# peft 0.21.2 asks transformers 5 by the old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_virtual_tokens_of_prompt_tuning_are_not_taken_for_the_row(model, tokenizer, encoded):
    import copy

    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(copy.deepcopy(model), config).eval()
    sums, counts = m.token_losses(tuned, tokenizer, encoded[:2], batch_size=2)
    for row, nll, n in zip(encoded, sums, counts, strict=False):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = tuned(input_ids=ids).logits[:, 3:]
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert nll / n == pytest.approx(loss.item(), rel=1e-4)


def test_a_loss_that_is_not_finite_is_refused(model, tokenizer, encoded):
    import copy

    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(GemmateError, match="not finite"):
        m.token_losses(broken, tokenizer, encoded[:2], batch_size=2)


def test_perplexity_weighs_tokens_not_rows():
    sums, counts = np.array([1.0, 90.0]), np.array([1, 9])
    assert m.perplexity(sums, counts) == pytest.approx(math.exp(91 / 10))
    assert m.perplexity(np.array([1e6]), np.array([1])) == math.inf
    with pytest.raises(GemmateError, match="max_length"):
        m.perplexity(np.array([0.0]), np.array([0]))


def test_segments_add_up_to_the_whole(model, tokenizer, rows, encoded):
    losses = m.position_losses(model, tokenizer, encoded[:5], batch_size=2)
    parts = m.segment_losses(rows, losses, tokenizer)
    whole = m.row_sums(losses)
    assert set(parts) == {"form", "quote", "author"}
    np.testing.assert_allclose(sum(sums for sums, _ in parts.values()), whole[0], rtol=1e-12)
    np.testing.assert_array_equal(sum(counts for _, counts in parts.values()), whole[1])
    assert all((counts > 0).all() for _, counts in parts.values())


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@cheap
@given(
    quote=text, author=st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)
)
def test_a_segment_is_its_words_and_nothing_else(tokenizer, quote, author):
    """Read back from the tokens: for any Unicode, labels of the form inside the quote included."""
    if "\nAuthor:" in f"\n{author}" or "<" in quote + author:  # no name; a special token, perhaps
        return
    row = encode(
        Row("", f"Quote: {quote}\nAuthor: {author}", {}, 0),
        tokenizer,
        max_length=999,
        over_long="drop",
    )
    names = m.segments(f"Quote: {quote}\nAuthor: {author}", tokenizer)
    assert len(names) == len(row.input_ids)
    ids = np.array(row.input_ids)
    assert tokenizer.decode(ids[names == "quote"]) == f" {quote}\n"
    assert tokenizer.decode(ids[names == "author"]) == f" {author}<eos>"
    assert tokenizer.decode(ids[names == "form"]) == "<bos>Quote:Author:"


def test_the_author_segment_follows_the_last_label(tokenizer):
    names = m.segments("Quote: a\nAuthor: b\nAuthor: c", tokenizer)
    assert names.tolist().count("author") == 2  # " c" and EOS


def test_segments_of_a_cut_row_and_of_another_form(model, tokenizer, rows):
    cut = encode(rows[0], tokenizer, max_length=6, over_long="cut")
    losses = m.position_losses(model, tokenizer, [cut], batch_size=1)
    parts = m.segment_losses(rows[:1], losses, tokenizer)
    assert [int(parts[name][1][0]) for name in m.SEGMENTS] == [2, 3, 0]
    for other in ("Quote: no author", "Author: first\nQuote: then"):
        with pytest.raises(GemmateError, match="quote and author"):
            m.segments(other, tokenizer)


def test_bos_in_the_text_is_left_out_as_encode_does(tokenizer):
    text = "<bos>Quote: a\nAuthor: b"
    with pytest.raises(GemmateError):
        m.segments(text, tokenizer)
    inside = Row("", "Quote: a <bos>b\nAuthor: c", {}, 0)
    row = encode(inside, tokenizer, max_length=99, over_long="drop")
    assert len(m.segments(inside.completion, tokenizer)) == len(row.input_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Quote: A saying.\nAuthor: Somebody", True),
        ("Quote: Two\nlines.\nAuthor: Dr. J. K. Some-Body, The Book", True),
        ("Quote: A saying.\nAuthor: Somebody\n", False),  # something after it
        ("Quote: A saying.\nAuthor: Somebody\nYear: 1900", False),
        ("Quote: A saying.\nAuthor: Somebody\nAuthor: Another", False),
        ("Quote: A saying.\nQuote: Another.\nAuthor: Somebody", False),
        ("Quote: A saying.\nAuthor: Somebody\nQuote: A saying.\nAuthor: Somebody", False),
        ("Quote: A saying.\nAuthor:", False),
        ("Quote: A saying.\nAuthor: ", False),
        ("Quote: A saying.\nAuthor:  ", False),
        ("Quote: \nAuthor: Somebody", False),
        ("Quote: A saying.", False),
        ("Quote: A saying. Author: Somebody", False),
        ("Quote: A saying.\n\nAuthor: Somebody", False),  # an empty line: another document
        ("Quote: <b>A saying.</b>\nAuthor: Somebody", False),
        (" Quote: A saying.\nAuthor: Somebody", False),
        ("", False),
    ],
)
def test_well_formed(text, expected):
    assert m.well_formed(text) is expected


def test_well_formed_takes_no_time_on_long_texts():
    import time

    start = time.perf_counter()
    assert not m.well_formed("Quote: " + "a\n" * 20_000)
    assert not m.well_formed("Quote: " + "a\n" * 20_000 + "\nAuthor: x")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("completion", "name"),
    [
        (" Ada Penhallow", "Ada Penhallow"),
        (" Ada \nTitle: On fear", "Ada"),
        ("\n\nAda", "Ada"),
        ("", ""),
    ],
)
def test_author_of(completion, name):
    assert m.author_of(completion) == name


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<p><strong>Wisdom</strong> is</p>", 4),
        ('<a href="/tea">x</a> <br/>', 3),
        ("1 < 2 > 0, <3", 0),
    ],
)
def test_html_tags(text, count):
    assert m.html_tags(text) == count


def test_repetition():
    assert m.repetition("one two three four five six seven") == 0
    assert m.repetition("Read more, read MORE! " * 10) == pytest.approx(1 - 2 / 37)
    assert m.repetition("a b c d e a b c d") == pytest.approx(1 / 6)
    assert m.repetition("too short") == m.repetition("") == 0


def test_distinct_n():
    assert m.distinct_n(["a b c", "A b, c!"], 2) == pytest.approx(2 / 4)
    assert m.distinct_n(["a b a b"], 1) == pytest.approx(2 / 4)
    assert m.distinct_n(["a", ""], 2) == m.distinct_n([], 2) == 0


few_words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@cheap
@given(texts=st.lists(few_words, max_size=5), n=st.integers(1, 3))
def test_distinct_n_is_its_definition_and_the_sum_of_its_points(texts, n):
    every = [tuple(t.split()[i : i + n]) for t in texts for i in range(len(t.split()) - n + 1)]
    assert m.distinct_n(texts, n) == pytest.approx(len(set(every)) / max(1, len(every)))
    points, counts = m.distinct_points(texts, n)
    assert points.sum() == pytest.approx(len(set(every))) and counts.sum() == len(every)


@settings(cheap, max_examples=200)
@given(texts=st.lists(few_words, max_size=4), text=few_words)
def test_the_longest_run_is_the_longest(texts, text):
    """Against all runs, tried out."""
    words = text.split()
    runs = [words[i:j] for i in range(len(words)) for j in range(i + 3, len(words) + 1)]
    held = [f" {t} " for t in texts]
    longest = max((len(r) for r in runs if any(f" {' '.join(r)} " in t for t in held)), default=0)
    assert m.run_finder(texts)(text) == longest


def test_a_copy_is_found_whatever_its_case_and_punctuation():
    longest_run = m.run_finder(["Never trust a quiet kettle.", "Tea is more than water."])
    assert longest_run("He said: “NEVER trust a quiet kettle”, twice") == 5
    assert longest_run("quiet kettle tea is more") == 3
    assert longest_run("tea is less") == longest_run("") == 0


def test_no_run_leads_from_one_training_text_into_the_next():
    assert m.run_finder(["a b c", "b c d"])("a b c d") == 3
    assert m.run_finder(["a b c d"])("a b c d") == 4
