"""The server around the API: where it listens, who may ask, and how it stops."""

import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError
from gemmate_lib.extras import need
from gemmate_lib.serve.limits import Limits

KEY = "GEMMATE_SERVE_KEY"
_SHORTEST = 16


def check_installed() -> None:
    """Raise GemmateError where the packages of a server are missing."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        need(package, "Serving", extra="serve")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach the host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(file: Path | None, *, host: str) -> str | None:
    """The bearer key, from a file or the environment; None where none is set and none is needed.

    Raises: GemmateError where a host that others can reach has no key, or one that is guessed.
    """
    key = (file.read_text("utf-8") if file else os.environ.get(KEY, "")).strip()
    if not key:
        if file:
            raise GemmateError(f"{file} holds no key. Write one into it.")
        if not is_loopback(host):
            problem = f"Others can reach {host}, so a key is needed"
            raise GemmateError(f"{problem}. Set {KEY}, or give --key-file FILE.")
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise GemmateError("The key holds what no header can. Use letters, digits, - and _.")
    if len(key) < _SHORTEST and not is_loopback(host):
        problem = f"A key of {len(key)} characters is soon guessed"
        raise GemmateError(f"{problem}. Use {_SHORTEST} or more: openssl rand -hex 24.")
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on; port 0 takes a free one. Raises: GemmateError where it cannot."""
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((bare, port))
    except OSError as error:
        made.close()
        why = (error.strerror or str(error)).lower()
        raise GemmateError(
            f"Cannot listen on {host}:{port}: {why}. Choose another --port."
        ) from None
    return made


def address_of(listener: socket.socket) -> str:
    """Where a socket is reached, as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Any, engine: Any, listener: socket.socket, *, limits: Limits,
        started: Callable[[], None] | None = None) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT, which let finish what runs; a second one ends it at once."""
    server = make_server(app, engine, limits=limits, started=started)
    try:
        server.run(sockets=[listener])
    finally:
        engine.close(0 if server.force_exit else limits.seconds)


def make_server(app: Any, engine: Any, *, limits: Limits,
                started: Callable[[], None] | None = None) -> Any:  # fmt: skip
    """Make uvicorn's server, which drains the engine before it closes a socket."""
    import uvicorn

    from gemmate_lib.serve.protocol import PATIENCE, Impatient

    class Server(uvicorn.Server):
        """Asked to stop, it answers 503 to what is new until what runs is finished."""

        stopping = False

        def handle_exit(self, *_: Any) -> None:
            if self.stopping:
                self.should_exit = self.force_exit = True
            self.stopping = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if started:
                started()

        async def on_tick(self, counter: int) -> bool:
            if self.stopping:
                engine.drain()
                self.should_exit = self.should_exit or engine.idle
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False,
        http=Impatient, ws="none", lifespan="off", timeout_keep_alive=PATIENCE,
        limit_concurrency=limits.connections + 1,  # uvicorn refuses the one that reaches it
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )  # fmt: skip
    return Server(config)
