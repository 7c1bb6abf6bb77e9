"""What the tests of serving have in common; a file with runs of its own takes those."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving import Alone

    from gemmate_lib.sft import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Run]":
    """Two plain runs that differ, and one that knows the time."""
    from serving import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs: "dict[str, Run]") -> "Alone":
    """What each of them says alone."""
    from serving import Alone

    return Alone(runs)
