"""Pre-train the embedded Gemma and Gemma-2: `gemmate tiny build`.

A model of 1.4 million parameters takes about ten minutes on one core: first echoes, by which it
learns to copy, then the corpus with some echoes among it, so that it does not forget how. The
weights are kept in bf16; the losses of the first steps are kept beside them, so that a test can
tell whether a rebuild is still the same model.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from gemmate_lib import machine
from gemmate_lib.tiny.copying import IGNORED, echoes, look_back
from gemmate_lib.tiny.corpus import documents
from gemmate_lib.tiny.tokenizer import token_stream, train_tokenizer, wrap

SEED = 2006
ECHO_STEPS, STEPS = 300, 2600
BATCH, BLOCK = 4, 256
ECHO_BATCH, ECHO_BLOCK = 32, 64
ECHO_EVERY = 4  # steps on the corpus from one reminder to the next, which is half a batch
ECHO_LR, PEAK_LR = 2e-3, 5e-3  # at 8e-3 copying is not learned
WARMUP = 40  # steps
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
    model = AutoModelForCausalLM.from_config(configuration(name), dtype=torch.float32)
    look_back(model)
    return model


def batches(tokenizer: Tokenizer, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 tensors [BATCH, BLOCK] cut from the endless stream of documents."""
    buffer: list[int] = []
    for ids in token_stream(tokenizer, documents(seed), seed=seed):
        buffer += ids
        if len(buffer) >= BATCH * BLOCK:
            block, buffer = buffer[: BATCH * BLOCK], buffer[BATCH * BLOCK :]
            yield torch.tensor(block).view(BATCH, BLOCK)


def lessons(
    tokenizer: Tokenizer, *, echo_steps: int = ECHO_STEPS, steps: int = STEPS
) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """Yield learning rate, ids and labels [B, T] of every step: echoes, then the corpus.

    The rate rises over WARMUP steps; on the corpus it then falls to zero in a line.
    """
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = tokenizer.get_vocab_size()

    def echo(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return echoes(rows, ECHO_BLOCK, generator, vocabulary=vocabulary)

    for step in range(echo_steps):
        yield ECHO_LR * min((step + 1) / WARMUP, 1), *echo(ECHO_BATCH)
    for step, block in enumerate(itertools.islice(batches(tokenizer, seed=SEED), steps)):
        rate = PEAK_LR * min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1))
        if step % ECHO_EVERY == 0:
            yield rate, *echo(ECHO_BATCH // 2)
        yield rate, block, block


def pretrain(
    name: str,
    tokenizer: Tokenizer,
    *,
    stop: int | None = None,
    echo_steps: int = ECHO_STEPS,
    report: Callable[[int, float], None] | None = None,
) -> tuple[Any, list[float]]:
    """Train an embedded model, or only its first `stop` steps; return it with its losses."""
    model = new_model(name).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.02, fused=True
    )
    losses = []
    plan = itertools.islice(lessons(tokenizer, echo_steps=echo_steps), stop)
    for step, (rate, ids, labels) in enumerate(plan):
        optimizer.param_groups[0]["lr"] = rate
        loss = model(input_ids=ids, labels=labels).loss
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


def first_losses(name: str, tokenizer: Tokenizer) -> dict[str, list[float]]:
    """Return the losses of the first steps on echoes, and on the corpus without them before it."""
    phases = {"echoes": ECHO_STEPS, "corpus": 0}
    return {
        phase: [round(x, 4) for x in pretrain(name, tokenizer, stop=6, echo_steps=n)[1]]
        for phase, n in phases.items()
    }


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Tokenizer, *, n: int = 16) -> float:
    """Return the mean loss in nats over `n` batches of documents that training never drew."""
    fresh = itertools.islice(batches(tokenizer, seed=SEED + 1), n)
    return sum(model(input_ids=block, labels=block).loss.item() for block in fresh) / n


@torch.inference_mode()
def echo_accuracy(model: Any) -> float:
    """Return the share of tokens in fresh echoes that the model foretells."""
    fresh = torch.Generator().manual_seed(SEED + 1)
    ids, labels = echoes(64, ECHO_BLOCK, fresh, vocabulary=model.config.vocab_size)
    told, wanted = model(input_ids=ids).logits[:, :-1].argmax(-1), labels[:, 1:]
    return float((told == wanted)[wanted != IGNORED].float().mean())


def build(name: str, out: Path, *, report: Callable[[int, float], None] | None = None) -> None:
    """Train tokenizer and model from nothing and save them under `out / name`."""
    tokenizer = train_tokenizer(seed=SEED)
    first = first_losses(name, tokenizer)
    model, _ = pretrain(name, tokenizer, report=report)
    directory = out / name
    model.to(torch.bfloat16).save_pretrained(directory)
    wrap(tokenizer).save_pretrained(directory)
    held_out = held_out_loss(model.float(), tokenizer)
    scores = {"held_out": round(held_out, 4), "echo": round(echo_accuracy(model), 4)}
    record = {"seed": SEED, "steps": [ECHO_STEPS, STEPS], "first": first, **scores}
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
    machine.quiet()
    torch.set_num_threads(1)

    total = ECHO_STEPS + STEPS + STEPS // ECHO_EVERY

    def report(step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            print(f"{name}: step {step + 1}/{total}, loss {loss:.3f}", flush=True)

    build(name, out, report=report)
