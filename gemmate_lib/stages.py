"""The stages of the pipeline as plain functions of folders: each reads what one before it wrote.

gemmate_lib/pipeline.py makes components of them; here they run as any other code does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmate_lib.adapters import write_json
from gemmate_lib.config import Experiment, GemmateError, resolve
from gemmate_lib.machine import quiet, read_facts
from gemmate_lib.remote import fetch_token

DECIDES = ("quote_nll", "completion_nll")  # the loss on what was to be written


def experiment_of_stage(
    experiment: str, profile: str, settings: Sequence[str], **more: Any
) -> Experiment:
    """The experiment of a stage, for the machine that the stage runs on."""
    fetch_token()
    overrides = [*settings, *(f"{key}={value}" for key, value in more.items())]
    return resolve(experiment, facts=read_facts(), profile=profile, overrides=overrides).experiment


def prepare(source: str, out: Path, *, experiment: str, profile: str,
            settings: Sequence[str]) -> dict[str, int]:  # fmt: skip
    """Fetch the source where it is a URL, and write its splits; the number of rows of each."""
    from gemmate_lib.models import load_tokenizer
    from gemmate_lib.preparation import prepare_rows
    from gemmate_lib.transfer import download, only_file

    if "://" in source:
        source = str(only_file(download(source, out.with_name(f"{out.name}-source"))))
    chosen = experiment_of_stage(experiment, profile, settings)
    tokenizer = load_tokenizer(chosen.model.id, chosen.model.revision)
    return prepare_rows(source, out, dataset=chosen.dataset, tokenizer=tokenizer)


def train(data: Path, out: Path, *, experiment: str, profile: str,
          settings: Sequence[str]) -> dict[str, float]:  # fmt: skip
    """Fine-tune on prepared rows, whose columns are the source's still; losses and steps."""
    chosen = experiment_of_stage(experiment, profile, settings, dataset=data)
    from gemmate_lib.sft import finetune_model

    return finetune_model(chosen, out=out, resume="last").metrics


def evaluate(run: Path, before: Path, after: Path, *, limit: int | None = None) -> dict[str, float]:
    """Measure the base and the run on the test split; the run's numbers."""
    quiet()
    fetch_token()
    from gemmate_lib.evaluate import evaluate_run, write_evaluation
    from gemmate_lib.sft import load_run

    found = load_run(run)
    write_evaluation(evaluate_run(found, limit=limit, base_only=True, save=False), before)
    measured = evaluate_run(found, limit=limit, save=False)
    write_evaluation(measured, after)
    return {name: interval.value for name, interval in measured.metrics.items()}


def compare(before: Path, after: Path) -> tuple[str, list[str]]:
    """Whether the run is better, worse or within noise in its loss, and all verdicts as lines."""
    from gemmate_lib.evaluation import compare_models, read_evaluation

    found = compare_models(read_evaluation(before), read_evaluation(after))
    decides = next(name for name in DECIDES if name in found)
    lines = [f"{name:<24}{item.difference}  {item.verdict()}" for name, item in found.items()]
    return found[decides].verdict(), [*lines, f"{decides} decides: {found[decides].verdict()}"]


def publish(run: Path, after: Path, out: Path, *, verdict: str, url: str = "") -> dict[str, str]:
    """Stage the folder that goes out, weights, card and manifest, and copy it to a URL if given.

    Raises: GemmateError for a run that is worse than its base beyond noise: nothing goes out.
    """
    quiet()
    from gemmate_lib.evaluation import read_evaluation
    from gemmate_lib.hub import push_plan
    from gemmate_lib.publish import stage
    from gemmate_lib.sft import load_run
    from gemmate_lib.transfer import upload

    if verdict == "worse":
        problem = "The run is worse than its base beyond noise, and is not published"
        raise GemmateError(f"{problem}. See the comparison, and train it otherwise.")
    stage(load_run(run), out, evaluation=read_evaluation(after))
    if url:
        upload(out, url)
    return {file.file: file.sha256 for file in push_plan(out)}


# What an endpoint asks of the container that answers: gemmate_lib's own server.
SERVING = {"serving_container_predict_route": "/v1/completions",
           "serving_container_health_route": "/readyz",
           "serving_container_ports": [8080]}  # fmt: skip
MACHINE: dict[str, Any] = {"machine_type": "g2-standard-8", "accelerator_type": "NVIDIA_L4",
           "accelerator_count": 1, "min_replica_count": 1, "max_replica_count": 1}  # fmt: skip


def register(folder: Path, out: Path, *, url: str, cloud: Mapping[str, Any]) -> str:
    """Write what the model registry is told; without `for_real` in `cloud`, tell it nothing.

    cloud: project, location, image of the server, for_real, and what else the calls take.
    """
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    name = f"gemmate-{manifest['config']['name']}"
    request: dict[str, Any] = {"display_name": name, "artifact_uri": url or "gs://BUCKET/FOLDER",
               "serving_container_image_uri": cloud.get("image") or "IMAGE"}  # fmt: skip
    request |= SERVING | {"labels": {"config": manifest["config_hash"]}}
    out.mkdir(parents=True, exist_ok=True)
    if cloud.get("for_real"):
        from google.cloud import aiplatform

        where = {"project": cloud["project"], "location": cloud["location"]}
        made = aiplatform.Model.upload(**request, **where)
        write_json(out / "request.json", request | {"resource": made.resource_name})
        return f"registered: {made.resource_name}"
    write_json(out / "request.json", request)
    return f"dry run: nothing was registered. Model.upload would get {json.dumps(request)}"


def deploy(model: Path, *, cloud: Mapping[str, Any]) -> str:
    """Deploy what was registered; without `for_real` in `cloud`, only say what would be done."""
    request = json.loads((model / "request.json").read_text("utf-8"))
    machine: dict[str, Any] = MACHINE | {key: cloud[key] for key in MACHINE if key in cloud}
    if cloud.get("service_account"):
        machine["service_account"] = cloud["service_account"]
    if cloud.get("for_real"):
        from google.cloud import aiplatform

        endpoint = aiplatform.Model(request["resource"]).deploy(**machine)
        return f"deployed: {endpoint.resource_name}"
    return f"dry run: nothing was deployed. Model.deploy would get {json.dumps(machine)}"
