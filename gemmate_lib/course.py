"""The whole course without a browser: each notebook run and checked, and one report of all.

Everything is written into one folder, the runs of the notebooks included, so that a notebook
finds what another made in this run of the course, and nothing older.
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gemmate_lib import machine
from gemmate_lib.config import PROFILES, GemmateError, among, choose_profile
from gemmate_lib.headless import NotebookResult, inside, run_notebook, write_record
from gemmate_lib.report import write_report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

CORE = tuple(f"{number:02}" for number in range(7))
# What has no sense once another failed. All others run alone, and make what they need.
DEPENDS = {"05": ("03",), "06": ("03",)}
# Seconds for one cell and for one notebook: the tiny profile, and everything larger.
TIMEOUTS = {"tiny": (600.0, 1800.0)}
LARGE_TIMEOUTS = (3600.0, 4 * 3600.0)

_SECRET = re.compile(r"hf_\w{16,}|(?i:(^|_)(token|secret|password|api_?key)$)")
_COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow"}


def find_notebooks() -> dict[str, Path]:
    """The course's notebooks by number, in order: the checkout's, else those in the package."""
    here = Path(__file__).parent
    checkout = (here.parent / "pyproject.toml").is_file()
    folder = here.parent / "notebooks" if checkout else here / "notebooks"
    return {file.stem[:2]: file for file in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}


NOTEBOOKS = find_notebooks()


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
        """One row a notebook, to print with Rich."""
        from rich.table import Table
        from rich.text import Text

        table = Table("notebook", "cells", "seconds", "main metric", "ok")
        for result in self.notebooks:
            row = (result.notebook, f"{result.executed}/{result.cells}", f"{result.seconds:.0f}")
            state = Text(result.state, _COLOURS[result.state])
            # Text, for the brackets in an error are no markup.
            table.add_row(*row, Text(result.remark), state)
        return table


def select(only: Sequence[str] = ()) -> dict[str, Path]:
    """The notebooks to run, in order: the core, or "all", or by number or name, as "03".

    Raises: GemmateError for a notebook that is not there, naming the nearest.
    """
    if not NOTEBOOKS:
        raise GemmateError("There are no notebooks here. Run this in a checkout of the course.")
    names = {key: n for n, path in NOTEBOOKS.items() for key in (n, str(int(n)), path.stem)}
    wanted = list(only) or [number for number in NOTEBOOKS if number in CORE]
    if "all" in wanted:
        wanted = list(NOTEBOOKS)
    chosen = {names[among(name.removesuffix(".ipynb"), names, "notebook")] for name in wanted}
    return {number: path for number, path in NOTEBOOKS.items() if number in chosen}


def known_parameters(notebook: Path) -> list[str]:
    """The names set in the cell tagged `parameters`; none where there is no such cell."""
    from papermill import inspect_notebook

    # papermill formats the path it is given.
    return sorted(inspect_notebook(str(notebook).replace("{", "{{").replace("}", "}}")))


def share(parameters: Mapping[str, Any], chosen: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """For each notebook those of the parameters that it has.

    Raises: GemmateError for a parameter that no notebook has (papermill would only warn), and
    for what looks like a secret (papermill stores parameters in the notebook).
    """
    if not parameters:
        return {number: {} for number in chosen}
    known = {number: known_parameters(path) for number, path in chosen.items()}
    everywhere = sorted(set().union(*known.values()))
    for name, value in parameters.items():
        if _SECRET.search(name) or _SECRET.search(str(value)):
            raise GemmateError(f"{name} looks like a secret. Set HF_TOKEN in the environment.")
        if name not in everywhere:
            names = ", ".join(everywhere) or "none, for no cell is tagged `parameters`"
            raise GemmateError(f"No notebook has the parameter {name!r}. Known are: {names}.")
    return {n: {key: v for key, v in parameters.items() if key in known[n]} for n in chosen}


def make_folder(out: Path | None) -> Path:
    """The folder of a run, with its parts.

    Raises: GemmateError for a folder with other content, and for one whose parts lie elsewhere.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = (out or machine.runs_home() / "course" / stamp).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifests").is_dir():
        raise GemmateError(f"{folder} holds something else. Choose an empty folder for the run.")
    for name in ("notebooks", "manifests", "figures", "logs", "runs"):
        inside(folder, name).mkdir(parents=True, exist_ok=True)
    return folder


