"""The model card: what a run is, what it was trained on and how, how well it does, its limits.

It is written from the run's records alone; no text that a model wrote and no data row is in it.
"""

import contextlib
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml

from gemmate_lib.cards import Card, read_card
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.keys import flatten
from gemmate_lib.methods import METHODS
from gemmate_lib.models import EMBEDDED
from gemmate_lib.stats import Interval

if TYPE_CHECKING:
    from gemmate_lib.evaluate import Evaluation
    from gemmate_lib.sft import Run

CARD = """\
---
{front}---

# {name}

A {kind}, made by supervised fine-tuning of {base} (SHA-256 of its weights: {weights}).

## Intended use

To learn from: it completes texts of the form it was trained on. Do not rely on what it writes.

## Training data

{data}

## Recipe

Every setting that differs from the library's default.

{recipe}
## Results

{results}

{metrics}
## How to load it

```python
{code}
```

## Limits

{limits}"""
LOAD_ADAPTER = """\
from gemmate_lib.config import ModelConfig
from gemmate_lib.models import load_adapter, load_base

folder = "."  # where these files are; huggingface_hub.snapshot_download fetches them
base = load_base(ModelConfig({settings}))
model, tokenizer = load_adapter(base, folder), base.tokenizer  # refuses any other base"""
LOAD_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where these files are, or their name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
ALWAYS = (
    "It was trained on little data in few steps, to show how fine-tuning works.",
    "It inherits the faults of its base; neither was examined for bias or harm.",
    "What it writes may be false, and nobody may ever have said what it attributes to them.",
)
EMBEDDED_BASE = "The base is tiny and knows an invented world: no text of it means anything."
SYNTHETIC = "The training data is synthetic: its results say nothing about real texts."
# The folders of a path from a root, a drive or a home; no slash within a name, a URL or a tag.
_FOLDERS = re.compile(r"(?:^|(?<=[\s\"'(=]))(?:[A-Za-z]:[\\/]|~?/)(?:[^\s\"'\\/]+[\\/])+")


def model_card(run: "Run", *, evaluation: "Evaluation | None" = None, merged: bool = False) -> str:
    """Return the README.md of a run, in the Hub's model-card format.

    evaluation: of this run; None: the one its metrics.json holds, if there is one.
    Reference: https://huggingface.co/docs/hub/model-cards
    """
    file, measured = run.directory / "metrics.json", evaluation and evaluation.as_dict()
    if measured is None and file.is_file():
        measured = json.loads(file.read_text("utf-8"))
    model, data = run.experiment.model, _data_card(run)
    base, defaults = without_folders(model.id), flatten(Experiment())
    settings = flatten(run.experiment.model_copy(update={"search": Experiment().search}))
    changed = {k: v for k, v in settings.items() if v != defaults[k]}
    shown = {k: repr(without_folders(v)) for k, v in model if k not in ("attention", "device")}
    results = "Training only; it was not evaluated."
    if measured:
        results = "With 95 % confidence intervals where there are any."
    return CARD.format(
        front=yaml.safe_dump(_front_matter(run, data, merged=merged), sort_keys=False),
        name=run.experiment.name,
        kind=_kind(run, merged=merged),
        base=_plain(f"{base}, revision {model.revision}" if model.revision else base),
        weights=_plain(run.manifest["base"].get("weights_sha256") or "not recorded"),
        data=_plain(_describe_data(run, data)),
        recipe=_table("setting", changed.items()),
        results=results,
        metrics=_table("metric", _metrics(measured or {"metrics": run.metrics})),
        code=LOAD_MERGED
        if merged
        else LOAD_ADAPTER.format(settings=", ".join(f"{k}={v}" for k, v in shown.items())),
        limits="".join(f"- {_plain(line)}\n" for line in _limits(run, data)),
    )


def _front_matter(run: "Run", data: Card | None, *, merged: bool) -> dict[str, Any]:
    model, embedded = run.experiment.model, run.experiment.model.id in EMBEDDED
    # A folder's name could be somebody else's model on the Hub.
    base = model.id if embedded or not Path(model.id).is_dir() else None
    gemma = "gemma" if base and "/gemma" in base else "other"  # the terms of Google's weights
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "license": "mit" if embedded else gemma,
        "datasets": [data.source.hub_id or data.name] if data else [],
        "language": data.language if data else [],
        "tags": [_tag(run.experiment), "sft", "gemmate"],
    }
    return {key: value for key, value in front.items() if value}


def _kind(run: "Run", *, merged: bool) -> str:
    name, title = run.experiment.method, METHODS[run.experiment.method].title
    if name == "full":
        return "model of which every weight was trained"
    if METHODS[name].soft:
        return f"soft prompt, learned by {title}"
    return f"model with a {title} adapter merged into it" if merged else f"{title} adapter"


def _tag(experiment: Experiment) -> str:
    quantized = experiment.model.quantization != "none"
    return "qlora" if experiment.method == "lora" and quantized else experiment.method


def _data_card(run: "Run") -> Card | None:
    with contextlib.suppress(GemmateError):  # a file of your own has none
        return read_card(run.experiment.dataset.id)
    return None


def _describe_data(run: "Run", card: Card | None) -> str:
    splits = run.manifest["data"].get("splits") or {}
    rows = ", ".join(f"{split} {count}" for split, count in splits.items()) or "not recorded"
    if card is None:
        name = without_folders(run.experiment.dataset.train or run.experiment.dataset.id)
        return f"{name}, which has no data card. Rows: {rows}."
    origin = card.source.hub_id or card.source.generator or card.source.file
    seed = "" if card.source.seed is None else f", seed {card.source.seed}"
    pinned = f", revision {card.source.revision}" if card.source.revision else seed
    return f"{card.pretty_name} ({origin}{pinned}; licence {card.license}). Rows: {rows}."


def _limits(run: "Run", data: Card | None) -> list[str]:
    lines = [*ALWAYS]
    if run.experiment.model.id in EMBEDDED:
        lines.append(EMBEDDED_BASE)
    if data and data.source.generator:
        lines.append(SYNTHETIC)
    return lines + [f"Of the data: {defect}" for defect in (data.defects if data else ())]


def _metrics(measured: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    floors = measured.get("floors", {})
    for name, value in measured["metrics"].items():
        text = f"{value:.4g}" if isinstance(value, int | float) else str(_interval(**value))
        words = "unseen quotes" if name == "memorised" else "at best"
        yield name, text + (f"; {words} {floors[name]:.3g}" if name in floors else "")


def _interval(value: float | None, low: float | None, high: float | None, n: int) -> Interval:
    """Return an interval from JSON, where a bound that is not finite is null."""
    return Interval(
        math.nan if value is None else value,
        -math.inf if low is None else low,
        math.inf if high is None else high,
        n,
    )


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    lines = (f"| {_plain(key)} | {_plain(without_folders(value))} |\n" for key, value in rows)
    return f"| {title} | value |\n| --- | --- |\n" + "".join(lines)


def _plain(value: Any) -> str:
    """Text that Markdown shows as it is, on one line: no HTML, link, code or table cell in it."""
    text = html.escape(str(value), quote=False).replace("\r", "").replace("\n", "\\n")
    return re.sub(r"[|`\[\]]", lambda match: f"&#{ord(match[0])};", text)


def without_folders(value: Any) -> Any:
    """Return the same value (text, or a JSON structure) with each local path cut to its name."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return kind(value).name
    return _FOLDERS.sub("", value)
