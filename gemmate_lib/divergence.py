"""A watch on every step: the first number that is not finite is named, with its rows."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from gemmate_lib.config import GemmateError
from gemmate_lib.sharding import own_part, packed

Report = Callable[[dict[str, float]], None]
# A gradient scaler (fp16) starts at 2**16 and halves with each overflow: so many are no failure.
OVERFLOWS = 20


class Diverged(GemmateError):
    """A loss, gradient or parameter that is no longer finite."""


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no entry is infinite or NaN: one pass, one answer from the device."""
    parts = [own_part(tensor) for tensor in tensors]
    return not parts or bool(torch.nn.utils.get_total_norm(parts).isfinite())


class RowsOf:
    """A collator that remembers the numbers of the rows in the latest training batches."""

    def __init__(self, collator: Any, keep: int) -> None:
        self.collator, self.batches = collator, 0
        self._rows: deque[tuple[int, list[int]]] = deque(maxlen=keep)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Collate; rows of an evaluation have no number."""
        if rows and "row" in rows[0]:
            rows = [dict(row) for row in rows]
            self._rows.append((self.batches, [row.pop("row") for row in rows]))
            self.batches += 1
        return self.collator(rows)

    def between(self, first: int, last: int) -> list[int]:
        """The rows of the batches first <= i < last, as far as they are remembered."""
        return [row for i, rows in self._rows if first <= i < last for row in rows]


class Watch(TrainerCallback):
    """Stops at the first number that is not finite, names it, and hands every record on."""

    def __init__(self, report: Report | None, rows: RowsOf | None = None) -> None:
        self.report, self.rows = report, rows
        self._done = self._began = 0  # micro-batches, and those before this step
        self._overflows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at every weight once: attention can hide one that is NaN behind finite scores."""
        model = given["model"]
        codes = {name for name, _ in packed(model)}  # in 4 bits, perhaps stored as floats
        for name, weight in model.named_parameters():
            mine = own_part(weight.detach())
            known = name not in codes and mine.is_floating_point() and mine.numel()
            ends = mine.aminmax() if known else ()  # NaN where one is; no copy
            if not all(bool(end.isfinite()) for end in ends):
                raise Diverged(f"{name} is not finite before the first step. Load another base.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remember where this step's micro-batches begin."""
        self._began = self._done

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count a micro-batch."""
        self._done += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the gradients while the weights are still those of the step before."""
        self._done += 1
        grads = [p.grad for p in given["model"].parameters() if p.grad is not None]
        if finite(grads):
            self._overflows = 0
            return
        self._overflows += 1
        if not args.fp16 or self._overflows > OVERFLOWS:
            self._stop("the gradient", state.global_step + 1, given)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the trained weights."""
        trained = [p.detach() for p in given["model"].parameters() if p.requires_grad]
        if not finite(trained):
            self._stop("a trained weight", state.global_step, given)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at one record of the log."""
        logs = given.get("logs") or {}
        for name in ("loss", "eval_loss"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                self._stop(f"the {name}", state.global_step, given)
        if self.report:
            self.report({"step": state.global_step} | logs)

    def _stop(self, what: str, step: int, given: Mapping[str, Any]) -> None:
        rate = max(group["lr"] for group in given["optimizer"].param_groups)
        rows = self.rows.between(self._began, self._done) if self.rows else []
        where = f", rows {', '.join(map(str, rows))}" if rows else ""
        raise Diverged(
            f"The run diverged in step {step}: {what} is not finite (learning rate {rate:.2g}"
            f"{where}). Lower training.learning_rate, compute in bfloat16 or float32, or look at "
            "these rows. Checkpoints from before this step are sound."
        )
