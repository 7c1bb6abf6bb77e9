"""What a machine elsewhere must find of an experiment, and where it leaves what it makes."""

import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

from gemmate_lib.cards import card_paths
from gemmate_lib.config import CheckpointConfig, Experiment, GemmateError
from gemmate_lib.extras import need
from gemmate_lib.models import EMBEDDED

TOKEN = "GEMMATE_HF_TOKEN_SECRET"  # the variable that names the secret, in jobs and components
_SECRET = re.compile(r"projects/[\w-]+/secrets/[\w-]+/versions/\w+")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[^\s?#]*)?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
GATED = re.compile(r"(google/(gemma|paligemma|medgemma)|meta-llama/)", re.IGNORECASE)


def check_bucket(url: str) -> str:
    """A bucket's URL without the slash at its end. Raises: GemmateError for anything else."""
    if not _BUCKET.fullmatch(url):
        raise GemmateError(
            f"{url!r} is no bucket. Give one as gs://my-bucket or gs://bucket/folder."
        )
    return url.rstrip("/")


def home_in(bucket: str, experiment: Experiment) -> str:
    """The folder of an experiment in a bucket: the same one when it is sent again."""
    return f"{bucket}/gemmate/{experiment.name}-{experiment.hash()[:8]}"


def refuse_local(experiment: Experiment) -> None:
    """Raise GemmateError for data or a model that lie on this machine alone."""
    data = experiment.dataset
    for key in ("id", "train", "validation", "test"):
        name = getattr(data, key)
        if name and "://" not in name and name not in card_paths():
            raise GemmateError(
                f"dataset.{key} is {name}, which the job will not see. Copy it with "
                f"`gemmate cloud upload {name} gs://BUCKET/data`, and set dataset to that URL."
            )
    model = experiment.model.id
    known = model in EMBEDDED or "://" in model
    if not known and (Path(model).exists() or not _HUB_ID.fullmatch(model)):
        raise GemmateError(
            f"model is {model}, which the job will not see. Copy it with "
            f"`gemmate cloud upload {model} gs://BUCKET/model`, and set model to that URL."
        )


def needs_token(experiment: Experiment) -> bool:
    """Whether the base lies behind a licence on the Hub."""
    return bool(GATED.match(experiment.model.id))


def for_the_cloud(
    experiment: Experiment, home: str, *, max_hours: float | None = None
) -> Experiment:
    """The experiment as a job runs it: checkpoints go to the bucket, so that it can go on."""
    keep, training = experiment.checkpoint, experiment.training
    every = keep.save_every
    if keep.save_strategy == "steps" and not every:
        every = training.eval_every or max(1, min(100, training.max_steps // 10))
    changes = {"remote_path": f"{home}/checkpoints", "save_every": every, "path": None,
               "resume_option": "last", "sync_to_storage": True,
               "load_from_storage": True}  # fmt: skip
    kept = CheckpointConfig.model_validate(keep.model_dump() | changes)
    hours = {"max_hours": max_hours} if max_hours else {}
    budget = experiment.budget.model_copy(update=hours)
    own = {"checkpoint": kept, "budget": budget, "project_dir": None}
    return experiment.model_copy(update=own)


def check_secret(secret: str | None) -> None:
    """Raise GemmateError for a token where the name of a secret is wanted."""
    if secret is not None and not _SECRET.fullmatch(secret):
        problem = "hf_token_secret names a secret, and is not the token itself"
        raise GemmateError(f"{problem}. Write projects/PROJECT/secrets/NAME/versions/latest.")


def own_credentials() -> Any:
    """Your own credentials for Google Cloud. Raises: GemmateError where there are none."""
    need("google.auth", "Signing in to Google Cloud", extra="cloud")
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return google.auth.default(["https://www.googleapis.com/auth/cloud-platform"])[0]
    except DefaultCredentialsError:
        said = "There are no credentials for Google Cloud here"
        remedy = "Make some: gcloud auth application-default login"
        raise GemmateError(f"{said}. {remedy}") from None


def fetch_token() -> None:
    """Put the Hub's token from Secret Manager into this process alone; it is written nowhere."""
    if not (name := os.environ.get(TOKEN)):
        return
    import base64

    check_secret(name)
    credentials = own_credentials()
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    try:
        credentials.refresh(Request())
        asked = urllib.request.Request(
            f"https://secretmanager.googleapis.com/v1/{name}:access",
            headers={"Authorization": f"Bearer {credentials.token}"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            secret = json.load(answer)["payload"]["data"]
    except (OSError, GoogleAuthError) as error:
        remedy = "Give the job's service account the role Secret Manager Secret Accessor"
        raise GemmateError(f"{name} cannot be read: {error}. {remedy}.") from None
    os.environ["HF_TOKEN"] = base64.b64decode(secret).decode().strip()
