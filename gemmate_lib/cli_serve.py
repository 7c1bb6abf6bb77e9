"""The command line's part for serving."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gemmate_lib.serve.engine import Engine
    from gemmate_lib.serve.limits import Limits


def serve(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs over one base.")] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What a run is called, in order; repeatable.")
    ] = None,
    follow: Annotated[
        Path | None,
        typer.Option("--runs", help="Serve what is in this folder, and what appears in it."),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            envvar="GEMMATE_REGISTRY", help="Versions to serve: a folder or an fsspec URL."
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="Serve what this tag names, and follow it; default: production."),
    ] = None,
    host: Annotated[str, typer.Option(help="Another one needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    key_file: Annotated[
        Path | None, typer.Option(help="The key's file; else GEMMATE_SERVE_KEY.")
    ] = None,
    print_vllm: Annotated[
        bool, typer.Option("--print-vllm", help="Only print how vLLM would serve them.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A limit, as in queue=8; repeatable.")
    ] = None,
) -> None:
    """Serve runs over their base, in the form of OpenAI's API, until Ctrl+C."""
    from gemmate_lib.serve import server

    if print_vllm:
        typer.echo(_for_vllm(runs or [], name or ()))
        return
    server.check_installed()
    from gemmate_lib.serve.api import build_app
    from gemmate_lib.serve.follow import TagFollower
    from gemmate_lib.serve.gate import LOOPBACK
    from gemmate_lib.serve.limits import read_limits
    from gemmate_lib.serve.opening import Follower, name_runs, open_engine, runs_to_begin_with

    limits, key = read_limits(settings or ()), server.read_key(key_file, host=host)
    found = name_runs(runs or [], name or ())
    if registry and not (found or follow):
        tag = tag or ["production"]
    tags = TagFollower(registry, tag, taken=found) if tag else None
    found |= tags.runs if tags else {}
    first = found or runs_to_begin_with(follow)
    listener = server.bind(host, port)
    with listener:
        engine = open_engine(first, limits=limits)
        follower = Follower(engine, follow, say=typer.echo) if follow else None
        if follower:
            follower.start()
        if tags:
            tags.start(engine)
        hosts = {*LOOPBACK, host} if server.is_loopback(host) else None
        app = build_app(engine, limits, key, hosts=hosts, follower=tags)
        address = server.address_of(listener)
        try:
            server.run(app, engine, listener, limits=limits,
                       started=lambda: _tell(address, engine, limits, key))  # fmt: skip
        finally:
            if follower:
                follower.stop()
            if tags:
                tags.stop()
    typer.echo("stopped; what ran was finished")


def _for_vllm(runs: list[Path], names: Sequence[str]) -> str:
    from gemmate_lib.config import GemmateError
    from gemmate_lib.serve.opening import name_runs
    from gemmate_lib.serve.vllm import vllm_command

    if not runs:
        raise GemmateError("vLLM follows no folder of ours. Name the runs it is to serve.")
    return vllm_command(name_runs(runs, names))


def _tell(address: str, engine: "Engine", limits: "Limits", key: str | None) -> None:
    """Print where it is, what it serves, and how to ask it."""
    models = engine.models()
    typer.echo(f"page: {address}/\napi: {address}/v1")
    for served in models:
        typer.echo(f"model: {served.name}" + "  (time-aware)" * served.time_aware)
    bearer = ' -H "Authorization: Bearer $GEMMATE_SERVE_KEY"' if key else ""
    body = f'{{"model": "{models[-1].name}", "prompt": "Quote: Imagination is more"}}'
    kind = "-H 'Content-Type: application/json'"
    typer.echo(f"try: curl {address}/v1/completions {kind}{bearer} -d '{body}'")
    typer.echo(f"{limits.slots} slots, {limits.queue} may wait; stop with Ctrl+C")
