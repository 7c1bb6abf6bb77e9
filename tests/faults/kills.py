"""Kill a run with SIGKILL, go on from what it left, and compare: python kills.py FOLDER N|phases.

One process imports everything and forks a child for each run, so that a trial takes seconds. N
runs are killed at a moment drawn by a seed, or one in each phase of a save; prints a line for
each, and ends with 1 if one lost more than its unsaved steps, or came to another result. A moment
is a step and a part of the time that one takes, so that it falls into the run however fast the
machine is; where a run was nevertheless whole before its moment, another one is drawn.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
from gemmate_lib import checkpoints
from gemmate_lib.config import Facts, resolve
from gemmate_lib.sft import finetune_model, load_run

# Eight steps are an epoch; dropout draws from the random numbers that a checkpoint must carry.
SETTINGS = {
    "training.max_steps": 12, "training.batch_size": 2, "training.gradient_accumulation_steps": 2,
    "training.eval_every": 2, "checkpoint.save_every": 1, "checkpoint.keep_last_n": 2,
    "training.warmup_steps": 1, "lora.dropout": 0.1, "dataset.limit": 40,
}  # fmt: skip
STEP = 6  # at which a phase is killed


def die() -> None:
    """End this process at once: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies(
    real: Callable[..., Any], *, before: bool, when: Callable[..., bool]
) -> Callable[..., Any]:
    """The function, with death before or after the call that is meant."""

    def call(*given: Any, **named: Any) -> Any:
        meant = when(*given)
        if meant and before:
            die()
        result = real(*given, **named)
        if meant:
            die()
        return result

    return call


def _at_step(path: Path, *_: Any) -> bool:
    return f"checkpoint-{STEP}" in str(path)


def _plant(phase: str) -> None:
    """Arrange that this process dies in a phase of the save after step STEP."""
    from transformers import Trainer

    at_trainer = lambda trainer, *_: trainer.state.global_step == STEP  # noqa: E731
    plan: dict[str, tuple[Any, str, bool, Callable[..., bool]]] = {
        "before it": (Trainer, "_save_checkpoint", True, at_trainer),
        "between files": (Trainer, "_save_optimizer_and_scheduler", True, at_trainer),
        "before the manifest": (checkpoints, "file_sha256", True, _at_step),
        "before the rename": (checkpoints, "_sync", False,
                              lambda path: _at_step(path) and path.name == checkpoints.MANIFEST),
        "after it": (checkpoints, "seal", False, _at_step),
    }  # fmt: skip
    owner, name, before, when = plan[phase]
    setattr(owner, name, dies(getattr(owner, name), before=before, when=when))


PHASES = ("before it", "between files", "before the manifest", "before the rename", "after it")


def in_child(work: Callable[[], object], *, moment: Callable[[int], None] | None = None) -> int:
    """Do the work in a process of its own, killed after the moment; its signal or exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if moment is not None:
        moment(pid)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(out: Path, phase: str | None = None) -> None:
    """Begin or go on with the run, noting each checkpoint as it is sealed."""
    if phase:
        _plant(phase)
    real = checkpoints.seal

    def noted(*given: Any) -> Any:
        made = real(*given)
        with out.with_suffix(".sealed").open("a") as file:
            file.write(f"{made.step} {time.monotonic()}\n")
        return made

    checkpoints.seal = noted
    experiment = resolve("quotes", facts=Facts(), profile="tiny", overrides=SETTINGS).experiment
    finetune_model(experiment, out=out, resume="last")


def sealed(out: Path) -> list[tuple[int, float]]:
    """Each step whose checkpoint was told to be safe, and when in seconds."""
    notes = out.with_suffix(".sealed")
    lines = notes.read_text().splitlines(keepends=True) if notes.is_file() else []
    told = [line.split() for line in lines if line.endswith("\n")]
    return [(int(step), float(when)) for step, when in told]


def last_sealed(out: Path) -> int:
    """The last step whose checkpoint was told to be safe; 0 where none was."""
    return max((step for step, _ in sealed(out)), default=0)


def at(out: Path, step: int, seconds: float) -> Callable[[int], None]:
    """Wait until a process has sealed a step, and for some seconds more, or until it has ended."""

    def wait(pid: int) -> None:
        while last_sealed(out) < step:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.005)
        time.sleep(seconds)

    return wait


def trial(
    whole: Path,
    out: Path,
    *,
    kill_after: tuple[int, float] | None = None,
    phase: str | None = None,
) -> dict[str, Any]:
    """Kill one run, go on, compare with the whole one."""
    moment = at(out, *kill_after) if kill_after else None
    ended = in_child(lambda: run(out, phase), moment=moment)
    safe, ready = last_sealed(out), (out / "manifest.json").is_file()
    if not ready and in_child(lambda: run(out)) != 0:
        raise RuntimeError(f"{out} could not be gone on with")
    again, first = load_run(out), load_run(whole)
    weights = [(each.adapter / "adapter_model.safetensors").read_bytes() for each in (again, first)]
    resumed = (again.manifest.get("resumed") or {"step": 0})["step"]
    return {
        "killed": ended == -signal.SIGKILL and not ready,
        "safe": safe,
        "resumed": resumed,
        "lost": not ready and resumed < safe,
        "equal": again.log == first.log and weights[0] == weights[1],
    }


def moments(whole: Path) -> Iterator[tuple[int, float]]:
    """Steps and seconds after them, drawn over the whole of a run that was timed."""
    rng, told = random.Random(0), sealed(whole)
    pace = (told[-1][1] - told[0][1]) / (len(told) - 1)
    while True:
        yield rng.randrange(len(told)), rng.uniform(0, pace)


def main(folder: Path, trials: str) -> int:
    """Run the trials; 1 if one of them lost a checkpoint or ended otherwise."""
    whole, killed, bad = folder / "whole", 0, 0
    assert in_child(lambda: run(whole)) == 0
    plans: Iterable[dict[str, Any]] = (
        [{"phase": phase} for phase in PHASES]
        if trials == "phases"
        else ({"kill_after": moment} for moment in moments(whole))
    )
    wanted = len(PHASES) if trials == "phases" else int(trials)
    for i, how in enumerate(islice(plans, 2 * wanted)):
        found = trial(whole, folder / f"trial-{i}", **how)
        bad += found["lost"] or not found["equal"]
        killed += found["killed"]
        print(json.dumps({"trial": i, **how, **found}), flush=True)
        shutil.rmtree(folder / f"trial-{i}")
        if killed == wanted:
            break
    return 1 if bad or killed < wanted else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
