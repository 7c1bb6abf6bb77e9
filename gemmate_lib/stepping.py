"""One training step, measured: how long it takes, and what it holds at its peak."""

import os
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from gemmate_lib.data import Encoded

STEPS = 7  # timed, after one that is not: the optimizer makes its state in the first


class StepCost(NamedTuple):
    """Of one step of forward, backward and AdamW: the fastest one's time, and the peak."""

    seconds: float
    peak_bytes: int


def measure_step(model: Any, rows: Sequence[Encoded], pad: int) -> StepCost:
    """Take steps of AdamW on the rows as one batch, without Trainer; the model is trained by them.

    peak_bytes: weights, optimizer's state, and the most that torch had allocated besides; on a GPU
    what its allocator counts, else what torch's profiler does.
    """
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    batch = _batch(rows, pad, model.device)
    model.train()

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return StepCost(min(seconds), torch.cuda.max_memory_allocated())
    states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers(), *states)}  # fmt: skip
    return StepCost(min(seconds), sum(held.values()) + _peak_on_cpu(step))


def _peak_on_cpu(step: Any) -> int:
    """Bytes that torch allocates and frees while it steps, added up: the highest sum."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints that it starts and stops
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def _batch(rows: Sequence[Encoded], pad: int, device: Any) -> dict[str, Any]:
    """input_ids, attention_mask and labels, int64 [B, T], padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {
        "input_ids": ([r.input_ids for r in rows], pad),
        "attention_mask": ([[1] * len(r.input_ids) for r in rows], 0),
        "labels": ([r.labels for r in rows], -100),
    }
    return {
        name: pad_sequence([torch.tensor(v) for v in values], True, padding).to(device)
        for name, (values, padding) in columns.items()
    }
