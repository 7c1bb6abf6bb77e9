"""The command line's part for the cloud: what a job would be and cost, and its files."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gemmate_lib.cli_shipped import AsJson, Overrides, Profile

cloud_app = typer.Typer(
    help="Training on Vertex AI: dry runs unless you say --submit.", no_args_is_help=True
)
Prices = Annotated[
    Path | None, typer.Option("--prices", help="Your own table in place of the library's.")
]


@cloud_app.command()
def submit(
    experiment: Annotated[str, typer.Argument(help="A shipped experiment, or a .yaml file.")],
    machine: Annotated[
        str, typer.Option(help="As `gemmate cloud prices` lists.")
    ] = "g2-standard-8",
    accelerator: Annotated[str | None, typer.Option(help="Default: the machine's own.")] = None,
    count: Annotated[int | None, typer.Option(help="Of GPUs; default: the machine's own.")] = None,
    project: Annotated[str | None, typer.Option(envvar="GOOGLE_CLOUD_PROJECT")] = None,
    bucket: Annotated[str | None, typer.Option(help="gs://BUCKET or gs://BUCKET/FOLDER.")] = None,
    region: Annotated[str, typer.Option(help="Where it runs.")] = "us-central1",
    container: Annotated[
        str | None, typer.Option(help="An image with this library; default: it is packaged.")
    ] = None,
    service_account: Annotated[str | None, typer.Option(help="That the job acts as.")] = None,
    hf_token_secret: Annotated[
        str | None, typer.Option(help="projects/P/secrets/NAME/versions/latest: the Hub's token.")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(min=0.1, help="Then the job ends.")] = None,
    spot: Annotated[bool, typer.Option(help="Cheaper, and may be taken away.")] = False,
    for_real: Annotated[
        bool, typer.Option("--submit/--dry-run", help="Send it, with your own credentials.")
    ] = False,
    prices: Prices = None,
    settings: Overrides = None,
    profile: Profile = "auto",
    as_json: AsJson = False,
) -> None:
    """Print what Vertex AI would be sent, and what it would cost; send it with --submit."""
    from gemmate_lib.config import GemmateError
    from gemmate_lib.machine import quiet
    from gemmate_lib.prices import TABLE, estimate, find_machine, read_prices, report, resolve_on
    from gemmate_lib.remote import own_credentials
    from gemmate_lib.vertex import create_training_job

    quiet()
    if for_real and not (project and bucket):
        raise GemmateError("A job needs a project and a bucket. Give --project and --bucket gs://…")
    table = read_prices(prices or TABLE)
    row = find_machine(machine, accelerator, count, region=region, table=table)
    found = resolve_on(row, experiment, profile=profile, overrides=settings or ())
    job = create_training_job(
        found, machine_type=machine, accelerator=accelerator, accelerator_count=count,
        project=project or "PROJECT", location=region, staging_bucket=bucket or "gs://bucket",
        container=container, service_account=service_account, hf_token_secret=hf_token_secret,
        max_hours=max_hours, spot=spot, table=table,
        credentials=own_credentials() if for_real else None,
    )  # fmt: skip
    if for_real:
        typer.echo(f"sent: {job.submit()}")
        return
    estimates = estimate(experiment, profile=profile, overrides=settings or (), table=table)
    if as_json:
        typer.echo(json.dumps({"specification": job.specification(), "remarks": job.remarks,
                               "estimates": [each.as_dict() for each in estimates]}))  # fmt: skip
        return
    typer.echo("\n".join([*job.lines(), "", *report(estimates), "",
                          "dry run: nothing was sent. Send it with --submit."]))  # fmt: skip


@cloud_app.command("prices")
def show_prices(prices: Prices = None, as_json: AsJson = False) -> None:
    """List machines with their GPUs, what an hour costs, and the day each price is of."""
    from gemmate_lib.prices import TABLE, listing, read_prices

    rows = read_prices(prices or TABLE)
    if as_json:
        typer.echo(json.dumps([row.model_dump(mode="json") for row in rows]))
    else:
        typer.echo("\n".join(listing(rows)))


@cloud_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Rows of any form with a prompt.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    system: Annotated[str | None, typer.Option(help="An instruction before every one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert rows to the format of Gemini's managed tuning, and check each of them."""
    from gemmate_lib.managed_tuning import convert_file

    found = convert_file(source, out, system=system)
    typer.echo(json.dumps(found._asdict()) if as_json else f"{found.lines()[0]}: {out}")


