"""A Kubeflow pipeline, version 2: prepare, train, evaluate, compare, publish, register, deploy.

The same definition is compiled for Vertex AI Pipelines and run here, each component a process.
Kubeflow sends a component as its source text, so its body imports what it needs by itself.

Old tutorials run pipelines by `kfp.v2.google.client.AIPlatformClient`. It no longer exists: in its
place stands `google.cloud.aiplatform.PipelineJob`, see gemmate_lib/vertex.py.
"""

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError
from gemmate_lib.extras import need
from gemmate_lib.remote import TOKEN, check_secret

HERE = "python:3.12"  # of a run on this machine, where no image is used
NAME = "gemmate"


def components(image: str) -> dict[str, Any]:
    """The seven components, to run in an image that has this library with its extra `cloud`."""
    need("kfp", "The pipeline", extra="cloud")
    from kfp import dsl

    from gemmate_lib import steps

    make = dsl.component(base_image=image, install_kfp_package=False)
    names = ("prepare", "train", "evaluate", "compare", "publish", "register", "deploy")
    return {name: make(getattr(steps, name)) for name in names}


def define(
    image: str = HERE,
    *,
    enable_caching: bool = True,
    accelerator: str | None = None,
    hf_token_secret: str | None = None,
) -> Any:
    """The pipeline's definition.

    image: has this library in it, as `pip install "gemmate-course[cloud]"` puts it there.
    hf_token_secret: where the Hub's token lies, projects/P/secrets/NAME/versions/latest.
    accelerator: what training and evaluating need, such as NVIDIA_L4; none: a CPU.
    """
    check_secret(hf_token_secret)
    step = components(image)
    from kfp import dsl

    def cached(task: Any) -> Any:
        if hf_token_secret:
            task.set_env_variable(TOKEN, hf_token_secret)
        return task.set_caching_options(enable_caching)

    def on_gpu(task: Any) -> Any:
        if accelerator:
            task.set_accelerator_type(accelerator).set_accelerator_limit(1)
        return cached(task)

    @dsl.pipeline(name=NAME, description="Fine-tune, measure, and let out what is not worse.")
    def pipeline(
        source: str,
        experiment: str = "quotes",
        profile: str = "auto",
        settings: list[str] = [],  # noqa: B006  (Kubeflow reads the default; nothing changes it)
        limit: int = 64,
        published: str = "",
        cloud: dict[str, Any] = {},  # noqa: B006
    ) -> None:
        chosen = {"experiment": experiment, "profile": profile, "settings": settings}
        data = cached(step["prepare"](source=source, **chosen)).outputs["data"]
        run = on_gpu(step["train"](data=data, **chosen)).outputs["run"]
        measured = on_gpu(step["evaluate"](run=run, limit=limit)).outputs
        both = {name: measured[name] for name in ("before", "after")}
        verdict = cached(step["compare"](**both)).outputs["Output"]
        # No dsl.If: kfp 2.16.1 cannot work out a condition here, and goes on without its branch.
        staged = cached(
            step["publish"](run=run, after=both["after"], verdict=verdict, url=published)
        )
        folder = staged.outputs["folder"]
        registered = step["register"](folder=folder, url=published, cloud=cloud)
        deployed = step["deploy"](model=registered.outputs["model"], cloud=cloud)
        for elsewhere in (registered, deployed):  # what was done once may be gone there
            elsewhere.set_caching_options(False)

    return pipeline


def compile_pipeline(path: str | Path, **options: Any) -> Path:
    """Write the pipeline's definition as YAML; `options` are those of `define`."""
    from kfp import compiler

    pipeline = define(**options)
    compiler.Compiler().compile(pipeline, str(path))
    return Path(path)


@dataclass(frozen=True)
class Outcome:
    """What a whole pipeline came to."""

    folder: Path
    """Where its components wrote, one folder each."""
    verdict: str
    """Of the comparison with the base: better, worse or within noise."""
    comparison: list[str]
    """A line for each metric."""
    metrics: dict[str, float]
    """Of the trained run, on the test rows."""
    deployed: str
    """What was deployed, or would have been."""

    def lines(self) -> list[str]:
        """Return it for people."""
        return [*self.comparison, self.deployed, f"all of it: {self.folder}"]


def run_here(source: str | Path, out: str | Path, **arguments: Any) -> Outcome:
    """Run the whole pipeline on this machine, each component a process of its own.

    out: a new folder for what the components write, and for log.txt, all that they say.
    arguments: those of the pipeline; see `define`.
    Raises: GemmateError where a component failed.
    """
    out = Path(out)
    if out.exists():
        raise GemmateError(f"{out} exists. Give another folder, or delete it.")
    pipeline = define()
    from kfp import local

    out.mkdir(parents=True)
    place = str(source) if "://" in str(source) else str(Path(source).resolve())
    runner, shared = local.SubprocessRunner(use_venv=False), str(out / "workspace")
    local.init(runner, pipeline_root=str(out), workspace_root=shared)
    log = out / "log.txt"
    try:
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            pipeline(source=place, **arguments)
    except RuntimeError as error:
        raise GemmateError(f"{_why(log) or error} All that was said: {log}.") from None
    return read_outcome(next(out.glob(f"{NAME}-*")))


def _why(log: Path) -> str:
    """The last error that a component ended with, in one line."""
    found = re.findall(r"(?:^|\n)\s*(?:[\w.]+Error): (.+)", log.read_text("utf-8"))
    return f"The pipeline stopped: {found[-1]}" if found else ""


def read_outcome(folder: Path) -> Outcome:
    """Read what the components of a pipeline left in its folder."""

    def told(name: str) -> Any:
        return json.loads((folder / name / "executor_output.json").read_text("utf-8"))

    compared, measured = told("compare"), told("evaluate")
    values = measured["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    lines = compared["artifacts"]["metrics"]["artifacts"][0]["metadata"]["lines"]
    verdict, deployed = (told(n)["parameterValues"]["Output"] for n in ("compare", "deploy"))
    return Outcome(folder, verdict, lines, values, deployed)
