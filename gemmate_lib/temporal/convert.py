"""A GemmaTE checkpoint of the first days, a pickled `.pt`, as a folder that transformers loads.

Two layouts are known: that of the original, built on Google's gemma_pytorch (`embedder.weight`,
one `qkv_proj` a layer), and that of transformers. The weights may stand alone or under
`model_state_dict`, beside what an optimizer left. Only tensors are unpickled, never code.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from gemmate_lib.config import GemmateError
from gemmate_lib.models import base_settings, load_tokenizer
from gemmate_lib.temporal.modeling import TWINS, twin_of

Weights = dict[str, torch.Tensor]
ENCODER = "model.temporal.projection.weight"
# Buffers that are computed anew, and the head, which shares the embeddings' weights.
_LEFT_OUT = re.compile(r"(.*\.)?((local_|global_)?freqs_cis|inv_freq|rotary_emb\..*)")


def read_legacy(file: str | Path) -> Weights:
    """Read the state dict of a `.pt` file, by `torch.load(weights_only=True)` alone.

    Raises: GemmateError for a file that cannot be read so, or holds no tensors by name.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        problem = f"{file} is no file of plain tensors ({str(error).splitlines()[0][:80]})"
        raise GemmateError(f"{problem}. Save its state_dict() again, alone.") from None
    if isinstance(found, dict) and isinstance(found.get("model_state_dict"), dict):
        found = found["model_state_dict"]
    if not isinstance(found, dict) or not found:
        raise GemmateError(f"{file} holds no state dict. Save model.state_dict().")
    if strange := [key for key, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise GemmateError(f"{file} holds {strange[0]!r}, which is no tensor. Save weights alone.")
    return found


def rename(weights: Weights, *, head_dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Give each tensor the name transformers knows it by; a `qkv_proj` becomes three."""
    heads = next((w.shape[1] for k, w in weights.items() if k.endswith("o_proj.weight")), 0)
    for name, tensor in weights.items():
        plain = name.removeprefix("module.")  # from DataParallel
        if _LEFT_OUT.fullmatch(plain):
            continue
        if plain.endswith("qkv_proj.weight"):  # queries of all heads, then keys, then values
            rest = (tensor.shape[0] - heads) // 2
            if rest <= 0 or rest % head_dim:
                problem = f"{name} has {tensor.shape[0]} rows: no queries, keys and values of"
                raise GemmateError(f"{problem} {head_dim} each. Name its own --base.")
            parts = tensor.split([heads, rest, rest])
            for letter, part in zip("qkv", parts, strict=True):
                yield plain.replace("qkv_proj", f"{letter}_proj"), part.clone()
        elif plain == "embedder.weight":
            yield "model.embed_tokens.weight", tensor
        elif plain.startswith("temporal."):
            yield f"model.{plain}", tensor
        else:
            yield plain, tensor


def convert(
    file: str | Path, out: str | Path, *, base: str, kind: str = "log", tau: float = 0.1
) -> list[str]:
    """Write a legacy checkpoint as a time-aware model with tokenizer; return what to tell people.

    base: whose configuration and tokenizer it has, a Hub id or a folder.
    Raises: GemmateError for a folder that exists, another shape, and missing or unknown weights.
    """
    if (out := Path(out)).exists():
        raise GemmateError(f"{out} exists. Give --out another folder, or delete it.")
    tokenizer = load_tokenizer(base)
    plain = base_settings(base)
    if plain.model_type not in TWINS:
        raise GemmateError(f"{base} is {plain.model_type}. Name a Gemma or Gemma-2 as --base.")
    weights = read_legacy(file)
    config, twin = twin_of(plain, kind=kind, tau=tau)
    found = dict(rename(weights, head_dim=config.head_dim))
    model = twin(config)
    _check(found, model.state_dict(), source=f"{file}", base=base)
    model.load_state_dict(found, strict=False)
    model.to(found["model.embed_tokens.weight"].dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    said = [f"{len(weights)} tensors of {file} -> {out}"]
    if ENCODER not in found:
        said.append("it holds no encoder of time: here it starts at zero, to be trained")
    return said


def _check(found: Weights, known: Weights, *, source: str, base: str) -> None:
    """Refuse weights that are not those of the base, by name and shape, or not finite."""
    if wrong := [name for name in found if name not in known]:
        raise GemmateError(f"{source} holds {wrong[0]}, which {base} lacks. Name its own --base.")
    # The head shares the embeddings' weights; an encoder may never have been learned.
    if missing := sorted(known.keys() - found.keys() - {"lm_head.weight", ENCODER}):
        raise GemmateError(f"{source} lacks {missing[0]}, which {base} has. Name its own --base.")
    for name, tensor in found.items():
        if known[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, not {list(known[name].shape)} as in {base}"
            raise GemmateError(f"{name} is {shapes}. Name its own --base, or another --kind.")
        if not torch.isfinite(tensor).all():
            raise GemmateError(f"{source}: {name} is not finite. Take an earlier checkpoint.")
