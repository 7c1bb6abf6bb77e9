"""The command line's part for other servers: a merged model in the form that they read."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """Whom a model is exported for."""

    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"
    OLLAMA = "ollama"


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, made by `gemmate finetune`.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; it must not exist yet.")],
    target: Annotated[Target, typer.Option("--for", help="Who is to read it.")] = Target.VLLM,
) -> None:
    """Write a run as one merged model for vLLM, llama.cpp or Ollama, and say what comes next."""
    from gemmate_lib.export import export as write_export
    from gemmate_lib.sft import load_run

    typer.echo("\n".join(write_export(load_run(run), out, target=target.value)))
