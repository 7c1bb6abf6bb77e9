"""Bases: load one in NF4, bf16 or fp32 and say why so, identify it, merge an adapter into it."""

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemmate_lib.adapters import (
    RECORD,
    Base,
    adapted_modules,
    attach_lora,
    encoder_of,
    load_adapter,
    read_adapter_config,
    refuse_tied,
    save_adapter,
    target_modules,
    temporal_settings,
)
from gemmate_lib.config import PRESETS, GemmateError, ModelConfig
from gemmate_lib.fourbit import guard_4bit_cpu, nf4_settings, predict_bytes, save_4bit
from gemmate_lib.methods import refuse_unmerged
from gemmate_lib.sharding import check_storage
from gemmate_lib.trust import refuse_adapter_beside, refuse_pickled_shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [  # with what the two modules below it define, this is all one needs of a model
    "EMBEDDED", "RECORD", "SHIPPED", "Base", "LoadedModel", "attach_lora", "base_record",
    "base_settings", "guard_4bit_cpu", "load_adapter", "load_base", "load_tokenizer",
    "merge_adapter", "model_path", "predict_bytes", "save_4bit", "save_adapter",
    "target_modules", "weights_hash",
]  # fmt: skip
ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {name: ASSETS / name for name in ("tiny-gemma", "tiny-gemma2")}
SHIPPED = {name: ASSETS / name for name in ("tiny-gemma-te",)}  # adapters on one of these


@dataclass(frozen=True)
class LoadedModel:
    """A base, its tokenizer, where it lives and why so, and the record that identifies it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: str
    reasons: tuple[str, ...]
    base: Base


def model_path(model_id: str) -> str:
    """The directory of an embedded model; any other id as it is."""
    return str(EMBEDDED.get(model_id, model_id))


def load_tokenizer(model_id: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base; where it has no padding token (GPT-2), EOS pads.

    Raises: GemmateError where the files cannot be had.
    """
    from transformers import AutoTokenizer

    path, revision = model_path(model_id), revision or PRESETS.get(model_id)
    with _explained(model_id, revision):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_settings(model_id: str, revision: str | None = None) -> "PreTrainedConfig":
    """A base's config.json, which runs no code of its own: no model's, and no kernel's.

    Raises: GemmateError where it cannot be had, or describes what only its own code could build.
    """
    from transformers import AutoConfig

    from gemmate_lib.temporal import modeling  # noqa: F401  (AutoConfig learns of GemmaTE)

    path, revision = model_path(model_id), revision or PRESETS.get(model_id)
    with _explained(model_id, revision):
        found = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    found._attn_implementation = None  # it may name a kernel, which is code on the Hub
    return found


