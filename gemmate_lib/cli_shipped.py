"""The command line's part for what comes with the library: embedded models and data cards."""

from pathlib import Path
from typing import Annotated

import typer

tiny_app = typer.Typer(help="The embedded tiny models.", no_args_is_help=True)
config_app = typer.Typer(help="What an experiment comes to on a machine.", no_args_is_help=True)
card_app = typer.Typer(help="Data cards: what a data set is, checked.", no_args_is_help=True)

Profile = Annotated[str, typer.Option(help="auto, tiny, t4, ampere or full.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE, as in training.max_steps=20; repeatable."),
]


def progress(record: dict[str, float]) -> None:
    """Print an evaluation, or every tenth step."""
    step = int(record["step"])
    if "eval_loss" in record:
        typer.echo(f"step {step:>5}  validation loss {record['eval_loss']:.3f}")
    elif "loss" in record and step % 10 == 0:
        typer.echo(f"step {step:>5}  loss {record['loss']:.3f}")


@tiny_app.command("build")
def tiny_build(
    out: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("build/tiny"),
    only: Annotated[
        str | None, typer.Option(help="tiny-gemma, tiny-gemma2 or the adapter tiny-gemma-te.")
    ] = None,
) -> None:
    """Pre-train the embedded models again, side by side: ten to twenty minutes on two cores.

    The time-aware adapter is made by name alone, ten minutes more, from the base that is installed.
    """
    from gemmate_lib.config import among
    from gemmate_lib.shipped import NAME, build_adapter
    from gemmate_lib.tiny.build import NAMES, build_all

    if only == NAME:
        typer.echo(f"{NAME}: {build_adapter(out, report=progress)}")
        return
    build_all([among(only, (*NAMES, NAME), "embedded model")] if only else NAMES, out)


def _benchmarks() -> dict[str, tuple[Path, str]]:
    """Each benchmark's script, and the first line it says."""
    import ast

    from gemmate_lib.cards import shipped

    found = {}
    for name, path in shipped("benchmarks", "*.py").items():
        source = path.read_text("utf-8")
        if "parser_for(__doc__)" in source:
            said = ast.get_docstring(ast.parse(source)) or ""
            found[name] = path, said.splitlines()[0]
    return found


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; default: list them.")] = None,
) -> None:
    """Measure this machine: a table, and a JSON file with --out.

    What stands behind the name goes to the benchmark; its own options: gemmate bench NAME -- --help
    """
    import subprocess
    import sys

    from gemmate_lib.config import among

    found = _benchmarks()
    if name is None:
        typer.echo("\n".join(f"{key:<12} {said}" for key, (_, said) in found.items()))
        return
    script = found[among(name, found, "benchmark")][0]
    command = [sys.executable, str(script), *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@card_app.command("list")
def card_list() -> None:
    """List the data sets that have a card."""
    from gemmate_lib.cards import card_paths, read_card

    for name in card_paths():
        card = read_card(name)
        typer.echo(f"{name:<18} {sum(card.splits.values()):>7,} rows  {card.license}")


@card_app.command("show")
def card_show(name: str) -> None:
    """Print a data card."""
    from gemmate_lib.cards import read_card

    typer.echo(read_card(name).path.read_text("utf-8"))


@config_app.command("settings")
def config_settings() -> None:
    """Print the table of all settings, as Markdown: names, default, unit and meaning."""
    from gemmate_lib.keys import settings_table

    typer.echo(settings_table())


@config_app.command("show")
def config_show(
    experiment: Annotated[str, typer.Argument(help="A shipped experiment, or a .yaml file.")],
    settings: Overrides = None,
    profile: Profile = "auto",
    as_json: AsJson = False,
) -> None:
    """Print every setting of an experiment, and why it has its value."""
    import json

    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    facts = machine.read_facts()
    found = resolve(experiment, facts=facts, profile=profile, overrides=settings or ())
    typer.echo(json.dumps(found.experiment.model_dump(mode="json")) if as_json else found.table())
