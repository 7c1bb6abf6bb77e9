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
from itertools import islice
from pathlib import Path
from typing import Any

from common import HIDDEN, parser_for, write
from temporal_report import failures, lines, readme_table, report

ROWS, EXAM_SEED = 32 * 600, 777
STEPS = 600  # of each arm
# Name -> encoder and whether the date and time stand in the prompt.
ARMS = {
    "none": (None, False), "text": (None, True), "log": ("log", False),
    "signed_log": ("signed_log", False), "fourier": ("fourier", False),
    "learned_fourier": ("learned_fourier", False), "calendar": ("calendar", False),
}  # fmt: skip
MAIN, SEEDS = ("log", "calendar"), (0, 1, 2)
Job = dict[str, Any]


def jobs(parts: Sequence[str]) -> dict[str, Job]:
    """What there is to run, by name, the longest first."""
    found: dict[str, Job] = {}
    if "headline" in parts:
        headline = {"kind": "calendar", "n": 400, "data": "card"}
        full = {"method": "full", "lr": 5e-3, "steps": 4500}
        lora = headline | {"method": "lora"}  # temporal.yaml as it stands
        found["headline LoRA r=128, 4500 steps"] = lora | {"rank": 128, "steps": 4500}
        found["headline LoRA r=64, 3500 steps"] = lora
        found["headline full, 4500 steps"] = headline | full
    if "questions" in parts:
        for seed in SEEDS:
            for arm in ARMS if seed == 0 else MAIN:
                kind, text = ARMS[arm]
                found[f"questions {arm} {seed}"] = {
                    "kind": kind, "text": text, "method": "full", "lr": 5e-3, "steps": STEPS,
                    "n": 40, "seed": seed, "data": "questions",
                }  # fmt: skip
    for data in ("drift", "events"):
        if data in parts:
            for arm in ("none", "text", "calendar"):
                kind, text = ARMS[arm]
                found[f"{data} {arm}"] = {
                    "kind": kind, "text": text, "method": "full", "lr": 3e-3,
                    "steps": 300 if data == "drift" else 600, "data": data,
                }  # fmt: skip
    return found


# What a job does, in its own process.


def prefix(timestamp: int, *, clock: bool = True) -> str:
    """The strongest simple baseline: the time in the prompt, in the very form of the answers."""
    from gemmate_lib.temporal import dates
    from gemmate_lib.timestamps import to_moment

    now = to_moment(timestamp)
    return f"{dates.long_date(now)}{', ' + dates.clock(now) if clock else ''}. "


