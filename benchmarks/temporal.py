"""Does a model know what time it is? Encodings side by side, on questions and on language.

Every part is a set of runs on the embedded model, each in a process of its own with one thread;
`--work DIR` keeps what is done, so that a second call goes on where the first was cut off. Prints
tables; `--out FILE` writes JSON. Real dated events are read from the folder GEMMATE_REAL_DATA.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import HIDDEN, parser_for, with_block, write
from temporal_report import failures, lines, readme_tables, report
from temporal_runs import Job, do, jobs


def cost(pairs: int = 9) -> dict[str, Any]:
    """Steps and generation, time-aware over plain, by turns: median and range of the ratio."""
    import torch

    from gemmate_lib.config import ModelConfig
    from gemmate_lib.models import load_base

    base = load_base(ModelConfig(device="cpu")).model
    aware = load_base(ModelConfig(device="cpu", temporal_kind="calendar")).model
    ids = torch.randint(5, 2000, (32, 24), generator=torch.Generator().manual_seed(0))
    times = {"timestamps": torch.arange(32) * 10**11}

    def step(model: Any, **given: Any) -> None:
        for _ in range(5):
            model.train()(input_ids=ids, labels=ids, **given).loss.backward()
            model.zero_grad()

    def generate(model: Any, **given: Any) -> None:
        settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        model.eval().generate(ids[:, :10], **settings, **given)

    added = aware.num_parameters() - base.num_parameters()
    found: dict[str, Any] = {"parameters": f"{added} more than {base.num_parameters()}"}
    for work in (step, generate):
        ratios = []
        for _ in range(pairs):
            began = time.perf_counter()
            work(base)
            between = time.perf_counter()
            work(aware, **times)
            ratios.append((time.perf_counter() - between) / (between - began))
        ratios.sort()
        found[f"time of {work.__name__}"] = [ratios[pairs // 2], ratios[0], ratios[-1]]
    return found


# The whole, and what it shows.


def run_all(todo: dict[str, Job], work: Path, at_a_time: int) -> dict[str, dict[str, Any]]:
    """Run what has no result yet, a few at a time."""

    def one(item: tuple[str, Job]) -> None:
        name, job = item
        folder = work / name.replace(" ", "_")
        if (folder / "result.json").is_file():
            return
        began = time.perf_counter()
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--job", json.dumps(job), "--work", str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(one, todo.items()))
    return {n: json.loads((work / n.replace(" ", "_") / "result.json").read_text()) for n in todo}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = parser_for(__doc__)
    parser.add_argument("--work", type=Path, help="folder that keeps the runs")
    parser.add_argument("--parts", default="headline,questions,drift,events,cost")
    parser.add_argument("--at-a-time", type=int, default=2, help="runs side by side")
    parser.add_argument("--readme", type=Path, help="Markdown file to write the main tables into")
    parser.add_argument("--job", help=HIDDEN)
    given = parser.parse_args(arguments)
    from gemmate_lib import machine

    machine.quiet()
    if given.job:
        machine.prepare(seed=0, threads=1)
        result = do(json.loads(given.job), given.work)
        (given.work / "result.json").write_text(json.dumps(result))
        return 0
    parts = given.parts.split(",")
    if "events" in parts and not os.environ.get("GEMMATE_REAL_DATA"):
        print("events: left out, GEMMATE_REAL_DATA names no folder")
        parts.remove("events")
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        found = report(run_all(jobs(parts), work, given.at_a_time))
    if "cost" in parts:
        found["cost"] = cost()
    found["machine"] = machine.describe()
    print("\n".join(lines(found)))
    write(found, given.out)
    if given.readme:
        page = given.readme.read_text("utf-8")
        for name, table in readme_tables(found).items():
            page = with_block(page, name, table)
        given.readme.write_text(page, "utf-8")
    for missed in failures(found):
        print(f"failed: {missed}", file=sys.stderr)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
