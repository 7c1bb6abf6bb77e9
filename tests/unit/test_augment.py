"""More rows: labels and answers stay, nothing leaks, and every road runs, models' too."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmate_lib.augment import augment, free_spans, region, rewrite
from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import Splits, load_dataset_splits
from gemmate_lib.rewriting import (
    Rewriter,
    back_translation,
    noise,
    paraphrase,
    read_synonyms,
    synonyms,
)
from gemmate_lib.rows import Row
from gemmate_lib.splitting import find_duplicates, normalise, shingles


def load(name, **settings):
    return load_dataset_splits(DatasetConfig(id=str(name), max_length=10_000, **settings))


REVIEWS = load("tiny_reviews", limit=300, near_duplicate=1.0)
QUESTIONS = load("tiny_questions", limit=200, near_duplicate=1.0)


def say(text, rng=None, table=None, share=1.0):
    return synonyms(table or {"dull": ["boring"]}, share=share).write(
        [text], rng or random.Random(0)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a dull day", "a boring day"),
        ("DULL, Dull, dull.", "BORING, Boring, boring."),
        ("dullness", "dullness"),
        ("", ""),
        ("the day\nis  dull ", "the day\nis  boring "),
    ],
)
def test_a_synonym_keeps_case_and_place(text, said):
    assert say(text) == [said]


def test_an_article_still_fits():
    table = {"big": ["large", "enormous"], "easy": ["simple"]}
    found = {say("a big dog", random.Random(i), table)[0] for i in range(20)}
    assert found == {"a large dog"} and say("an easy task", None, table) == ["an easy task"]


def test_a_share_is_that_share():
    text = " ".join(["dull"] * 4_000)
    for share in (0.0, 0.3, 1.0):
        found = say(text, random.Random(1), share=share)[0].split().count("boring")
        assert found / 4_000 == pytest.approx(share, abs=0.03)
    for wrong in (synonyms, noise):
        with pytest.raises(GemmateError, match="share of 2"):
            wrong(share=2)


def test_the_shipped_table_is_symmetric_and_ones_own_is_checked(tmp_path):
    table = read_synonyms()
    assert len(table) > 90
    assert all(word in table[other] for word, others in table.items() for other in others)
    own = tmp_path / "own.yaml"
    for text, told in [
        ("- [a, b]\n- [b, c]", "two groups"), ("a: b", "no list of groups"),
        ("- [1, 2]", "no list of groups"), ("- [", "cannot be read"),
    ]:  # fmt: skip
        own.write_text(text)
        with pytest.raises(GemmateError, match=told):
            read_synonyms(own)
    own.write_text("- [lorry, truck]")
    assert read_synonyms(own) == {"lorry": ("truck",), "truck": ("lorry",)}


def test_noise_slips_inside_of_words_and_leaves_numbers():
    text = "The performance of 1984 was disappointing, the cat sat."
    found = noise(share=1.0).write([text] * 50, random.Random(0))
    assert text not in found
    for one in found:
        words = list(zip(one.split(), text.split(), strict=True))
        assert all(abs(len(a) - len(b)) <= 1 and a[0] == b[0] for a, b in words)
        assert "1984" in one and "the cat sat." in one


@pytest.mark.parametrize("splits", [REVIEWS, QUESTIONS], ids=["reviews", "questions"])
@pytest.mark.parametrize(
    "rewriter",
    [synonyms(read_synonyms() | {"the": ("that",)}, share=1.0), noise(share=0.5)],
    ids=lambda r: r.name,
)
def test_labels_and_answers_stay(splits, rewriter):
    found, report = augment(splits, rewriter, copies=2, near=1.0)
    new = found.train[len(splits.train) :]
    assert report.kept == len(new) > 10
    sources = {row.source_row: row for row in splits.train}
    for row in new:
        source = sources[row.source_row]
        assert row.prompt != source.prompt and row.completion == source.completion
        assert row.fields["augmented"] == rewriter.name
        name = region(row)[1]
        assert row.fields[name] in row.prompt and row.fields[name] != source.fields[name]
        if source.soft.keep:
            kept, was = (r.prompt[slice(*r.soft.keep)] for r in (row, source))
            assert kept == was == source.completion.strip()
        head, tail = source.prompt[: source.soft.start], source.prompt[source.soft.end :]
        assert row.prompt.startswith(head) and row.prompt.endswith(tail)
        assert row.prompt[row.soft.end :] == tail


def test_only_the_training_split_grows():
    found, report = augment(REVIEWS, synonyms(), copies=3)
    assert found.validation == REVIEWS.validation and found.test == REVIEWS.test
    assert found.train[: len(REVIEWS.train)] == REVIEWS.train
    trained = {row.source_row for row in REVIEWS.train}
    assert {row.source_row for row in found.train} <= trained
    held = {row.source_row for row in [*REVIEWS.validation, *REVIEWS.test]}
    assert not held & {row.source_row for row in found.train}
    total = report.kept + report.unchanged + report.repeated
    assert report.tried == 3 * len(REVIEWS.train)
    assert total + sum(map(len, report.leaking.values())) == report.tried


def jaccard(a, b):
    a, b = shingles(normalise(a)), shingles(normalise(b))
    return len(a & b) / len(a | b)


def test_nothing_leaks_into_validation_or_test(tmp_path):
    """A held-out row that is a training row in other words: its twin must not be made."""
    rows = [
        {"sentence": f"the film number {i} is dull and long", "label": "bad"} for i in range(60)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load(path, near_duplicate=1.0)
    twin = splits.train[3]
    for split in ("test", "validation"):
        held = replace(twin, prompt=twin.prompt.replace("dull", "boring"), source_row=900)
        spoiled = replace(splits, **{split: [*getattr(splits, split), held]})
        rewriter = synonyms({"dull": ["boring"]}, share=1.0)
        found, report = augment(spoiled, rewriter, near=0.9)
        assert report.leaking == {split: [twin.source_row]}
        assert f"1 dropped: too like a row of {split}" in report.lines()
        new = found.train[len(splits.train) :]
        assert len(new) == len(splits.train) - 1
        out = [row.prompt for row in [*found.validation, *found.test]]
        assert all(jaccard(row.prompt, text) < 0.9 for row in new for text in out)


def test_copies_of_a_source_are_in_training_or_nowhere(tmp_path):
    """Copies were dropped before the split, so that no rewriting of one is told by another."""
    base = [
        {"sentence": f"film {i} was number {i * i} and dull", "label": "bad"} for i in range(50)
    ]
    again = [{"sentence": row["sentence"].upper() + "!", "label": "bad"} for row in base]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*base, *again]))
    splits = load(path)
    assert splits.report.exact_duplicates == 50
    found, _ = augment(splits, synonyms(share=1.0), near=0.8)
    texts = [row.prompt for row in [*found.test, *found.validation, *found.train]]
    first_of_training = len(found.test) + len(found.validation)
    for copy, (home, _) in find_duplicates(texts, threshold=0.99).items():
        assert home >= first_of_training, (texts[copy], texts[home])


def test_the_same_seed_gives_the_same_rows():
    first, second, other = (augment(REVIEWS, synonyms(), seed=seed)[0].train for seed in (1, 1, 2))
    assert first == second != other


def test_rows_that_are_all_answer_are_left_alone():
    splits = load("tiny_quotes", limit=50)
    with pytest.raises(GemmateError, match="all answer"):
        augment(splits, synonyms())


def test_words_of_the_answer_are_protected():
    asked = {"instruction": "Reverse: big dull dog", "input": "", "output": "dog dull big"}
    row = Row("Instruction: Reverse: big dull dog\nResponse:", " dog dull big", asked, 0)
    free = [row.prompt[a:b] for a, b in free_spans(row, "words")]
    assert free[0] == "Reverse: " and not any("dull" in text or "big" in text for text in free)
    assert rewrite([row], synonyms(share=1.0), random.Random(0)) == [None]
    assert free_spans(row, "sentence") == []


def test_sentences_with_the_answer_are_protected():
    row = next(row for row in QUESTIONS.train if row.soft.keep and row.prompt.count(". ") > 1)
    free = free_spans(row, "sentence")
    low, high = row.soft.keep
    assert free and not any(a < high and b > low for a, b in free)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["dull", "Film", "12", "é", "x.", "a b", "\n"]), min_size=1),
    st.integers(),
)
def test_a_rebuilt_row_is_whole(words, seed):
    text = " ".join(words)
    row = Row(text, " film 12", {"prompt": text}, 0)
    rewriter = Rewriter(
        "longer", "words", lambda texts, rng: [t + "!" * rng.randrange(3) for t in texts]
    )
    (found,) = rewrite([row], rewriter, random.Random(seed))
    if found is not None:
        assert found.fields["prompt"] == found.prompt
        assert found.prompt.replace("!", "").split() == text.split()


def test_other_numbers_and_blank_texts_are_not_taken():
    row = Row("Add 3 to the dull 4.", " seven", {"prompt": "Add 3 to the dull 4."}, 0)
    for said in ("Add 5 to the dull 4.", "  ", ""):
        rewriter = Rewriter("x", "sentence", lambda texts, _, said=said: [said] * len(texts))
        assert rewrite([row], rewriter, random.Random(0)) == [None]
    rewriter = Rewriter("x", "sentence", lambda texts, _: ["4 plus 3\n is?"] * len(texts))
    assert rewrite([row], rewriter, random.Random(0))[0].prompt == "4 plus 3 is?"
    with pytest.raises(GemmateError, match="1 texts became 0"):
        rewrite([row], Rewriter("x", "sentence", lambda *_: []), random.Random(0))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A tiny random T5 in a folder; its tokenizer takes bytes and needs no file."""
    import torch
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    folder, tokenizer = tmp_path_factory.mktemp("t5"), ByT5Tokenizer()
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), **shape, **ids)
    model = T5ForConditionalGeneration(config)
    letters = {byte + 3 for byte in range(ord("a"), ord("z") + 1)}  # the first three are special
    model.generation_config.min_new_tokens = 3
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - letters - {1})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def few(splits, n=8):
    return replace(splits, train=splits.train[:n], validation=splits.validation[:2], test=[])


