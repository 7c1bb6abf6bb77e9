"""What goes up: the card, the clean folder, the plan, the push, and what comes back."""

import hashlib
import json
import re
import subprocess

import pytest
import yaml
from hub_server import KNOWN, SECRET, logged_in

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.evaluate import Evaluation
from gemmate_lib.manifest import read_manifest, write_manifest
from gemmate_lib.modelcard import without_folders
from gemmate_lib.publish import (
    fresh_logits,
    model_card,
    pull_and_verify,
    push,
    push_plan,
    stage,
)
from gemmate_lib.sft import load_run
from gemmate_lib.stats import Interval

pytestmark = KNOWN
PLANTED = [
    "adapter/training_args.bin",
    "adapter/optimizer.pt",
    "adapter/adapter_model.bin",
    "adapter/predictions.jsonl",
    "adapter/README.md",
    "predictions.jsonl",
    "log.jsonl",
    "trainer/checkpoint-1/optimizer.pt",
]


def make_run(directory, *, base_id="tiny-gemma", weights=b"the weights", **settings):
    """A finished run on disk; its weights need not be any here."""
    settings = {"model": {"id": base_id, "quantization": "nf4"}, "seed": 7} | settings
    base = {"id": base_id, "revision": None, "weights_sha256": "5" * 64}
    adapter = directory / "adapter"
    adapter.mkdir(parents=True)
    if weights:
        (adapter / "adapter_model.safetensors").write_bytes(weights)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base_id}))
    (adapter / "gemmate_base.json").write_text(json.dumps(base))
    (adapter / "tokenizer.json").write_text('{"vocab": ["/a/b"]}')
    for name in PLANTED:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("private")
    write_manifest(
        directory,
        kind="sft",
        experiment=Experiment.model_validate({"name": "quotes"} | settings),
        facts={"device": "cpu"},
        data={"source": str(directory / "data.jsonl"), "splits": {"train": 80, "test": 10}},
        base=base,
        metrics={"steps": 3, "first_loss": 4.0, "last_loss": 2.0},
        timings={"train": 1.0},
    )
    return load_run(directory)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "quotes-1")


@pytest.fixture
def staged(run, tmp_path):
    return stage(run, tmp_path / "staged")


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def evaluated(**metrics):
    floors = {"quote_perplexity": 1.5}
    return Evaluation(metrics, floors, {"quote_nll": [1.0]}, [{"completion": "<b>hi"}], "0" * 64)


# The card


def test_the_front_matter_is_what_the_hub_reads(run):
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(run)).data
    assert (data.base_model, data.library_name, data.license) == ("tiny-gemma", "peft", "mit")
    assert data.datasets == ["tiny_quotes"] and data.tags == ["qlora", "sft", "gemmate"]
    assert ModelCard(model_card(run, merged=True)).data.library_name == "transformers"


def test_gemmas_own_terms_and_pinned_revision_are_named(tmp_path):
    model = {"id": "google/gemma-2b", "revision": "9" * 40}
    card = model_card(make_run(tmp_path / "r", model=model, dataset="english_quotes"))
    front = front_matter(card)
    assert (front["license"], front["base_model"]) == ("gemma", "google/gemma-2b")
    assert front["datasets"] == ["Abirate/english_quotes"] and front["tags"][0] == "lora"
    assert f"google/gemma-2b, revision {'9' * 40}" in card and "synthetic" not in card


def test_a_folder_as_base_is_no_model_on_the_hub(tmp_path):
    (tmp_path / "gpt2").mkdir()
    card = model_card(make_run(tmp_path / "r", base_id=str(tmp_path / "gpt2")))
    assert "base_model" not in front_matter(card) and front_matter(card)["license"] == "other"
    assert f"gpt2 (SHA-256 of its weights: {'5' * 64})" in card and str(tmp_path) not in card


def test_the_recipe_lists_what_differs_from_the_defaults_and_nothing_else(tmp_path):
    columns = {"quote": "content"}
    card = model_card(make_run(tmp_path / "r", lora={"r": 4}, dataset={"columns": columns}))
    table = card.split("## Recipe")[1].split("## Results")[0]
    keys = re.findall(r"^\| ([\w.]+) \|", table, flags=re.MULTILINE)[1:]
    assert keys == ["name", "seed", "model.quantization", "dataset.columns", "lora.r"]


