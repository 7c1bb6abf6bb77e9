"""lm-eval-harness on a run: its numbers are those of the model, and nothing else is touched."""

import json
import math
import random
import socket
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_run import make_run

from gemmate_lib import suites
from gemmate_lib.config import GemmateError, ModelConfig, PromptSettings
from gemmate_lib.generate import generate_texts
from gemmate_lib.methods import attach_prompt
from gemmate_lib.models import load_base
from gemmate_lib.sft import load_run, open_run
from gemmate_lib.suites import find_tasks, measure_tasks, run_lm_eval
from gemmate_lib.timestamps import MISSING

lm_eval = pytest.importorskip("lm_eval")

ROWS, NEW = 40, 6
WORDS = ["the", "sky", "a", "long", "day", "is", "blue", "time", "and", "never", "old", "of"]
LIKELY = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
LIKELY |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
SAYING = {
    "output_type": "loglikelihood",
    "doc_to_target": " {{choices[0]}}",
}  # no delimiter is put in here
SAYING |= {"metric_list": [{"metric": "perplexity"}]}
WRITTEN = {"output_type": "generate_until", "doc_to_target": "{{wanted}}"}
WRITTEN |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW}}
WRITTEN |= {"metric_list": [{"metric": "exact_match"}]}
TASKS = {"choose": LIKELY, "saying": SAYING, "go_on": WRITTEN}


def write_task(folder, name, data, **settings):
    """A task file over one local file of rows."""
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    common |= {"task": name, "test_split": "test", "doc_to_text": "{{question}}"}
    common |= {"metadata": {"version": 2.5}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with an adapter on it that changes what is said, and three tasks."""
    home = tmp_path_factory.mktemp("suites")
    make_run(home / "run", ModelConfig(id="tiny-gemma", device="cpu"), "Quote: the")
    draw, loaded = random.Random(0), open_run(load_run(home / "run"))

    def some(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = [
        {"question": f"Quote: {some(1, 9)}", "choices": [some(1, 4) for _ in range(3)]}
        for _ in range(ROWS)
    ]
    written = own_texts(loaded, rows)
    for number, row in enumerate(rows):  # every third row is answered as the model does
        row |= {"answer": draw.randrange(3), "wanted": written[number] if number % 3 else "no"}
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "tasks").mkdir()
    for name, settings in TASKS.items():
        write_task(home / "tasks", name, home / "rows.jsonl", **settings)
    return home


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Online, as far as the libraries know; whoever then looks for the network fails the test."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    found = []

    def refuse(*arguments, **_):
        found.append(arguments)
        raise OSError("no network here")

    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, refuse)
    # It asks a dozen programs about this machine, for seconds; nothing of it is read.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    yield found
    assert found == []


def own_texts(loaded, rows):
    """The first line that the model goes on with, by this library's own generation."""
    prompts = [row["question"] for row in rows]
    done = generate_texts(loaded.model, loaded.tokenizer, prompts, max_new_tokens=NEW)
    return [each.text.partition("\n")[0] for each in done]


def log_p(loaded, context, continuation, **inputs):
    """log p of a continuation, from the logits of one text at a time."""

    def ids(text):
        encoded = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [loaded.tokenizer.bos_token_id, *encoded]

    whole, start = ids(f"{context} {continuation}"), len(ids(context))
    with torch.no_grad():
        scores = loaded.model(torch.tensor([whole]), **inputs).logits[0].log_softmax(-1)
    scores = scores[-len(whole) :]  # behind a soft prompt there are more
    return sum(scores[i - 1, whole[i]].item() for i in range(start, len(whole)))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_the_numbers_are_those_of_the_model(folder, capsys, caplog):
    run = load_run(folder / "run")
    found = run_lm_eval(run, list(TASKS), include_path=folder / "tasks", batch_size=7)
    assert capsys.readouterr().out == ""  # which may have to be JSON
    assert [record.getMessage() for record in caplog.records if "lm_eval" in record.name] == []
    loaded, rows = open_run(run), rows_of(folder)
    chances = [[log_p(loaded, row["question"], c) for c in row["choices"]] for row in rows]
    right = [
        max(range(3), key=p.__getitem__) == r["answer"] for p, r in zip(chances, rows, strict=True)
    ]
    choose, saying, go_on = (found["tasks"][name] for name in TASKS)
    accuracy = choose["metrics"]["acc"]
    assert 0 < accuracy["value"] < 1 and accuracy["value"] == sum(right) / ROWS
    same = [text == row["wanted"] for text, row in zip(own_texts(loaded, rows), rows, strict=True)]
    written = go_on["metrics"]["exact_match"]["value"]
    assert 0.5 < written < 1 and written == pytest.approx(sum(same) / ROWS)
    expected = math.exp(-sum(p[0] for p in chances) / ROWS)
    perplexity = saying["metrics"]["perplexity"]
    assert perplexity["value"] == pytest.approx(expected, rel=1e-3)
    assert perplexity["low"] < expected < perplexity["high"] and not perplexity["higher_is_better"]

    error = math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / (ROWS - 1))
    assert accuracy["stderr"] == pytest.approx(error) and accuracy["higher_is_better"]
    half = (accuracy["high"] - accuracy["low"]) / 2
    assert half == pytest.approx(1.96 * error) and "normal approximation" in found["interval"]
    assert (choose["n"], choose["n_all"], choose["version"]) == (ROWS, ROWS, 2.5)
    assert found["harness"] == f"lm-eval {lm_eval.__version__}" and found["timestamps"] is None
    assert json.loads((folder / "run" / "lm_eval.json").read_text("utf-8")) == found
    assert f"[{accuracy['low']:.3f}, " in suites.lines(found)[0]


