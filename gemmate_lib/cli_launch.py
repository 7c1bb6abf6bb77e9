"""The command line's part for several processes: options of `gemmate finetune`, and what it does.

`torchrun -m gemmate_lib finetune …` comes to the same: then only rank 0 speaks.
"""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmate_lib.cli_shipped import progress

if TYPE_CHECKING:
    from gemmate_lib.config import Experiment
    from gemmate_lib.data import Splits
    from gemmate_lib.sft import Run

Processes = Annotated[
    int, typer.Option(min=1, help="Train on so many processes of this machine, one a GPU.")
]
Strategy = Annotated[
    str, typer.Option(help="What they share: ddp (the rows), fsdp2 or fsdp-qlora (weights, too).")
]
Nodes = Annotated[int, typer.Option(min=1, help="Train on so many machines; run this on each.")]
NodeRank = Annotated[int, typer.Option(min=0, help="Which of the machines this is, from 0.")]
Rendezvous = Annotated[
    str | None, typer.Option(help="HOST:PORT of machine 0, where the machines meet.")
]


def speaks(node_rank: int) -> bool:
    """Whether this is the first process of all; what any other one prints is nobody's."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for as long as we live
    return rank == node_rank == 0


def train(
    experiment: "Experiment", cluster: dict[str, Any], *, splits: "Splits", **given: Any
) -> "Run":
    """Fine-tune here, or on the processes of a cluster; given: as for `finetune_model`.

    Raises: typer.Exit after a signal, or at the end of the budget.
    """
    from gemmate_lib.budget import Spent
    from gemmate_lib.callbacks import Interrupted
    from gemmate_lib.launch import Cluster, launch
    from gemmate_lib.sft import finetune_model

    try:
        if Cluster(**cluster).world > 1:
            return launch(experiment, show=True, **cluster, **given)
        return finetune_model(experiment, report=progress, splits=splits, **given)
    except Interrupted as stop:
        typer.echo(f"gemmate: {stop} Go on with --resume last.", err=True)
        raise typer.Exit(stop.exit_code) from None
    except Spent as stop:
        typer.echo(f"gemmate: {stop}", err=True)
        raise typer.Exit(stop.exit_code) from None