def test_the_data_card_speaks_in_the_model_card(run):
    card = model_card(run)
    assert "Rows: train 80, test 10." in card and "seed 2006" in card
    assert "The training data is synthetic" in card and "Of the data: " in card


def test_metrics_come_with_their_intervals(run):
    assert "it was not evaluated" in model_card(run) and "| last_loss | 2 |" in model_card(run)
    inf = float("inf")
    evaluation = evaluated(
        quote_perplexity=Interval(3.0, 2.5, 3.5, 40), named=Interval(0.5, -inf, inf, 1)
    )
    card = model_card(run, evaluation=evaluation)
    assert "| quote_perplexity | 3.000 &#91;2.50, 3.50&#93; (n=40); at best 1.5 |" in card
    (run.directory / "metrics.json").write_text(json.dumps(evaluation.as_dict()))
    assert model_card(run) == card and "not evaluated" not in card


def test_nothing_in_the_card_is_html_a_link_or_a_new_table_cell(tmp_path):
    evil = "<script>alert(1)</script> | [x](javascript:y) `z`\n## Free"
    run = make_run(tmp_path / "r", dataset={"id": evil, "template": evil})
    interval = Interval(0.5, 0.4, 0.6, 9)
    card = model_card(run, evaluation=evaluated(**{evil: interval}))
    body = card.split("---\n", 2)[2]
    assert "<" not in body and "](" not in body and "\n## Free" not in body
    assert body.count("&lt;script&gt;") == 4 and "<b>hi" not in card
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3}


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/ada/My Data/rows.jsonl", "rows.jsonl"),
        ("~/.cache/base", "base"),
        (r"C:\Users\ada\base", "base"),
        ("read /home/ada/rows.jsonl: 3 rows", "read rows.jsonl: 3 rows"),
        ("google/gemma-2b", "google/gemma-2b"),
        ("https://huggingface.co/google/gemma-2b", "https://huggingface.co/google/gemma-2b"),
        ("<s>{q}</s>\nA: {a} / {b}, and/or /c", "<s>{q}</s>\nA: {a} / {b}, and/or /c"),
        ({"a": ["/tmp/x", 1, None]}, {"a": ["x", 1, None]}),
    ],
)
def test_of_a_local_path_only_the_name_is_public(text, public):
    assert without_folders(text) == public


# The folder


def test_only_what_others_need_is_staged(staged):
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "gemmate_base.json"]
    assert sorted(f.name for f in staged.iterdir()) == [*files, "manifest.json", "tokenizer.json"]
    assert not any("private" in file.read_text() for file in staged.iterdir())


def test_no_folder_of_this_machine_goes_up(tmp_path):
    (tmp_path / "base").mkdir()
    where = str(tmp_path)
    run = make_run(tmp_path / "r", base_id=f"{where}/base", dataset=f"{where}/rows.jsonl")
    staged = stage(run, tmp_path / "staged")
    assert not [f.name for f in staged.iterdir() if where in f.read_text()]
    assert read_manifest(staged)["config"]["model"]["id"] == "base"  # sound: its hash fits
    assert (staged / "tokenizer.json").read_text() == '{"vocab": ["/a/b"]}'


def test_the_hash_of_a_configuration_without_paths_stays(run, staged):
    assert read_manifest(staged)["config_hash"] == run.experiment.hash()


def test_a_stage_that_fails_leaves_nothing(run, staged, tmp_path):
    with pytest.raises(GemmateError, match="exists"):
        stage(run, staged)
    empty = make_run(tmp_path / "empty" / "run", weights=None)
    with pytest.raises(GemmateError, match="no weights"):
        stage(empty, tmp_path / "empty" / "staged")
    assert [f.name for f in (tmp_path / "empty").iterdir()] == ["run"]


# The plan


def test_the_plan_is_every_file_with_its_size_and_hash(staged):
    plan = push_plan(staged)
    assert [file.file for file in plan] == sorted(f.name for f in staged.iterdir())
    for file in plan:
        content = (staged / file.file).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "x/adapter_config.json"])
def test_what_must_not_go_up_stops_the_push(staged, name):
    (staged / name).parent.mkdir(exist_ok=True)
    (staged / name).write_text("x")
    for act in (push_plan, lambda folder: push(folder, "ada/quotes")):
        with pytest.raises(GemmateError, match=f"{name} must not be uploaded"):
            act(staged)


