"""A second home for checkpoints: any place that fsspec can write to, a folder or a bucket."""

import threading
from pathlib import Path
from typing import Any, Protocol

from gemmate_lib.checkpoints import MANIFEST, Checkpoint, name_of, step_of, verify
from gemmate_lib.config import GemmateError

NOT_COPIED = (".pid", ".lock", ".tmp")  # of those who are at it


class Storage(Protocol):
    """Where checkpoints are copied to and fetched from."""

    remote_path: str

    def sync_to_storage(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint there, its manifest last."""

    def load_from_storage(self, name: str, folder: Path) -> Checkpoint:
        """Fetch a checkpoint into a folder and verify it."""

    def names(self) -> list[str]:
        """The finished checkpoints there, the latest step first."""

    def remove(self, name: str) -> None:
        """Delete a checkpoint there."""


def reach(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises: GemmateError for an unknown one."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise GemmateError(f"Cannot write to {url}: {error}") from None


class FsspecStorage:
    """Storage at an fsspec URL such as gs://bucket/run, s3://bucket/run, memory://run or a path.

    Raises: GemmateError for a protocol that no installed package speaks.
    Source: https://filesystem-spec.readthedocs.io
    """

    def __init__(self, remote_path: str) -> None:
        self.remote_path = remote_path.rstrip("/")
        self.fs, self.root = reach(self.remote_path)

    def sync_to_storage(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint there, its manifest last: what was cut off is not a checkpoint."""
        for name in (*checkpoint.manifest["files"], MANIFEST):
            self.put(checkpoint.path / name, f"{checkpoint.path.name}/{name}")

    def put(self, file: Path, name: str) -> None:
        """Copy one file there, under this name."""
        there = f"{self.root}/{name}"
        self.fs.makedirs(there.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(file), there)

    def load_from_storage(self, name: str, folder: Path) -> Checkpoint:
        """Fetch a checkpoint into a folder and verify it; the manifest comes last here too.

        Raises: BadCheckpoint where what came is not what was saved.
        """
        files = [str(path) for path in self.fs.find(f"{self.root}/{_plain(name)}")]
        for there in sorted(files, key=lambda path: path.endswith(f"/{MANIFEST}")):
            inner = there.partition(f"/{name}/")[2]
            here = (folder / name / inner).resolve()
            if not here.is_relative_to((folder / name).resolve()):
                raise GemmateError(f"{there} would leave {folder}. It is not fetched.")
            here.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(there, str(here))
        return verify(folder / name)

    def names(self) -> list[str]:
        """The finished checkpoints there, the latest step first."""
        if not self.fs.exists(self.root):
            return []
        listed = [str(path).rstrip("/").rpartition("/")[2] for path in self._entries()]
        steps = {name: step for name in listed if (step := step_of(name)) is not None}
        whole = [name for name in steps if self.fs.exists(f"{self.root}/{name}/{MANIFEST}")]
        return sorted(whole, key=lambda name: steps[name], reverse=True)

    def _entries(self) -> list[Any]:
        self.fs.invalidate_cache()
        return list(self.fs.ls(self.root, detail=False))

    def remove(self, name: str) -> None:
        """Delete a checkpoint there."""
        self.fs.rm(f"{self.root}/{_plain(name)}", recursive=True)


class Mirror:
    """Copies a folder that grows to an fsspec URL: each time what is new or changed in it."""

    def __init__(self, remote_path: str) -> None:
        self.storage, self.copied = FsspecStorage(remote_path), dict[str, tuple[int, int]]()
        self._alone = threading.Lock()

    def copy(self, folder: Path) -> int:
        """Copy; the number of files. Raises: what the storage raises."""
        with self._alone:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            changed = 0
            for file in (f for f in files if not f.is_symlink() and f.suffix not in NOT_COPIED):
                name, about = file.relative_to(folder).as_posix(), file.stat()
                stamp = (about.st_size, about.st_mtime_ns)
                if self.copied.get(name) != stamp:
                    self.storage.put(file, name)
                    self.copied[name] = stamp
                    changed += 1
            return changed


def _plain(name: str) -> str:
    if step_of(name) is None:
        raise GemmateError(f"{name!r} is not the name of a checkpoint, such as {name_of(100)}.")
    return name