def read_rows(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and test rows: text or prompt and completion, and timestamp."""
    from gemmate_lib.temporal.drift import drifting_texts
    from gemmate_lib.temporal.questions import as_row, questions

    if job["data"] == "questions":
        return [as_row(dialogue) for dialogue in islice(questions(2006), ROWS)], []
    rows = drifting_texts(2006) if job["data"] == "drift" else real_events()
    return rows[: -len(rows) // 6], rows[-len(rows) // 6 :]


def real_events() -> list[dict[str, Any]]:
    """Dated events from 1700 on, each text once, in an order drawn by a seed."""
    import random

    from gemmate_lib.timestamps import parse

    path = Path(os.environ["GEMMATE_REAL_DATA"]) / "events_dated.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    once = {row["text"]: row["date"] for row in lines if row["date"] >= "1700"}
    rows = [{"text": text, "timestamp": parse(date)} for text, date in sorted(once.items())]
    random.Random(0).shuffle(rows)
    return rows


def as_seen(row: dict[str, Any], job: Job, timestamp: int | None = None) -> Any:
    """A row as an arm sees it, at its own time or another; a text has no prompt but its date."""
    from gemmate_lib.rows import Row

    time = row["timestamp"] if timestamp is None else timestamp
    prompt = row.get("prompt", "")
    if job.get("text"):
        prompt = prefix(time, clock="prompt" in row) + prompt
    times = ((0, time),) if job["kind"] else None
    return Row(prompt, row.get("completion", row.get("text")), {}, 0, times)


def fine_tune(job: Job, work: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any, float]:
    """Model, tokenizer and seconds of training; every arm sees the same rows in the same order."""
    from gemmate_lib.adapters import train_all
    from gemmate_lib.config import Facts, resolve
    from gemmate_lib.data import DataReport, Splits
    from gemmate_lib.models import load_base
    from gemmate_lib.sft import finetune_model, open_run
    from gemmate_lib.trainer import train

    settings = [f"method={job['method']}", f"seed={job.get('seed', 0)}"]
    settings += [f"training.max_steps={job['steps']}"] if "steps" in job else []
    settings += [f"training.learning_rate={job['lr']}"] if "lr" in job else []
    if "rank" in job:
        settings += [f"lora.r={job['rank']}", f"lora.alpha={2 * job['rank']}"]
    settings += ["dataset.max_length=160"] if job["data"] == "events" else []
    if job["kind"] is None:  # the rows keep their times, the model cannot read them
        settings += ["dataset.timestamp=null", "model.temporal_kind=null"]
    else:
        settings += [f"model.temporal_kind={job['kind']}"]
    found = resolve("temporal", facts=Facts(), profile="tiny", overrides=settings).experiment
    if job["data"] == "card":
        run = finetune_model(found, out=work / "run")
        opened = open_run(run)
        return opened.model, opened.tokenizer, run.manifest["timings"]["train"]
    base = load_base(found.model)
    model = train_all(base.model)
    report = DataReport(job["data"], "prompt-completion", "dropped", length_checked=False)
    taught = Splits([as_seen(row, job) for row in rows], [], [], report, "prompt-completion")
    began = time.perf_counter()
    train(model, base.tokenizer, taught, found, work / "trainer")
    return model, base.tokenizer, time.perf_counter() - began


def examine(model: Any, tokenizer: Any, job: Job) -> dict[str, dict[str, list[int]]]:
    """Right answers and questions, by where they are from and by kind."""
    from gemmate_lib.generate import generate_texts
    from gemmate_lib.temporal.dates import SIMPLE
    from gemmate_lib.temporal.questions import as_row, questions

    result: dict[str, dict[str, list[int]]] = {}
    for held_out in (False, True):
        for split in ("after", "before"):
            place = f"{'held-out' if held_out else 'seen'} years, {split} 2006"
            asked = [
                dialogue
                for kind in SIMPLE
                for dialogue in islice(
                    questions(EXAM_SEED, split=split, kinds=(kind,), held_out=held_out), job["n"]
                )
                if not (held_out and kind == "holiday" and "Easter" in dialogue.turns[0][1])
            ]
            timestamps = [d.timestamp for d in asked]
            said = generate_texts(
                model,
                tokenizer,
                [as_seen(as_row(d), job).prompt for d in asked],
                timestamps=timestamps if job["kind"] else None,
                max_new_tokens=24,
                batch_size=128,
            )  # fmt: skip
            counts = result.setdefault(place, {})
            for dialogue, answer in zip(asked, said, strict=True):
                right = counts.setdefault(dialogue.kind, [0, 0])
                right[0] += answer.text.strip() == dialogue.turns[0][1]
                right[1] += 1
    return result


def text_losses(
    model: Any, tokenizer: Any, job: Job, rows: list[dict[str, Any]]
) -> dict[str, list[float]]:
    """-log p of each test text, in nats: with its own time, another row's, and none."""
    import random

    from gemmate_lib.metrics import token_losses
    from gemmate_lib.rows import encode
    from gemmate_lib.timestamps import MISSING

    own = [row["timestamp"] for row in rows]
    shuffled = random.Random(1).sample(own, len(own))
    times = {"true": own, "shuffled": shuffled, "missing": [MISSING] * len(own)}
    if job["kind"] is None and not job.get("text"):
        times = {"true": own}
    if job.get("text"):
        del times["missing"]
    found = {}
    for name, moments in times.items():
        told = [as_seen(row, job, t) for row, t in zip(rows, moments, strict=True)]
        encoded = [encode(row, tokenizer, max_length=160, over_long="cut") for row in told]
        sums, _ = token_losses(model, tokenizer, [e for e in encoded if e], batch_size=32)
        found[name] = sums.tolist()
    return found


def do(job: Job, work: Path) -> dict[str, Any]:
    """Train, measure, and say what it took."""
    from gemmate_lib.evaluate import general_texts
    from gemmate_lib.metrics import perplexity, token_losses
    from gemmate_lib.rows import Row, encode
    from gemmate_lib.temporal.drift import surprisal

    train, test = read_rows(job) if job["data"] != "card" else ([], [])
    model, tokenizer, seconds = fine_tune(job, work, train)
    result: dict[str, Any] = {"seconds": seconds}
    if test:
        result["losses"] = text_losses(model, tokenizer, job, test)
        if job["data"] == "drift":
            for name, known in (("best", True), ("best without time", False)):
                result["losses"][name] = [
                    surprisal(row["text"], row["timestamp"] if known else None) for row in test
                ]
        return result
    result["exam"] = examine(model, tokenizer, job)
    shape = {"max_length": 128, "over_long": "cut"}
    for name, times in (("off", None), ("on", ((0, 1_767_225_600_000),))):  # 1 January 2026
        rows = [encode(Row("", text, {}, 0, times), tokenizer, **shape)
                for text in general_texts()]  # fmt: skip
        sums = token_losses(model, tokenizer, [r for r in rows if r], batch_size=32)
        result[f"general perplexity, time {name}"] = perplexity(*sums)
    return result


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
    parser.add_argument("--readme", type=Path, help="Markdown file to write the main table into")
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
        whole = given.readme.read_text("utf-8")
        before, _, rest = whole.partition("<!-- temporal -->\n")
        after = rest.partition("<!-- /temporal -->")[2]
        table = f"<!-- temporal -->\n{readme_table(found)}\n<!-- /temporal -->"
        given.readme.write_text(before + table + after, "utf-8")
    for missed in failures(found):
        print(f"failed: {missed}", file=sys.stderr)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
