"""A page in headless Chromium: what ran in it, and what it asked for."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BINARY = next(filter(None, map(shutil.which, NAMES)), None)
WITHOUT = "no Chromium here: pages were only read, not opened"


def witness(name: str) -> str:
    """JavaScript without a quote or a comma that leaves a mark on the page's root: data-NAME."""
    return f"document.documentElement.dataset.{name}=1"


class Root(HTMLParser):
    """The marks on a page's root."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.marks: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            self.marks |= {key.removeprefix("data-") for key, _ in attrs if key[:5] == "data-"}


class Seen(NamedTuple):
    """What a page did when it was opened."""

    ran: set[str]  # the witnesses
    asked: set[str]  # the paths it asked the local server for
    dom: str


class _Beacon(BaseHTTPRequestHandler):
    asked: set[str]

    def do_GET(self) -> None:
        self.asked.add(self.path.strip("/"))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def beacon() -> Iterator[tuple[str, set[str]]]:
    """The address of a server on this machine, and the paths that it was asked for."""
    asked: set[str] = set()
    handler = type("Beacon", (_Beacon,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def look(page: Path, asked: set[str], profile: Path) -> Seen:
    """Open a page for two of its seconds."""
    asked.clear()
    command = [str(BINARY), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=2000", f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Seen(Root(done.stdout).marks, set(asked), done.stdout)


def without_policy(page: Path) -> Path:
    """A copy of the page that forbids nothing: what it escapes must hold by itself."""
    html, count = re.subn(r"<meta http-equiv=[^>]*>", "", page.read_text("utf-8"))
    assert count == 1
    copy = page.with_name(f"open-{page.name}")
    copy.write_text(html, "utf-8")
    return copy
