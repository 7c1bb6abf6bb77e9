"""The embedded default: the grammar's probabilities, the corpus, the tokenizer, the models."""

import datetime
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from gemmate_lib.config import ModelConfig
from gemmate_lib.models import EMBEDDED, load_base, load_tokenizer
from gemmate_lib.tiny import build, calendar, corpus, sayings, tokenizer
from gemmate_lib.tiny.copying import IGNORED, echoes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(itertools.islice(corpus.documents(11), 4000))


def test_every_saying_is_read_back() -> None:
    rng = random.Random(0)
    for _ in range(500):
        drawn = sayings.draw(rng)
        parsed = sayings.parse(drawn.text)
        assert parsed is not None and parsed[0] == drawn.turn


def test_surprisal_agrees_with_the_frequency_of_sayings() -> None:
    """Sum p over all sayings of one short turn and topic; compare with its share of draws."""
    author, turn, topic = "Flora Penrose", "begin", "garden"
    words = sayings.world()["topics"][topic]
    every = {
        sayings.render(sayings.world()["sayings"][turn], {"idea": idea, "doing": doing})
        for idea, doing in itertools.product(words["idea"], words["doing"])
    }
    assert len(every) == 48
    claimed = sum(sayings.joint(text)[author] for text in every) * len(sayings.authors())
    rng = random.Random(5)
    drawn = Counter(sayings.draw(rng, author).text in every for _ in range(20_000))
    seen = drawn[True] / 20_000
    assert claimed == pytest.approx(seen, abs=4 * math.sqrt(claimed * (1 - claimed) / 20_000))


def test_author_ceiling_is_what_bayes_reaches() -> None:
    rng = random.Random(6)
    drawn = [sayings.draw(rng) for _ in range(1500)]
    ceiling = sayings.author_ceiling([s.text for s in drawn])
    posteriors = [sayings.posterior(s.text) for s in drawn]
    reached = sum(
        max(p, key=p.__getitem__) == s.author for p, s in zip(posteriors, drawn, strict=True)
    )
    assert 0.7 < ceiling < 0.95
    assert reached / 1500 == pytest.approx(ceiling, abs=0.03)


def test_other_texts_have_no_probability() -> None:
    with pytest.raises(ValueError, match="not a saying"):
        sayings.surprisal("To be, or not to be.")


def test_tiny_quotes_rows() -> None:
    rows = sayings.tiny_quotes()
    assert len(rows) == 2508
    assert len({row["quote"] for row in rows}) == 2508
    assert sum(sayings.parse(row["quote"]) is None for row in rows) == 8  # the planted variants
    assert any(not row["tags"] for row in rows)


def test_corpus_never_shows_the_form_nor_a_quote(texts: list[str]) -> None:
    quotes = [row["quote"] for row in sayings.tiny_quotes()]
    everything = "\n".join(texts)
    assert "Quote:" not in everything
    assert not any(quote in everything for quote in quotes)


def test_corpus_holds_what_later_parts_build_on(texts: list[str]) -> None:
    everything = "\n".join(texts)
    for needed in ("<strong>", "unanswerable", '{"label": "positive"', "Verdict: negative",
                   "<start_of_turn>user", "Instruction: ", "What is today's date?",
                   "half past", "Author: ", "Easter"):  # fmt: skip
        assert needed in everything, needed


def test_answers_of_time_agree_with_the_calendar() -> None:
    now = datetime.datetime(2006, 5, 23, 14, 5)
    known = calendar.answers_of_time(now)
    assert known["today"] == "Tuesday, 23 May 2006"
    assert known["week_ago"] == "Tuesday, 16 May 2006"
    assert (known["time"], known["season"]) == ("14:05", "spring")
    assert calendar.clock_words(now) == "five past two in the afternoon"
    assert calendar.number_words(2006) == "two thousand and six"
    assert calendar.ordinal_words(12) == "twelfth"


