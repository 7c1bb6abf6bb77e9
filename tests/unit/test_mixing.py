"""Several tasks: drawn as often as the temperature says, trained in three ways, each measured."""

import math

import pytest

from gemmate_lib.config import Facts, GemmateError, resolve
from gemmate_lib.mixing import (
    WAYS,
    counts,
    evaluate_tasks,
    interleave,
    load_tasks,
    main_metrics,
    mix,
    shares,
    train_tasks,
)
from gemmate_lib.rows import Row

SIZES = {"large": 900, "middle": 90, "small": 10}
QUIET = {
    "model.quantization": "none", "method": "lora", "checkpoint.keep_best_n": 0,
    "training.eval_every": 0, "training.batch_size": 4, "dataset.limit": 60,
    "generation.max_new_tokens": 4, "lora.target_modules": "auto",
}  # fmt: skip


def tables():
    return {n: [Row("p", f"{n} {i}", {}, i) for i in range(size)] for n, size in SIZES.items()}


def experiment(name, **more):
    return resolve(name, facts=Facts(), profile="tiny", overrides=QUIET | more).experiment


@pytest.fixture(scope="module")
def tasks():
    return load_tasks({name: experiment(name) for name in ("sst2", "squad_v2", "quotes")})


def test_temperature_makes_the_shares_alike():
    one, two, many = (shares(SIZES, temperature=t) for t in (1, 2, 1e9))
    assert one == pytest.approx({"large": 0.9, "middle": 0.09, "small": 0.01})
    roots = {name: math.sqrt(size) for name, size in SIZES.items()}
    assert two == pytest.approx({n: r / sum(roots.values()) for n, r in roots.items()})
    assert many == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    assert shares(SIZES, temperature=math.inf) == pytest.approx(many)
    assert shares({"a": 10**200, "b": 10**200}, temperature=0.01) == {"a": 0.5, "b": 0.5}
    for wrong in (0, -1, math.nan):
        with pytest.raises(GemmateError, match="more than 0"):
            shares(SIZES, temperature=wrong)
    with pytest.raises(GemmateError, match="more than 0"):
        shares(SIZES | {"none": 0})


@pytest.mark.parametrize("temperature", [1.0, 2.0, math.inf])
def test_tasks_are_drawn_as_often_as_their_shares(temperature):
    n = 6_000
    drawn = counts(interleave(tables(), temperature=temperature, rows=n))
    for name, share in shares(SIZES, temperature=temperature).items():
        assert abs(drawn[name] - n * share) < 4.5 * math.sqrt(n * share * (1 - share))


def test_a_task_is_seen_whole_before_a_row_of_it_comes_again():
    drawn = interleave(tables(), temperature=math.inf, rows=600)
    for name, size in SIZES.items():
        rows = [row.source_row for task, row in drawn if task == name][:size]
        assert len(set(rows)) == len(rows)
    assert all(row.completion.startswith(name) for name, row in drawn)
    assert drawn == interleave(tables(), temperature=math.inf, rows=600)
    assert drawn != interleave(tables(), temperature=math.inf, rows=600, seed=1)


def test_as_many_rows_as_asked_for():
    for rows in (1, 7, 20_000):
        assert len(interleave(tables(), temperature=math.inf, rows=rows)) == rows
    with pytest.raises(GemmateError, match="0 rows"):
        interleave(tables(), rows=0)


def test_what_cannot_be_mixed_says_why(tasks):
    with pytest.raises(GemmateError, match="1 tasks over 1 bases"):
        load_tasks({"a": experiment("quotes")})
    other = experiment("quotes", **{"model.id": "tiny-gemma2"})
    with pytest.raises(GemmateError, match="2 tasks over 2 bases"):
        load_tasks({"a": experiment("quotes"), "b": other})
    with pytest.raises(GemmateError, match="no way to train"):
        train_tasks(tasks, "mixd", steps=9)
    with pytest.raises(GemmateError, match="2 steps for 3 tasks"):
        train_tasks(tasks, "mixed", steps=2)


def test_a_mixture_has_the_rows_of_its_steps_and_only_training_ones(tasks):
    found = mix(tasks, temperature=2.0, steps=10, seed=0)
    assert len(found.train) == 40
    own = [row for task in tasks.values() for row in task.splits.train]
    assert all(row in own for row in found.train)
    forms = {("Review" in row.prompt, "Context" in row.prompt) for row in found.train}
    assert len(forms) == 3


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_and_measures_every_task(tasks, way, monkeypatch):
    from gemmate_lib import mixing

    taken = []
    real = mixing.train

    def watched(model, tokenizer, splits, experiment, *rest):
        taken.append((id(model), experiment.training.max_steps, splits.form))
        return real(model, tokenizer, splits, experiment, *rest)

    monkeypatch.setattr(mixing, "train", watched)
    models = train_tasks(tasks, way, steps=7)
    assert sum(steps for _, steps, _ in taken) == 7
    assert len(taken) == (1 if way == "mixed" else 3)
    if way != "mixed":
        assert [form for *_, form in taken] == ["classification", "reading", "quotes"]
    different = {id(model) for model, _ in models.values()}
    assert len(different) == len({i for i, *_ in taken}) == (3 if way == "apart" else 1)
    found = evaluate_tasks(tasks, models, limit=4)
    main = main_metrics(tasks, found)
    assert {name: interval.n for name, interval in main.items()} == dict.fromkeys(tasks, 4)
    assert [task.metric for task in tasks.values()] == ["accuracy", "exact", "author_accuracy"]


def test_in_turn_ends_otherwise_than_it_began(tasks):
    """The last task is learned on what the first has left, not from the start."""
    import torch

    turn, apart = (train_tasks(tasks, way, steps=6)["quotes"][0] for way in ("in turn", "apart"))
    pairs = zip(turn.state_dict().values(), apart.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
