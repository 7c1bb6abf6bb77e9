"""The API, in OpenAI's form: models, completions and chats, at once or as a stream of events."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from gemmate_lib.serve.answers import Answer, too_late
from gemmate_lib.serve.engine import Engine, Served
from gemmate_lib.serve.forms import ChatForm, CompletionForm, Wanted, read_form
from gemmate_lib.serve.gate import LOOPBACK, Gate, error_body, headers_of
from gemmate_lib.serve.limits import Limits, Refused
from gemmate_lib.serve.meters import Meters
from gemmate_lib.serve.page import add_page
from gemmate_lib.serve.writers import ChatWriter, Writer

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gemmate_lib.serve.follow import TagFollower

GRACE = 5.0  # seconds beyond a request's own, for the client to read the end


def build_app(
    engine: Engine,
    limits: Limits,
    key: str | None = None,
    *,
    hosts: Collection[str] | None = LOOPBACK,
    follower: "TagFollower | None" = None,
) -> FastAPI:
    """Build the application over an engine.

    key: what a client has to send as a bearer; None: nothing. hosts: the names it may be called
    by, whatever the port; None: any. follower: of the tags that are served, to tell of them.
    """
    app = FastAPI(title="GemmaTE", docs_url=None, redoc_url=None, openapi_url=None)
    meters = Meters(engine)
    add_page(app)
    if follower:
        meters.follow(follower)
    _add_health(app, engine, meters, follower)
    _add_models(app, engine)
    _add_completions(app, engine, limits, meters)
    _add_errors(app)

    def gated(inner: "ASGIApp") -> Gate:
        return Gate(inner, meters=meters, key=key, hosts=hosts)

    app.add_middleware(gated)
    return app


def _add_health(
    app: FastAPI, engine: Engine, meters: Meters, follower: "TagFollower | None"
) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        if not engine.ready:
            raise Refused("Not ready.", status=503, retry_after=5, code="not_ready")
        tags = follower.state() if follower else {}
        told = {
            tag: {"version": at.version, "behind": at.fault is not None} for tag, at in tags.items()
        }
        return {"status": "ready"} | ({"tags": told} if told else {})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(served) for served in engine.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = {served.name: served for served in engine.models()}
        if name not in found:
            raise Refused(f"There is no model {name!r}. See /v1/models.", status=404,
                          code="model_not_found", param="model")  # fmt: skip
        return _card(found[name])


def _card(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created,
            "owned_by": "gemmate", "time_aware": served.time_aware,
            "digest": served.digest}  # fmt: skip


def _add_completions(app: FastAPI, engine: Engine, limits: Limits, meters: Meters) -> None:
    async def answered(request: Request, form: type[Wanted], writer: type[Writer]) -> Response:
        wanted = read_form(form, await _body(request, limits))
        request.state.model = wanted.model
        prompt = wanted.prompt_by(engine.tokenizer)
        answer = await asyncio.to_thread(engine.submit, wanted.ask(prompt))
        write = writer(wanted, answer)

        def done() -> None:
            answer.cancel()
            meters.answer(answer)

        try:
            if wanted.stream:
                return await _stream(write, answer, request, done)
            text = "".join(await _while_there(_all(answer), request, answer))
        except BaseException:
            done()
            raise
        done()
        return JSONResponse(write.whole(text))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answered(request, CompletionForm, Writer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answered(request, ChatForm, ChatWriter)


async def _body(request: Request, limits: Limits) -> bytes:
    """Read the body, no byte more than there may be."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin cannot send this one unasked
        raise Refused("Send Content-Type: application/json.", status=415, code="wrong_type")
    too_long = Refused(f"The body is longer than {limits.body_bytes} bytes. Shorten it.",
                       status=413, code="body_too_long")  # fmt: skip
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > limits.body_bytes:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise Refused("The body did not come.", status=408, code="timeout") from None
    return b"".join(parts)


async def _all(answer: Answer) -> list[str]:
    return [piece async for piece in answer]


async def _while_there(wanted: Any, request: Request, answer: Answer) -> Any:
    """Await, until the client has gone or the time is over; the answer is cancelled then."""
    work = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_gone(request))
    left = answer.deadline - time.monotonic() + 1  # the engine says it itself, unless it hangs
    try:
        await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        answer.cancel()
        if gone.done():
            raise Refused("The client has gone.", status=499)
        raise too_late(answer.deadline - answer.began)
    finally:
        for task in (work, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refused):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream that lets its answer go, however it ends: read to the end, or left, or too slow."""

    def __init__(self, events: AsyncIterator[bytes], answer: Answer, done: Callable[[], None]):
        head = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=head)
        self._answer, self._done = answer, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        left = self._answer.deadline - time.monotonic() + GRACE
        try:
            async with asyncio.timeout(left):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # a client that does not read keeps nothing open
            pass
        finally:
            self._done()


async def _stream(
    write: Writer, answer: Answer, request: Request, done: Callable[[], None]
) -> Response:
    """Begin a stream with its first piece, so that what fails before has a status of its own."""
    pieces = aiter(answer)

    async def first() -> str | None:
        return await anext(pieces, None)

    async def events() -> AsyncIterator[bytes]:
        try:
            for event in write.begin():
                yield _event(event)
            piece = begun
            while piece is not None:
                yield _event(write.piece(piece))
                piece = await anext(pieces, None)
            for event in write.end():
                yield _event(event)
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield _event(error_body(refused))

    begun = await _while_there(first(), request, answer)
    return EventStream(events(), answer, done)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # no such path, or method
            error = Refused(str(error.detail), status=error.status_code)
        elif not isinstance(error, Refused):
            error = Refused("The server failed.", status=500)
        return JSONResponse(error_body(error), error.status, headers=headers_of(error))

    for kind in (Refused, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, refused)
