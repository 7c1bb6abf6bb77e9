"""Folders to a bucket and back, with fsspec's file system in memory and a folder."""

import json
from pathlib import Path

import fsspec
import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.transfer import SUMS, download, only_file, upload


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty place."""
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/there"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/train.jsonl").write_text('{"text": "é\\n"}\n', "utf-8")
    (tmp_path / "data/deep/bytes").write_bytes(bytes(range(256)) * 100)
    return tmp_path / "data"


def test_there_and_back(url: str, folder: Path, tmp_path: Path) -> None:
    sums = upload(folder, url)
    assert set(sums) == {"train.jsonl", "deep/bytes"}
    back = download(url, tmp_path / "back")
    for name in sums:
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert only_file(back) == back


def test_one_file(url: str, folder: Path, tmp_path: Path) -> None:
    upload(folder / "train.jsonl", url)
    assert only_file(download(url, tmp_path / "back")).name == "train.jsonl"


def test_a_file_changed_on_its_way_is_refused(url: str, folder: Path, tmp_path: Path) -> None:
    upload(folder, url)
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/deep/bytes", b"other")
    with pytest.raises(GemmateError, match="deep/bytes is not what was put there"):
        download(url, tmp_path / "back")
    assert not (tmp_path / "back/deep/bytes").exists()


def test_what_lies_here_whole_is_not_fetched_again(url: str, folder: Path, tmp_path: Path) -> None:
    upload(folder, url)
    back = download(url, tmp_path / "back")
    (back / "train.jsonl").write_text("spoilt")
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{root}/deep/bytes")
    download(url, back)
    assert (back / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()


def test_what_was_cut_off_is_not_there(url: str, folder: Path, tmp_path: Path) -> None:
    upload(folder, url)
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{root}/{SUMS}")
    with pytest.raises(GemmateError, match="nothing was put there whole"):
        download(url, tmp_path / "back")


def test_no_name_leads_out_of_the_folder(url: str, folder: Path, tmp_path: Path) -> None:
    upload(folder, url)
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/{SUMS}", json.dumps({"../evil": "0"}).encode())
    fs.pipe_file(f"{root}/../evil", b"evil")
    with pytest.raises(GemmateError, match="not inside of"):
        download(url, tmp_path / "mine/back")
    assert not (tmp_path / "mine/evil").exists()


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="holds no file to copy"):
        upload(tmp_path / "nowhere", "memory://x")
    with pytest.raises(GemmateError, match="Cannot write to nonsense://x"):
        upload(Path(__file__), "nonsense://x")
