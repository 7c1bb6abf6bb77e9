"""Forms, rendering and encoding, against a byte-level tokenizer of each kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemmate_lib.config import GemmateError
from gemmate_lib.forms import as_text, find_form, render
from gemmate_lib.rows import Row, encode

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_tokenizer(**special):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=turns, **special
    )
    tokenizer.chat_template = CHAT
    return tokenizer


GEMMA = byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
GPT2 = byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
NO_BOS = byte_tokenizer(eos_token="<|im_end|>")


def make(record, form, template=None, tokenizer=None):
    return render(record, form, template=template, tokenizer=tokenizer, source_row=7)


def form_of(columns, mapped=(), template=None):
    return find_form(columns, mapped=mapped, template=template)[0]


def test_forms_are_told_by_their_columns():
    assert form_of(["text", "label"]) == "text"
    assert form_of(["prompt", "completion"]) == "prompt-completion"
    assert form_of(["instruction", "input", "output"]) == "instruction"
    assert form_of(["instruction", "output"]) == "instruction"
    assert form_of(["messages"]) == "messages"
    assert form_of(["quote", "author", "tags"]) == "quotes"
    assert form_of(["quote", "author", "text"], mapped=["text"]) == "text"
    assert form_of(["a", "b"], template="{a}: {b}") == "text"
    assert find_form(["quote", "author", "x"], mapped=(), template="{author}, {quote}") == (
        "quotes",
        ("author", "quote"),
    )


@pytest.mark.parametrize(
    ("columns", "template", "told"),
    [
        (["headline", "label"], None, r"\['headline', 'label'\] match no form"),
        (["sentence"], "{sentense}", "Did you mean 'sentence'"),
        (["sentence"], "{sentence.__class__}", "no column"),
        (["sentence"], "{", "Mend it"),
        (["sentence"], "Review", "names no column"),
    ],
)
def test_unknown_forms_and_bad_templates_are_refused(columns, template, told):
    with pytest.raises(GemmateError, match=told):
        form_of(columns, template=template)


def test_each_form_renders_as_documented():
    quote = {"quote": " Be {kind}. ", "author": "A", "tags": ["x", "y"]}
    row = make(quote, "quotes")
    assert row == Row("", "Quote: Be {kind}.\nAuthor: A", row.fields, 7)
    assert row.fields == {"quote": "Be {kind}.", "author": "A", "tags": "x, y"}
    assert make(quote, "quotes", template="{author}: {quote}").completion == "A: Be {kind}."
    assert make({"text": " as it is "}, "text").completion == " as it is "
    pair = make({"prompt": "2 + 2 = ", "completion": 4}, "prompt-completion")
    assert (pair.prompt, pair.completion) == ("2 + 2 = ", "4")
    task = {"instruction": "Add.\n", "input": "1, 2", "output": "3"}
    assert make(task, "instruction").prompt == "Instruction: Add.\nInput: 1, 2\nResponse:"
    assert make(task, "instruction").completion == " 3"
    assert make(task | {"input": ""}, "instruction").prompt == "Instruction: Add.\nResponse:"
    assert make({"quote": "Q", "author": "A"}, "quotes").fields["tags"] == ""


@pytest.mark.parametrize(
    ("record", "form", "why"),
    [
        ({"quote": "Q"}, "quotes", "missing_field"),
        ({"quote": "Q", "author": None}, "quotes", "missing_field"),
        ({"quote": " \n", "author": "A"}, "quotes", "empty"),
        ({"text": float("nan")}, "text", "missing_field"),
        ({"text": {"en": "x"}}, "text", "missing_field"),
        ({"text": "half a \ud83d"}, "text", "missing_field"),
        ({"prompt": "x", "completion": ""}, "prompt-completion", "empty"),
        ({"instruction": "x", "output": "  "}, "instruction", "empty"),
    ],
)
def test_unusable_records_say_why(record, form, why):
    assert make(record, form) == why


def test_plain_text_may_have_an_empty_prompt():
    assert make({"prompt": "", "completion": "x"}, "prompt-completion").completion == "x"


def test_as_text():
    values = ["a", 1, 0.5, True, ["a", 2], [], None, [{"a": 1}], {}]
    texts = ["a", "1", "0.5", "True", "a, 2", "", None, None, None]
    assert [as_text(value) for value in values] == texts


def test_chat_is_rendered_by_the_template_without_bos():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
        {"role": "user", "content": "left over"},
    ]
    row = make({"messages": turns}, "messages", tokenizer=GEMMA)
    assert row.prompt == (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    assert row.completion == "See you<end_of_turn>"
    encoded = encode(row, GEMMA, max_length=500, over_long="drop")
    assert encoded.input_ids.count(GEMMA.bos_token_id) == 1
    learnt = [token for token in encoded.labels if token != -100]
    assert GEMMA.decode(learnt) == "See you<end_of_turn><eos>"


def test_unusable_chats_say_why():
    user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    system = {"role": "system", "content": "Be brief."}

    def why(turns):
        return make({"messages": turns}, "messages", tokenizer=GEMMA)

    assert why([user]) == why([reply]) == why("Hi") == why(None) == why([{"role": "user"}])
    assert why([user]) == "missing_field"
    assert why([user, reply | {"content": " "}]) == "empty"
    assert why([system, user, reply]) == "refused_by_template"
    with pytest.raises(GemmateError, match="chat template"):
        make({"messages": [user, reply]}, "messages", tokenizer=None)


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = byte_tokenizer(bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(GemmateError, match="rewrites earlier turns"):
        make({"messages": turns}, "messages", tokenizer=tokenizer)


def encoded(prompt, completion, tokenizer=GEMMA, max_length=100, over_long="cut"):
    row = Row(prompt, completion, {}, 0)
    return encode(row, tokenizer, max_length=max_length, over_long=over_long)


def test_the_loss_is_on_the_completion_and_its_end():
    result = encoded("ab", "cd")
    assert GEMMA.decode(result.input_ids) == "<bos>abcd<eos>"
    assert result.labels == [-100, -100, -100, *result.input_ids[3:]]
    assert not result.cut


def test_every_kind_of_tokenizer():
    assert GPT2.decode(encoded("ab", "cd", GPT2).input_ids) == "<|endoftext|>abcd<|endoftext|>"
    assert NO_BOS.decode(encoded("ab", "cd", NO_BOS).input_ids) == "abcd<|im_end|>"
    assert NO_BOS.decode(encoded("", "cd<|im_end|>", NO_BOS).input_ids) == "cd<|im_end|>"
    with pytest.raises(GemmateError, match="end-of-sequence"):
        encoded("ab", "cd", byte_tokenizer(bos_token="<bos>"))


@pytest.mark.parametrize("tokenizer", [GEMMA, GPT2])
def test_text_rendered_before_gets_no_second_bos(tokenizer):
    result = encoded(f"{tokenizer.bos_token}ab", "cd", tokenizer)
    assert result.input_ids == encoded("ab", "cd", tokenizer).input_ids


def test_cutting_spares_the_completion():
    result = encoded("abcdef", "xyz", max_length=8)
    assert GEMMA.decode(result.input_ids) == "<bos>abcxyz<eos>"
    assert result.cut and result.labels[-1] == GEMMA.eos_token_id
    assert GEMMA.decode(encoded("abcdef", "xyz", max_length=5).input_ids) == "<bos>xyz<eos>"
    alone = encoded("ab", "uvwxyz", max_length=5)
    assert GEMMA.decode(alone.input_ids) == "<bos>uvwx"
    assert alone.cut and alone.labels[0] == -100 and -100 not in alone.labels[1:]
    assert encoded("abcdef", "xyz", max_length=8, over_long="drop") is None
    assert not encoded("abc", "xyz", max_length=8, over_long="drop").cut


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text(alphabet="ab <é", max_size=8),
    completion=st.text(alphabet="cd\n", min_size=1, max_size=8),
    max_length=st.integers(2, 24),
    tokenizer=st.sampled_from([GEMMA, GPT2, NO_BOS]),
)
def test_encoding_keeps_its_promises(prompt, completion, max_length, tokenizer):
    result = encoded(prompt, completion, tokenizer, max_length)
    bos = tokenizer.bos_token_id is not None
    pairs = list(zip(result.input_ids, result.labels, strict=True))
    assert len(pairs) <= max_length
    assert all(label in (-100, token) for token, label in pairs)
    learnt = [label for _, label in pairs if label != -100]
    assert learnt and pairs[-1][1] != -100
    whole = bos + len(completion.encode()) + 1 <= max_length
    assert (learnt[-1] == tokenizer.eos_token_id) == whole
    assert result.cut == (bos + len((prompt + completion).encode()) + 1 > max_length)
    if bos:
        assert result.input_ids[0] == tokenizer.bos_token_id
    if tokenizer is GEMMA:
        assert result.input_ids.count(tokenizer.bos_token_id) == 1
    dropped = encoded(prompt, completion, tokenizer, max_length, over_long="drop")
    assert dropped == (None if result.cut else result)
