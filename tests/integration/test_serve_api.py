"""The API as the openai client sees it, in process and over a socket; and every way to refuse."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from serving import AT, BASE, NAMES, PROMPTS, Alone

from gemmate_lib import timestamps
from gemmate_lib.serve import protocol, server
from gemmate_lib.serve.api import build_app
from gemmate_lib.serve.engine import Engine
from gemmate_lib.serve.limits import Limits
from gemmate_lib.serve.opening import open_engine
from gemmate_lib.sft import Run

KEY = "0123456789abcdefghij"
HERE = "http://127.0.0.1"
LIMITS = Limits(body_bytes=20_000)


@pytest.fixture(scope="module")
def engine(runs: dict[str, Run]) -> Iterator[Engine]:
    made = open_engine(runs, limits=LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(engine: Engine) -> Any:
    return build_app(engine, LIMITS, KEY)


@contextlib.asynccontextmanager
async def in_process(app: Any, **more: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
        given = {"api_key": KEY, "base_url": f"{HERE}/v1", "max_retries": 0} | more
        yield openai.AsyncOpenAI(http_client=http, **given)


def at(name: str) -> dict[str, Any]:
    return {"extra_body": {"timestamp": AT}} if name == "when" else {}


def when(name: str) -> int | None:
    return AT if name == "when" else None


@contextlib.contextmanager
def listening(app: Any, engine: Engine, limits: Limits) -> Iterator[tuple[str, Any]]:
    """The application on a socket, in a thread of its own."""
    with server.bind("127.0.0.1", 0) as listener:
        ready = threading.Event()
        made = server.make_server(app, engine, limits=limits, started=ready.set)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]})
        address = server.address_of(listener)
        thread.start()
        assert ready.wait(30)
        try:
            yield address, made
        finally:
            made.should_exit = made.force_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(app: Any, engine: Engine) -> Iterator[str]:
    with listening(app, engine, LIMITS) as (found, _):
        yield found


def idle(engine: Engine) -> None:
    end = time.monotonic() + 60
    while not engine.idle:
        assert time.monotonic() < end, engine.load()
        time.sleep(0.005)


# What it answers


def test_models_are_listed(app: Any, engine: Engine) -> None:
    async def ask() -> None:
        async with in_process(app) as client:
            found = {model.id: model for model in (await client.models.list()).data}
            assert list(found) == list(NAMES)
            assert [name for name in found if found[name].time_aware] == ["when"]  # type: ignore[attr-defined]
            one = await client.models.retrieve("one")
            assert one == found["one"] and one.created > 1.7e9
            assert len(one.digest) == 64  # type: ignore[attr-defined]

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_what_each_run_says_alone(app: Any, alone: Alone, stream: bool) -> None:
    async def one(client: Any, name: str, prompt: str) -> None:
        wanted = alone.ask(name, prompt, 14, when(name))
        given = {"model": name, "prompt": prompt, "max_tokens": 14, "stream": stream} | at(name)
        if stream:
            given["stream_options"] = {"include_usage": True}
            chunks = [chunk async for chunk in await client.completions.create(**given)]
            *pieces, last = chunks
            text = "".join(chunk.choices[0].text for chunk in pieces)
            assert len({chunk.id for chunk in chunks}) == 1
            assert [p.choices[0].finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
            finish, usage = pieces[-1].choices[0].finish_reason, last.usage
            assert last.choices == [] and (len(pieces) > wanted.n_tokens / 2 or not text)
        else:
            done = await client.completions.create(**given)
            text, finish, usage = done.choices[0].text, done.choices[0].finish_reason, done.usage
        assert text == wanted.text and finish == ("stop" if wanted.stopped else "length")
        assert usage.completion_tokens == wanted.n_tokens
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    async def every() -> None:
        async with in_process(app) as client:
            await asyncio.gather(*(one(client, n, p) for n in NAMES for p in PROMPTS))

    asyncio.run(every())


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_put_by_the_template(
    app: Any, alone: Alone, engine: Engine, stream: bool
) -> None:
    asked = "What day is it?"
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    turns = [*before, {"role": "user", "content": [{"type": "text", "text": asked}]}]
    prompt = engine.tokenizer.apply_chat_template(
        [*before, {"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    moment = "2009-02-13T23:31:30Z"
    assert timestamps.parse(moment) == AT

    async def ask() -> None:
        async with in_process(app) as client:
            done = await client.chat.completions.create(
                model="when", messages=turns, max_completion_tokens=9, stream=stream, n=1,
                extra_body={"timestamp": moment},
            )  # fmt: skip
            if stream:
                deltas = [chunk.choices[0].delta async for chunk in done]
                assert deltas[0].role == "assistant"
                text = "".join(delta.content or "" for delta in deltas)
            else:
                text = done.choices[0].message.content
            assert text == alone.ask("when", prompt, 9, AT).text

    asyncio.run(ask())


def test_without_a_template_the_messages_are_joined(
    app: Any, alone: Alone, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    turns = [{"role": "system", "content": "Quote"}, {"role": "user", "content": "more"}]

    async def ask() -> Any:
        async with in_process(app) as client:
            return await client.chat.completions.create(model="one", messages=turns, max_tokens=9)

    text = asyncio.run(ask()).choices[0].message.content
    assert text == alone.ask("one", "Quote\n\nmore", 9).text


def test_sampling_by_a_seed_and_stop_texts(app: Any, alone: Alone) -> None:
    async def ask() -> None:
        async with in_process(app) as client:
            done = await client.completions.create(
                model="one", prompt=PROMPTS[0], max_tokens=12, temperature=1.3, top_p=0.9, seed=7,
                presence_penalty=0, logprobs=None, user="me",
            )  # fmt: skip
            how = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "seed": 7}
            assert done.choices[0].text == alone.ask("one", PROMPTS[0], 12, **how).text
            text = alone.ask("two", PROMPTS[1], 20).text
            done = await client.completions.create(
                model="two", prompt=[PROMPTS[1]], max_tokens=20, stop=[text[8:11]]
            )
            assert done.choices[0].text == text[: text.index(text[8:11])]
            assert done.choices[0].finish_reason == "stop"

    asyncio.run(ask())


# What it refuses


PLAIN: dict[str, Any] = {"model": "one", "prompt": "a", "max_tokens": 1}
WRONG = [
    ({"model": "nobody"}, 404, "model", "model_not_found"),
    ({"model": "../../etc/passwd"}, 404, "model", "model_not_found"),
    ({"model": "m" * 201}, 400, "model", "invalid_value"),
    ({"model": None}, 400, "model", "invalid_value"),
    ({"prompt": None}, 400, "prompt", "invalid_value"),
    ({"prompt": ["a", "b"]}, 400, "prompt", "invalid_value"),
    ({"prompt": [1, 2]}, 400, "prompt", "invalid_value"),
    ({"prompt": "\ud800"}, 400, "prompt", None),
    ({"prompt": "a b " * 1500}, 400, "prompt", "prompt_too_long"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": "9"}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 513}, 400, "max_tokens", "too_many_tokens"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"temperature": -1}, 400, "temperature", "invalid_value"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"seed": -1}, 400, "seed", "invalid_value"),
    ({"seed": 2**64}, 400, "seed", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", None),
    ({"stop": ""}, 400, "stop", None),
    ({"stop": "\ud800"}, 400, "stop", None),
    ({"timestamp": 5}, 400, "timestamp", "no_time"),
    ({"model": "when", "timestamp": "soon"}, 400, "timestamp", None),
    ({"model": "when", "timestamp": 1.5}, 400, "timestamp", "invalid_value"),
    ({"model": "when", "timestamp": 10**30}, 400, "timestamp", None),
    ({"n": 2}, 400, "n", "unsupported_parameter"),
    ({"n": True}, 400, "n", "unsupported_parameter"),
    ({"logprobs": 1}, 400, "logprobs", "unsupported_parameter"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter"),
    ({"top_k": 5}, 400, "top_k", "unknown_parameter"),
    ({"x" * 300: 5}, 400, "x" * 100, "unknown_parameter"),
    ({"stream_options": {"other": 1}}, 400, "stream_options", "unknown_parameter"),
]  # fmt: skip


def refused(reply: Any, status: int) -> dict[str, Any]:
    """The error in OpenAI's form."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


