"""Eyes on a run: what it logs and what it uses, written beside it line by line while it trains.

`monitor.jsonl` in the run's folder has a line for each event: `begin`, `log` (each step and each
evaluation, now and then with `use`, what was used), `epoch`, `checkpoint`, `note` and `end`, each
with its Unix time. gemmate_lib/journal.py reads it. Nothing here changes what a run computes, and
nothing that goes wrong here ends it.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from transformers import TrainerCallback

from gemmate_lib.budget import Budget, Spent
from gemmate_lib.callbacks import KEPT, Interrupted
from gemmate_lib.journal import JOURNAL, machine_name
from gemmate_lib.usage import Usage

log = logging.getLogger("gemmate")
EVERY = 1.0  # seconds, at least, between two looks at the machine
BRIEF = 0.1  # seconds in which psutil cannot tell how busy a process is


class Monitor(TrainerCallback):
    """Writes a run's journal, from one process of several.

    fresh: begin the journal anew instead of adding to it.
    """

    def __init__(self, folder: Path, *, name: str, budget: Budget, fresh: bool = True) -> None:
        self.path, self.name, self.budget, self.fresh = folder / JOURNAL, name, budget, fresh
        self.summary: dict[str, float] = {}  # for the manifest
        self.latest: dict[str, float] = {}  # the last look at the machine
        self._untold = False
        self._file: IO[str] | None = None
        self._warned = ""
        self._looked = self._step_began = self._epoch_began = 0.0
        self._seconds = self._tokens = self._seen = 0.0  # since the last look; tokens in all
        self._rows = self._batch = 0
        self._totals = {"seconds": 0.0, "tokens": 0.0, "rows": 0.0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin the journal; of several processes the first alone has one."""
        if state.is_world_process_zero:
            self._guard(lambda: self._begin(args, state), begins=True)

    def _begin(self, args: Any, state: Any) -> None:
        import psutil

        process = psutil.Process()
        torn = not self.fresh and self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("w" if self.fresh else "a", encoding="utf-8", newline="\n")
        self._file.write("\n" if torn else "")
        self._usage, self._looked = Usage(), time.perf_counter()
        self._batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._write(
            "begin", name=self.name, step=state.global_step, steps=state.max_steps,
            pid=os.getpid(), started=process.create_time(), machine=machine_name(),
            hours=self.budget.settings.hours, processes=args.world_size, rows=self._batch,
        )  # fmt: skip

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remember when."""
        self._epoch_began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remember when."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count a step; the loss follows in the log."""
        self._seconds += time.perf_counter() - self._step_began
        self._rows += self._batch

    def on_prediction_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A sign of life from a long evaluation."""
        if self._due():
            self._guard(lambda: self._write("note", use=self._look()))

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write one record of the log down, once a second with a look at the machine."""
        self._guard(lambda: self._logged(state, given.get("logs") or {}))

    def _logged(self, state: Any, logs: dict[str, Any]) -> None:
        record = {key: logs[key] for key in KEPT if math.isfinite(logs.get(key, math.nan))}
        self._seen, before = logs.get("num_tokens", self._seen), self._seen
        self._tokens += max(0.0, self._seen - before)
        look = self._look() if self._due() else None
        self._write("log", step=state.global_step, epoch=state.epoch, **record, use=look)
        if self.budget.warning != self._warned:
            self._warned = self.budget.warning
            self._write("note", said=self._warned)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Say how long it took."""
        seconds = time.perf_counter() - self._epoch_began
        self._guard(lambda: self._write("epoch", step=state.global_step, epoch=state.epoch,
                                        seconds=seconds))  # fmt: skip

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Name the checkpoint's step."""
        self._guard(lambda: self._write("checkpoint", step=state.global_step))

    def _due(self) -> bool:
        return self._file is not None and time.perf_counter() - self._looked >= EVERY

    def _look(self) -> dict[str, float]:
        """What is used now, and how fast it went since the last look."""
        self._looked = time.perf_counter()
        look = self._usage.read()
        now = {"seconds": self._seconds, "tokens": self._tokens, "rows": float(self._rows)}
        self._totals = {key: self._totals[key] + value for key, value in now.items()}
        if self._seconds:
            look["tokens_per_second"] = self._tokens / self._seconds
            look["examples_per_second"] = self._rows / self._seconds
            look["step_seconds"] = self._seconds * self._batch / self._rows
        self._seconds = self._tokens = 0.0
        self._rows = 0
        self.latest, self._untold = look, True
        most = {key for key in look if key.endswith(("rss_mib", "used_mib"))}
        peaks = {f"peak_{key}": max(look[key], self.summary.get(f"peak_{key}", 0)) for key in most}
        self.summary |= peaks
        return look

    def told(self) -> dict[str, float]:
        """The last look, for a tracker that was not told of it yet."""
        news, self._untold = self.latest if self._untold else {}, False
        return {f"monitor/{name}": value for name, value in news.items()}

    def _write(self, event: str, **record: Any) -> None:
        if self._file is None:
            return
        kept = {key: value for key, value in record.items() if value is not None}
        if look := kept.get("use"):
            kept["use"] = {key: round(value, 4) for key, value in look.items()}
        line = {"time": round(time.time(), 3), "event": event, "spent": round(self.budget.spent, 6)}
        self._file.write(json.dumps(line | kept) + "\n")
        if event != "log" or look:  # once a second is often enough
            self._file.flush()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Write down how the training ended, whichever way it did."""
        try:
            yield
        except BaseException as error:
            kinds = {Interrupted: "interrupted", Spent: "budget"}
            self._end(kinds.get(type(error), "failed"), str(error))
            raise
        self._end("trained", None)

    def _end(self, state: str, said: str | None) -> None:
        def end() -> None:
            if self._file is None:
                return
            brief = time.perf_counter() - self._looked < BRIEF
            look = self._look()
            if brief:
                look.pop("cpu_percent")
            whole = self._totals
            if whole["seconds"]:
                rates = {f"{k}_per_second": whole[k] / whole["seconds"] for k in ("tokens", "rows")}
                self.summary |= rates
            self._write("end", state=state, said=said, use=look)

        self._guard(end)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _guard(self, work: Callable[[], Any], *, begins: bool = False) -> None:
        if self._file is None and not begins:
            return
        try:
            work()
        except Exception as error:
            file, self._file = self._file, None
            log.warning("The monitor failed and writes nothing more: %s", error)
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
