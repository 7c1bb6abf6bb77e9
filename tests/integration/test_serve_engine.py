"""The engine: every answer is the one its run gives alone, whatever happens around it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import AT, BASE, NAMES, PROMPTS, Alone, make_runs
from small_run import make_run

from gemmate_lib import timestamps
from gemmate_lib.adapters import attach_lora
from gemmate_lib.config import GemmateError, LoraSettings, ModelConfig
from gemmate_lib.generate import generate_texts
from gemmate_lib.models import load_base
from gemmate_lib.serve.answers import Answer, Ask
from gemmate_lib.serve.engine import Engine
from gemmate_lib.serve.limits import Limits, Refused
from gemmate_lib.serve.opening import Follower, name_runs, open_engine
from gemmate_lib.sft import Run, load_run, open_run


@pytest.fixture
def engine(runs: dict[str, Run]) -> Iterator[Engine]:
    made = open_engine(runs)
    yield made
    made.close()


def at(name: str) -> int | None:
    return AT if name == "when" else None


def wait_for(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def same(answer: Answer, alone: Alone, n: int) -> None:
    """The answer, and everything that is told of it, is what the run says alone."""
    ask = answer.ask
    wanted = alone.ask(ask.model, ask.prompt, n, ask.timestamp)
    assert answer.text() == wanted.text, ask
    assert answer.finish == ("stop" if wanted.stopped else "length")
    assert answer.completion_tokens == wanted.n_tokens


def test_the_runs_say_different_things(alone: Alone) -> None:
    """Or the tests below would prove nothing."""
    said = {name: alone.ask(name, PROMPTS[0], 12, at(name)).text for name in NAMES}
    assert len(set(said.values())) == 4
    assert said["when"] != alone.ask("when", PROMPTS[0], 12, AT + 10**12).text


def test_mixed_batches_answer_as_each_run_alone(engine: Engine, alone: Alone) -> None:
    """They come all at once, with different lengths, so they leave and join as they go."""
    asked = [
        Ask(name, prompt, max_tokens=3 + 5 * ((i + j) % 4), timestamp=at(name))
        for i, prompt in enumerate(PROMPTS)
        for j, name in enumerate(NAMES)
    ]
    for answer in [engine.submit(ask) for ask in asked]:
        same(answer, alone, answer.ask.max_tokens or 0)
    wait_for(lambda: engine.idle)


def test_who_comes_later_joins_and_changes_nothing(engine: Engine, alone: Alone) -> None:
    first = engine.submit(Ask(BASE, "", max_tokens=150))
    pieces = iter(first)
    said = next(pieces)
    later = [engine.submit(Ask(n, PROMPTS[5], max_tokens=9, timestamp=at(n))) for n in NAMES]
    for answer in later:
        same(answer, alone, 9)
    assert not first.done  # they did not wait for it
    assert said + "".join(pieces) == alone.ask(BASE, "", 150).text


@pytest.mark.parametrize("name", ["one", "when"])
def test_a_sampled_answer_is_its_seeds_whatever_the_batch(
    engine: Engine, alone: Alone, name: str
) -> None:
    how = {"temperature": 1.3, "top_p": 0.9}
    asks = [Ask(name, PROMPTS[i], 12, **how, seed=7, timestamp=at(name)) for i in range(4)]
    greedy = [engine.submit(Ask(name, PROMPTS[5], 12, timestamp=at(name))) for _ in range(3)]
    for answer in [engine.submit(ask) for ask in asks]:
        drawn = alone.ask(name, answer.ask.prompt, 12, at(name), do_sample=True, seed=7, **how)
        assert answer.text() == drawn.text
    assert len({answer.text() for answer in greedy}) == 1
    own = [engine.submit(Ask(name, "a", 20, 2.0, timestamp=at(name))).text() for _ in range(4)]
    assert len(set(own)) > 1  # without a seed each draws its own


def test_no_timestamp_is_now_where_the_run_is_dated(
    engine: Engine, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timestamps, "now", lambda: AT)
    same(engine.submit(Ask("when", PROMPTS[0], 12, timestamp=None)), Then(alone), 12)
    with pytest.raises(Refused, match="one knows no time") as refused:
        engine.submit(Ask("one", "a", timestamp=AT))
    assert (refused.value.status, refused.value.param) == (400, "timestamp")


class Then:
    """What is said alone at that moment."""

    def __init__(self, alone: Alone) -> None:
        self.alone = alone

    def ask(self, name: str, prompt: str, n: int, at: None) -> Any:
        return self.alone.ask(name, prompt, n, AT)


def test_an_answer_is_as_long_as_its_run_says(engine: Engine) -> None:
    assert engine.submit(Ask("one", PROMPTS[0])).text()
    answer = engine.submit(Ask("one", PROMPTS[0]))
    answer.text()
    assert (answer.finish, answer.completion_tokens) == ("length", 6)


def test_it_ends_at_an_end_token_and_at_a_stop_text(
    engine: Engine, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = alone.ask("two", PROMPTS[1], 20).text
    cut = engine.submit(Ask("two", PROMPTS[1], 20, stop=(text[8:11], "never said")))
    assert cut.text() == text[: text.index(text[8:11])] and cut.finish == "stop"
    tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    third = tokens[2]
    monkeypatch.setattr(engine._worker, "_ends", {third})
    ended = engine.submit(Ask("two", PROMPTS[1], 20))
    assert ended.text() == engine.tokenizer.decode(tokens[: tokens.index(third)])
    assert ended.finish == "stop" and ended.completion_tokens == tokens.index(third)


# Models come and go


def test_a_run_is_added_replaced_and_removed_while_it_serves(
    engine: Engine, runs: dict[str, Run], alone: Alone
) -> None:
    for name in ("one", "two", "when"):  # nothing but the base is left, then all again
        engine.remove(name)
    wait_for(lambda: engine._fleet._peft is None)
    same(engine.submit(Ask(BASE, PROMPTS[0], 12)), alone, 12)
    assert [served.name for served in engine.models()] == [BASE]
    with pytest.raises(Refused, match="no model 'one'") as unknown:
        engine.submit(Ask("one", "a"))
    assert unknown.value.status == 404
    engine.add("when", runs["when"])
    engine.add("x", runs["one"])
    running = engine.submit(Ask("x", "", 120))
    next(iter(running))
    before = engine.models()[-1]
    after = engine.add("x", runs["two"])
    assert before.digest != after.digest and engine.models()[-1] == after
    new = engine.submit(Ask("x", "", 120))
    assert not running.done
    engine.remove("x")
    assert running.text() == alone.ask("one", "", 120).text  # as it began
    assert new.text() == alone.ask("two", "", 120).text
    wait_for(lambda: len(engine._fleet._peft.peft_config) == 1)
    same(engine.submit(Ask("when", PROMPTS[0], 12, timestamp=AT)), alone, 12)


def test_a_run_that_adapts_other_layers_touches_nobody(tmp_path: Path) -> None:
    """Its new layers must not answer for rows that were under way before they were there."""
    names = {"a": ("q_proj",), "b": ("q_proj", "v_proj"), "wide": "auto"}
    for weights, (name, layers) in enumerate(names.items()):
        lora = LoraSettings(target_modules=layers)
        make_run(tmp_path / name, ModelConfig(), "Quote", weights=weights, lora=lora)
    runs = {name: load_run(tmp_path / name) for name in names}
    alone, engine = Alone(runs), open_engine({name: runs[name] for name in "ab"})
    running = [engine.submit(Ask(name, "", 90)) for name in ("a", "b", BASE)]
    for answer in running:
        next(iter(answer))
    engine.add("wide", runs["wide"])
    assert not any(answer.done for answer in running)
    for answer in running:
        same(answer, alone, 90)
    same(engine.submit(Ask("wide", PROMPTS[0], 12)), alone, 12)
    engine.close()


def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    engine: Engine, runs: dict[str, Run], alone: Alone, tmp_path: Path
) -> None:
    make_run(tmp_path / "other", ModelConfig(id="tiny-gemma2"), "Quote")
    make_run(tmp_path / "four", ModelConfig(quantization="nf4"), "Quote")
    make_run(tmp_path / "broken", ModelConfig(), "Quote", lora=LoraSettings(r=4))
    config = tmp_path / "broken/adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    reasons = {
        "other": r"was trained on tiny-gemma2 .*, not on tiny-gemma ",
        "four": "has its base in quantization=nf4, this one is in none",
        "broken": "Cannot load .*broken",
    }
    for name, why in reasons.items():
        with pytest.raises(GemmateError, match=why):
            engine.add(name, load_run(tmp_path / name))
    for method, why in (("full", "every weight"), ("prompt", "prompt tuning: learned vectors")):
        other = runs["one"].experiment.model_copy(update={"method": method})
        with pytest.raises(GemmateError, match=why):
            engine.add(method, Run(runs["one"].directory, other, runs["one"].manifest, True))
    with pytest.raises(GemmateError, match="is the name of the base"):
        engine.add(BASE, runs["one"])
    with pytest.raises(GemmateError, match="No run is served as nobody"):
        engine.remove("nobody")
    assert len(engine._fleet._peft.peft_config) == 3 and len(engine.models()) == 4
    for name in NAMES:
        same(engine.submit(Ask(name, PROMPTS[0], 12, timestamp=at(name))), alone, 12)


def test_dora_and_rslora_are_served_too(engine: Engine, alone: Alone, tmp_path: Path) -> None:
    made = {}
    for kind in ("dora", "rslora"):
        make_run(tmp_path / kind, ModelConfig(), "Quote", weights=5, kind=kind)
        made[kind] = load_run(tmp_path / kind)
        engine.add(kind, made[kind])
    own = Alone(made)
    names = [*NAMES, "dora", "rslora"]
    answers = [engine.submit(Ask(n, p, 10, timestamp=at(n))) for p in PROMPTS[:3] for n in names]
    for answer in answers:
        same(answer, own if answer.ask.model in made else alone, 10)


@pytest.mark.parametrize(
    ("kind", "time", "why"), [("dora", None, "DoRA is enabled"), ("lora", "log", "only supported")]
)
def test_peft_still_mixes_neither_dora_nor_encoders(kind: str, time: Any, why: str) -> None:
    """A canary: where it does, they need no batches of their own (gemmate_lib/serve/fleet.py)."""
    base = load_base(ModelConfig(temporal_kind=time))
    model = attach_lora(base.model, LoraSettings(), seed=0, kind=kind).eval()
    given = {"timestamps": torch.tensor([AT])} if time else {}
    with pytest.raises((ValueError, TypeError), match=why):
        model(input_ids=torch.tensor([[2, 5]]), adapter_names=["default"], **given)


def test_a_window_that_slides_and_a_base_in_four_bits(tmp_path: Path) -> None:
    """Gemma-2's layers see 128 tokens back: prompts and answers beyond it."""
    for model, n in (({"id": "tiny-gemma2"}, 60), ({"quantization": "nf4"}, 8)):
        runs = make_runs(tmp_path / str(n), **model)
        alone, engine = Alone(runs, **model), open_engine(runs)
        names = list(runs)
        prompts = (PROMPTS[0], "a word and another " * 30) if n == 60 else PROMPTS[:2]
        asks = [Ask(name, p, n, timestamp=at(name)) for p in prompts for name in names]
        for answer in [engine.submit(ask) for ask in asks]:
            same(answer, alone, n)
        engine.close()


