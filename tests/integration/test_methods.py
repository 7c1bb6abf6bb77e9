"""Every method goes the way of LoRA through the same commands; what cannot go together is named."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gemmate_lib import stats
from gemmate_lib.adapters import load_adapter, save_adapter
from gemmate_lib.callbacks import Interrupted
from gemmate_lib.cli import app
from gemmate_lib.config import Facts, GemmateError, ModelConfig, PromptSettings, resolve
from gemmate_lib.generate import encode_prompt, generate_texts
from gemmate_lib.methods import METHODS, attach, attach_prompt, check_method
from gemmate_lib.models import load_base, merge_adapter
from gemmate_lib.publish import fresh_logits, last_logits, load_saved, stage
from gemmate_lib.sft import Run, finetune_model, load_run, load_splits, open_run
from gemmate_lib.trainer import train

SOFT = [name for name, method in METHODS.items() if method.soft]
HARD = [name for name in METHODS if name not in SOFT]
PROMPT = "Quote: Imagination is more"
SHORT = {"max_steps": 3, "eval_every": 0, "training.warmup_steps": 0,
         "training.batch_size": 4, "max_new_tokens": 6}  # fmt: skip


RATES = {"prefix": 0.3, "prompt": 0.3}


@pytest.fixture(autouse=True, scope="module")
def resamples() -> Iterator[None]:
    """Fewer than the library draws: what intervals cover is tested elsewhere."""
    drawn = stats._resampling
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_resampling", lambda *a: drawn(*a) | {"n_resamples": 99})
        yield


@pytest.fixture(autouse=True, scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Eighty quotes in a file, for the data set of thousands is read anew by each command."""
    from gemmate_lib.tiny.sayings import tiny_quotes

    SHORT["dataset"] = str(tmp_path_factory.mktemp("rows") / "quotes.jsonl")
    lines = [json.dumps(row) + "\n" for row in tiny_quotes()[:80]]
    Path(SHORT["dataset"]).write_text("".join(lines), "utf-8")


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def settings_of(method: str, **changes: Any) -> dict[str, Any]:
    held = "nf4" if method == "qlora" else "none"
    own = {"method": method, "model.quantization": held}
    return SHORT | own | {"learning_rate": RATES.get(method, 1e-2)} | changes


def experiment_of(method: str, **changes: Any) -> Any:
    asked = settings_of(method, **changes)
    return resolve("quotes", facts=Facts(), profile="tiny", overrides=asked).experiment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of a method, made once, by the command line."""
    folder = tmp_path_factory.mktemp("runs")

    def make(method: str) -> Run:
        out = folder / method
        if not out.exists():
            given = [f"--set={key}={value}" for key, value in settings_of(method).items()]
            call("finetune", "quotes", "--profile", "tiny", *given, "--limit", 2, "--out", out)
        return load_run(out)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_through_the_same_commands(made: Callable[[str], Run], method: str) -> None:
    run = made(method)
    assert run.experiment.method == method
    assert run.metrics["last_loss"] < run.metrics["first_loss"]
    metrics = json.loads(call("evaluate", run.directory, "--json", "--limit", 2))
    assert metrics["quote_perplexity"]["value"] > 1 and metrics["stopped"]["n"] == 2
    compared = json.loads(call("compare", "base", run.directory, "--json", "--limit", 2))
    assert compared["form_nll"]["difference"]["value"] != 0, "it is not its base"
    told = call("generate", run.directory, "--prompt", PROMPT, "--max-new-tokens", 3)
    assert told.startswith(PROMPT)
    plan = call("push", run.directory, "somebody/something")
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert f"  {weights}\n" in plan and "dry run: nothing was sent" in plan


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_comes_back_to_the_bit(
    made: Callable[[str], Run], method: str, tmp_path: Path
) -> None:
    """The model in memory, as it left the training, and the one that is read from the disk."""
    experiment = experiment_of(method)
    base = load_base(experiment.model)
    splits = load_splits(experiment)
    plain = last_logits(base.model, base.tokenizer, PROMPT)
    model = attach(base.model, experiment)
    train(model, base.tokenizer, splits, experiment, tmp_path / "trainer")
    in_memory = last_logits(model, base.tokenizer, PROMPT)
    opened = open_run(made(method))
    assert last_logits(opened.model, opened.tokenizer, PROMPT) == in_memory != plain


@pytest.mark.parametrize("method", ["dora", *SOFT])
def test_what_is_published_loads_in_a_fresh_process(
    made: Callable[[str], Run], method: str, tmp_path: Path
) -> None:
    run = made(method)
    folder = stage(run, tmp_path / "staged")
    saved = load_saved(folder)
    here = last_logits(saved.model, saved.tokenizer, PROMPT)
    card = (folder / "README.md").read_text("utf-8")
    assert METHODS[method].title in card and f"- {method}\n" in card
    if method in ("dora", "p-tuning"):  # a process takes seconds
        assert fresh_logits(folder, PROMPT, kind="adapter") == here


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "rslora"])
def test_what_changes_layers_merges(made: Callable[[str], Run], method: str) -> None:
    run = made(method)
    merged = merge_adapter(run.adapter, "tiny-gemma")
    opened = open_run(run) if method != "qlora" else load_saved(run.adapter, base=ModelConfig())
    found, expected = (
        torch.tensor(last_logits(m.model, m.tokenizer, PROMPT)) for m in (merged, opened)
    )
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    plain = load_base(ModelConfig())
    base = torch.tensor(last_logits(plain.model, plain.tokenizer, PROMPT))
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize("method", SOFT)
def test_a_soft_prompt_has_nothing_to_merge(made: Callable[[str], Run], method: str) -> None:
    run = made(method)
    with pytest.raises(GemmateError, match="changes no layer: there is nothing to merge"):
        merge_adapter(run.adapter, "tiny-gemma")
    result = CliRunner().invoke(app, ["push", str(run.directory), "a/b", "--merged"])
    assert isinstance(result.exception, GemmateError)


def _by_hand(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Greedy, with the whole text computed anew for each token: no cache, no padding."""
    ids = encode_prompt(tokenizer, prompt)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("method", ["dora", *SOFT])
