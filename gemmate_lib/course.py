"""The whole course without a browser: each notebook run and checked, and one report of all.

Everything is written into one folder, the runs of the notebooks included, so that a notebook
finds what another made in this run of the course, and nothing older.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib import machine
from gemmate_lib.batches import Job, plan
from gemmate_lib.config import PROFILES, GemmateError, among, choose_profile
from gemmate_lib.headless import (
    NotebookResult,
    finished_before,
    run_notebook,
    write_record,
)
from gemmate_lib.report import write_report
from gemmate_lib.storage import Mirror
from gemmate_lib.trust import inside

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

# What has no sense once another failed. All others run alone, and make what they need.
DEPENDS = {"05": ("03",), "06": ("03",)}
# Seconds for one cell and for one notebook: the tiny profile, and everything larger.
TIMEOUTS = {"tiny": (600.0, 1800.0)}
LARGE_TIMEOUTS = (3600.0, 4 * 3600.0)
_COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow"}


@dataclass(frozen=True)
class Order:
    """What was asked for; it is kept in the folder of the run, so that it can be resumed.

    `cell_timeout`, `notebook_timeout`: seconds; None: the profile's own. `jobs`: notebooks at a
    time; None: two in the tiny profile, where each has one thread, else one.
    """

    profile: str = "tiny"
    only: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cell_timeout: float | None = None
    notebook_timeout: float | None = None
    jobs: int | None = None

    def timeouts(self) -> tuple[float, float]:
        """Seconds for a cell and for a notebook."""
        cell, notebook = TIMEOUTS.get(self.profile, LARGE_TIMEOUTS)
        return self.cell_timeout or cell, self.notebook_timeout or notebook

    def at_once(self) -> int:
        """Notebooks at a time."""
        return self.jobs or (min(2, os.cpu_count() or 1) if self.profile == "tiny" else 1)


@dataclass(frozen=True)
class CourseResult:
    """One run of the course: its folder, its notebooks in order, and its report."""

    directory: Path
    notebooks: tuple[NotebookResult, ...]
    report: Path

    @property
    def ok(self) -> bool:
        """Every notebook ran to its end."""
        return all(result.state == "ok" for result in self.notebooks)

    def table(self) -> "Table":
        """One row a notebook, to print with Rich; a grid's varied parameters have columns."""
        from rich.table import Table
        from rich.text import Text

        varied = list(dict.fromkeys(name for r in self.notebooks for name in r.point))
        table = Table("notebook", *varied, "cells", "seconds", "main metric", "ok")
        for result in self.notebooks:
            point = (str(result.point.get(name, "")) for name in varied)
            cells = f"{result.executed}/{result.cells}"
            row = (result.notebook, *point, cells, f"{result.seconds:.0f}", result.remark)
            # Text, for the brackets in an error or in a parameter are no markup.
            table.add_row(*map(Text, row), Text(result.state, _COLOURS[result.state]))
        return table


def make_folder(out: Path | None) -> Path:
    """The folder of a run, with its parts.

    Raises: GemmateError for a folder with other content, one that cannot be written, and one
    whose parts lie elsewhere.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = (out or machine.runs_home() / "course" / stamp).expanduser().resolve()
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifests").is_dir():
            raise GemmateError(f"{folder} holds something else. Choose an empty folder.")
        for name in ("notebooks", "manifests", "figures", "logs", "runs"):
            inside(folder, name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GemmateError(f"{folder}: {error.strerror}. Choose another folder.") from error
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other courses out of the folder. Raises: GemmateError while one runs in it."""
    import psutil

    lock = folder / "running.pid"
    try:
        lock.open("x").close()
    except FileExistsError:
        text = lock.read_text("utf-8")
        if not text.isdigit() or psutil.pid_exists(int(text)):
            problem = f"Another course runs in {folder}"
            raise GemmateError(f"{problem}. Wait for it, or delete {lock.name}.") from None
    lock.write_text(str(os.getpid()), "utf-8")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def newest_order(out: Path | None) -> tuple[Order, Path]:
    """The order of an earlier run, by default of the newest. Raises: GemmateError without one."""
    home = machine.runs_home() / "course"
    folders = [out] if out else sorted(home.glob("*/order.json"), reverse=True)
    folder = folders[0] if out else folders[0].parent if folders else home
    try:
        return Order(**json.loads((folder / "order.json").read_text("utf-8"))), folder
    except (OSError, ValueError, TypeError):
        raise GemmateError(f"{folder} holds no run of the course to resume.") from None


