"""A stand-in for the Hub that says one thing to every request."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


class Hub(BaseHTTPRequestHandler):
    """Answers every request with one status and X-Error-Code, and notes what it was asked."""

    answer: tuple[int, str] = (200, "")
    asked: tuple[str, str | None] = ("", None)

    def do_HEAD(self) -> None:
        Hub.asked = (self.path, self.headers.get("Authorization"))
        self.send_response(self.answer[0])
        for name, value in (
            ("X-Error-Code", self.answer[1]),
            ("ETag", "x"),
            ("X-Repo-Commit", "c"),
        ):
            self.send_header(name, value)
        self.send_header("Content-Length", "2")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """The address of a Hub on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
