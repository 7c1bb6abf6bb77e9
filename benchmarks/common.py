"""What the benchmarks share: medians with their ranges, paired ratios, a table, a JSON file."""

import argparse
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HIDDEN = argparse.SUPPRESS  # the help of an option that a script calls itself with
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    ordered = sorted(values)
    return [ordered[len(ordered) // 2], ordered[0], ordered[-1]]


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Median, smallest and largest of first / second, pair by pair."""
    return spread([a / b for a, b in zip(first, second, strict=True)])


def where() -> dict[str, Any]:
    """The machine and the versions that the figures are from."""
    from gemmate_lib import machine

    return machine.describe() | {"versions": {name: metadata.version(name) for name in PACKAGES}}


def shown(value: Any) -> str:
    """A spread as `median (smallest to largest)`, numbers with three digits."""
    if isinstance(value, list) and len(value) == 3:
        middle, low, high = map(shown, value)
        return f"{middle} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser


def report(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print a table: a line for each row, a column for each of its values."""
    columns = list(dict.fromkeys(key for _, values in rows for key in values))
    width = max(len(name) for name, _ in rows)
    print(" " * width, *(f"{column:>24}" for column in columns))
    for name, values in rows:
        print(f"{name:<{width}}", *(f"{shown(values.get(column, '')):>24}" for column in columns))


def write(found: dict[str, Any], out: Path | None) -> None:
    """Write the results where they are asked for."""
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
