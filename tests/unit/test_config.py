"""Layers, names and reasons of the configuration."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from gemmate_lib import config
from gemmate_lib.config import DatasetConfig, Experiment, Facts, GemmateError, ModelConfig, resolve

CPU = Facts()
T4 = Facts("cuda", (7, 5), 14.7, 12.7, 1)
L4 = Facts("cuda", (8, 9), 22.2, 50.0, 1)
A100 = Facts("cuda", (8, 0), 79.3, 80.0, 1)


@pytest.fixture(autouse=True)
def no_profile_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMATE_PROFILE", raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_importing_the_ground_floor_loads_nothing_heavy() -> None:
    code = (
        "import sys, gemmate_lib.config, gemmate_lib.auth, gemmate_lib.manifest;"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub', 'numpy', 'psutil'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", config.experiments())
@pytest.mark.parametrize("profile", config.PROFILES)
def test_every_shipped_experiment_resolves_in_every_profile(name: str, profile: str) -> None:
    resolved = resolve(name, profile=profile, facts=CPU)
    assert (resolved.experiment.name, resolved.experiment.profile) == (name, profile)
    assert list(resolved.reasons) == list(config.flatten(resolved.experiment))
    assert len(str(resolved.table()).splitlines()) == len(resolved.table())


@pytest.mark.parametrize(
    ("facts", "profile"), [(CPU, "tiny"), (T4, "t4"), (L4, "ampere"), (A100, "full")]
)
def test_the_profile_fits_the_machine(facts: Facts, profile: str) -> None:
    assert config.choose_profile(facts, environ={})[0] == profile


def test_a_request_wins_over_the_environment_and_the_environment_over_the_machine() -> None:
    environ = {"GEMMATE_PROFILE": "tiny"}
    assert config.choose_profile(T4, environ=environ) == ("tiny", "GEMMATE_PROFILE is set")
    assert config.choose_profile(T4, "full", environ=environ) == ("full", "set by you")
    with pytest.raises(GemmateError, match="'ampere'"):
        config.choose_profile(CPU, environ={"GEMMATE_PROFILE": "amper"})


def test_layers_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "training: {learning_rate: 1e-3, max_steps: 7, warmup_steps: 3}\n"
        "profiles: {t4: {training: {max_steps: 8, warmup_steps: 4}}}",
    )
    resolved = resolve(path, facts=T4, overrides=["training.warmup_steps=5"])
    training, why = resolved.experiment.training, resolved.reasons
    assert (training.learning_rate, training.max_steps, training.warmup_steps) == (1e-3, 7 + 1, 5)
    assert why["training.learning_rate"] == "experiment mine"
    assert why["training.max_steps"] == "experiment mine, profile t4"
    assert why["training.warmup_steps"] == "set by you"
    assert why["training.optim"] == "recipe original"
    assert why["training.weight_decay"] == "default"
    assert why["model.compute_dtype"] == "profile t4: no bf16 below compute capability 8"
    assert why["profile"] == "compute capability 7.5 is below 8"
    assert resolve(path, facts=CPU).experiment.training.max_steps == 7


def test_the_recipe_is_chosen_by_the_highest_layer(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {recipe: original}")
    assert resolve(path, facts=CPU).experiment.training.optim == "paged_adamw_8bit"
    yours = resolve(path, facts=CPU, overrides={"recipe": "fast"}).experiment.training
    assert (yours.recipe, yours.optim) == ("fast", "adamw_torch_fused")
    named = ["recipe=original", "training.max_steps=7"]
    outranked = resolve("quotes", facts=CPU, profile="tiny", overrides=named).experiment.training
    assert (outranked.batch_size, outranked.learning_rate, outranked.max_steps) == (1, 2e-4, 7)
    with pytest.raises(GemmateError, match=r"no recipe 'fats'.*'fast'"):
        resolve(path, facts=CPU, overrides={"recipe": "fats"})


def test_both_recipes_take_the_same_steps_and_fast_is_the_default() -> None:
    slow, fast = config.original()["training"], config.fast()["training"]
    for length in ("max_steps", "learning_rate", "warmup_steps"):
        assert slow[length] == fast[length]
    rows = [r["batch_size"] * r["gradient_accumulation_steps"] for r in (slow, fast)]
    assert rows[0] == rows[1] == 4
    assert fast.items() <= config.TrainingConfig().model_dump().items()
    assert config.fast()["lora"].items() <= config.LoraSettings().model_dump().items()


def test_a_plain_string_replaces_the_id_and_drops_the_old_revision(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {id: mine/model, revision: abc}\ndataset: my.jsonl")
    model = resolve(path, facts=CPU).experiment.model
    assert (model.id, model.revision, model.quantization) == ("mine/model", "abc", "nf4")
    same = resolve(path, facts=CPU, overrides=["model=mine/model"]).experiment.model
    assert same == model
    for overrides in (["model=other"], {"model": Path("other")}, {"model": {"id": "other"}}):
        other = resolve(path, facts=CPU, overrides=overrides).experiment.model
        assert (other.id, other.revision, other.quantization) == ("other", None, "nf4")
    both = resolve(path, facts=CPU, overrides=["model.revision=def", "model=other"])
    assert (both.experiment.model.id, both.experiment.model.revision) == ("other", "def")
    assert Experiment(model="gpt2", dataset="x.csv").model == ModelConfig(id="gpt2")


def test_presets_are_pinned_and_the_rest_says_that_it_is_not() -> None:
    for name, revision in config.PRESETS.items():
        assert len(revision) == 40 and int(revision, 16)
        resolved = resolve("quotes", facts=CPU, overrides={"model": name})
        assert resolved.experiment.model.revision == revision
        assert resolved.reasons["model.revision"] == f"preset {name}"
    other = resolve("quotes", facts=CPU, overrides={"model": "gpt2"})
    assert other.experiment.model.revision is None
    assert other.reasons["model.revision"].startswith("unpinned")
    loose = resolve("quotes", facts=T4, overrides=["model.revision=null"])
    assert loose.experiment.model.revision is None


def test_notebook_parameters_are_aliases_and_none_leaves_things_alone() -> None:
    parameters = {"lora_r": 3, "learning_rate": "1e-4", "max_steps": 9, "seed": 5, "model": None}
    resolved = resolve("quotes", facts=CPU, overrides=parameters | {"profile": "t4"})
    made = resolved.experiment
    assert (made.lora.r, made.training.learning_rate, made.training.max_steps) == (3, 1e-4, 9)
    assert (made.seed, made.profile, made.model.id) == (5, "t4", "google/gemma-2b")
    nested = resolve("quotes", facts=CPU, overrides={"lora": {"r": 3}})
    assert nested.experiment.lora.r == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "'training.learning_rate'"),
        ("max_stesp=1", "'training.max_steps'"),
        ("revision=1", "model.revision or dataset.revision"),
        ("training.max_steps=0", r"training.max_steps: .* not 0 \(set by you\)"),
        ("training.learning_rate=.inf", "training.learning_rate: "),
        ("training.warmup_steps=0.1", "training.warmup_steps: "),
        ("model.quantization=int4", "'none', 'nf4' or 'nf4-double'"),
        ("dataset.columns=quote", "quote=content author=author"),
        ("name=../../escape", "name: "),
        ("profile=t5", "no profile 't5'"),
        ("training.max_steps", "no KEY=VALUE"),
        ("training.max_steps=[", "no KEY=VALUE"),
        ("training=5", "no setting 'training'"),
        ("model=[a]", "model.id: "),
        ("recipe=[a]", "no recipe"),
    ],
)
def test_what_cannot_be_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(GemmateError, match=message):
        resolve("quotes", facts=CPU, overrides=[override])


@pytest.mark.parametrize(
    "text", ["", "- a", "a: b: c", "profiles: [tiny]", "profiles: {tiny: 3}", "profiles: {tni: {}}"]
)
def test_a_broken_experiment_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(GemmateError):
        resolve(write(tmp_path, text), facts=CPU)


def test_a_missing_or_misspelt_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="Did you mean 'quotes'"):
        resolve("qoutes", facts=CPU)
    with pytest.raises(GemmateError, match="Cannot read"):
        resolve(tmp_path / "none.yaml", facts=CPU)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(GemmateError, match="Cannot read"):
        resolve(tmp_path / "latin.yaml", facts=CPU)


def test_columns_are_read_from_a_string() -> None:
    expected = {"quote": "content", "author": "author"}
    assert DatasetConfig(columns="quote=content author=author").columns == expected
    resolved = resolve("quotes", facts=CPU, overrides=["columns=quote=content author=author"])
    assert resolved.experiment.dataset.columns == expected


def test_the_models_are_frozen_and_refuse_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Experiment().training.max_steps = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        Experiment(sead=1)


def test_the_hash_names_the_configuration() -> None:
    made = resolve("quotes", facts=CPU).experiment
    again = Experiment.model_validate(made.model_dump(mode="json"))
    assert made.hash() == again.hash() and len(made.hash()) == 16 and int(made.hash(), 16)
    for override in ("seed=1", "training.learning_rate=0.005001", "lora.r=7"):
        changed = resolve("quotes", facts=CPU, overrides=[override]).experiment
        assert changed.hash() != made.hash()


def test_the_table_is_aligned_and_shows_line_breaks() -> None:
    template = {"template": "Quote: {quote}\nAuthor: {author}"}
    table = resolve("quotes", facts=CPU, overrides=template).table()
    lines = str(table).splitlines()
    column = lines[0].index(table[0][2])
    assert all(line[column:] == row[2] for line, row in zip(lines, table, strict=True))
    assert any(r"{quote}\nAuthor" in line for line in lines)
