"""What every fault's test shares: a row of the table that `make faults` prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

HUB = "https://huggingface.co"


@pytest.fixture
def note(
    record_property: Callable[[str, object], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Put down the fault, what becomes of the run, and what its user reads: never a traceback."""

    def write(fault: str, outcome: str, said: object = "") -> None:
        text = str(said).replace(str(tmp_path), "DIR").strip()
        if "hub" in request.fixturenames:
            text = text.replace(request.getfixturevalue("hub").address, HUB)
        assert "\n" not in text and "Traceback" not in text and len(text) < 500, text
        for key, value in (("fault", fault), ("outcome", outcome), ("said", text)):
            record_property(key, value)

    return write
