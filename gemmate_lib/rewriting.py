"""Ways to say a text otherwise: a table of synonyms, models that rewrite, and noise.

Each makes a `Rewriter`; `gemmate_lib.augment` decides what of a row it may touch.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from gemmate_lib.config import GemmateError

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
BATCH, SPARE = 16, 16  # texts at a time; tokens that a rewriting may be longer than its source
Loaded = tuple[Any, Any]  # model, tokenizer


@dataclass(frozen=True)
class Rewriter:
    """Makes others of texts, or the same where there is nothing to change.

    unit: what it is given: stretches of words between protected ones, or whole sentences.
    """

    name: str
    unit: Literal["words", "sentence"]
    write: Callable[[Sequence[str], random.Random], Sequence[str]]


def read_synonyms(path: str | Path | None = None) -> dict[str, tuple[str, ...]]:
    """Return word -> the words that may stand for it, from a YAML list of groups; None: ours.

    Raises: GemmateError where it is no such list, or a word is in two groups.
    """
    ours = resources.files("gemmate_lib") / "assets" / "synonyms.yaml"
    try:
        groups = yaml.safe_load((ours if path is None else Path(path)).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GemmateError(f"{path} cannot be read ({error}). Give a YAML list.") from None
    table: dict[str, tuple[str, ...]] = {}
    for group in groups if isinstance(groups, list) else [None]:
        if not isinstance(group, list) or not all(isinstance(word, str) for word in group):
            raise GemmateError(f"{path} is no list of groups. Write lines as - [film, movie].")
        for word in group:
            if word in table:
                raise GemmateError(f"{word!r} is in two groups. Leave it in one.")
            table[word] = tuple(other for other in group if other != word)
    return table


def synonyms(table: Mapping[str, Sequence[str]] | None = None, *, share: float = 0.5) -> Rewriter:
    """Put synonyms for this share of the words that have one.

    Case is kept, and the sound that an article goes by: after "an" stands no word in b.
    Raises: GemmateError for a share outside of 0..1.
    """
    words = read_synonyms() if table is None else table
    _check_share(share)

    def one(match: re.Match[str], rng: random.Random) -> str:
        word = match.group()
        fit = [other for other in words.get(word.lower(), ()) if _vowel(other) == _vowel(word)]
        if not fit or rng.random() >= share:
            return word
        chosen = rng.choice(fit)
        if len(word) > 1 and word.isupper():
            return chosen.upper()
        return chosen.capitalize() if word[0].isupper() else chosen

    def write(texts: Sequence[str], rng: random.Random) -> list[str]:
        return [WORD.sub(partial(one, rng=rng), text) for text in texts]

    return Rewriter("synonyms", "words", write)


def noise(*, share: float = 0.1) -> Rewriter:
    """Misspell this share of the longer words: a letter swapped, left out or doubled.

    It says nothing new: it is noise, for a model that is to read texts with slips.
    Raises: GemmateError for a share outside of 0..1.
    """
    _check_share(share)

    def one(match: re.Match[str], rng: random.Random) -> str:
        word = match.group()
        if len(word) < 4 or rng.random() >= share:
            return word
        at = rng.randrange(1, len(word) - 1)
        pair = word[at : at + 2]
        slip = rng.choice([pair[::-1], pair[1:], pair[0] + pair])
        return word[:at] + slip + word[at + 2 :]

    def write(texts: Sequence[str], rng: random.Random) -> list[str]:
        return [WORD.sub(partial(one, rng=rng), text) for text in texts]

    return Rewriter("noise", "words", write)


def paraphrase(model: str | None, *, prefix: str = "paraphrase: ") -> Rewriter:
    """Let a sequence-to-sequence model say each sentence otherwise, drawn at random.

    model: a Hub id or a folder. prefix: what the model was trained to be asked with.
    Raises: GemmateError without a model, or where it cannot be loaded.
    """
    loaded = load_seq2seq(model, "Paraphrase needs a model: model=ID or a folder, say of a T5")

    def write(texts: Sequence[str], rng: random.Random) -> list[str]:
        return _generate(loaded, [f"{prefix}{text}" for text in texts], seed=rng.getrandbits(32))

    return Rewriter("paraphrase", "sentence", write)


def back_translation(there: str | None, back: str | None) -> Rewriter:
    """Translate each sentence into another language, and back by a second model.

    there, back: Hub ids or folders, as Helsinki-NLP/opus-mt-en-de and …-de-en.
    Raises: GemmateError without two models, or where one cannot be loaded.
    Sennrich et al. 2016, https://aclanthology.org/P16-1009
    """
    told = "Back-translation needs two models: there=ID and back=ID, or their folders, as "
    told += "Helsinki-NLP/opus-mt-en-de and Helsinki-NLP/opus-mt-de-en"
    models = [load_seq2seq(model, told) for model in (there, back)]

    def write(texts: Sequence[str], _: random.Random) -> list[str]:
        found = list(texts)
        for loaded in models:
            found = _generate(loaded, found, seed=None)
        return found

    return Rewriter("back-translation", "sentence", write)


def load_seq2seq(model: str | None, told: str) -> Loaded:
    """Load an encoder-decoder and its tokenizer: safetensors alone, and no code of its own.

    Raises: GemmateError saying what to pass where there is none, or why it cannot be loaded.
    """
    if not model:
        raise GemmateError(f"{told}. Without one, use synonyms.")
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    safe: dict[str, Any] = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **safe)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(model, use_safetensors=True, **safe)
    except (OSError, ValueError, ImportError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        remedy = "Check its name and the network; it must be a sequence-to-sequence model."
        raise GemmateError(f"cannot load {model}: {why}. {remedy}") from error
    return loaded.eval(), tokenizer


def _generate(loaded: Loaded, texts: list[str], *, seed: int | None) -> list[str]:
    """One text for each: the likeliest, or with a seed one drawn at random."""
    import torch

    model, tokenizer = loaded
    found: list[str] = []
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True)
            ids = batch["input_ids"].to(model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=ids.shape[1] + SPARE,
                do_sample=seed is not None,
                num_beams=1,
            )
            found += tokenizer.batch_decode(out, skip_special_tokens=True)
    return found


def _vowel(word: str) -> bool:
    return word[0].lower() in "aeiou"


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise GemmateError(f"A share of {share} is none. Give one from 0 to 1.")
