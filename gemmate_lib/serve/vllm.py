"""The command that serves our adapters by vLLM, for a GPU and many users.

vLLM lives in an environment of its own, and is not run here. What it takes was read in its
sources: `vllm/lora/peft_helper.py`, `vllm/config/lora.py`, and the parser of `--lora-modules`.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.adapters import ENCODER, read_adapter_config
from gemmate_lib.config import PRESETS, GemmateError
from gemmate_lib.models import EMBEDDED, model_path

if TYPE_CHECKING:
    from gemmate_lib.sft import Run

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
FIRST = "# For an environment of its own: pip install vllm. It needs a GPU, and was not run here."


def vllm_command(runs: Mapping[str, "Run"]) -> str:
    """The shell command, and before it as comments what cannot be served so.

    runs: by the name that a request gives as `model`, as in our own server.
    Raises: GemmateError for runs on several bases, or where vLLM can serve none of them.
    """
    base = _one_base(runs)
    path = Path(model_path(base.id))
    reasons = {name: _unfit(run) for name, run in runs.items()}
    fit = {name: run for name, run in runs.items() if reasons[name] is None}
    left_out = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if not fit:
        raise GemmateError(f"vLLM can serve none of these. {' '.join(left_out)}")
    dtypes: set[str] = {run.experiment.model.compute_dtype for run in fit.values()}
    revision = base.revision or PRESETS.get(base.id)
    options = [
        ["vllm", "serve", str(path.resolve()) if path.is_dir() else base.id],
        ["--served-model-name", path.name if Path(base.id).is_dir() else base.id],
        ["--revision", revision] if revision else [],
        ["--dtype", "float16" if dtypes == {"float16"} else "bfloat16"],
        ["--enable-lora"],
        ["--max-lora-rank", str(_rank_for(map(_rank, fit.values())))],
        ["--max-loras", str(len(fit))],
        ["--lora-modules", *(_module(name, run) for name, run in fit.items())],
        ["--host", "127.0.0.1"],
    ]
    lines = [FIRST, *(f"# left out: {' '.join(line.split())}" for line in left_out)]
    lines += [f"# {said}" for said in _remarks(fit.values(), dtypes)]
    return "\n".join([*lines, " \\\n  ".join(shlex.join(part) for part in options if part)])


def _one_base(runs: Mapping[str, "Run"]) -> Any:
    """The settings of the base that all of them share."""
    bases = [run.experiment.model for run in runs.values()]
    different = sorted({base.id for base in bases})
    if len(different) != 1 or len({base.revision for base in bases}) != 1:
        problem = f"One vLLM serves adapters of one base, these are of {', '.join(different)}"
        raise GemmateError(f"{problem}. Start one for each.")
    return bases[0]


def _unfit(run: "Run") -> str | None:
    """Why vLLM cannot put a run on a base, or None."""
    alone = (
        f"Serve it alone: gemmate export {shlex.quote(str(run.directory))} --out DIR --for vllm."
    )
    if run.experiment.method == "full":
        return f"every weight was trained, so it is no adapter. {alone}"
    config = read_adapter_config(run.adapter)
    if config.is_prompt_learning:
        return "vLLM serves no soft prompts. Serve it by gemmate serve."
    if ENCODER in (config.modules_to_save or ()):
        return "vLLM knows nothing of GemmaTE's encoder of time. Serve it by gemmate serve."
    if config.modules_to_save:
        return f"it holds whole layers, {', '.join(config.modules_to_save)}. {alone}"
    if config.use_dora:
        return f"vLLM has no DoRA. {alone}"
    if config.bias != "none":
        return f"it holds biases. {alone}"
    return f"its rank is over {RANKS[-1]}. {alone}" if _rank(run) > RANKS[-1] else None


def _rank(run: "Run") -> int:
    config = read_adapter_config(run.adapter)
    return max(config.r, *(config.rank_pattern or {}).values(), 0)


def _rank_for(ranks: Iterable[int]) -> int:
    """The smallest that vLLM takes and no adapter exceeds: more would cost memory."""
    largest = max(ranks)
    return next(rank for rank in RANKS if rank >= largest)


def _module(name: str, run: "Run") -> str:
    """NAME=PATH, or JSON where that form could be read otherwise."""
    path = str(run.adapter.resolve())
    plain = f"{name}={path}"
    if plain.count("=") == 1 and "," not in plain:
        return plain
    return json.dumps({"name": name, "path": path})


def _remarks(runs: Iterable["Run"], dtypes: set[str]) -> Iterator[str]:
    base = next(iter(runs)).experiment.model
    if "float32" in dtypes:
        yield "computed in bfloat16, not in float32: vLLM multiplies adapters in 16 bits only."
    if base.quantization != "none":
        yield "trained on a base in 4 bits; --quantization bitsandbytes would hold it so here too."
    if base.id in EMBEDDED:
        yield "the embedded model shows the form of the command; it is of no use on a GPU."
    yield "a key for everybody but this machine: VLLM_API_KEY=… and --host 0.0.0.0"
