"""A server that follows a tag: it switches without a request that fails, or stays and says why."""

import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from small_run import make_run

from gemmate_lib import cli
from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.generate import generate_texts
from gemmate_lib.registry import Registry
from gemmate_lib.serve import follow, server
from gemmate_lib.serve.api import build_app
from gemmate_lib.serve.follow import TagFollower
from gemmate_lib.serve.limits import Limits
from gemmate_lib.serve.opening import open_engine
from gemmate_lib.sft import Run, load_run, open_run

PROMPT, TOKENS = "Quote: Imagination is more", 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs over the same base that answer differently."""
    first = tmp_path_factory.mktemp("runs") / "first"
    make_run(first, ModelConfig(), PROMPT)
    second = Path(shutil.copytree(first, first.with_name("second")))
    weights = second / "adapter" / "adapter_model.safetensors"
    save_file({k: -v if "lora_B" in k else v for k, v in load_file(weights).items()}, weights)
    return [load_run(first), load_run(second)]


@pytest.fixture(scope="module")
def texts(runs: list[Run]) -> list[str]:
    """What `gemmate generate` answers by each."""
    opened = [open_run(run) for run in runs]
    found = [
        generate_texts(each.model, each.tokenizer, [PROMPT], max_new_tokens=TOKENS)[0].text
        for each in opened
    ]
    assert found[0] != found[1]
    return found


@pytest.fixture
def registry(runs: list[Run], tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "models")
    made.move("production", made.versions.add(runs[0]).digest, seen=None)
    made.versions.add(runs[1])
    return made


@pytest.fixture
def follower(registry: Registry, tmp_path: Path) -> TagFollower:
    cache = tmp_path / "cache"
    return TagFollower(registry.place.root, ["production"], every_s=0.02, cache=cache)


@pytest.fixture
def engine(follower: TagFollower) -> Iterator[Any]:
    made = open_engine(follower.runs)
    yield made
    follower.stop()
    made.close(10)


@pytest.fixture
def address(engine: Any, follower: TagFollower) -> Iterator[str]:
    """Where a real server listens."""
    limits, begun = Limits(), threading.Event()
    with server.bind("127.0.0.1", 0) as listener:
        app = build_app(engine, limits, follower=follower)
        made = server.make_server(app, engine, limits=limits, started=begun.set)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]})
        thread.start()
        assert begun.wait(60)
        yield server.address_of(listener)
        made.should_exit = True
        thread.join(60)


def ask(client: httpx.Client, address: str, *, stream: bool, tokens: int = TOKENS) -> str:
    body = {"model": "production", "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
    answer = client.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        return answer.json()["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return "".join(c["text"] for event in events for c in json.loads(event)["choices"])


def wait_for(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_a_tag_moves_and_rolls_back_under_load(
    registry: Registry, follower: TagFollower, engine: Any, address: str,
    runs: list[Run], texts: list[str],
) -> None:  # fmt: skip
    said: list[list[str]] = [[] for _ in range(4)]
    failed: list[BaseException] = []
    over = threading.Event()

    def keep_asking(mine: list[str], stream: bool, tokens: int) -> None:
        try:
            with httpx.Client(timeout=60) as client:
                while not over.is_set():
                    mine.append(ask(client, address, stream=stream, tokens=tokens))
        except BaseException as error:
            failed.append(error)

    # Two that want one token alone are never long between two requests.
    wants = [*((mine, i % 2 == 0, TOKENS) for i, mine in enumerate(said)), *[([], False, 1)] * 2]
    threads = [threading.Thread(target=keep_asking, args=each) for each in wants]
    follower.start(engine)
    for thread in threads:
        thread.start()

    def all_say(text: str) -> Callable[[], bool]:
        return lambda: bool(failed) or all(mine and mine[-1] == text for mine in said)

    try:
        wait_for(all_say(texts[0]))
        second = registry.versions.add(runs[1]).digest
        registry.move("production", second, seen=registry.tag("production"))
        wait_for(all_say(texts[1]))
        assert httpx.get(f"{address}/readyz").json()["tags"] == {
            "production": {"version": second, "behind": False}
        }
        registry.rollback("production")
        wait_for(all_say(texts[0]))
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not failed
    for mine in said:  # each client saw one, the other, and the one again: never back and forth
        assert [text for text, _ in itertools.groupby(mine)] == [texts[0], texts[1], texts[0]]
    wait_for(lambda: engine.load().running == 0)
    assert [served.name for served in engine.models()][1:] == ["production"]
    assert 'gemmate_tag_behind{tag="production"} 0.0' in httpx.get(f"{address}/metrics").text


def test_what_cannot_be_served_leaves_the_one_before(
    registry: Registry, follower: TagFollower, engine: Any, address: str, runs: list[Run],
    texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    second = registry.versions.add(runs[1]).digest
    first = registry.tag("production")
    registry.move("production", second, seen=first)
    weights = Path(registry.place.at("versions", second, "adapter/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING), httpx.Client() as client:
        for _ in range(3):
            follower.look(engine)
        assert ask(client, address, stream=False) == texts[0]
        assert client.get(f"{address}/readyz").json()["tags"]["production"]["behind"] is True
        assert 'gemmate_tag_behind{tag="production"} 1.0' in client.get(f"{address}/metrics").text
        assert len(caplog.records) == 1 and "is not what was added" in caplog.text  # said once
        registry.versions.add(runs[1])  # mended; but it is not yet time to try it again
        follower.look(engine)
        assert ask(client, address, stream=False) == texts[0]
        clock = time.monotonic
        monkeypatch.setattr(follow.time, "monotonic", lambda: clock() + follow.FIRST_WAIT)
        follower.look(engine)
        assert ask(client, address, stream=False) == texts[1]
        assert follower.state()["production"] == follow.Followed(second)


def test_another_base_and_a_tag_that_goes(
    registry: Registry, follower: TagFollower, engine: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    make_run(tmp_path / "other", ModelConfig(id="tiny-gemma2"), PROMPT)
    other = registry.versions.add(load_run(tmp_path / "other")).digest
    before = follower.state()["production"].version
    registry.move("production", other, seen=registry.tag("production"))
    with caplog.at_level(logging.WARNING):
        follower.look(engine)
    assert "load its own base" in caplog.text.lower()
    assert follower.is_behind("production") and follower.state()["production"].version == before
    tag = Path(registry.place.at("tags", "production.json"))
    for content, said in ((b"{", "is damaged"), (None, "no tag production any more")):
        tag.write_bytes(content) if content else tag.unlink()
        follower.look(engine)
        assert said in str(follower.state()["production"].fault)
    registry.move("production", before, seen=None)

    def fails(_: str) -> Any:
        raise RuntimeError("of a library")

    with monkeypatch.context() as patched:  # the thread must live on
        patched.setattr(follower._registry, "tag", fails)
        follower.look(engine)
        assert "of a library" in str(follower.state()["production"].fault)
    follower.look(engine)
    assert not follower.is_behind("production")


def test_tags_to_begin_with(registry: Registry, tmp_path: Path) -> None:
    for tags, taken, said in [
        (["staging"], (), "There is no tag staging"),
        (["../x"], (), "is no name for a tag"),
        (["production"], ("production",), "A run is called production"),
    ]:
        with pytest.raises(GemmateError, match=said):
            TagFollower(registry.place.root, tags, taken=taken, cache=tmp_path / "cache")
    with pytest.raises(GemmateError, match="Give --registry"):
        TagFollower(None, ["production"])


def test_gemmate_serve_follows_a_tag(
    registry: Registry, texts: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["serve", "--registry", registry.place.root, "--port", "0"]
    monkeypatch.setattr(sys, "argv", ["gemmate", *words, "--tag", "staging"])
    with pytest.raises(SystemExit) as refused:
        cli.run()
    assert refused.value.code == 2 and "no tag staging" in capsys.readouterr().err
    command = [sys.executable, "-m", "gemmate_lib", *words]  # production
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            told = ""
            while "stop with" not in told:
                line = process.stdout.readline() if process.stdout else ""
                assert line, told
                told += line
            assert "model: production" in told
            found = re.search(r"api: (http://\S+)/v1", told)
            with httpx.Client(timeout=60) as client:
                assert found and ask(client, found[1], stream=True) == texts[0]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
