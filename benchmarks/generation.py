"""Generation for an evaluation: sorted batches that stop at EOS against one prompt at a time.

The tiny model, fine-tuned on quotes so that it does stop, completes the prompts of its test rows
greedily in float32; the ways take turns, and every text is compared. Each part alone is measured as
well: the batch, the cache of keys and values, the order by length, the early stop.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import parser_for, ratios, report, spread, where, write

PAIRS, PROMPTS, TOKENS = 5, 96, 48
Way = Callable[[Any, Any, list[str]], list[str]]


def one_at_a_time(model: Any, tokenizer: Any, prompts: list[str], **settings: Any) -> list[str]:
    """As the classic notebook does it: a call of `generate` for each prompt."""
    import torch

    said = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").to(model.device)
            out = model.eval().generate(
                **ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **settings
            )
            new = out[0, ids["input_ids"].shape[1] :]
            said.append(tokenizer.decode(new, skip_special_tokens=True))
    return said


def batched(model: Any, tokenizer: Any, prompts: list[str], **settings: Any) -> list[str]:
    """As the course does it."""
    from gemmate_lib.generate import generate_texts

    done = generate_texts(model, tokenizer, prompts, max_new_tokens=TOKENS, **settings)
    return [each.text for each in done]


def unsorted(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Batches in the order that the prompts come in."""
    said: list[str] = []
    for start in range(0, len(prompts), 32):
        said += batched(model, tokenizer, prompts[start : start + 32])
    return said


def never_stopping(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Every text goes on to the last token, after EOS with whatever."""
    return batched(model, tokenizer, prompts, stop_at_eos=False)


WAYS: dict[str, Way] = {
    "one at a time": one_at_a_time,
    "one at a time, no cache": lambda *given: one_at_a_time(*given, use_cache=False),
    "ours, batches of 1": lambda *given: batched(*given, batch_size=1),
    "ours, batches of 8": lambda *given: batched(*given, batch_size=8),
    "ours, batches of 32": lambda *given: batched(*given, batch_size=32),
    "ours, not sorted": unsorted,
    "ours, no early stop": never_stopping,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where ours is less than five times as fast, or says anything else."""
    given = parser_for(__doc__).parse_args(arguments)
    from gemmate_lib import machine

    machine.quiet()
    from gemmate_lib.config import resolve
    from gemmate_lib.predictions import PROMPT_WORDS
    from gemmate_lib.sft import finetune_or_load, load_splits, open_run

    facts = machine.read_facts()
    settings = {"model.quantization": "none", "model.device": facts.device}
    found = resolve("quotes", facts=facts, profile="tiny", overrides=settings).experiment
    opened = open_run(finetune_or_load(found))
    quotes = [row.fields["quote"].split() for row in load_splits(found).test[:PROMPTS]]
    prompts = [f"Quote: {' '.join(words[:PROMPT_WORDS])}" for words in quotes]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    said: dict[str, list[str]] = {}
    for _ in range(PAIRS):
        for name, way in WAYS.items():
            began = time.perf_counter()
            said[name] = way(opened.model, opened.tokenizer, prompts)
            seconds[name].append(time.perf_counter() - began)
    first = said["one at a time"]
    rows = {
        name: {
            "s": spread(seconds[name]),
            "times as fast": ratios(seconds["one at a time"], seconds[name]),
            "other texts": sum(
                not a.startswith(b) if way is never_stopping else a != b
                for a, b in zip(said[name], first, strict=True)
            ),
        }
        for name, way in WAYS.items()
    }
    print(f"{len(prompts)} prompts, up to {TOKENS} new tokens, {PAIRS} rounds")
    report([*rows.items()])
    result = {"prompts": len(prompts), "max_new_tokens": TOKENS, "ways": rows, "machine": where()}
    write(result, given.out)
    fast = rows["ours, batches of 32"]["times as fast"][0] >= 5
    return 0 if fast and not any(row["other texts"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
