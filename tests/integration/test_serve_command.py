"""`gemmate serve` as a program: what it prints, what it refuses to begin with, how it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import BASE, PROMPTS, Alone, make_runs
from typer.testing import CliRunner

from gemmate_lib.cli import app
from gemmate_lib.config import GemmateError
from gemmate_lib.serve import server
from gemmate_lib.serve.limits import read_limits
from gemmate_lib.sft import Run

KEY = "canary-key-0123456789"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return make_runs(tmp_path_factory.mktemp("runs"))


class Program:
    """The command, its address, and all that it has said."""

    def __init__(self, *words: object) -> None:
        environment = os.environ | {"GEMMATE_SERVE_KEY": KEY, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gemmate_lib", "serve", *map(str, words), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.address = self.wait_for(r"page: (http://127\.0\.0\.1:\d+)/")[1]
        self.wait_for("stop with Ctrl")

    def _read(self) -> None:
        self.said += self.process.stdout or ()

    def _read_on(self) -> str:
        return "".join(self.said)

    def wait_for(self, pattern: str) -> Any:
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self._read_on())):
            assert time.monotonic() < end and self.process.poll() is None, self._read_on()
            time.sleep(0.02)
        return found

    def end(self) -> tuple[int, str]:
        code = self.process.wait(120)
        self._reader.join()
        if self.process.stdout:
            self.process.stdout.close()
        return code, self._read_on()


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    made: list[Program] = []
    yield made
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
        each.end()


def test_it_serves_follows_a_folder_and_finishes_what_runs(
    runs: dict[str, Run], programs: list[Program], tmp_path: Path
) -> None:
    followed = tmp_path / "followed"
    followed.mkdir()
    words = [runs[name].directory for name in ("one", "when")]
    program = Program(*words, "--runs", followed, "--set", "seconds=100")
    programs.append(program)
    told, alone = program._read_on(), Alone({"one": runs["one"], "two": runs["two"]})
    assert "model: when  (time-aware)\n" in told and "Bearer $GEMMATE_SERVE_KEY" in told
    head = {"Authorization": f"Bearer {KEY}"}
    with (
        openai.OpenAI(api_key=KEY, base_url=f"{program.address}/v1", max_retries=0) as client,
        httpx.Client(headers=head) as http,
    ):
        done = client.completions.create(model="one", prompt=PROMPTS[0], max_tokens=9)
        assert done.choices[0].text == alone.ask("one", PROMPTS[0], 9).text
        shutil.copytree(runs["two"].directory, tmp_path / "new")
        (tmp_path / "new").rename(followed / "new")
        program.wait_for(r"\+ new")
        done = client.completions.create(model="new", prompt=PROMPTS[0], max_tokens=9)
        assert done.choices[0].text == alone.ask("two", PROMPTS[0], 9).text
        for bad in ("canary-prompt", "\udcff"):
            http.post(f"{program.address}/v1/completions", content=bad.encode("utf-8", "replace"))
        stream = client.completions.create(
            model=BASE, prompt="canary-in-a-prompt " * 3, max_tokens=300, stream=True
        )
        pieces = [next(iter(stream)).choices[0].text]
        program.process.send_signal(signal.SIGTERM)
        end, status, body = time.monotonic() + 60, 200, {"model": "one", "prompt": "a"}
        while status == 200 and time.monotonic() < end:  # it still listens, to say so
            asked = http.post(f"{program.address}/v1/completions", json=body | {"max_tokens": 1})
            status = asked.status_code
        assert status == 503 and int(asked.headers["retry-after"]) > 0
        pieces += [chunk.choices[0].text for chunk in stream]
        wanted = alone.ask(BASE, "canary-in-a-prompt " * 3, 300).text
        assert "".join(pieces) == wanted
    code, said = program.end()
    assert code == 0 and said.endswith("stopped; what ran was finished\n"), said
    assert "canary" not in said and "Traceback" not in said


def test_what_it_does_not_begin_with(runs: dict[str, Run], tmp_path: Path) -> None:
    one, runner = str(runs["one"].directory), CliRunner()
    with server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, why in (
            ([], "No run is named. Make one with"),
            (["--runs", str(tmp_path)], "holds no run"),
            ([str(tmp_path)], "holds no run"),
            ([one, one], "would both be one"),
            ([one, "--port", port], rf"Cannot listen on 127.0.0.1:{port}: address already in use"),
            ([one, "--host", "0.0.0.0"], "Others can reach 0.0.0.0, so a key is needed"),
            ([one, "--set", "queue=0"], "--set queue: Input should be greater"),
            ([one, "--set", "nothing=1"], "There are body_bytes, prompt_tokens"),
            ([one, "--name", BASE], "is the name of the base"),
        ):
            done = runner.invoke(app, ["serve", *words], env={"GEMMATE_SERVE_KEY": ""})
            assert isinstance(done.exception, GemmateError), (words, done.output)
            assert re.search(why, str(done.exception)), done.exception


def test_who_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.KEY, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        assert server.read_key(None, host=host) is None
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(GemmateError, match="a key is needed"):
            server.read_key(None, host=host)
    file = tmp_path / "key"
    for text, why in (("\n", "holds no key"), ("short", "soon guessed"), ("é" * 20, "no header"),
                      ("a b " * 9, "no header")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(GemmateError, match=why):
            server.read_key(file, host="0.0.0.0")
    file.write_text(f"{KEY}\n")
    assert server.read_key(file, host="0.0.0.0") == KEY
    monkeypatch.setenv(server.KEY, KEY)
    assert server.read_key(None, host="0.0.0.0") == KEY


def test_limits_are_set_by_name() -> None:
    limits = read_limits(["queue=3", "seconds=0.5"])
    assert (limits.queue, limits.seconds, limits.slots) == (3, 0.5, 16)
    for wrong in ("queue", "queue=x", "seconds=inf", "seconds=0", "slots=-1", "=1"):
        with pytest.raises(GemmateError, match="--set "):
            read_limits([wrong])


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    without = lambda name: None if name == "uvicorn" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(GemmateError, match=r"needs uvicorn.*gemmate-course\[serve\]"):
        server.check_installed()
