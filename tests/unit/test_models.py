"""Bases and adapters: what is loaded, what is refused, and what is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gemmate_lib import machine, models
from gemmate_lib.config import PRESETS, Facts, GemmateError, LoraSettings, ModelConfig
from gemmate_lib.models import (
    EMBEDDED,
    attach_lora,
    load_adapter,
    load_base,
    merge_adapter,
    predict_bytes,
    save_4bit,
    save_adapter,
    target_modules,
    weights_hash,
)

SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.tensor([[2, 30, 40, 50, 60, 70]])


def base(quantization="none", **settings):
    return load_base(ModelConfig(quantization=quantization, device="cpu", **settings))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapter(loaded, directory, *, seed=0):
    """A saved adapter that does something: its B matrices are not zero."""
    model = attach_lora(loaded.model, LoraSettings(), seed=seed)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, directory, loaded.base)
    return model


@pytest.fixture
def on(monkeypatch):
    def pretend(**facts):
        monkeypatch.setattr(machine, "read_facts", lambda: Facts(ram_gib=16, **facts))

    return pretend


@pytest.fixture
def other_base(tmp_path):
    """A base of the same shapes with other weights."""
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(EMBEDDED["tiny-gemma"], tmp_path / "other"))
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, file, metadata={"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_has_the_dtype_asked_for_and_says_why(dtype):
    loaded = base(compute_dtype=dtype)
    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype}"}
    assert loaded.device == "cpu" and "device cpu: asked for" in loaded.reasons
    assert loaded.tokenizer.pad_token_id is not None


def test_nf4_takes_the_projections_alone():
    kinds = {type(m).__name__ for n, m in base("nf4").model.named_modules() if n.endswith("_proj")}
    assert kinds == {"Linear4bit"}
    assert type(base("nf4").model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize(
    ("facts", "settings", "remedy"),
    [
        ({"device": "cpu"}, {"compute_dtype": "float16"}, "compute_dtype=float32"),
        ({"device": "cpu"}, {"device": "cuda"}, "model.device=auto"),
        (
            {"device": "cuda", "capability": (7, 5)},
            {"compute_dtype": "bfloat16", "device": "auto"},
            "compute_dtype=float16",
        ),
    ],
)
def test_what_the_machine_cannot_compute_is_refused(on, facts, settings, remedy):
    on(**facts)
    with pytest.raises(GemmateError, match=remedy):
        load_base(ModelConfig(**settings))


def test_attention_gemma2_cannot_compute_is_refused():
    assert base(id="tiny-gemma2").model.config._attn_implementation == "eager"
    with pytest.raises(GemmateError, match="scaled_dot_product"):
        base(id="tiny-gemma2", attention="sdpa")


def test_only_safetensors_are_read(tmp_path):
    copy = shutil.copytree(EMBEDDED["tiny-gemma"], tmp_path / "pickled")
    (weights,) = Path(copy).glob("*.safetensors")
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(GemmateError, match="safetensors"):
        base(id=str(copy))


def test_hub_models_come_pinned_and_run_no_code_of_theirs(monkeypatch):
    import transformers

    from gemmate_lib import auth

    asked = {}

    def unreachable(path, **options):
        asked.update(options, path=path)
        raise OSError("cannot reach the Hub")

    report = type("Report", (), {"remedy": "Go online once."})
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(auth, "check_access", lambda *_: report)
    with pytest.raises(GemmateError, match="Go online once"):
        base(id="google/gemma-2b")
    assert asked["revision"] == PRESETS["google/gemma-2b"]
    assert asked["trust_remote_code"] is False


def test_lora_goes_on_the_seven_projections():
    model = base().model
    assert target_modules(model) == target_modules(model, every=True) == SEVEN
    model = attach_lora(model, LoraSettings(), seed=0)
    assert target_modules(model) == SEVEN
    trained = {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(trained) == SEVEN


def test_the_seed_decides_the_adapter():
    def drawn(seed):
        torch.manual_seed(99)
        model = attach_lora(base().model, LoraSettings(), seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_a_second_adapter_is_refused_and_the_same_one_is_kept():
    model = attach_lora(base().model, LoraSettings(), seed=0)
    assert attach_lora(model, LoraSettings(), seed=1) is model
    for other in (LoraSettings(r=4), LoraSettings(target_modules=("q_proj",))):
        with pytest.raises(GemmateError, match="another adapter"):
            attach_lora(model, other, seed=0)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_layers_tied_to_the_embeddings_are_refused(layer):
    with pytest.raises(GemmateError, match="shares its weights"):
        attach_lora(base().model, LoraSettings(target_modules=("q_proj", layer)), seed=0)


def test_an_unknown_layer_is_named():
    with pytest.raises(GemmateError, match=r"query.*It has.*q_proj"):
        attach_lora(base().model, LoraSettings(target_modules=("q_proj", "query")), seed=0)


def test_an_adapter_comes_back_as_it_was_saved(tmp_path):
    loaded = base("nf4")
    saved = logits(adapter(loaded, tmp_path))
    assert not torch.equal(saved, logits(base("nf4").model))
    again = load_adapter(base("nf4"), tmp_path)
    assert torch.equal(logits(again), saved)
    assert not any(p.requires_grad for p in again.parameters())
    assert any(p.requires_grad for p in load_adapter(base(), tmp_path, trainable=True).parameters())


def test_what_is_written_is_stable_and_names_its_base(tmp_path):
    loaded = base()
    model = adapter(loaded, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == SEVEN
    assert config["base_model_name_or_path"] == "tiny-gemma"
    assert json.loads((tmp_path / "ours" / "gemmate_base.json").read_text()) == {
        "id": "tiny-gemma",
        "revision": None,
        "weights_sha256": weights_hash("tiny-gemma"),
    }
    assert not (tmp_path / "ours" / "README.md").exists()
    model.save_pretrained(tmp_path / "trainer")  # as a trainer's checkpoint does
    config = json.loads((tmp_path / "trainer" / "adapter_config.json").read_text())
    assert config["target_modules"] == SEVEN
    load_adapter(base(), tmp_path / "trainer")  # without our record, the name of the base counts


def test_saving_writes_the_adapter_alone_and_asks_nobody(tmp_path, monkeypatch):
    from peft.utils import save_and_load
    from safetensors import safe_open

    loaded = base()
    model = attach_lora(loaded.model, LoraSettings(), seed=0)
    model.peft_config["default"].base_model_name_or_path = "nobody/on-the-hub"
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *_: 1 / 0)
    save_adapter(model, tmp_path, loaded.base)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        assert all(".lora_" in name for name in saved.keys())  # noqa: SIM118 (not a dict)


def test_an_adapter_of_another_base_is_refused(tmp_path, other_base):
    adapter(base(), tmp_path / "a")
    with pytest.raises(GemmateError, match=r"trained on tiny-gemma .*force=True"):
        load_adapter(base(id=other_base), tmp_path / "a")
    load_adapter(base(id=other_base), tmp_path / "a", force=True)
    (tmp_path / "a" / "gemmate_base.json").unlink()
    with pytest.raises(GemmateError, match="trained on tiny-gemma"):
        load_adapter(base(id=other_base), tmp_path / "a")
    with pytest.raises(GemmateError, match="no adapter_config"):
        load_adapter(base(), tmp_path)


def test_one_changed_weight_changes_the_hash(other_base):
    assert weights_hash("tiny-gemma") == weights_hash(models.model_path("tiny-gemma"))
    assert weights_hash(other_base) != weights_hash("tiny-gemma")
    assert weights_hash("nobody/has-this") is None


@pytest.mark.parametrize("trained_on", ["none", "nf4"])
def test_merging_gives_the_full_precision_base_plus_the_adapter(tmp_path, trained_on):
    adapter(base(trained_on), tmp_path)
    merged = merge_adapter(tmp_path, "tiny-gemma")
    expected = logits(load_adapter(base(), tmp_path))
    torch.testing.assert_close(logits(merged.model), expected, atol=1e-4, rtol=1e-4)
    assert not hasattr(merged.model, "peft_config") and {
        p.dtype for p in merged.model.parameters()
    } == {torch.float32}


def test_merging_refuses_what_would_be_silently_wrong(tmp_path, other_base):
    loaded = base("nf4")
    save_4bit(loaded, tmp_path / "copy")
    model = adapter(loaded, tmp_path / "a")
    with pytest.raises(GemmateError, match="Merge into tiny-gemma"):
        merge_adapter(tmp_path / "a", str(tmp_path / "copy"))
    with pytest.raises(GemmateError, match="trained on tiny-gemma"):
        merge_adapter(tmp_path / "a", other_base)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = torch.nan
    save_adapter(model, tmp_path / "nan", loaded.base)
    with pytest.raises(GemmateError, match="NaN"):
        merge_adapter(tmp_path / "nan", "tiny-gemma")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["lm_head"]}))
    with pytest.raises(GemmateError, match="shares its weights"):
        merge_adapter(tmp_path / "a", "tiny-gemma")


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_a_4bit_copy_computes_the_same_and_knows_its_original(tmp_path, quantization):
    loaded = base(quantization)
    save_4bit(loaded, tmp_path)
    again = base(id=str(tmp_path))
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.base == loaded.base
    assert again.model.get_submodule("model.layers.0.mlp.up_proj").compute_dtype == torch.float32
    other = base(id=str(tmp_path), compute_dtype="bfloat16").model
    assert other.get_submodule("model.layers.0.mlp.up_proj").compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-double"])
def test_predicted_bytes_are_the_bytes(quantization):
    model, found = base(quantization).model, 0
    for parameter in model.parameters():
        found += parameter.numel() * parameter.itemsize
        if state := getattr(parameter, "quant_state", None):
            parts = state.as_dict(packed=False).values()
            found += sum(part.numel() * part.itemsize for part in parts if torch.is_tensor(part))
    assert predict_bytes(model.config, quantization) == pytest.approx(found, rel=1e-3)


def test_predicted_bytes_of_the_true_shape():
    from transformers import GemmaConfig

    gemma_2b = GemmaConfig(
        hidden_size=2048,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=16384,
        vocab_size=256000,
    )
    parameters = predict_bytes(gemma_2b, "none", dtype="bfloat16") / 2
    assert parameters == pytest.approx(2.51e9, rel=0.01)  # the model card's 2.51 billion
    assert predict_bytes(gemma_2b, "nf4", dtype="bfloat16") / 2**30 == pytest.approx(2.0, rel=0.02)
