"""The command for vLLM: what the shell makes of it, and what is left out and why."""

import json
import subprocess

import pytest
from typer.testing import CliRunner

from gemmate_lib.cli import app
from gemmate_lib.config import PRESETS, Experiment, GemmateError
from gemmate_lib.manifest import write_manifest
from gemmate_lib.models import EMBEDDED
from gemmate_lib.serve.vllm import vllm_command
from gemmate_lib.sft import load_run


@pytest.fixture
def make(tmp_path):
    """A run's record with an adapter's settings: its weights are not looked at."""

    def make(name="run", *, model=None, method="lora", **config):
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True)
        base = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
        base |= {} if "peft_type" in config else {"r": 8}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(base | config))
        given = {"name": "quotes", "method": method, "model": model or {"id": "google/gemma-2b"}}
        write_manifest(
            folder, kind="sft", experiment=Experiment.model_validate(given), facts={}, data={},
            base={}, metrics={}, timings={},
        )  # fmt: skip
        return load_run(folder)

    return make


def words(command):
    """What a shell would start vLLM with."""
    script = f"vllm() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def options(command):
    """Option -> its values, as argparse would read them."""
    found = {}
    for word in words(command):
        if word.startswith("--"):
            found[word] = values = []
        elif found:
            values.append(word)
    return found


def test_two_adapters_on_one_base(make):
    runs = {"a": make("one", r=4), "b": make("two", r=24)}
    command = vllm_command(runs)
    assert words(command)[:2] == ["serve", "google/gemma-2b"]
    assert options(command) == {
        "--served-model-name": ["google/gemma-2b"],
        "--revision": [PRESETS["google/gemma-2b"]],
        "--dtype": ["bfloat16"],
        "--enable-lora": [],
        "--max-lora-rank": ["32"],
        "--max-loras": ["2"],
        "--lora-modules": [f"{name}={run.adapter}" for name, run in runs.items()],
        "--host": ["127.0.0.1"],
    }
    assert "float32" in command and "not run here" in command


def test_names_and_paths_survive_the_shell_and_the_parser(make):
    hard = "it's $(a) `name`; x=1, y\"z"
    run = make(hard)
    for value in options(vllm_command({"plain": run, hard: run}))["--lora-modules"]:
        assert json.loads(value)["path"] == str(run.adapter)
    spaced = options(vllm_command({"a b": make("with space")}))["--lora-modules"]
    assert len(spaced) == 1 and spaced[0].startswith("a b=/")


def test_a_local_base_is_named_as_our_server_names_it(make):
    run = make(model={"id": "tiny-gemma", "compute_dtype": "float16", "quantization": "nf4"})
    command = vllm_command({"a": run})
    assert words(command)[1] == str(EMBEDDED["tiny-gemma"])
    found = options(command)
    assert found["--served-model-name"] == ["tiny-gemma"] and "--revision" not in found
    assert found["--dtype"] == ["float16"] and "--quantization bitsandbytes" in command


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        ({"modules_to_save": ["temporal"]}, "lora", "encoder of time. Serve it by gemmate serve"),
        ({"modules_to_save": ["lm_head"]}, "lora", "whole layers, lm_head"),
        ({"use_dora": True}, "dora", "no DoRA"),
        ({"bias": "lora_only"}, "lora", "biases"),
        ({"r": 1024}, "lora", "over 512"),
        ({"rank_pattern": {"q_proj": 600}}, "lora", "over 512"),
        ({}, "full", "every weight"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "prompt", "no soft prompts"),
    ],
)
def test_what_vllm_cannot_serve_is_left_out_with_its_reason(make, config, method, said):
    wrong = make("wrong", method=method, **config)
    command = vllm_command({"good": make(), "odd\nname": wrong})
    assert [v.split("=")[0] for v in options(command)["--lora-modules"]] == ["good"]
    (line,) = [line for line in command.splitlines() if "left out" in line]
    assert line.startswith("# left out: odd name: ") and said in line
    with pytest.raises(GemmateError, match="can serve none of these"):
        vllm_command({"odd": wrong})


def test_one_base_at_a_time(make):
    runs = {"a": make("one"), "b": make("two", model={"id": "tiny-gemma"})}
    with pytest.raises(GemmateError, match=r"google/gemma-2b, tiny-gemma\. Start one for each"):
        vllm_command(runs)


def test_the_option_of_serve_prints_it_and_serves_nothing(make):
    run = make("mine")
    done = CliRunner().invoke(app, ["serve", str(run.directory), "--name", "a", "--print-vllm"])
    assert done.exit_code == 0 and done.output.strip() == vllm_command({"a": run})
    nothing = CliRunner().invoke(app, ["serve", "--runs", "x", "--print-vllm"])
    assert isinstance(nothing.exception, GemmateError)
