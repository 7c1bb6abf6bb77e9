"""Each fault that a push or a pull meets: what becomes of it, and what its user reads.

The Hub stands in on the loopback, and the client is the real huggingface_hub.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import KNOWN, SECRET, Failure, HubServer, logged_in
from small_run import make_run

from gemmate_lib import retry
from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.publish import pull_and_verify, push, push_plan

Note = Callable[[str, str, object], None]
Push = Callable[[], str]
pytestmark = KNOWN
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CREATE, INFO, CARD = "POST /api/repos/create", "GET /api/models/ada/quotes", "/validate-yaml"
ASK, BATCH, COMMIT = "/preupload/", "/objects/batch", "POST /api/models/ada/quotes/commit/"
STORE, TREE = "PUT /storage/", "/tree/"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with logged_in(monkeypatch, tmp_path / "home") as server:
        yield server


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every pause, of ours and of huggingface_hub's, that nobody waits for."""
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    return naps


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """What may go up: two large files and two small ones."""
    folder = tmp_path / "staged"
    folder.mkdir()
    for name, byte in ((FIRST, b"1"), (SECOND, b"2")):
        (folder / name).write_bytes(byte * 300_000)
    (folder / "README.md").write_text("# Quotes\n", encoding="utf-8")
    (folder / "config.json").write_text('{"a": 1}' * 999, encoding="utf-8")
    return folder


@pytest.fixture
def up(staged: Path, hub: HubServer) -> Push:
    """Push for real, and see that what lies here stays as it is."""

    def act() -> str:
        before = content(staged)
        try:
            return push(staged, "ada/quotes", dry_run=False).commit or ""
        finally:
            assert content(staged) == before

    return act


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def object_of(folder: Path, name: str) -> str:
    return f"{STORE}{hashlib.sha256((folder / name).read_bytes()).hexdigest()}"


def refused(act: Callable[[], object]) -> str:
    """What the user reads where it is not done, which never holds a secret."""
    with pytest.raises(GemmateError) as error:
        act()
    assert SECRET not in str(error.value) and "signed" not in str(error.value)
    return str(error.value)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "gemmate"]


# What passes by itself

PASSING = [
    (CREATE, 429, "Hub answers 429 to the making of the repository"),
    (CREATE, "cut", "connection cut in the making of the repository"),
    (CREATE, "lost", "repository made, its answer lost"),
    (INFO, 500, "Hub answers 500 to what the repository is"),
    (CARD, 502, "Hub answers 502 to the card"),
    (ASK, 503, "Hub answers 503 before the upload"),
    (BATCH, 429, "Hub answers 429 before the upload"),
    (STORE, 500, "storage answers 500 in the upload"),
    (STORE, "cut", "connection cut in the middle of the upload"),
    (STORE, "reset", "connection reset in the middle of the upload"),
    (STORE, "lost", "file uploaded, its answer lost"),
    (COMMIT, 429, "Hub answers 429 to the commit"),
    (COMMIT, 500, "Hub answers 500 to the commit"),
    (COMMIT, 503, "Hub answers 503 to the commit"),
    (COMMIT, 409, "Hub answers 409: another commit at the same moment"),
    (COMMIT, 412, "Hub answers 412: another commit came first"),
    (COMMIT, "cut", "connection cut in the middle of the commit"),
    (COMMIT, "reset", "connection reset in the middle of the commit"),
    (COMMIT, "lost", "commit made, its answer lost"),
]


@pytest.mark.parametrize(("request_", "failure", "fault"), PASSING)
def test_what_passes_is_tried_again(
    hub: HubServer,
    up: Push,
    staged: Path,
    caplog: pytest.LogCaptureFixture,
    naps: list[float],
    note: Note,
    request_: str,
    failure: Failure,
    fault: str,
) -> None:
    where = object_of(staged, FIRST) if request_ == STORE else request_
    hub.fail(where, failure, times=2)
    commit = up()
    repository = hub.repositories["ada/quotes"]
    assert hub.files() == content(staged) and repository.head == commit
    assert len(repository.commits) == 2, "the Hub's own and one of ours"
    tried = 1 if fault.startswith("commit made") else 2
    assert len(naps) == tried == 2 - hub.faults[0].times
    said = warned(caplog)
    assert len(said) >= len(naps) and all("Cannot push to ada/quotes" in line for line in said)
    assert SECRET not in caplog.text and "signed" not in caplog.text
    note(fault, "waits, tries again, goes up in one commit", said[0])


