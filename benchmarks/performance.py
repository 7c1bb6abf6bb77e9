"""The README's table of performance, from the JSON files that the benchmarks wrote.

`python benchmarks/performance.py README.md` writes it between its two markers; nothing in it was
not measured, and each line names its machine.
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import shown, spread, with_block

HERE = Path(__file__).parent
HEAD = """| what | before, or they | after, or ours | ratio | machine |
|---|---|---|---|---|"""


def _line(what: str, before: str, after: str, faster: list[float], machine: dict[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    short = f"{machine['device']}, {machine['capability']}, {threads}"
    return f"| {what} | {before} | {after} | {shown(faster)} | {short} |"


def training(found: dict[str, Any]) -> list[str]:
    """A line for each model: the original recipe and ours."""
    return [
        _line(
            f"Training step of four rows, {name} (losses equal within {gap:.0e})",
            f"{shown(arms['original']['ms a step'][0])} ms",
            f"{shown(arms['ours']['ms a step'][0])} ms",
            arms["ours"]["times as fast"],
            found["machine"],
        )
        for name, arms in found["models"].items()
        for gap in [arms["ours"]["largest loss gap"]]
    ]


def generation(found: dict[str, Any]) -> list[str]:
    """One prompt at a time and batches; equal texts."""
    ways = found["ways"]
    before, after = ways["one at a time"], ways["ours, batches of 32"]
    what = f"Generation for {found['prompts']} test rows (equal texts)"
    cells = [f"{shown(way['s'][0])} s" for way in (before, after)]
    return [_line(what, *cells, after["times as fast"], found["machine"])]


def loading(found: dict[str, Any]) -> list[str]:
    """Quantizing again and the saved 4-bit copy; equal logits."""
    before, after = found["ways"]["quantized again"], found["ways"]["4-bit copy"]
    cells = [f"{shown(way['load s'][0])} s, {shown(way['GiB'][0])} GiB" for way in (before, after)]
    what = "Loading gemma-2b's shape in NF4; peak with a first forward (equal logits)"
    return [_line(what, *cells, after["times as fast"], found["machine"])]


def memory(found: dict[str, Any]) -> list[str]:
    """Predicted and measured, over all configurations."""
    each = found["configurations"].values()
    predicted, measured = ([row[key] for row in each] for key in ("predicted GiB", "measured GiB"))
    share = spread([row["measured / predicted"] for row in each])
    what = f"Memory of a step at gemma-2b's width, {len(each)} configurations: predicted, measured"
    cells = [f"{min(values):.1f} to {max(values):.1f} GiB" for values in (predicted, measured)]
    return [_line(what, *cells, share, found["machine"])]


def peers(found: dict[str, Any]) -> list[str]:
    """A line for each peer that ran on the larger model; the smaller one's are in the file."""
    lines = []
    for name, model in list(found["models"].items())[-2:]:
        ours = f"{shown(model['arms']['ours']['ms a step'][0])} ms"
        for peer, row in model["arms"].items():
            if peer != "ours" and "ours times as fast" in row:
                theirs = f"{shown(row['ms a step'][0])} ms"
                what = f"The same training step with {peer}, {name}"
                lines.append(_line(what, theirs, ours, row["ours times as fast"], found["machine"]))
    return lines


def limit(found: dict[str, Any]) -> list[str]:
    """The share of the rate at which the machine multiplies large matrices."""
    lines = []
    for name, model in found["models"].items():
        before, after = (model["arms"][arm]["of the matrix rate"] for arm in ("original", "ours"))
        cells = [f"{way[0]:.0%}" for way in (before, after)]
        faster = [a / b for a, b in zip(after, before, strict=True)]
        what = f"Share of the matrix rate that a step's arithmetic reaches, {name}"
        lines.append(_line(what, *cells, [faster[0], min(faster), max(faster)], found["machine"]))
    return lines


def serving(found: dict[str, Any]) -> list[str]:
    """A batch for each adapter and mixed batches, at the highest concurrency; equal texts."""
    at, arms = found["concurrency"][-1], found["arms"]
    before, after = (arms[name][str(at)] for name in ("a batch for each", "mixed batches"))
    what = f"Serving three adapters, {at} requests at a time (equal texts)"
    cells = [f"{shown(way['tokens/s'][0])} tokens/s" for way in (before, after)]
    return [_line(what, *cells, after["times as fast"], found["machine"])]


def table(folder: Path = HERE) -> str:
    """The table in Markdown."""
    parts = {"training": training, "peers": peers, "limit": limit, "generation": generation,
             "serving": serving, "loading": loading, "memory": memory}  # fmt: skip
    lines = [HEAD]
    for name, make in parts.items():
        lines += make(json.loads((folder / f"{name}.json").read_text("utf-8")))
    return "\n".join(lines)


def main() -> None:
    """Write the table into the file that is named, or print it."""
    if len(sys.argv) < 2:
        print(table())
        return
    page = Path(sys.argv[1])
    page.write_text(with_block(page.read_text("utf-8"), "performance", table()), "utf-8")


if __name__ == "__main__":
    main()
