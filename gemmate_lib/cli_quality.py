"""The command line's part for data before training: its quality, and whether its card holds."""

from pathlib import Path
from typing import Annotated

import typer

from gemmate_lib.cli_shipped import card_app


@card_app.command("report")
def card_report(
    file: Annotated[str, typer.Argument(help="A data file, a folder, or the name of a card.")],
    columns: Annotated[
        str | None, typer.Option(help='Our names = theirs: "quote=content author=author".')
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Texts of the task, a file or a card: measures relevance.")
    ] = None,
    model: Annotated[str, typer.Option(help="Whose tokenizer counts.")] = "tiny-gemma",
    out: Annotated[Path | None, typer.Option(help="Write a page with plots: NAME.html.")] = None,
    card: Annotated[Path | None, typer.Option(help="Write the draft of a card: NAME.md.")] = None,
) -> None:
    """Measure a data set before training on it: size, relevance, diversity, copies, lengths …"""
    from gemmate_lib.config import DatasetConfig
    from gemmate_lib.models import load_tokenizer
    from gemmate_lib.quality import examine
    from gemmate_lib.quality_page import draft_card, write_page
    from gemmate_lib.verdicts import findings

    # DatasetConfig reads "ours=theirs" pairs itself.
    settings = {"id": file, "max_length": 1_000_000, "columns": columns or {}}
    config = DatasetConfig.model_validate(settings)
    wanted = None if task is None else DatasetConfig(id=task)
    quality = examine(config, tokenizer=load_tokenizer(model, None), task=wanted)
    for finding in findings(quality):
        typer.echo(f"{finding.level:<5} {finding.title}: {finding.text}")
    if out is not None:
        typer.echo(f"page: {write_page(quality, out)}")
    if card is not None:
        typer.echo(f"card: {draft_card(quality, config, card)}")


@card_app.command("check")
def card_check(
    name: Annotated[str, typer.Argument(help="The name of a card, or its file: NAME.md.")],
) -> None:
    """Read a data set through its card: exit code 2 where it is not as the card says."""
    from gemmate_lib.cards import read_card
    from gemmate_lib.config import DatasetConfig
    from gemmate_lib.data import read_tables

    card = read_card(name)
    for split, rows in read_tables(DatasetConfig(id=str(card.path))).items():
        typer.echo(f"{card.name}: {split}: {len(rows):,} rows, as the card says")
