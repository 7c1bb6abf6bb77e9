"""Pre-train the embedded Gemma and Gemma-2: `gemmate tiny build`.

A model of 1.4 million parameters takes about ten minutes on one core. The weights are kept in
bf16; the losses of the first steps are kept beside them, so that a test can tell whether a
rebuild is still the same model.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from gemmate_lib.tiny.corpus import documents
from gemmate_lib.tiny.tokenizer import token_stream, train_tokenizer, wrap

SEED = 2006
STEPS = 2600
BATCH, BLOCK = 4, 256
PEAK_LR = 8e-3
NAMES = ("tiny-gemma", "tiny-gemma2")


def configuration(name: str) -> Any:
    """Return the configuration of an embedded model; it differs from the real one in size only."""
    from transformers import Gemma2Config, GemmaConfig

    shape: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": "bfloat16",
    }
    if name == "tiny-gemma":
        return GemmaConfig(**shape)
    return Gemma2Config(**shape, sliding_window=128, query_pre_attn_scalar=32)


def new_model(name: str) -> Any:
    """Return an embedded model with fresh weights, in fp32."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(SEED)
    return AutoModelForCausalLM.from_config(configuration(name), dtype=torch.float32)


def batches(tokenizer: Tokenizer, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 tensors [BATCH, BLOCK] cut from the endless stream of documents."""
    buffer: list[int] = []
    for ids in token_stream(tokenizer, documents(seed), seed=seed):
        buffer += ids
        if len(buffer) >= BATCH * BLOCK:
            block, buffer = buffer[: BATCH * BLOCK], buffer[BATCH * BLOCK :]
            yield torch.tensor(block).view(BATCH, BLOCK)


def learning_rate(step: int, steps: int) -> float:
    """Return the factor on the peak rate: 40 steps of warm-up, then a line down to zero."""
    return min((step + 1) / 40, (steps - step) / (steps - 40) if steps > 40 else 1.0)


def pretrain(
    name: str,
    tokenizer: Tokenizer,
    *,
    stop: int = STEPS,
    report: Callable[[int, float], None] | None = None,
) -> tuple[Any, list[float]]:
    """Train an embedded model for the first `stop` of `STEPS` steps; return it with its losses."""
    model = new_model(name).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.02, fused=True
    )
    losses = []
    for step, block in enumerate(itertools.islice(batches(tokenizer, seed=SEED), stop)):
        optimizer.param_groups[0]["lr"] = PEAK_LR * learning_rate(step, STEPS)
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{name}: the loss is {losses[-1]} at step {step}")
        if report:
            report(step, losses[-1])
    return model.eval(), losses


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Tokenizer, *, n: int = 16) -> float:
    """Return the mean loss in nats over `n` batches of documents that training never drew."""
    fresh = itertools.islice(batches(tokenizer, seed=SEED + 1), n)
    return sum(model(input_ids=block, labels=block).loss.item() for block in fresh) / n


def build(name: str, out: Path, *, report: Callable[[int, float], None] | None = None) -> None:
    """Train tokenizer and model from nothing and save them under `out / name`."""
    tokenizer = train_tokenizer(seed=SEED)
    model, losses = pretrain(name, tokenizer, report=report)
    directory = out / name
    model.to(torch.bfloat16).save_pretrained(directory)
    wrap(tokenizer).save_pretrained(directory)
    held_out = held_out_loss(model.float(), tokenizer)
    first = [round(loss, 4) for loss in losses[:20]]
    record = {"seed": SEED, "steps": STEPS, "first": first, "held_out": round(held_out, 4)}
    (directory / "build.json").write_text(json.dumps(record, indent=1) + "\n")


def build_all(names: Sequence[str], out: Path) -> None:
    """Build several models side by side, a process of one thread each; prints as it goes."""
    from multiprocessing import get_context

    context = get_context("spawn")
    workers = [context.Process(target=_build_one, args=(name, out)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [n for n, worker in zip(names, workers, strict=True) if worker.exitcode]:
        raise RuntimeError(f"{', '.join(failed)}: the build failed, see above")


def _build_one(name: str, out: Path) -> None:
    torch.set_num_threads(1)

    def report(step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            print(f"{name}: step {step + 1}/{STEPS}, loss {loss:.3f}", flush=True)

    build(name, out, report=report)
