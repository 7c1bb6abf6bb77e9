"""The Hub: what would go up, the push itself, and whether what comes back is the same."""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gemmate_lib import auth, retry
from gemmate_lib.adapters import RECORD
from gemmate_lib.config import GemmateError
from gemmate_lib.manifest import file_sha256

WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors")
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
# Nothing else goes up: no pickles (they run code), optimizer states, predictions or data rows.
UPLOADED = (
    *WEIGHTS, *TOKENIZER, "README.md", "manifest.json", "adapter_config.json", RECORD,
    "config.json", "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip

SENT = " What is there already is not sent again."


class PlannedFile(NamedTuple):
    """A file to upload."""

    file: str
    bytes: int
    sha256: str


class PushResult(NamedTuple):
    """What was uploaded or, where `commit` is None, would be."""

    repo_id: str
    plan: list[PlannedFile]
    commit: str | None = None


def push_plan(folder: str | Path) -> list[PlannedFile]:
    """Return each file with its size and SHA-256.

    Raises: GemmateError where something lies there that must not go up, or the weights do not.
    """
    plan = _files(Path(folder))
    for file in plan:
        if not any(fnmatch(file.file, pattern) for pattern in UPLOADED):
            raise GemmateError(f"{file.file} must not be uploaded. Make the folder with stage().")
    if not any(fnmatch(file.file, pattern) for file in plan for pattern in WEIGHTS):
        raise GemmateError(f"{folder} holds no weights. Stage a finished run.")
    return plan


def _files(folder: Path) -> list[PlannedFile]:
    found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    return [PlannedFile(n, found[n].stat().st_size, file_sha256(found[n])) for n in sorted(found)]


def push(
    folder: str | Path, repo_id: str, *, dry_run: bool = True, private: bool = True
) -> PushResult:
    """Upload a staged folder in one commit; a dry run, the default, only tells what would go up.

    What fails for the moment is tried again. The same push again sends only what is not there yet.

    Raises: GemmateError without network or a token that may write, where the Hub keeps failing,
        or where `private` is asked for and the repository there is public.
    """
    from huggingface_hub.utils import validate_repo_id

    plan = push_plan(folder)
    with _hub_errors("push to", repo_id):
        validate_repo_id(repo_id)
        if dry_run:
            return PushResult(repo_id, plan)
        if not auth.find_token().found:
            raise GemmateError(
                f"Cannot push to {repo_id}. {_remedy('push to', repo_id, 'missing')}"
            )
        send = partial(_send, Path(folder), repo_id, names=[f.file for f in plan], private=private)
        repo_id, commit = retry.patiently(send, doing=f"push to {repo_id}")
    return PushResult(repo_id, plan, commit)


def _send(folder: Path, repo_id: str, *, names: list[str], private: bool) -> tuple[str, str]:
    """Upload what is not there yet and commit it: the full name there, and the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id, timeout=retry.SILENCE).private:
        # It was there, and stays as it was.
        raise GemmateError(f"{repo_id} is public. Name another, or push with private=False.")
    # Made anew for each try, so that the Hub says anew what it has: no object goes up twice, and a
    # commit whose answer was lost is not made twice. Not by upload_folder, which with hf_xet may
    # make several commits.
    files = [CommitOperationAdd(name, folder / name) for name in names]
    return repo_id, api.create_commit(repo_id, files, commit_message="Upload with gemmate").oid


def pull_and_verify(
    source: str | Path, plan: Iterable[PlannedFile], *, revision: str | None = None
) -> list[str]:
    """Compare a folder, or what the Hub sends for a repository, with the plan: the differences.

    Raises: GemmateError where the Hub sends nothing.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            stack.enter_context(_hub_errors("pull", str(source)))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # past any cache
            where = {"local_dir": folder, "cache_dir": folder / ".cache"}
            get = partial(snapshot_download, str(source), revision=revision, **where)
            retry.patiently(get, doing=f"pull {source}")
        # The Hub adds the one, its client the other.
        own = (".gitattributes", ".cache/*")
        found = {f.file: f for f in _files(folder) if not any(fnmatch(f.file, o) for o in own)}
    planned = {file.file: file for file in plan}
    missing = [f"{name}: missing" for name in sorted(planned.keys() - found.keys())]
    more = [f"{name}: not in the plan" for name in sorted(found.keys() - planned.keys())]
    both = sorted(planned.keys() & found.keys())
    return missing + more + [f"{n}: other bytes" for n in both if planned[n] != found[n]]


@contextlib.contextmanager
def _hub_errors(action: str, repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the network answers into one sentence and its remedy."""
    try:
        yield
    except Exception as error:
        cause = retry.root(error)
        # By the module's name, because the HTTP client under huggingface_hub changes.
        if not (isinstance(cause, OSError | ValueError) or "http" in type(cause).__module__):
            raise
        remedy = _remedy_for(cause, action, repo_id)
        raise GemmateError(f"Cannot {action} {repo_id}: {retry.words(cause)}. {remedy}") from error


def _remedy_for(error: Exception, action: str, repo_id: str) -> str:
    answer, rest = retry.status(error) or 0, SENT if action == "push to" else ""
    if answer in (409, 412):
        return f"Somebody else is writing there: repeat it when that is done.{rest}"
    if answer in (408, 429) or answer >= 500 or isinstance(error, json.JSONDecodeError):
        wait = f"{seconds} seconds" if (seconds := retry.asked_to_wait(error)) else "some minutes"
        return f"Wait {wait}, then repeat it.{rest}"
    problem = auth.what_failed(error, auth.find_token())
    if answer in (401, 403) and problem == "offline":  # by hf_xet, which has no response
        problem = "refused"
    return _remedy(action, repo_id, problem) + (rest if problem in ("offline", "timeout") else "")


def _remedy(action: str, repo_id: str, problem: auth.Problem) -> str:
    if problem == "offline":  # --profile tiny is no remedy here
        return "Connect to the network, then repeat it."
    if action == "pull":
        return auth.remedy(repo_id, problem)
    if problem == "not-found":
        return "Write the name as USER/NAME, where your token may write for USER."
    return auth.remedy(repo_id, problem).replace("read token", "write token")
