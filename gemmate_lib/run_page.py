"""A run as one self-contained HTML page with plots: its curves, its pace, what it used, its end.

No text of a run is trusted: it is escaped, and the page forbids scripts and every request.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.config import GemmateError
from gemmate_lib.journal import Curve, Journal, read_journal
from gemmate_lib.manifest import read_manifest
from gemmate_lib.plots import embedded
from gemmate_lib.report import flat, render_page
from gemmate_lib.watch import facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 20  # the steps of which a loss is also drawn as a mean


def write_run_page(folder: str | Path, out: Path) -> Path:
    """Write the page of a run, whether it trains, ended or died.

    Raises: GemmateError where the folder tells nothing, or the file is not named .html.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise GemmateError(f"{out} is to be a page. Name it .html.")
    run = read_journal(folder)
    manifest = read_manifest(folder) if run.state == "finished" else {}
    level = "ok" if run.state == "finished" else "failed" if run.over else "skipped"
    named = {"settings": "config", "metrics": "metrics", "timings": "timings"}
    named |= {"machine": "machine", "data": "data"}
    page = render_page(
        "run.html.j2",
        title=f"Run: {run.folder.resolve().name}",
        level=level,
        sentence=run.sentence(),
        facts=list(facts(run)),
        plots=[(title, figures) for title, figures in _plots(run) if figures],
        events=[(_utc(moment), said) for moment, said in run.events],
        parts=[(name, flat(manifest.get(key) or {})) for name, key in named.items()],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8", newline="\n")
    return out


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(sep=" ", timespec="seconds")[:19] + " UTC"


def _plots(run: Journal) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A heading and the figures below it."""
    yield "Learning", [*_of_losses(run), *_of_schedule(run)]
    speed = ("tokens_per_second", "tokens per second"), ("step_seconds", "seconds per step")
    yield "Pace", list(_lines(run, speed, "How fast it trained"))
    used = ("cpu_percent", "% of a core"), ("rss_mib", "memory, MiB")
    yield "Processor and memory", list(_lines(run, used, "What the process used"))
    number = 0
    while f"gpu{number}_used_mib" in run.curves:
        gpu = (f"gpu{number}_percent", "% busy"), (f"gpu{number}_used_mib", "memory, MiB")
        yield f"GPU {number}", list(_lines(run, gpu, f"What was used of GPU {number}"))
        number += 1


def _of_losses(run: Journal) -> Iterator[dict[str, str]]:
    losses, checks = run.curves.get("loss", []), run.curves.get("eval_loss", [])
    if not losses and not checks:
        return

    def draw(axes: "Axes") -> None:
        many = len(losses) > 2 * SMOOTH
        if losses:
            axes.plot(*zip(*losses, strict=True), lw=1, alpha=0.45 if many else 1, label="training")
        if many:
            axes.plot(*zip(*smoothed(losses), strict=True), color="C0", label=f"mean of {SMOOTH}")
        if checks:
            axes.plot(*zip(*checks, strict=True), "o-", color="C1", ms=4, label="validation")
        for step in run.checkpoints:
            axes.axvline(step, color="#888888", lw=0.8, ls=":")
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.legend()

    both = {"training": losses, "validation": checks}
    said = [f"{name} from {_short(c[0])} to {_short(c[-1])}" for name, c in both.items() if c]
    marked = "; dotted lines are checkpoints" if run.checkpoints else ""
    last = max(losses[-1:] + checks[-1:])[0]
    yield embedded([draw], f"Loss over {last} steps: {', '.join(said)}{marked}.")


def _of_schedule(run: Journal) -> Iterator[dict[str, str]]:
    both = ("learning_rate", "learning rate"), ("grad_norm", "length of the gradient")
    yield from _lines(run, both, "What moved the weights")


def _lines(run: Journal, wanted: Sequence[tuple[str, str]], title: str) -> Iterator[dict[str, str]]:
    """One figure of those curves that there are, side by side; wanted: name and unit."""
    there = [(name, unit) for name, unit in wanted if len(run.curves.get(name, [])) > 1]
    if not there:
        return

    def drawn(name: str, unit: str) -> Any:
        def draw(axes: "Axes") -> None:
            axes.plot(*zip(*run.curves[name], strict=True))
            axes.set(xlabel="step", ylabel=unit)
            axes.set_ylim(0, 1.08 * max(value for _, value in run.curves[name]) or None)

        return draw

    ranges = []
    for name, unit in there:
        ends = [_short(each(run.curves[name], key=lambda p: p[1])) for each in (min, max)]
        ranges.append(
            f"{unit} {'between ' * (ends[0] != ends[1])}{' and '.join(dict.fromkeys(ends))}"
        )
    yield embedded([drawn(*each) for each in there], f"{title}: {', '.join(ranges)}.")


def _short(point: tuple[int, float]) -> str:
    return f"{point[1]:,.0f}" if abs(point[1]) >= 100 else f"{point[1]:.3g}"


def smoothed(curve: Curve) -> Curve:
    """Each value as the mean of it and up to SMOOTH - 1 before."""
    found: Curve = []
    total = 0.0
    for index, (step, value) in enumerate(curve):
        total += value - (curve[index - SMOOTH][1] if index >= SMOOTH else 0.0)
        found.append((step, total / min(index + 1, SMOOTH)))
    return found
