"""Hand a run over to lm-eval-harness: its tasks, or your own, on the model of the run.

A task file may name Python beside it, which the harness runs: include only what you trust.
Gao et al., https://github.com/EleutherAI/lm-evaluation-harness
"""

import contextlib
import difflib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemmate_lib.adapters import encoder_of, known_peft_warnings
from gemmate_lib.config import GemmateError
from gemmate_lib.extras import need
from gemmate_lib.generate import evaluating
from gemmate_lib.methods import behind_soft_prompt
from gemmate_lib.models import LoadedModel
from gemmate_lib.settings import digest
from gemmate_lib.sft import Run, open_run
from gemmate_lib.timestamps import MISSING

INTERVAL = "95 %, normal approximation: value - 1.96 stderr to value + 1.96 stderr"
# The harness's own defaults: they choose the few-shot examples, as in published results.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234}
SEEDS |= {"torch_random_seed": 1234, "fewshot_random_seed": 1234}
RESAMPLES = 1_000  # for the standard error of what is not a mean, perplexity say
LOCAL = {"arrow", "csv", "json", "parquet", "text"}  # what `datasets` reads without the Hub
# What lm-eval 0.4.13 says to everybody who brings a model, or a task of few lines.
_CHATTER = ("`pretrained` model kwarg", "Passed an already-initialized", "is defined, but")


def run_lm_eval(
    run: Run,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Measure a run on tasks of lm-eval-harness; writes lm_eval.json into the run's folder.

    include_path: a folder with task files of one's own. limit: only so many rows of each task.
    batch_size: None: the experiment's. No chat template is applied.
    Raises: GemmateError as `measure_tasks` does.
    """
    manager = find_tasks(tasks, include_path)  # before the model is loaded, which takes longer
    batch_size = batch_size or run.experiment.generation.batch_size
    found = measure_tasks(open_run(run), tasks, manager, limit=limit, batch_size=batch_size)
    text = json.dumps(found, ensure_ascii=False, sort_keys=True, allow_nan=False, indent=1)
    (run.directory / "lm_eval.json").write_text(f"{text}\n", "utf-8", newline="\n")
    return found


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Return the harness's TaskManager, in which all these names are known.

    Raises: GemmateError without the harness, for no such folder, no task, or an unknown one.
    """
    need("lm_eval", "A suite", extra="lm-eval")
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise GemmateError(f"There is no folder {include_path}. Give the one with your task files.")
    if not tasks:
        raise GemmateError("No task is named. Name one at least, as in hellaswag.")
    logging.getLogger("lm_eval.models.huggingface").addFilter(_matters)
    logging.getLogger("lm_eval.api.task").addFilter(_matters)
    # The 14,000 shipped ones take ten seconds to read: only where one's own are not enough.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(_is_local(name, manager.task_index) for name in tasks):
        manager = TaskManager(include_path=include_path)
    known = manager.all_tasks
    for name in tasks:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, cutoff=0.5)) or "none"
            problem = f"lm-eval {version('lm_eval')} knows no task {name!r}; near it: {near}"
            raise GemmateError(f"{problem}. Name one of them, or put its file into --include-path.")
    return manager


