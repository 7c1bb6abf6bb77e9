"""A study: one folder of defaults and overrides in, one results.json out, the same each time.

`defaults.yaml` names an experiment, seeds and settings for all; each other `NAME.yaml` holds what
one variant sets besides. Every variant is trained with every seed on the same rows. What was
measured before is found by the run's name, so that a second call trains and measures nothing.
After peft's method_comparison: https://github.com/huggingface/peft/tree/main/method_comparison
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gemmate_lib import machine
from gemmate_lib import metrics as m
from gemmate_lib.adapters import write_json
from gemmate_lib.config import Experiment, Facts, GemmateError, among, resolve
from gemmate_lib.data import Row, Splits
from gemmate_lib.evaluate import general_texts
from gemmate_lib.methods import attach, trained
from gemmate_lib.models import LoadedModel, load_base
from gemmate_lib.rows import encode_all
from gemmate_lib.sft import Run, finetune_or_load, home_of, load_splits, open_run, run_key
from gemmate_lib.stats import Interval, over_seeds
from gemmate_lib.stepping import measure_step

SHIPPED = Path(__file__).parent / "experiments"
DEFAULTS = "defaults.yaml"
Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What a folder asks for: variants by name, each an experiment for each seed."""

    name: str
    variants: dict[str, dict[int, Experiment]]


def read_study(folder: str | Path, *, facts: Facts, profile: str = "auto") -> Study:
    """Read a study: a folder of yours, or a shipped one by its name.

    Raises: GemmateError where a file is no mapping, or there is no variant or no seed.
    """
    path = Path(folder)
    if not path.is_dir():
        shipped = sorted(file.parent.name for file in SHIPPED.glob(f"*/{DEFAULTS}"))
        path = SHIPPED / among(str(folder), shipped, "study")
    defaults = _mapping(path / DEFAULTS)
    seeds, common = defaults.get("seeds"), defaults.get("settings", {})
    files = sorted(file for file in path.glob("*.yaml") if file.name != DEFAULTS)
    if not files or not isinstance(seeds, list) or not seeds or "experiment" not in defaults:
        problem = f"{path} is no study: it needs {DEFAULTS} with experiment and seeds"
        raise GemmateError(f"{problem}, and a NAME.yaml for each variant.")

    def make(own: Mapping[str, Any], seed: int) -> Experiment:
        asked = {**common, **own, "seed": seed}
        name = str(defaults["experiment"])
        return resolve(name, facts=facts, profile=profile, overrides=asked).experiment

    own = {file.stem: _mapping(file) for file in files}
    return Study(path.name, {k: {s: make(v, s) for s in seeds} for k, v in own.items()})


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GemmateError(f"Cannot read {file}: {error}. Mend the file.") from None
    if not isinstance(found, dict):
        raise GemmateError(f"{file} is no mapping. Write KEY: VALUE lines.")
    return found


def results_file(study: Study) -> Path:
    """Where the results go unless told otherwise: among the runs."""
    first = next(iter(next(iter(study.variants.values())).values()))
    return home_of(first) / f"study-{study.name}" / "results.json"


def run_study(
    study: Study, *, out: str | Path | None = None, report: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Train and measure what was not yet, write results.json, and return what stands in it.

    variants: for each a list of records, one a seed: `loss` on the test rows and `general` on
    general texts, in nats a token; `forgotten`, by how much the latter rose; `trained` weights;
    `bytes` of the saved weights; `step_seconds` and `peak_bytes` of a training step.
    Raises: GemmateError for what cannot be trained; what was measured until then is kept.
    """
    path = Path(out) if out else results_file(study)
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known = {r["run"]: r for records in before.get("variants", {}).values() for r in records}
    splits_of = cache(_splits)
    results: dict[str, Any] = {"study": study.name, "variants": {}}
    for name, seeds in study.variants.items():
        records: list[Record] = []
        for seed, experiment in seeds.items():
            splits = splits_of(experiment.model_dump_json(include={"model", "dataset"}))
            key = run_key(experiment, splits)
            if key not in known:
                if report:
                    report(f"{name}, seed {seed}")
                known[key] = _measure(experiment, splits, records[0] if records else None)
            records.append({"run": key, "seed": seed, "method": experiment.method} | known[key])
        results["variants"][name] = records
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
    return results


def _splits(settings: str) -> Splits:
    return load_splits(Experiment.model_validate_json(settings))


def _measure(experiment: Experiment, splits: Splits, first: Record | None) -> Record:
    """Train and measure one run; what a seed does not change is taken from the `first` of them."""
    run = finetune_or_load(experiment, splits=splits)
    opened, length = open_run(run), experiment.dataset.max_length
    own, general = held_out(opened, splits, max_length=length)
    plain = load_base(experiment.model) if first is None else None
    base = held_out(plain, splits, max_length=length) if plain else (first or {})["base"]
    found = {"loss": own, "general": general, "forgotten": general - base[1], "base": list(base)}
    found["bytes"] = sum(file.stat().st_size for file in _weights(run))
    if first is not None:
        return found | {key: first[key] for key in ("trained", "step_seconds", "peak_bytes")}
    return found | _of_a_step(experiment, splits)


def _weights(run: Run) -> list[Path]:
    folder = run.model if run.experiment.method == "full" else run.adapter
    return sorted(folder.glob("*.safetensors"))


def _of_a_step(experiment: Experiment, splits: Splits) -> Record:
    machine.prepare(seed=experiment.seed, threads=experiment.threads)
    base = load_base(experiment.model)
    model, length = attach(base.model, experiment), experiment.dataset.max_length
    rows = [row for row in _encoded(base, splits.train, length) if not row.cut]
    step = measure_step(model, rows[: experiment.training.batch_size], base.tokenizer.pad_token_id)
    return {"trained": trained(model), "step_seconds": step.seconds, "peak_bytes": step.peak_bytes}


def held_out(model: LoadedModel, splits: Splits, *, max_length: int) -> tuple[float, float]:
    """Mean loss of a token, in nats: of the test rows, and of general texts."""
    texts = [Row("", text, {}, 0) for text in general_texts()]
    means = []
    for rows in (splits.test, texts):
        found = m.token_losses(
            model.model, model.tokenizer, _encoded(model, rows, max_length), batch_size=32
        )
        means.append(float(found[0].sum() / found[1].sum()))
    return means[0], means[1]


def _encoded(model: LoadedModel, rows: list[Row], max_length: int) -> list[Any]:
    return encode_all(rows, model.tokenizer, max_length=max_length, over_long="cut")


def summary(results: Mapping[str, Any], key: str) -> dict[str, Interval]:
    """The mean of a number over the seeds, with its interval, for each variant."""
    found = results["variants"].items()
    return {name: over_seeds([record[key] for record in records]) for name, records in found}


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """A table for people, the best held-out loss first."""
    loss, forgotten = summary(results, "loss"), summary(results, "forgotten")
    yield f"{'':<12}{'trained':>10}{'bytes':>12}{'peak MiB':>10}{'ms/step':>9}  loss, forgotten"
    for name in sorted(loss, key=lambda name: loss[name].value):
        one = results["variants"][name][0]
        yield (
            f"{name:<12}{one['trained']:>10,}{one['bytes']:>12,}{one['peak_bytes'] / 2**20:>10.1f}"
            f"{1e3 * one['step_seconds']:>9.0f}  {loss[name]}, {forgotten[name]}"
        )
