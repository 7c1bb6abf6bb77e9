"""The command line's part for tasks one after the other."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gemmate_lib.cli_shipped import AsJson, Overrides, Profile


def continual(
    experiments: Annotated[list[str], typer.Argument(help="The tasks, in order: experiments.")],
    out: Annotated[Path, typer.Option(help="Folder; what is in it already is not learned again.")],
    replay: Annotated[int, typer.Option(min=0, help="Rows that the replay buffer holds.")] = 64,
    ewc: Annotated[float, typer.Option(min=0, help="Strength of EWC, lambda.")] = 100.0,
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, and so on.")] = 3,
    rows: Annotated[int | None, typer.Option(help="Measure on so many test rows a task.")] = None,
    settings: Overrides = None,
    profile: Profile = "auto",
    as_json: AsJson = False,
) -> None:
    """Learn tasks one after the other by five strategies, and say what each forgets.

    The first experiment says which model learns, and how long each task. Writes results.json.
    """
    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    given: dict[str, Any] = {
        "facts": machine.read_facts(),
        "profile": profile,
        "overrides": settings or (),
    }
    found = [resolve(name, **given).experiment for name in experiments]
    from gemmate_lib.continual import compare_strategies, sequence_of, strategies
    from gemmate_lib.forgetting import lines

    experiment, tasks = sequence_of(found)
    histories = compare_strategies(
        tasks, experiment, strategies(replay=replay, ewc=ewc), out=out, seeds=range(seeds),
        rows=rows,
    )  # fmt: skip
    results = out / "results.json"
    typer.echo(results.read_text("utf-8") if as_json else "\n".join(lines(histories)))
    if not as_json:
        typer.echo(f"results: {results}")
