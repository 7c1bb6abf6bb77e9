"""Where the Hub token comes from, and the remedy without one; the token itself is never kept."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

Problem = Literal[
    "missing", "not-granted", "no-answer", "refused", "gated", "not-found", "timeout", "offline"
]
# What huggingface_hub 1.x warns of once a session, where Colab keeps the secret to itself.
_COLAB: dict[str, Problem] = {
    "Access to the secret `HF_TOKEN` has not been granted": "not-granted",
    "Error while fetching `HF_TOKEN` secret value": "no-answer",
}
_withheld: list[Problem] = []  # kept, for a second question is not answered in the same session


class TokenState(NamedTuple):
    """Whether there is a token, and where it was found; else what is wrong."""

    source: Literal["Colab secret", "environment", "cached login"] | None
    found: bool
    problem: Problem | None = None


class AccessReport(NamedTuple):
    """Whether a model can be downloaded; if not, what is wrong and what to do."""

    ok: bool
    problem: Problem | None = None
    remedy: str | None = None


def find_token(environ: Mapping[str, str] = os.environ) -> TokenState:
    """Where the Hub token comes from, in huggingface_hub's own order."""
    from huggingface_hub import constants, get_token

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        token = get_token()
    for warning in caught:
        known = [p for text, p in _COLAB.items() if text in str(warning.message)]
        _withheld.extend(known)
        if not known:
            warnings.warn(warning.message, stacklevel=2)
    if not token:
        return TokenState(None, found=False, problem=_withheld[-1] if _withheld else "missing")
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
        "not-granted": f"Grant this notebook access to the secret HF_TOKEN (the key on the left of "
        f"Colab's page) and restart the session: {model_id} needs it.",
        "no-answer": "Restart the session and run the cell again: Colab did not give the secret "
        f"HF_TOKEN in time, and {model_id} needs it.",
        "refused": f"Make a new read token at {tokens}: the Hub refused yours for {model_id}.",
        "gated": f"Accept the licence at {page} with the account your token belongs to.",
        "not-found": f"Check the name and the revision: the Hub shows you no such model at {page}.",
        "timeout": "Try again in a minute: the Hub did not answer in time.",
        "offline": f"Connect to the network to get {model_id}, or use --profile tiny without one.",
    }[problem]


def what_failed(error: Exception, token: TokenState) -> Problem:
    """The problem behind an exception of huggingface_hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) and not token.found:
        return token.problem or "missing"  # private and gated models do not exist for strangers
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

    endpoint, token = os.environ.get("HF_ENDPOINT"), find_token()
    try:
        url = hf_hub_url(model_id, "config.json", revision=revision, endpoint=endpoint)
        get_hf_file_metadata(url, token=token.found, endpoint=endpoint)
    except Exception as error:
        problem = what_failed(error, token)
        return AccessReport(ok=False, problem=problem, remedy=remedy(model_id, problem))
    return AccessReport(ok=True)
