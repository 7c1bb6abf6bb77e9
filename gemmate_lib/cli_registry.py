"""The command line's part for versions: add, list, tag, promote, roll back, and the history."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmate_lib.cli_runs import Limit
from gemmate_lib.cli_shipped import AsJson

if TYPE_CHECKING:
    from gemmate_lib.promotion import Evidence
    from gemmate_lib.registry import Registry
    from gemmate_lib.tags import Tag
    from gemmate_lib.versions import Version

registry_app = typer.Typer(
    help="Versions of runs that never change, and tags that move.", no_args_is_help=True
)

Where = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="GEMMATE_REGISTRY",
        show_envvar=True,
        help="A folder, or an fsspec URL such as gs://bucket/models.",
    ),
]
Why = Annotated[str, typer.Option(help="A reason, for the history.")]
_HEAD = [f"{'version':<14}{'experiment':<16}{'method':<10}{'base':<20}{'made':<27}tags"]
VersionName = Annotated[str, typer.Argument(help="A tag, or 4 digits of a version or more.")]


@registry_app.command()
def add(
    run: Annotated[Path, typer.Argument(help="A run's folder, made by `gemmate finetune`.")],
    registry: Where,
) -> None:
    """Put a run into the registry as a version; prints its number."""
    from gemmate_lib.registry import Registry
    from gemmate_lib.sft import load_run

    typer.echo(Registry(registry).versions.add(load_run(run)).digest)


@registry_app.command("list")
def list_versions(registry: Where, as_json: AsJson = False) -> None:
    """List the versions: experiment, method, base, metrics, when, and the tags on each.

    A version that is damaged or was never finished is named, with exit code 1.
    """
    from gemmate_lib.config import GemmateError
    from gemmate_lib.registry import Registry
    from gemmate_lib.versions import Version

    place, found, faults = Registry(registry), list[Version](), list[str]()
    tags = {name: tag.version for name, tag in place.tags().items()}
    for name in place.versions.names():
        try:
            found.append(place.versions.read(name))
        except GemmateError as error:
            faults.append(str(error))
    found.sort(key=lambda version: version.note.added, reverse=True)
    rows = [_row(version, tags) for version in found]
    if as_json:
        typer.echo(json.dumps({"versions": rows, "tags": tags, "faults": faults}))
    else:
        told = [line for row in rows for line in _told_of(row)]
        typer.echo("\n".join([*_HEAD * any(rows), *told, *faults]) or "The registry is empty.")
    raise typer.Exit(1 if faults else 0)


def _row(version: "Version", tags: dict[str, str]) -> dict[str, Any]:
    experiment = version.experiment
    return {
        "version": version.digest,
        "experiment": experiment.name,
        "method": experiment.method,
        "base": experiment.model.id,
        "made": str(version.manifest.get("created", "")),
        "added": version.note.added,
        "tags": sorted(tag for tag, at in tags.items() if at == version.digest),
        "metrics": {name: metric.model_dump() for name, metric in version.metrics.items()},
    }


def _told_of(row: dict[str, Any]) -> list[str]:
    from gemmate_lib.versions import Measured

    line = f"{row['version'][:12]:<14}{row['experiment']:<16}{row['method']:<10}"
    line += f"{row['base']:<20}{row['made']:<27}{', '.join(row['tags'])}"
    metrics = row["metrics"].items()
    return [_plain(line), *(f"    {name:<24}{Measured(**found)}" for name, found in metrics)]


def _plain(text: str) -> str:
    """What others wrote, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text).rstrip()


@registry_app.command()
def tag(
    version: Annotated[str, typer.Argument(help="A run's folder, which is added; or a version.")],
    name: Annotated[str, typer.Argument(help="candidate, production, or another.")],
    registry: Where,
    why: Why = "",
) -> None:
    """Move a tag to a version, whatever it measures; `promote` compares first."""
    from gemmate_lib.registry import Registry
    from gemmate_lib.sft import load_run
    from gemmate_lib.tags import check_tag

    place = Registry(registry)
    seen = place.tag(check_tag(name))
    is_run = (Path(version) / "manifest.json").is_file()
    found = place.versions.add(load_run(version)) if is_run else place.find(version)
    _told(seen, place.move(name, found.digest, seen=seen, why=why))