@cloud_app.command()
def tune(
    train: Annotated[str, typer.Argument(help="A file in a bucket, made by `convert`.")],
    validation: Annotated[str | None, typer.Option(help="Another one.")] = None,
    model: Annotated[str | None, typer.Option(help="A Gemini that can be tuned.")] = None,
    adapter_size: Annotated[int, typer.Option(help="1, 2, 4, 8 or 16.")] = 4,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: Google's choice.")] = None,
) -> None:
    """Print the call that tunes a Gemini: PEFT cannot, for nobody is given its weights."""
    from gemmate_lib.managed_tuning import MODEL, shown, tuning_call

    call = tuning_call(
        train, validation=validation, model=model or MODEL, adapter_size=adapter_size, epochs=epochs
    )
    typer.echo("from google import genai\nfrom google.genai import types\n")
    typer.echo("client = genai.Client(vertexai=True, project=PROJECT, location=REGION)")
    typer.echo(f"client.tunings.tune(**CALL)  # dry run: nothing was sent; CALL is\n{shown(call)}")


@cloud_app.command()
def upload(
    source: Annotated[Path, typer.Argument(help="A file or a folder.")],
    url: Annotated[str, typer.Argument(help="Where to: gs://BUCKET/FOLDER.")],
) -> None:
    """Copy data or a model to a bucket, with checksums."""
    from gemmate_lib.transfer import upload as copy

    typer.echo(f"{len(copy(source, url))} files: {url}")


@cloud_app.command()
def download(
    url: Annotated[str, typer.Argument(help="What `upload` made, or a job's run.")],
    out: Annotated[Path, typer.Option(help="The folder to put it into.")],
) -> None:
    """Fetch a folder from a bucket, and check every file."""
    from gemmate_lib.transfer import download as fetch

    typer.echo(f"every file as it was put there: {fetch(url, out)}")


@cloud_app.command()
def package(
    out: Annotated[Path, typer.Option(help="The archive to write.")] = Path("package.tar.gz"),
) -> None:
    """Write the package that trains by itself: sources, script and requirements.txt."""
    from gemmate_lib.manifest import file_sha256
    from gemmate_lib.packaged import build_package

    typer.echo(f"{file_sha256(build_package(out))}  {out}")


@cloud_app.command()
def pipeline(
    source: Annotated[
        str | None, typer.Argument(help="Run it here on this: a table, a folder, or a URL.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The .yaml to write, or the folder of a run.")] = Path(
        "pipeline.yaml"
    ),
    experiment: Annotated[str, typer.Option(help="Its settings.")] = "quotes",
    image: Annotated[str | None, typer.Option(help="An image with this library.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="Such as NVIDIA_L4.")] = None,
    hf_token_secret: Annotated[
        str | None, typer.Option(help="projects/P/secrets/NAME/versions/latest: the Hub's token.")
    ] = None,
    caching: Annotated[bool, typer.Option(help="Keep what came out of equal steps.")] = True,
    limit: Annotated[int, typer.Option(help="Generate for this many test rows.")] = 64,
    settings: Overrides = None,
    profile: Profile = "auto",
) -> None:
    """Write the Kubeflow pipeline as YAML; with a SOURCE, run all of it on this machine."""
    from gemmate_lib.machine import quiet
    from gemmate_lib.pipeline import HERE, compile_pipeline, run_here

    quiet()
    if source is None:
        compile_pipeline(
            out, image=image or HERE, accelerator=accelerator, enable_caching=caching,
            hf_token_secret=hf_token_secret,
        )  # fmt: skip
        typer.echo(f"compiled: {out}")
        return
    done = run_here(
        source, out, experiment=experiment, profile=profile, settings=list(settings or ()),
        limit=limit,
    )  # fmt: skip
    typer.echo("\n".join(done.lines()))
