"""What the tests of serving share: small runs over one base, and what each says alone."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from small_run import make_run

from gemmate_lib.config import ModelConfig
from gemmate_lib.generate import Completion, generate_texts
from gemmate_lib.models import load_base
from gemmate_lib.sft import Run, load_run, open_run

BASE = "tiny-gemma"
NAMES = (BASE, "one", "two", "when")
AT = 1_234_567_890_000
PROMPTS = (
    "Quote: I am not talented, but I'm good at not giving up",
    "Quote: Imagination is more",
    "x",
    "Q: What does Emma like?\nA:",
    "",
    "Quote: caf\u00e9 \u4f60\u597d " + "a word and another " * 9,
)


def make_runs(folder: Path, **model: Any) -> dict[str, Run]:
    """Two plain runs that differ, and one that knows the time."""
    dated = {"dataset": {"id": "dated_questions", "timestamp": "timestamp"}}
    short = {"generation": {"max_new_tokens": 6}}
    make_run(folder / "one", ModelConfig(**model), "Quote", weights=1, seed=1, **short)
    make_run(folder / "two", ModelConfig(**model), "Quote", weights=2, seed=2, **short)
    aware = ModelConfig(temporal_kind="calendar", **model)
    make_run(folder / "when", aware, "Quote", weights=3, seed=3, **short, **dated)
    return {name: load_run(folder / name) for name in ("one", "two", "when")}


class Alone:
    """What `gemmate generate` gives for one prompt, asked of a model that is loaded for it."""

    def __init__(self, runs: Mapping[str, Run], **model: Any) -> None:
        self._opened = {name: open_run(run) for name, run in runs.items()}
        self._opened[BASE] = load_base(ModelConfig(**model))
        self.ask = cache(self._ask)

    def _ask(
        self, name: str, prompt: str, n: int, at: int | None = None, **more: Any
    ) -> Completion:
        opened = self._opened[name]
        times = None if at is None else [at]
        (done,) = generate_texts(
            opened.model, opened.tokenizer, [prompt], max_new_tokens=n, timestamps=times, **more
        )
        return done