def test_texts_do_not_depend_on_the_batch(made: Callable[[str], Run], method: str) -> None:
    opened = open_run(made(method))
    prompts = [PROMPT, "Quote: A Woman is like a tea bag;", "Quote: Outside of", PROMPT, "Quote:"]
    done = generate_texts(
        opened.model, opened.tokenizer, prompts, max_new_tokens=8, stop_at_eos=False
    )
    expected = [_by_hand(opened.model, opened.tokenizer, prompt, 8) for prompt in prompts]
    assert [each.text for each in done] == expected


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_canary_peft_still_forgets_positions(made: Callable[[str], Run]) -> None:
    """When this fails, `_batches` in gemmate_lib/generate.py need no longer part by length."""
    opened = open_run(made("prompt"))
    ids = torch.tensor([[2, 50, 60, 70, 80]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    given = {"max_new_tokens": 1, "do_sample": False, "output_logits": True,
             "return_dict_in_generate": True}  # fmt: skip
    alone = opened.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    mask = (torch.arange(8) >= 3).long()[None]
    moved = opened.model.generate(input_ids=padded, attention_mask=mask, **given)
    assert (alone.logits[0] - moved.logits[0]).abs().max() > 1e-3


def test_prefix_and_checkpointing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="no layer reads the cache that holds the prefix"):
        check_method(experiment_of("prefix", gradient_checkpointing=True))
    for method in ("prompt", "p-tuning", "dora"):
        check_method(experiment_of(method, gradient_checkpointing=True))
    result = CliRunner().invoke(
        app, ["finetune", "quotes", "--profile=tiny", "--set=method=prefix",
              "--set=gradient_checkpointing=true", f"--out={tmp_path / 'run'}"],
    )  # fmt: skip
    assert "gradient_checkpointing=false" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_canary_a_checkpointed_layer_still_drops_the_prefix() -> None:
    """When this fails, prefix tuning may go with gradient checkpointing: see check_method."""
    base = load_base(ModelConfig()).model
    model = attach_prompt(base, "prefix", PromptSettings(virtual_tokens=4), seed=0).train()
    ids = torch.tensor([[2, 50, 60, 70]])
    model(input_ids=ids, use_cache=False)
    base.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="must match the size"):
        model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("method", SOFT)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"packing": True}, "need their own positions"),
        ({"save_every": 1}, "checkpoints are of no use"),
        ({"checkpoint.save_strategy": "epoch"}, "checkpoints are of no use"),
        ({"checkpoint.resume_from_checkpoint": True}, "checkpoints are of no use"),
        ({"eval_every": 1, "early_stopping_patience": 1}, "checkpoints are of no use"),
        ({"model.temporal_kind": "log"}, "trains no weight of the model"),
    ],
)
def test_what_a_soft_prompt_cannot_go_with(method: str, change: dict[str, Any], why: str) -> None:
    with pytest.raises(GemmateError, match=why):
        check_method(experiment_of(method, **change))
    check_method(experiment_of("dora", **change))


def test_a_soft_prompt_on_a_model_that_knows_time_is_refused() -> None:
    base = load_base(ModelConfig(temporal_kind="log"))
    with pytest.raises(GemmateError, match="temporal encoder would stay as it is"):
        attach_prompt(base.model, "prompt", PromptSettings(), seed=0)