@pytest.mark.parametrize("name", build.NAMES)
def test_embedded_models_are_real_and_small(name: str) -> None:
    from transformers import AutoModelForCausalLM, Gemma2ForCausalLM, GemmaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED[name])
    kind = {"tiny-gemma": GemmaForCausalLM, "tiny-gemma2": Gemma2ForCausalLM}[name]
    assert type(model) is kind
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    assert model.config.head_dim >= 32
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_assets_stay_under_ten_megabytes() -> None:
    files = [f for f in (ROOT / "gemmate_lib/assets").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 10_000_000


def test_tokenizer_ids_are_those_of_gemma() -> None:
    tok = load_tokenizer("tiny-gemma")
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert tok.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert tok("2006", add_special_tokens=False)["input_ids"] == [
        tok.convert_tokens_to_ids(digit) for digit in "2006"
    ]
    chat = tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<bos><start_of_turn>user\nHi<end_of_turn>\n"


def test_tokenizer_gives_back_any_text() -> None:
    tok = load_tokenizer("tiny-gemma")
    for text in ("“Café” — 日本語 🙂\n\ttab", 'Review: it\'s {"label": "positive"}', "\x00\x7f"):
        assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text


def test_shipped_tokenizer_is_the_one_that_is_trained() -> None:
    trained = json.loads(tokenizer.train_tokenizer(seed=build.SEED).to_str())
    shipped = json.loads((EMBEDDED["tiny-gemma"] / "tokenizer.json").read_text("utf-8"))
    assert trained["model"]["vocab"] == shipped["model"]["vocab"]
    assert trained["model"]["merges"] == shipped["model"]["merges"]


def test_every_token_occurs_in_pretraining() -> None:
    """LoRA does not train embeddings: a token that was never seen could not be read later."""
    trained = load_tokenizer("tiny-gemma")._tokenizer
    stream = tokenizer.token_stream(trained, corpus.documents(build.SEED), seed=build.SEED)
    wanted, seen = build.STEPS * build.BATCH * build.BLOCK, Counter()
    while seen.total() < wanted / 2:
        seen.update(next(stream))
    assert set(range(trained.get_vocab_size())) - seen.keys() == {0, 3}  # <pad> and <unk>


@pytest.mark.parametrize("name", build.NAMES)
def test_the_first_steps_of_a_rebuild_are_the_same(name: str) -> None:
    record = json.loads((EMBEDDED[name] / "build.json").read_text("utf-8"))
    again = build.first_losses(name, load_tokenizer(name)._tokenizer)
    for phase, losses in record["first"].items():
        assert again[phase] == pytest.approx(losses, rel=2e-3)
    assert record["held_out"] < 1.5


@pytest.mark.parametrize("name", build.NAMES)
def test_the_first_layer_starts_out_looking_back(name: str) -> None:
    model = build.new_model(name)
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 2048, (8, 24), generator=torch.Generator().manual_seed(0))
    attention = model(input_ids=ids, output_attentions=True).attentions[0]
    for head, offset in enumerate((1, 2, 3)):
        looks = attention[:, head].diagonal(-offset, dim1=1, dim2=2)[:, 3:]
        assert looks.mean() > 0.7


def test_echoes_repeat_with_many_periods() -> None:
    ids, labels = echoes(200, 64, torch.Generator().manual_seed(0), vocabulary=2048)
    periods = (labels == IGNORED).sum(1)
    assert set(periods.tolist()) == set(range(8, 33))
    for row, label, period in zip(ids, labels, periods.tolist(), strict=True):
        assert torch.equal(row[period:], row[:-period]) and torch.equal(
            label[period:], row[period:]
        )
    assert len(set(ids.flatten().tolist())) > 1500


@pytest.mark.parametrize("name", build.NAMES)
def test_embedded_models_copy_what_they_never_saw(name: str) -> None:
    """Reading and repeating rest on it; a base without it learns neither."""
    model = load_base(ModelConfig(id=name, device="cpu")).model
    assert build.echo_accuracy(model) > 0.9


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("name", build.NAMES)
def test_a_whole_rebuild_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Minutes on a core of its own. The last bits differ between CPUs, the model does not."""
    build.build_all([name], tmp_path)
    again = json.loads((tmp_path / name / "build.json").read_text("utf-8"))
    shipped = json.loads((EMBEDDED[name] / "build.json").read_text("utf-8"))
    for phase, losses in shipped["first"].items():
        assert again["first"][phase] == pytest.approx(losses, rel=5e-3)
    assert again["echo"] == pytest.approx(shipped["echo"], rel=0.05)
    assert again["held_out"] == pytest.approx(shipped["held_out"], rel=0.03)
