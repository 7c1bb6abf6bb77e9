"""Whether a version may take production's place: both are measured on the same test rows.

Several metrics are looked at, and of equal models one in forty is worse beyond noise in each. So
those that decide are corrected for their number, by Holm's method.
Holm 1979, https://www.jstor.org/stable/4615733
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gemmate_lib.config import GemmateError, among
from gemmate_lib.evaluate import Evaluation, compare_models, evaluate_model
from gemmate_lib.evaluation import MAIN
from gemmate_lib.registry import Registry
from gemmate_lib.sft import Run, load_run, load_splits, open_run
from gemmate_lib.stats import Comparison
from gemmate_lib.tags import short
from gemmate_lib.versions import Version, cache_home

LEVEL = 0.05


@dataclass(frozen=True)
class Evidence:
    """Candidate minus production, metric by metric; which decide, and in which it is worse."""

    found: dict[str, Comparison]
    deciding: tuple[str, ...]
    worse: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a tag's history: what decides alone; an infinite bound is None."""
        told = {}
        for name in self.deciding:
            c = self.found[name]
            ends = {key: x if math.isfinite(x := getattr(c.difference, key)) else None
                    for key in ("low", "high")}  # fmt: skip
            told[name] = {"difference": c.difference.value, **ends, "n": c.difference.n,
                          "p": c.p_value, "worse": name in self.worse}  # fmt: skip
        return told

    def lines(self) -> list[str]:
        """One line for each metric, those that decide first."""
        order = sorted(self.found, key=lambda name: name not in self.deciding)
        told = []
        for name in order:
            c = self.found[name]
            said = "WORSE" if name in self.worse else c.verdict()
            aside = "" if name in self.deciding else "  (decides nothing)"
            told.append(f"{name:<24}{c.difference}  p={c.p_value:.3g}  {said}{aside}")
        return told


def weigh(found: Mapping[str, Comparison], metrics: Collection[str] = ()) -> Evidence:
    """Judge comparisons of candidate minus production, by MAIN or the metrics named.

    Raises: GemmateError for a metric that was not measured, or where none decides.
    """
    deciding = [among(name, found, "metric") for name in dict.fromkeys(metrics or ())]
    deciding = deciding or [name for name in MAIN if name in found]
    if not deciding:
        raise GemmateError(f"None of {', '.join(found)} decides by itself. Choose with --metric.")
    by_p, worse = sorted(deciding, key=lambda name: found[name].p_value), []
    for tested, name in enumerate(by_p):
        if found[name].p_value >= LEVEL / (len(by_p) - tested):
            break
        worse += [name] * (found[name].verdict() == "worse")
    return Evidence(dict(found), tuple(deciding), tuple(worse))


def compare_versions(
    registry: Registry, production: Version, candidate: Version, *, limit: int | None = None
) -> dict[str, Comparison]:
    """Measure two versions on the same test rows within the same limits: candidate less production.

    Raises: GemmateError where their test rows or tokens are not the same, BadVersion for one that
        is not sound.
    """
    runs = [
        load_run(registry.versions.fetch(each, cache_home())) for each in (production, candidate)
    ]
    splits = [load_splits(run.experiment) for run in runs]
    if len({each.checksums()["test"] for each in splits}) > 1:
        both = f"{short(production.digest)} and {short(candidate.digest)}"
        raise GemmateError(f"{both} were made with different test rows: no comparison is fair. "
                           "Train on the same split, or say --force WHY.")  # fmt: skip
    settings = runs[0].experiment

    def measure(run: Run) -> Evaluation:
        loaded = open_run(run)
        return evaluate_model(
            loaded.model, loaded.tokenizer, splits[0], max_length=settings.dataset.max_length,
            max_new_tokens=settings.generation.max_new_tokens,
            batch_size=settings.generation.batch_size, limit=limit,
        )  # fmt: skip

    return compare_models(*map(measure, runs))
