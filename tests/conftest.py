"""What every test shares: one quiet thread, a place for runs, a small trained run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GEMMATE_PROFILE"] = "tiny"
os.environ["HF_HUB_OFFLINE"] = "1"

from gemmate_lib import machine

machine.quiet()
machine.prepare(seed=0, threads=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, or one worker ends with it while the other one has nothing to do."""
    items.sort(key=lambda item: "whole_rebuild" not in item.nodeid)


@pytest.fixture(autouse=True)
def runs_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the runs of tests out of the checkout."""
    monkeypatch.setenv("GEMMATE_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """Return the path of a file of real data; skip where there is none."""

    def find(name: str) -> Path:
        folder = os.environ.get("GEMMATE_REAL_DATA")
        if not folder:
            pytest.skip("GEMMATE_REAL_DATA names no folder of real data")
        return Path(folder) / name

    return find


@pytest.fixture(scope="session")
def experiment() -> Callable[..., Any]:
    """Resolve the quotes experiment for the tiny profile with overrides."""
    from gemmate_lib.config import Facts, resolve

    def make(**overrides: Any) -> Any:
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        return resolve("quotes", facts=Facts(), profile="tiny", overrides=given).experiment

    return make
