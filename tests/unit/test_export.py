"""Merged models for other servers: what their converters read is there, and nothing was lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_run import make_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gemmate_lib.cli import app
from gemmate_lib.config import Experiment, GemmateError, ModelConfig
from gemmate_lib.export import _flat_rope, export, modelfile
from gemmate_lib.manifest import write_manifest
from gemmate_lib.models import EMBEDDED, load_tokenizer
from gemmate_lib.publish import last_logits
from gemmate_lib.sft import load_run

PROMPT = "Quote: Imagination is more"
LAYER = {
    "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
}  # fmt: skip
# What llama.cpp's GemmaModel and Ollama's gemmaModel read of config.json.
READ = {
    "max_position_embeddings", "hidden_size", "num_hidden_layers", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "head_dim", "vocab_size",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    return make_run(folder, ModelConfig(), PROMPT), folder


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "my model"
    return out, export(load_run(made[1]), out)


@pytest.fixture(scope="module")
def with_pieces(tmp_path_factory):
    """A run on a base that has a SentencePiece file beside its tokenizer, as the true Gemma has."""
    folder = tmp_path_factory.mktemp("pieces")
    shutil.copytree(EMBEDDED["tiny-gemma"], folder / "base")
    (folder / "base" / "tokenizer.model").write_bytes(b"words")
    make_run(folder / "run", ModelConfig(id=str(folder / "base")), PROMPT)
    return load_run(folder / "run")


def test_it_says_what_the_run_said(made, exported):
    model = AutoModelForCausalLM.from_pretrained(exported[0], use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    assert model.dtype == torch.float32
    assert torch.tensor(last_logits(model, tokenizer, PROMPT)) == pytest.approx(
        torch.tensor(made[0]), abs=1e-4
    )
    own = load_tokenizer("tiny-gemma")
    text = "<start_of_turn>user\n12 cafés<end_of_turn>\n"
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert set(tokenizer.all_special_tokens) == set(own.all_special_tokens)
    assert tokenizer.chat_template == own.chat_template


def test_the_tensors_and_settings_that_converters_read(exported):
    folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GemmaForCausalLM"] and config["tie_word_embeddings"]
    assert not READ - config.keys()
    assert (config["torch_dtype"], config["rope_theta"]) == ("float32", 10000.0)
    layers = range(config["num_hidden_layers"])
    names = {f"model.layers.{i}.{part}.weight" for i in layers for part in LAYER}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {*file.keys()} == names | {"model.embed_tokens.weight", "model.norm.weight"}
    files = {file.name for file in folder.iterdir()}
    assert files == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1


def test_the_tokenizer_by_names_that_transformers_4_knows(exported):
    config = json.loads((exported[0] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<start_of_turn>", "<end_of_turn>"]
    assert not {"extra_special_tokens", "backend", "is_local"} & config.keys()


def test_a_rope_that_is_not_the_default_is_read_the_same(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": dict(rope)}
    flat = _flat_rope(json.loads(json.dumps(config)))
    assert flat["rope_theta"] == 5e5 and "rope_theta" not in flat["rope_scaling"]
    assert flat["rope_scaling"]["rope_type"] == "llama3"
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_what_comes_next_is_said_and_quoted(exported, with_pieces, tmp_path):
    folder, lines = exported
    assert "not run here" in lines[0]
    assert lines[1] == f"vllm serve '{folder}' --served-model-name 'my model' --host 127.0.0.1"
    lines = export(with_pieces, tmp_path / "m", target="llama.cpp")
    gguf = tmp_path / "m" / "m.gguf"
    assert lines[1:] == [
        f"python convert_hf_to_gguf.py {tmp_path / 'm'} --outfile {gguf} --outtype f32",
        f"llama-server --model {gguf} --alias m",
    ]
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"words"


def test_ollama_gets_a_modelfile(with_pieces, tmp_path):
    lines = export(with_pieces, tmp_path / "m", target="ollama")
    assert lines[1:] == [f"ollama create m --file {tmp_path / 'm' / 'Modelfile'}", "ollama run m"]
    assert (tmp_path / "m" / "Modelfile").read_text().splitlines() == [
        "FROM .", 'TEMPLATE """{{ .Prompt }}{{ .Response }}"""', 'PARAMETER stop "<eos>"',
        "PARAMETER temperature 0", "PARAMETER num_predict 64",
    ]  # fmt: skip
    assert (tmp_path / "m" / "tokenizer.model").is_file()


def test_a_chat_is_put_as_it_was_in_training(with_pieces):
    with_pieces.manifest["data"]["form"] = "messages"
    try:
        text = modelfile(with_pieces)
    finally:
        del with_pieces.manifest["data"]["form"]
    template = text.split('"""')[1]
    tokenizer = load_tokenizer("tiny-gemma")
    turns = [{"role": "user", "content": "Hello?"}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, _, after = template.partition("{{ .Response }}")
    assert "<bos>" + before.replace("{{ .Prompt }}", "Hello?") == asked
    assert after == "<end_of_turn>\n" and 'PARAMETER stop "<end_of_turn>"' in text


def record(folder, **settings):
    """A run of which only the record is needed."""
    given = {"name": "quotes"} | settings
    folder.mkdir()
    write_manifest(
        folder, kind="sft", experiment=Experiment.model_validate(given), facts={}, data={}, base={},
        metrics={}, timings={},
    )  # fmt: skip
    return load_run(folder)


@pytest.mark.parametrize(
    ("settings", "target", "said"),
    [
        ({}, "llama.cpp", "tiny-gemma has none. Export a run on google/gemma-2b"),
        ({}, "ollama", "reads the words of a Gemma from tokenizer.model"),
        ({"model": {"temporal_kind": "calendar"}}, "vllm", "not a model with an encoder of time"),
        ({"method": "prompt"}, "vllm", "soft prompt"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_written(tmp_path, settings, target, said):
    with pytest.raises(GemmateError, match=said):
        export(record(tmp_path / "run", **settings), tmp_path / "out", target=target)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_ollama_knows_no_gpt2(tmp_path):
    (tmp_path / "gpt2").mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    run = record(tmp_path / "run", model={"id": str(tmp_path / "gpt2")})
    with pytest.raises(GemmateError, match=r"not GPT2LMHeadModel\. Serve"):
        export(run, tmp_path / "out", target="ollama")


def test_the_command(made, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(made[1]), "--out", str(out)])
    assert done.exit_code == 0 and f"vllm serve {out}" in done.output
    again = CliRunner().invoke(app, ["export", str(made[1]), "--out", str(out)])
    assert isinstance(again.exception, GemmateError) and "exists" in str(again.exception)
    wrong = CliRunner().invoke(app, ["export", str(made[1]), "--out", "x", "--for", "tgi"])
    assert wrong.exit_code == 2 and not Path("x").exists()
