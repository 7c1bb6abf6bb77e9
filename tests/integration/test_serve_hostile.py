"""Requests meant to hurt: they get a proper status, and nobody beside them notices."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import PROMPTS, Alone, make_runs

from gemmate_lib.models import load_tokenizer
from gemmate_lib.serve.answers import Ask
from gemmate_lib.serve.api import build_app
from gemmate_lib.serve.engine import Engine
from gemmate_lib.serve.limits import Limits, Refused
from gemmate_lib.serve.opening import open_engine
from gemmate_lib.serve.pieces import Pieces
from gemmate_lib.sft import Run, load_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Small runs, and one whose weights are not finite."""
    folder = tmp_path_factory.mktemp("runs")
    made = make_runs(folder)
    broken = Path(shutil.copytree(folder / "one", folder / "broken"))
    weights = broken / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.full_like(v, torch.nan) for k, v in load_file(weights).items()}, weights)
    return made | {"broken": load_run(broken)}


@pytest.fixture(scope="module")
def engine(runs: dict[str, Run]) -> Iterator[Engine]:
    made = open_engine(runs)
    yield made
    made.close()


async def posted(engine: Engine, body: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(build_app(engine, Limits()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        head = {"Content-Type": "application/json"}
        return await http.post("/v1/completions", content=body, headers=head)


def test_who_cannot_be_sampled_from_fails_alone(engine: Engine, runs: dict[str, Run]) -> None:
    """A diverged adapter in a batch with a sound one; on a GPU its draw would end the process."""
    alone = Alone({"one": runs["one"]})
    sound = [engine.submit(Ask("one", prompt, 12)) for prompt in PROMPTS[:3]]
    broken = [engine.submit(Ask("broken", "a", 12, temperature=1.0)) for _ in range(2)]
    for answer in broken:
        with pytest.raises(Refused, match="scores of broken are not finite") as refused:
            answer.text()
        assert refused.value.status == 500
    for answer in sound:
        assert answer.text() == alone.ask("one", answer.ask.prompt, 12).text
    assert engine.ready


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 9e-7])
def test_a_temperature_that_divides_to_infinity_is_greedy(
    engine: Engine, temperature: float
) -> None:
    ask = {"model": "one", "prompt": PROMPTS[0], "max_tokens": 8}
    both = [
        asyncio.run(posted(engine, json.dumps(ask | more).encode()))
        for more in ({}, {"temperature": temperature, "seed": 1})
    ]
    assert [reply.status_code for reply in both] == [200, 200]
    assert len({reply.json()["choices"][0]["text"] for reply in both}) == 1


def test_a_key_that_is_half_a_character(engine: Engine) -> None:
    reply = asyncio.run(posted(engine, b'{"model": "one", "prompt": "a", "\\ud800": 1}'))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, None, "invalid_value")
    assert error["message"].startswith("The body: ")


def test_a_long_stop_text_does_not_hold_the_others_up() -> None:
    """Looked for in all its beginnings it took seconds a token, for everybody."""
    tokenizer = load_tokenizer("tiny-gemma")
    tokens = tokenizer("Imagination is more. " * 8, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer, ["e" + "a" * 250_000, " " + "b" * 250_000])
    began = time.process_time()
    text = "".join([*(pieces.add(token) for token in tokens), pieces.end()])
    assert text == tokenizer.decode(tokens) and time.process_time() - began < 5
