"""Other families than Gemma go the same way: Llama, and GPT-2 with its transposed layers."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from gemmate_lib.cli import finetune
from gemmate_lib.cli_runs import generate
from gemmate_lib.config import LoraSettings, ModelConfig
from gemmate_lib.generate import encode_prompt, generate_texts
from gemmate_lib.models import (
    attach_lora,
    load_adapter,
    load_base,
    merge_adapter,
    predict_bytes,
    save_adapter,
    target_modules,
)

TEXTS = ["Quote: a model of another family", "Author: nobody in particular", "once upon a time"]
PROMPTS = ["Quote: a model", "", "Author: nobody in particular once upon a time"]
LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(
    vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
)
FAMILIES = {
    "llama": (LLAMA, "<s>", "</s>"),
    "gpt2": (GPT2, "<|endoftext|>", "<|endoftext|>"),
}
EXPECTED = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


@pytest.fixture(scope="module", params=FAMILIES)
def foreign(request, tmp_path_factory):
    """(family, directory): a random model and a byte-level tokenizer without a padding token."""
    config, bos, eos = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    words = Tokenizer(tokenizer_models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(dict.fromkeys([bos, eos])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos)
    tokenizer.save_pretrained(directory)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return request.param, str(directory)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_load_adapt_step_save_generate_merge(foreign, quantization, tmp_path):
    family, directory = foreign
    base = load_base(ModelConfig(id=directory, quantization=quantization, device="cpu"))
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id
    assert target_modules(base.model) == EXPECTED[family]
    kinds = {type(m).__name__ for m in base.model.modules()}
    assert ("Linear4bit" in kinds) == (quantization == "nf4")
    ids = torch.tensor([encode_prompt(base.tokenizer, TEXTS[0])])
    plain = logits(base.model, ids)

    model = attach_lora(base.model, LoraSettings(), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(logits(model, ids), plain)

    together = generate_texts(model, base.tokenizer, PROMPTS, max_new_tokens=4)
    assert together == generate_texts(
        model, base.tokenizer, PROMPTS, max_new_tokens=4, batch_size=1
    )

    save_adapter(model, tmp_path, base.base)
    again = load_base(ModelConfig(id=directory, device="cpu"))
    full = load_adapter(again, tmp_path)  # full precision, whatever it was trained on
    expected = logits(full, ids)
    merged = merge_adapter(tmp_path, directory).model
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-4)
    if quantization == "none":
        torch.testing.assert_close(expected, logits(model, ids), atol=1e-6, rtol=1e-5)


def test_nf4_of_gpt2_is_the_nf4_of_its_transposed_weights(foreign):
    """4-bit layers store [out, in]; transformers transposes GPT-2's Conv1D before quantizing."""
    family, directory = foreign
    full = load_base(ModelConfig(id=directory, device="cpu")).model
    four = load_base(ModelConfig(id=directory, quantization="nf4", device="cpu")).model
    ids = torch.arange(2, 40)[None]
    distance = (logits(four, ids) - logits(full, ids)).norm() / logits(full, ids).norm()
    assert 0 < distance < 0.2  # 4 bits: near, not equal
    shapes = {m.in_features for m in four.modules() if hasattr(m, "quant_state")}
    assert shapes == {64, 256 if family == "gpt2" else 128}
    assert predict_bytes(full, "nf4") < predict_bytes(full, "none") * 0.7


def test_the_command_line_fine_tunes_it(foreign, tmp_path, capsys):
    _, directory = foreign
    finetune(
        "quotes",
        out=tmp_path / "run",
        settings=[f"model={directory}", "training.max_steps=3", "dataset.limit=40"],
        profile="tiny",
        limit=4,
    )
    told = capsys.readouterr().out
    assert "trained 3 steps" in told and "quote_perplexity" in told
    generate(tmp_path / "run", prompt="Quote: a", max_new_tokens=3)
    assert capsys.readouterr().out.startswith("Quote: a")
