"""Mixed requests, many at a time, good and bad: no wrong answer, no leak, every refusal proper."""

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from serving import AT, BASE, Alone, make_runs

from gemmate_lib.serve import server
from gemmate_lib.serve.api import build_app
from gemmate_lib.serve.engine import Engine
from gemmate_lib.serve.limits import Limits
from gemmate_lib.serve.opening import open_engine

KEY = "0123456789abcdefghij"
# Fewer places than there are clients, so that some are told to come again.
LIMITS = Limits(slots=6, queue=7, body_bytes=5_000, seconds=300)
PROMPTS = ("Quote: Imagination is more", "x", "Quote: I am not talented, but", "", "1, 2, 3,")
TOKENS = (3, 5, 8)
KINDS = {"completion": 30, "stream": 25, "chat": 15, "leaves": 12, "large": 4, "key": 4,
         "model": 4, "json": 3, "time": 3}  # fmt: skip
REFUSED = {"large": 413, "key": 401, "model": 404, "json": 400, "time": 400}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine, Alone]]:
    runs = make_runs(tmp_path_factory.mktemp("runs"))
    alone, engine = Alone(runs), open_engine(runs, limits=LIMITS)
    with server.bind("127.0.0.1", 0) as listener:
        ready, app = threading.Event(), build_app(engine, LIMITS, KEY)
        made = server.make_server(app, engine, limits=LIMITS, started=ready.set)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(30)
        yield server.address_of(listener), engine, alone
        made.should_exit = True
        thread.join()
    engine.close()


class Crowd:
    """Clients that ask at random, and check all that they are told."""

    def __init__(self, address: str, engine: Engine, alone: Alone, seed: int) -> None:
        self.address, self.alone, self.rng = address, alone, random.Random(seed)
        self.tokenizer, self.outcomes = engine.tokenizer, Counter[str]()

    async def run(self, requests: int, *, at_once: int) -> None:
        todo = iter(range(requests))
        async with httpx.AsyncClient(timeout=300) as http:
            client = openai.AsyncOpenAI(
                api_key=KEY, base_url=f"{self.address}/v1", http_client=http, max_retries=0
            )

            async def work() -> None:
                for _ in todo:
                    await self.one(client, http)

            await asyncio.gather(*(work() for _ in range(at_once)))

    async def one(self, client: Any, http: Any) -> None:
        """One request of a kind drawn; told to come again, it does."""
        kind = self.rng.choices([*KINDS], [*KINDS.values()])[0]
        name = self.rng.choice((BASE, "one", "two", "when"))
        prompt, n = self.rng.choice(PROMPTS), self.rng.choice(TOKENS)
        moment = self.rng.choice((AT, AT + 10**12)) if name == "when" else None
        while True:
            try:
                outcome = await self.ask(client, http, kind, name, prompt, n, moment)
            except openai.RateLimitError as busy:
                assert int(busy.response.headers["retry-after"]) >= 1
                self.outcomes["429"] += 1
                await asyncio.sleep(0.02)
                continue
            self.outcomes[outcome] += 1
            if outcome != "429":
                return

    async def ask(
        self, client: Any, http: Any, kind: str, name: str, prompt: str, n: int, moment: Any
    ) -> str:
        if kind in REFUSED:
            return await self.bad(http, kind)
        extra = {"extra_body": {"timestamp": moment}} if moment else {}
        given = {"model": name, "max_tokens": n, "stream": kind == "stream"} | extra
        wanted = self.alone.ask(name, prompt, n, moment)
        if kind == "chat":
            turns = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            wanted = self.alone.ask(name, text, n, moment)
            done = await client.chat.completions.create(messages=turns, **given)
            assert done.choices[0].message.content == wanted.text
        elif kind == "stream":
            chunks = await client.completions.create(prompt=prompt, **given)
            assert "".join([c.choices[0].text async for c in chunks]) == wanted.text
        elif kind == "leaves":
            long = given | {"max_tokens": 300, "stream": True}
            chunks = await client.completions.create(prompt=prompt, **long)
            async for _ in chunks:
                break
            await chunks.close()
        else:
            done = await client.completions.create(prompt=prompt, **given)
            assert done.choices[0].text == wanted.text
            assert done.usage.completion_tokens == wanted.n_tokens
        return kind

    async def bad(self, http: Any, kind: str) -> str:
        body: Any = {"model": "one", "prompt": "a", "max_tokens": 1}
        head = {"Authorization": f"Bearer {KEY}" + "x" * (kind == "key"),
                "Content-Type": "application/json"}  # fmt: skip
        body |= {"prompt": "a" * 6_000} if kind == "large" else {}
        body |= {"model": "../one"} if kind == "model" else {}
        body |= {"timestamp": 5} if kind == "time" else {}
        content = {"content": b"{"} if kind == "json" else {"json": body}
        reply = await http.post(f"{self.address}/v1/completions", headers=head, **content)
        if kind == "time" and reply.status_code == 429:  # what it says it would say later
            return "429"
        assert reply.status_code == REFUSED[kind], (kind, reply.text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        return kind


def settled(engine: Engine) -> dict[str, int]:
    """What there is of everything that could leak, when all is quiet."""
    end = time.monotonic() + 120
    while not engine.idle or engine._worker._batches:
        assert time.monotonic() < end, engine.load()
        time.sleep(0.01)
    gc.collect()
    return {
        "users": sum(entry.users for entry in engine._entries.values()),
        "adapters": len(engine._fleet._peft.peft_config),
        "batches": len(engine._worker._batches),
        "retired": len(engine._worker._retired),
        "answers": sum(
            type(x).__name__ in ("Answer", "Request", "Batch") for x in gc.get_objects()
        ),
        "engines": sum(t.name == "gemmate-engine" for t in threading.enumerate()),
    }


def stress(served: tuple[str, Engine, Alone], requests: int) -> Counter[str]:
    address, engine, alone = served
    asyncio.run(Crowd(address, engine, alone, seed=0).run(40, at_once=16))  # warm
    before, rss = settled(engine), psutil.Process().memory_info().rss
    crowd = Crowd(address, engine, alone, seed=1)
    asyncio.run(crowd.run(requests, at_once=16))
    after = settled(engine)
    if after["answers"]:  # the last of them may be in a frame that is not over yet
        time.sleep(1)
        after = settled(engine)
    assert after == before | {"users": 0, "batches": 0, "retired": 0, "answers": 0}
    grown = psutil.Process().memory_info().rss - rss
    assert grown < 60 * 2**20, f"{grown / 2**20:.0f} MiB more"
    assert sum(crowd.outcomes.values()) - crowd.outcomes["429"] == requests
    assert set(crowd.outcomes) >= {*KINDS} and crowd.outcomes["429"]
    return crowd.outcomes


def test_a_crowd_of_a_hundred_and_fifty(served: tuple[str, Engine, Alone]) -> None:
    stress(served, 150)


@pytest.mark.slow
def test_a_crowd_of_a_thousand(
    served: tuple[str, Engine, Alone], record_property: Any, tmp_path: Path
) -> None:
    began = time.monotonic()
    outcomes = stress(served, 1000)
    record_property("seconds", round(time.monotonic() - began, 1))
    record_property("outcomes", dict(outcomes))
    print(outcomes)
