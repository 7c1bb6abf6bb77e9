"""Where the Hub token comes from, and the remedy without one; the token itself is never kept."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

Problem = Literal["missing", "refused", "gated", "not-found", "timeout", "offline"]


class TokenState(NamedTuple):
    """Whether there is a token, and where it was found."""

    source: Literal["Colab secret", "environment", "cached login"] | None
    found: bool


class AccessReport(NamedTuple):
    """Whether a model can be downloaded; if not, what is wrong and what to do."""

    ok: bool
    problem: Problem | None = None
    remedy: str | None = None


def find_token(environ: Mapping[str, str] = os.environ) -> TokenState:
    """Where the Hub token comes from, in huggingface_hub's own order."""
    from huggingface_hub import constants, get_token

    if not get_token():
        return TokenState(None, found=False)
    if environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        return TokenState("environment", found=True)
    cached = Path(constants.HF_TOKEN_PATH).is_file()
    return TokenState("cached login" if cached else "Colab secret", found=True)


def remedy(model_id: str, problem: Problem) -> str:
    """One sentence: what to do, with the exact address."""
    page, tokens = f"https://huggingface.co/{model_id}", "https://huggingface.co/settings/tokens"
    keep = "as the Colab secret HF_TOKEN, in the variable HF_TOKEN, or with `hf auth login`"
    return {
        "missing": f"Make a read token at {tokens} and keep it {keep}: {model_id} needs one.",
        "refused": f"Make a new read token at {tokens}: the Hub refused yours for {model_id}.",
        "gated": f"Accept the licence at {page} with the account your token belongs to.",
        "not-found": f"Check the name and the revision: the Hub shows you no such model at {page}.",
        "timeout": "Try again in a minute: the Hub did not answer in time.",
        "offline": f"Connect to the network to get {model_id}, or use --profile tiny without one.",
    }[problem]


def _problem(error: Exception, *, token: bool) -> Problem:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) and not token:
        return "missing"  # private and gated models do not exist for strangers
    if status in (401, 403) and not isinstance(error, RepositoryNotFoundError):
        return "refused"
    if status in (400, 401, 403, 404) or isinstance(error, ValueError):
        return "gated" if isinstance(error, GatedRepoError) else "not-found"
    # By its name, because the HTTP client under huggingface_hub changes.
    return "timeout" if "Timeout" in type(error).__name__ or status in (429, 504) else "offline"


def check_access(model_id: str, revision: str | None = None) -> AccessReport:
    """Ask the Hub for the model's config.json; embedded and local models need no asking."""
    if Path(model_id).is_dir() or Path(__file__).with_name("assets").joinpath(model_id).is_dir():
        return AccessReport(ok=True)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint, token = os.environ.get("HF_ENDPOINT"), False
    try:
        token = find_token().found
        url = hf_hub_url(model_id, "config.json", revision=revision, endpoint=endpoint)
        get_hf_file_metadata(url, token=token, endpoint=endpoint)
    except Exception as error:
        problem = _problem(error, token=token)
        return AccessReport(ok=False, problem=problem, remedy=remedy(model_id, problem))
    return AccessReport(ok=True)