async def posted(app: Any, path: str, **given: Any) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as http:
        head = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return await http.request(
            given.pop("method", "POST"), path, headers=head | given.pop("headers", {}), **given
        )


@pytest.mark.parametrize(("change", "status", "param", "code"), WRONG, ids=lambda x: str(x)[:40])
def test_what_cannot_be_done_is_named(
    app: Any, change: Any, status: int, param: str, code: str | None
) -> None:
    body = json.dumps(PLAIN | change)
    error = refused(asyncio.run(posted(app, "/v1/completions", content=body)), status)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "a"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0"),
        ([{"role": "user", "content": "\ud800"}], "half a character"),
    ],
)
def test_messages_that_are_none(app: Any, messages: Any, why: str, stream: bool) -> None:
    body = json.dumps({"model": "one", "messages": messages, "stream": stream})
    error = refused(asyncio.run(posted(app, "/v1/chat/completions", content=body)), 400)
    assert why in error["message"]


def test_a_template_that_refuses_is_heard(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception('no system') }}")
    body = json.dumps({"model": "one", "messages": [{"role": "system", "content": "a"}]})
    error = refused(asyncio.run(posted(app, "/v1/chat/completions", content=body)), 400)
    assert error["code"] == "refused_by_template" and "no system" in error["message"]


