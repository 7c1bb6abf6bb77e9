"""Storage by fsspec: copies that verify, a manifest that comes last, names that stay inside."""

from pathlib import Path
from typing import Any

import pytest
from test_checkpoints import flip, make

from gemmate_lib.checkpoints import BadCheckpoint
from gemmate_lib.config import GemmateError
from gemmate_lib.storage import FsspecStorage


@pytest.fixture(params=["memory", "folder"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecStorage:
    url = f"memory://{tmp_path.name}/run" if request.param == "memory" else f"{tmp_path}/remote"
    return FsspecStorage(url)


def test_there_and_back(storage: FsspecStorage, tmp_path: Path) -> None:
    assert storage.names() == []
    for step in (2, 10):
        storage.sync_to_storage(make(tmp_path / "c", step, 0.5))
    assert storage.names() == ["checkpoint-10", "checkpoint-2"]
    back = storage.load_from_storage("checkpoint-10", tmp_path / "back")
    assert back.metrics == {"eval_loss": 0.5}
    storage.remove("checkpoint-10")
    assert storage.names() == ["checkpoint-2"]


def test_a_copy_that_was_cut_off_is_no_checkpoint(
    storage: FsspecStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent = type(storage.fs).put_file, []

    def cut(self: Any, here: str, there: str, **options: Any) -> Any:
        sent.append(there)
        if len(sent) == 2:
            raise ConnectionError("cut")
        return real(self, here, there, **options)

    monkeypatch.setattr(type(storage.fs), "put_file", cut)
    with pytest.raises(ConnectionError):
        storage.sync_to_storage(make(tmp_path / "c", 2))
    assert storage.names() == []


def test_what_comes_back_is_verified(tmp_path: Path) -> None:
    storage = FsspecStorage(f"{tmp_path}/remote")
    storage.sync_to_storage(make(tmp_path / "c", 2))
    flip(tmp_path / "remote" / "checkpoint-2" / "adapter_model.safetensors")
    with pytest.raises(BadCheckpoint, match="not what was saved"):
        storage.load_from_storage("checkpoint-2", tmp_path / "back")


@pytest.mark.parametrize("name", ["../x", "checkpoint-2/../../x", "", "checkpoint-"])
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    storage = FsspecStorage(f"{tmp_path}/remote")
    for act in (storage.remove, lambda name: storage.load_from_storage(name, tmp_path)):
        with pytest.raises(GemmateError, match="is not the name of a checkpoint"):
            act(name)


def test_a_protocol_that_nobody_speaks() -> None:
    with pytest.raises(GemmateError, match="Cannot write to nowhere://x"):
        FsspecStorage("nowhere://x")