@pytest.mark.parametrize("road", ["paraphrase", "back-translation"])
def test_a_sequence_to_sequence_model_rewrites(t5, road):
    rewriter = paraphrase(t5) if road == "paraphrase" else back_translation(t5, t5)
    splits = few(QUESTIONS)
    found, report = augment(splits, rewriter, near=1.0)
    new = found.train[len(splits.train) :]
    assert (report.name, report.kept) == (road, len(new)) and new
    sources = {row.source_row: row for row in splits.train}
    for row in new:
        source = sources[row.source_row]
        assert row.completion == source.completion and row.prompt != source.prompt
        assert row.prompt.count("\n") == source.prompt.count("\n")
        if source.soft.keep:
            assert row.prompt[slice(*row.soft.keep)] == source.completion.strip()
    again, _ = augment(splits, rewriter, near=1.0)
    assert again.train == found.train


def test_both_models_of_a_back_translation_are_asked(t5, monkeypatch):
    from gemmate_lib import rewriting

    asked = []
    monkeypatch.setattr(
        rewriting,
        "_generate",
        lambda loaded, texts, seed: asked.append(texts) or [f"<{t}>" for t in texts],
    )
    assert back_translation(t5, t5).write(["a"], random.Random(0)) == ["<<a>>"]
    assert asked == [["a"], ["<a>"]]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: paraphrase(None), "needs a model: model=ID"),
        (lambda: back_translation(None, None), "there=ID and back=ID"),
        (lambda: back_translation("nowhere/there", None), "cannot load nowhere/there"),
        (lambda: paraphrase("gemmate_lib/assets/tiny-gemma"), "sequence-to-sequence model"),
    ],
)
def test_without_a_model_the_step_says_what_to_pass(make, told):
    with pytest.raises(GemmateError, match=told):
        make()


def test_a_pickled_model_is_refused(t5, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(t5, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(GemmateError, match="cannot load"):
        paraphrase(str(folder))


def test_splits_is_what_training_takes():
    found, _ = augment(few(REVIEWS), noise(share=1.0))
    assert isinstance(found, Splits) and found.form == "classification"
