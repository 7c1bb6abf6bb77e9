"""The command line's part for what has been trained: measure, compare, ask, publish."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemmate_lib.cli_shipped import AsJson, progress

runs_app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(help="A run's folder, made by `gemmate finetune`.")]
Limit = Annotated[int | None, typer.Option(help="Generate for this many test rows only.")]


@runs_app.command()
def evaluate(
    run: RunFolder,
    tasks: Annotated[
        list[str] | None, typer.Argument(help="With --suite: the names of tasks.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="`lm-eval`: tasks of lm-eval-harness instead.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --suite: a folder of your own task files.")
    ] = None,
    as_json: AsJson = False,
    limit: Limit = None,
) -> None:
    """Measure a run on its test split; writes metrics.json and predictions.jsonl into it."""
    from gemmate_lib.config import GemmateError, among
    from gemmate_lib.evaluate import evaluate_run
    from gemmate_lib.sft import load_run

    if suite is not None:
        from gemmate_lib.suites import lines, run_lm_eval

        among(suite, ("lm-eval",), "suite")
        result = run_lm_eval(load_run(run), tasks or [], include_path=include_path, limit=limit)
        typer.echo(json.dumps(result) if as_json else "\n".join(lines(result)))
        return
    if tasks or include_path:
        raise GemmateError("Tasks belong to a suite. Add --suite lm-eval.")
    found = evaluate_run(load_run(run), limit=limit)
    typer.echo(json.dumps(found.as_dict()["metrics"]) if as_json else "\n".join(found.lines()))


@runs_app.command()
def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Train a run again from its manifest; exit code 1 where another result comes out."""
    from gemmate_lib.sft import load_run
    from gemmate_lib.verify import verify_run

    found = verify_run(load_run(run), report=None if as_json else progress)
    typer.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
    raise typer.Exit(1 if found.outcome == "different" else 0)


@runs_app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="A run's folder, or `base` for the base of RUN_B.")],
    run_b: RunFolder,
    changed: Annotated[
        str | None, typer.Option(help="Show the ten rows that this metric changed most.")
    ] = None,
    as_json: AsJson = False,
    limit: Limit = None,
) -> None:
    """Compare two runs on the same test rows, with paired intervals."""
    from dataclasses import asdict

    from gemmate_lib.evaluate import changed_most, compare_models, evaluate_run
    from gemmate_lib.sft import load_run

    second = load_run(run_b)
    first = second if run_a == "base" else load_run(run_a)
    before = evaluate_run(first, limit=limit, base_only=run_a == "base", save=False)
    after = evaluate_run(second, limit=limit, save=False)
    found = compare_models(before, after)
    rows = changed_most(before, after, changed) if changed else []
    if as_json:
        both = {name: asdict(item) for name, item in found.items()}
        typer.echo(json.dumps(both | ({"changed": rows} if changed else {})))
        return
    for name, item in found.items():
        typer.echo(f"{name:<24}{item.difference}  p={item.p_value:.3g}  {item.verdict()}")
    for row in rows:
        typer.echo(f"\n{row['prompt']!r}")
        for said, number in zip(("before", "after"), row[str(changed)], strict=True):
            typer.echo(f"{said:>8} {number:7.3g}  {row[said]!r}")


@runs_app.command()
def judge(
    run_a: Annotated[Path | None, typer.Argument(help="The run to compare with.")] = None,
    run_b: Annotated[Path | None, typer.Argument(help="The run that is judged.")] = None,
    out: Annotated[Path | None, typer.Option(help="The sheet to write: .html or .csv.")] = None,
    limit: Annotated[int | None, typer.Option(help="Draw this many of the unequal pairs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the pairs, their order and their sides.")] = 0,
    filled: Annotated[Path | None, typer.Option("--read", help="A filled sheet, as CSV.")] = None,
    key: Annotated[Path | None, typer.Option(help="With --read: the sheet's key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let a person judge two runs blind: write a sheet, then read it back with its key.

    `gemmate judge RUN_A RUN_B --out sheet.html` pairs what `gemmate evaluate` wrote of both runs,
    and hides which is which in sheet.key.json: keep that from the judge.

    `gemmate judge --read answers.csv --key sheet.key.json` says which run is preferred.
    """
    from gemmate_lib.config import GemmateError
    from gemmate_lib.judge import key_of, write_sheet
    from gemmate_lib.judgement import read_judgement

    if filled and key and not (run_a or out):
        found = read_judgement(filled, key)
        typer.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
        return
    if filled or key or not (run_a and run_b and out):
        raise GemmateError("Give RUN_A RUN_B --out SHEET.html, or --read ANSWERS.csv --key KEY.")
    made = write_sheet(run_a, run_b, out, limit=limit, seed=seed)
    if as_json:
        counts = {"paired": made.paired, "equal": made.equal, "to_judge": len(made.pairs)}
        typer.echo(json.dumps(counts | {"sheet": str(out), "key": str(key_of(out))}))
        return
    typer.echo(f"{made}\nsheet: {out}\nkey: {key_of(out)}, not for the judge's eyes")


@runs_app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="JSON Lines; each row with `prompt`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON Lines: each row with `completion` added.")
    ] = None,
    timestamp: Annotated[
        str | None,
        typer.Option(help="When the prompt is asked: milliseconds or ISO 8601; default: now."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the experiment's.")] = None,
    force: Annotated[bool, typer.Option(help="Even on a base other than the adapter's.")] = False,
) -> None:
    """Complete a prompt, or a file of prompts, each perhaps with its `timestamp`."""
    from gemmate_lib.config import GemmateError
    from gemmate_lib.formats import write_rows
    from gemmate_lib.prompts import complete_rows, read_prompts
    from gemmate_lib.sft import load_run, open_run
    from gemmate_lib.timestamps import now

    if (prompt is None) == (source is None) or (source is None) != (output is None):
        raise GemmateError("Give either --prompt TEXT, or --input FILE with --output FILE.")
    if source is not None and timestamp is not None:
        raise GemmateError("With --input, put a `timestamp` into each row of the file.")
    single: list[dict[str, Any]] = [{"prompt": prompt, "timestamp": timestamp}]
    rows = list(read_prompts(source)) if source else single
    found = load_run(run)
    if prompt is not None and timestamp is None and found.experiment.dataset.timestamp:
        rows[0]["timestamp"] = now()  # a time-aware run is asked now
    loaded, settings = open_run(found, force=force), found.experiment.generation
    length = max_new_tokens or settings.max_new_tokens
    done = complete_rows(
        loaded.model, loaded.tokenizer, rows, max_new_tokens=length, batch_size=settings.batch_size
    )
    if output is None:
        typer.echo(f"{prompt}{done[0]['completion']}")
        return
    write_rows(output, done)
    typer.echo(f"{len(done)} completions: {output}")


@runs_app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A legacy GemmaTE checkpoint, `.pt`.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; it must not exist yet.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")] = "google/gemma-2-2b",
    kind: Annotated[str, typer.Option(help="Its encoder of time.")] = "log",
) -> None:
    """Turn a legacy GemmaTE checkpoint into a model that transformers loads."""
    from gemmate_lib.temporal.convert import convert as write_converted

    typer.echo("\n".join(write_converted(file, out, base=base, kind=kind)))


@runs_app.command()
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
