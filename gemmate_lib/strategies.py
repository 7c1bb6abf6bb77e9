"""How earlier tasks are held on to while a later one is learned; the replay buffer."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gemmate_lib.config import GemmateError
from gemmate_lib.data import Row

Item = TypeVar("Item")


@dataclass(frozen=True)
class Strategy:
    """How earlier tasks are held on to; by default not at all.

    replay: rows of earlier tasks that are kept; replay_share: of what a later task trains on.
    ewc: strength of the penalty, lambda; fisher_rows: of a task, that its Fisher is taken from.
    separate: each task begins at the base and has an adapter of its own.
    """

    replay: int = 0
    replay_share: float = 0.25
    ewc: float = 0.0
    fisher_rows: int = 32
    separate: bool = False

    def __post_init__(self) -> None:
        if self.replay < 0 or self.ewc < 0 or self.fisher_rows < 1:
            raise GemmateError("replay and ewc are 0 or more, fisher_rows 1 or more. Mend them.")
        if not 0 < self.replay_share < 1:
            raise GemmateError(f"replay_share={self.replay_share} is no share. Give 0.25, say.")
        if self.separate and (self.replay or self.ewc):
            raise GemmateError("Separate adapters forget nothing. Leave replay and ewc at 0.")

    def in_effect(self) -> dict[str, Any]:
        """What decides how a later task is learned: nothing, for plain sequential training."""
        replay = {"replay": self.replay, "replay_share": self.replay_share} if self.replay else {}
        return replay | ({"ewc": self.ewc, "fisher_rows": self.fisher_rows} if self.ewc else {})


def strategies(*, replay: int, ewc: float) -> dict[str, Strategy]:
    """Return the five strategies by name, for a size of the buffer and a strength."""
    return {
        "none": Strategy(),
        "replay": Strategy(replay=replay),
        "ewc": Strategy(ewc=ewc),
        "both": Strategy(replay=replay, ewc=ewc),
        "separate": Strategy(separate=True),
    }


def reservoir(stream: Iterable[Item], size: int, *, seed: int) -> list[Item]:
    """Keep `size` items of a stream of any length, each with the same chance, in one pass.

    What it holds after the first items of a stream is what it would hold of them alone.
    Algorithm R: Vitter 1985, https://doi.org/10.1145/3147.3165
    """
    rng, kept = random.Random(seed), list[Item]()
    for seen, item in enumerate(stream):
        if seen < size:
            kept.append(item)
        elif (place := rng.randrange(seen + 1)) < size:
            kept[place] = item
    return kept


def with_replay(rows: list[Row], buffer: Sequence[Row], *, share: float) -> list[Row]:
    """Return a task's rows and so many of the buffer that they are this share of all.

    Each row of the buffer is repeated as often as any other, or once more. Without a buffer the
    rows are what they were. Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486
    """
    more = round(len(rows) * share / (1 - share)) if buffer else 0
    return [*rows, *(buffer[i % len(buffer)] for i in range(more))]
