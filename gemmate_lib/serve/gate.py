"""What every request passes first: the host it names, the key, the count; in plain ASGI.

No middleware of a framework: those read the body before anybody can say that it is too long.
"""

import hmac
import json
import time
from collections.abc import Collection
from typing import Any

from gemmate_lib.serve.limits import Refused
from gemmate_lib.serve.meters import Meters

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Free of the key: whether it lives, and the page, which holds no secret and asks for the key.
FREE = frozenset({"/", "/healthz", "/readyz"})
UNREAD = (401, 408, 413, 415, 421)  # said before the body is read, which is then not waited for
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(refused: Refused) -> dict[str, Any]:
    """An error in OpenAI's form."""
    status = refused.status
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": str(refused), "type": kind, "param": refused.param,
                      "code": refused.code}}  # fmt: skip


def headers_of(refused: Refused) -> dict[str, str]:
    """The headers that go with an error."""
    found = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    if refused.status in UNREAD:
        found["Connection"] = "close"
    if refused.retry_after is not None:
        found["Retry-After"] = str(refused.retry_after)
    return found


class Gate:
    """An ASGI application in front of another one."""

    def __init__(
        self, app: Any, *, meters: Meters, key: str | None, hosts: Collection[str] | None
    ) -> None:
        self._app, self._meters, self._hosts = app, meters, hosts
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it with its status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # until it is known: the client went away

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            await _answer(refused, counted)
        else:
            await self._app(scope, receive, counted)
        finally:
            found = scope.get("route")
            route = getattr(found, "path", None) or "-"
            model = scope.get("state", {}).get("model")
            self._meters.request(route, status, model, time.monotonic() - began)

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self._hosts:
                raise Refused("This server answers under its own address alone.", status=421,
                              code="wrong_host")  # fmt: skip
        if self._key is None or scope["path"] in FREE:
            return
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise Refused("A key is needed: Authorization: Bearer KEY.", status=401,
                          code="invalid_api_key")  # fmt: skip


async def _answer(refused: Refused, send: Any) -> None:
    body = json.dumps(error_body(refused)).encode()
    found = headers_of(refused) | {"Content-Type": "application/json",
                                   "Content-Length": str(len(body))}  # fmt: skip
    headers = [(name.lower().encode(), value.encode()) for name, value in found.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
