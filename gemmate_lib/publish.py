"""Publish a run: merge it, stage a clean folder, plan, push, and prove that it came back whole.

`python -m gemmate_lib.publish FOLDER PROMPT OUT.json` loads what was saved in a fresh process and
writes the logits of the token after the prompt: only what lies on disk can have made them.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemmate_lib import machine
from gemmate_lib.adapters import RECORD, load_adapter, temporal_settings, write_json
from gemmate_lib.config import Experiment, GemmateError, ModelConfig
from gemmate_lib.generate import encode_prompt
from gemmate_lib.hub import TOKENIZER, PlannedFile, PushResult, pull_and_verify, push, push_plan
from gemmate_lib.modelcard import model_card, without_folders
from gemmate_lib.models import LoadedModel, load_base, merge_adapter
from gemmate_lib.trust import experiment_of, inside

if TYPE_CHECKING:
    from gemmate_lib.evaluate import Evaluation
    from gemmate_lib.sft import Run

__all__ = [
    "PlannedFile", "PushResult", "fresh_logits", "last_logits", "load_saved", "model_card",
    "new_folder", "pull_and_verify", "push", "push_plan", "save_merged", "stage", "write_merged",
]  # fmt: skip
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", RECORD)


@contextlib.contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A folder that takes its place when all went well, so that none is ever half full.

    Raises: GemmateError where there is one already.
    """
    directory = Path(directory)
    if directory.exists():
        raise GemmateError(f"{directory} exists. Give another folder, or delete it.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".staging-") as temporary:
        (folder := Path(temporary) / "folder").mkdir()
        yield folder
        folder.rename(directory)


def _copy(source: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():  # and no link to a file elsewhere, which would be published
            shutil.copyfile(inside(source, name), folder / name)


def write_merged(run: "Run", folder: Path, evaluation: "Evaluation | None" = None) -> None:
    """Write a run's merged model, tokenizer and card into a folder. Raises: as `merge_adapter`."""
    model = run.experiment.model
    dtype: Literal["float32", "bfloat16"]
    dtype = "float32" if model.compute_dtype == "float32" else "bfloat16"
    if run.experiment.method == "full":
        shutil.copytree(run.model, folder, dirs_exist_ok=True)
    else:
        merged = merge_adapter(run.adapter, model.id, revision=model.revision, dtype=dtype).model
        # No gemmate_base.json here: a merged model is another base than the one it came from.
        merged.save_pretrained(folder)
        _copy(run.adapter, folder, TOKENIZER)
    (folder / "README.md").write_text(model_card(run, evaluation=evaluation, merged=True), "utf-8")


def save_merged(
    run: "Run", directory: str | Path, *, evaluation: "Evaluation | None" = None
) -> Path:
    """Merge a run into its full-precision base: weights, tokenizer and card in a new folder.

    In bf16 where the run computed in half precision, else in fp32. Raises: as `merge_adapter`.
    """
    with new_folder(directory) as folder:
        write_merged(run, folder, evaluation)
    return Path(directory)


def stage(
    run: "Run",
    directory: str | Path,
    *,
    merged: bool = False,
    evaluation: "Evaluation | None" = None,
) -> Path:
    """Make the new folder that goes up: weights, tokenizer, card and manifest, nothing else.

    Raises: GemmateError for a folder that exists, or a run without weights.
    """
    with new_folder(directory) as folder:
        if merged or run.experiment.method == "full":
            write_merged(run, folder, evaluation)
        else:
            _copy(run.adapter, folder, (*ADAPTER, *TOKENIZER))
            for file in (folder / name for name in ADAPTER[1:] if (folder / name).is_file()):
                write_json(file, without_folders(json.loads(file.read_text("utf-8"))))
            (folder / "README.md").write_text(model_card(run, evaluation=evaluation), "utf-8")
        manifest = without_folders(run.manifest)
        # It must fit the configuration that is published, or the manifest counts as altered.
        manifest["config_hash"] = Experiment.model_validate(manifest["config"]).hash()
        write_json(folder / "manifest.json", manifest)
        push_plan(folder)
    return Path(directory)


def load_saved(directory: str | Path, *, base: ModelConfig | None = None) -> LoadedModel:
    """Load a saved adapter on its base, or a merged model on the CPU, where it was merged.

    base: how to load an adapter's base; None: as the manifest beside it says, or its own record.
    """
    folder = Path(directory)
    if not (folder / "adapter_config.json").is_file():
        dtype = json.loads((folder / "config.json").read_text("utf-8"))["dtype"]
        return load_base(ModelConfig(id=str(folder), compute_dtype=dtype, device="cpu"))
    manifests = [f / "manifest.json" for f in (folder, folder.parent)]
    if base is None and (known := [file for file in manifests if file.is_file()]):
        record = json.loads(known[0].read_text("utf-8"))
        base = experiment_of(record).model
    if base is None:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        time = temporal_settings(folder)
        base = ModelConfig(id=record["id"], revision=record["revision"], **time)
    loaded = load_base(base)
    model = load_adapter(loaded, folder)
    return LoadedModel(model, loaded.tokenizer, loaded.device, loaded.reasons, loaded.base)


def last_logits(model: Any, tokenizer: Any, prompt: str) -> list[float]:
    """Return the fp32 logits of the token after a prompt: one per word of the vocabulary."""
    import torch

    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    training = model.training
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0, -1].float()
    model.train(training)
    return logits.tolist()


def fresh_logits(
    directory: str | Path,
    prompt: str,
    *,
    kind: Literal["adapter", "merged"],
    base: ModelConfig | None = None,
) -> list[float]:
    """Return `last_logits` of a saved adapter or merged model, from a fresh process.

    Raises: GemmateError where the folder is of the other kind, or cannot be loaded.
    """
    import torch

    if (kind == "adapter") != (Path(directory) / "adapter_config.json").is_file():
        raise GemmateError(f"{directory} holds no {kind}. Name the folder it was saved to.")
    package = str(Path(__file__).parents[1])
    threads = str(torch.get_num_threads())  # of which the last bits depend
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package, env.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "logits.json"
        command = [sys.executable, "-m", "gemmate_lib.publish", str(directory), prompt, str(out)]
        command += [base.model_dump_json()] if base else []
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise GemmateError(f"Cannot load {directory} in a fresh process: {why}")
        return json.loads(out.read_text("utf-8"))


def _main(directory: str, prompt: str, out: str, base: str | None = None) -> None:
    machine.prepare(seed=0)
    settings = ModelConfig.model_validate_json(base) if base else None
    saved = load_saved(directory, base=settings)
    Path(out).write_text(json.dumps(last_logits(saved.model, saved.tokenizer, prompt)), "utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
