"""Tokens to text while they come: the pieces join to the whole, and none ends in half a letter."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from gemmate_lib.models import load_tokenizer
from gemmate_lib.serve.pieces import HALF, Pieces


def sentencepiece() -> Any:
    """As Gemma's and Llama's: words begin with a bar, and what no word holds is bytes."""
    words = ["<pad>", "<eos>", "\u2581a", "b", "\u2581", "\u20ac", "\ufffd"]
    vocabulary = {w: i for i, w in enumerate([*words, *(f"<0x{n:02X}>" for n in range(256))])}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<pad>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


TOKENIZERS = {"bytes": load_tokenizer("tiny-gemma"), "sentencepiece": sentencepiece()}
HARD = "a\u20acb \U0001f600e\u0301\u4f60\u597d  x"


def whole(tokenizer: Any, tokens: list[int]) -> str:
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(tokens, **plain)


def told(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    pieces, said = Pieces(tokenizer, stop), []
    for token in tokens:
        said.append(pieces.add(token))
        if pieces.stopped:
            break
    return [*said, pieces.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_tokens_join_to_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    known = st.integers(0, len(tokenizer) - 1)
    tokens = data.draw(st.lists(known, max_size=14))
    assert "".join(told(tokenizer, tokens)) == whole(tokenizer, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_holds_half_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer(HARD, add_special_tokens=False)["input_ids"]
    said = told(tokenizer, tokens)
    assert len(tokens) > len(HARD) and "".join(said) == whole(tokenizer, tokens)
    assert not any(HALF in piece for piece in said)
    assert sum(map(bool, said)) > 4  # and yet they come in pieces
    for n in range(len(tokens)):  # wherever it is cut
        assert "".join(told(tokenizer, tokens[:n])) == whole(tokenizer, tokens[:n])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("ab \u20ac", max_size=12), stop=st.lists(st.text("ab \u20ac", min_size=1,
       max_size=3), min_size=1, max_size=3))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_stop_text_ends_the_answer_before_it(name: str, text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = whole(tokenizer, tokens)
    ends = [full.index(each) for each in stop if each in full]
    said = "".join(told(tokenizer, tokens, tuple(stop)))
    assert not any(each in said for each in stop)
    assert full.startswith(said)
    assert said == full if not ends else len(said) >= min(ends)
    alone = "".join(told(tokenizer, tokens, (stop[0],)))
    assert alone == full.partition(stop[0])[0]
