"""The command line's part for fine-tuning methods: list them, compare them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gemmate_lib.cli_shipped import AsJson, Profile


def methods(
    study: Annotated[
        str | None,
        typer.Argument(help="`methods`, or a folder of defaults.yaml and variants; default: list."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The results, a .json file.")] = None,
    profile: Profile = "auto",
    as_json: AsJson = False,
) -> None:
    """List the fine-tuning methods, or train and compare a study's; what is there is found."""
    if study is None:
        from gemmate_lib.methods import METHODS

        for name, each in METHODS.items():
            merges = "merges" if each.merges else "does not merge"
            typer.echo(f"{name:<9} {each.trains:<42} {merges:<15} {each.source}")
        return
    from gemmate_lib import machine
    from gemmate_lib.study import lines, read_study, results_file, run_study

    found = read_study(study, facts=machine.read_facts(), profile=profile)
    results = run_study(found, out=out, report=None if as_json else typer.echo)
    typer.echo(json.dumps(results) if as_json else "\n".join(lines(results)))
    if not as_json:
        typer.echo(f"results: {out or results_file(found)}")
