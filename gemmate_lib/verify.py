"""Run an experiment again from its manifest, and say how far the two results agree."""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemmate_lib import machine
from gemmate_lib.checkpoints import differences
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.manifest import package_versions
from gemmate_lib.sft import Run, finetune_model, load_splits
from gemmate_lib.trainer import Report

# Tiny runs agree to about six digits between machines; a changed seed moves the first loss by more.
TOLERANCE = 1e-3  # of each loss, relative
LOSSES = ("loss", "eval_loss")


@dataclass(frozen=True)
class Verdict:
    """How a second run compares; `step` is the first that differs, None where none does."""

    outcome: Literal["bit-exact", "within tolerance", "different"]
    step: int | None = None
    largest: float = 0.0  # relative difference of a loss
    weights_equal: bool = True
    then_now: dict[str, Any] = field(default_factory=dict)  # machine and packages that changed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        said = {
            "bit-exact": "bit-exact: the same losses and the same weights",
            "within tolerance": f"within tolerance: losses differ by up to {self.largest:.1e}, "
            f"from step {self.step} on" if self.step else "within tolerance: equal losses, "
            "weights that differ in their last bits",
            "different": f"different from step {self.step} on: by {self.largest:.1e} at most",
        }[self.outcome]  # fmt: skip
        changed = [f"  {key}: {a} then, {b} now" for key, (a, b) in self.then_now.items()]
        return [said, *(["what has changed since:", *changed] if changed else [])]


def verify_run(run: Run, *, report: Report | None = None) -> Verdict:
    """Train again what a run's manifest describes, and compare step by step.

    Raises: GemmateError where it cannot be made again: other rows, or settings changed midway.
    """
    if (run.manifest.get("resumed") or {}).get("allowed"):
        raise GemmateError(
            f"{run.directory} was resumed with changed settings: no one configuration describes "
            "it. Verify a run that was made in one go."
        )
    splits = load_splits(run.experiment)
    if changed := differences(run.manifest["data"]["checksums"], splits.checksums()):
        raise GemmateError(
            f"The rows are not those of the run: {', '.join(changed)} differ. Put the data back."
        )
    with tempfile.TemporaryDirectory() as folder:
        again = finetune_model(
            _quietly(run.experiment), out=Path(folder) / "again", splits=splits, report=report
        )
        return _compare(run, again)


def _quietly(experiment: Experiment) -> Experiment:
    """The same computation, without trackers, checkpoints or copies elsewhere."""
    keep = {"remote_path": None, "resume_from_checkpoint": False}
    quiet = {
        "tracking": experiment.tracking.model_copy(update={"tracker": "none"}),
        "checkpoint": experiment.checkpoint.model_copy(update=keep),
    }
    return experiment.model_copy(update=quiet)


def _compare(run: Run, again: Run) -> Verdict:
    then = {"machine": run.manifest["machine"], "packages": run.manifest["packages"]}
    now = {"machine": machine.describe(), "packages": package_versions()}
    changed: dict[str, Any] = {}
    for kind in then:
        found = differences(then[kind], now[kind])
        changed |= {f"{kind}.{key}": both for key, both in found.items()}
    weights = _weights(run) == _weights(again)
    if run.log == again.log and weights:
        return Verdict("bit-exact", then_now=changed)
    gaps = [_gap(a, b) for a, b in zip(run.log, again.log, strict=False)]
    first = next((int(a["step"]) for a, gap in zip(run.log, gaps, strict=False) if gap > 0), None)
    largest = max(gaps, default=0.0)
    if len(run.log) != len(again.log):
        end = min(len(run.log), len(again.log))
        first, largest = first or end, float("inf")
    outcome: Literal["within tolerance", "different"]
    outcome = "within tolerance" if largest <= TOLERANCE else "different"
    return Verdict(outcome, first, largest, weights, changed)


def _weights(run: Run) -> bytes:
    folder = run.model if run.experiment.method == "full" else run.adapter
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


def _gap(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest relative difference of a loss; of other records, infinite."""
    if one.keys() != other.keys() or one["step"] != other["step"]:
        return float("inf")
    return max(
        (abs(one[k] - other[k]) / max(abs(one[k]), 1e-12) for k in LOSSES if k in one), default=0.0
    )
