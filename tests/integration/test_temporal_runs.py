"""Time-aware runs: trained, saved, loaded, merged and asked; each mistake is named."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gemmate_lib.adapters import load_adapter, save_adapter
from gemmate_lib.cli import app
from gemmate_lib.config import Facts, GemmateError, LoraSettings, ModelConfig, resolve
from gemmate_lib.evaluate import evaluate_run
from gemmate_lib.generate import generate_texts
from gemmate_lib.models import attach_lora, load_base, merge_adapter
from gemmate_lib.publish import load_saved, stage
from gemmate_lib.sft import Run, finetune_model, load_run, open_run
from gemmate_lib.shipped import keep
from gemmate_lib.temporal.questions import as_row, questions
from gemmate_lib.timestamps import MISSING

NF4 = {"model.quantization": "nf4"}
T = [1_148_342_400_000, 1_234_567_890_000, -5]
PROMPT = "What is today's date?"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 dated questions in a file."""
    path = tmp_path_factory.mktemp("rows") / "dated.jsonl"
    found = (as_row(dialogue) for dialogue in islice(questions(5), 400))
    path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    return path


@pytest.fixture(scope="module")
def make(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Fine-tune on them for a few steps."""

    def run(**overrides: Any) -> Run:
        short = {"dataset": str(rows), "max_steps": 3, "warmup_steps": 0, "learning_rate": 2e-2}
        found = resolve("temporal", facts=Facts(), profile="tiny", overrides=short | overrides)
        return finetune_model(found.experiment, out=tmp_path_factory.mktemp("run") / "run")

    return run


def logits(model: Any, times: list[int] | None = T) -> torch.Tensor:
    ids = torch.tensor([[2, 50, 60, 70]] * 3)
    given = {} if times is None else {"timestamps": torch.tensor(times)}
    with torch.inference_mode():
        return model.eval()(input_ids=ids, **given).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("base", ["tiny-gemma", "tiny-gemma2"])
def test_the_encoder_trains_in_fp32_and_travels_with_the_adapter(
    make: Callable[..., Run], base: str, quantization: str
) -> None:
    run = make(**{"model.id": base, "model.quantization": quantization})
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    (name,) = (name for name in weights if "lora" not in name)
    assert name.endswith("temporal.projection.weight") and weights[name].abs().max() > 0
    opened = open_run(load_run(run.directory))
    assert torch.equal(opened.model.temporal.projection.weight, weights[name])
    found = logits(opened.model)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    again = load_saved(run.adapter)
    assert torch.equal(logits(again.model), found)
    with opened.model.disable_adapter():
        assert torch.equal(logits(opened.model), logits(load_base(run.experiment.model).model))


def test_a_merged_run_is_a_time_aware_model(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make()
    merged = merge_adapter(run.adapter, "tiny-gemma").model
    torch.testing.assert_close(logits(merged), logits(open_run(run).model), atol=5e-3, rtol=1e-3)
    folder = stage(run, tmp_path / "merged", merged=True)
    loaded = load_saved(folder)
    assert loaded.model.config.temporal_kind == "calendar"
    assert torch.equal(logits(loaded.model), logits(merged))
    half = merge_adapter(run.adapter, "tiny-gemma", dtype="bfloat16").model
    assert half.temporal.projection.weight.dtype == torch.float32
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_an_adapter_to_ship_is_half_as_large_and_as_exact_in_time(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    run = make()
    folder = keep(run, tmp_path / "kept")
    kept, whole = (load_file(f / "adapter_model.safetensors") for f in (folder, run.adapter))
    assert kept.keys() == whole.keys()
    for name, tensor in kept.items():
        exact = "temporal" in name
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16)
        assert torch.equal(tensor, whole[name].to(tensor.dtype))
    torch.testing.assert_close(
        logits(load_saved(folder).model), logits(open_run(run).model), atol=0.2, rtol=0.05
    )
    assert json.loads((folder / "build.json").read_text("utf-8"))["first"][0] > 0


def test_every_weight_can_be_trained(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make(method="full")
    opened, base = open_run(load_run(run.directory)), load_base(run.experiment.model)
    assert type(opened.model).__name__ == "GemmaTEForCausalLM"
    before = dict(base.model.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in opened.model.named_parameters())
    assert not run.adapter.exists()
    folder = stage(run, tmp_path / "staged")
    assert torch.equal(logits(load_saved(folder).model), logits(opened.model))
    plain = evaluate_run(run, limit=2, base_only=True)
    assert plain.metrics != evaluate_run(run, limit=2, save=False).metrics
    with pytest.raises(GemmateError, match=r"quantized base cannot be trained. .* method=lora"):
        make(method="full", **NF4)


def test_gradient_checkpointing_changes_nothing(make: Callable[..., Run]) -> None:
    plain, saving = (make(**NF4, gradient_checkpointing=on) for on in (False, True))
    both = [load_file(run.adapter / "adapter_model.safetensors") for run in (plain, saving)]
    assert both[0].keys() == both[1].keys()
    for name, tensor in both[0].items():
        torch.testing.assert_close(tensor, both[1][name], atol=1e-5, rtol=1e-4)


def test_losses_and_answers_of_an_evaluation_depend_on_the_time(
    make: Callable[..., Run], rows: Path, tmp_path: Path
) -> None:
    run = make()
    shifted = tmp_path / "later.jsonl"
    lines = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    later = [row | {"timestamp": row["timestamp"] + 10**12} for row in lines]
    shifted.write_text("".join(json.dumps(row) + "\n" for row in later), "utf-8")
    moved = run.experiment.dataset.model_copy(update={"id": str(shifted)})
    other = Run(run.directory, run.experiment.model_copy(update={"dataset": moved}), {}, True)
    first, second = (evaluate_run(r, limit=4, save=False) for r in (run, other))
    assert first.per_row["completion_nll"] != second.per_row["completion_nll"]
    assert first.metrics["exact_match"].n == 4


def test_generation_does_not_depend_on_the_batch(make: Callable[..., Run]) -> None:
    opened = open_run(make())
    prompts = [PROMPT, "What time is it?", "Which weekday is it, please?"] * 2
    times = [*T, MISSING, T[0] + 1, T[1]]
    one, six = (
        generate_texts(
            opened.model, opened.tokenizer, prompts,
            timestamps=times, max_new_tokens=6, batch_size=size,
        )
        for size in (1, 6)
    )  # fmt: skip
    assert [a.text for a in one] == [b.text for b in six]
    unknown = generate_texts(opened.model, opened.tokenizer, [PROMPT], max_new_tokens=6)
    none = generate_texts(
        opened.model, opened.tokenizer, [PROMPT], timestamps=[None], max_new_tokens=6
    )
    assert unknown[0].text == none[0].text
    with pytest.raises(GemmateError, match="2 timestamps for 1 prompts"):
        generate_texts(opened.model, opened.tokenizer, ["a"], timestamps=T[:2], max_new_tokens=1)
    plain = load_base(ModelConfig())
    with pytest.raises(GemmateError, match="The model knows no time"):
        generate_texts(plain.model, plain.tokenizer, ["a"], timestamps=[5], max_new_tokens=1)


def test_a_single_prompt_is_asked_now_unless_told_otherwise() -> None:
    model = load_base(ModelConfig(temporal_kind="calendar")).model.eval()
    torch.nn.init.normal_(model.temporal.projection.weight, std=0.3)
    ids, options = torch.tensor([[2, 50, 60]]), {"max_new_tokens": 5, "do_sample": False}
    asked = [T[0], T[1]]
    at = [model.generate(ids, timestamps=torch.tensor([t]), **options) for t in asked]
    assert not torch.equal(*at)
    for time, expected in zip(asked, at, strict=True):
        model.clock = lambda time=time: time
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
    model.clock = None
    timeless = model.generate(ids, **options)
    assert torch.equal(model.generate(ids.repeat(2, 1), **options)[1], timeless[0])


def test_the_command_line_asks_at_a_time(make: Callable[..., Run], tmp_path: Path) -> None:
    run, runner = make(), CliRunner()
    folder = str(run.directory)

    def said(*options: str) -> str:
        done = runner.invoke(app, ["generate", folder, "--max-new-tokens", "8", *options])
        assert done.exit_code == 0, done.output
        return done.output

    milliseconds = said("--prompt", PROMPT, "--timestamp", "1234567890000")
    assert milliseconds == said("--prompt", PROMPT, "--timestamp", "2009-02-13T23:31:30Z")
    assert said("--prompt", PROMPT).startswith(PROMPT)  # now
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = [{"prompt": PROMPT, "timestamp": T[1], "id": 1}, {"prompt": PROMPT, "id": 2}]
    source.write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    said("--input", str(source), "--output", str(output))
    done = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row | {"completion": None} for row in done] == [r | {"completion": None} for r in asked]
    assert PROMPT + done[0]["completion"] == milliseconds.rstrip("\n")
    for options, why in (
        (["--prompt", PROMPT, "--timestamp", "soon"], "is no timestamp: 'soon'"),
        (["--input", str(source), "--output", str(output), "--timestamp", "1"], "into each row"),
    ):
        failed = runner.invoke(app, ["generate", folder, *options])
        assert isinstance(failed.exception, GemmateError) and why in str(failed.exception)


def test_adapters_and_bases_that_differ_in_time_are_refused(tmp_path: Path) -> None:
    def base(kind: str | None, tau: float = 0.1) -> Any:
        return load_base(ModelConfig(temporal_kind=kind, temporal_tau=tau))

    saved = {}
    for kind in ("log", None):
        loaded = base(kind)
        saved[kind] = tmp_path / str(kind)
        save_adapter(attach_lora(loaded.model, LoraSettings(r=2), seed=0), saved[kind], loaded.base)
    load_adapter(base("log"), saved["log"])
    for wrong in (base("signed_log"), base("log", tau=0.2)):  # the same shapes
        with pytest.raises(GemmateError, match=r"encoder with log, tau 0\.1; this base has the"):
            load_adapter(wrong, saved["log"], force=True)
    with pytest.raises(GemmateError, match=r"this base has none\. .*temporal_kind=log"):
        load_adapter(base(None), saved["log"])
    with pytest.raises(GemmateError, match="trained with no temporal encoder; this base has the"):
        load_adapter(base("log"), saved[None])
    (saved["log"] / "gemmate_base.json").unlink()  # somebody else's adapter
    with pytest.raises(GemmateError, match="this base has none"):
        load_adapter(base(None), saved["log"], force=True)


def test_a_model_that_knows_time_keeps_its_kind(tmp_path: Path) -> None:
    aware = load_base(ModelConfig(temporal_kind="calendar", temporal_tau=0.2))
    aware.model.save_pretrained(tmp_path)
    aware.tokenizer.save_pretrained(tmp_path)
    again = load_base(ModelConfig(id=str(tmp_path)))
    assert (again.model.temporal.kind, again.model.temporal.tau) == ("calendar", 0.2)
    load_base(ModelConfig(id=str(tmp_path), temporal_kind="calendar", temporal_tau=0.2))
    with pytest.raises(GemmateError, match=r"has the temporal encoder calendar, tau 0\.2, already"):
        load_base(ModelConfig(id=str(tmp_path), temporal_kind="log"))
