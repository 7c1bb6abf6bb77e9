"""Time: the encoding is exact where it can be, and the model is the base until it has learned."""

import datetime
import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    set_seed,
)

from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.models import load_base, model_path
from gemmate_lib.temporal.encoding import (
    DAY,
    REFERENCE_MS,
    YEAR,
    elapsed_ms,
    log_encoding,
    resolution,
    to_timestamp,
)
from gemmate_lib.temporal.modeling import (
    MISSING,
    GemmaTE2Config,
    GemmaTE2ForCausalLM,
    GemmaTEConfig,
    GemmaTEForCausalLM,
    TemporalEncoder,
    from_base,
)

LAST = 4_294_967_295_999  # 2106-02-07T06:28:15.999Z, where 32 bits of seconds end
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,  # a random tied model only repeats its last word
}  # fmt: skip
IDS = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 10, 11, 12], [2, 5, 6, 7, 8]])
TIMES = torch.tensor([REFERENCE_MS + 5 * DAY, REFERENCE_MS - DAY, LAST])


def utc(*parts: int) -> datetime.datetime:
    return datetime.datetime(*parts, tzinfo=datetime.UTC)


FAMILIES = {
    "gemma": (GemmaConfig(**SHAPE), GemmaForCausalLM, GemmaTEConfig, GemmaTEForCausalLM),
    "gemma2": (
        Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=16),
        Gemma2ForCausalLM,
        GemmaTE2Config,
        GemmaTE2ForCausalLM,
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Configuration and class of a base, and of its time-aware twin."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(tmp_path_factory, family):
    """A plain base on disk, with embeddings as large as trained ones."""
    set_seed(0)
    model = family[1](family[0])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    return directory


def time_aware(path, **options):
    """The twin of the plain base in a folder."""
    kind = (
        GemmaTE2ForCausalLM
        if "gemma2" in (path / "config.json").read_text()
        else GemmaTEForCausalLM
    )
    return kind.from_pretrained(path, **options).eval()


def learned(path):
    """A time-aware model whose encoder is no longer zero."""
    model = time_aware(path)
    generator = torch.Generator().manual_seed(1)
    time = model.temporal.projection.weight.data[:, :1]  # the other column: it is missing
    nn.init.normal_(time, std=0.2, generator=generator)
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(**({"input_ids": IDS} | inputs)).logits


# The encoding.


def test_the_reference_point():
    assert REFERENCE_MS == to_timestamp(utc(2006, 5, 23)) == 1_148_342_400_000


@given(st.integers(-(2**63), 2**63 - 1 - 2**42))
def test_elapsed_time_is_exact_in_int64(timestamp):
    (elapsed,) = elapsed_ms(torch.tensor([timestamp])).tolist()
    assert elapsed == max(timestamp - REFERENCE_MS, 1)


@given(st.integers(-(2**63), 2**62))
def test_the_encoding_is_its_formula(timestamp):
    (value,) = log_encoding(torch.tensor([timestamp]), tau=0.1).tolist()
    assert value == pytest.approx(0.1 * math.log(max(timestamp - REFERENCE_MS, 1)), rel=1e-15)


@given(st.integers(LAST - int(YEAR), LAST))
def test_a_millisecond_counts_even_near_2106(timestamp):
    values = log_encoding(torch.arange(timestamp - 2, timestamp + 3))
    assert (values.diff() > 0).all()
    elapsed = (values / 0.1).exp().round().long()  # nothing is lost: the way back is exact
    assert (elapsed + REFERENCE_MS).tolist() == list(range(timestamp - 2, timestamp + 3))


def test_other_types_than_int64_are_refused():
    for dtype in (torch.float32, torch.float64, torch.int32):
        with pytest.raises(GemmateError, match="int64"):
            log_encoding(torch.zeros(1, dtype=dtype))
    assert int(torch.tensor(float(LAST)).float()) != LAST  # why so


def test_all_dates_before_the_reference_are_exactly_zero():
    before = torch.tensor([-(2**63), -1, 0, REFERENCE_MS - 1, REFERENCE_MS, REFERENCE_MS + 1])
    assert torch.equal(log_encoding(before), torch.zeros(6, dtype=torch.float64))
    assert log_encoding(torch.tensor([REFERENCE_MS + 2])) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("days", [1, 400, 7000, 36000])
def test_resolution_is_how_long_the_encoding_stands_still(dtype, days):
    start = torch.tensor([REFERENCE_MS + days * DAY])
    step = resolution(start, dtype).item()
    span = math.expm1(6 * math.log1p(step / (days * DAY))) * days * DAY  # six such steps
    times = start + torch.linspace(0, span, 5001, dtype=torch.float64).long()
    held = log_encoding(times).to(dtype)
    assert len(held.unique()) in (6, 7)


def test_before_the_reference_nothing_is_ever_told_apart():
    assert resolution(torch.tensor([REFERENCE_MS - 1, 0])).tolist() == [math.inf] * 2


def test_moments_become_exact_timestamps():
    assert to_timestamp(utc(2106, 2, 7, 6, 28, 15, 999_000)) == LAST
    assert to_timestamp(utc(1969, 12, 31, 23, 59, 59, 999_999)) == -1  # down, not towards zero
    tokyo = datetime.timezone(datetime.timedelta(hours=9))
    assert to_timestamp(datetime.datetime(2006, 5, 23, 9, tzinfo=tokyo)) == REFERENCE_MS
    with pytest.raises(GemmateError, match="time zone"):
        to_timestamp(datetime.datetime(2006, 5, 23))


# The model.


def test_an_unknown_kind_is_refused_and_the_known_ones_are_named():
    with pytest.raises(GemmateError, match=r"'calender'. Join any of log"):
        TemporalEncoder("calender", 8)


def test_the_encoder_starts_at_zero_however_it_is_made(base, family):
    plain = family[1].from_pretrained(base)
    made = [family[3](family[2](**SHAPE)), time_aware(base), from_base(plain)]
    for encoder in (TemporalEncoder("log", 8), *(model.temporal for model in made)):
        assert encoder.projection.weight.abs().max() == 0
        assert encoder(TIMES).shape == (3, 1, encoder.projection.out_features)


def test_a_plain_base_is_read_without_a_warning_about_its_type(base, family, caplog):
    assert type(time_aware(base).config) is family[2]
    assert "model of type" not in caplog.text


@pytest.mark.parametrize("embedded", [True, False])
def test_untrained_it_is_its_base_bit_for_bit(base, family, embedded):
    name = "tiny-gemma2" if family[1] is Gemma2ForCausalLM else "tiny-gemma"
    path = Path(model_path(name)) if embedded else base
    model = time_aware(path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = logits(plain)
    assert torch.equal(logits(model), expected)
    gaps = {"position_ids": torch.tensor([[0, 1, 3, 6, 10]])}
    assert torch.equal(logits(model, timestamps=TIMES, **gaps), logits(plain, **gaps))
    assert not torch.equal(logits(plain, **gaps), expected)
    assert torch.equal(logits(model, timestamps=TIMES), expected)
    assert model(input_ids=IDS, labels=IDS, timestamps=TIMES).loss == (
        plain(input_ids=IDS, labels=IDS).loss
    )


def test_the_gradient_reaches_the_encoder_but_not_from_before_the_reference(base):
    model = time_aware(base)
    weight = model.temporal.projection.weight
    model(input_ids=IDS, labels=IDS, timestamps=TIMES).loss.backward()
    assert (weight.grad[:, 0] != 0).all() and (weight.grad[:, 1] == 0).all()
    weight.grad = None
    model(input_ids=IDS, labels=IDS, timestamps=TIMES.clamp(max=REFERENCE_MS)).loss.backward()
    assert (weight.grad == 0).all()


def test_once_learned_time_matters_row_by_row(base):
    model = learned(base)
    plain, dated = logits(model), logits(model, timestamps=TIMES)
    torch.testing.assert_close(plain[0], plain[2])  # a row's bits depend on its place on some CPUs
    assert not torch.allclose(dated[0], dated[2], atol=1e-2)
    torch.testing.assert_close(dated[1], plain[1])  # before the reference: no time at all
    for row in range(3):
        one = logits(model, input_ids=IDS[row : row + 1], timestamps=TIMES[row : row + 1])
        torch.testing.assert_close(one[0], dated[row], atol=1e-5, rtol=1e-5)
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(dated, logits(model, input_ids=None, inputs_embeds=embedded,
                                     timestamps=TIMES))  # fmt: skip


@pytest.mark.parametrize("auto", [True, False])
def test_what_is_saved_loads_with_equal_logits(base, family, tmp_path, auto):
    loader = AutoModelForCausalLM if auto else family[3]
    model = learned(base)
    model.config.temporal_tau = 0.25
    model.temporal.tau = 0.25
    model.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path).eval()
    assert type(again) is family[3]
    assert torch.equal(logits(again, timestamps=TIMES), logits(model, timestamps=TIMES))


def test_the_encoder_stays_in_fp32_when_the_rest_is_bf16(base, tmp_path):
    time_aware(base).save_pretrained(tmp_path)
    for path in (base, tmp_path):
        model = time_aware(path, dtype=torch.bfloat16)
        full = [name for name, p in model.named_parameters() if p.dtype != torch.bfloat16]
        assert full == ["model.temporal.projection.weight"]
        assert model.temporal(TIMES).dtype == torch.float32
        assert logits(model, timestamps=TIMES).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "timestamps", [TIMES[:1], TIMES[:, None], TIMES.float(), TIMES[:, None].expand(3, 4)]
)
def test_timestamps_of_another_shape_or_type_are_refused(base, timestamps):
    with pytest.raises(GemmateError, match="timestamps are"):
        time_aware(base)(input_ids=IDS, timestamps=timestamps)