def test_a_page_that_is_not_the_hubs_is_tried_again(hub: HubServer, up: Push, note: Note) -> None:
    hub.fail(CARD, 502, times=1, body="<html>Bad gateway</html>")
    up()
    hub.fail(CARD, 502, times=99, body="<html>Bad gateway</html>")
    said = refused(up)
    assert "what answered is not the Hub. Wait some minutes" in said
    note("a proxy answers instead of the Hub", "tries again; stops after five times", said)


def test_silence_counts_as_cut(
    hub: HubServer,
    up: Push,
    staged: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    note: Note,
) -> None:
    from huggingface_hub import get_session

    before = get_session().timeout
    monkeypatch.setattr(retry, "SILENCE", 1.0)
    silent = (INFO, object_of(staged, FIRST), COMMIT)
    for request in silent:
        hub.fail(request, "silent")
    up()
    assert hub.files() == content(staged) and get_session().timeout == before
    said = [line for line in warned(caplog) if "timed out" in line]
    assert len(said) >= len(silent)
    note("connection falls silent", "waits two minutes, tries again, goes up", said[0])


# How long it waits


def test_each_wait_is_about_twice_the_last(hub: HubServer, up: Push, naps: list[float]) -> None:
    hub.fail(COMMIT, 503, times=5)
    up()
    assert all(low <= nap <= 2 * low for nap, low in zip(naps, (0.5, 1, 2, 4, 8), strict=True))
    assert len({nap / 2**n for n, nap in enumerate(naps)}) == 5, "no two clients in step"


@pytest.mark.parametrize("header", [{"Retry_After": "7"}, {"RateLimit": '"api";r=0;t=7'}])
def test_it_waits_as_long_as_the_hub_asks(
    hub: HubServer, up: Push, naps: list[float], note: Note, header: dict[str, str]
) -> None:
    hub.fail(COMMIT, 429, times=2, **header)
    up()
    assert len(naps) == 2 and all(7 <= nap <= 8 for nap in naps)
    name = "Retry-After" if "Retry_After" in header else "RateLimit"
    note(f"Hub answers 429 with {name}", "waits as long as it asks, goes up", "")


def test_it_does_not_wait_for_ever(hub: HubServer, up: Push, naps: list[float], note: Note) -> None:
    hub.fail(COMMIT, 429, times=9, Retry_After="250")
    refused(up)
    assert len(naps) == 2, "a third wait would be over ten minutes"
    naps.clear()
    hub.faults.clear()
    hub.fail(COMMIT, 429, times=9, Retry_After="3600")
    said = refused(up)
    assert not naps and "Wait 3600 seconds, then repeat it." in said
    note("Hub asks to wait an hour", "stops at once", said)


# What does not pass, or not in time

BOUNDED = [
    *((request, 503) for request in (CREATE, INFO, CARD, ASK, BATCH, STORE, COMMIT)),
    *((request, "cut") for request in (CREATE, ASK, STORE, COMMIT)),
    *((request, status) for request in (STORE, COMMIT) for status in (429, 409)),
]


@pytest.mark.parametrize(("request_", "failure"), BOUNDED)
def test_it_gives_up_and_nothing_is_half_there(
    hub: HubServer, up: Push, staged: Path, note: Note, request_: str, failure: Failure
) -> None:
    """Six requests each: huggingface_hub's repeats and ours never multiply."""
    where = object_of(staged, FIRST) if request_ == STORE else request_
    hub.fail(where, failure, times=99)
    said = refused(up)
    remedy = {409: "repeat it when that is done", "cut": "Connect to the network"}
    assert remedy.get(failure, "Wait some minutes, then repeat it.") in said
    assert "Cannot push to ada/quotes: " in said and "is not sent again." in said
    assert hub.count(where) == 6
    assert hub.files() == {}
    assert all(len(r.commits) == 1 for r in hub.repositories.values())
    hub.faults.clear()
    up()
    assert hub.files() == content(staged)
    step = {STORE: "the upload", COMMIT: "the commit"}.get(request_, where.split("/")[-1])
    outcome = "stops after five repeats; nothing is to be seen there; pushed again, it goes up"
    if request_ in (STORE, COMMIT):
        what = "connection cut" if failure == "cut" else f"Hub answers {failure}"
        note(f"{what} in {step} again and again", outcome, said)


