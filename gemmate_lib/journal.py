"""The journal of a run, read while it trains or afterwards: how far it is, and how it ended.

A run writes `monitor.jsonl` into its folder, a line an event (gemmate_lib/monitor.py). Whatever
reads it needs no torch, and trusts no line: a process may be killed in the middle of one.
"""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError
from gemmate_lib.settings import digest

JOURNAL = "monitor.jsonl"
RECENT = 20  # of the latest steps the time left is told
PATIENCE = 60.0  # seconds without a line, on another machine, before that is said
Curve = list[tuple[int, float]]
OVER = (
    "trained",
    "finished",
    "interrupted",
    "budget",
    "failed",
    "gone",
    "removed",
)  # nothing more to come


def machine_name() -> str:
    """The same for processes of one machine; its name itself stays private."""
    return digest(platform.node())[:12]


@dataclass
class Journal:
    """What a run's journal says so far; `update` reads on from where it was."""

    folder: Path
    name: str = ""
    step: int = 0
    steps: int = 0
    epoch: float = 0.0
    curves: dict[str, Curve] = field(default_factory=dict)  # loss, eval_loss, tokens_per_second …
    times: list[tuple[int, float]] = field(default_factory=list)  # (step, Unix time) of each loss
    use: dict[str, float] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    spent: float = 0.0  # hours
    hours: float | None = None  # the budget
    latest: float = 0.0  # Unix time of the last line
    _begin: dict[str, Any] = field(default_factory=dict)
    _end: dict[str, Any] = field(default_factory=dict)
    _offset: int = 0

    def update(self) -> "Journal":
        """Take what was written since; a line that is not whole yet is left for later."""
        path = self.folder / JOURNAL
        if path.is_file():
            if path.stat().st_size < self._offset:  # begun anew
                vars(self).update(vars(Journal(self.folder)))
            with path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
            whole, newline, _ = text.rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            for line in whole.split(b"\n"):
                self._take(line)
        elif not self._begin and not self.step and (self.folder / "manifest.json").is_file():
            self._from_log()
        return self

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            self.latest, event = float(record["time"]), record["event"]
            self.spent = max(self.spent, float(record.get("spent", 0.0)))
            step = int(record.get("step", self.step))
        except (ValueError, TypeError, LookupError):
            return
        if event == "begin":
            self._began(record, step)
        elif event == "end":
            self._end = record
        elif event == "checkpoint":
            self.checkpoints.append(step)
        elif event == "log":
            self._logged(record, step)
        self.use |= numbers(record.get("use"))
        if said := printable(record.get("said")):
            self.events.append((self.latest, said))

    def _began(self, record: Mapping[str, Any], step: int) -> None:
        """A process begins at a step: what an earlier one did after it is done again."""
        self._begin, self._end, self.step = dict(record), {}, step
        found = numbers(record)
        self.steps, self.hours = int(found.get("steps", 0)), found.get("hours")
        self.name = printable(record.get("name"))
        self.times.clear()  # between two processes lies a time without steps
        for curve in self.curves.values():
            curve[:] = [point for point in curve if point[0] <= step]
        self.checkpoints = [each for each in self.checkpoints if each <= step]

    def _logged(self, record: Mapping[str, Any], step: int) -> None:
        self.step = max(self.step, step)
        found = numbers(record) | numbers(record.get("use"))
        self.epoch = found.get("epoch", self.epoch)
        if "loss" in found:
            self.times.append((step, self.latest))
        for name in found.keys() - {"time", "step", "epoch", "spent"}:
            self.curves.setdefault(name, []).append((step, found[name]))

    def _from_log(self) -> None:
        """Of a run that was made before there were journals, the curves."""
        try:
            lines = (self.folder / "log.jsonl").read_text("utf-8").splitlines()
            for record in map(json.loads, lines):
                self._logged(record, int(record["step"]))
        except (OSError, ValueError, TypeError, LookupError):
            return
        self.steps = self.step

    @property
    def silent(self) -> float:
        """Seconds since the last line."""
        return max(0.0, time.time() - self.latest)

    @property
    def state(self) -> str:
        """training, saving, silent, or one of OVER."""
        if (self.folder / "manifest.json").is_file():
            return "finished"
        if self.latest and not (self.folder / JOURNAL).exists():
            return "removed"
        if self._end:
            ended = str(self._end.get("state"))
            return "saving" if ended == "trained" and self._alive() is not False else ended
        alive = self._alive()
        if alive is False:
            return "gone"
        patience = PATIENCE + 3 * (self.step_seconds or 0.0)
        return "silent" if self.silent > patience else "training"

    def _alive(self) -> bool | None:
        """Whether the process lives; None where it is another machine's."""
        import psutil

        if self._begin.get("machine") != machine_name():
            return None
        try:
            process = psutil.Process(int(self._begin["pid"]))
            return abs(process.create_time() - float(self._begin["started"])) < 2
        except (psutil.Error, ValueError, TypeError, LookupError):
            return False

    @property
    def over(self) -> bool:
        """Whether nothing more is to come."""
        return self.state in OVER

    @property
    def step_seconds(self) -> float | None:
        """The time from step to step of late, evaluations included."""
        recent = self.times[-RECENT:]
        steps = recent[-1][0] - recent[0][0] if recent else 0
        return (recent[-1][1] - recent[0][1]) / steps if steps else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, as far as can be told; None where it cannot."""
        pace = self.step_seconds
        return None if pace is None else max(0, self.steps - self.step) * pace

    def last(self, name: str) -> float | None:
        """The newest value of a curve."""
        return self.curves[name][-1][1] if self.curves.get(name) else None

    def as_dict(self) -> dict[str, Any]:
        """What a script may want: how it stands, and the newest value of each curve."""
        newest = {name: self.last(name) for name in sorted(self.curves)}
        about = {"state": self.state, "said": self.sentence(), "step": self.step}
        about |= {"steps": self.steps, "epoch": self.epoch, "spent_hours": self.spent}
        about |= {"seconds_left": None if self.over else self.seconds_left}
        return about | {"checkpoints": self.checkpoints, "use": self.use, "newest": newest}

    def sentence(self) -> str:
        """How it stands with the run, in one sentence."""
        where = f"after step {self.step} of {self.steps}" if self.steps else f"at step {self.step}"
        remedy = "There is no checkpoint to go on from."
        if self.checkpoints:
            remedy = f"Go on with --resume last, from step {self.checkpoints[-1]}."
        said = {
            "training": f"training, {where}",
            "saving": "trained; it is being saved",
            "silent": f"no sign of life for {self.silent:.0f} s, {where}",
            "finished": f"finished {where}",
            "trained": f"trained, and not saved, {where}. {remedy}",
            "interrupted": f"interrupted {where}. {remedy}",
            "budget": f"stopped by its budget {where}. {remedy}",
            "failed": f"failed {where}. {remedy}",
            "removed": f"failed {where}, and its folder is gone: it had no checkpoint",
            "gone": f"its process ended without a word {where}: killed? {remedy}",
        }
        return said.get(self.state, f"ended {where}. {remedy}")


def numbers(record: Any) -> dict[str, float]:
    """The entries of a record that are finite numbers."""
    items = record.items() if isinstance(record, dict) else ()
    plain = {k: v for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)}
    return {printable(k): float(v) for k, v in plain.items() if abs(v) < 1e300}


def printable(value: Any) -> str:
    """A text in one line that no terminal obeys."""
    text = " ".join(str(value or "").split())
    return "".join(letter for letter in text if letter.isprintable())[:500]


def read_journal(folder: str | Path) -> Journal:
    """What a run's folder tells of its training.

    Raises: GemmateError where it tells nothing.
    """
    found = Journal(Path(folder)).update()
    if not found.latest and not found.step:
        problem = f"{folder} holds no run, or one that has not begun to train"
        raise GemmateError(f"{problem}. Start it with: gemmate finetune EXPERIMENT --out {folder}")
    return found
