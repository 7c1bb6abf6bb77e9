"""Pictures of a study: its history, what mattered, all trials at once, and what it was worth."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemmate_lib.plots import COLOURS, style
from gemmate_lib.search import Search
from gemmate_lib.studies import quiet_optuna
from gemmate_lib.winner import RECORD, Verdict, read_verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOK = {  # state -> marker, colour and label
    "COMPLETE": ("o", COLOURS[0], "completed"),
    "PRUNED": ("x", COLOURS[1], "pruned"),
}


def plot_history(search: Search) -> "Figure":
    """Validation loss of each trial, and the best so far; pruned ones where they were stopped."""
    import matplotlib.pyplot as plt

    style()
    figure, axes = plt.subplots()
    told = [t for t in search.tally.told if t.value is not None]
    told.sort(key=lambda t: t.number)
    for state, (marker, colour, label) in LOOK.items():
        points = [(t.number, t.value) for t in told if t.state.name == state]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=label)
    done = [t for t in told if t.state.name == "COMPLETE"]
    if done:
        best = np.minimum.accumulate(np.array([t.value for t in done], dtype=float))
        numbers = [t.number for t in done]
        axes.step(numbers, best, where="post", color=COLOURS[2], label="best so far")
    axes.set(xlabel="trial", ylabel="validation loss")
    axes.legend()
    return figure


def importances(search: Search) -> dict[str, float]:
    """The share of the loss's variation that each setting accounts for, by PED-ANOVA.

    Watanabe et al. 2023, https://arxiv.org/abs/2304.10255
    """
    from optuna.importance import get_param_importances

    with quiet_optuna():
        return get_param_importances(search.study)


def plot_importances(search: Search) -> "Figure":
    """A bar for each setting: how much of the loss's variation hangs on it."""
    import matplotlib.pyplot as plt

    style()
    found = importances(search)
    figure, axes = plt.subplots()
    axes.barh(list(found)[::-1], list(found.values())[::-1])
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="importance, of 1 in all")
    return figure


def plot_parallel(search: Search) -> "Figure":
    """A line for each completed trial through all its settings; coloured by its loss."""
    import matplotlib.pyplot as plt
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    style()
    with quiet_optuna(), plt.rc_context({"axes.grid": False, "figure.figsize": (8.4, 3.6)}):
        axes = plot_parallel_coordinate(search.study, target_name="loss")
    axes.set_title("")
    axes.collections[0].set_cmap("viridis")  # theirs ends in white, on white
    return plt.gcf()


def plot_verdict(verdict: Verdict) -> "Figure":
    """The winner's loss in the search, on a fresh seed, and on the test split; the default's."""
    import matplotlib.pyplot as plt

    style()
    figure, axes = plt.subplots()
    rows = {
        "winner, as found": (verdict.found, verdict.found, verdict.found),
        "winner, fresh seed": (verdict.again.value, verdict.again.low, verdict.again.high),
        "winner, test": (verdict.test.value, verdict.test.low, verdict.test.high),
        "default, test": (verdict.default.value, verdict.default.low, verdict.default.high),
    }
    for place, (name, (value, low, high)) in enumerate(rows.items()):
        colour = COLOURS[name.startswith("default")]
        errors = [[value - low], [high - value]]
        axes.errorbar(value, -place, xerr=errors, fmt="o", capsize=3, color=colour)
    axes.set(yticks=[-i for i in range(len(rows))], yticklabels=list(rows), xlabel="loss")
    return figure


def write_plots(search: Search) -> list[Path]:
    """Write what can be drawn of a study into its folder `plots`."""
    import matplotlib.pyplot as plt

    folder = search.directory / "plots"
    folder.mkdir(exist_ok=True)
    completed = [t for t in search.tally.told if t.state.name == "COMPLETE"]
    figures = {"history": plot_history(search)}
    if len(completed) > 1:
        figures |= {"importances": plot_importances(search), "parallel": plot_parallel(search)}
    if (search.directory / RECORD).is_file():
        figures["verdict"] = plot_verdict(read_verdict(search.directory))
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=90, bbox_inches="tight")
        plt.close(figure)
    return [folder / f"{name}.png" for name in figures]