BODIES = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 15_000, b'{"seed": NaN}', b"9" * 9000]


@pytest.mark.parametrize("body", BODIES, ids=lambda x: str(x[:15]))
def test_a_body_that_is_no_json_object(app: Any, body: bytes) -> None:
    error = refused(asyncio.run(posted(app, "/v1/completions", content=body)), 400)
    assert error["code"] == "invalid_json"


def test_a_page_elsewhere_cannot_ask(app: Any) -> None:
    """No other type of body, which a page may send anywhere; no other host; no CORS."""
    body = json.dumps(PLAIN)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = asyncio.run(
            posted(app, "/v1/completions", content=body, headers={"Content-Type": kind})
        )
        refused(reply, 415)
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80"):
        for path in ("/v1/models", "/healthz", "/"):
            reply = asyncio.run(posted(app, path, method="GET", headers={"Host": host}))
            refused(reply, 421)
    for host in ("127.0.0.1:9", "localhost", "LOCALHOST:80", "[::1]:80", "[::1]"):
        reply = asyncio.run(posted(app, "/v1/models", method="GET", headers={"Host": host}))
        assert reply.status_code == 200
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = asyncio.run(posted(app, "/v1/completions", method="OPTIONS", headers=asked))
    refused(reply, 405)
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_without_the_key_nothing_but_health(app: Any) -> None:
    for given in ("", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}",
                  KEY, "Bearer \u00e9"):  # fmt: skip
        head = {"Authorization": given.encode("latin-1")}
        for path in ("/v1/models", "/v1/models/one", "/metrics", "/nowhere"):
            reply = asyncio.run(posted(app, path, method="GET", headers=head))
            refused(reply, 401)
            assert reply.headers["www-authenticate"] == "Bearer"
        refused(asyncio.run(posted(app, "/v1/completions", content=b"{", headers=head)), 401)
        for path in ("/healthz", "/readyz"):
            assert asyncio.run(posted(app, path, method="GET", headers=head)).status_code == 200
    for scheme in ("bearer", "BEARER"):
        head = {"Authorization": f"{scheme} {KEY}"}
        reply = asyncio.run(posted(app, "/v1/models", method="GET", headers=head))
        assert reply.status_code == 200
    refused(asyncio.run(posted(app, "/nowhere", method="GET")), 404)
    for path in ("/docs", "/redoc", "/openapi.json"):
        refused(asyncio.run(posted(app, path, method="GET")), 404)


