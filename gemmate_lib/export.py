"""A run as one merged model in the form that vLLM, llama.cpp's converter and Ollama read.

None of the three is run here. What they read was looked up in their sources:
`convert_hf_to_gguf.py` of llama.cpp, by now `conversion/gemma.py`, and `convert/` of Ollama.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemmate_lib.adapters import write_json
from gemmate_lib.config import PRESETS, GemmateError
from gemmate_lib.manifest import write_whole
from gemmate_lib.methods import METHODS
from gemmate_lib.models import base_settings, load_tokenizer, model_path
from gemmate_lib.publish import new_folder, write_merged

if TYPE_CHECKING:
    from gemmate_lib.sft import Run

Target = Literal["vllm", "llama.cpp", "ollama"]
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM")
KNOWN: dict[Target, tuple[str, ...]] = {
    "vllm": (*GEMMA, "LlamaForCausalLM", "GPT2LMHeadModel"),
    "llama.cpp": (*GEMMA, "LlamaForCausalLM", "GPT2LMHeadModel"),
    "ollama": (*GEMMA, "LlamaForCausalLM"),
}
SENTENCEPIECE = "tokenizer.model"


def export(run: "Run", directory: str | Path, *, target: Target = "vllm") -> list[str]:
    """Write the merged model into a new folder; return what to do with it, line by line.

    In bf16 where the run computed in half precision, else in fp32.
    Raises: GemmateError for what the target cannot read, a folder that exists, and as
        `merge_adapter`.
    """
    _refuse(run, target)
    pieces = _sentencepiece(run) if target != "vllm" else None
    with new_folder(directory) as folder:
        write_merged(run, folder)
        for name, change in (("config.json", _flat_rope), ("tokenizer_config.json", _old_names)):
            _rewrite(folder / name, change)
        if pieces is not None:
            shutil.copyfile(pieces, folder / SENTENCEPIECE)
        if target == "ollama":
            write_whole(folder / "Modelfile", modelfile(run))
    return _next(run, Path(directory), target)


def _refuse(run: "Run", target: Target) -> None:
    """What would fail, or worse would not, after gigabytes have been written."""
    model = run.experiment.model
    if METHODS[run.experiment.method].soft:
        problem = f"A soft prompt changes no layer, so there is no model for {target}"
        raise GemmateError(f"{problem}. Serve it by gemmate serve.")
    found = (base_settings(model.id, model.revision).architectures or ["unknown"])[0]
    if model.temporal_kind or found not in KNOWN[target]:
        what = "a model with an encoder of time" if model.temporal_kind else found
        remedy = "Serve it by gemmate serve."
        raise GemmateError(f"{target} knows {', '.join(KNOWN[target])}, not {what}. {remedy}")
    if target != "vllm" and found in GEMMA and _sentencepiece(run) is None:
        raise GemmateError(
            f"{target} reads the words of a Gemma from {SENTENCEPIECE}, and {model.id} has none. "
            "Export a run on google/gemma-2b, or use --for vllm, which reads tokenizer.json."
        )


def _sentencepiece(run: "Run") -> Path | None:
    """The base's SentencePiece model: transformers 5 saves tokenizer.json alone."""
    from transformers.utils import cached_file

    model = run.experiment.model
    found = cached_file(
        model_path(model.id),
        SENTENCEPIECE,
        revision=model.revision or PRESETS.get(model.id),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    write_json(file, change(json.loads(file.read_text("utf-8"))))


def _flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Also under the names before transformers 5, which Ollama and older vLLM read alone.

    Without its own `rope_theta` a Llama 3 would be read with another one, and nobody would say so.
    """
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    return config | {"torch_dtype": config["dtype"]}


def _old_names(config: dict[str, Any]) -> dict[str, Any]:
    """By the names that transformers 4 knows and 5 still takes: vLLM may bring either.

    4 looks for a class that is not in it, and fails at a list of extra special tokens.
    """
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    return {key: config[key] for key in config.keys() - {"backend", "is_local", "local_files_only"}}


def modelfile(run: "Run") -> str:
    """What Ollama builds a model from: the folder, the form of a prompt, and where to stop."""
    form, model = run.manifest["data"].get("form"), run.experiment.model
    chat = form == "messages" or (form == "instruction" and run.experiment.dataset.chat)
    tokenizer = load_tokenizer(model.id, model.revision)
    turn = _turn(tokenizer) if chat else "{{ .Prompt }}{{ .Response }}"
    stops = [turn.partition("{{ .Response }}")[2].strip(), tokenizer.eos_token]
    lines = [
        "FROM .",  # the folder that it lies in
        f'TEMPLATE """{turn}"""',
        *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops if stop),
        "PARAMETER temperature 0",  # greedy, as the run was evaluated
        f"PARAMETER num_predict {run.experiment.generation.max_new_tokens}",
    ]
    return "\n".join(lines) + "\n"


def _turn(tokenizer: Any) -> str:
    """A question and its answer by the tokenizer's chat template; Ollama puts BOS before it."""
    asked = {"role": "user", "content": "{{ .Prompt }}"}
    turns = [asked, {"role": "assistant", "content": "{{ .Response }}"}]
    whole: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return whole.removeprefix(tokenizer.bos_token or "")


def _next(run: "Run", folder: Path, target: Target) -> list[str]:
    where, name = shlex.quote(str(folder)), shlex.quote(folder.resolve().name)
    half = run.experiment.model.compute_dtype != "float32"
    gguf = shlex.quote(str(folder / f"{folder.resolve().name}.gguf"))
    commands = {
        "vllm": [
            f"vllm serve {where} --served-model-name {name} --host 127.0.0.1",
        ],
        "llama.cpp": [
            f"python convert_hf_to_gguf.py {where} --outfile {gguf} "
            f"--outtype {'bf16' if half else 'f32'}",
            f"llama-server --model {gguf} --alias {name}",
        ],
        "ollama": [
            f"ollama create {name} --file {shlex.quote(str(folder / 'Modelfile'))}",
            f"ollama run {name}",
        ],
    }
    return [f"{folder}: one model for {target}, which was not run here. Next:", *commands[target]]