def _told(before: "Tag | None", after: "Tag") -> None:
    from gemmate_lib.tags import short

    if before == after:
        typer.echo(f"{after.name} is at {short(after.version)} already")
    else:
        was = short(before.version if before else None)
        typer.echo(f"{after.name}: {was} -> {short(after.version)}")


@registry_app.command()
def promote(
    registry: Where,
    version: VersionName = "candidate",
    force: Annotated[
        str | None, typer.Option(metavar="WHY", help="Even if it is worse; the reason is kept.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="One that decides, in place of ours; repeatable.")
    ] = None,
    limit: Limit = None,
    why: Why = "",
) -> None:
    """Move `production` to a version, unless that is worse beyond noise; then exit code 1.

    Both are measured on the same test rows. The metrics that decide are corrected for their number.
    """
    from gemmate_lib.registry import Registry
    from gemmate_lib.tags import PRODUCTION, short

    place = Registry(registry)
    found, seen = place.find(version), place.tag(PRODUCTION)
    evidence = None
    if seen is None:
        typer.echo("There is no production yet: nothing to compare with.")
    elif seen.version != found.digest:
        evidence = _weigh(place, place.versions.read(seen.version), found, metric, limit, force)
    if evidence and evidence.worse and not force:
        where = f"{short(found.digest)} is worse than production in {', '.join(evidence.worse)}"
        typer.echo(f"gemmate: {where}. Not promoted; --force WHY does it all the same.", err=True)
        raise typer.Exit(1)
    reason, shown = f"forced: {force}" if force else why, evidence.as_dict() if evidence else {}
    _told(seen, place.move(PRODUCTION, found.digest, seen=seen, act="promote", why=reason,
                           evidence=shown))  # fmt: skip


def _weigh(
    place: "Registry",
    production: "Version",
    candidate: "Version",
    metrics: list[str] | None,
    limit: int | None,
    force: str | None,
) -> "Evidence | None":
    """Print what the comparison says; with `force`, what it cannot say is printed and passed."""
    from gemmate_lib.config import GemmateError
    from gemmate_lib.promotion import compare_versions, weigh
    from gemmate_lib.tags import short

    try:
        found = weigh(compare_versions(place, production, candidate, limit=limit), metrics or ())
    except GemmateError as error:
        if not force:
            raise
        typer.echo(f"not compared: {error}")
        return None
    both = f"{short(candidate.digest)} less {short(production.digest)}"
    typer.echo("\n".join([f"{both}, on the same test rows:", *found.lines()]))
    return found


@registry_app.command()
def rollback(
    registry: Where,
    name: Annotated[str, typer.Argument(metavar="[TAG]")] = "production",
    why: Why = "",
) -> None:
    """Move a tag to the version before; again: one further back. `tag` goes forward."""
    from gemmate_lib.registry import Registry

    place = Registry(registry)
    before = place.tag(name)
    _told(before, place.rollback(name, why=why))


@registry_app.command()
def log(
    registry: Where,
    name: Annotated[str, typer.Argument(metavar="[TAG]")] = "production",
    as_json: AsJson = False,
) -> None:
    """Print a tag's moves: when, who, from where to where, and why."""
    from gemmate_lib.config import GemmateError
    from gemmate_lib.registry import Registry
    from gemmate_lib.tags import short

    tag = Registry(registry).tag(name)
    if tag is None:
        raise GemmateError(f"There is no tag {name}. Make it: gemmate registry tag VERSION {name}")
    if as_json:
        typer.echo(json.dumps([move.model_dump(mode="json") for move in tag.moves]))
        return
    for move in tag.moves:
        moved = f"{short(move.before):<12} -> {short(move.to)}"
        typer.echo(_plain(f"{move.when}  {move.act:<8}  {moved}  {move.who}  {move.why}"))