def test_what_is_counted(engine: Engine) -> None:
    app = build_app(engine, LIMITS)

    async def ask() -> str:
        for model in ("one", "nobody", *(f"made up {i}" for i in range(20))):
            await posted(app, "/v1/completions", content=json.dumps(PLAIN | {"model": model}))
        await posted(app, "/v1/models/one", method="GET")
        await posted(app, "/made-up", method="GET")
        return (await posted(app, "/metrics", method="GET")).text

    text = asyncio.run(ask())
    assert 'gemmate_requests_total{model="one",route="/v1/completions",status="200"} 1.0' in text
    assert 'gemmate_requests_total{model="-",route="/v1/completions",status="404"} 21.0' in text
    assert 'gemmate_requests_total{model="-",route="-",status="404"} 1.0' in text
    assert 'gemmate_tokens_total{direction="out",model="one"} 1.0' in text
    assert "made" not in text.replace("generated", "").replace("# HELP", "")
    for name in ("request_seconds_bucket", "first_token_seconds_count 1.0", "queue_length 0.0",
                 "slots_used 0.0", "slots 16.0", "models 4.0", "memory_bytes"):  # fmt: skip
        assert f"gemmate_{name}" in text


# Over a socket


def test_the_client_drives_it_over_a_socket(address: str, alone: Alone) -> None:
    client = openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0)
    with client:
        for name in NAMES:
            given = {"model": name, "prompt": PROMPTS[0], "max_tokens": 9} | at(name)
            done = client.completions.create(**given)
            assert done.choices[0].text == alone.ask(name, PROMPTS[0], 9, when(name)).text
            chunks = client.completions.create(**given, stream=True)
            assert "".join(c.choices[0].text for c in chunks) == done.choices[0].text
        with pytest.raises(openai.NotFoundError, match="There is no model 'nobody'"):
            client.completions.create(model="nobody", prompt="a")
    with (
        openai.OpenAI(api_key=KEY[1:], base_url=f"{address}/v1", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_a_client_that_goes_away_is_not_worked_for(address: str, engine: Engine) -> None:
    """Mid-stream, before the first piece, and while it waits for the whole."""
    long = {"model": BASE, "prompt": "", "max_tokens": 500}
    head, made = {"Authorization": f"Bearer {KEY}"}, 'tokens_total{direction="out",model="tiny'
    for stream in (True, False):
        before = metric(address, made)
        with (
            httpx.Client(headers=head, timeout=0.3) as http,
            contextlib.suppress(httpx.ReadTimeout),
            http.stream("POST", f"{address}/v1/completions", json=long | {"stream": stream}) as got,
        ):
            kept = got.iter_bytes()  # as long as it lives, the connection does
            assert next(kept) and got.status_code == 200
            assert not engine.idle  # it came while more was to come
        idle(engine)
        end = time.monotonic() + 30
        while (after := metric(address, made)) == before:
            assert time.monotonic() < end
        assert after - before < 500


def metric(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    found = [line for line in text.splitlines() if line.startswith(f"gemmate_{name}")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def test_a_body_is_not_read_beyond_its_limit(address: str) -> None:
    head = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 4096

    with httpx.Client(headers=head) as http:
        for body in (b" " * 20_001, endless()):
            with contextlib.suppress(httpx.WriteError):  # it may be closed on us first
                reply = http.post(f"{address}/v1/completions", content=body)
                refused(reply, 413)
                assert reply.headers["connection"] == "close"  # or it would go on reading
        ok = json.dumps(PLAIN).encode()
        fits = http.post(f"{address}/v1/completions", content=ok + b" " * (20_000 - len(ok)))
        assert fits.status_code == 200
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:  # it says so beforehand
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: "
                    f"application/json\r\nAuthorization: Bearer {KEY}\r\nContent-Length: "
                    "99999999999\r\n\r\n".encode())  # fmt: skip
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_silent_clients_are_sent_away(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PATIENCE", 0.3)
    with listening(app, engine, LIMITS) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        for begun in (b"", b"GET /healthz HTTP/1.1\r\nHost: "):
            with socket.create_connection((host, int(port)), timeout=30) as raw:
                raw.sendall(begun)
                assert raw.recv(100) == b""
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
            raw.sendall(b"GET /hea")
            while raw.recv(4096):
                pass


def test_uvicorn_still_waits_for_ever(app: Any) -> None:
    """A canary: where it does not, gemmate_lib/serve/protocol.py is needed no more."""
    config = uvicorn.Config(app, http="h11", lifespan="off", log_config=None, timeout_keep_alive=0)
    plain = uvicorn.Server(config)
    with server.bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=plain.run, kwargs={"sockets": [listener]})
        thread.start()
        while not plain.started:
            time.sleep(0.01)
        with socket.create_connection(listener.getsockname(), timeout=0.5) as raw:
            raw.sendall(b"GET /")
            with pytest.raises(TimeoutError):
                raw.recv(100)
        plain.should_exit = plain.force_exit = True
        thread.join()


def test_overload_is_answered_at_once(runs: dict[str, Run], alone: Alone) -> None:
    limits = Limits(slots=1, queue=1, connections=4, body_bytes=20_000)
    engine = open_engine(runs, limits=limits)
    app = build_app(engine, limits)
    long = {"model": BASE, "prompt": "", "max_tokens": 500, "stream": True}
    with listening(app, engine, limits) as (address, _), httpx.Client(timeout=60) as http:
        url = f"{address}/v1/completions"
        with http.stream("POST", url, json=long) as first:
            kept = first.iter_bytes()
            assert next(kept)
            with contextlib.ExitStack() as stack:
                waiting = threading.Thread(target=http.post, args=[url], kwargs={"json": PLAIN})
                waiting.start()
                stack.callback(waiting.join)
                end = time.monotonic() + 30
                while engine.load().waiting == 0:
                    assert time.monotonic() < end
                reply = http.post(url, json=PLAIN)
                assert refused(reply, 429)["code"] == "queue_full"
                assert int(reply.headers["retry-after"]) >= 1
                held = [stack.enter_context(socket.create_connection(
                    ("127.0.0.1", int(address.rpartition(":")[2])))) for _ in range(4)]  # fmt: skip
                assert held
                while httpx.get(f"{address}/healthz").status_code != 503:
                    assert time.monotonic() < end
                first.close()
    engine.close()


def test_a_late_answer_is_504(runs: dict[str, Run]) -> None:
    limits = Limits(seconds=0.2)
    engine = open_engine(runs, limits=limits)
    forward = engine._fleet.forward

    def slow(*given: Any) -> Any:
        time.sleep(0.15)
        return forward(*given)

    engine._fleet.forward = slow  # type: ignore[method-assign]
    app = build_app(engine, limits)
    body = json.dumps(PLAIN | {"max_tokens": 50, "model": BASE})
    refused(asyncio.run(posted(app, "/v1/completions", content=body)), 504)
    streamed = json.dumps(json.loads(body) | {"stream": True})
    reply = asyncio.run(posted(app, "/v1/completions", content=streamed))
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert json.loads(events[-1])["error"]["code"] == "timeout"  # it had begun
    idle(engine)
    engine.close()


def test_not_ready_is_503(runs: dict[str, Run]) -> None:
    engine = open_engine({"one": runs["one"]})
    app = build_app(engine, LIMITS)
    engine.close()
    reply = asyncio.run(posted(app, "/v1/completions", content=json.dumps(PLAIN)))
    refused(reply, 503)
    assert int(reply.headers["retry-after"]) > 0
    refused(asyncio.run(posted(app, "/readyz", method="GET")), 503)
    assert asyncio.run(posted(app, "/healthz", method="GET")).status_code == 200


def test_a_failure_tells_nothing_and_logs_no_prompt(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("inside")

    monkeypatch.setattr(engine._fleet, "forward", broken)
    body = json.dumps(PLAIN | {"prompt": "canary-in-a-prompt"})
    error = refused(asyncio.run(posted(app, "/v1/completions", content=body)), 500)
    assert "inside" not in error["message"] and "inside" in caplog.text
    assert "canary" not in caplog.text and KEY not in caplog.text
    assert Path(__file__).exists()
