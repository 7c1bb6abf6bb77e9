"""What others put into files neither runs, nor leads out of its folder, nor shows as a page.

Each test plants something and puts down what becomes of it. Beside what is refused stands a proof
that the thing planted works: that the pickle runs, the script runs, the link is followed.
"""

import ast
import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import canary
import pytest
import torch
from printed import printed

from gemmate_lib import checkpoints, cli, evaluate
from gemmate_lib.adapters import load_adapter
from gemmate_lib.config import CheckpointConfig, Experiment, GemmateError, ModelConfig
from gemmate_lib.evaluate import evaluate_run
from gemmate_lib.generate import Completion, generate_texts
from gemmate_lib.models import load_base, load_tokenizer, model_path
from gemmate_lib.publish import load_saved, model_card, stage
from gemmate_lib.settings import digest
from gemmate_lib.sft import Run, finetune_model, load_run

ROOT = Path(__file__).parents[2]
Make = Callable[..., Any]
Note = Callable[..., None]
FAST = {"training.max_steps": 2, "training.batch_size": 2, "training.eval_every": 0,
        "checkpoint.save_every": 1, "training.warmup_steps": 1, "dataset.limit": 20}  # fmt: skip


@pytest.fixture(scope="module")
def run(experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune_model(experiment(**FAST), out=tmp_path_factory.mktemp("run") / "run")


def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> tuple[int, str]:
    """Exit status of the command line, and what it says: on stdout too, where all is well."""
    monkeypatch.setattr(sys, "argv", ["gemmate", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run()
    status, heard = int(stop.value.code or 0), capsys.readouterr()
    return status, heard.err if status else heard.out + heard.err


# Pickles: a file that runs code when it is read


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a planted code makes; after the test it is not there."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists(), "the planted code ran"


def plant(file: Path, marker: Path) -> None:
    torch.save({"state": Evil(marker), "param_groups": []}, file)


PICKLES = ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt",
           "scheduler.pt", "rng_state.pth")  # fmt: skip


def test_the_planted_pickle_would_run(tmp_path: Path) -> None:
    plant(tmp_path / "evil.bin", tmp_path / "ran")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.fixture
def adapter(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base(ModelConfig())


def test_pickles_beside_an_adapter(adapter: Path, base: Any, marker: Path, note: Note) -> None:
    for name in PICKLES:
        plant(adapter / name, marker)
    load_adapter(base, adapter).unload()
    note("pickles beside an adapter's safetensors: " + ", ".join(PICKLES), "never read")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_for_an_adapter(name: str, run: Run, tmp_path: Path, marker: Path, note: Note,
                                 monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    folder = Path(shutil.copytree(run.directory, tmp_path / "run"))
    (folder / "adapter/adapter_model.safetensors").unlink()
    plant(folder / "adapter" / name, marker)
    status, said = command(monkeypatch, capsys, "generate", folder, "--prompt", "Quote: A")
    assert status == 2 and "adapter" in said
    note(f"a pickle as {name}, in place of an adapter", "refused", said)


def test_even_an_honest_pickled_adapter(adapter: Path, base: Any, marker: Path, note: Note) -> None:
    from safetensors.torch import load_file

    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(GemmateError, match="Only safetensors are read") as refused:
        load_adapter(base, adapter)
    note("an adapter saved as adapter_model.bin", "refused", refused.value)


def test_an_adapter_that_would_read_other_files(adapter: Path, base: Any, note: Note) -> None:
    settings = {"peft_type": "XLORA", "adapters": {"0": "somebody/else"}, "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(GemmateError, match="holds a XLORA adapter") as refused:
        load_adapter(base, adapter)
    note("an adapter of a kind that loads more adapters", "refused", refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base of one's own."""
    return Path(shutil.copytree(model_path("tiny-gemma"), tmp_path / "base"))


def test_pickles_beside_a_base(folder: Path, marker: Path, note: Note) -> None:
    for name in PICKLES:
        plant(folder / name, marker)
    load_base(ModelConfig(id=str(folder)))
    note("pickles beside a base's safetensors: " + ", ".join(PICKLES), "never read")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "part.bin"])
def test_a_pickle_for_a_base(name: str, folder: Path, marker: Path, note: Note) -> None:
    (folder / "model.safetensors").unlink()
    plant(folder / name, marker)
    if name == "part.bin":  # the index is of safetensors, and names a pickle
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GemmateError, match="safetensors") as refused:
        load_base(ModelConfig(id=str(folder)))
    note(f"a pickle as {name}, in place of a base", "refused", refused.value)


def test_an_adapter_hidden_in_a_base(folder: Path, adapter: Path, note: Note) -> None:
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, folder)
    with pytest.raises(GemmateError, match="holds an adapter") as refused:
        load_base(ModelConfig(id=str(folder)))
    note("an adapter in a base's folder, to be put on silently", "refused", refused.value)


def cut_off(run: Run, out: Path, *, after: int) -> Path:
    """A run that was killed after a step; its newest checkpoint."""
    for step in range(1, after + 1):
        name = f"checkpoints/checkpoint-{step}"
        shutil.copytree(run.directory / name, out / name)
    (out / ".unfinished").touch()
    return out / f"checkpoints/checkpoint-{after}"


def seal_again(checkpoint: Path) -> None:
    """Forge the manifest, so that every hash fits."""
    record = checkpoints.read(checkpoint).manifest
    (checkpoint / "checkpoint.json").unlink()
    staged = checkpoint.rename(checkpoint.parents[1] / "staged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "UNWANTED", ())
        checkpoints.seal(staged, checkpoint.parent, record)


@pytest.mark.parametrize("forged", [False, True], ids=["as it was", "forged"])
@pytest.mark.parametrize("name", [*PICKLES, "adapter_model.bin alone"])
def test_a_pickle_in_a_checkpoint(name: str, forged: bool, run: Run, tmp_path: Path,
                                  marker: Path, note: Note) -> None:  # fmt: skip
    newest = cut_off(run, tmp_path / "run", after=1)
    file, _, alone = name.partition(" ")
    plant(newest / file, marker)
    if alone:
        (newest / "adapter_model.safetensors").unlink()
    if forged:
        seal_again(newest)
    with pytest.raises(GemmateError, match=re.escape(file)) as refused:
        finetune_model(run.experiment, out=tmp_path / "run", resume=str(newest))
    manifest = "a forged manifest" if forged else "its manifest as it was"
    note(f"a pickle as {name} in a checkpoint, {manifest}", "refused", refused.value)


def test_a_planted_newest_is_passed_over(run: Run, tmp_path: Path, marker: Path, note: Note,
                                         caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    newest = cut_off(run, tmp_path / "run", after=2)
    plant(newest / "optimizer.pt", marker)
    seal_again(newest)
    again = finetune_model(run.experiment, out=tmp_path / "run", resume="last")
    assert again.manifest["resumed"]["step"] == 1 and again.log == run.log
    note("a pickle as optimizer.pt in the newest checkpoint, a forged manifest",
         "goes on from the one before", caplog.messages[0])  # fmt: skip


def test_a_pickle_in_the_best_checkpoint(experiment: Make, tmp_path: Path, marker: Path,
                                         note: Note) -> None:  # fmt: skip
    """At the end a run goes back to its best, which is not the one that it went on from."""
    worse = {"training.eval_every": 1, "training.early_stopping_patience": 9, "training.max_steps":
             3, "training.learning_rate": 0.5, "training.warmup_steps": 0}  # fmt: skip
    settings = experiment(**FAST | worse)
    whole = finetune_model(settings, out=tmp_path / "whole")
    newest = cut_off(whole, tmp_path / "run", after=2)
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    best = newest.with_name("checkpoint-1")
    plant(best / "adapter_model.bin", marker)
    (best / "adapter_model.safetensors").unlink()
    with pytest.raises(GemmateError, match="adapter_model") as refused:
        finetune_model(settings, out=tmp_path / "run", resume=str(newest))
    note("a pickle as adapter_model.bin in the best checkpoint", "refused", refused.value)


def test_a_pickle_as_a_legacy_checkpoint(
    tmp_path: Path, marker: Path, note: Note, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plant(tmp_path / "old.pt", marker)
    words = ("convert", tmp_path / "old.pt", "--out", tmp_path / "out", "--base", "tiny-gemma")
    status, said = command(monkeypatch, capsys, *words)
    assert status == 2 and "no file of plain tensors" in said and not (tmp_path / "out").exists()
    note("a pickle for gemmate convert", "refused", said)


# Code that comes with a model


@pytest.fixture
def code(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Python that makes the marker; a user who is asked whether to trust it says yes."""
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    caches = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(caches, str(tmp_path / "modules"))
    return (
        f"from pathlib import Path\nPath({str(marker)!r}).mkdir(exist_ok=True)\n"
        "from transformers import GemmaForCausalLM, PretrainedConfig\n"
        "class C(PretrainedConfig):\n    model_type = 'evil'\n"
        "class M(GemmaForCausalLM): pass\nclass T: pass\ndef generate(*a, **b): pass\n"
    )


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


MODEL = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
TRUST = {"trust_remote_code": True}


def test_the_code_of_a_model_would_run(folder: Path, tmp_path: Path, code: str) -> None:
    from transformers import AutoConfig

    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(code)
    edit(folder / "config.json", model_type="evil", auto_map=MODEL)
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    marker.rmdir()  # it was there


def test_the_code_of_a_known_model(folder: Path, code: str, note: Note) -> None:
    for place in (folder, folder / "custom_generate"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(code)
        (place / "generate.py").write_text(code)
    edit(folder / "config.json", auto_map=MODEL, **TRUST)
    edit(folder / "generation_config.json", **TRUST)
    tokens = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    edit(folder / "tokenizer_config.json", **tokens, **TRUST)
    loaded = load_base(ModelConfig(id=str(folder)))
    load_tokenizer(str(folder))
    generate_texts(loaded.model, loaded.tokenizer, ["Quote: A"], max_new_tokens=1)
    note("auto_map, custom_generate and trust_remote_code in a base's files", "never run")


@pytest.mark.parametrize("way", ["load_base", "convert"])
def test_the_code_of_an_unknown_model(way: str, folder: Path, code: str, note: Note,
                                      tmp_path: Path) -> None:  # fmt: skip
    from gemmate_lib.temporal.convert import convert

    (folder / "evil.py").write_text(code)
    edit(folder / "config.json", model_type="evil", auto_map=MODEL, **TRUST)
    torch.save({"w": torch.zeros(1)}, tmp_path / "old.pt")
    with pytest.raises(GemmateError, match="custom code") as refused:
        if way == "load_base":
            load_base(ModelConfig(id=str(folder)))
        else:
            convert(tmp_path / "old.pt", tmp_path / "out", base=str(folder))
    note(f"a base that only its own code could build, for {way}", "refused", refused.value)


def test_a_kernel_that_a_model_names(folder: Path, note: Note) -> None:
    """A name with a slash is a repository on the Hub, whose code would be fetched and run."""
    edit(folder / "config.json", _attn_implementation="some/body", attn_implementation="some/body")
    loaded = load_base(ModelConfig(id=str(folder)))
    assert loaded.model.config._attn_implementation == "sdpa"
    note("a kernel on the Hub named in config.json", "never fetched")


def test_the_code_of_an_adapter(adapter: Path, code: str, note: Note) -> None:
    (adapter / "evil.py").write_text(code)
    library = {"parent_library": "evil", "base_model_class": "M"}
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(adapter)
        with pytest.raises(GemmateError, match="Cannot load") as refused:
            load_adapter(load_base(ModelConfig()), adapter)
        edit(adapter / "adapter_config.json", megatron_config=None, auto_mapping=library)
        load_adapter(load_base(ModelConfig()), adapter, force=True)
    note("a module to import named in adapter_config.json", "refused", refused.value)


def test_no_setting_switches_trust_on(
    tmp_path: Path, note: Note, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    (tmp_path / "own.yaml").write_text("dataset: tiny_quotes\nmodel:\n  trust_remote_code: true\n")
    for words in (("quotes", "--set", "model.trust_remote_code=true"), (tmp_path / "own.yaml",)):
        status, said = command(monkeypatch, capsys, "finetune", *words, "--out", out)
        assert status == 2 and "There is no setting" in said and not out.exists()
    note("trust_remote_code among the settings", "refused", said)


@pytest.mark.parametrize("read", [load_run, load_saved])
def test_no_manifest_switches_trust_on(read: Any, run: Run, tmp_path: Path, note: Note) -> None:
    folder = Path(shutil.copytree(run.directory, tmp_path / "run"))
    manifest = forge(folder, ("model", "trust_remote_code"), True)
    with pytest.raises(GemmateError, match=r"model\.trust_remote_code") as refused:
        read(manifest.parent if read is load_run else folder / "adapter")
    note(f"trust_remote_code in a run's manifest, for {read.__name__}", "refused", refused.value)


def forge(folder: Path, key: tuple[str, ...], value: Any) -> Path:
    """Write a setting into a run's manifest, and the hash that fits it."""
    import hashlib

    file = folder / "manifest.json"
    record = json.loads(file.read_text("utf-8"))
    group = record["config"]
    for name in key[:-1]:
        group = group[name]
    group[key[-1]] = value
    text = json.dumps(record["config"], sort_keys=True).encode()
    record["config_hash"] = hashlib.sha256(text).hexdigest()[:16]
    file.write_text(json.dumps(record), "utf-8")
    return file


# What the source must not do


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What could run the content of a file, trust a model's code, or unpack an archive."""
    for name, call in calls(tree):
        given = {key.arg: ast.unparse(key.value) for key in call.keywords}
        if given.get("trust_remote_code", "False") != "False":
            yield f"{name} trusts code"
        if re.fullmatch(r"Auto\w+\.from_pretrained", name) and not {"trust_remote_code", None} & {
            *given
        }:
            yield f"{name} asks whether to trust code"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if re.fullmatch(r"(c?[pP]ickle|dill|joblib|marshal|shelve)\.(loads?|open|Unpickler)", name):
            yield f"{name} runs what it reads"
        if name in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"):
            yield f"{name} runs what it is given"
        if given.get("shell", "False") != "False":
            yield f"{name} starts a shell"
        packs = name == "tarfile.TarInfo" or given.get("mode") == "'w'"
        if name.endswith(("extractall", "unpack_archive")) or (
            re.search(r"(zip|tar)file\.", name) and not packs
        ):
            yield f"{name} unpacks an archive"
        if name.rpartition(".")[2] in ("HTML", "Markdown", "Javascript", "SVG", "IFrame"):
            yield f"{name} shows text as a page"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("load(trust_remote_code=True)", "trusts"),
        ("AutoConfig.from_pretrained(x)", "asks"),
        ("torch.load(x)", "weights_only"),
        ("pickle.loads(x)", "runs what it reads"),
        ("yaml.load(x)", "runs what it is given"),
        ("subprocess.run(x, shell=True)", "a shell"),
        ("shutil.unpack_archive(x)", "unpacks"),
        ("tarfile.open(x)", "unpacks"),
        ("tarfile.open(x, mode='r')", "unpacks"),
        ("display(HTML(x))", "as a page"),
    ],
)
def test_what_is_unsafe_is_found(text: str, why: str) -> None:
    assert [why in found for found in unsafe(ast.parse(text))] == [True]


def test_the_library_does_nothing_unsafe(note: Note) -> None:
    files = sorted((ROOT / "gemmate_lib").rglob("*.py"))
    found = [f"{f.name}: {why}" for f in files for why in unsafe(ast.parse(f.read_text("utf-8")))]
    assert len(files) > 40 and not found
    note("archives with members such as ../x", "impossible: nothing unpacks an archive")


# Paths: nothing is written outside of the run's folder

OUTSIDE = ["../../x", "a/b", "/x", "..", ".x", "a\\b", "a\nb", "a\n", "", "~x", "$x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_is_a_path(name: str, tmp_path: Path, note: Note,
                               monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    rows = {"id": "tiny_quotes", "limit": 20}
    content = {"name": name, "dataset": rows, "training": {"max_steps": 1}}
    own.write_text(json.dumps(content | {"generation": {"max_new_tokens": 1}}))
    status, said = command(monkeypatch, capsys, "finetune", own, "--out", "in/side/run")
    assert status == 2 and said.startswith("gemmate: name: ")
    assert [path.name for path in tmp_path.rglob("*")] == ["own.yaml"]
    note(f"an experiment named {name!r}", "refused", said)


def source(folder: Path, *cells: str, parameters: str = "text: str = ''") -> Path:
    """A notebook of the course, not yet run."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    all_cells = [new_markdown_cell("# A title"), first, *map(new_code_cell, cells)]
    kernel = {"name": "python3", "language": "python", "display_name": "Python"}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "00_planted.ipynb"
    nbformat.write(new_notebook(cells=all_cells, metadata={"kernelspec": kernel}), file)
    return file


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside of every run; after the test it is what it was."""
    file = tmp_path / "outside" / "victim"
    file.parent.mkdir()
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine" and [*file.parent.iterdir()] == [file]


def course_folder(folder: Path) -> Path:
    """The folder of a run of the course, with one manifest and one notebook."""
    from gemmate_lib.course import make_folder

    made = make_folder(folder)
    source(made / "notebooks")
    record = {"notebook": "00_planted", "profile": "tiny", "parameters": {}, "cells": 1,
              "executed": 1, "seconds": 1.0, "main_metric": None, "error": None, "skipped": None,
              "state": "ok", "ok": True, "finished": "2026-01-02T03:04:05+00:00"}  # fmt: skip
    (made / "manifests" / "00_planted.json").write_text(json.dumps(record))
    return made


LINKS = ("report.html", "notebooks/00_planted.html", "order.json", "logs/00_planted.txt",
         "manifests/00_planted.json", "notebooks/00_planted.ipynb", "figures",
         "notebooks")  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_a_course(name: str, victim: Path, tmp_path: Path, note: Note,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from gemmate_lib import batches, course, headless
    from gemmate_lib.report import write_report

    file = source(tmp_path / "sources")
    monkeypatch.setattr(batches, "NOTEBOOKS", {"00": file})
    # No kernel: what is asked is where its notebook, its log and its manifest would be written.
    monkeypatch.setattr(headless, "_wait", lambda process, *rest: process.kill() or process.wait())
    folder = course_folder(tmp_path / "course")
    link = folder / name
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(victim if link.suffix else victim.parent)
    with pytest.raises(GemmateError, match="is not inside of the run's folder") as refused:
        if name.endswith(".html"):
            write_report(folder)
        else:
            course.run_course(course.Order(only=["00"]), out=folder)
    note(f"a link out of a course's folder as {name}", "refused", refused.value)


def test_a_figure_through_a_link(victim: Path, tmp_path: Path, note: Note,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    from gemmate_lib.plots import show

    monkeypatch.setenv("GEMMATE_FIGURES", str(tmp_path / "figures"))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/one.png").symlink_to(victim)
    with pytest.raises(GemmateError, match="is not inside of the run's folder") as refused:
        show(Figure(figsize=(1, 1)), "A figure.", "one")
    with pytest.raises(GemmateError, match="is no plain name"):
        show(Figure(figsize=(1, 1)), "A figure.", "../one")
    note("a link out of the folder of figures", "refused", refused.value)


@pytest.mark.parametrize(
    "order",
    [
        {"only": ["../../x"]},
        {"only": ["/x.ipynb"]},
        {"profile": "../x"},
        {"parameters": {"../x": "1"}},
        {"grid": {"../x": ["1"]}},
        {"out": "../x"},
        ["../x"],
        "{",
    ],
)
def test_a_forged_order(order: Any, tmp_path: Path, note: Note,
                        monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    (tmp_path / "course").mkdir()
    text = order if order == "{" else json.dumps(order)
    (tmp_path / "course/order.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    words = ("course", "--resume", "--out", tmp_path / "course")
    status, said = command(monkeypatch, capsys, *words)
    assert status == 2 and sorted(tmp_path.rglob("*")) == before
    note(f"a forged order of a course, {text}", "refused", said)


def test_a_parameter_that_is_a_path(tmp_path: Path, note: Note,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """It names the files of its point in a grid."""
    from gemmate_lib import batches
    from gemmate_lib.headless import inside

    monkeypatch.setattr(batches, "NOTEBOOKS", {"00": source(tmp_path / "sources")})
    for value in (*OUTSIDE, "../" * 60, "{a}", "a" * 300):
        (job,) = batches.plan((), {}, {"text": [value]})
        assert re.fullmatch(r"[\w.=-]{1,120}", job.name) and job.parameters == {"text": value}
        assert inside(tmp_path, f"{job.name}.ipynb").parent == tmp_path
    note("a parameter such as ../../x in a grid", "its files are named without slashes")


def test_a_checkpoint_that_lists_files_elsewhere(run: Run, tmp_path: Path, victim: Path,
                                                 note: Note) -> None:  # fmt: skip
    newest = cut_off(run, tmp_path / "run", after=1)
    manifest = json.loads((newest / "checkpoint.json").read_text())
    del manifest["sha256"]
    name = os.path.relpath(victim, newest)
    manifest["files"][name] = [4, checkpoints.file_sha256(victim)]
    manifest["sha256"] = digest(manifest)
    (newest / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(GemmateError, match="victim is missing") as refused:
        finetune_model(run.experiment, out=tmp_path / "run", resume=str(newest))
    note("a checkpoint that lists ../../x among its files", "refused", refused.value)


def test_a_checkpoint_that_is_a_link(run: Run, tmp_path: Path, victim: Path, note: Note) -> None:
    elsewhere = victim.with_name("checkpoint-1")
    shutil.copytree(run.directory / "checkpoints/checkpoint-1", elsewhere)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/checkpoint-1").symlink_to(elsewhere)
    checkpoints.remove(tmp_path / "kept/checkpoint-1")
    assert checkpoints.verify(elsewhere) and not [*(tmp_path / "kept").iterdir()]
    shutil.rmtree(elsewhere)
    note("a checkpoint that is a link to another folder, removed", "only the link goes")


@pytest.mark.parametrize("member", ["../../victim", "/../../../victim", "a/../../../victim"])
def test_a_storage_that_sends_names_elsewhere(member: str, tmp_path: Path, victim: Path, note: Note,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from gemmate_lib.storage import FsspecStorage

    storage = FsspecStorage(f"{tmp_path}/remote")
    there = f"{storage.root}/checkpoint-1/{member}"
    monkeypatch.setattr(type(storage.fs), "find", lambda self, path: [there])
    monkeypatch.setattr(type(storage.fs), "get_file", lambda self, a, b: Path(b).write_text("x"))
    with pytest.raises(GemmateError, match="would leave") as refused:
        storage.load_from_storage("checkpoint-1", victim.parent / "in")
    note(f"a storage that holds {member}", "refused", refused.value)


def test_a_link_is_not_published(run: Run, tmp_path: Path, victim: Path, note: Note) -> None:
    folder = Path(shutil.copytree(run.directory, tmp_path / "run"))
    (folder / "adapter/merges.txt").symlink_to(victim)
    with pytest.raises(GemmateError, match="is not inside of the run's folder") as refused:
        stage(load_run(folder), tmp_path / "staged")
    assert not (tmp_path / "staged").exists()
    note("a link to a file elsewhere among an adapter's files, published", "refused", refused.value)


# Rendering: what a model or a data set says is shown, and does nothing

BREAK = "\"'></title></textarea></style></script></pre></code>-->"  # out of whatever surrounds it
REFRESH = "<meta http-equiv=refresh content='0;url={server}/refresh'>"


def tricks(server: str, mark: str) -> str:
    """Everything that runs or asks by itself in a page that takes a text as HTML, in one line."""
    js = browser.witness
    return BREAK + "".join(
        [
            f"<script>window.planted=1;{js(f'{mark}_script')}</script>",
            f'<img src=x onerror="{js(f"{mark}_image")}">',
            f'<svg onload="{js(f"{mark}_svg")}"></svg>',
            f'<details open ontoggle="{js(f"{mark}_details")}">a</details>',
            f"<img src='{server}/{mark}-image'><style>@import '{server}/{mark}-style';</style>",
            f"<link rel=stylesheet href='{server}/{mark}-link'>",
            f"<iframe src='{server}/{mark}-frame'></iframe>",
            f"<p style=\"background:url('{server}/{mark}-css')\">b</p>",
            f"[c](javascript:{mark}) ![d]({server}/{mark}-markdown) `e` | f",
        ]
    )


RUN = {f"raw_{name}" for name in ("script", "image", "svg", "details")}
ASKED = {f"raw-{name}" for name in ("image", "style", "link", "frame", "css")}


@pytest.fixture(scope="module")
def beacon() -> Iterator[tuple[str, set[str]]]:
    with browser.beacon() as found:
        yield found


@pytest.fixture
def open_page(beacon: tuple[str, set[str]], tmp_path: Path) -> Callable[[Path], browser.Seen]:
    if browser.BINARY is None:
        pytest.skip(browser.WITHOUT)
    return lambda page: browser.look(page, beacon[1], tmp_path / "profile")


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str, str]] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(tag, name, value or "") for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def dangers(html: str) -> list[str]:
    """What in a page could run, or ask for something."""
    page = Elements(html)
    found = page.tags & {"script", "svg", "iframe", "object", "embed", "link", "form", "base"}
    for tag, name, value in page.attributes:
        away = value and not value.startswith(("data:image/", "#", "..")) and name == "src"
        scheme = re.match(r"\s*(javascript|data|vbscript):", value, re.IGNORECASE)
        policy = tag == "meta" and name == "http-equiv" and value.lower() == "refresh"
        if name.startswith("on") or away or policy or (name == "href" and scheme):
            found.add(f"{tag} {name}={value[:40]}")
    if re.search(r"<style[^>]*>[^<]*(@import|url\()", html):
        found.add("style")
    return sorted(found)


def test_the_tricks_work_where_nothing_is_escaped(
    beacon: tuple[str, set[str]], tmp_path: Path
) -> None:
    html = tricks(beacon[0], "raw")
    assert {"script", "svg", "iframe", "link", "style"} <= {*dangers(html)}
    assert dangers(REFRESH) == ["meta http-equiv=refresh"]


@pytest.mark.skipif(browser.BINARY is None, reason=browser.WITHOUT)
def test_the_tricks_work_in_a_browser(
    beacon: tuple[str, set[str]], tmp_path: Path, open_page: Any
) -> None:
    page = tmp_path / "raw.html"
    page.write_text(f"<title>t</title><body>{tricks(beacon[0], 'raw')}")
    seen = open_page(page)
    assert seen.ran >= RUN and seen.asked >= ASKED
    page.write_text(f"<body>{REFRESH.format(server=beacon[0])}")
    assert "refresh" in open_page(page).asked


CELLS = (
    "print(text)\nprint('main metric:', text)",
    "from IPython.display import HTML, SVG, Javascript, Latex, Markdown, display\n"
    "for kind in (HTML, Markdown, Latex, Javascript):\n    display(kind(text))\n"
    "display({'image/svg+xml': f'<svg xmlns=\"http://www.w3.org/2000/svg\">{text}</svg>',\n"
    "         'text/plain': text}, raw=True)",
    "import pandas\ndisplay(pandas.DataFrame({text: [text]}))\ndisplay([text])",
    "import matplotlib\nmatplotlib.use('Agg')\nfrom matplotlib.figure import Figure\n"
    "from gemmate_lib.plots import show\nshow(Figure(figsize=(1, 1)), text, 'one')",
    "raise ValueError(text)",
)


@pytest.fixture(scope="module")
def planted(run: Run, beacon: tuple[str, set[str]], experiment: Make,
            tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:  # fmt: skip
    """A run of the course, and in it a run, in which every text is an attack."""
    from gemmate_lib import batches
    from gemmate_lib.course import Order, run_course

    folder, text = tmp_path_factory.mktemp("planted"), tricks(beacon[0], "page")
    text += REFRESH.format(server=beacon[0])
    data = folder / f"<img src=x onerror={browser.witness('file')}>.jsonl"
    rows = [{"quote": f"{word} {text}", "author": text} for word in "abcdefghijklmnopqrst"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = FAST | {"dataset": str(data), "dataset.max_length": 256, "dataset.over_long": "cut",
                       "dataset.near_duplicate": 1.0, "dataset.template": f"{{quote}} {text}",
                       "training.max_steps": 1, "generation.max_new_tokens": 1}  # fmt: skip
    out = folder / "course"
    hostile = finetune_model(experiment(**settings), out=out / "runs" / "planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "generate_texts", lambda model, tokenizer, prompts, **how: [
            Completion(prompt, text, 1, True) for prompt in prompts])  # fmt: skip
        evaluate_run(hostile, limit=2)
        patch.setattr(batches, "NOTEBOOKS", {"00": source(folder / "sources", *CELLS)})
        (out / "manifests").mkdir()
        result = run_course(Order(parameters={"text": text}), out=out)
    assert result.notebooks[0].executed == len(CELLS) + 2
    forge(hostile.directory, ("name",), text)
    forge(hostile.directory, ("model", "id"), text)
    write_again(out, text)
    return out, hostile


def write_again(out: Path, text: str) -> None:
    """Plant what a notebook's file may say beside its outputs, and what a metric may be called."""
    from gemmate_lib.report import write_report

    file = out / "notebooks/00_planted.ipynb"
    notebook = json.loads(file.read_text("utf-8"))
    notebook["cells"].append({"cell_type": "raw", "id": "raw", "metadata": {}, "source": text})
    notebook["cells"][0]["source"] = f"# {text}\n\n{text}\n\n<b>bold</b>"
    notebook["metadata"]["language_info"] = {"name": text, "pygments_lexer": "ipython3"}
    for cell in notebook["cells"]:
        cell["metadata"]["tags"] = [text]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                handler = f"1 onload={browser.witness('page_width')}"  # nbconvert sets no quotes
                output["metadata"]["image/png"] = {"width": handler, "alt": text}
            if "text/html" in output.get("data", {}):
                output["metadata"]["text/html"] = {"isolated": True}  # asks for a frame
    file.write_text(json.dumps(notebook), "utf-8")
    manifest = out / "runs/planted/manifest.json"
    record = json.loads(manifest.read_text("utf-8"))
    for group in ("metrics", "timings", "machine", "data"):
        record[group] |= {text: text}
    manifest.write_text(json.dumps(record), "utf-8")
    write_report(out)


PAGES = ("report.html", "notebooks/00_planted.html")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_tricks_as_text(name: str, planted: tuple[Path, Run], note: Note) -> None:
    html = (planted[0] / name).read_text("utf-8")
    assert not dangers(html)
    assert Elements(html).text.count("<script>window.planted=1") >= 5
    assert "default-src 'none'" in html
    note(f"<script>, handlers and links in every text of {name}", "shown as text")


@pytest.mark.skipif(browser.BINARY is None, reason=browser.WITHOUT)
@pytest.mark.parametrize("policy", ["its policy", "no policy"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_does_nothing_in_a_browser(name: str, policy: str, planted: tuple[Path, Run],
                                          open_page: Any, note: Note) -> None:  # fmt: skip
    page = planted[0] / name
    seen = open_page(page if policy == "its policy" else browser.without_policy(page))
    assert "window.planted=1" in seen.dom and not seen.ran and not seen.asked
    note(f"{name} opened in Chromium, with {policy}", "nothing ran, nothing was asked for")


@pytest.mark.skipif(browser.BINARY is None, reason=browser.WITHOUT)
def test_the_policy_holds_where_escaping_fails(beacon: tuple[str, set[str]], tmp_path: Path,
                                               open_page: Any, note: Note) -> None:  # fmt: skip
    from markupsafe import Markup

    from gemmate_lib.report import render_page

    page = tmp_path / "page.html"
    page.write_text(render_page(title="t", body=Markup(tricks(beacon[0], "raw"))), "utf-8")
    seen = open_page(page)
    assert "<script>window.planted" in seen.dom and not seen.ran and not seen.asked
    note("a page whose text is HTML, under the page's own policy", "nothing ran, nothing asked for")


@pytest.fixture
def card(
    planted: tuple[Path, Run], beacon: tuple[str, set[str]], tmp_path: Path
) -> tuple[str, Path]:
    """The model card of the planted run, and a page of it that escapes nothing by itself."""
    import mistune

    run = planted[1]
    text = tricks(beacon[0], "card")
    named = {f"{text}\n\n# h\n\n```\n{text}\n~~~": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    (run.directory / "metrics.json").write_text(json.dumps({"metrics": named, "floors": {}}))
    markdown = model_card(run)
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", markdown, re.DOTALL).groups()
    page = tmp_path / "card.html"
    html = mistune.create_markdown(escape=False, plugins=["table", "url", "strikethrough"])(body)
    page.write_text(f"<meta charset=utf-8><body><pre>{front.count('<script')}</pre>{html}", "utf-8")
    return body, page


def test_a_card_shows_tricks_as_text(card: tuple[str, Path], note: Note) -> None:
    body, page = card
    assert not dangers(page.read_text("utf-8"))
    assert Elements(page.read_text("utf-8")).text.count("<script>window.planted=1") >= 2
    assert "](" not in body and "\n# h" not in body and body.count("```") == 2
    note("<script>, handlers and links in a model card", "shown as text")


@pytest.mark.skipif(browser.BINARY is None, reason=browser.WITHOUT)
def test_a_card_does_nothing_in_a_browser(card: Any, open_page: Any, note: Note) -> None:
    seen = open_page(card[1])
    assert "window.planted=1" in seen.dom and not seen.ran and not seen.asked
    note("a model card as HTML, opened in Chromium", "nothing ran, nothing was asked for")


def test_a_table_shows_markup_as_text(note: Note) -> None:
    from rich.console import Console

    from gemmate_lib.course import CourseResult
    from gemmate_lib.headless import NotebookResult

    text = "[link=javascript:x]a[/link] [/b]"
    result = NotebookResult("00_a", "tiny", {}, point={"text": text}, main_metric=text)
    console = Console(width=200)
    with console.capture() as said:
        console.print(CourseResult(Path(), (result,), Path()).table())
    assert said.get().count(text) == 2
    note("a terminal's markup in a parameter of the course's table", "shown as text")


# No token in what is written

TOKENS = canary.make_token(1), canary.make_token(2)
NAMED = dict(zip(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), TOKENS, strict=True))


@pytest.mark.parametrize(
    "content",
    [
        TOKENS[0].encode(),
        b"\x00\xff" + TOKENS[0].encode() + b"\xff",
        f"hf_...{TOKENS[0][-8:]}".encode(),
        TOKENS[0][:18].encode(),
        TOKENS[0][18:].encode(),
        *(base64.b64encode(b"Bearer: "[:n] + TOKENS[0].encode()) for n in (6, 7, 8)),
        base64.encodebytes(b"a" * 50 + TOKENS[0].encode()),
        base64.urlsafe_b64encode(TOKENS[0][:18].encode()),
        TOKENS[0].encode().hex().encode(),
        TOKENS[0].encode("utf-16"),
    ],
)
def test_a_token_in_a_file_is_found(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file.db").write_bytes(content)
    (tmp_path / "innocent").write_bytes(b"hf_ " + os.urandom(10_000))
    found = [*canary.leaks(tmp_path, NAMED)]
    assert found and all(line.startswith("a/file.db: HF_TOKEN, ") for line in found)


def test_a_token_in_a_name_is_found(tmp_path: Path) -> None:
    (tmp_path / f"run-{TOKENS[1][:12]}").touch()
    (line,) = canary.leaks(tmp_path, NAMED)
    assert line.endswith(": HUGGING_FACE_HUB_TOKEN, plain")


@pytest.mark.slow
def test_no_token_in_a_run_a_notebook_and_a_tracker(tmp_path: Path, note: Note,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    capsys: Any) -> None:  # fmt: skip
    import matplotlib

    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # its fonts are known there
    for name, value in canary.in_an_environment(tmp_path, TOKENS).items():
        monkeypatch.setenv(name, value)
    settings = {"tracking.tracker": "tensorboard", "generation.max_new_tokens": 2} | FAST
    words = [word for pair in settings.items() for word in ("--set", "{}={}".format(*pair))]
    words += ["--profile", "tiny", "--limit", "2", "--out", str(tmp_path / "run")]
    said = [command(monkeypatch, capsys, "finetune", "quotes", *words)]
    words = ["--only", "00", "--profile", "tiny", "--out", str(tmp_path / "course")]
    said.append(command(monkeypatch, capsys, "course", *words))
    said.append(command(monkeypatch, capsys, "doctor"))
    (tmp_path / "said.txt").write_text("".join(heard for _, heard in said))
    assert [status for status, _ in said] == [0, 0, 0]
    assert next((tmp_path / "run").rglob("events.out.tfevents.*")).stat().st_size > 1000
    assert "token: environment" in printed(tmp_path / "course/notebooks/00_setup.ipynb")
    assert len([*tmp_path.rglob("*")]) > 30 and not [*canary.leaks(tmp_path, NAMED)]
    note("a token in HF_TOKEN, in a run, a tracker's database and a notebook", "in no file")


def test_a_password_in_a_storages_address(note: Note) -> None:
    word = "pass" + "word"
    with pytest.raises(GemmateError, match="holds a password") as refused:
        CheckpointConfig(remote_path=f"s3://me:{word}@bucket/run")
    assert word + "@" not in str(refused.value)
    assert CheckpointConfig(remote_path="s3://bucket/run").remote_path
    assert Experiment(checkpoint={"remote_path": "ssh://me@host/run"}).checkpoint.remote_path
    note("a password in checkpoint.remote_path, which manifests hold", "refused", refused.value)