def test_the_same_again_gives_the_same_bytes_and_hashes_tell_what_differs(folder, tmp_path):
    run, file = load_run(folder / "run"), folder / "run" / "lm_eval.json"
    first = run_lm_eval(run, ["choose"], include_path=folder / "tasks", limit=5)
    text = file.read_bytes()
    torch.manual_seed(99)
    again = run_lm_eval(run, ["choose"], include_path=folder / "tasks", limit=5)
    assert (again, file.read_bytes()) == (first, text)
    own = first["tasks"]["choose"]
    assert (own["n"], own["n_all"], first["limit"]) == (5, ROWS, 5)

    def other(name, rows, **settings):
        (tmp_path / name).mkdir()
        data = tmp_path / name / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_task(tmp_path / name, "choose", data, **LIKELY | settings)
        found = run_lm_eval(run, ["choose"], include_path=tmp_path / name, limit=5)
        return found["tasks"]["choose"]

    hashes, rows = ("config_sha256", "rows_sha256"), rows_of(folder)
    moved, worded = other("moved", rows), other("worded", rows, target_delimiter="")
    turned = other("turned", rows[::-1])
    assert [moved[key] == own[key] for key in hashes] == [True, True]
    assert [worded[key] == own[key] for key in hashes] == [False, True]
    assert [turned[key] == own[key] for key in hashes] == [True, False]


