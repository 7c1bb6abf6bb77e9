"""Supervised fine-tuning, one run a folder: prepare, load, read, attach, train, save.

A run is named by everything that decides its result: the experiment, the rows, the base's
weights, the versions of the libraries and of this one. What was run before is found again by
that name. Its manifest is written last: a folder without one is a run that did not finish, and
leaves nothing behind but checkpoints to go on from.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from gemmate_lib import machine
from gemmate_lib.adapters import load_adapter, save_adapter
from gemmate_lib.budget import Budget, refuse_budget
from gemmate_lib.cloud_metrics import check_cloud
from gemmate_lib.config import BudgetConfig, Experiment, GemmateError
from gemmate_lib.data import Splits, load_dataset_splits
from gemmate_lib.manifest import package_versions, read_manifest, write_manifest
from gemmate_lib.methods import METHODS, attach, check_method
from gemmate_lib.models import LoadedModel, base_record, load_base, load_tokenizer
from gemmate_lib.monitor import Monitor
from gemmate_lib.ranks import Ranks, join
from gemmate_lib.resume import check_new, find_start, hours_spent, identity_of, keeping_for, work_in
from gemmate_lib.settings import digest
from gemmate_lib.sharding import is_sharded, put_together
from gemmate_lib.sharing import SAME, shares
from gemmate_lib.tracking import check_tracker
from gemmate_lib.trainer import Report, TrainContext, train
from gemmate_lib.trust import experiment_of


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run on disk; `found` if it was there before."""

    directory: Path
    experiment: Experiment
    manifest: dict[str, Any]
    found: bool

    @property
    def adapter(self) -> Path:
        """The folder with adapter and tokenizer."""
        return self.directory / "adapter"

    @property
    def model(self) -> Path:
        """The folder with model and tokenizer, where every weight was trained."""
        return self.directory / "model"

    @property
    def metrics(self) -> dict[str, float]:
        """First and last losses, and the number of steps."""
        return self.manifest["metrics"]

    @property
    def log(self) -> list[dict[str, float]]:
        """One record a step: step, loss, learning_rate, grad_norm; at evaluations eval_loss."""
        lines = (self.directory / "log.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


def load_run(directory: str | Path) -> Run:
    """Read a run's folder.

    Raises: GemmateError where it holds none.
    """
    directory = Path(directory)
    if not (directory / "manifest.json").is_file():
        raise GemmateError(f"{directory} holds no run. Make one with: gemmate finetune quotes")
    manifest = read_manifest(directory)
    return Run(directory, experiment_of(manifest), manifest, found=True)


def open_run(run: Run, *, force: bool = False) -> LoadedModel:
    """Load a run's base with its adapter on it, or its own model, ready to generate."""
    _prepare(run.experiment)
    if run.experiment.method == "full":
        own = {"id": str(run.model), "revision": None, "temporal_kind": None}
        return load_base(run.experiment.model.model_copy(update=own))
    base = load_base(run.experiment.model)
    model = load_adapter(base, run.adapter, force=force).eval()
    return LoadedModel(model, base.tokenizer, base.device, base.reasons, base.base)


@cache
def code_hash() -> str:
    """sha256 of this library's sources: a run made by other code is another run."""
    root = Path(__file__).parent
    files = sorted(f for f in root.rglob("*") if f.suffix in (".py", ".yaml"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_key(experiment: Experiment, splits: Splits) -> str:
    """12 hexadecimal digits over all that decides the result of a run."""
    unlimited = experiment.model_copy(update={"budget": BudgetConfig()})
    parts = {
        "experiment": unlimited.hash(),  # with a larger budget the same run goes on
        "rows": splits.checksums(),
        "base": base_record(experiment.model),
        "packages": package_versions(),
        "code": code_hash(),
    }
    return digest(parts)[:12]


def load_splits(experiment: Experiment) -> Splits:
    """Read an experiment's data set, lengths checked by the model's own tokenizer."""
    tokenizer = load_tokenizer(experiment.model.id, experiment.model.revision)
    return load_dataset_splits(experiment.dataset, tokenizer=tokenizer)


def home_of(experiment: Experiment) -> Path:
    """Where the runs of an experiment are kept: its `project_dir`, or everybody's."""
    own = experiment.project_dir
    return Path(own).expanduser() if own else machine.runs_home()


def finetune_or_load(
    experiment: Experiment, *, report: Report | None = None, splits: Splits | None = None
) -> Run:
    """Return the run of an experiment: the one made before, or a new one under `home_of` it.

    splits: its rows, where they are at hand already.
    """
    splits = splits or load_splits(experiment)
    directory = home_of(experiment) / f"{experiment.name}-{run_key(experiment, splits)}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Notebooks that run side by side want the same run: one makes it, the others wait for it.
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if not (directory / "manifest.json").is_file():
            return finetune_model(
                experiment, out=directory, splits=splits, report=report, resume="last"
            )
    return load_run(directory)


def finetune_model(
    experiment: Experiment,
    *,
    out: str | Path,
    splits: Splits | None = None,
    report: Report | None = None,
    resume: str | None = None,
    allow_changed: Collection[str] = (),
) -> Run:
    """Fine-tune by the experiment's method, one of METHODS, and write the run to `out`.

    resume: go on from a checkpoint: `last`, `best`, or its path; from the start if there is none.
    allow_changed: keys that may differ from those of the checkpoint.
    Raises: GemmateError for a folder that exists, rows that cannot be trained on, a loss,
        gradient or parameter that is no longer finite, or a checkpoint of another run; Spent at
        the end of its budget.
    """
    out, began = Path(out), time.perf_counter()
    resume = resume or experiment.checkpoint.resume
    ranks = join(experiment.model.device)
    shared = is_sharded(ranks.strategy)
    if ranks.first:  # the others may come when it is there
        check_new(out, resume=resume)
    keeps = _keeps_checkpoints(experiment, ranks)
    _prepare(experiment)
    splits = splits or load_splits(experiment)
    record = base_record(experiment.model)
    identity = identity_of(experiment, splits.checksums(), record, ranks)
    _agree(ranks, identity, experiment)
    base = load_base(experiment.model, sharded=shared)
    with work_in(out, ranks) as folder:
        start = find_start(out, experiment, identity, resume=resume, allowed=allow_changed)
        before = ranks.gather(hours_spent(out, start) if resume else 0.0)[0]
        budget = Budget(experiment.budget, began=began, before=before)
        budget.check()
        monitor = Monitor(folder, name=experiment.name, budget=budget, fresh=not resume)
        model = attach(base.model, experiment)
        loaded = time.perf_counter()
        around = TrainContext(
            keeping_for(experiment, out, identity) if keeps else None,
            start.path, ranks, budget, monitor,
        )  # fmt: skip
        with monitor.watching():
            log = train(
                model, base.tokenizer, splits, experiment, folder / "trainer", report=report,
                around=around,
            )  # fmt: skip
        whole = put_together(model) if shared else None
        if ranks.first:
            taken = {"load": loaded - began, "train": time.perf_counter() - loaded}
            _save(model, base, folder, experiment, whole)
            _record(
                folder, experiment, splits, base, log,
                timings=taken | {"hours": budget.spent} | monitor.summary,
                resumed=start.as_dict(), processes=_processes(experiment, ranks),
            )  # fmt: skip
    return Run(out, experiment, read_manifest(out), found=False)


def _keeps_checkpoints(experiment: Experiment, ranks: Ranks) -> bool:
    """Whether the run has checkpoints. Raises: GemmateError for what can be seen beforehand."""
    check_method(experiment)
    check_tracker(experiment.tracking)
    check_cloud(experiment.tracking)
    soft = METHODS[experiment.method].soft  # of which no checkpoint could be gone on with
    if not soft and not is_sharded(ranks.strategy):
        return True
    what = experiment.method if soft else ranks.strategy
    refuse_budget(experiment, f"Training by {what}, which has no checkpoints,")
    return False


def _prepare(experiment: Experiment) -> None:
    machine.speak(experiment.tracking.log_level)
    deterministic = experiment.deterministic
    machine.prepare(seed=experiment.seed, threads=experiment.threads, deterministic=deterministic)


def _agree(ranks: Ranks, identity: dict[str, Any], experiment: Experiment) -> None:
    """Raise GemmateError where a rank would train another run, naming it and what differs."""
    facts = machine.describe()
    here = {"machine." + key: facts[key] for key in ("device", "platform", "python")}
    ranks.agree(identity | {"code": code_hash(), "experiment": experiment.hash()} | here, SAME)


def _processes(experiment: Experiment, ranks: Ranks) -> dict[str, Any] | None:
    """For the manifest: how many trained, and what each of them took; None for one alone."""
    if not ranks.several:
        return None
    settings = experiment.training
    rows, batches = shares(settings.batch_size, settings.gradient_accumulation_steps, ranks.world)
    held = {"world": ranks.world, "strategy": ranks.strategy, "backend": ranks.backend}
    return held | {"rows_at_a_time": rows, "batches_to_a_step": batches}


def _record(
    folder: Path,
    experiment: Experiment,
    splits: Splits,
    base: LoadedModel,
    log: list[dict[str, float]],
    **told: Any,
) -> None:
    """Write the log and, last of all, the manifest."""
    if experiment.tracking.tracker == "none":  # others write into it
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    lines = (json.dumps(record) + "\n" for record in log)
    (folder / "log.jsonl").write_text("".join(lines), "utf-8")
    write_manifest(
        folder,
        kind="sft",
        experiment=experiment,
        facts=machine.describe(),
        data=splits.report.as_dict() | {"checksums": splits.checksums()},
        base=base.base,
        metrics=_summary(log),
        **told,
    )


def _save(
    model: Any, base: LoadedModel, folder: Path, experiment: Experiment, whole: Any = None
) -> None:
    if experiment.method == "full":
        model.save_pretrained(folder / "model", state_dict=whole)
        base.tokenizer.save_pretrained(folder / "model")
    else:
        save_adapter(model, folder / "adapter", base.base, weights=whole)
        base.tokenizer.save_pretrained(folder / "adapter")


def _summary(log: list[dict[str, float]]) -> dict[str, float]:
    losses = [record["loss"] for record in log if "loss" in record]
    checks = [record["eval_loss"] for record in log if "eval_loss" in record]
    summary = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
    return summary | ({"best_eval_loss": min(checks), "eval_loss": checks[-1]} if checks else {})