def test_generate_carries_the_time_through_every_step(base):
    model = learned(base)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = IDS
    for _ in range(6):  # the greedy loop, written out
        best = logits(model, input_ids=ids, timestamps=TIMES)[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    assert not torch.equal(ids[0], ids[2])
    assert torch.equal(model.generate(IDS, timestamps=TIMES, **options), ids)
    padded = nn.functional.pad(IDS, (3, 0))  # on the left
    mask = (torch.arange(8) >= 3).long().expand(3, 8)
    after = model.generate(padded, attention_mask=mask, timestamps=TIMES, **options)
    assert torch.equal(after[:, 3:], ids)
    beams = model.generate(IDS, timestamps=TIMES, num_beams=2, num_return_sequences=2, **options)
    assert beams.shape == (6, 11)


def test_every_argument_that_generate_and_trainer_look_for_is_named(family):
    ours = inspect.signature(family[3].forward).parameters
    theirs = inspect.signature(family[1].forward).parameters
    assert {"timestamps", "labels"} | set(theirs) <= set(ours)


def test_a_time_for_every_token(base):
    """The same time for all of them is one time a row; another for the last ones is not."""
    model = learned(base)
    every = TIMES[:, None].expand(3, 5)
    torch.testing.assert_close(logits(model, timestamps=every), logits(model, timestamps=TIMES))
    later = every.clone()
    later[:, 3:] = LAST
    dated = logits(model, timestamps=later)
    torch.testing.assert_close(dated[:, :3], logits(model, timestamps=every)[:, :3])
    assert not torch.allclose(dated[0, 3:], logits(model, timestamps=every)[0, 3:], atol=1e-2)


def test_generated_tokens_carry_the_time_of_the_last(base):
    model = learned(base)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    times, ids = TIMES[:, None].repeat(1, 5), IDS
    times[:, 3:] = LAST
    for _ in range(6):
        best = logits(model, input_ids=ids, timestamps=times)[:, -1:].argmax(-1)
        ids, times = torch.cat([ids, best], 1), torch.cat([times, times[:, -1:]], 1)
    for cached in (True, False):
        done = model.generate(IDS, timestamps=times[:, :5], use_cache=cached, **options)
        assert torch.equal(done, ids)
    beams = model.generate(IDS, timestamps=times[:, :5], num_beams=2, **options)
    assert beams.shape == (3, 11)


def test_a_missing_time_has_a_vector_of_its_own():
    encoder = TemporalEncoder("log+calendar", 8)
    nn.init.normal_(encoder.projection.weight)
    missing = torch.tensor([MISSING, REFERENCE_MS, MISSING])
    found = encoder(missing)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(found[0, 0], encoder.projection.weight[:, -1] * 8**0.5)
    assert not encoder.features(missing)[0, :-1].any()
    offsets = torch.tensor([60, 0, -60])
    assert torch.equal(encoder(missing, offsets)[0], found[0])


def test_an_offset_gives_the_local_time():
    encoder = TemporalEncoder("calendar", 8)
    nn.init.normal_(encoder.projection.weight)
    offsets = torch.tensor([540, -300, 0])
    local = TIMES + offsets * 60_000
    assert torch.equal(encoder(TIMES, offsets), encoder(local))
    tokens = TIMES[:, None].expand(3, 4)
    expected = encoder(local)[:, :1].expand(3, 4, 8)
    torch.testing.assert_close(encoder(tokens, offsets), expected)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["tiny-gemma", "tiny-gemma2"])
def test_a_loaded_base_gets_a_time_aware_twin(name, quantization):
    config = ModelConfig(id=name, quantization=quantization, device="cpu")
    plain = load_base(config).model.eval()
    expected = logits(plain)
    twin = from_base(plain, kind="fourier+calendar")
    assert (
        twin.model.layers is plain.model.layers and twin.config.temporal_kind == "fourier+calendar"
    )
    assert not [n for n, p in twin.named_parameters() if p.is_meta]
    assert torch.equal(logits(twin, timestamps=TIMES), expected)
    twin.temporal.projection.weight.data.normal_()
    assert not torch.allclose(logits(twin, timestamps=TIMES), expected, atol=0.1)
    assert torch.equal(logits(twin), expected)


def test_other_models_have_no_twin():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9}
    with pytest.raises(GemmateError, match="GPT2LMHeadModel has no time-aware twin"):
        from_base(GPT2LMHeadModel(GPT2Config(**shape)))


settings.register_profile("temporal", max_examples=60, deadline=None, database=None)
settings.load_profile("temporal")