def test_all_rows_alike_have_no_interval(folder, tmp_path):
    rows = [row | {"wanted": "no"} for row in rows_of(folder)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(tmp_path, "never", tmp_path / "rows.jsonl", **WRITTEN)
    found = run_lm_eval(load_run(folder / "run"), ["never"], include_path=tmp_path)
    metric = found["tasks"]["never"]["metrics"]["exact_match"]
    assert (metric["value"], metric["stderr"], metric["low"], metric["high"]) == (0, 0, None, None)
    assert "[" not in suites.lines(found)[0]


def test_the_model_is_left_as_it_was(folder):
    loaded = open_run(load_run(folder / "run"))
    loaded.model.train()
    next(loaded.model.children()).eval()
    loaded.tokenizer.pad_token, loaded.tokenizer.padding_side = "<unk>", "right"

    def state():
        tensors = {name: (p.dtype, p.requires_grad) for name, p in loaded.model.named_parameters()}
        modes = [module.training for module in loaded.model.modules()]
        return tensors, modes, loaded.tokenizer.pad_token, loaded.tokenizer.padding_side

    before, kept = state(), {k: v.clone() for k, v in loaded.model.state_dict().items()}
    manager = find_tasks(list(TASKS), folder / "tasks")
    measure_tasks(loaded, list(TASKS), manager, limit=3, batch_size=2)
    assert state() == before and True in before[1] and False in before[1]
    assert all(torch.equal(value, kept[k]) for k, value in loaded.model.state_dict().items())


@pytest.mark.parametrize(("path", "inside"), [("json", True), ("someone/data", False)])
def test_local_tasks_ask_no_network_and_others_may(folder, tmp_path, monkeypatch, path, inside):
    import datasets.config
    import huggingface_hub

    def offline():
        return huggingface_hub.is_offline_mode(), datasets.config.HF_HUB_OFFLINE

    def spy(*_, **__):
        seen.append((*offline(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS))
        raise OSError("seen enough")

    seen = []
    write_task(tmp_path, "own", folder / "rows.jsonl", **LIKELY | {"dataset_path": path})
    group = {"group": "both", "task": ["own"]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    manager = lm_eval.tasks.TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(lm_eval, "simple_evaluate", spy)
    loaded = open_run(load_run(folder / "run"))
    for name in ("own", "both"):
        with pytest.raises(GemmateError, match=f"cannot run {name}: seen enough"):
            measure_tasks(loaded, [name], manager, limit=None, batch_size=1)
    assert seen == [(inside, inside, False)] * 2 and offline() == (False, False)


def test_a_time_aware_model_is_asked_at_no_known_time(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    model = ModelConfig(id="tiny-gemma", device="cpu", temporal_kind="log")
    make_run(tmp_path / "run", model, "Quote: the")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "temporal" in name)
    torch.manual_seed(0)
    weights[name] = torch.randn_like(weights[name]) * 0.3  # a time now, and none, must show
    save_file(weights, file, metadata={"format": "pt"})

    run = load_run(tmp_path / "run")
    loaded, rows = open_run(run), rows_of(folder)[:8]
    missing = {"timestamps": torch.tensor([MISSING])}
    asked, plain = (
        sum(log_p(loaded, r["question"], r["choices"][0], **given) for r in rows)
        for given in (missing, {})
    )
    assert abs(asked - plain) > 1
    for row, text in zip(rows, own_texts(loaded, rows), strict=True):
        row["wanted"] = text
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for each in ("saying", "go_on"):
        write_task(tmp_path, each, tmp_path / "rows.jsonl", **TASKS[each])
    # One at a time: a single prompt is what the model itself would ask now.
    found = run_lm_eval(run, ["saying", "go_on"], include_path=tmp_path, batch_size=1)
    value = found["tasks"]["saying"]["metrics"]["perplexity"]["value"]
    assert value == pytest.approx(math.exp(-asked / 8), rel=1e-3)
    assert found["tasks"]["go_on"]["metrics"]["exact_match"]["value"] == 1
    assert found["timestamps"] == "missing"


def test_a_soft_prompt_is_asked_without_padding(folder, tmp_path):
    base = load_base(ModelConfig(id="tiny-gemma", device="cpu"))
    model = attach_prompt(base.model, "prompt", PromptSettings(virtual_tokens=8), seed=0).eval()
    loaded, rows = replace(base, model=model), rows_of(folder)[:16]
    for row, text in zip(rows, own_texts(loaded, rows), strict=True):
        row["wanted"] = text
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for each in ("saying", "go_on"):
        write_task(tmp_path, each, tmp_path / "rows.jsonl", **TASKS[each])
    names = ["saying", "go_on"]
    manager = find_tasks(names, tmp_path)
    found = measure_tasks(loaded, names, manager, limit=None, batch_size=16)
    assert found["tasks"]["go_on"]["metrics"]["exact_match"]["value"] == 1
    value = found["tasks"]["saying"]["metrics"]["perplexity"]["value"]
    asked = sum(log_p(loaded, row["question"], row["choices"][0]) for row in rows)
    assert value == pytest.approx(math.exp(-asked / 16), rel=1e-3)
    assert found["batch_size"] == 1


def test_an_unknown_task_is_answered_with_the_nearest(folder):
    with pytest.raises(GemmateError, match=r"no task 'helaswag'; near it: .*hellaswag.*Name one"):
        find_tasks(["helaswag"], folder / "tasks")


def test_what_is_missing_is_named(folder, monkeypatch):
    with pytest.raises(GemmateError, match="no folder nowhere"):
        find_tasks(["choose"], "nowhere")
    with pytest.raises(GemmateError, match="No task is named"):
        find_tasks([], folder / "tasks")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GemmateError, match=r'pip install "gemmate-course\[lm-eval\]"'):
        run_lm_eval(load_run(folder / "run"), ["choose"])
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    assert extras["lm-eval"] == ["lm-eval>=0.4.13,<0.5"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "gone.jsonl"),
        ({"test_split": "other"}, "other"),
        ({"doc_to_text": "{{nowhere}}"}, "nowhere"),
        ({"unsafe_code": True}, "unsafe"),
        ({"generation_kwargs": {"max_gen_toks": 5_000}}, "less than model's maximum"),
    ],
)
def test_a_task_that_cannot_run_is_one_sentence(folder, tmp_path, settings, told):
    write_task(tmp_path, "mine", folder / "rows.jsonl", **WRITTEN | settings)
    with pytest.raises(GemmateError, match=f"cannot run mine: .*{told}.*\\. Mend"):
        run_lm_eval(load_run(folder / "run"), ["mine"], include_path=tmp_path)
