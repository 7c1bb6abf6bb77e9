"""The adapter that comes with the library: a tiny Gemma that knows the date."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gemmate_lib.adapters import RECORD
from gemmate_lib.config import Experiment, Facts, resolve
from gemmate_lib.manifest import write_manifest
from gemmate_lib.models import SHIPPED, load_tokenizer
from gemmate_lib.settings import digest
from gemmate_lib.sft import Run, check_new, finetune_model, load_run
from gemmate_lib.trainer import Report

NAME = "tiny-gemma-te"
FILES = ("adapter_config.json", RECORD)


def build_adapter(out: Path, *, report: Report | None = None) -> Path:
    """Run the experiment `temporal` in the tiny profile; keep its adapter in `out / NAME`.

    Raises: GemmateError where the folder exists already.
    """
    check_new(out / NAME)
    experiment = resolve("temporal", facts=Facts(), profile="tiny").experiment
    return keep(finetune_model(experiment, out=out / f"{NAME}-run", report=report), out / NAME)


def own_hash(experiment: Experiment) -> str:
    """16 hexadecimal digits of the settings that differ from their defaults.

    A setting that comes to be later does not make another experiment of this one.
    """
    return digest(experiment.model_dump(mode="json", exclude_defaults=True))[:16]


def keep(run: Run, folder: Path) -> Path:
    """Write the adapter of a run to a new folder, without tokenizer and with how it began.

    The matrices of LoRA are stored in bfloat16 and the encoder in float32: it must tell days apart.
    """
    folder.mkdir(parents=True)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    halved = {k: v if "temporal" in k else v.to(torch.bfloat16) for k, v in weights.items()}
    save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for name in FILES:
        shutil.copyfile(run.adapter / name, folder / name)
    log = [record["loss"] for record in run.log if "loss" in record]
    record = {"experiment": own_hash(run.experiment), "first": [round(loss, 4) for loss in log[:6]]}
    (folder / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


def shipped_run(out: Path) -> Run:
    """Write the adapter that comes with the library as a run, to be asked and served as any other.

    Its log and its metrics are not known any more.
    Raises: GemmateError where the folder exists already.
    """
    check_new(out)
    experiment = resolve("temporal", facts=Facts(), profile="tiny").experiment
    shutil.copytree(SHIPPED[NAME], out / "adapter", ignore=shutil.ignore_patterns("build.json"))
    load_tokenizer(experiment.model.id).save_pretrained(out / "adapter")
    base = json.loads((SHIPPED[NAME] / RECORD).read_text("utf-8"))
    empty: dict[str, dict[str, float]] = {"metrics": {}, "timings": {}}
    write_manifest(
        out, kind="sft", experiment=experiment, facts={}, data={}, base=base, **empty
    )  # fmt: skip
    return load_run(out)
