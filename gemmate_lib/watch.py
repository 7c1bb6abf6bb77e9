"""A run seen in the terminal, from another process: how far it is, its curves, what it uses."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gemmate_lib.journal import Curve, Journal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BLOCKS, PLAIN_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
COLOURS = {"training": "green", "saving": "green", "finished": "green", "silent": "yellow"}


def duration(seconds: float | None) -> str:
    """Seconds as 12 s, 3 min 20 s or 2 h 05 min."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )


def chart(curve: Curve, *, width: int, height: int = 6, blocks: str = BLOCKS) -> list[str]:
    """A curve as lines of text: columns as high as the mean of the steps that they stand for."""
    if not curve:
        return []
    first, last = curve[0][0], max(curve[-1][0], curve[0][0] + 1)
    columns: list[list[float]] = [[] for _ in range(min(width, len(curve)))]
    for step, value in curve:
        columns[int((step - first) / (last - first + 1e-9) * len(columns))].append(value)
    means = [sum(column) / len(column) if column else None for column in columns]
    known = [mean for mean in means if mean is not None]
    low, span = min(known), (max(known) - min(known)) or 1.0
    levels = len(blocks) - 1
    tall = [0 if m is None else 1 + round((m - low) / span * (height * levels - 1)) for m in means]
    return [
        "".join(blocks[max(0, min(levels, each - row * levels))] for each in tall)
        for row in reversed(range(height))
    ]


def facts(run: Journal) -> Iterator[tuple[str, str]]:
    """What is known of a run, as names and values; what is not known is left out."""
    for name, title in (("loss", "loss"), ("eval_loss", "validation loss")):
        if curve := run.curves.get(name):
            best = min(value for _, value in curve)
            yield title, f"{curve[-1][1]:.4f} at step {curve[-1][0]}, lowest {best:.4f}"
    if rate := run.last("learning_rate"):
        yield "learning rate", f"{rate:.3g}"
    if speed := run.use.get("tokens_per_second"):
        examples = run.use.get("examples_per_second", 0.0)
        yield "speed", f"{speed:,.0f} tokens/s, {examples:,.1f} examples/s"
    if run.step_seconds and not run.over:
        yield "time left", f"{duration(run.seconds_left)} at {run.step_seconds:.2f} s a step"
    if run.spent:
        budget = f" of {duration(run.hours * 3600)}" if run.hours else ""
        yield "spent", f"{duration(run.spent * 3600)}{budget}"
    if "rss_mib" in run.use:
        free = run.use.get("available_mib", 0.0) / 1024
        used = f"{run.use['rss_mib'] / 1024:.2f} GiB, {free:.1f} GiB free"
        yield "processor, memory", f"{run.use.get('cpu_percent', 0.0):.0f} % of a core, {used}"
    for number in range(64):
        if f"gpu{number}_used_mib" not in run.use:
            break
        gpu = {key: run.use.get(f"gpu{number}_{key}", 0.0) for key in ("used_mib", "total_mib")}
        held = f"{gpu['used_mib'] / 1024:.1f} of {gpu['total_mib'] / 1024:.1f} GiB"
        busy = run.use.get(f"gpu{number}_percent")
        yield f"GPU {number}", f"{busy:.0f} % busy, {held}" if busy is not None else held
    if run.checkpoints:
        yield "last checkpoint", f"step {run.checkpoints[-1]}"


def frame(run: Journal, *, width: int, blocks: str = BLOCKS) -> "RenderableType":
    """All of it at one moment, for Rich, in so many columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = COLOURS.get(run.state, "red")
    parts: list[RenderableType] = [
        Text(f"{run.folder.name}: {run.sentence()}", style=f"bold {colour}")
    ]
    if run.steps:
        share = f"{100 * run.step / run.steps:.0f} %"
        parts.append(Text(f"step {run.step} of {run.steps}, {share}, epoch {run.epoch:.2f}"))
        done = min(1.0, run.step / run.steps) * min(width, 60)
        full, empty = ("━", "─") if blocks == BLOCKS else ("#", "-")
        parts.append(Text(full * round(done) + empty * (min(width, 60) - round(done))))
    table = Table.grid(padding=(0, 2))
    for name, said in facts(run):
        table.add_row(Text(name, style="dim"), Text(said))
    parts.append(table)
    for name, title in (("loss", "loss"), ("eval_loss", "validation loss")):
        curve = run.curves.get(name, [])
        if len(curve) > 1:
            low, high = min(v for _, v in curve), max(v for _, v in curve)
            ends = f"steps {curve[0][0]} to {curve[-1][0]}, {low:.3g} to {high:.3g}"
            parts.append(Text(f"\n{title}, {ends}", style="dim"))
            height = 6 if name == "loss" else 2
            rows = chart(curve, width=width, height=height, blocks=blocks)
            parts += [Text(row, style="cyan", no_wrap=True) for row in rows]
    for moment, said in run.events[-4:]:
        clock = time.strftime("%H:%M:%S", time.localtime(moment))
        parts.append(Text(f"{clock} {said}", style="yellow"))
    return Group(*parts)


def show_frame(run: Journal, console: "Console") -> None:
    """Print one frame, as wide as the terminal."""
    utf = (console.encoding or "").lower().startswith("utf")
    console.print(frame(run, width=min(console.width, 100), blocks=BLOCKS if utf else PLAIN_BLOCKS))


def follow(folder: Path, console: "Console", *, every: float = 1.0) -> Journal:
    """Show a run until nothing more is to come: drawn anew in a terminal, else by lines.

    A run that is not there yet is waited for.
    """
    run = Journal(folder)
    if not console.is_terminal:
        return _lines(run, console, every=every)
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not (_told(run.update()) and run.over):
            waits = Text(f"waiting for {folder}: nothing is told of it yet")
            live.update(frame(run, width=min(console.width, 100)) if _told(run) else waits)
            live.refresh()
            time.sleep(every)
    show_frame(run, console)
    return run


def _told(run: Journal) -> bool:
    return bool(run.latest or run.step)


def _lines(run: Journal, console: "Console", *, every: float) -> Journal:
    """For a log file: a line where a step was taken since the last one."""
    shown = -1
    while not (_told(run.update()) and run.over):
        if run.step != shown:
            said = [f"{run.folder.name}: {run.sentence()}"]
            said += [f"{name} {value}" for name, value in facts(run) if "loss" in name]
            console.print("; ".join(said), markup=False, highlight=False, soft_wrap=True)
            shown = run.step
        time.sleep(every)
    console.print(f"{run.folder.name}: {run.sentence()}", markup=False, highlight=False)
    return run
