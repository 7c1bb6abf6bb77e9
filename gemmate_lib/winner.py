"""What the winner of a search is worth: trained once more, and measured once on the test split.

The best validation loss of many trials is too good to be true: it was chosen for being low, and
so for its luck. A fresh seed takes away the luck of the training, the test split that of the rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.manifest import write_whole
from gemmate_lib.metrics import token_losses
from gemmate_lib.rows import Row, encode_all
from gemmate_lib.search import Search
from gemmate_lib.sft import Run, finetune_model, load_run, load_splits, open_run
from gemmate_lib.stats import Comparison, Interval, bootstrap, paired_bootstrap
from gemmate_lib.trainer import Report
from gemmate_lib.trials import with_values

RECORD = "verdict.json"


@dataclass(frozen=True)
class Verdict:
    """The winner against the default recipe, both trained on one fresh seed.

    found: the winner's validation loss in the search; again: that of the same recipe on the fresh
    seed; test: its loss on the test split. All are means of -log p in nats; `found` is over
    tokens, as the trainer has it, the others are over rows.
    comparison: loss of the winner minus that of the default recipe, on the same test rows.
    """

    trial: int
    seed: int
    found: float
    again: Interval
    test: Interval
    default: Interval
    comparison: Comparison

    def lines(self) -> list[str]:
        """For people."""
        survives = {
            "better": "the gain survives on the test split",
            "worse": "the winner is worse on the test split",
            "within noise": "no gain can be told from noise on the test split",
        }
        return [
            f"trial {self.trial} in the search       {self.found:.3f}",
            f"its recipe, seed {self.seed}: validation  {self.again}",
            f"                      test  {self.test}",
            f"the default recipe:   test  {self.default}",
            f"difference on test rows  {self.comparison.difference}"
            f"  p={self.comparison.p_value:.3g}: {survives[self.comparison.verdict()]}",
        ]


def best_experiment(search: Search, *, seed: int | None = None) -> Experiment:
    """The searched experiment with the winner's values, and a seed that no trial had."""
    return with_values(search.experiment, search.best.params, seed=_fresh(search, seed))


def _fresh(search: Search, seed: int | None) -> int:
    seed = search.experiment.seed + 1 if seed is None else seed
    if seed == search.experiment.seed:
        problem = f"Seed {seed} is that of the trials, which the winner was chosen for"
        raise GemmateError(f"{problem}. Give another one.")
    return seed


def finetune_with_best_params(
    search: Search, *, seed: int | None = None, report: Report | None = None
) -> Verdict:
    """Train winner and default recipe on a fresh seed; measure both once on the test split.

    The runs stay in the study's folder, `best` and `default`, and so does what was measured: a
    second call reads it, and another winner or seed is refused. Whoever may look at the test split
    again and again chooses by it.
    Raises: GemmateError for the seed of the trials, or where the test split has been opened.
    """
    file, seed = search.directory / RECORD, _fresh(search, seed)
    trial, value = search.best.number, search.best.value
    if file.is_file():
        return _same(read_verdict(search.directory), trial=trial, seed=seed)
    winner = best_experiment(search, seed=seed)
    default = search.experiment.model_copy(update={"seed": seed})
    runs = [
        _run(each, search.directory / name, report)
        for each, name in ((winner, "best"), (default, "default"))
    ]
    splits = load_splits(search.experiment)
    if not splits.test:
        raise GemmateError("There is no test split. Set dataset.test_fraction above 0.")
    again = row_losses(runs[0], {"validation": splits.validation, "test": splits.test})
    base = row_losses(runs[1], {"test": splits.test})
    made = Verdict(
        trial, seed, float(value or 0.0), bootstrap(again["validation"]), bootstrap(again["test"]),
        bootstrap(base["test"]), paired_bootstrap(base["test"], again["test"],
        higher_is_better=False),
    )  # fmt: skip
    write_whole(file, json.dumps(asdict(made), indent=2, allow_nan=False) + "\n")
    return made


def _run(experiment: Experiment, out: Path, report: Report | None) -> Run:
    if (out / "manifest.json").is_file():
        return load_run(out)
    return finetune_model(experiment, out=out, report=report, resume="last")


def row_losses(run: Run, rows: Mapping[str, Sequence[Row]]) -> dict[str, np.ndarray]:
    """Mean -log p of a token in each row, in nats, float64 [N] for each name."""
    loaded, data = open_run(run), run.experiment.dataset
    found = {}
    for name, each in rows.items():
        cut = encode_all(each, loaded.tokenizer, max_length=data.max_length, over_long="cut")
        size = run.experiment.generation.batch_size
        sums, counts = token_losses(loaded.model, loaded.tokenizer, cut, batch_size=size)
        found[name] = sums / counts
    return found


def read_verdict(directory: Path) -> Verdict:
    """What `finetune_with_best_params` left in a study's folder."""
    content: dict[str, Any] = json.loads((directory / RECORD).read_text("utf-8"))
    for name in ("again", "test", "default"):
        content[name] = Interval(**content[name])
    difference = Interval(**content["comparison"].pop("difference"))
    content["comparison"] = Comparison(difference, **content["comparison"])
    return Verdict(**content)


def _same(found: Verdict, *, trial: int, seed: int) -> Verdict:
    if (found.trial, found.seed) != (trial, seed):
        raise GemmateError(
            f"The test split was opened for trial {found.trial} on seed {found.seed}; this is "
            f"trial {trial} on seed {seed}, and to measure it there as well would be to choose by "
            "the test. Begin another study on another split: dataset.split_seed."
        )
    return found