def test_a_run_itself_cannot_be_pushed(run):
    with pytest.raises(GemmateError, match="must not be uploaded"):
        push_plan(run.directory)


def test_differences_are_named(staged, tmp_path):
    plan = push_plan(staged)
    assert pull_and_verify(staged, plan) == []
    (staged / ".gitattributes").write_text("of the Hub's own making")
    assert pull_and_verify(staged, plan) == []
    weights = staged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (staged / "tokenizer.json").unlink()
    (staged / "optimizer.pt").write_text("x")
    assert pull_and_verify(staged, plan) == [
        "tokenizer.json: missing",
        "optimizer.pt: not in the plan",
        "adapter_model.safetensors: other bytes",
    ]


# The Hub, imitated


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with logged_in(monkeypatch, tmp_path) as hub:
        yield hub


def test_a_dry_run_asks_nobody(staged, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    result = push(staged, "ada/quotes")
    assert result.plan == push_plan(staged) and result.commit is None and hub.asked == []
    with pytest.raises(GemmateError, match="no name"):
        push(staged, "no name")


def test_what_is_planned_goes_up_and_comes_back(staged, hub, tmp_path):
    result = push(staged, "ada/quotes", dry_run=False)
    repository = hub.repositories["ada/quotes"]
    assert repository.private and result.commit == repository.head
    assert len(repository.commits) == 2  # the Hub's own and one of ours
    assert sorted(hub.files()) == [file.file for file in result.plan]
    assert pull_and_verify("ada/quotes", result.plan) == []
    repository.commit(hub.files() | {"adapter_model.safetensors": b"other bytes"})
    assert pull_and_verify("ada/quotes", result.plan) == ["adapter_model.safetensors: other bytes"]
    assert pull_and_verify("ada/quotes", result.plan, revision=result.commit) == []
    assert not (tmp_path / "cache").exists()  # nothing was taken from the user's, or left there


def test_a_public_repository_is_no_place_for_a_private_push(staged, hub):
    hub.add("ada/quotes", private=False)
    with pytest.raises(GemmateError, match="ada/quotes is public"):
        push(staged, "ada/quotes", dry_run=False)
    assert hub.files() == {}
    push(staged, "ada/quotes", dry_run=False, private=False)
    push(staged, "ada/open", dry_run=False, private=False)
    assert hub.files() and not hub.repositories["ada/open"].private


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "new write token"), (403, "new write token"), (404, "USER/NAME")]
)
def test_a_refused_push_has_a_remedy_and_keeps_the_secret(staged, hub, status, remedy):
    hub.fail("", status, times=99)
    with pytest.raises(GemmateError, match=f"Cannot push to ada/quotes: .*{remedy}") as error:
        push(staged, "ada/quotes", dry_run=False)
    assert SECRET not in str(error.value)


def test_without_a_token_or_network_the_remedy_says_so(staged, hub, monkeypatch):
    from huggingface_hub import constants

    plan = push_plan(staged)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for act in (lambda: push(staged, "ada/q", dry_run=False), lambda: pull_and_verify("a/q", plan)):
        with pytest.raises(GemmateError, match="Connect to the network"):
            act()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(GemmateError, match="Make a write token"):
        push(staged, "ada/quotes", dry_run=False)
    assert hub.asked == []


def test_a_mistake_of_ours_is_not_blamed_on_the_hub(staged, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    with pytest.raises(TypeError):
        push(staged, "ada/quotes", dry_run=False)


# The fresh process


@pytest.mark.parametrize(
    ("code", "stderr", "why"),
    [(1, "Traceback\n  …\nOSError: disk full\n", "OSError: disk full"), (-9, "", "it was killed")],
)
def test_a_fresh_process_that_fails_says_why(run, monkeypatch, code, stderr, why):
    failed = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(GemmateError, match=f"in a fresh process: {why}"):
        fresh_logits(run.adapter, "Quote:", kind="adapter")


def test_a_folder_of_the_other_kind_is_refused(run):
    for folder, kind in ((run.adapter, "merged"), (run.directory, "adapter")):
        with pytest.raises(GemmateError, match=f"holds no {kind}"):
            fresh_logits(folder, "Quote:", kind=kind)
