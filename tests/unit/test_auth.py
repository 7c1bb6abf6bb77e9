"""Where the token comes from, and the remedy for each way the Hub says no."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from hub import Hub, serving

from gemmate_lib import auth

SECRET = "hf_thisIsNoRealToken"  # pragma: allowlist secret


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with serving() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield Hub


def test_no_token_is_found_where_there_is_none() -> None:
    assert auth.find_token() == auth.TokenState(None, found=False, problem="missing")


def test_the_source_is_named_and_the_token_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(SECRET, encoding="utf-8")
    assert auth.find_token().source == "cached login"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert auth.find_token().source == "environment"
    assert SECRET not in repr(auth.find_token())


def test_a_colab_secret_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: SECRET)
    assert auth.find_token() == auth.TokenState("Colab secret", found=True)


@pytest.mark.parametrize(
    ("status", "code", "token", "problem"),
    [
        (200, "", False, None),
        (200, "", True, None),
        (401, "GatedRepo", False, "missing"),
        (403, "GatedRepo", True, "gated"),
        (401, "RepoNotFound", False, "missing"),
        (404, "RepoNotFound", True, "not-found"),
        (404, "RevisionNotFound", True, "not-found"),
        (403, "", True, "refused"),
        (504, "", True, "timeout"),
        (500, "", True, "offline"),
    ],
)
def test_each_answer_of_the_hub_has_its_remedy(
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    token: bool,
    problem: str | None,
) -> None:
    monkeypatch.setattr(hub, "answer", (status, code))
    if token:
        monkeypatch.setenv("HF_TOKEN", SECRET)
    report = auth.check_access("google/gemma-2b", "abc")
    assert (report.ok, report.problem) == (problem is None, problem)
    assert (report.remedy is None) == (problem is None)
    assert SECRET not in repr(report)
    assert hub.asked[0] == "/google/gemma-2b/resolve/abc/config.json"
    assert hub.asked[1] == (f"Bearer {SECRET}" if token else None)


def test_a_wrong_token_is_refused(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Hub) -> None:
        self.send_response(401)
        self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        self.end_headers()

    monkeypatch.setattr(hub, "do_HEAD", wrong)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert auth.check_access("google/gemma-2b").problem == "refused"


def test_no_network_and_no_answer_are_reports_and_no_exceptions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert auth.check_access("google/gemma-2b").problem == "offline"

    class ReadTimeout(Exception):
        pass

    def slow(*args: object, **options: object) -> None:
        raise ReadTimeout

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", slow)
    assert auth.check_access("google/gemma-2b").problem == "timeout"


def test_a_bad_name_is_no_exception_either() -> None:
    assert auth.check_access("no such//name").problem == "not-found"


def test_local_and_embedded_models_need_no_asking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.get_hf_file_metadata", lambda *a, **k: pytest.fail("asked")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert auth.check_access("mine").ok
    if Path(auth.__file__).with_name("assets").joinpath("tiny-gemma").is_dir():
        assert auth.check_access("tiny-gemma").ok


def test_every_problem_has_one_sentence_with_what_it_is_about() -> None:
    for problem in get_args(auth.Problem):
        sentence = auth.remedy("google/gemma-2b", problem)
        assert sentence.endswith(".") and "\n" not in sentence
        assert "google/gemma-2b" in sentence or problem == "timeout"
    assert "https://huggingface.co/google/gemma-2b" in auth.remedy("google/gemma-2b", "gated")
