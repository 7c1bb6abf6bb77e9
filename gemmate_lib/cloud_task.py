"""What runs in the job: fetch what lies in the bucket, train, measure, bring the run back.

`python -m gemmate_lib.cloud_task --experiment URL --out URL`, where the first names a folder with
experiment.json, and the second is where the run is to be put. A job that was stopped is sent again
as it was: it goes on from the checkpoints in the bucket.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.remote import fetch_token

# The same in each attempt, for a checkpoint knows where its rows lay.
WORK = Path(os.environ.get("GEMMATE_WORK", "/tmp/gemmate"))


def main(arguments: list[str] | None = None, *, work: Path = WORK) -> None:
    """Train as the arguments say."""
    from gemmate_lib import machine

    machine.quiet()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", required=True, help="URL of a folder: experiment.json")
    parser.add_argument("--out", required=True, help="URL of the folder for the run")
    parser.add_argument("--processes", type=int, default=1, help="one for each GPU")
    given = parser.parse_args(arguments)
    fetch_token()
    experiment = fetch_inputs(read_experiment(given.experiment), work)
    train(experiment, given.out, work / "run", processes=given.processes)


def read_experiment(url: str) -> Experiment:
    """The experiment in a folder at a URL. Raises: GemmateError where there is none."""
    from pydantic import ValidationError

    from gemmate_lib.storage import reach

    fs, root = reach(url)
    try:
        return Experiment.model_validate_json(fs.cat_file(f"{root}/experiment.json"))
    except (OSError, ValidationError) as error:
        problem = f"{url} holds no experiment.json that can be read: {error}"
        raise GemmateError(f"{problem}. Send the job again.") from None


def fetch_inputs(experiment: Experiment, work: Path) -> Experiment:
    """The experiment with data and base from the bucket laid down here, each file checked."""
    from gemmate_lib.transfer import download, only_file

    def here(url: str, name: str) -> str:
        return str(only_file(download(url, work / name)))

    data = {
        key: here(url, f"data-{key}")
        for key in ("id", "train", "validation", "test")
        if (url := getattr(experiment.dataset, key)) and "://" in url
    }
    model = experiment.model
    base = {"id": here(model.id, "model")} if "://" in model.id else {}
    changes = {"dataset": experiment.dataset.model_copy(update=data),
               "model": model.model_copy(update=base)}  # fmt: skip
    return experiment.model_copy(update=changes)


def show(record: dict[str, float]) -> None:
    """Print a step, which Cloud Logging reads as its fields."""
    print(json.dumps(record), flush=True)


def train(
    experiment: Experiment, url: str, folder: Path, *, processes: int = 1,
    report: Callable[[dict[str, float]], None] = show,
) -> None:  # fmt: skip
    """Fine-tune, or go on with it, then measure, and copy the run to the bucket.

    Raises: SystemExit where it was told to stop: saved, and to be gone on with.
    """
    from gemmate_lib.callbacks import Interrupted
    from gemmate_lib.evaluate import evaluate_run
    from gemmate_lib.launch import launch
    from gemmate_lib.sft import finetune_model
    from gemmate_lib.transfer import upload

    try:
        if processes > 1:
            run = launch(experiment, out=folder, processes=processes, resume="last", show=True)
        else:
            run = finetune_model(experiment, out=folder, report=report, resume="last")
    except Interrupted as stop:
        print(f"{stop} The job goes on from there when it is started again.", flush=True)
        raise SystemExit(stop.exit_code) from None
    print("\n".join(evaluate_run(run).lines()), flush=True)
    upload(run.directory, url)
    print(f"the run lies at {url}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except GemmateError as error:
        print(f"gemmate: {error}", file=sys.stderr)
        raise SystemExit(2) from None
