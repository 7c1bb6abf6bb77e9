"""The runs of `temporal.py`: what each trains, and what it measures of what came of it."""

import json
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

BATCH, STEPS, EXAM_SEED = 32, 600, 777  # rows a step; steps of each arm that is questioned
# Name -> encoder and whether the date and time stand in the prompt.
ARMS = {
    "none": (None, False), "text": (None, True), "log": ("log", False),
    "signed_log": ("signed_log", False), "fourier": ("fourier", False),
    "learned_fourier": ("learned_fourier", False), "calendar": ("calendar", False),
    "era": ("era", False),
}  # fmt: skip
MAIN, SEEDS = ("log", "calendar"), (0, 1, 2)
QUESTIONED = [arm for arm in ARMS if arm != "era"]  # which sees no days
# Language: how often each arm is trained; two models trained alike differ by what time gains.
LANGUAGE = {
    "events": {"text": 3, "none": 3, "era": 3, "calendar": 1},
    "drift": {"text": 1, "none": 1, "era": 1, "calendar": 1},
}
# Real events are few, and a date learned by heart is worth nothing.
BLUR = {"years": 4.0, "withheld": 0.1}
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
    for data, arms in LANGUAGE.items():
        for arm, times in arms.items() if data in parts else ():
            kind, text = ARMS[arm]
            for seed in range(times):
                found[f"{data} {arm} {seed}"] = {
                    "kind": kind, "text": text, "method": "full", "lr": 3e-3, "seed": seed,
                    "steps": 300 if data == "drift" else 800, "data": data,
                }  # fmt: skip
    if "questions" in parts:
        for seed in SEEDS:
            for arm in QUESTIONED if seed == 0 else MAIN:
                kind, text = ARMS[arm]
                found[f"questions {arm} {seed}"] = {
                    "kind": kind, "text": text, "method": "full", "lr": 5e-3, "steps": STEPS,
                    "n": 40, "seed": seed, "data": "questions",
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
        return [as_row(dialogue) for dialogue in islice(questions(2006), BATCH * STEPS)], []
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


def taught(rows: list[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    """Real events as often as they are passed, each time with another date near their own."""
    import random

    from gemmate_lib.temporal.blur import blurred

    rng = random.Random(job["seed"])
    passes = -(-BATCH * job["steps"] // len(rows))
    return [
        row | {"timestamp": blurred([row["timestamp"]], rng, **BLUR)[0]}
        for _ in range(passes) for row in rows
    ]  # fmt: skip


def as_seen(row: dict[str, Any], job: Job, timestamp: int | None = None) -> Any:
    """A row as an arm sees it, at its own time or another; a text has no prompt but its date."""
    from gemmate_lib.rows import Row
    from gemmate_lib.timestamps import MISSING

    time = row["timestamp"] if timestamp is None else timestamp
    prompt = row.get("prompt", "")
    if job.get("text") and time != MISSING:
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
    rows = taught(rows, job) if job["data"] == "events" else rows
    report = DataReport(job["data"], "prompt-completion", "dropped", length_checked=False)
    splits = Splits([as_seen(row, job) for row in rows], [], [], report, "prompt-completion")
    began = time.perf_counter()
    train(model, base.tokenizer, splits, found, work / "trainer")
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
    if job.get("text") and job["data"] == "drift":  # never withheld there
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