@pytest.mark.parametrize("request_", [CREATE, ASK, BATCH, STORE, COMMIT])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_repeated(
    hub: HubServer,
    up: Push,
    staged: Path,
    naps: list[float],
    note: Note,
    request_: str,
    status: int,
) -> None:
    where = object_of(staged, FIRST) if request_ == STORE else request_
    hub.fail(where, status, times=9)
    said = refused(up)
    assert hub.count(where) == 1 and not naps and hub.files() == {}
    assert ("USER/NAME" if status == 404 else "Make a new write token") in said
    if request_ in (CREATE, COMMIT):
        step = "the making of the repository" if request_ == CREATE else "the commit"
        note(f"Hub answers {status} to {step}", "stops at once", said)


def test_the_token_is_never_repeated(
    hub: HubServer, up: Push, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the Hub does."""
    echo = json.dumps({"error": f"bad token {SECRET}"})
    hub.fail(COMMIT, 500, body=echo)
    hub.fail(COMMIT, 403, body=echo)
    assert "bad token …" in refused(up)
    assert "bad token …" in caplog.text and SECRET not in caplog.text


def test_afterwards_huggingface_hub_is_as_it_was(hub: HubServer, up: Push) -> None:
    hub.fail(COMMIT, 403)
    refused(up)
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        assert not logging.getLogger(name).filters


def test_what_hf_xet_says_has_the_same_remedy(
    hub: HubServer, up: Push, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, note: Note
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # where it logs
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail("/xet-write-token/", 403, times=9)
    said = refused(up)
    assert "403" in said and "Make a new write token" in said and hub.files() == {}
    note("storage answers 403 in the upload by hf_xet", "stops", said)


# What is there already


def test_an_upload_that_was_cut_goes_on(hub: HubServer, up: Push, staged: Path, note: Note) -> None:
    first, second = object_of(staged, FIRST), object_of(staged, SECOND)
    hub.fail(second, "cut", times=99)
    said = refused(up)
    assert [f"{STORE}{name}" for name in hub.objects] == [first]
    assert hub.files() == {} and len(hub.repositories["ada/quotes"].commits) == 1
    hub.faults.clear()
    hub.asked.clear()
    up()
    assert (hub.count(first), hub.count(second), hub.count(COMMIT)) == (0, 1, 1)
    assert hub.files() == content(staged)
    note("upload cut for good, then pushed again", "sends only what is not there yet", said)


def test_a_commit_that_was_cut_goes_on(hub: HubServer, up: Push, staged: Path) -> None:
    hub.fail(COMMIT, "cut", times=2)
    up()
    assert hub.count(STORE) == 2, "each large file went up once, though the commit took three tries"
    hub.asked.clear()
    assert up() == hub.repositories["ada/quotes"].head
    assert hub.count(STORE) == hub.count(COMMIT) == 0, "all is there"


def test_it_is_always_one_commit(
    hub: HubServer, up: Push, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where upload_folder, with hf_xet, makes one of every so many files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("hub_server.LARGE", ())
    pacer = "huggingface_hub._upload_pipeline._CommitPacer.target"
    monkeypatch.setattr(pacer, 1, raising=False)
    up()
    assert len(hub.repositories["ada/quotes"].commits) == 2 and hub.files() == content(staged)


def test_a_repository_that_is_there_is_pushed_to(
    hub: HubServer, up: Push, staged: Path, note: Note
) -> None:
    hub.add("ada/quotes").commit({"theirs.txt": b"of somebody else"})
    up()
    assert hub.files() == content(staged) | {"theirs.txt": b"of somebody else"}
    busy = "Cannot create repo: another conflicting operation is in progress"
    hub.fail(CREATE, 409, body=json.dumps({"error": busy}))
    up()
    note("Hub answers 409: the repository is there", "pushes to it", "")


# The way back

PULLS = [
    (INFO, 500, 6, "what is there"),
    (TREE, 503, 6, "the list of files"),
    ("HEAD", 503, 7, "what a file is"),
    ("GET", 429, 6, "a file"),
    ("GET", 500, 6, "a file"),
    ("GET", "reset", 6, "a file"),
]


@pytest.mark.parametrize(("request_", "failure", "requests", "what"), PULLS)
def test_a_pull_that_fails_is_tried_again(
    hub: HubServer,
    up: Push,
    staged: Path,
    caplog: pytest.LogCaptureFixture,
    note: Note,
    request_: str,
    failure: Failure,
    requests: int,
    what: str,
) -> None:
    commit, plan = up(), push_plan(staged)
    where = (
        f"{request_} /ada/quotes/resolve/{commit}/{FIRST}" if request_ in "GETHEAD" else request_
    )
    hub.fail(where, failure, times=2)
    assert pull_and_verify("ada/quotes", plan) == []
    assert not hub.faults[0].times and warned(caplog)
    fault = f"Hub answers {failure}" if isinstance(failure, int) else f"connection {failure}"
    note(f"{fault} in the pull of {what}", "tries again, comes back whole", warned(caplog)[0])
    hub.asked.clear()
    hub.fail(where, failure, times=99)
    said = refused(lambda: pull_and_verify("ada/quotes", plan))
    assert hub.count(where) == requests and said.startswith("Cannot pull ada/quotes: ")
    assert "Connect to the network" in said if failure == "reset" else "Wait some minutes" in said


def test_a_download_that_was_cut_goes_on_where_it_was(
    hub: HubServer, up: Push, staged: Path, note: Note
) -> None:
    commit = up()
    hub.fail(f"GET /ada/quotes/resolve/{commit}/{FIRST}", "cut", times=2)
    assert pull_and_verify("ada/quotes", push_plan(staged)) == []
    assert hub.count(f"GET .*/{FIRST}") == 3
    note("connection cut in the middle of the download", "goes on where it was; whole", "")


# There and back, to the last bit

FETCH = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], local_dir=sys.argv[2])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run with an adapter of the embedded model, and its logits in memory."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    settings = ModelConfig(id="tiny-gemma", device="cpu")
    return directory, make_run(directory, settings, "Quote:")


def test_what_comes_back_through_faults_computes_the_same(
    hub: HubServer, trained: tuple[Path, list[float]], tmp_path: Path, note: Note
) -> None:
    from gemmate_lib.publish import fresh_logits, stage
    from gemmate_lib.sft import load_run

    run, in_memory = trained
    staged = stage(load_run(run), tmp_path / "staged")
    hub.fail(CREATE, 500)
    hub.fail(STORE, "cut")
    hub.fail(COMMIT, "lost")
    result = push(staged, "ada/quotes", dry_run=False)
    assert len(hub.repositories["ada/quotes"].commits) == 2
    hub.fail(f"GET /ada/quotes/resolve/{result.commit}/adapter_model.safetensors", "cut")
    back = tmp_path / "back"
    there = {"HF_ENDPOINT": hub.address, "HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "0"}
    there["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", FETCH, "ada/quotes", str(back)]
    subprocess.run(command, env=os.environ | there, check=True, capture_output=True)
    assert pull_and_verify(back, result.plan) == [] and not hub.faults[-1].times
    assert fresh_logits(back, "Quote:", kind="adapter") == in_memory
    note("push and pull with a fault in each step", "another process computes equal logits", "")


def test_the_command_pushes_for_real_only_when_told(
    hub: HubServer, trained: tuple[Path, list[float]]
) -> None:
    from typer.testing import CliRunner

    from gemmate_lib.cli import app

    command = ["push", str(trained[0]), "ada/quotes"]
    assert "dry run" in CliRunner().invoke(app, command).output and not hub.asked
    hub.fail(COMMIT, 503)
    done = CliRunner().invoke(app, [*command, "--for-real"])
    assert done.exit_code == 0 and "came back the same" in done.output
    assert "adapter_model.safetensors" in hub.files()
