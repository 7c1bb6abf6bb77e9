"""Rows in the format of Gemini's managed tuning, and the call that the real client would make."""

import json
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.managed_tuning import (
    check_examples,
    check_file,
    convert_file,
    shown,
    tuning_call,
)

FILES = {
    "prompt": [{"prompt": "Say hello.", "completion": "Hello."}],
    "alpaca": [{"instruction": "Add.", "input": "1 and 2", "output": "3"}],
    "chat": [{"messages": [{"role": "system", "content": "Be brief."},
                           {"role": "user", "content": "Hi"},
                           {"role": "assistant", "content": "Hi."},
                           {"role": "user", "content": "Bye"},
                           {"role": "assistant", "content": "Bye."}]}],
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("form", FILES)
def test_each_form_becomes_a_conversation(form: str, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", FILES[form] * 3), tmp_path / "out.jsonl"
    found = convert_file(source, out)
    assert found.examples == 3 and found == check_file(out)
    example = json.loads(out.read_text("utf-8").splitlines()[0])
    roles = [turn["role"] for turn in example["contents"]]
    assert roles == ["user", "model"] * (2 if form == "chat" else 1)
    texts = [turn["parts"][0]["text"] for turn in example["contents"]]
    if form == "chat":
        assert example["systemInstruction"]["parts"] == [{"text": "Be brief."}]
        assert texts == ["Hi", "Hi.", "Bye", "Bye."]
    elif form == "alpaca":
        assert "Add." in texts[0] and "1 and 2" in texts[0] and texts[1] == "3"
    else:
        assert texts == ["Say hello.", "Hello."] and "systemInstruction" not in example


def test_one_instruction_for_all_that_have_none(tmp_path: Path) -> None:
    rows = FILES["chat"] + [{"messages": FILES["chat"][0]["messages"][1:]}]
    convert_file(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", system="Be kind.")
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    told = [json.loads(line)["systemInstruction"]["parts"][0]["text"] for line in lines]
    assert told == ["Be brief.", "Be kind."]


def test_real_instructions(real: Any, tmp_path: Path) -> None:
    found = convert_file(real("instructions_toolformer.json"), tmp_path / "out.jsonl")
    assert found.examples > 100 and check_file(tmp_path / "out.jsonl") == found


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "No question."}], "Row 0 has no prompt"),
        ([*FILES["prompt"], {"prompt": "A", "completion": " "}], "Row 1: empty"),
        ([*FILES["prompt"] * 2, {"prompt": "A"}], "Row 2: missing field"),
        ([*FILES["chat"], {"messages": FILES["chat"][0]["messages"][:-1]}],
         "Row 1 does not end with the model's turn"),
        ([*FILES["chat"], {"messages": [{"role": "tool", "content": "x"}]}],
         "Row 1: 'tool' is no role"),
        ([*FILES["chat"], {"messages": [{"role": "user", "content": "x"}] * 2}],
         "Row 1, turn 1 is of 'user', not 'model'"),
        ([*FILES["chat"], {"messages": "hello"}], "Row 1: messages are no list of turns"),
        ([{"prompt": "a " * 300_000, "completion": "b"}], "Row 0 has about 150,000 tokens"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_is_named(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match=said):
        convert_file(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def turn(role: str, *texts: Any) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text} for text in texts]}


GOOD = {"contents": [turn("user", "a"), turn("model", "b")]}


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"contents": []}, "Row 1 has no list `contents`"),
        ({"messages": []}, "Row 1 has no list `contents`"),
        ({"contents": [turn("model", "b")]}, "Row 1, turn 0 is of 'model', not 'user'"),
        ({"contents": ["a", "b"]}, "Row 1, turn 0 is of 'a'"),
        ({"contents": [turn("user", "a"), turn("model", "  ")]}, "Row 1 has an empty turn"),
        ({"contents": [turn("user", "a"), turn("model", 3)]}, "Row 1 has a turn whose parts"),
        ({"contents": [turn("user", "a"), turn("model", "\ud800")]}, "Row 1 has a turn whose"),
        ({"contents": [turn("user", "a"), {"role": "model"}]}, "Row 1 has a turn whose parts"),
        (GOOD | {"systemInstruction": {"parts": "x"}}, "Row 1 has a turn whose parts"),
    ],
)
def test_a_wrong_example_is_named(example: Any, said: str) -> None:
    with pytest.raises(GemmateError, match=said):
        check_examples([GOOD, example])
    assert check_examples([GOOD, GOOD]).examples == 2


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="There are 0 examples"):
        check_examples([])
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n')
    with pytest.raises(GemmateError, match="not UTF-8"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(GemmateError, match=r"with \.jsonl at its end"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": "data.jsonl"}, "is no bucket"),
        ({"train": "gs://bucket/data.csv"}, r"is no \.jsonl file"),
        ({"train": "gs://bucket/a.jsonl", "validation": "b.jsonl"}, "is no bucket"),
        ({"train": "gs://bucket/a.jsonl", "adapter_size": 3}, "no adapter of size 3"),
    ],
)
def test_a_call_that_cannot_be_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(GemmateError, match=said):
        tuning_call(options.pop("train"), **options)


@pytest.fixture
def google() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server in Google's place, and what it was asked: path and body."""
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body)))
            answer = json.dumps({"name": "projects/1/locations/us-central1/tuningJobs/2"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_the_real_client_sends_the_call(google: Any) -> None:
    from google import genai
    from google.genai._common import ExperimentalWarning
    from google.oauth2.credentials import Credentials

    url, asked = google
    client = genai.Client(
        vertexai=True, project="my-project", location="us-central1",
        credentials=Credentials("a-token"), http_options={"base_url": url},
    )  # fmt: skip
    call = tuning_call("gs://bucket/train.jsonl", validation="gs://bucket/v.jsonl", epochs=3)
    with warnings.catch_warnings():  # google-genai 2.34 calls its tuning experimental, once
        warnings.simplefilter("ignore", ExperimentalWarning)
        job = client.tunings.tune(**call)
    assert job.name and job.name.endswith("tuningJobs/2")
    client.close()
    (path, body) = asked[0]
    assert path.endswith("projects/my-project/locations/us-central1/tuningJobs")
    tuned = body["supervisedTuningSpec"]
    assert body["baseModel"] == "gemini-2.5-flash" and body["tunedModelDisplayName"] == "gemmate"
    assert tuned["trainingDatasetUri"] == "gs://bucket/train.jsonl"
    assert tuned["validationDatasetUri"] == "gs://bucket/v.jsonl"
    told = tuned["hyperParameters"]
    assert told == {"epochCount": 3, "adapterSize": "ADAPTER_SIZE_FOUR"}
    assert json.loads(shown(call))["training_dataset"] == {"gcs_uri": "gs://bucket/train.jsonl"}