@pytest.mark.parametrize("method", ["dora", "rslora", "qlora"])
def test_kin_of_lora_teach_the_encoder_of_time_too(method: str, tmp_path: Path) -> None:
    changes = {"model.temporal_kind": "log"}
    experiment = experiment_of(method, **changes)
    loaded = load_base(experiment.model)
    model = attach(loaded.model, experiment)
    learned = [n for n, p in model.named_parameters() if p.requires_grad and "temporal" in n]
    assert learned
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.01))
    ids, times = torch.tensor([[2, 50, 60]]), torch.tensor([1_148_342_400_000])
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids, timestamps=times).logits
        save_adapter(model, tmp_path, loaded.base)
        again = load_adapter(load_base(experiment.model), tmp_path).eval()
        assert torch.equal(again(input_ids=ids, timestamps=times).logits, expected)


def test_qlora_means_four_bits() -> None:
    given = {"method": "qlora"}
    for profile, held in (("tiny", "nf4"), ("t4", "nf4-double"), ("full", "nf4")):
        found = resolve("quotes", facts=Facts(), profile=profile, overrides=given)
        assert found.experiment.model.quantization == held
    assert "4 bits" in found.reasons["model.quantization"]
    plain = resolve("quotes", facts=Facts(), profile="full", overrides={"method": "lora"})
    assert plain.experiment.model.quantization == "none"
    other = experiment_of("qlora", **{"model.quantization": "none"})
    with pytest.raises(GemmateError, match=r"not quantized.*quantization=nf4"):
        attach(load_base(other.model).model, other)


@pytest.mark.parametrize("method", HARD[1:-1])
def test_another_kind_of_lora_is_not_stacked(method: str) -> None:
    experiment = experiment_of(method)
    once = attach(load_base(experiment.model).model, experiment)
    assert attach(once, experiment) is once
    if method != "qlora":
        with pytest.raises(GemmateError, match="has another adapter already"):
            attach(once, experiment.model_copy(update={"method": "lora"}))
    with pytest.raises(GemmateError, match="has another adapter already"):
        attach(once, experiment.model_copy(update={"method": "prompt"}))


@pytest.fixture
def copied(made: Callable[[str], Run], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run's adapter, to be damaged."""
    return lambda method: Path(shutil.copytree(made(method).adapter, tmp_path / method))


@pytest.mark.parametrize("setting", [
    {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "a/b"},
    {"tokenizer_name_or_path": "somebody/else"}, {"tokenizer_kwargs": {"revision": "x"}},
])  # fmt: skip
def test_a_prompt_that_would_read_a_tokenizer_is_refused(
    copied: Callable[[str], Path], setting: dict[str, Any]
) -> None:
    folder = copied("prompt")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | setting), "utf-8")
    with pytest.raises(GemmateError, match="names a tokenizer to start from"):
        load_adapter(load_base(ModelConfig()), folder)


@pytest.mark.parametrize("method", SOFT)
def test_a_damaged_soft_prompt_is_refused(copied: Callable[[str], Path], method: str) -> None:
    folder = copied(method)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert list(tensors) == ["prompt_embeddings"]
    for wrong in ({"other": tensors["prompt_embeddings"]},
                  {"prompt_embeddings": tensors["prompt_embeddings"][:-1].clone()}):  # fmt: skip
        save_file(wrong, weights, metadata={"format": "pt"})
        with pytest.raises(GemmateError, match=r"Cannot load .* Train it again"):
            load_adapter(load_base(ModelConfig()), folder)
    weights.unlink()
    with pytest.raises(GemmateError, match="Only safetensors are read"):
        load_adapter(load_base(ModelConfig()), folder)


def test_a_soft_prompt_of_another_base_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("prefix")
    with pytest.raises(GemmateError, match="was trained on tiny-gemma"):
        load_adapter(load_base(ModelConfig(id="tiny-gemma2")), folder)
    with pytest.raises(GemmateError, match="Cannot set a prompt learning adapter to trainable"):
        load_adapter(load_base(ModelConfig()), folder, trainable=True)


@pytest.mark.parametrize("method", ["prompt", "dora"])
def test_an_interrupted_soft_prompt_leaves_nothing(method: str, tmp_path: Path) -> None:
    """No checkpoint that could not be gone on with; what LoRA's kin leave can be."""

    def interrupt(record: dict[str, float]) -> None:
        if record["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            finetune_model(experiment_of(method), out=tmp_path / "run", report=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    soft = METHODS[method].soft
    assert isinstance(stopped.value, Interrupted) != soft
    assert (tmp_path / "run/checkpoints").exists() != soft
    assert (tmp_path / "run").exists() != soft
