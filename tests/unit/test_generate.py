"""Generation: neither batch, order nor padding changes a text, and nothing in the model changes."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmate_lib.config import LoraSettings, ModelConfig
from gemmate_lib.generate import STANDARD_PROMPTS, encode_prompt, generate_texts, left_padded
from gemmate_lib.models import attach_lora, load_base

PROMPTS = [*STANDARD_PROMPTS, "", "a", "Quote: " + "one two three " * 20, "Ünïcode 引用 🙂"]


@pytest.fixture(scope="module")
def loaded():
    return load_base(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def alone(loaded):
    """Each prompt's completion, computed by itself."""
    return {p: generate(loaded, [p], batch_size=1)[0] for p in PROMPTS}


def generate(loaded, prompts, **options):
    options = {"max_new_tokens": 8} | options
    return generate_texts(loaded.model, loaded.tokenizer, prompts, **options)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=7),
    batch_size=st.integers(1, 8),
)
def test_batch_order_and_padding_change_nothing(loaded, alone, prompts, batch_size):
    assert generate(loaded, prompts, batch_size=batch_size) == [alone[p] for p in prompts]


def test_left_padding_keeps_the_logits(loaded):
    """In numbers: what padding moves is rounding, which no text depends on."""
    rows = [encode_prompt(loaded.tokenizer, p) for p in PROMPTS]
    ids, mask = left_padded(rows, loaded.tokenizer.pad_token_id)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = loaded.model(input_ids=ids, attention_mask=mask, position_ids=position)
        for i, row in enumerate(rows):
            one = loaded.model(input_ids=torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(together.logits[i, -1], one, atol=2e-4, rtol=1e-4)


def test_only_new_tokens_are_in_the_text(loaded):
    (done,) = generate(loaded, ["Quote: Imagination is more"])
    ids = torch.tensor([encode_prompt(loaded.tokenizer, done.prompt)])
    with torch.no_grad():  # the greedy loop, written out
        for _ in range(done.n_tokens):
            best = loaded.model(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
    assert done.text == loaded.tokenizer.decode(ids[0, -done.n_tokens :], skip_special_tokens=True)


def test_exactly_one_bos(loaded):
    tokenizer = loaded.tokenizer
    for prompt in ("", "Hello", tokenizer.bos_token + "Hello", tokenizer.bos_token * 2 + "Hello"):
        ids = encode_prompt(tokenizer, prompt)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]


def test_a_tokenizer_without_bos_starts_from_eos_at_most(loaded):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    assert encode_prompt(tokenizer, "Hello") == encode_prompt(loaded.tokenizer, "Hello")[1:]


def test_generation_stops_at_an_end_token_and_can_be_told_not_to(loaded, monkeypatch):
    """The third token the model writes becomes an end, as `<end_of_turn>` is for others."""
    prompt = "Quote: Imagination is more"
    ids = encode_prompt(loaded.tokenizer, prompt)
    out = loaded.model.generate(
        torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    new = out[0, len(ids) :].tolist()
    first = new.index(new[2])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [1, new[2]])
    (stopped,) = generate(loaded, [prompt], max_new_tokens=6)
    assert (stopped.stopped, stopped.n_tokens) == (True, first)
    (told_not_to,) = generate(loaded, [prompt], max_new_tokens=6, stop_at_eos=False)
    assert (told_not_to.stopped, told_not_to.n_tokens) == (False, 6)


def test_sampling_follows_its_seed_and_leaves_the_global_one(loaded):
    state = torch.get_rng_state()
    one, same, other = (
        generate(loaded, PROMPTS[:2], do_sample=True, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(loaded, PROMPTS[:2], do_sample=True, top_p=1e-6, seed=3) == generate(
        loaded, PROMPTS[:2]
    )


@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_settings_are_left_as_they_were(loaded, fails, monkeypatch):
    model = loaded.model.train()
    model.model.layers[0].eval()  # a part that its owner froze
    before = [module.training for module in model.modules()]
    saved = copy.deepcopy(model.generation_config)
    if fails:
        monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(loaded, ["a"])
    else:
        generate(loaded, ["a"])
    assert [module.training for module in model.modules()] == before
    assert model.generation_config == saved
    assert model.config.use_cache
    model.eval()


def test_an_adapter_generates_too_in_order():
    loaded = load_base(ModelConfig(device="cpu", quantization="nf4"))
    model = attach_lora(loaded.model, LoraSettings(), seed=0)
    done = generate_texts(model, loaded.tokenizer, PROMPTS, max_new_tokens=2, batch_size=3)
    assert [d.prompt for d in done] == PROMPTS
    assert generate_texts(model, loaded.tokenizer, [], max_new_tokens=2) == []
