"""A Hub on the loopback that stores what it is sent, and that fails when it is told to.

It speaks what huggingface_hub 2.4, with xet off, asks for in a push and a pull: a repository with
its commits, small files in the commit itself and large ones as LFS objects, ranges of a file.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

import pytest

SECRET = "hf_thisIsNoRealToken"  # pragma: allowlist secret
LARGE = (".safetensors", ".model")  # goes up as an LFS object, as the Hub's .gitattributes says
NAME, REV = r"([^/]+/[^/]+)", r"([^/]+)"
# huggingface_hub 2.4 hands httpx2 the file of an LFS upload as `data`; delete once it is `content`.
KNOWN = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Failure = Literal["cut", "reset", "lost", "silent"] | int
Files = dict[str, bytes]
Answer = tuple[int, dict[str, str], bytes]


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next requests that fit.

    failure: a status; "cut" or "reset", where the connection ends in the middle of the body, for a
    GET that of the answer; "lost", where all is done and nothing answered; "silent" for no answer.
    """

    match: str  # in "METHOD /path?query"
    failure: Failure
    times: int
    headers: dict[str, str]
    body: str | None  # instead of the Hub's JSON


@dataclasses.dataclass
class Repository:
    """All files of each commit, by its hash; the last one is what is seen."""

    private: bool
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)

    def commit(self, files: Files) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files.items())}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class HubServer(ThreadingHTTPServer):
    """What the Hub holds, what it was asked, and what it is to fail at."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.mistakes: list[BaseException] = []  # of this server
        self.closing, self.lock = threading.Event(), threading.RLock()

    def add(self, name: str, *, private: bool = True) -> Repository:
        """A repository as the Hub makes it, with its first commit."""
        made = self.repositories[name] = Repository(private)
        made.commit({".gitattributes": "".join(f"*{e} filter=lfs\n" for e in LARGE).encode()})
        return made

    def files(self, name: str = "ada/quotes") -> Files:
        """What somebody sees in a repository, but for what the Hub made; {} where there is none."""
        found = self.repositories.get(name)
        shown = found.commits[found.head] if found else {}
        return {path: content for path, content in shown.items() if path != ".gitattributes"}

    def fail(
        self,
        match: str,
        failure: Failure,
        *,
        times: int = 1,
        body: str | None = None,
        **headers: str,
    ) -> None:
        """Let the next requests that fit fail."""
        self.faults.append(Fault(match, failure, times, headers, body))

    def count(self, pattern: str) -> int:
        """How many requests were like this."""
        return sum(bool(re.search(pattern, line)) for line in self.asked)

    def next_fault(self, line: str) -> Fault | None:
        with self.lock:
            self.asked.append(line)
            fault = next((f for f in self.faults if f.times and f.match in line), None)
            if fault:
                fault.times -= 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a connection that ended; what the handler gets wrong is in `mistakes`


class Refused(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, said: str, code: str | None = None) -> None:
        super().__init__(said)
        self.answer: Answer = (
            status,
            {"X-Error-Message": said} | ({"X-Error-Code": code} if code else {}),
            json.dumps({"error": said}).encode(),
        )


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer
    routes: ClassVar = {
        "create": r"POST /api/repos/create",
        "validate": r"POST /api/validate-yaml",
        "info": rf"GET /api/models/{NAME}(?:/revision/{REV})?",
        "tree": rf"GET /api/models/{NAME}/tree/{REV}",
        "preupload": rf"POST /api/models/{NAME}/preupload/{REV}",
        "batch": rf"POST /{NAME}\.git/info/lfs/objects/batch",
        "verify": rf"POST /{NAME}\.git/info/lfs/verify",
        "store": r"PUT /storage/(\w+)",
        "commit": rf"POST /api/models/{NAME}/commit/{REV}",
        "resolve": rf"(?:GET|HEAD) /{NAME}/resolve/{REV}/(.+)",
    }

    def _any(self) -> None:
        try:
            self._respond()
        except ConnectionError:
            self.close_connection = True
        except BaseException as error:
            self.server.mistakes.append(error)
            raise

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _respond(self) -> None:
        fault = self.server.next_fault(f"{self.command} {self.path}")
        failure = fault.failure if fault else None
        length = int(self.headers.get("Content-Length") or 0)
        if failure in ("cut", "reset") and self.command != "GET":
            self.rfile.read(length // 2)
            return self._hang_up(reset=failure == "reset")
        body = self.rfile.read(length)
        if failure == "silent":
            self.server.closing.wait(30)
            return self._hang_up()
        if fault and isinstance(failure, int):
            phrase = HTTPStatus(failure).phrase
            said = json.dumps({"error": phrase}) if fault.body is None else fault.body
            headers = {"X-Error-Message": phrase} | fault.headers
            return self._answer((failure, headers, said.encode()))
        answer = self._do(body)
        if failure == "lost":
            return self._hang_up()
        if failure in ("cut", "reset"):
            self._answer(answer, share=0.5)
            return self._hang_up(reset=failure == "reset")
        return self._answer(answer)

    def _answer(self, answer: Answer, *, share: float = 1.0) -> None:
        status, headers, content = answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: int(len(content) * share)])

    def _hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:  # by an RST: what the other side has not read yet is gone
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _do(self, body: bytes) -> Answer:
        path = unquote(urlsplit(self.path).path)
        for name, route in self.routes.items():
            if found := re.fullmatch(route, f"{self.command} {path}"):
                with self.server.lock:
                    try:
                        if name != "store":
                            self._let_in()
                        done = getattr(self, f"_{name}")(body, *found.groups())
                    except Refused as refused:
                        return refused.answer
                if isinstance(done, tuple):
                    return done
                return 200, {"Content-Type": "application/json"}, json.dumps(done).encode()
        raise AssertionError(f"nobody answers {self.command} {path}")

    def _let_in(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {SECRET}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def _found(self, name: str) -> Repository:
        if name not in self.server.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[name]

    def _at(self, name: str, revision: str) -> tuple[str, Files]:
        found = self._found(name)
        sha = found.head if revision == "main" else revision
        if sha not in found.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, found.commits[sha]

    # What is asked

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'ada'}/{asked['name']}"
        done = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.repositories:
            error = "You already created this model repo"
            return 409, {}, json.dumps(done | {"error": error}).encode()
        self.server.add(name, private=asked["visibility"] == "private")
        return done

    def _validate(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def _info(self, body: bytes, name: str, revision: str | None) -> Any:
        sha, files = self._at(name, revision or "main")
        private, siblings = self._found(name).private, [{"rfilename": path} for path in files]
        return {"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": []}

    def _tree(self, body: bytes, name: str, revision: str) -> Any:
        _, files = self._at(name, revision)
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            | ({"lfs": _pointer(content)} if path.endswith(LARGE) else {})
            for path, content in files.items()
        ]

    def _preupload(self, body: bytes, name: str, revision: str) -> Any:
        _, files = self._at(name, revision)
        answers = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            large, known = path.endswith(LARGE), files.get(path)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if known is not None:
                answer["oid"] = _sha256(known) if large else _git_hash(known)
            answers.append(answer | {"shouldIgnore": False})
        return {"files": answers}

    def _batch(self, body: bytes, name: str) -> Any:
        self._found(name)
        asked, address = json.loads(body), self.server.address
        assert asked["operation"] == "upload" and "basic" in asked["transfers"]
        objects = []
        for wanted in asked["objects"]:
            upload = {"href": f"{address}/storage/{wanted['oid']}?X-Amz-Signature=signed"}
            verify = {"href": f"{address}/{name}.git/info/lfs/verify"}
            there = wanted["oid"] in self.server.objects
            objects.append(
                wanted | ({} if there else {"actions": {"upload": upload, "verify": verify}})
            )
        return {"transfer": "basic", "objects": objects}

    def _store(self, body: bytes, oid: str) -> Any:
        assert "Authorization" not in self.headers  # the storage is not the Hub's
        if _sha256(body) != oid:
            raise Refused(400, "The content does not match its SHA-256")
        self.server.objects[oid] = body
        return {}

    def _verify(self, body: bytes, name: str) -> Any:
        asked = json.loads(body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "Object not found")
        return {}

    def _commit(self, body: bytes, name: str, revision: str) -> Any:
        head, files = self._at(name, revision)
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.server.objects[value["oid"]]
        sha = self._found(name).commit(files)
        url = f"{self.server.address}/{name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> Any:
        sha, files = self._at(name, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content, whole = files[path], len(files[path])
        etag = _sha256(content) if path.endswith(LARGE) else _git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            return 206, headers, content[start:]
        return 200, headers, content

    def log_message(self, *args: Any) -> None:
        pass


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(content: bytes) -> dict[str, Any]:
    return {"oid": _sha256(content), "size": len(content), "pointerSize": 134}


@contextlib.contextmanager
def logged_in(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[HubServer]:
    """A Hub that huggingface_hub takes for the real one, and somebody with a token for it."""
    from huggingface_hub import close_session, constants

    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    try:
        yield server
    finally:
        server.closing.set()
        close_session()
        server.shutdown()
        server.server_close()
    assert server.mistakes == []
