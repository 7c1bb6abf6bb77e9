"""The command line's part for eyes on a run: in the terminal, and as a page."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gemmate_lib.cli_shipped import AsJson

monitor_app = typer.Typer()
Watched = Annotated[Path, typer.Argument(help="A run's folder, whether it trains, ended or died.")]


@monitor_app.command()
def watch(
    run: Watched,
    once: Annotated[bool, typer.Option(help="Print one frame, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch a run that trains in another process: progress, curves, speed, memory, time left.

    With --once one frame, with --json the same for a script. Without, until the run is over.
    """
    from rich.console import Console

    from gemmate_lib.journal import read_journal
    from gemmate_lib.watch import follow, show_frame

    console = Console()
    if as_json:
        typer.echo(json.dumps(read_journal(run).as_dict()))
    elif once:
        show_frame(read_journal(run), console)
    else:
        follow(run, console, every=every)


@monitor_app.command()
def report(
    run: Watched,
    out: Annotated[Path, typer.Option(help="The page to write: NAME.html.")],
) -> None:
    """Write a run as one HTML page with plots: curves, pace, what was used, what happened."""
    from gemmate_lib.run_page import write_run_page

    typer.echo(f"page: {write_run_page(run, out)}")
