"""What a model knew after each task of a sequence, and the measures of what it forgot.

Shapes: `T` tasks, `N` test rows of a task. Scores are float64 [T + 1, T], higher is better: entry
[i, j] is that of task j after i tasks have been learned; row 0 is the base's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemmate_lib.config import GemmateError
from gemmate_lib.stats import Interval, over_seeds

Scores = np.ndarray


@dataclass(frozen=True)
class History:
    """Test losses of one sequence.

    losses: task -> -log p of each row's completion in nats, float64 [T + 1, N];
    right: task -> how many of its tokens have more than half of the probability, int64 [T + 1, N];
    tokens: task -> how many there are, int64 [N].
    """

    losses: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order in which they were learned."""
        return list(self.losses)

    def loss(self) -> Scores:
        """Mean loss of a token in nats, [T + 1, T]: here lower is better."""
        return self._per_token(self.losses)

    def accuracy(self) -> Scores:
        """Share of the tokens with more than half of the probability, [T + 1, T].

        Greedy decoding writes such a token, where it has written the answer up to there.
        """
        return self._per_token(self.right)

    def _per_token(self, counted: dict[str, np.ndarray]) -> Scores:
        parts = [counted[task].sum(axis=1) / self.tokens[task].sum() for task in self.tasks]
        return np.stack(parts, axis=1)


def average(scores: Scores) -> float:
    """The mean over all tasks after the last one: ACC of Lopez-Paz and Ranzato 2017.

    https://arxiv.org/abs/1706.08840
    """
    return float(_checked(scores)[-1].mean())


def backward_transfer(scores: Scores) -> float:
    """How much later tasks changed an earlier one, on average; below zero: it was forgotten.

    BWT of Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840
    """
    scores = _checked(scores)
    learned = np.diagonal(scores[1:])
    return float((scores[-1] - learned)[:-1].mean())


def forward_transfer(scores: Scores) -> float:
    """How much earlier tasks taught of a later one before it began, against the base.

    FWT of Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840
    """
    scores = _checked(scores)
    return float((np.diagonal(scores[:-1]) - scores[0])[1:].mean())


def forgetting(scores: Scores) -> float:
    """How far each earlier task fell from its best, on average; more is worse.

    F of Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112: the best is taken over all tasks
    but the last, so it can lie below zero where the last task helped.
    """
    scores = _checked(scores)
    return float((scores[1:-1].max(axis=0) - scores[-1])[:-1].mean())


def _checked(scores: Scores) -> Scores:
    rows, tasks = scores.shape
    if rows != tasks + 1 or tasks < 2 or not np.isfinite(scores).all():
        raise GemmateError(f"Scores [{rows}, {tasks}] are of no sequence. Give two tasks or more.")
    return scores


# Each measure of a sequence, and whether more of it is better. Those in nats are of the loss.
MEASURES: dict[str, tuple[Callable[[History], float], bool]] = {
    "loss": (lambda h: -average(-h.loss()), False),
    "earlier_loss": (lambda h: float(h.loss()[-1, :-1].mean()), False),
    "last_loss": (lambda h: float(h.loss()[-1, -1]), False),
    "forgetting_nats": (lambda h: forgetting(-h.loss()), False),
    "backward_transfer_nats": (lambda h: backward_transfer(-h.loss()), True),
    "forward_transfer_nats": (lambda h: forward_transfer(-h.loss()), True),
    "accuracy": (lambda h: average(h.accuracy()), True),
    "forgetting": (lambda h: forgetting(h.accuracy()), False),
    "backward_transfer": (lambda h: backward_transfer(h.accuracy()), True),
}


def measure(histories: Sequence[History]) -> dict[str, Interval]:
    """Return each measure with its interval over the seeds, one history each."""
    return {name: over_seeds([of(h) for h in histories]) for name, (of, _) in MEASURES.items()}


def differences(before: Sequence[History], after: Sequence[History]) -> dict[str, Interval]:
    """Return how each measure changed, after minus before: paired by seed, interval over them.

    Raises: GemmateError where the seeds cannot be paired.
    """
    if len(before) != len(after):
        raise GemmateError(f"{len(before)} seeds before, {len(after)} after. Compare the same.")
    pairs = list(zip(before, after, strict=True))
    return {n: over_seeds([of(b) - of(a) for a, b in pairs]) for n, (of, _) in MEASURES.items()}


def summary(found: Mapping[str, Sequence[History]], *, against: str) -> dict[str, Any]:
    """Return matrices by seed, measures and differences to one strategy, ready for JSON."""
    return {
        name: {
            "loss": [h.loss().tolist() for h in histories],
            "accuracy": [h.accuracy().tolist() for h in histories],
            "measures": {k: _plain(v) for k, v in measure(histories).items()},
            "differences": {
                k: _plain(v) for k, v in differences(found[against], histories).items()
            },
        }
        for name, histories in found.items()
    }


def lines(found: Mapping[str, Sequence[History]]) -> list[str]:
    """Return one line a strategy, for people; the first is what the others are compared with."""
    against, shown = next(iter(found)), ("loss", "earlier_loss", "forgetting_nats", "accuracy")
    told = [f"{'':<10}" + "".join(f"{name:<32}" for name in shown)]
    for name, histories in found.items():
        measures = measure(histories)
        told.append(f"{name:<10}" + "".join(f"{measures[key]!s:<32}" for key in shown))
    for name, histories in list(found.items())[1:]:
        change = differences(found[against], histories)["earlier_loss"]
        told.append(f"loss on earlier tasks, {name} against {against}: {change}")
    return told


def _plain(interval: Interval) -> dict[str, Any]:
    return {k: v if math.isfinite(v) else None for k, v in vars(interval).items()}
