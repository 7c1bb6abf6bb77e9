"""What comes from elsewhere is data: it runs nothing, and leads nowhere out of its folder.

A model, an adapter, a checkpoint and a run's folder may all be somebody else's. Weights are read
as safetensors alone. A trainer's states are pickles, so nothing but tensors may be in them.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gemmate_lib.settings import Experiment, GemmateError

WEIGHTS = "adapter_model.safetensors"
KINDS = ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # they read weights, and no more
FAR = ("tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text")


def inside(folder: Path, name: str) -> Path:
    """A path in the folder. Raises: GemmateError if it leads out of it, through a link too."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise GemmateError(f"{path} is not inside of the run's folder {folder}. Choose another.")
    return path


def experiment_of(manifest: Mapping[str, Any]) -> Experiment:
    """The experiment in a run's manifest. Raises: GemmateError naming what is no setting of it."""
    try:
        return Experiment.model_validate(manifest["config"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"The run's manifest is not this library's: {where}: {first['msg']}"
        raise GemmateError(f"{problem}. Make the run again.") from None


def only_tensors(file: Path) -> bool:
    """Whether the trainer could read a state, which it does by torch.load(weights_only=True)."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():  # NumPy's arrays, for the state of its random numbers
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        return False
    return True


def refuse_adapter_beside(path: str, revision: str | None) -> None:
    """Raise GemmateError for a model that transformers would silently put an adapter on."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(path, revision=revision):
        raise GemmateError(f"{path} holds an adapter. Load its base, then the adapter onto that.")


def refuse_pickled_shards(path: str, revision: str | None) -> None:
    """Raise GemmateError for weights in parts of which one is no safetensors file."""
    from transformers.utils import cached_file

    index = cached_file(
        path,
        "model.safetensors.index.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    parts = json.loads(Path(index).read_text("utf-8"))["weight_map"].values() if index else ()
    if wrong := sorted(part for part in parts if not str(part).endswith(".safetensors")):
        raise GemmateError(f"{path} keeps weights in {wrong[0]}. Only safetensors are read.")


def refuse_far_adapter(directory: str | Path) -> None:
    """Raise GemmateError for an adapter whose settings lead to further files, wherever they lie.

    Other kinds name more adapters; a prompt that starts as a text names the tokenizer for it.
    """
    try:
        found = json.loads((Path(directory) / "adapter_config.json").read_text("utf-8"))
        kind = found["peft_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        said = f"{directory} holds no adapter_config.json that can be read"
        raise GemmateError(f"{said}. Name an adapter's folder.") from error
    if kind not in KINDS:
        raise GemmateError(f"{directory} holds a {kind} adapter. Only {', '.join(KINDS)} are "
                           "loaded.")  # fmt: skip
    if kind != "LORA" and any(found.get(key) for key in FAR):
        raise GemmateError(f"The prompt in {directory} names a tokenizer to start from. Save it "
                           "without one: its vectors are trained.")  # fmt: skip


def refuse_pickled_adapter(directory: str | Path) -> None:
    """Raise GemmateError for an adapter without safetensors: PEFT would go on to a pickle.

    And where there is none either, it would ask the Hub for a repository of the folder's name.
    """
    if not (Path(directory) / WEIGHTS).is_file():
        raise GemmateError(f"{directory} holds no {WEIGHTS}. Only safetensors are read.")
