"""Batched generation: the same texts whatever the batch, and a model left as it was found.

Shapes: `B` prompts in a batch, `T` tokens of the longest prompt, padded on the left.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gemmate_lib.adapters import encoder_of, known_peft_warnings
from gemmate_lib.config import GemmateError
from gemmate_lib.methods import behind_soft_prompt

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

STANDARD_PROMPTS = (
    "Quote: I am not talented, but I'm good at not giving up",
    "Quote: Imagination is more",
    "Quote: A Woman is like a tea bag;",
    "Quote: Outside of a dog, a book is man's",
)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt; `n_tokens` without EOS, `stopped` where it wrote EOS."""

    prompt: str
    text: str
    n_tokens: int
    stopped: bool


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    timestamps: Sequence[int | None] | None = None,
) -> list[Completion]:
    """Complete prompts; one Completion each, in the order given.

    timestamps: when each is asked, in ms since the Unix epoch, UTC, for a time-aware model; None:
    it is not known.
    Raises: GemmateError for timestamps that a plain model cannot read, or another number of them.

    Greedy texts do not depend on batch size, order or padding in fp32. Sampled ones depend on the
    seed and on the batches. Neither changes the model, its mode, its settings or the global seed.
    """
    import torch

    ends = end_tokens(model, tokenizer) if stop_at_eos else []
    settings = _settings(tokenizer, max_new_tokens, ends)
    if do_sample:
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    times = _times(model, timestamps, len(prompts))
    done: dict[int, Completion] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        evaluating(model),
        torch.random.fork_rng(devices),
        torch.inference_mode(),
        known_peft_warnings(),
    ):
        torch.manual_seed(seed)
        for batch in _batches(model, encoded, batch_size):
            ids, mask = left_padded([encoded[i] for i in batch], tokenizer.pad_token_id)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if times is not None:
                inputs["timestamps"] = times[batch]
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            out = model.generate(**inputs, generation_config=settings)[:, ids.shape[1] :]
            for i, tokens in zip(batch, out.tolist(), strict=True):
                done[i] = _completion(tokenizer, prompts[i], tokens, ends)
    return [done[i] for i in range(len(prompts))]


def _batches(model: Any, encoded: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts that are generated for together, the longest first: less padding.

    Behind a soft prompt only prompts of one length: peft 0.21.2, `_adjust_prompt_learning_kwargs`,
    drops the positions, and padding would move a text away from the vectors in front of it. Delete
    this when the canary in tests/integration/test_methods.py fails.
    """
    by_length = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    soft = behind_soft_prompt(model)
    groups = groupby(by_length, key=lambda i: len(encoded[i]) if soft else 0)
    for group in (list(numbers) for _, numbers in groups):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _times(model: Any, timestamps: Sequence[int | None] | None, n: int) -> "torch.Tensor | None":
    """int64 [n] for a time-aware model, whatever is not known MISSING; None for a plain one."""
    import torch

    from gemmate_lib.timestamps import MISSING

    given = [MISSING if t is None else t for t in timestamps or [None] * n]
    if len(given) != n:
        raise GemmateError(f"{len(given)} timestamps for {n} prompts. Give one each.")
    if encoder_of(model) is not None:
        return torch.tensor(given, dtype=torch.int64)
    if set(given) - {MISSING}:
        problem = "The model knows no time: it has no temporal encoder"
        raise GemmateError(f"{problem}. Leave the timestamps out, or fine-tune `temporal` first.")
    return None


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt with exactly one BOS, where the tokenizer has one."""
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids or [tokenizer.eos_token_id]  # a model cannot start from nothing
    while ids and ids[0] == bos:  # a chat template has written it into the text already
        ids.pop(0)
    return [bos, *ids]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """EOS, and what else ends a turn for this model (Gemma's instruction-tuned ones: two)."""
    theirs = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])}
    return sorted(found - {None})


def _settings(tokenizer: Any, max_new_tokens: int, ends: list[int]) -> "GenerationConfig":
    # Everything said here, since what is left unsaid comes from the model's own file. No end is
    # an empty list: None would mean "as in the file".
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )


def left_padded(rows: list[list[int]], pad: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """ids and attention mask: int64 [B, T]; new tokens must follow the last prompt token."""
    import torch

    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _completion(tokenizer: Any, prompt: str, tokens: list[int], ends: list[int]) -> Completion:
    cut = next((i for i, token in enumerate(tokens) if token in ends), None)
    new, plain = tokens[:cut], {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return Completion(prompt, tokenizer.decode(new, **plain), len(new), cut is not None)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
