"""A training as a job of Vertex AI: built here, without network or account, sent when you say so.

The job's specification is a plain dictionary: look at it, keep it, compare it. It holds no token:
that of the Hub stays in Secret Manager, and the job itself fetches it from there.

Old tutorials send pipelines by `kfp.v2.google.client.AIPlatformClient`, which no longer exists:
`create_pipeline_job` makes a `google.cloud.aiplatform.PipelineJob` in its place.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.cards import card_paths
from gemmate_lib.config import PROFILES, Experiment, GemmateError, among
from gemmate_lib.extras import need
from gemmate_lib.launch import Cluster, check_cluster
from gemmate_lib.prices import Machine, find_machine
from gemmate_lib.remote import (
    TOKEN,
    check_bucket,
    check_secret,
    for_the_cloud,
    home_in,
    needs_token,
    refuse_local,
)

if TYPE_CHECKING:
    from google.cloud.aiplatform import CustomJob, PipelineJob

IMAGE = "python:3.12"  # it brings a compiler, which some kernels ask for; torch comes by the lock
TASK = "gemmate_lib.cloud_task"
GRACE = 0.5  # hours for what is no training: installing, saving, copying
# What runs in a plain image: the package, what it declares, then the training.
UNPACK = ("set -e; mkdir -p /opt/gemmate; tar -xzf {package} -C /opt/gemmate; cd /opt/gemmate; "
          'python -m pip install -q -r requirements.txt; exec python task.py "$@"')  # fmt: skip


@dataclass(frozen=True)
class TrainingJob:
    """A job that is ready to be sent, and what goes to the bucket before it."""

    job: "CustomJob"
    """What Vertex AI's client made of it."""
    experiment: Experiment
    """As the job will run it."""
    home: str
    """The job's folder in the bucket: what it reads, its checkpoints, its run."""
    options: Mapping[str, Any]
    """What the client is told only when the job is sent: account, time, provisioning."""
    packaged: bool
    """Whether the library goes along as a package."""
    remarks: tuple[str, ...] = ()
    """What to know, and what to mend, before it is sent."""

    def specification(self) -> dict[str, Any]:
        """What Vertex AI would be sent, as a plain dictionary."""
        from google.cloud.aiplatform_v1.types import CustomJob, Scheduling
        from google.protobuf.json_format import MessageToDict

        message = CustomJob(self.job._gca_resource)
        message.job_spec.service_account = self.options["service_account"] or ""
        message.job_spec.scheduling = Scheduling(
            timeout={"seconds": self.options["timeout"]} if self.options["timeout"] else None,
            restart_job_on_worker_restart=self.options["restart_job_on_worker_restart"],
            strategy=self.options["scheduling_strategy"],
        )
        return MessageToDict(CustomJob.pb(message))

    def submit(self) -> str:
        """Copy the files, send the job, and return its name; your own credentials are used.

        Raises: GemmateError where the base needs a token and no secret is named.
        """
        if needs_token(self.experiment) and TOKEN not in json.dumps(self.specification()):
            raise GemmateError(self.remarks[0])
        self.copy_files()
        self.job.submit(**self.options)
        return str(self.job.resource_name)

    def lines(self) -> list[str]:
        """Return it for people: what goes to the bucket, what Vertex AI gets, what to know."""
        import yaml

        files = ["experiment.json", *["package.tar.gz"] * self.packaged]
        first = [f"to {self.home}/input: {', '.join(files)}", f"to {self.job._parent}/customJobs:"]
        text = yaml.safe_dump(self.specification(), sort_keys=False, width=96)
        return [*first, text.rstrip(), *(f"note: {remark}" for remark in self.remarks)]

    def copy_files(self) -> dict[str, str]:
        """Put the experiment, and the package if there is one, into the job's folder."""
        import tempfile

        from gemmate_lib.packaged import build_package
        from gemmate_lib.transfer import upload

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            content = self.experiment.model_dump_json(indent=1)
            (folder / "experiment.json").write_text(content, "utf-8")
            if self.packaged:
                build_package(folder / "package.tar.gz")
            return upload(folder, f"{self.home}/input")


