"""The tokenizer of the embedded models: byte-level BPE, 2,048 words, Gemma's special tokens."""

import itertools
import random
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gemmate_lib.tiny.corpus import documents

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def _alphabet() -> list[str]:
    """Return the byte-level letters of all bytes that can occur in UTF-8.

    Byte-level BPE writes a printable Latin-1 byte as itself and the others as later letters;
    the bytes that UTF-8 never uses are all printable in Latin-1.
    """
    impossible = {chr(byte) for byte in NEVER_IN_UTF8}
    return sorted(set(pre_tokenizers.ByteLevel.alphabet()) - impossible)


def train_tokenizer(*, seed: int, n_documents: int = 12_000, vocab_size: int = 2048) -> Tokenizer:
    """Train the tokenizer on the first documents of the corpus; each digit is its own token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(seed), n_documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as transformers loads and saves it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: Tokenizer, texts: Iterable[str], *, seed: int) -> Iterable[list[int]]:
    """Yield `<bos> … <eos>` ids for every text, and now and then a page of loose tokens.

    Tokens that BPE only makes on the way to longer ones would never be seen, and a word that
    was never seen cannot be read later. So one document in 25 is cut at random places and its
    pieces are encoded apart, and one page in a hundred is drawn from the vocabulary itself.
    """
    rng = random.Random(seed)
    texts = iter(texts)
    size = tokenizer.get_vocab_size()
    while batch := list(itertools.islice(texts, 1000)):
        for text, plain in zip(batch, tokenizer.encode_batch(batch), strict=True):
            kind = rng.random()
            if kind < 0.01:
                yield [2, *(rng.randrange(4, size) for _ in range(60)), 1]
            if kind < 0.96 or "<start_of_turn>" in text:
                yield [*plain.ids, 1]
                continue
            cuts = sorted(rng.sample(range(len(text)), len(text) // 6))
            pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
            encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
            yield [2, *itertools.chain.from_iterable(piece.ids for piece in encoded), 1]