def measure_tasks(
    loaded: LoadedModel, tasks: Sequence[str], manager: Any, *, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """Measure a loaded model, which is left as it was, on tasks that `find_tasks` has found.

    A time-aware model is asked at no known time, as in the rest of this library. Where all files
    of the tasks are local, nothing is asked of the network.
    Raises: GemmateError where a task's data cannot be read, or it asks for what is refused here.
    """
    import lm_eval

    if behind_soft_prompt(loaded.model):
        batch_size = 1  # the harness pads a batch on the left: see generate.py
    options = {"limit": limit, "bootstrap_iters": RESAMPLES, **SEEDS}
    offline = all(_is_local(name, manager.task_index) for name in tasks)
    hub = _hub(offline=offline)
    with evaluating(loaded.model), hub, _explained(tasks), known_peft_warnings():
        harness = _wrapped(loaded, batch_size)
        results = lm_eval.simple_evaluate(harness, tasks=[*tasks], task_manager=manager, **options)
    return {
        "harness": f"lm-eval {version('lm_eval')}",
        "interval": INTERVAL,
        **{"limit": limit, "batch_size": batch_size, "seeds": SEEDS},
        "timestamps": "missing" if encoder_of(loaded.model) is not None else None,
        "tasks": {name: _record(name, results) for name in results["results"]},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return one line for each metric, for people; the intervals are normal approximations."""
    shown = []
    for task, record in found["tasks"].items():
        for name, x in record["metrics"].items():
            bounds = "" if x["low"] is None else f" [{x['low']:.3f}, {x['high']:.3f}]"
            value = math.nan if x["value"] is None else x["value"]
            shown.append(f"{f'{task} {name}':<40}{value:.3f}{bounds} (n={record['n']})")
    return [*shown, f"{found['harness']}; intervals: {found['interval']}"]


def _is_local(name: str, index: Any) -> bool:
    """Whether a task, or all in a group or tag, read files of this machine alone."""
    if (entry := index.get(name)) is None:
        return False
    config = entry.cfg or {}
    if entry.kind.name in ("GROUP", "TAG"):
        members = config.get("task", []) if entry.kind.name == "GROUP" else entry.tags
        return all(isinstance(each, str) and _is_local(each, index) for each in members)
    return config.get("dataset_path") in LOCAL and "://" not in str(config.get("dataset_kwargs"))


def _matters(record: logging.LogRecord) -> bool:
    return not any(part in str(record.msg) for part in _CHATTER)


def _wrapped(loaded: LoadedModel, batch_size: int) -> Any:
    """The harness's view of the model; one BOS goes before a text, as in training."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Timeless(HFLM):
        """A single prompt without a time would be asked now: another result every day."""

        def _model_call(self, inps: Any, **_: Any) -> Any:
            with torch.no_grad():
                return self.model(inps, timestamps=_missing(inps)).logits

        def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
            options["timestamps"] = _missing(context)
            return super()._model_generate(context, max_length, stop, **options)

    def _missing(ids: Any) -> Any:
        return torch.full((len(ids),), MISSING, dtype=torch.int64, device=ids.device)

    kind = HFLM if encoder_of(loaded.model) is None else Timeless
    bos = True if loaded.tokenizer.bos_token_id is not None else None
    options = {"tokenizer": loaded.tokenizer, "batch_size": batch_size, "add_bos_token": bos}
    # Causal, said outright: the harness does not know the type of a time-aware model.
    return kind(loaded.model, backend="causal", **options)


@contextlib.contextmanager
def _hub(*, offline: bool) -> Iterator[None]:
    """No telemetry, no forked processes, nothing on stdout; with `offline` no Hub at all."""
    import datasets.config
    import huggingface_hub.constants

    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # `evaluate` is imported later
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness's bootstrap would fork torch
    # The others have read the environment already, when they were imported.
    vars(datasets.config)["HF_UPDATE_DOWNLOAD_COUNTS"] = False
    readers = [vars(datasets.config), vars(huggingface_hub.constants)]
    was = [reader["HF_HUB_OFFLINE"] for reader in readers]
    try:
        for reader in readers:
            reader["HF_HUB_OFFLINE"] |= offline
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be JSON
            yield
    finally:
        for reader, value in zip(readers, was, strict=True):
            reader["HF_HUB_OFFLINE"] = value


@contextlib.contextmanager
def _explained(tasks: Sequence[str]) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    wrong = (OSError, ValueError, ImportError, LookupError, AssertionError)
    try:
        yield
    except (*wrong, DatasetsError, TemplateError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        problem = f"lm-eval cannot run {', '.join(tasks)}: {why}"
        raise GemmateError(f"{problem}. Mend the task's file, or take another task.") from error


def _record(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """What was measured on a task or group, and what identifies it and its rows."""
    own, config = results["results"][name], results["configs"].get(name, {})
    paths = {"dataset_kwargs", "metadata"}  # where the files lie; the rows have a hash of their own
    told = json.loads(json.dumps({k: config[k] for k in config.keys() - paths}, default=str))
    samples = results["samples"].get(name, [])
    rows = [[row["doc_hash"], row["prompt_hash"], row["target_hash"]] for row in samples]
    better = results["higher_is_better"].get(name, {})
    return {
        "version": results["versions"].get(name),
        "config_sha256": digest(told) if config else None,
        "rows_sha256": digest(rows) if rows else None,
        "n": own["sample_len"],
        "n_all": results["n-samples"].get(name, {}).get("original"),
        "few_shot": results["n-shot"].get(name),
        "metrics": dict(_metrics(own, better)),
    }


def _metrics(own: dict[str, Any], better: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A filter that is none goes unnamed; a stderr of 0, all rows alike, bounds nothing."""
    for key in own:
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        value, stderr = _number(own[key]), _number(own.get(f"{name}_stderr,{chosen}"))
        low = high = None
        if value is not None and stderr:
            low, high = value - 1.96 * stderr, value + 1.96 * stderr
        record = {"value": value, "stderr": stderr, "low": low, "high": high}
        yield name if chosen == "none" else key, record | {"higher_is_better": better.get(name)}


def _number(value: Any) -> float | None:
    """A finite number; None for "N/A" and for what JSON has no word for."""
    known = not isinstance(value, str | None) and math.isfinite(value)
    return float(value) if known else None