def load_base(config: ModelConfig, *, sharded: bool = False) -> LoadedModel:
    """Load a base from safetensors, never running code that came with it.

    sharded: its weights will be shared out among several GPUs.
    Raises: GemmateError where this machine cannot compute as asked, or the files cannot be had.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device, reasons = _device_and_dtype(config)
    path, revision = model_path(config.id), config.revision or PRESETS.get(config.id)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    dtype = getattr(torch, config.compute_dtype)
    settings = base_settings(config.id, revision)
    with _explained(config.id, revision):
        refuse_adapter_beside(path, revision)
        refuse_pickled_shards(path, revision)
        if stored := getattr(settings, "quantization_config", None):  # a 4-bit copy
            stored["bnb_4bit_compute_dtype"] = config.compute_dtype  # ours, not its maker's
        elif config.quantization != "none":
            options["quantization_config"] = nf4_settings(
                config.quantization, dtype, sharded=sharded
            )
        if config.attention != "auto":
            options["attn_implementation"] = config.attention
        place = {"": torch.cuda.current_device() if device == "cuda" else device}
        model = AutoModelForCausalLM.from_pretrained(
            path, config=settings, dtype=dtype, device_map=place, use_safetensors=True, **options
        )
        tokenizer = load_tokenizer(config.id, revision)
    if sharded:
        check_storage(model, dtype)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise GemmateError(
            f"The tokenizer of {config.id} has {len(tokenizer):,} words, its embedding {rows:,} "
            "rows: they are of two models. Put the model's own tokenizer beside it."
        )
    model = _time_aware(model, config)
    weights = "as stored, quantized" if stored else config.quantization
    reasons += (f"weights: {weights}", f"attention {model.config._attn_implementation}")
    if guarded := guard_4bit_cpu(model):
        reasons += (f"{guarded} 4-bit layers kept from repacking in eval mode",)
    return LoadedModel(model, tokenizer, device, reasons, base_record(config))


def _time_aware(model: Any, config: ModelConfig) -> Any:
    """The model with the encoder of time that the settings ask for, if any."""
    from gemmate_lib.temporal.modeling import from_base

    if config.temporal_kind is None:
        return model
    if (found := encoder_of(model)) is None:
        return from_base(model, kind=config.temporal_kind, tau=config.temporal_tau)
    if (found.kind, found.tau) != (config.temporal_kind, config.temporal_tau):
        has = f"{config.id} has the temporal encoder {found.kind}, tau {found.tau}, already"
        raise GemmateError(f"{has}. Leave model.temporal_kind out, or load its plain base.")
    return model


def _device_and_dtype(config: ModelConfig) -> tuple[str, tuple[str, ...]]:
    from gemmate_lib.machine import read_facts

    facts, dtype = read_facts(), config.compute_dtype
    device = facts.device if config.device == "auto" else config.device
    if device == "xla":
        if importlib.util.find_spec("torch_xla") is None:
            raise GemmateError("The device xla needs torch_xla, which is not installed here.")
        if config.quantization != "none":
            raise GemmateError("There are no 4-bit kernels for xla. Set model.quantization=none.")
    elif device not in ("cpu", facts.device):
        raise GemmateError(f"there is no {device} device here. Set model.device=auto.")
    if device == "cpu" and dtype == "float16":
        raise GemmateError(
            "float16 on a CPU overflows in Gemma. Set model.compute_dtype=float32 or bfloat16."
        )
    # torch.cuda.is_bf16_supported() says True on a T4, where it is emulated: ask the capability.
    if device == "cuda" and dtype == "bfloat16" and (facts.capability or (0, 0)) < (8, 0):
        raise GemmateError(
            f"this GPU has compute capability {facts.capability} and no bfloat16, which needs "
            "(8, 0). Set model.compute_dtype=float16."
        )
    why = "found" if config.device == "auto" else "asked for"
    return device, (f"device {device}: {why}", f"compute {dtype}: possible on {device}")


@contextlib.contextmanager
def _explained(model_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the libraries raise where a model cannot be read into one sentence."""
    from safetensors import SafetensorError

    from gemmate_lib.auth import check_access

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        problem = f"cannot load {model_id}: {str(error).strip().splitlines()[0].rstrip('.:')}"
        if model_id in EMBEDDED or Path(model_id).is_dir():
            remedy = "A folder needs config.json, *.safetensors and a tokenizer."
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id) or model_id.startswith("."):
            problem = f"there is no folder {model_id}"
            remedy = "Give one, or the model's id on the Hub, as in google/gemma-2b."
        else:
            remedy = check_access(model_id, revision).remedy or "Change the settings under `model`."
        raise GemmateError(f"{problem}. {remedy}") from error


def weights_hash(model_id: str, revision: str | None = None) -> str | None:
    """sha256 over the names and hashes of a base's safetensors files; None if not local."""
    from huggingface_hub import snapshot_download

    path = Path(model_path(model_id))
    if not path.is_dir():
        try:
            revision = revision or PRESETS.get(model_id)
            path = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return None
    lines = [f"{file.name} {_file_hash(file)}\n" for file in sorted(path.glob("*.safetensors"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _file_hash(file: Path) -> str:
    # The Hub's cache names a large file by its sha256: gigabytes need not be read again.
    if re.fullmatch("[0-9a-f]{64}", blob := file.resolve().name):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def base_record(config: ModelConfig) -> Base:
    """What identifies a base: id, revision, weights_sha256; a 4-bit copy names its original.

    For a base that was given an encoder of time, also temporal_kind and temporal_tau.
    """
    time = {"temporal_kind": config.temporal_kind, "temporal_tau": config.temporal_tau}
    added = time if config.temporal_kind else {}
    if (copied := Path(model_path(config.id)) / RECORD).is_file():
        return json.loads(copied.read_text("utf-8")) | added
    revision = config.revision or PRESETS.get(config.id)
    digest = weights_hash(config.id, revision)
    return {"id": config.id, "revision": revision, "weights_sha256": digest} | added


def merge_adapter(
    directory: str | Path,
    base_id: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    force: bool = False,
) -> LoadedModel:
    """Merge a saved adapter into its full-precision base: merging into 4-bit would round again.

    A time-aware adapter gives a time-aware model, whose encoder stays in fp32.
    Raises: GemmateError for a 4-bit base, another base, tied layers, a non-finite adapter, or a
        soft prompt.
    """
    config = read_adapter_config(directory)
    refuse_unmerged(config)
    time = temporal_settings(directory)
    loaded = load_base(
        ModelConfig(id=base_id, revision=revision, compute_dtype=dtype, device="cpu", **time)
    )
    if hasattr(loaded.model.config, "quantization_config"):
        raise GemmateError(f"{base_id} is quantized. Merge into {loaded.base['id']} instead.")
    refuse_tied(loaded.model, adapted_modules(config))
    model = load_adapter(loaded, directory, force=force)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise GemmateError(f"the adapter in {directory} does not merge: {error}") from error
    return replace(loaded, model=merged)
