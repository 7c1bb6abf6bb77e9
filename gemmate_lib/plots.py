"""Figures for the notebooks: one style, and no figure without alt text."""

import base64
import logging
import os
import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmate_lib.config import GemmateError
from gemmate_lib.trust import inside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stay apart under every common colour blindness; black last.
# Okabe and Ito, Color Universal Design, 2008: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")

# On a new machine matplotlib tells that it builds its font cache: no part of a cell's output.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def style() -> None:
    """Clean axes and colours for every later figure, with whatever backend is in use."""
    import matplotlib as mpl
    from cycler import cycler

    axes = {"prop_cycle": cycler(color=COLOURS), "spines.top": False, "spines.right": False}
    mpl.rc("axes", grid=True, axisbelow=True, titlelocation="left", **axes)
    mpl.rc("axes.grid", axis="y")
    mpl.rc("grid", color="#E3E3E3")
    mpl.rc("figure", figsize=(7.0, 3.6), facecolor="white")  # legible on a dark page too
    mpl.rc("savefig", facecolor="white")
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("font", size=10.5)
    mpl.rc("legend", frameon=False)
    mpl.rc("lines", linewidth=1.8)


def show(figure: "Figure", alt: str, name: str | None = None) -> None:
    """Display the figure as a PNG with alt text, and close it.

    `name`: also written as NAME.png where the environment names a folder GEMMATE_FIGURES.
    Raises: GemmateError if the alt text is empty, or if the name is more than a name.
    """
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    if not alt.strip():
        raise GemmateError("The figure has no alt text. Say in one sentence what it shows.")
    if name is not None and not re.fullmatch(r"[\w-]+", name):
        raise GemmateError(f"{name!r} is no plain name. Name a figure by letters, digits, _ and -.")
    png = BytesIO()
    # Without matplotlib's version in it, the same figure has the same bytes.
    figure.savefig(png, format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    display(Image(png.getvalue(), alt=alt))
    if name and (folder := os.environ.get("GEMMATE_FIGURES")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        inside(Path(folder), f"{name}.png").write_bytes(png.getvalue())


def embedded(parts: list[Any], alt: str) -> dict[str, str]:
    """A figure for a page: `source`, a data URL, and `alt`. Each part draws on its own axes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    png = BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        style()
        figure = Figure(figsize=(8, 3.2))
        for axes, draw in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw(axes)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font has not every script
        figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return {
        "source": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
        "alt": alt,
    }
