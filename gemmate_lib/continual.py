"""Tasks one after the other: plainly, with replay, with EWC, or an adapter for each.

A sequence is a chain of stages, one a task. A stage is named by all that decides its result, what
went before it included, and kept in a folder: strategies share the stages that they have in
common, and what was learned once is found again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock

from gemmate_lib import machine
from gemmate_lib.adapters import attach_lora, load_adapter, save_adapter, write_json
from gemmate_lib.config import CheckpointConfig, Experiment, GemmateError
from gemmate_lib.consolidation import Anchor, anchor_of, held_to, trained_weights
from gemmate_lib.data import Row, Splits
from gemmate_lib.forgetting import History, summary
from gemmate_lib.metrics import position_losses, row_sums
from gemmate_lib.models import LoadedModel, base_record, load_base
from gemmate_lib.resume import identity_of, work_in
from gemmate_lib.rows import encode_all
from gemmate_lib.settings import digest
from gemmate_lib.sft import code_hash, load_splits
from gemmate_lib.strategies import Strategy, reservoir, strategies, with_replay
from gemmate_lib.trainer import train

__all__ = [
    "Chain", "Strategy", "compare_strategies", "learn_in_sequence", "reservoir", "sequence_of",
    "strategies", "with_replay",
]  # fmt: skip

BATCH = 32  # test rows at a time


def sequence_of(experiments: Sequence[Experiment]) -> tuple[Experiment, dict[str, Splits]]:
    """Read the tasks; the first experiment says which model learns them all, and how.

    Raises: GemmateError for fewer than two, two of one name, or weights trained in full.
    """
    first, names = experiments[0], [each.name for each in experiments]
    if len(names) < 2 or len(set(names)) < len(names):
        raise GemmateError(f"The tasks are {names}. Give two or more, each once.")
    if first.method != "lora":
        raise GemmateError("A sequence of tasks trains adapters. Set method=lora.")
    data = [each.dataset for each in experiments]
    limits: dict[str, Any] = {"max_length": max(d.max_length for d in data)}  # of the joined rows
    limits |= {"over_long": "cut" if any(each.over_long == "cut" for each in data) else "drop"}
    updates = {
        "dataset": data[0].model_copy(update=limits),
        "training": first.training.model_copy(update={"eval_every": 0}),
        "checkpoint": CheckpointConfig(),  # a stage is kept once it has ended
    }
    own = {each.name: each.model_copy(update={"model": first.model}) for each in experiments}
    return first.model_copy(update=updates), {name: load_splits(e) for name, e in own.items()}


@dataclass(frozen=True)
class Chain:
    """One sequence: its tasks, in order, how they are learned, and where stages are kept.

    rows: of each test split that losses are measured on, the first so many.
    """

    tasks: dict[str, Splits]
    experiment: Experiment
    strategy: Strategy
    home: Path
    rows: int | None = None

    @cached_property
    def keys(self) -> list[str]:
        """The name of each stage; the first is that of the base, before any task."""
        facts = identity_of(self.experiment, {}, base_record(self.experiment.model))
        keys = [digest([facts, code_hash()])[:16]]
        for place, splits in enumerate(self.tasks.values()):
            before = keys[0] if self.strategy.separate else keys[-1]
            how = self.strategy.in_effect() if place else {}
            keys.append(digest([before, splits.checksums()["train"], how])[:16])
        return keys

    def history(self) -> History:
        """Learn all tasks, as far as they have not been, and return what each stage knew."""
        names = list(self.tasks)
        stages = range(len(self.keys))
        if self.strategy.separate:  # what has an adapter is asked with it, the rest of the base
            own = [self._measured(i, names if i == 0 else [names[i - 1]]) for i in stages]
            found = [{t: own[j * (j <= i)][t] for j, t in enumerate(names, 1)} for i in stages]
        else:
            found = [self._measured(i, names) for i in stages]
        of = {
            part: {t: np.array([each[t][part] for each in found]) for t in names}
            for part in ("losses", "right")
        }
        return History(**of, tokens={t: np.array(found[0][t]["tokens"]) for t in names})

    def _folder(self, stage: int) -> Path:
        return self.home / "stages" / self.keys[stage]

    def _measured(self, stage: int, names: Sequence[str]) -> dict[str, Any]:
        """What the stage knows of the tasks with these names; it is learned now if need be."""
        folder, files = self._folder(stage), {}
        for name in names:
            shape = [self.tasks[name].checksums()["test"], self.rows]
            files[name] = folder / f"losses_{digest(shape)[:16]}.json"
        if missing := [name for name in names if not files[name].is_file()]:
            base, model = self._model(stage)
            for name in missing:
                found = self._losses(name, model, base.tokenizer)
                write_json(files[name], found)
        return {name: json.loads(file.read_text("utf-8")) for name, file in files.items()}

    def _model(self, stage: int) -> tuple[LoadedModel, Any]:
        """The base with the adapter as the stage leaves it: learned, or learned before."""
        folder, settings = self._folder(stage), self.experiment
        if stage and not (folder / "log.json").is_file():
            return self._learn(stage, folder)
        machine.prepare(
            seed=settings.seed, threads=settings.threads, deterministic=settings.deterministic
        )
        base = load_base(settings.model)
        if stage:
            return base, load_adapter(base, folder / "adapter", trainable=True)
        folder.mkdir(parents=True, exist_ok=True)
        return base, attach_lora(base.model, settings.lora, seed=settings.seed)

    def _learn(self, stage: int, folder: Path) -> tuple[LoadedModel, Any]:
        """Train a stage's task from the stage before it, with the trainer that trains all runs."""
        past = range(1, stage) if self.strategy.ewc else range(0)
        anchors = [self._anchor(i, *self._model(i)) for i in past[:-1]]
        base, model = self._model(0 if self.strategy.separate else stage - 1)
        anchors += [self._anchor(i, base, model) for i in past[-1:]]  # where training begins
        parts = self.experiment.training.gradient_accumulation_steps
        held = held_to(trained_weights(model), anchors, self.strategy.ewc, parts=parts)
        with work_in(folder), TemporaryDirectory() as scratch, held:
            rows = self._splits(stage)
            log = train(model, base.tokenizer, rows, self.experiment, Path(scratch))
            save_adapter(model, folder / "adapter", base.base)
            write_json(folder / "log.json", log)
        return base, model

    def _splits(self, stage: int) -> Splits:
        """The rows of a stage's task, and those that are replayed with them."""
        splits = list(self.tasks.values())
        past = chain.from_iterable(each.train for each in splits[: stage - 1])
        buffer = reservoir(past, self.strategy.replay, seed=self.experiment.seed)
        own, share = splits[stage - 1], self.strategy.replay_share
        return replace(own, train=with_replay(own.train, buffer, share=share))

    def _anchor(self, stage: int, base: LoadedModel, model: Any) -> Anchor:
        """The weights that a stage ended with, and how much its task hangs on each."""
        rows = list(self.tasks.values())[stage - 1].train[: self.strategy.fisher_rows]
        file = self._folder(stage) / f"fisher_{len(rows)}.safetensors"
        return anchor_of(model, base.tokenizer, self._encoded(rows, base.tokenizer), file=file)

    def _losses(self, name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        rows = self._encoded(self.tasks[name].test[: self.rows], tokenizer)
        losses = position_losses(model, tokenizer, rows, batch_size=BATCH)
        sums, tokens = row_sums(losses)
        right = [int((each < math.log(2)).sum()) for each in losses]  # NaN is no token
        return {"losses": sums.tolist(), "right": right, "tokens": tokens.tolist()}

    def _encoded(self, rows: list[Row], tokenizer: Any) -> list[Any]:
        data = self.experiment.dataset
        return encode_all(rows, tokenizer, max_length=data.max_length, over_long=data.over_long)


def learn_in_sequence(
    tasks: Mapping[str, Splits],
    experiment: Experiment,
    strategy: Strategy,
    *,
    out: str | Path,
    rows: int | None = None,
) -> History:
    """Learn tasks one after the other; return the losses on all of them after each one.

    Stages are kept in `out`, and found there again. rows: of each test split, the first so many.
    Raises: GemmateError where a run diverges, or for EWC in float16, whose scaled gradients the
        penalty would be lost in.
    """
    if strategy.ewc and experiment.model.compute_dtype == "float16":
        raise GemmateError("EWC needs unscaled gradients. Set model.compute_dtype=float32.")
    home = Path(out)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):  # notebooks that run side by side share their stages
        return Chain(dict(tasks), experiment, strategy, home, rows).history()


def compare_strategies(
    tasks: Mapping[str, Splits],
    experiment: Experiment,
    chosen: Mapping[str, Strategy],
    *,
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    rows: int | None = None,
) -> dict[str, list[History]]:
    """Learn the tasks with each strategy and each seed; write `results.json` into `out`.

    The first strategy is what the others are compared with, seed by seed.
    """
    found: dict[str, list[History]] = {}
    for name, strategy in chosen.items():
        seeded = [experiment.model_copy(update={"seed": seed}) for seed in seeds]
        found[name] = [learn_in_sequence(tasks, e, strategy, out=out, rows=rows) for e in seeded]
    results = {
        "tasks": list(tasks),
        "seeds": list(seeds),
        "rows": rows,
        "settings": {name: asdict(strategy) for name, strategy in chosen.items()},
        "strategies": summary(found, against=next(iter(chosen))),
    }
    write_json(Path(out) / "results.json", results)
    return found
