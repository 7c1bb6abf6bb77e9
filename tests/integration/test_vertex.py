"""Jobs and pipelines of Vertex AI as they would be sent, against golden files; nothing is sent."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemmate_lib.config import Experiment
from gemmate_lib.pipeline import compile_pipeline
from gemmate_lib.prices import find_machine, resolve_on
from gemmate_lib.vertex import TrainingJob, create_training_job

GOLDEN = Path(__file__).parents[1] / "golden"
WHERE = {"project": "my-project", "location": "us-central1", "staging_bucket": "gs://my-bucket"}
SECRET = "projects/my-project/secrets/HF_TOKEN/versions/latest"


def equals_golden(name: str, text: str) -> None:
    """Compare with a golden file; WRITE_GOLDEN=1 writes it anew, to be looked at in the diff."""
    if os.environ.get("WRITE_GOLDEN"):
        (GOLDEN / name).write_text(text, "utf-8")
    assert text == (GOLDEN / name).read_text("utf-8")


def experiment_for(machine: str, **overrides: Any) -> Experiment:
    """The quotes experiment as a machine's GPU would have it."""
    row = find_machine(machine, None, None, region="us-central1")
    return resolve_on(row, "quotes", overrides=[f"{k}={v}" for k, v in overrides.items()])


def told(job: TrainingJob) -> str:
    """A job's specification; its hashes change with every setting that the library gets."""
    text = json.dumps({"specification": job.specification(), "remarks": job.remarks}, indent=1)
    home = job.home.rpartition("-")[2]
    return text.replace(home, "HOME").replace(job.experiment.hash(), "CONFIG") + "\n"


def test_a_packaged_job_on_spot() -> None:
    job = create_training_job(
        experiment_for("n1-standard-8"), machine_type="n1-standard-8", spot=True, max_hours=2.5,
        accelerator="NVIDIA_TESLA_T4", accelerator_count=1, hf_token_secret=SECRET,
        service_account="trainer@my-project.iam.gserviceaccount.com", **WHERE,
    )  # fmt: skip
    equals_golden("vertex_packaged.json", told(job))


def test_a_container_with_eight_gpus() -> None:
    job = create_training_job(
        experiment_for("a2-highgpu-8g", **{"training.batch_size": 8}),
        machine_type="a2-highgpu-8g",
        container="us-docker.pkg.dev/my-project/train/gemmate:1", **WHERE,
    )  # fmt: skip
    equals_golden("vertex_container.json", told(job))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_pipeline_compiles_to_its_golden_file(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"enable_caching": kind == "cpu"}
    if kind == "gpu":
        image = "us-docker.pkg.dev/my-project/train/gemmate:1"
        options |= {"image": image, "accelerator": "NVIDIA_L4"}
    text = compile_pipeline(tmp_path / "p.yaml", **options).read_text("utf-8")
    equals_golden(f"pipeline_{kind}.yaml", text)
    tasks = yaml.safe_load(text)["root"]["dag"]["tasks"]
    assert list(tasks) == sorted(["prepare", "train", "evaluate", "compare", "publish",
                                  "register", "deploy"])  # fmt: skip
    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == (set(tasks) - {"register", "deploy"} if kind == "cpu" else set())
