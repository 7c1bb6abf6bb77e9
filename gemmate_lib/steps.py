"""The pipeline's components: thin, since Kubeflow sends each as its source text, by itself.

What they do is in gemmate_lib/stages.py. Imported by gemmate_lib/pipeline.py alone, which says what
to install where Kubeflow is missing.
"""

from kfp.dsl import Dataset, Input, Metrics, Model, Output


def prepare(
    source: str, experiment: str, profile: str, settings: list, data: Output[Dataset]
) -> None:
    """Rows in three splits, from a table or a folder of documents."""
    from pathlib import Path

    from gemmate_lib import stages

    rows = stages.prepare(
        source, Path(data.path), experiment=experiment, profile=profile, settings=settings
    )
    data.metadata.update(rows)
    print("rows:", rows)


def train(
    data: Input[Dataset],
    experiment: str,
    profile: str,
    settings: list,
    run: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """A run, fine-tuned on the rows."""
    from pathlib import Path

    from gemmate_lib import stages

    found = stages.train(
        Path(data.path), Path(run.path), experiment=experiment, profile=profile, settings=settings
    )
    for name, value in found.items():
        metrics.log_metric(name, value)
    print("trained:", found)


def evaluate(
    run: Input[Model],
    limit: int,
    before: Output[Dataset],
    after: Output[Dataset],
    metrics: Output[Metrics],
) -> None:
    """Base and run, measured on the same test rows."""
    from pathlib import Path

    from gemmate_lib import stages

    found = stages.evaluate(
        Path(run.path), Path(before.path), Path(after.path), limit=limit or None
    )
    for name, value in found.items():
        metrics.log_metric(name, value)
    print("measured:", found)


def compare(before: Input[Dataset], after: Input[Dataset], metrics: Output[Metrics]) -> str:
    """Whether the run is better than its base, worse, or within noise."""
    from pathlib import Path

    from gemmate_lib import stages

    verdict, lines = stages.compare(Path(before.path), Path(after.path))
    metrics.metadata["lines"] = lines
    print("\n".join(lines))
    return verdict


def publish(
    run: Input[Model], after: Input[Dataset], verdict: str, url: str, folder: Output[Model]
) -> None:
    """A clean folder with weights, card and manifest, copied to a bucket if one is given."""
    from pathlib import Path

    from gemmate_lib import stages

    files = stages.publish(
        Path(run.path), Path(after.path), Path(folder.path), verdict=verdict, url=url
    )
    folder.metadata["files"] = len(files)
    print("published:", *files, "to", url or folder.path)


def register(folder: Input[Model], url: str, cloud: dict, model: Output[Model]) -> None:
    """The folder in Vertex AI's model registry; a dry run unless cloud says for_real."""
    from pathlib import Path

    from gemmate_lib import stages

    print(stages.register(Path(folder.path), Path(model.path), url=url, cloud=cloud))


def deploy(model: Input[Model], cloud: dict) -> str:
    """The registered model behind an endpoint; a dry run unless cloud says for_real."""
    from pathlib import Path

    from gemmate_lib import stages

    said = stages.deploy(Path(model.path), cloud=cloud)
    print(said)
    return said
