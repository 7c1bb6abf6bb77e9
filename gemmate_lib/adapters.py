"""Adapters: which layers LoRA adapts; attach, save and load; refuse what would fail silently."""

import contextlib
import json
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.config import GemmateError, LoraSettings
from gemmate_lib.manifest import write_whole
from gemmate_lib.trust import refuse_far_adapter, refuse_pickled_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

    from gemmate_lib.models import LoadedModel

RECORD = "gemmate_base.json"  # travels with an adapter or a 4-bit copy: which base it belongs to
GEMMA_STYLE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PROJECTIONS = GEMMA_STYLE | {"c_attn", "c_fc", "c_proj"}  # the latter: GPT-2
ENCODER = "temporal"  # GemmaTE's module, trained in full and saved with the adapter
Base = dict[str, Any]  # id, revision, weights_sha256; temporal_kind, temporal_tau if it has them


def encoder_of(model: Any) -> Any:
    """The encoder of time in a model, adapted or not; None in a plain one."""
    return getattr(model, ENCODER, None)


def target_modules(model: Any, *, every: bool = False) -> list[str]:
    """The projections LoRA adapts, sorted; `every`: all linear layers; never the output head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and ".lora_" not in name
    }
    return sorted(names if every or not names & PROJECTIONS else names & PROJECTIONS)


def attach_lora(
    model: Any, settings: LoraSettings, *, seed: int, kind: str = "lora"
) -> "PeftModel":
    """Attach a fresh adapter (its A matrices drawn from `seed`); the same one twice is no change.

    kind: lora, dora or rslora; qlora is lora on a quantized model.
    Raises: GemmateError for another adapter, unknown layers, or layers tied to the embeddings.
    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685
    """
    from peft import PeftModel, get_peft_model
    from transformers import set_seed

    config = _lora_config(model, settings, kind)
    if isinstance(model, PeftModel):
        fields = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora")
        old = model.peft_config[model.active_adapter]
        same = all(getattr(old, field, None) == getattr(config, field) for field in fields)
        if same and sorted(old.target_modules) == sorted(config.target_modules):
            return model
        raise GemmateError("the model has another adapter already. Load the base again first.")
    refuse_tied(model, config.target_modules)
    set_seed(seed)  # the A matrices are drawn here, before any trainer sets its seed
    with known_peft_warnings():
        adapted = get_peft_model(model, config)
    # PEFT keeps a set, which PYTHONHASHSEED reorders in every adapter_config.json.
    config.target_modules = sorted(config.target_modules)
    return adapted


def train_all(model: Any) -> Any:
    """Make every weight trainable, in fp32: bf16 would round most of its small steps away.

    Raises: GemmateError for a quantized model, whose weights take no gradient.
    """
    if getattr(model, "is_quantized", False):
        remedy = "Set model.quantization=none, or method=lora."
        raise GemmateError(f"The weights of a quantized base cannot be trained. {remedy}")
    return model.float().requires_grad_(True)


def _lora_config(model: Any, settings: LoraSettings, kind: str) -> "LoraConfig":
    from peft import LoraConfig

    known, wanted = target_modules(model, every=True), settings.target_modules
    if isinstance(wanted, str):
        wanted = tuple(target_modules(model, every=wanted == "all-linear"))
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := sorted({name for name in wanted if name.rpartition(".")[2] not in ends}):
        raise GemmateError(f"the model has no layer named {missing}. It has {known}.")
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias=settings.bias,
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
        target_modules=list(wanted),
        modules_to_save=[ENCODER] if encoder_of(model) is not None else None,
        fan_in_fan_out=_transposed(model),
        task_type="CAUSAL_LM",
    )


def _transposed(model: Any) -> bool:
    """Whether the linear layers store [in, out], as GPT-2's do unless they are quantized."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def refuse_tied(model: Any, names: Collection[str]) -> None:
    """Refuse adapters on an output head or embeddings that share their weights."""
    if not model.config.get_text_config().tie_word_embeddings:
        return
    tied = (model.get_output_embeddings(), model.get_input_embeddings())
    for name, module in model.named_modules():
        hit = any(f".{name}".endswith(f".{target}") for target in names)
        if hit and any(module is end for end in tied):
            raise GemmateError(
                f"{name} shares its weights with the embeddings: merging an adapter on it would "
                "change both. Leave it out of lora.target_modules."
            )


@contextlib.contextmanager
def known_peft_warnings() -> Iterator[None]:
    """Silence what PEFT warns of in vain; each with its reason."""
    with warnings.catch_warnings():
        # peft 0.21.2 reads a property that transformers 5.23 renamed; the value is right.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        # Behind a soft prompt; gemmate_lib.generate leaves nothing that positions would tell.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        yield


