"""A place that fsspec reads and writes, a folder or a bucket, and what is said when it fails."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from gemmate_lib import retry
from gemmate_lib.config import GemmateError
from gemmate_lib.manifest import write_whole
from gemmate_lib.storage import FsspecStorage


class Place:
    """A folder, or what lies at an fsspec URL; what is in it is named by parts of a path.

    Raises: GemmateError for an address that no installed package reads, and where it fails.
    """

    def __init__(self, url: str | Path) -> None:
        from fsspec.implementations.local import LocalFileSystem

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what we say ourselves
        self.storage = FsspecStorage(str(url))
        self.fs, self.root = self.storage.fs, self.storage.root
        self.local = isinstance(self.fs, LocalFileSystem)

    def at(self, *parts: str) -> str:
        """The path of something in it, as its file system has it."""
        return "/".join((self.root, *parts))

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing where there is no such folder."""
        with self.speaking("read"):
            self.fs.invalidate_cache()
            try:
                listed = self.fs.ls(self.at(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in listed)

    def read(self, *parts: str) -> bytes | None:
        """A file's bytes; None where there is none."""
        with self.speaking("read"):
            try:
                return bytes(self.fs.cat_file(self.at(*parts)))
            except FileNotFoundError:
                return None

    def sha256(self, *parts: str) -> str | None:
        """A file's SHA-256, read piece by piece; None where there is none."""
        with self.speaking("read"):
            try:
                with self.fs.open(self.at(*parts), "rb") as stream:
                    return hashlib.file_digest(stream, "sha256").hexdigest()
            except FileNotFoundError:
                return None

    def get(self, here: Path, *parts: str) -> None:
        """Copy a file from there; nothing is copied where there is none."""
        here.parent.mkdir(parents=True, exist_ok=True)
        with self.speaking("read"), contextlib.suppress(FileNotFoundError):
            self.fs.get_file(self.at(*parts), str(here))

    def put(self, here: Path, *parts: str) -> None:
        """Copy a file there."""
        with self.speaking("write to"):
            self.storage.put(here, "/".join(parts))

    def replace(self, text: str, *parts: str) -> None:
        """Write a small file: in a folder whole or not at all, elsewhere as the storage does."""
        with self.speaking("write to"):
            there = self.at(*parts)
            self.fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            if self.local:
                write_whole(Path(there), text)
            else:
                self.fs.pipe_file(there, text.encode())

    @contextlib.contextmanager
    def alone(self, *parts: str) -> Iterator[None]:
        """Be the only process that changes a file; elsewhere than in a folder nothing is locked."""
        if not self.local:
            yield
            return
        lock = Path(f"{self.at(*parts)}.lock")
        with self.speaking("write to"):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                yield

    @contextlib.contextmanager
    def speaking(self, doing: str) -> Iterator[None]:
        """Say in a sentence what a storage fails at: each has exceptions of its own."""
        try:
            yield
        except GemmateError:
            raise
        except Exception as error:
            said = f"Cannot {doing} the registry: {retry.words(error)}"
            remedy = "Check the address, your permission there and the network."
            raise GemmateError(f"{said}. {remedy}") from error
