"""The library as a package that trains by itself: sources, a script, and what it declares.

Nothing is built: an archive that is unpacked, its requirements.txt installed, its task.py run. The
same library gives the same bytes, so its checksum names it.
"""

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from gemmate_lib.cards import shipped
from gemmate_lib.config import GemmateError
from gemmate_lib.manifest import file_sha256, lock_file

if TYPE_CHECKING:
    from packaging.requirements import Requirement

HERE = Path(__file__).parent
TASK = '''\
"""Train as the arguments say: see gemmate_lib/cloud_task.py."""

import runpy

runpy.run_module("gemmate_lib.cloud_task", run_name="__main__")
'''
HEADER = """\
# What the training needs, at the versions of the lock. torch names the CUDA libraries of its own
# build itself: they are not listed, so that an image with another build of this torch keeps it.
"""
# Reading and writing gs://, and signing in there: of the extra `cloud` no more is needed.
ALSO = ("gcsfs",)
PYTHONS = ("3.11", "3.12", "3.13")  # the image may have another than this machine
_BUILD = re.compile(r"(nvidia|cuda|triton)\b")  # what torch's own build needs


def build_package(path: str | Path) -> Path:
    """Write the archive; equal sources give equal bytes. Raises: GemmateError without a lock."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in sorted(_contents()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    Path(path).write_bytes(gzip.compress(packed.getvalue(), mtime=0))
    return Path(path)


def package_sha256() -> str:
    """The checksum of the package that this library makes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return file_sha256(build_package(Path(folder) / "package.tar.gz"))


def _contents() -> Iterator[tuple[str, bytes]]:
    """Name and content of each file: the library, the data cards, the lock, and the script."""
    yield "task.py", TASK.encode()
    yield "requirements.txt", requirements().encode()
    yield "gemmate_lib/assets/constraints.txt", _lock().encode()
    for card in shipped("data_cards", "*").values():
        yield f"gemmate_lib/data_cards/{card.name}", card.read_bytes()
    unwanted = ("__pycache__/", "notebooks/", "benchmarks/", "data_cards/", "constraints.txt")
    for file in HERE.rglob("*"):
        name = file.relative_to(HERE).as_posix()
        if file.is_file() and not any(part in name for part in unwanted):
            yield f"gemmate_lib/{name}", file.read_bytes()


def _lock() -> str:
    if (lock := lock_file()) is None:
        raise GemmateError("There is no lock to take versions from. Install the course anew.")
    return lock.read_text("utf-8")


def requirements() -> str:
    """requirements.txt: all that the library needs to train, at the lock's versions."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = declared()
    lines = re.findall(r"^\w[^\s=]*==[^\n]+", _lock(), re.MULTILINE)
    chosen = (line for line in lines if canonicalize_name(Requirement(line).name) in wanted)
    return HEADER + "".join(f"{line}\n" for line in chosen)


def declared() -> set[str]:
    """Names of what the library declares, and of all that those declare, but for torch's build."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    waiting, seen = ["gemmate-course", *ALSO], set[str]()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another Python or system than this
            continue
        for found in map(Requirement, needed):
            if _applies(found) and not (name == "torch" and _BUILD.match(found.name)):
                waiting.append(found.name)
    return seen - {"gemmate-course"}


def _applies(found: "Requirement") -> bool:
    """Whether a requirement is one on Linux, with some Python that the library runs on."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": ""}
    pythons = ({"python_version": v, "python_full_version": f"{v}.9"} for v in PYTHONS)
    marker = found.marker
    return marker is None or any(marker.evaluate(linux | python) for python in pythons)