def create_training_job(
    experiment: Experiment,
    *,
    project: str,
    location: str,
    staging_bucket: str,
    machine_type: str = "g2-standard-8",
    accelerator: str | None = None,
    accelerator_count: int | None = None,
    container: str | None = None,
    service_account: str | None = None,
    hf_token_secret: str | None = None,
    max_hours: float | None = None,
    spot: bool = False,
    credentials: Any = None,
    table: Iterable[Machine] | None = None,
) -> TrainingJob:
    """Build the job of an experiment, here and now; nothing is sent before its `submit`.

    accelerator, accelerator_count: the machine's own unless given, to be checked.
    container: an image with this library in it; none: the library goes along as a package.
    hf_token_secret: where the Hub's token lies, projects/P/secrets/NAME/versions/latest.
    max_hours: after so long the training ends itself, saved; half an hour later Vertex AI ends the
        job, whatever it does. None: as the experiment's own budget says. [hours]
    spot: on machines that may be taken away; the job then goes on from its last checkpoint.
    credentials: google.auth's, such as `own_credentials()`; none: enough to look, not to send.
    table: machines of your own, see gemmate_lib/prices.py.
    Raises: GemmateError for a machine without these GPUs, a region without the machine, a bucket
        that is none, rows that the GPUs cannot share, what lies on this machine alone, or the
        extra `cloud` missing.
    """
    need("google.cloud.aiplatform", "A job of Vertex AI", extra="cloud")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import aiplatform
    from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS

    bucket = check_bucket(staging_bucket)
    among(location, SUPPORTED_REGIONS, "region of Vertex AI")
    row = find_machine(machine_type, accelerator, accelerator_count, region=location, table=table)
    if row.count > 1:
        check_cluster(Cluster(row.count), experiment)
    refuse_local(experiment)
    check_secret(hf_token_secret)
    home = home_in(bucket, experiment)
    chosen = for_the_cloud(experiment, home, max_hours=max_hours)
    machine = {"machine_type": machine_type, "accelerator_type": row.accelerator,
               "accelerator_count": row.count}  # fmt: skip
    task = _task(home, container, processes=row.count)
    task["env"] = [{"name": TOKEN, "value": hf_token_secret}] if hf_token_secret else []
    pool = {"machine_spec": machine, "replica_count": 1, "container_spec": task}
    job = aiplatform.CustomJob(
        display_name=f"gemmate-{experiment.name}",
        worker_pool_specs=[pool],
        base_output_dir=home,
        project=project,
        location=location,
        staging_bucket=bucket,
        credentials=credentials or AnonymousCredentials(),
        labels={"config": chosen.hash()},
    )
    options = _options(service_account, hours=chosen.budget.hours, spot=spot)
    remarks = _remarks(chosen, experiment, hf_token_secret)
    return TrainingJob(job, chosen, home, options, container is None, remarks)


def _options(account: str | None, *, hours: float | None, spot: bool) -> dict[str, Any]:
    from google.cloud.aiplatform_v1.types import Scheduling

    strategy = Scheduling.Strategy.SPOT if spot else Scheduling.Strategy.STANDARD
    return {
        "service_account": account,
        "timeout": round((hours + GRACE) * 3600) if hours else None,
        "restart_job_on_worker_restart": spot,
        "scheduling_strategy": strategy,
    }


def _task(home: str, container: str | None, *, processes: int) -> dict[str, Any]:
    """Image, command and arguments of the training."""
    words = ["--experiment", f"{home}/input", "--out", f"{home}/run"]
    words += ["--processes", str(processes)] if processes > 1 else []
    if container:
        return {"image_uri": container, "command": ["python", "-m", TASK], "args": words}
    package = shlex.quote(home.replace("gs://", "/gcs/") + "/input/package.tar.gz")
    command = ["sh", "-c", UNPACK.format(package=package), "task"]
    return {"image_uri": IMAGE, "command": command, "args": words}


def _remarks(chosen: Experiment, asked: Experiment, secret: str | None) -> tuple[str, ...]:
    found = []
    if needs_token(chosen) and not secret:
        found.append(
            f"{chosen.model.id} lies behind a licence on the Hub. Accept it at "
            f"https://huggingface.co/{chosen.model.id}, keep a read token in Secret Manager, and "
            "name it by hf_token_secret, or --hf-token-secret."
        )
    if chosen.model.device == "cpu":
        found.append(f"model.device is cpu, as in profile {chosen.profile}: the GPU stands idle.")
    if (now := chosen.checkpoint.save_every) != asked.checkpoint.save_every:
        found.append(f"checkpoint.save_every is {now} in the job, so that it can be gone on with.")
    return tuple(found)


def create_pipeline_job(
    definition: str | Path,
    *,
    source: str,
    profile: str,
    project: str,
    location: str,
    staging_bucket: str,
    enable_caching: bool = True,
    credentials: Any = None,
    **arguments: Any,
) -> "PipelineJob":
    """Build the job of a compiled pipeline; nothing is sent before its `submit`.

    definition: what `compile_pipeline` wrote. source: the URL of its data. profile: of the GPU that
        trains. arguments: the pipeline's. Its account is given to `submit(service_account=…)`.
    Raises: GemmateError for a bucket that is none, data on this machine alone, or profile auto.
    """
    need("google.cloud.aiplatform", "A pipeline of Vertex AI", extra="cloud")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import aiplatform

    bucket = check_bucket(staging_bucket)
    if "://" not in source and source not in card_paths():
        remedy = f"Copy it with: gemmate cloud upload {source} {bucket}/data"
        raise GemmateError(f"The pipeline will not see {source}. {remedy}")
    if among(profile, (*PROFILES, "auto"), "profile") == "auto":
        problem = "With profile auto each component would ask its own machine"
        raise GemmateError(f"{problem}. Name the one of the GPU that trains: t4, ampere or full.")
    return aiplatform.PipelineJob(
        display_name="gemmate",
        template_path=str(definition),
        pipeline_root=f"{bucket}/pipeline",
        parameter_values={"source": source, "profile": profile, **arguments},
        enable_caching=enable_caching,
        project=project,
        location=location,
        credentials=credentials or AnonymousCredentials(),
    )
