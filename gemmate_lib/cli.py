"""The command line: one short function a command; what is heavy is imported inside."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="gemmate",
    help="Fine-tune Gemma, evaluate it and teach it what time it is: the course's library.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)
tiny_app = typer.Typer(help="The embedded tiny models.", no_args_is_help=True)
card_app = typer.Typer(help="Data cards: what a data set is, checked.", no_args_is_help=True)
app.add_typer(tiny_app, name="tiny")
app.add_typer(card_app, name="card")

RunFolder = Annotated[Path, typer.Argument(help="A run's folder, made by `gemmate finetune`.")]
Profile = Annotated[str, typer.Option(help="auto, tiny, t4, ampere or full.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
Limit = Annotated[int | None, typer.Option(help="Generate for this many test rows only.")]


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
    profile: Profile = "tiny",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="NAME=VALUE for the notebooks; repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE [NAME=VALUE,VALUE …]: run every combination."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/course/<stamp>.")] = None,
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

    if resume:
        order, out = newest_order(out)
    else:
        order = Order(
            profile=profile,
            only=only or (),
            parameters=read_pairs(parameter or (), "-p lora_r=16"),
            grid=read_grid([*(grid or ()), *(more or ())]),
            cell_timeout=cell_timeout,
            notebook_timeout=notebook_timeout,
            jobs=jobs,
        )
    raise typer.Exit(0 if run_course(order, out=out, resume=resume).ok else 1)


@app.command()
def finetune(
    experiment: Annotated[str, typer.Argument(help="A shipped experiment, or a .yaml file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; it must not exist yet.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, as in training.max_steps=20; repeatable."),
    ] = None,
    profile: Profile = "auto",
    explain: Annotated[bool, typer.Option(help="Print every setting with its reason.")] = False,
    limit: Limit = None,
) -> None:
    """Fine-tune on an experiment, then evaluate on its test split."""
    from gemmate_lib import machine
    from gemmate_lib.config import resolve

    resolved = resolve(
        experiment, facts=machine.read_facts(), profile=profile, overrides=settings or ()
    )
    if explain:
        typer.echo(str(resolved.table()))
    typer.echo(f"profile {resolved.experiment.profile}: {resolved.reasons['profile']}")
    from gemmate_lib.sft import check_new, finetune_model, load_splits

    check_new(out)
    splits = load_splits(resolved.experiment)
    typer.echo("\n".join(splits.report.lines()))
    run = finetune_model(resolved.experiment, out=out, splits=splits, report=_progress)
    seconds = run.manifest["timings"]["train"]
    typer.echo(f"trained {run.metrics['steps']} steps in {seconds:.1f} s: {run.directory}")
    typer.echo("\n".join(_evaluate(run, limit=limit).lines()))


def _progress(record: dict[str, float]) -> None:
    """Print an evaluation, or every tenth step."""
    step = int(record["step"])
    if "eval_loss" in record:
        typer.echo(f"step {step:>5}  validation loss {record['eval_loss']:.3f}")
    elif "loss" in record and step % 10 == 0:
        typer.echo(f"step {step:>5}  loss {record['loss']:.3f}")


def _evaluate(run: Any, *, limit: int | None) -> Any:
    from gemmate_lib.evaluate import evaluate_run

    return evaluate_run(run, limit=limit)


@app.command()
def evaluate(run: RunFolder, as_json: AsJson = False, limit: Limit = None) -> None:
    """Measure a run on its test split; writes metrics.json and predictions.jsonl into it."""
    from gemmate_lib.sft import load_run

    found = _evaluate(load_run(run), limit=limit)
    typer.echo(json.dumps(found.as_dict()["metrics"]) if as_json else "\n".join(found.lines()))


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="A run's folder, or `base` for the base of RUN_B.")],
    run_b: RunFolder,
    as_json: AsJson = False,
    limit: Limit = None,
) -> None:
    """Compare two runs on the same test rows, with paired intervals."""
    from dataclasses import asdict

    from gemmate_lib.evaluate import compare_models, evaluate_run
    from gemmate_lib.sft import load_run

    second = load_run(run_b)
    first = second if run_a == "base" else load_run(run_a)
    before = evaluate_run(first, limit=limit, base_only=run_a == "base", save=False)
    found = compare_models(before, evaluate_run(second, limit=limit, save=False))
    if as_json:
        typer.echo(json.dumps({name: asdict(item) for name, item in found.items()}))
        return
    for name, item in found.items():
        typer.echo(f"{name:<24}{item.difference}  p={item.p_value:.3g}  {item.verdict()}")


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="JSON Lines; each row with `prompt`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON Lines: each row with `completion` added.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the experiment's.")] = None,
) -> None:
    """Complete a prompt, or a file of prompts."""
    from gemmate_lib.config import GemmateError
    from gemmate_lib.generate import generate_texts
    from gemmate_lib.sft import load_run, open_run

    if (prompt is None) == (source is None) or (source is None) != (output is None):
        raise GemmateError("Give either --prompt TEXT, or --input FILE with --output FILE.")
    rows: list[dict[str, Any]] = [{"prompt": prompt}] if source is None else _prompts(source)
    found = load_run(run)
    loaded, settings = open_run(found), found.experiment.generation
    texts = generate_texts(
        loaded.model,
        loaded.tokenizer,
        [row["prompt"] for row in rows],
        max_new_tokens=max_new_tokens or settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    if output is None:
        typer.echo(f"{prompt}{texts[0].text}")
        return
    done = [row | {"completion": text.text} for row, text in zip(rows, texts, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
    output.write_text(lines, "utf-8")
    typer.echo(f"{len(done)} completions: {output}")


def _prompts(source: Path) -> list[dict[str, Any]]:
    from gemmate_lib.config import GemmateError
    from gemmate_lib.formats import read_table

    rows = read_table(source)
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise GemmateError(f"{source}, row {number}: no `prompt`. Give each row one.")
    return rows


@app.command()
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(help="Where to: USER/NAME on the Hub.")],
    merged: Annotated[bool, typer.Option(help="The merged model instead of the adapter.")] = False,
    for_real: Annotated[bool, typer.Option(help="Upload; without it only the plan.")] = False,
    public: Annotated[bool, typer.Option(help="A public repository.")] = False,
) -> None:
    """List what would go up to the Hub; upload it with --for-real."""
    import tempfile

    from gemmate_lib.publish import pull_and_verify, stage
    from gemmate_lib.publish import push as push_folder
    from gemmate_lib.sft import load_run

    with tempfile.TemporaryDirectory() as temporary:
        folder = stage(load_run(run), Path(temporary) / "staged", merged=merged)
        result = push_folder(folder, repo, dry_run=not for_real, private=not public)
    for file in result.plan:
        typer.echo(f"{file.bytes:>12,}  {file.sha256[:12]}  {file.file}")
    if result.commit is None:
        typer.echo(f"dry run: nothing was sent. Upload to {result.repo_id} with --for-real.")
        return
    differences = pull_and_verify(result.repo_id, result.plan, revision=result.commit)
    typer.echo("\n".join(differences) or f"{result.repo_id}@{result.commit}: came back the same")
    raise typer.Exit(1 if differences else 0)


@app.command()
def doctor() -> None:
    """Say what this machine can do, what differs from the lock, and where the token comes from."""
    from gemmate_lib.doctor import examine

    for line in examine():
        typer.echo(line)


@tiny_app.command("build")
def tiny_build(
    out: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("build/tiny"),
    only: Annotated[str | None, typer.Option(help="tiny-gemma or tiny-gemma2.")] = None,
) -> None:
    """Pre-train the embedded models again, side by side: ten to twenty minutes on two cores."""
    from gemmate_lib.config import among
    from gemmate_lib.tiny.build import NAMES, build_all

    build_all([among(only, NAMES, "embedded model")] if only else NAMES, out)


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
