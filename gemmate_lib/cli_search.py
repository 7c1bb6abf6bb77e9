"""The command line's part for the search of hyperparameters."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmate_lib.cli_shipped import AsJson, Overrides, Profile, progress

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def told(trial: "FrozenTrial") -> None:
    """Print a trial as it ends."""
    params = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
    loss = "" if trial.value is None else f"{trial.value:.3f}"
    state, why = trial.state.name.lower(), trial.user_attrs.get("reason", "")
    typer.echo(
        f"trial {trial.number:>3}  {state:<8}  {loss:>7}  {params}" + f"  ({why})" * bool(why)
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def search(
    experiment: Annotated[str, typer.Argument(help="A shipped experiment, or a .yaml file.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many trials the study is to have in the end.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which no further trial begins.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; the same one goes on with it.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="GEMMATE_STORAGE",
            show_envvar=True,
            help="URL of a database that several machines share, instead of a journal in --out.",
        ),
    ] = None,
    best: Annotated[
        bool, typer.Option(help="Then train the winner, and open the test split once.")
    ] = False,
    settings: Overrides = None,
    profile: Profile = "auto",
    as_json: AsJson = False,
) -> None:
    """Search for hyperparameters on the validation split; killed, it goes on where it was."""
    from gemmate_lib import machine
    from gemmate_lib.config import resolve
    from gemmate_lib.search import optimize_hyperparameters
    from gemmate_lib.search_plots import write_plots
    from gemmate_lib.winner import finetune_with_best_params

    facts = machine.read_facts()
    found = optimize_hyperparameters(
        resolve(experiment, facts=facts, profile=profile, overrides=settings or ()).experiment,
        trials, timeout=timeout, out=out, workers=workers, storage=storage,
        report=None if as_json else told,
    )  # fmt: skip
    winner = found.best  # where no trial was completed, that is said before a plot is drawn
    verdict = (
        finetune_with_best_params(found, report=None if as_json else progress) if best else None
    )
    write_plots(found)
    lines = verdict.lines() if verdict else []
    if as_json:
        result = {"folder": str(found.directory), "trials": len(found.tally.told),
                  "best": winner.number, "loss": winner.value,
                  "params": winner.params}  # fmt: skip
        typer.echo(json.dumps(result | ({"verdict": lines} if verdict else {})))
    else:
        typer.echo(f"{len(found.tally.told)} trials in {found.directory}; the best:")
        _tell_winner(winner, experiment, lines)


def _tell_winner(winner: "FrozenTrial", experiment: str, verdict: list[str]) -> None:
    """Print the best trial, the command that trains it, and what it was worth."""
    told(winner)
    overrides = " ".join(f"--set {key}={value}" for key, value in winner.params.items())
    typer.echo(f"gemmate finetune {experiment} {overrides}")
    typer.echo("\n".join(verdict or ["add --best to open the test split"]))
