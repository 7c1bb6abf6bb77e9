"""Jobs and pipelines of Vertex AI as they would be sent, against golden files; nothing is sent."""

import importlib.util
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from gemmate_lib.cloud_task import read_experiment
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.pipeline import compile_pipeline
from gemmate_lib.prices import find_machine, read_prices, resolve_on
from gemmate_lib.remote import fetch_token, own_credentials
from gemmate_lib.vertex import (
    TrainingJob,
    create_pipeline_job,
    create_training_job,
)

GOLDEN = Path(__file__).parents[1] / "golden"
WHERE = {"project": "my-project", "location": "us-central1", "staging_bucket": "gs://my-bucket"}
SETTINGS = ("dataset", "dataset.test", "model")
BARE = "hf_" + "x" * 34
TOKEN_AT = "projects/my-project/secrets/HF_TOKEN/versions/latest"


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
        accelerator="NVIDIA_TESLA_T4", accelerator_count=1, hf_token_secret=TOKEN_AT,
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
        options |= {"image": image, "accelerator": "NVIDIA_L4", "hf_token_secret": TOKEN_AT}
    text = compile_pipeline(tmp_path / "p.yaml", **options).read_text("utf-8")
    equals_golden(f"pipeline_{kind}.yaml", text)
    tasks = yaml.safe_load(text)["root"]["dag"]["tasks"]
    assert list(tasks) == sorted(["prepare", "train", "evaluate", "compare", "publish",
                                  "register", "deploy"])  # fmt: skip
    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == (set(tasks) - {"register", "deploy"} if kind == "cpu" else set())


class Bucket(MemoryFileSystem):
    """Stands for gs:// in memory."""

    protocol = "gs"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own way)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.fixture
def google() -> Iterator[tuple[Any, list[tuple[str, Any]]]]:
    """A channel to a server in Google's place, and the jobs that it was sent."""
    import grpc
    from google.cloud.aiplatform_v1.types import CreateCustomJobRequest, CustomJob

    asked: list[tuple[str, Any]] = []

    def create(request: Any, _: Any) -> Any:
        asked.append((request.parent, CustomJob.to_json(request.custom_job)))
        request.custom_job.name = f"{request.parent}/customJobs/1"
        return request.custom_job

    method = grpc.unary_unary_rpc_method_handler(
        create, CreateCustomJobRequest.deserialize, CustomJob.serialize
    )
    service = "google.cloud.aiplatform.v1.JobService"
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"CreateCustomJob": method})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, asked
    server.stop(None).wait()


def test_the_real_client_sends_what_the_dry_run_showed(
    google: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a socket, by the client's own `submit`; the bucket is one in memory."""
    from fsspec.registry import _registry
    from google.cloud.aiplatform_v1.services.job_service import JobServiceClient
    from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceGrpcTransport
    from google.cloud.aiplatform_v1.types import CustomJob
    from google.protobuf.json_format import MessageToDict

    channel, asked = google
    monkeypatch.setitem(_registry, "gs", Bucket)
    job = create_training_job(
        experiment_for("g2-standard-8"), spot=True, max_hours=1, hf_token_secret=TOKEN_AT,
        service_account="trainer@my-project.iam.gserviceaccount.com", **WHERE,
    )  # fmt: skip
    shown = job.specification()
    client = JobServiceClient(transport=JobServiceGrpcTransport(channel=channel))
    monkeypatch.setattr(job.job, "api_client", client)
    assert job.submit() == "projects/my-project/locations/us-central1/customJobs/1"
    ((parent, sent),) = asked
    assert parent == "projects/my-project/locations/us-central1"
    assert MessageToDict(CustomJob.pb(CustomJob.from_json(sent))) == shown
    read = read_experiment(f"{job.home}/input")
    assert read == job.experiment and read.checkpoint.remote_path == f"{job.home}/checkpoints"
    assert Bucket().exists(f"{job.home}/input/package.tar.gz")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine_type": "g2-standard-80"}, "Did you mean 'g2-standard-8'"),
        ({"accelerator": "NVIDIA_TESLA_T4"}, "has 1 NVIDIA_L4, not 1 NVIDIA_TESLA_T4"),
        ({"location": "africa-south1"}, "africa-south1 has no g2-standard-8"),
        ({"staging_bucket": "my-bucket"}, "'my-bucket' is no bucket"),
        ({"staging_bucket": "s3://bucket"}, "is no bucket"),
        ({"staging_bucket": "gs://Bucket"}, "is no bucket"),
        ({"hf_token_secret": BARE}, "is not the token itself"),
        ({"machine_type": "a2-highgpu-8g"}, "cannot be shared evenly by 8 processes"),
        ({"dataset": "rows.jsonl"}, "dataset.id is rows.jsonl, which the job will not see"),
        ({"dataset.test": "rows.jsonl"}, "dataset.test is rows.jsonl"),
        ({"model": "./base"}, "model is ./base, which the job will not see"),
        ({"model": str(GOLDEN.parent)}, "which the job will not see"),
    ],
)
def test_what_cannot_be_a_job_is_one_sentence(change: dict[str, Any], said: str) -> None:
    settings = {key: change.pop(key) for key in list(change) if key in SETTINGS}
    with pytest.raises(GemmateError, match=said) as refused:
        create_training_job(experiment_for("g2-standard-8", **settings), **WHERE | change)
    assert "\n" not in str(refused.value) and "x" * 30 not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [{"dataset": "gs://bucket/rows"}, {"model": "gs://bucket/base"}, {"model": "tiny-gemma"},
     {"model": "org/base"}, {"dataset": "tiny_quotes"}],
)  # fmt: skip
def test_what_the_job_will_find_is_no_matter(settings: dict[str, Any]) -> None:
    assert create_training_job(experiment_for("g2-standard-8", **settings), **WHERE).packaged


