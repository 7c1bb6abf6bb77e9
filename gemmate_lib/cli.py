"""The command line: one short function a command; what is heavy is imported inside."""

from pathlib import Path
from typing import Annotated

import typer

import gemmate_lib.cli_quality  # noqa: F401  (its commands stand beside those of cli_shipped)
from gemmate_lib.cli_cloud import cloud_app
from gemmate_lib.cli_continual import continual
from gemmate_lib.cli_export import export
from gemmate_lib.cli_launch import (
    NodeRank,
    Nodes,
    Processes,
    Rendezvous,
    Strategy,
    speaks,
    train,
)
from gemmate_lib.cli_methods import methods
from gemmate_lib.cli_monitor import monitor_app
from gemmate_lib.cli_registry import registry_app
from gemmate_lib.cli_runs import Limit, runs_app
from gemmate_lib.cli_search import search
from gemmate_lib.cli_serve import serve
from gemmate_lib.cli_shipped import (
    Overrides,
    Profile,
    bench,
    card_app,
    config_app,
    tiny_app,
)

app = typer.Typer(
    name="gemmate",
    help="Fine-tune Gemma, evaluate it and teach it what time it is: the course's library.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)
app.add_typer(runs_app)
app.add_typer(monitor_app)
app.command()(search)
app.command()(continual)
app.command()(export)
app.command()(serve)
app.add_typer(tiny_app, name="tiny")
app.add_typer(card_app, name="card")
app.add_typer(config_app, name="config")
app.add_typer(cloud_app, name="cloud")
app.add_typer(registry_app, name="registry")
app.command("methods")(methods)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    bench
)


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune Gemma, evaluate it and teach it what time it is: the course's library."""
    context.obj = debug
    from gemmate_lib.machine import quiet

    quiet()


@app.command()
def course(
    more: Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)] = None,
    only: Annotated[list[str] | None, typer.Option(help="A notebook's number; repeatable.")] = None,
    every: Annotated[bool, typer.Option("--all", help="The electives too.")] = False,
    profile: Profile = "tiny",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="NAME=VALUE for the notebooks; repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE [NAME=VALUE,VALUE …]: run every combination."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder, or a URL to copy it to; default runs/course/<stamp>."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Notebooks at a time.")] = None,
    cell_timeout: Annotated[float | None, typer.Option(help="Seconds for a cell.")] = None,
    notebook_timeout: Annotated[float | None, typer.Option(help="Seconds for a notebook.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Run again what is not ok in --out, or in the newest run.")
    ] = False,
) -> None:
    """Run the notebooks headless, write the report, end with a table."""
    from gemmate_lib.batches import read_grid, read_pairs
    from gemmate_lib.course import Order, newest_order, run_course

    folder, url = (None, out) if out and "://" in out else (Path(out) if out else None, None)
    if resume:
        order, folder = newest_order(folder)
    else:
        order = Order(
            profile=profile,
            only=["all"] if every else only or (),
            parameters=read_pairs(parameter or (), "-p lora_r=16"),
            grid=read_grid([*(grid or ()), *(more or ())]),
            cell_timeout=cell_timeout,
            notebook_timeout=notebook_timeout,
            jobs=jobs,
        )
    raise typer.Exit(0 if run_course(order, out=folder, resume=resume, copy_to=url).ok else 1)


@app.command()
def finetune(
    experiment: Annotated[str, typer.Argument(help="A shipped experiment, or a .yaml file.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run, a new one but with --resume; default runs/<name>."),
    ] = None,
    settings: Overrides = None,
    profile: Profile = "auto",
    explain: Annotated[bool, typer.Option(help="Print every setting with its reason.")] = False,
    limit: Limit = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on from a checkpoint: last, best, or its folder.")
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(help="KEY that may differ from the checkpoint's; repeatable."),
    ] = None,
    processes: Processes = 1,
    strategy: Strategy = "ddp",
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
) -> None:
    """Fine-tune on an experiment, then evaluate on its test split.

    With --processes N on N processes, to the losses of one.
    """
    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    first = speaks(node_rank)
    resolved = resolve(
        experiment, facts=machine.read_facts(), profile=profile, overrides=settings or ()
    )
    if explain:
        typer.echo(str(resolved.table()))
    typer.echo(f"profile {resolved.experiment.profile}: {resolved.reasons['profile']}")
    from gemmate_lib.evaluate import evaluate_run
    from gemmate_lib.sft import check_new, home_of, load_splits

    out = out or home_of(resolved.experiment) / resolved.experiment.name
    resume = resume or resolved.experiment.checkpoint.resume
    check_new(out, resume=resume)
    splits = load_splits(resolved.experiment)
    typer.echo("\n".join(splits.report.lines()))
    run = train(
        resolved.experiment,
        {"processes": processes, "strategy": strategy, "nodes": nodes, "node_rank": node_rank,
         "rendezvous": rendezvous},
        out=out, splits=splits, resume=resume, allow_changed=allow_changed or (),
    )  # fmt: skip
    if not first:
        return
    seconds = run.manifest["timings"]["train"]
    if begun := run.manifest.get("resumed"):
        typer.echo(f"went on after step {begun['step']}")
    typer.echo(f"trained {run.metrics['steps']} steps in {seconds:.1f} s: {run.directory}")
    typer.echo("\n".join(evaluate_run(run, limit=limit).lines()))


@app.command()
def doctor(
    fit: Annotated[
        str | None, typer.Option(help="A model: say what fine-tuning it takes, and what fits.")
    ] = None,
    settings: Overrides = None,
    profile: Profile = "auto",
) -> None:
    """Say what this machine can do, what differs from the lock, and where the token comes from.

    With --fit MODEL, how much memory fine-tuning it needs, and how many rows fit here.
    """
    from gemmate_lib import machine
    from gemmate_lib.config import resolve
    from gemmate_lib.doctor import examine, fits

    if fit is None:
        lines = examine()
    else:
        overrides, facts = [*(settings or ()), f"model={fit}"], machine.read_facts()
        found = resolve("quotes", facts=facts, profile=profile, overrides=overrides)
        lines = fits(found.experiment, facts)
    typer.echo("\n".join(lines))


def run() -> None:
    """Run the command line; what the user can mend ends in one sentence and exit code 2."""
    import sys

    from gemmate_lib.settings import GemmateError

    try:
        app()
    except (GemmateError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        said = str(error)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            remedy = "Check the path, its permissions and the space on the disk."
            said = f"{where}{error.strerror or error}. {remedy}"
        typer.echo(f"gemmate: {' '.join(said.split())}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    run()
