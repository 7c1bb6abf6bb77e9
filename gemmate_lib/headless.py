"""One notebook without a browser, in processes of its own that all end with it."""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gemmate_lib.batches import Job
from gemmate_lib.manifest import file_sha256
from gemmate_lib.trust import inside

if TYPE_CHECKING:
    import psutil

POLL = 0.5  # seconds
METRIC = "main metric: "  # a notebook prints its result on a line that starts so


@dataclass(frozen=True)
class NotebookResult:
    """What came of one notebook: code cells and how many were started, seconds, and the rest.

    `point`: those of the parameters that a grid varies; `error`: {"cell": its number among the
    code cells, "message"}; `skipped`: the reason.
    """

    notebook: str
    profile: str
    parameters: Mapping[str, Any]
    point: Mapping[str, Any] = field(default_factory=dict)
    cells: int = 0
    executed: int = 0
    seconds: float = 0.0
    main_metric: str | None = None
    error: Mapping[str, Any] | None = None
    skipped: str | None = None

    @property
    def state(self) -> str:
        """ok, failed or skipped."""
        return "failed" if self.error else "skipped" if self.skipped else "ok"

    @property
    def remark(self) -> str:
        """The main metric, or why there is none."""
        if self.error:
            return f"cell {self.error['cell']}: {self.error['message']}"
        return self.skipped or self.main_metric or ""


def write_record(folder: Path, source: Path, result: NotebookResult) -> None:
    """Write the result to manifests/NOTEBOOK.json in the folder."""
    record = asdict(result) | {"state": result.state, "ok": result.state == "ok"}
    record["source_sha256"] = file_sha256(source)
    record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    inside(folder, f"manifests/{result.notebook}.json").write_text(text + "\n", encoding="utf-8")


def finished_before(folder: Path, job: Job, *, profile: str) -> NotebookResult | None:
    """The result of the same notebook with the same parameters, if it is there and ok."""
    file = inside(folder, f"manifests/{job.name}.json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {
        "ok": True,
        "profile": profile,
        "parameters": dict(job.parameters),
        "source_sha256": file_sha256(job.source),
    }
    if any(record.get(key) != value for key, value in wanted.items()):
        return None
    return NotebookResult(**{f.name: record[f.name] for f in fields(NotebookResult)})


def environment(folder: Path, profile: str, name: str) -> dict[str, str]:
    """The kernel's environment: what it makes stays in the folder, and tiny stays offline."""
    ours = {"GEMMATE_PROFILE": profile, "GEMMATE_RUNS": str(inside(folder, "runs"))}
    ours["GEMMATE_FIGURES"] = str(inside(folder, f"figures/{name}"))
    if profile == "tiny":
        ours |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    package = Path(__file__).parents[1]
    if (package / "pyproject.toml").is_file():  # this checkout, not another that is installed
        known = os.environ.get("PYTHONPATH")
        ours["PYTHONPATH"] = f"{package}{os.pathsep}{known}" if known else str(package)
    return os.environ | ours


def _end(family: "set[psutil.Process]") -> None:
    """Kill processes and their descendants: a kernel is in a process group of its own."""
    import psutil

    everyone = set(family)
    for process in family:
        with contextlib.suppress(psutil.Error):
            everyone |= set(process.children(recursive=True))
    for process in everyone:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(everyone, timeout=10)


def _wait(process: "psutil.Popen", seconds: float, tick: Callable[[], None]) -> int | None:
    """The exit status, or None if it took too long; no descendant outlives this call."""
    import psutil

    family: set[psutil.Process] = {process}
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                family |= set(process.children(recursive=True))
            with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
                return process.wait(timeout=POLL)
            tick()
        return None
    finally:
        _end(family)


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells that are not empty; none while the file is missing or half written."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        return []
    return [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]


def started(cells: list[dict[str, Any]]) -> int:
    """How many of the cells were started."""
    return sum(cell["execution_count"] is not None for cell in cells)


def main_metric(cells: list[dict[str, Any]]) -> str | None:
    """The text after the last printed `main metric: `; a busy kernel splits a line into pieces."""
    texts = ("".join(t for out in cell["outputs"] for t in out.get("text", "")) for cell in cells)
    lines = [line for text in texts for line in text.splitlines() if line.startswith(METRIC)]
    return lines[-1].removeprefix(METRIC).strip() if lines else None


def _error(cells: list[dict[str, Any]], status: int | None, log: Path) -> dict[str, Any] | None:
    raised = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    text = log.read_text(encoding="utf-8", errors="replace")
    client = re.findall(r"^nbclient\.exceptions\.(\w+: .+)", text, flags=re.MULTILINE)
    if status is None:
        message = "the notebook took too long and was stopped"
    elif status and client:  # a dead kernel or a slow cell, of which the notebook does not tell
        message = client[-1]
    elif status and raised:
        message = f"{raised[-1]['ename']}: {raised[-1]['evalue']}"
    elif status:
        message = (text.splitlines() or [f"papermill ended with status {status}"])[-1]
    elif started(cells) < len(cells) or not cells:  # sys.exit() is a success for papermill
        message = f"ended before its {len(cells)} cells were run"
    else:
        return None
    return {"cell": started(cells), "message": " ".join(message.split())[:300]}


def run_notebook(
    job: Job,
    folder: Path,
    *,
    profile: str,
    timeouts: tuple[float, float],
    tick: Callable[..., None],
) -> NotebookResult:
    """Run a notebook by papermill into notebooks/NAME.ipynb in the folder.

    `timeouts`: seconds for one cell and for the notebook; `tick`: called twice a second with
    `completed`, the cells that were started, and `total`.
    """
    import psutil

    # Through stdin, and to a relative path: papermill formats paths and stores them.
    name, output = job.name, inside(folder, f"notebooks/{job.name}.ipynb")
    output.unlink(missing_ok=True)
    plain = base64.b64encode(yaml.safe_dump(dict(job.parameters)).encode()).decode()
    command = [sys.executable, "-m", "papermill", "-", f"notebooks/{name}.ipynb"]
    command += ["--kernel", "python3", "--no-progress-bar", "--parameters_base64", plain]
    command += ["--execution-timeout", str(max(1, round(timeouts[0]))), "--start-timeout", "300"]
    begin, log = time.monotonic(), inside(folder, f"logs/{name}.txt")

    def poll() -> None:
        cells = code_cells(output)
        tick(completed=started(cells), total=len(cells))

    with job.source.open("rb") as text, log.open("wb") as said:
        streams = {"stdin": text, "stdout": said, "stderr": said}
        env = environment(folder, profile, name)
        process = psutil.Popen(command, cwd=folder, env=env, **streams)
        status = _wait(process, timeouts[1], poll)
    cells = code_cells(output)
    return NotebookResult(
        notebook=name,
        profile=profile,
        parameters=job.parameters,
        point=job.point,
        cells=len(cells),
        executed=started(cells),
        seconds=round(time.monotonic() - begin, 1),
        main_metric=main_metric(cells),
        error=_error(cells, status, log),
    )
