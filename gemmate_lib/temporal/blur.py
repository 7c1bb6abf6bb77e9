"""Times that training sees a little off, or not at all, so that no date is learned by heart.

Of a few thousand dated texts, a model learns which text has which date, and nothing for another
text. Where each pass moves every date by some years, what is left to learn is what holds for
years around; where some are withheld, it also learns to read a text of unknown date.
"""

import random
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from gemmate_lib.config import Experiment
from gemmate_lib.timestamps import EARLIEST, LATEST, MISSING, YEAR


def blurred(
    times: Sequence[int], rng: random.Random, *, years: float, withheld: float
) -> list[int]:
    """Return a row's times, all moved by one draw, and within the years -9999 to 9999; or MISSING.

    times: milliseconds since the Unix epoch, or MISSING, which stays.
    years: standard deviation of the normal draw. withheld: the chance that all are MISSING.
    """
    if rng.random() < withheld:
        return [MISSING] * len(times)
    shift = round(rng.gauss(0, years) * YEAR)
    return [t if t == MISSING else min(max(t + shift, EARLIEST), LATEST) for t in times]


class Blur(TrainerCallback):
    """A collator that blurs the times of training's rows, and hands them on to another.

    A draw depends on the seed, the row and the pass over the rows alone: a resumed run draws what
    it would have drawn, and so do several processes.
    """

    def __init__(self, collator: Any, experiment: Experiment) -> None:
        training = experiment.training
        self.collator, self.seed, self.epoch = collator, experiment.seed, 0
        self.spread = {"years": training.timestamp_blur, "withheld": training.timestamp_withheld}

    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Take note of the pass, from 0."""
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Collate; rows of an evaluation have no number, and keep their times."""
        if rows and "row" in rows[0]:
            rows = [row | {"timestamps": self._drawn(row)} for row in rows]
        return self.collator(rows)

    def _drawn(self, row: dict[str, Any]) -> list[int]:
        rng = random.Random(f"{self.seed} {row['row']} {self.epoch}")
        return blurred(row["timestamps"], rng, **self.spread)
