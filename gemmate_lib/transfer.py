"""Folders to a bucket and back, each file checked: gs://, memory:// or a path, by fsspec.

The list of checksums goes up last and is read first: what was cut off is not there.
"""

import json
from pathlib import Path

from gemmate_lib.config import GemmateError
from gemmate_lib.manifest import file_sha256
from gemmate_lib.storage import FsspecStorage, reach
from gemmate_lib.trust import inside

SUMS = "SHA256SUMS.json"


def upload(source: str | Path, url: str) -> dict[str, str]:
    """Copy a file or a folder to a URL; the SHA-256 of each file by its name there.

    Raises: GemmateError for nothing to copy, or a URL that no installed package speaks.
    """
    path, storage = Path(source), FsspecStorage(url)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    if not files:
        raise GemmateError(f"{source} holds no file to copy. Check the path.")
    base = path.parent if path.is_file() else path
    sums = {file.relative_to(base).as_posix(): file_sha256(file) for file in files}
    for name in sums:
        storage.put(base / name, name)
    storage.fs.pipe_file(f"{storage.root}/{SUMS}", json.dumps(sums, indent=1).encode())
    return sums


def download(url: str, folder: str | Path) -> Path:
    """Fetch what `upload` put at a URL into a folder, but for what is there, and check every file.

    Raises: GemmateError where nothing was put there, or a file is not what was put there.
    """
    (fs, root), folder = reach(url), Path(folder)
    try:
        sums = json.loads(fs.cat_file(f"{root}/{SUMS}"))
    except FileNotFoundError:
        problem = f"{url} holds no {SUMS}, so nothing was put there whole"
        raise GemmateError(f"{problem}. Copy it with: gemmate cloud upload SOURCE {url}") from None
    for name, expected in sums.items():
        here = inside(folder, name)
        here.parent.mkdir(parents=True, exist_ok=True)
        if not (here.is_file() and file_sha256(here) == expected):
            fs.get_file(f"{root}/{name}", str(here))
        if file_sha256(here) != expected:
            here.unlink()
            raise GemmateError(f"{url}/{name} is not what was put there. Copy it again.")
    return folder


def only_file(folder: Path) -> Path:
    """The file of a folder that holds one alone, else the folder."""
    files = list(folder.iterdir())
    return files[0] if len(files) == 1 and files[0].is_file() else folder
