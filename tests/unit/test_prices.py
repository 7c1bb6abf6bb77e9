"""The table of prices, and the estimates that are made of it."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemmate_lib.config import GemmateError
from gemmate_lib.prices import (
    SHARES,
    STALE,
    STARTUP,
    TABLE,
    Machine,
    estimate,
    find_machine,
    listing,
    operations,
    read_prices,
    report,
    warning,
)

T4 = {"machine": "n1-standard-8", "accelerator": "NVIDIA_TESLA_T4", "count": 1,
      "capability": [7, 5], "memory_gib": 14.6, "tflops": 65, "usd": 1.0, "usd_spot": 0.25,
      "as_of": "2026-01-01", "regions": ["us-central1"]}  # fmt: skip


BATCH = "training.batch_size=8"  # in each of four batches, on a T4


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"machines": list(rows)}))
    return path


def test_the_shipped_table_is_sound() -> None:
    rows = read_prices()
    assert len({row.machine for row in rows}) == len(rows) >= 8
    for row in rows:
        assert row.usd or row.usd_spot
        assert row.usd is None or row.usd_spot is None or row.usd_spot < row.usd
        assert "us-central1" in row.regions and row.as_of <= date.today()
        assert ("gpu" in row.machine) <= (row.machine.split("-")[2] == f"{row.count}g")
    assert yaml.safe_load(TABLE.read_text("utf-8"))["source"].startswith("https://")


def test_vertex_knows_each_accelerator_and_region() -> None:
    from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS
    from google.cloud.aiplatform_v1.types import AcceleratorType

    for row in read_prices():
        assert row.accelerator in AcceleratorType.__members__
        assert set(row.regions) <= SUPPORTED_REGIONS


def test_old_prices_are_warned_of() -> None:
    fresh, old = (Machine.model_validate(T4 | {"as_of": date.today() - timedelta(days=days)})
                  for days in (STALE, STALE + 1))  # fmt: skip
    assert not fresh.stale() and old.stale() and not warning([fresh])
    assert f"from {old.as_of} on are over 180 days old" in warning([fresh, old])[0]
    assert listing([old])[-1] == warning([old])[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"usd": -1}, "row 1: usd: "),
        ({"cost": 1}, "row 1: cost: "),
        ({"as_of": "soon"}, "row 1: as_of: "),
        ({"regions": None}, "row 1: regions: "),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", T4, T4 | change)
    with pytest.raises(GemmateError, match=said):
        read_prices(path)


@pytest.mark.parametrize("content", ["[", "machines", "other: 1", "- 1"])
def test_no_table(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(GemmateError, match="is no table of prices"):
        read_prices(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("asked", "region", "said"),
    [
        (("g2-standard-9", None, None), "us-central1", "Did you mean 'g2-standard-8'"),
        (("g2-standard-8", "NVIDIA_TESLA_T4", 1), "us-central1",
         "g2-standard-8 has 1 NVIDIA_L4, not 1 NVIDIA_TESLA_T4"),
        (("g2-standard-8", None, 4), "us-central1", "not 4 accelerator"),
        (("a2-ultragpu-1g", None, None), "europe-west1", "europe-west1 has no a2-ultragpu-1g"),
    ],
)  # fmt: skip
def test_a_pair_that_is_not(asked: tuple[str, Any, Any], region: str, said: str) -> None:
    with pytest.raises(GemmateError, match=said):
        find_machine(*asked, region=region)


def test_operations_by_hand(experiment: Any) -> None:
    """4 steps of 2 x 3 rows of 10 tokens; 100 weights, of which a forward more is recomputed."""
    made = experiment(max_steps=4, batch_size=2, gradient_accumulation_steps=3,
                      **{"dataset.max_length": 10})  # fmt: skip
    assert operations(made, weights=100, trained=7) == 240 * (4 * 100 + 6 * 7)
    again = made.model_copy(
        update={"training": made.training.model_copy(update={"gradient_checkpointing": True})}
    )
    assert operations(again, weights=100, trained=7) == 240 * (4 * 100 + 6 * 7 + 2 * 100)
    full = made.model_copy(update={"method": "full"})
    assert operations(full, weights=100, trained=100) == 240 * 600
    epochs = made.model_copy(
        update={"training": made.training.model_copy(update={"max_steps": -1})}
    )
    with pytest.raises(GemmateError, match="Set max_steps"):
        operations(epochs, weights=100, trained=7)


def test_estimates_of_gemma_2b() -> None:
    table = [Machine.model_validate(row) for row in (
        T4, T4 | {"machine": "small", "memory_gib": 1.0},
        T4 | {"machine": "eight", "count": 8, "usd": None},
    )]  # fmt: skip
    found = estimate("quotes", overrides=["training.max_steps=10000", BATCH], table=table)
    assert [each.machine.machine for each in estimate("quotes", table=table)] == ["n1-standard-8"]
    assert [each.machine.machine for each in found] == ["n1-standard-8", "eight"]
    one, eight = found
    assert one.profile == "t4" and 1.9 < one.gib < 4  # the weights alone are 1.93 GiB
    low, high = (hours - STARTUP for hours in one.hours)
    assert high / low == pytest.approx(SHARES[1] / SHARES[0])
    assert eight.hours[1] - STARTUP == pytest.approx(high / 8)
    assert one.usd(spot=False) == one.hours and eight.usd(spot=False) is None
    # By hand: 2.5e9 weights, 32 rows of 128 tokens to a step, 6 operations as all is recomputed.
    assert high == pytest.approx(10_000 * 32 * 128 * 6 * 2.51e9 / (65e12 * 3600 * 0.1), rel=0.02)
    lines = report(found)
    assert "10% to 40% of the GPU's peak" in " ".join(lines) and "check before" in " ".join(lines)


def test_what_fits_nothing() -> None:
    table = [Machine.model_validate(T4 | {"memory_gib": 1.0})]
    with pytest.raises(GemmateError, match="quotes fits no machine"):
        estimate("quotes", table=table)