def _live(console: "Console") -> "Progress":
    """A line a notebook, kept up to date; none where the output is no terminal."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    cells = TextColumn("cell {task.completed:.0f}/{task.total:.0f}")
    state = TextColumn("{task.fields[state]}", markup=False)
    columns = (TextColumn("{task.description}"), cells, TimeElapsedColumn(), state)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _blocked(number: str, results: Mapping[str, NotebookResult]) -> str | None:
    needed = [results[other] for other in DEPENDS.get(number, ()) if other in results]
    lost = [f"needs {r.notebook}, which is {r.state}" for r in needed if r.state != "ok"]
    return lost[0] if lost else None


def _run_one(
    source: Path, folder: Path, live: "Progress", *, blocked: str | None, about: dict[str, Any]
) -> NotebookResult:
    """Run one notebook, or note why it is skipped; keep its line up to date, and its record."""
    task = live.add_task(source.stem, total=0, state="runs")
    given = {key: about[key] for key in ("profile", "parameters")}
    if blocked:
        result = NotebookResult(source.stem, skipped=blocked, **given)
    else:
        result = run_notebook(source, folder, tick=partial(live.update, task), **about)
    write_record(folder, source, result)
    live.update(task, completed=result.executed, total=result.cells, state=result.state)
    live.stop_task(task)
    if live.disable:
        line = f"{result.notebook}: {result.state}, {result.seconds:.0f} s. {result.remark}"
        live.console.print(line, markup=False, highlight=False, soft_wrap=True)
    return result


def _run_all(
    chosen: Mapping[str, Path],
    folder: Path,
    *,
    profile: str,
    parameters: Mapping[str, Mapping[str, Any]],
    timeouts: tuple[float, float],
    console: "Console",
    jobs: int,
) -> tuple[NotebookResult, ...]:
    """Start the notebooks in order, `jobs` at a time; what depends on another waits for it."""
    running: dict[str, Future[NotebookResult]] = {}

    def start(number: str, source: Path) -> NotebookResult:
        needed = {n: running[n].result() for n in DEPENDS.get(number, ()) if n in running}
        about = {"profile": profile, "parameters": parameters[number], "timeouts": timeouts}
        blocked = _blocked(number, needed)
        return _run_one(source, folder, live, blocked=blocked, about=about)

    with _live(console) as live, ThreadPoolExecutor(jobs) as pool:
        for number, source in chosen.items():
            running[number] = pool.submit(start, number, source)
        return tuple(future.result() for future in running.values())


def run_course(
    *,
    profile: str = "tiny",
    only: Sequence[str] = (),
    parameters: Mapping[str, Any] = MappingProxyType({}),
    out: Path | None = None,
    cell_timeout: float | None = None,
    notebook_timeout: float | None = None,
    jobs: int | None = None,
) -> CourseResult:
    """Run notebooks in their order, print how each fares, and write the report.

    `out`: an empty folder, or that of an earlier run, whose adapters are found again.
    `cell_timeout`, `notebook_timeout`: seconds. A failure skips only what depends on it.
    `jobs`: notebooks at a time; None: two in the tiny profile, where each has one thread, else one.
    Raises: GemmateError for an unknown notebook, profile or parameter.
    """
    from rich.console import Console

    if profile == "auto":
        profile = choose_profile(machine.read_facts())[0]
    limits = TIMEOUTS.get(among(profile, PROFILES, "profile"), LARGE_TIMEOUTS)
    chosen, console = select(only), Console()
    given = share(parameters, chosen)
    folder = make_folder(out)
    timeouts = (cell_timeout or limits[0], notebook_timeout or limits[1])
    results = _run_all(
        chosen,
        folder,
        profile=profile,
        parameters=given,
        timeouts=timeouts,
        console=console,
        jobs=jobs or (min(2, os.cpu_count() or 1) if profile == "tiny" else 1),
    )
    course = CourseResult(folder, results, write_report(folder))
    console.print(course.table())
    console.print(f"The report: {course.report}", markup=False, soft_wrap=True)
    return course