def _live(console: "Console") -> "Progress":
    """A line a notebook, kept up to date; none where the output is no terminal."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    cells = TextColumn("cell {task.completed:.0f}/{task.total:.0f}")
    state = TextColumn("{task.fields[state]}", markup=False)
    columns = (TextColumn("{task.description}"), cells, TimeElapsedColumn(), state)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _blocked(needed: Sequence[NotebookResult]) -> str | None:
    lost = [f"needs {r.notebook}, which is {r.state}" for r in needed if r.state != "ok"]
    return lost[0] if lost else None


def _run_one(
    job: Job, order: Order, folder: Path, live: "Progress", *, blocked: str | None,
    tick: Callable[[], None],
) -> NotebookResult:  # fmt: skip
    """Run one notebook, or note why it is skipped; keep its line up to date, and its record."""
    task = live.add_task(job.name, total=0, state="runs")

    def poll(*, completed: int, total: int) -> None:
        tick()
        live.update(task, completed=completed, total=total)

    if blocked:
        result = NotebookResult(job.name, order.profile, job.parameters, job.point, skipped=blocked)
    else:
        result = run_notebook(
            job, folder, profile=order.profile, timeouts=order.timeouts(), tick=poll
        )
    write_record(folder, job.source, result)
    live.update(task, completed=result.executed, total=result.cells, state=result.state)
    live.stop_task(task)
    if live.disable:
        line = f"{result.notebook}: {result.state}, {result.seconds:.0f} s. {result.remark}"
        live.console.print(line, markup=False, highlight=False, soft_wrap=True)
    return result


def _copy(mirror: Mirror, folder: Path) -> str | None:
    """Copy what is new; what kept us from it. A storage that fails never fails a notebook."""
    try:
        mirror.copy(folder)
    except Exception as error:  # whatever a storage's own client raises
        return f"The folder was not copied to its URL: {error}"
    return None


def _run_all(
    jobs: Sequence[Job],
    order: Order,
    folder: Path,
    *,
    resume: bool,
    console: "Console",
    mirror: Mirror | None,
) -> tuple[NotebookResult, ...]:
    """Start the jobs in order, some at a time; what depends on another waits for it."""
    running: dict[str, Future[NotebookResult]] = {}
    stopped = threading.Event()

    def tick() -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    def start(job: Job, needs: list[Future[NotebookResult]]) -> NotebookResult:
        blocked = _blocked([need.result() for need in needs])
        earlier = finished_before(folder, job, profile=order.profile) if resume else None
        done = earlier or _run_one(job, order, folder, live, blocked=blocked, tick=tick)
        if mirror and (problem := _copy(mirror, folder)):
            console.print(problem, markup=False, soft_wrap=True)  # it is tried again
        return done

    with _live(console) as live, ThreadPoolExecutor(order.at_once()) as pool:
        for job in jobs:
            before = [j for j in jobs if j.number in DEPENDS.get(job.number, ())]
            needs = [running[j.name] for j in before if j.fits(job)]
            running[job.name] = pool.submit(start, job, needs)
        try:
            return tuple(future.result() for future in running.values())
        except BaseException:  # Ctrl-C: the kernels end now, and what waits does not start
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_course(
    order: Order | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    copy_to: str | None = None,
) -> CourseResult:
    """Run notebooks in their order, print how each fares, and write the report.

    `out`: an empty folder, or that of an earlier run, whose adapters are found again. A failure
    skips only what depends on it. `resume`: what is ok in the folder, from the same notebook with
    the same parameters, is not run again. `copy_to`: a URL that fsspec knows; what is new in the
    folder goes there as each notebook ends, and the report at the end.
    Raises: GemmateError for an unknown notebook, profile or parameter, all before anything runs.
    """
    from rich.console import Console

    order = order or Order()
    if order.profile == "auto":
        order = replace(order, profile=choose_profile(machine.read_facts())[0])
    among(order.profile, PROFILES, "profile")
    jobs, console = plan(order.only, order.parameters, order.grid), Console()
    mirror = Mirror(copy_to) if copy_to else None
    folder = make_folder(out)
    with alone(folder):
        text = json.dumps(asdict(order), indent=2) + "\n"
        inside(folder, "order.json").write_text(text, "utf-8")
        results = _run_all(jobs, order, folder, resume=resume, console=console, mirror=mirror)
        course = CourseResult(folder, results, write_report(folder))
    console.print(course.table())
    if mirror and (problem := _copy(mirror, folder)):
        raise GemmateError(f"{problem}. All of it is in {folder}.")
    console.print(f"The report: {course.report}", markup=False, soft_wrap=True)
    return course