def test_a_base_that_knows_the_time_itself(tmp_path: Path) -> None:
    base = load_base(ModelConfig(temporal_kind="calendar"))
    torch.manual_seed(0)
    torch.nn.init.normal_(base.model.temporal.projection.weight, std=0.1)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    own = ModelConfig(id=str(tmp_path / "base"))
    make_run(tmp_path / "run", own, "Quote", weights=2)
    run = load_run(tmp_path / "run")
    engine, opened = open_engine({"run": run}), open_run(run)
    assert [(each.name, each.time_aware) for each in engine.models()] == [
        ("base", True), ("run", True)
    ]  # fmt: skip
    both = {"run": opened.model, "base": base.model}
    answers = [engine.submit(Ask(name, PROMPTS[0], 12, timestamp=AT)) for name in both]
    for answer, model in zip(answers, both.values(), strict=True):
        (wanted,) = generate_texts(
            model, base.tokenizer, PROMPTS[:1], max_new_tokens=12, timestamps=[AT]
        )
        assert answer.text() == wanted.text
    engine.close()


# Nobody waits for ever


def test_who_goes_away_frees_the_slot(runs: dict[str, Run], alone: Alone) -> None:
    engine = open_engine(runs, limits=Limits(slots=1, queue=2))
    long = engine.submit(Ask(BASE, "", 500))
    next(iter(long))
    waiting = [engine.submit(Ask("two", PROMPTS[0], 12)) for _ in range(2)]
    with pytest.raises(Refused, match="2 requests wait already") as busy:
        engine.submit(Ask("two", "a"))
    assert busy.value.status == 429 and (busy.value.retry_after or 0) >= 1
    waiting[0].cancel()
    wait_for(lambda: engine.load().waiting == 1)  # its place is free while the first one runs
    assert not long.done
    long.cancel()
    same(waiting[1], alone, 12)
    assert (long.finish, waiting[0].finish, waiting[0].text()) == (None, None, "")
    assert long.completion_tokens < 500
    wait_for(lambda: engine.idle)
    engine.close()


