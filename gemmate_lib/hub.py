"""The Hub: what would go up, the push itself, and whether what comes back is the same."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from gemmate_lib import auth
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
    """Upload a staged folder; a dry run, the default, only tells what would go up.

    Raises: GemmateError without network or a token that may write, or where `private` is asked
        for and the repository there is public.
    """
    from huggingface_hub import HfApi
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
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:  # it was there and stays as it was
            raise GemmateError(f"{repo_id} is public. Name another, or push with private=False.")
        names = [file.file for file in plan]
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names)
    return PushResult(repo_id, plan, commit.oid)


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
            snapshot_download(str(source), revision=revision, local_dir=folder)
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
        # By the module's name, because the HTTP client under huggingface_hub changes.
        theirs = isinstance(error, OSError | ValueError) or "http" in type(error).__module__
        if not theirs:
            raise
        problem = auth.what_failed(error, auth.find_token())
        said = " ".join(str(error).split())[:200].rstrip(".")
        remedy = _remedy(action, repo_id, problem)
        raise GemmateError(f"Cannot {action} {repo_id}: {said}. {remedy}") from error


def _remedy(action: str, repo_id: str, problem: auth.Problem) -> str:
    if problem == "offline":  # --profile tiny is no remedy here
        return "Connect to the network, then repeat it."
    if action == "pull":
        return auth.remedy(repo_id, problem)
    if problem == "not-found":
        return "Write the name as USER/NAME, where your token may write for USER."
    return auth.remedy(repo_id, problem).replace("read token", "write token")