def save_adapter(model: "PeftModel", directory: str | Path, base: Base) -> None:
    """Save the adapter alone, in a stable form, with the record of the base it belongs to."""
    directory = Path(directory)
    had_readme = (directory / "README.md").exists()
    # False, since we never resize the vocabulary: "auto" would ask the Hub about the base.
    model.save_pretrained(directory, save_embedding_layers=False)
    if not had_readme:
        (directory / "README.md").unlink()  # a form full of "[More Information Needed]"
    config = directory / "adapter_config.json"
    settings = json.loads(config.read_text("utf-8"))
    settings |= {"base_model_name_or_path": base["id"], "revision": base["revision"]}
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"].sort()
    write_json(config, settings)
    write_json(directory / RECORD, base)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whose bytes depend on the value alone; the file is whole or not there."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_adapter_config(directory: str | Path) -> "PeftConfig":
    """The settings an adapter was saved with.

    Raises: GemmateError where there are none, or those of a kind that would read other files.
    """
    from peft import PeftConfig

    refuse_far_adapter(directory)
    return PeftConfig.from_pretrained(str(directory))


def adapted_modules(config: "PeftConfig") -> list[str]:
    """Names of the layers an adapter changes or replaces (none where they are a pattern)."""
    both = (getattr(config, "target_modules", None), getattr(config, "modules_to_save", None))
    return sorted({name for names in both if not isinstance(names, str) for name in names or ()})


def load_adapter(
    base: "LoadedModel", directory: str | Path, *, trainable: bool = False, force: bool = False
) -> "PeftModel":
    """Put a saved adapter on its base.

    Raises: GemmateError where it belongs to another base, unless `force`, or where its weights
        are no safetensors.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    config = fitting_config(base, directory, force=force)
    try:
        with known_peft_warnings():
            model = PeftModel.from_pretrained(
                base.model, str(directory), config=config, is_trainable=trainable
            )
    except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        why = str(error).splitlines()[0].rstrip(".")
        raise GemmateError(f"Cannot load {directory}: {why}. Train it again.") from error
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)
    return model


def fitting_config(
    base: "LoadedModel", directory: str | Path, *, force: bool = False
) -> "PeftConfig":
    """The settings of a saved adapter, made to fit its base.

    Raises: GemmateError as `load_adapter` does.
    """
    config = read_adapter_config(directory)
    refuse_pickled_adapter(directory)
    _refuse_other_time(base, directory, config)
    if not force:
        _refuse_other_base(base, directory, str(config.base_model_name_or_path))
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = _transposed(base.model)  # 4-bit layers and Conv1D differ in it
    return config


def temporal_settings(directory: str | Path) -> dict[str, Any]:
    """The temporal_kind and temporal_tau an adapter was trained with; empty for a plain one."""
    record = Path(directory) / RECORD
    base = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    return {key: base[key] for key in ("temporal_kind", "temporal_tau") if key in base}


def _refuse_other_time(base: "LoadedModel", directory: str | Path, config: Any) -> None:
    """An encoder that the base lacks, or of another kind, would be dropped, or read as its own."""
    has = ENCODER in (getattr(config, "modules_to_save", None) or ())
    time, own = temporal_settings(directory), encoder_of(base.model)
    ours = f"has the temporal encoder {own.kind}, tau {own.tau}" if own else "has none"
    same = not time or (own and [own.kind, own.tau] == list(time.values()))
    if has == (own is not None) and same:
        return
    theirs = " with {temporal_kind}, tau {temporal_tau}".format_map(time) if time else ""
    kind = f"a temporal encoder{theirs}" if has else "no temporal encoder"
    wanted = time.get("temporal_kind") if has else "null"
    remedy = f"Load the base with model.temporal_kind={wanted or 'KIND'}."
    raise GemmateError(f"the adapter in {directory} was trained with {kind}; this base {ours}. "
                       f"{remedy}")  # fmt: skip


def _refuse_other_base(loaded: "LoadedModel", directory: str | Path, named: str) -> None:
    base = loaded.base
    record = Path(directory) / RECORD
    if record.is_file():
        wanted = json.loads(record.read_text("utf-8"))
        both = base["weights_sha256"] and wanted["weights_sha256"]
        keys = ("weights_sha256",) if both else ("id", "revision")
        if all(base[key] == wanted[key] for key in keys):
            return
        named = f"{wanted['id']} (weights {str(wanted['weights_sha256'])[:12]})"
    elif named in (base["id"], loaded.model.name_or_path):
        return
    ours = f"{base['id']} (weights {str(base['weights_sha256'])[:12]})"
    raise GemmateError(
        f"the adapter in {directory} was trained on {named}, not on {ours}: another base would "
        "load without a warning and write nonsense. Load its own base, or pass force=True."
    )