def test_a_request_has_its_time(runs: dict[str, Run]) -> None:
    engine = open_engine(runs, limits=Limits(slots=1, seconds=0.5))
    both = [engine.submit(Ask(BASE, "", 512)), engine.submit(Ask(BASE, "", 512))]
    for answer in both:  # one of them while it runs, or both while they wait
        answer.deadline = min(answer.deadline, answer.began + 0.05)
        with pytest.raises(Refused, match="was not ready after") as late:
            answer.text()
        assert late.value.status == 504
    wait_for(lambda: engine.idle)
    engine.close()


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (Ask("one", "a " * 700, 1), "prompt_too_long"),
        (Ask("one", "a", 513), "too_many_tokens"),
        (Ask("one", "a " * 250, 512), "context_length_exceeded"),
    ],
)
def test_what_is_too_long_is_refused(runs: dict[str, Run], ask: Ask, code: str) -> None:
    engine = open_engine({"one": runs["one"]}, limits=Limits(prompt_tokens=600))
    engine._context = 700
    with pytest.raises(Refused) as refused:
        engine.submit(ask)
    assert (refused.value.status, refused.value.code) == (400, code)
    engine.close()
    assert engine._entries["one"].users == 0


def test_a_failure_ends_its_own_requests_and_no_others(
    engine: Engine, alone: Alone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = engine._fleet.forward

    def failing(adapters: Any, inputs: Any) -> Any:
        if adapters[0].time_aware:
            raise RuntimeError("planted")
        return forward(adapters, inputs)

    monkeypatch.setattr(engine._fleet, "forward", failing)
    well, ill = engine.submit(Ask("one", PROMPTS[0], 12)), engine.submit(Ask("when", "a", 12))
    same(well, alone, 12)
    with pytest.raises(Refused, match="The model failed: RuntimeError") as refused:
        ill.text()
    assert refused.value.status == 500 and "planted" in caplog.text
    monkeypatch.setattr(engine._fleet, "forward", forward)
    same(engine.submit(Ask("when", PROMPTS[0], 12, timestamp=AT)), alone, 12)


def test_it_stops_after_what_runs_or_at_once(runs: dict[str, Run], alone: Alone) -> None:
    engine = open_engine({"one": runs["one"]}, limits=Limits(slots=1))
    asked = [engine.submit(Ask("one", PROMPTS[0], 12)) for _ in range(3)]
    engine.drain()
    assert not engine.ready
    with pytest.raises(Refused) as refused:
        engine.submit(Ask("one", "a"))
    assert refused.value.status == 503
    engine.close()
    for answer in asked:
        same(answer, alone, 12)
    with pytest.raises(GemmateError, match="The engine is closed"):
        engine.add("two", runs["two"])
    engine = open_engine({"one": runs["one"]})
    long = engine.submit(Ask(BASE, "", 512))
    engine.close(0)
    with pytest.raises(Refused, match="has stopped"):
        long.text()


# Folders


def test_names_come_from_folders_and_may_not_clash(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = runs["one"].directory
    assert list(name_runs([folder])) == ["one"]
    assert list(name_runs([folder, folder], ["a", "b.2"])) == ["a", "b.2"]
    with pytest.raises(GemmateError, match=r"would both be one. Name them"):
        name_runs([folder, folder])
    with pytest.raises(GemmateError, match="1 names for 2 runs"):
        name_runs([folder, folder], ["a"])
    for name in ("../x", "", ".a", "a b", "a/b", "é"):
        with pytest.raises(GemmateError, match="is no name for a model"):
            name_runs([folder], [name])
    with pytest.raises(GemmateError, match="holds no run"):
        name_runs([tmp_path])


def test_a_folder_is_followed(
    engine: Engine, runs: dict[str, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    said: list[str] = []
    follower = Follower(engine, tmp_path, say=said.append)
    follower.look()
    shutil.copytree(runs["one"].directory, tmp_path / "new")
    shutil.copytree(runs["one"].directory, tmp_path / "two")  # a name that is taken
    shutil.copytree(runs["one"].directory, tmp_path / "half")
    (tmp_path / "half/manifest.json").unlink()
    make_run(tmp_path / "other", ModelConfig(id="tiny-gemma2"), "Quote")
    for _ in range(2):
        follower.look()
    names = [*NAMES, "new"]
    assert [served.name for served in engine.models()] == names
    assert caplog.text.count("other is not served: the adapter") == 1
    assert caplog.text.count("two is served already, from elsewhere") == 1
    before = engine.models()[-1].digest
    shutil.rmtree(tmp_path / "new")
    shutil.copytree(runs["two"].directory, tmp_path / "new")
    follower.look()
    assert engine.models()[-1].digest != before
    shutil.rmtree(tmp_path / "new")
    shutil.rmtree(tmp_path / "two")
    follower.look()
    assert [served.name for served in engine.models()] == [*NAMES]  # two is not its to take away
    assert said == ["+ new", "+ new", "- new"]