def test_a_gated_base_without_a_token_is_not_sent() -> None:
    job = create_training_job(experiment_for("g2-standard-8"), **WHERE)
    with pytest.raises(GemmateError, match="keep a read token in Secret Manager"):
        job.submit()
    free = create_training_job(experiment_for("g2-standard-8", model="org/base"), **WHERE)
    assert not any("licence" in remark for remark in free.remarks)


def test_the_account_is_looked_for_only_to_send(monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # or it asks the network whether this is a cloud
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    with pytest.raises(GemmateError, match="gcloud auth application-default login"):
        own_credentials()
    fetch_token()  # no secret is named: nothing is looked for
    monkeypatch.setenv("GEMMATE_HF_TOKEN_SECRET", TOKEN_AT)
    with pytest.raises(GemmateError, match="no credentials for Google Cloud"):
        fetch_token()


def test_a_region_that_vertex_does_not_know() -> None:
    table = [row.model_copy(update={"regions": ("us-cental1",)}) for row in read_prices()]
    with pytest.raises(GemmateError, match="Did you mean 'us-central1'"):
        create_training_job(experiment_for("g2-standard-8"), table=table,
                            **WHERE | {"location": "us-cental1"})  # fmt: skip


def test_a_cpu_profile_is_remarked_on() -> None:
    row = find_machine("g2-standard-8", None, None, region="us-central1")
    job = create_training_job(resolve_on(row, "quotes", profile="tiny"), **WHERE)
    assert "the GPU stands idle" in job.remarks[0]


def test_a_pipeline_job(tmp_path: Path) -> None:
    path = compile_pipeline(tmp_path / "p.yaml", image="python:3.12")
    job = create_pipeline_job(
        path, source="gs://bucket/data", profile="t4", limit=8, enable_caching=False, **WHERE
    )
    request = job._gca_resource
    assert request.runtime_config.gcs_output_directory == "gs://my-bucket/pipeline"
    values = request.runtime_config.parameter_values
    assert (values["source"], values["limit"]) == ("gs://bucket/data", 8)
    tasks = dict(request.pipeline_spec["root"]["dag"]["tasks"])
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks.values())
    with pytest.raises(GemmateError, match=r"will not see rows\.jsonl"):
        create_pipeline_job(path, source="rows.jsonl", profile="t4", **WHERE)
    with pytest.raises(GemmateError, match="each component would ask its own machine"):
        create_pipeline_job(path, source="tiny_quotes", profile="auto", **WHERE)


@pytest.mark.parametrize("package", ["kfp", "google.cloud.aiplatform", "google.genai"])
def test_a_missing_package_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gemmate_lib.managed_tuning import tuning_call

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == package else find(name, *more),
    )
    make = {"kfp": lambda: compile_pipeline(tmp_path / "p.yaml"),
            "google.cloud.aiplatform": lambda: create_training_job(
                experiment_for("g2-standard-8"), **WHERE),
            "google.genai": lambda: tuning_call("gs://bucket/a.jsonl")}[package]  # fmt: skip
    with pytest.raises(
        GemmateError, match=rf'{package}, which is not installed. Run pip install "g'
    ):
        make()


@pytest.mark.filterwarnings("ignore:The module `kfp.v2` is deprecated")
def test_the_old_client_is_gone() -> None:
    """What old tutorials import; gemmate_lib/vertex.py says what stands in its place."""
    with pytest.raises(ImportError):
        importlib.import_module("kfp.v2.google.client")
