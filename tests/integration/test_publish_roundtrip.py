"""What was saved computes what was in memory, to the last bit, in a process that knows nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import make_run
from transformers import AutoModelForCausalLM, GemmaConfig, set_seed

from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.models import load_base, merge_adapter
from gemmate_lib.publish import (
    fresh_logits,
    last_logits,
    load_saved,
    pull_and_verify,
    push_plan,
    save_merged,
    stage,
)
from gemmate_lib.sft import load_run
from gemmate_lib.tiny.tokenizer import train_tokenizer, wrap

PROMPT = "Quote: Imagination is more"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small random Gemma in it."""
    home = tmp_path_factory.mktemp("home")
    set_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    tokens = {"vocab_size": 2048, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = GemmaConfig(**shape, **heads, **tokens)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(home / "base")
    wrap(train_tokenizer(seed=1, n_documents=500)).save_pretrained(home / "base")
    return home


def saved_run(home, quantization):
    """A run with training state in it, and the logits it had in memory at the end."""
    directory = home / f"run-{quantization}"
    model = ModelConfig(id=str(home / "base"), quantization=quantization, device="cpu")
    in_memory = make_run(directory, model, PROMPT)
    torch.save({"lr": 1}, directory / "adapter" / "training_args.bin")
    return load_run(directory), in_memory


@pytest.fixture(scope="module")
def quantized(home):
    return saved_run(home, "nf4")


def _saved(folder):
    loaded = load_saved(folder)
    return loaded.model, loaded.tokenizer


def test_an_adapter_comes_back_exactly(home, quantized):
    run, in_memory = quantized
    base = load_base(run.experiment.model)
    plain = last_logits(base.model, base.tokenizer, PROMPT)
    assert len(in_memory) == 2048 and in_memory != plain  # the adapter does something
    staged = stage(run, home / "staged-exactly")
    assert last_logits(*_saved(run.adapter), PROMPT) == in_memory
    assert fresh_logits(staged, PROMPT, kind="adapter", base=run.experiment.model) == in_memory


def test_the_logits_are_those_after_the_prompt(home):
    base = load_base(ModelConfig(id=str(home / "base"), device="cpu"))
    ids = base.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = base.model(ids).logits[0, -1]
    base.model.train()
    found = torch.tensor(last_logits(base.model, base.tokenizer, PROMPT))
    torch.testing.assert_close(found, expected)
    assert base.model.training


def test_a_merged_model_comes_back_exactly(home, quantized):
    run, _ = quantized
    merged = merge_adapter(run.adapter, run.experiment.model.id)
    in_memory = last_logits(merged.model, merged.tokenizer, PROMPT)
    folder = save_merged(run, home / "merged")
    assert fresh_logits(folder, PROMPT, kind="merged") == in_memory
    unquantized, adapted = saved_run(home, "none")
    assert unquantized.adapter != run.adapter
    torch.testing.assert_close(*map(torch.tensor, (adapted, in_memory)), atol=1e-4, rtol=1e-4)


def test_other_weights_give_other_logits(home, quantized):
    from safetensors.torch import load_file, save_file

    run, in_memory = quantized
    copy = Path(shutil.copytree(run.directory, home / "changed")) / "adapter"
    weights = load_file(copy / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] += 0.5
    save_file(weights, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    assert last_logits(*_saved(copy), PROMPT) != in_memory


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_staged_is_clean_and_loads_as_its_card_says(home, quantized, monkeypatch, merged):
    run, _ = quantized
    staged = stage(run, home / f"staged-{merged}", merged=merged)
    names = {file.file for file in push_plan(staged)}
    ours = {"adapter_model.safetensors", "adapter_config.json", "gemmate_base.json"}
    theirs = {"model.safetensors", "config.json", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == (theirs if merged else ours) | tokenizer | {"README.md", "manifest.json"}
    assert (
        pull_and_verify(shutil.copytree(staged, home / f"copy-{merged}"), push_plan(staged)) == []
    )
    private = str(home).encode()
    assert not [file.name for file in staged.iterdir() if private in file.read_bytes()]

    code = (staged / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(home)  # where the base, a local one here, goes by its name alone
    found: dict = {}
    exec(code.replace('folder = "."', f"folder = {str(staged)!r}"), found)
    if merged:
        loaded = merge_adapter(run.adapter, run.experiment.model.id)
    else:
        loaded = load_saved(run.adapter)
    expected = last_logits(loaded.model, loaded.tokenizer, PROMPT)
    assert last_logits(found["model"], found["tokenizer"], PROMPT) == expected


def test_a_merged_model_does_not_pass_for_its_base(home, quantized):
    run, _ = quantized
    folder = stage(run, home / "not-its-base", merged=True)
    other = ModelConfig(id=str(folder), device="cpu")
    with pytest.raises(GemmateError, match="was trained on"):
        load_saved(run.adapter, base=other)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
