"""Metrics: losses per token and per segment, and what can be counted in generated texts.

Shapes: `N` rows, `B` rows in a batch, `T` tokens of a row, `V` words of the vocabulary.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gemmate_lib.adapters import encoder_of
from gemmate_lib.config import GemmateError
from gemmate_lib.data import Encoded, Row
from gemmate_lib.generate import evaluating
from gemmate_lib.splitting import normalise
from gemmate_lib.timestamps import MISSING

Sums = tuple[np.ndarray, np.ndarray]  # of -log p in nats, float64 [N]; of tokens, int64 [N]
SEGMENTS = ("form", "quote", "author")
_AUTHOR = "\nAuthor:"
_PAIR = re.compile(r"Quote: \S[^\n]*(?:\n[^\n]+)*?\nAuthor: \S[^\n]*")
_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>")


def position_losses(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], *, batch_size: int
) -> list[np.ndarray]:
    """Return -log p of each token in nats, float64 [T] for each row; NaN where no loss is taken.

    The logits of a batch are held at once: [B, T, V]. The model keeps its mode.
    Raises: GemmateError where a loss is not finite.
    """
    import torch

    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))  # less padding
    losses = [np.full(len(row.input_ids), np.nan) for row in rows]
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = by_length[start : start + batch_size]
            logits = logits_of(model, tokenizer, [rows[i] for i in batch])
            for i, scores in zip(batch, logits, strict=True):
                _take_losses(losses[i], scores, rows[i].labels)
    return losses


def logits_of(model: Any, tokenizer: Any, rows: list[Encoded]) -> Any:
    """Logits [B, T, V]. Padding on the right needs no mask: a causal model never looks ahead."""
    import torch

    tensors, pad = [torch.tensor(row.input_ids) for row in rows], tokenizer.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
    inputs = {"input_ids": ids.to(model.device), "use_cache": False}
    if encoder_of(model) is not None:
        from gemmate_lib.temporal.collate import join_times

        times = join_times([row.timestamps or [MISSING] * len(row.input_ids) for row in rows])
        inputs["timestamps"] = times.to(model.device)
    logits = model(**inputs).logits
    return logits[:, -ids.shape[1] :]  # prompt tuning puts virtual tokens in front


def _take_losses(losses: np.ndarray, scores: Any, labels: list[int]) -> None:
    """Fill losses [T] from logits [at least T, V]: position t is predicted at t - 1."""
    import torch

    target = torch.tensor(labels[1:], device=scores.device)  # -100 is left out by cross_entropy
    scores = scores[: len(target)].float()
    nll = torch.nn.functional.cross_entropy(scores, target, reduction="none").double().cpu()
    taken = np.array(labels[1:]) != -100
    losses[1:][taken] = nll.numpy()[taken]
    if not np.isfinite(losses[1:][taken]).all():
        raise GemmateError("A row's loss is not finite. Lower learning_rate, or use bfloat16.")


def token_losses(model: Any, tokenizer: Any, rows: Sequence[Encoded], *, batch_size: int) -> Sums:
    """Return each row's loss and its number of tokens, whatever the batch and the padding."""
    return row_sums(position_losses(model, tokenizer, rows, batch_size=batch_size))


def row_sums(losses: Sequence[np.ndarray]) -> Sums:
    """Return the sum and the number of the losses taken in each row."""
    counts = np.array([np.isfinite(each).sum() for each in losses], dtype=np.int64)
    return np.array([np.nansum(each) for each in losses], dtype=np.float64), counts


def perplexity(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return exp of the mean loss of a token: long rows weigh more than short ones.

    Raises: GemmateError where there is no token.
    """
    if not (tokens := int(np.sum(counts))):
        raise GemmateError("No token bears a loss. Raise dataset.max_length.")
    mean = float(np.sum(sums)) / tokens
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is an OverflowError


def segment_losses(
    rows: Sequence[Row], losses: Sequence[np.ndarray], tokenizer: Any
) -> dict[str, Sums]:
    """Split `position_losses` of "Quote: …\\nAuthor: …" rows into segments that are the whole.

    quote: from behind "Quote:" to the newline that ends it; author: the name and EOS; form: rest.
    Raises: GemmateError where a row has another form, or the tokenizer tells no character offsets.
    """
    parts = [segments(row.completion, tokenizer) for row in rows]
    pairs = [(each, part[: len(each)]) for each, part in zip(losses, parts, strict=True)]
    return {name: row_sums([each[part == name] for each, part in pairs]) for name in SEGMENTS}


def segments(text: str, tokenizer: Any) -> np.ndarray:
    """Return the segment of each token of bos + text + eos; a token belongs where it starts."""
    newline = text.rfind(_AUTHOR)
    if not tokenizer.is_fast or not text.startswith("Quote:") or newline < 0:
        raise GemmateError("Segments need rows of quote and author, and a fast tokenizer.")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    starts = [start for token, (start, _) in pairs if token != tokenizer.bos_token_id]
    quote, author = len("Quote:"), newline + len(_AUTHOR)
    names = [SEGMENTS[(quote <= s <= newline) + 2 * (s >= author)] for s in starts]
    return np.array(["form"] * (tokenizer.bos_token_id is not None) + [*names, "author"])


def well_formed(text: str) -> bool:
    """Tell whether a text is exactly one "Quote: …\\nAuthor: <name>", with nothing after it."""
    pairs = text.count("Quote:"), text.count("Author:")
    return pairs == (1, 1) and _PAIR.fullmatch(text) is not None and not html_tags(text)


def author_of(completion: str) -> str:
    """Return the name that a completion of "Quote: …\\nAuthor:" begins with: its first line."""
    return completion.strip().partition("\n")[0].strip()


def html_tags(text: str) -> int:
    """Count the HTML tags, opening and closing."""
    return len(_TAG.findall(text))


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return all runs of n neighbouring words; without case and punctuation, as for duplicates."""
    items = normalise(text).split()
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def repetition(text: str, n: int = 4) -> float:
    """Return the share of word n-grams that were there before; 0 for a shorter text."""
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct_points(texts: Sequence[str], n: int) -> Sums:
    """Return each text's points and word n-grams: one point for each distinct one, shared out."""
    grams = [ngrams(text, n) for text in texts]
    times = Counter(itertools.chain(*grams))
    points = [sum(1 / times[gram] for gram in own) for own in grams]
    return np.array(points), np.array([len(own) for own in grams])


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return distinct word n-grams over all: Li et al. 2016, https://aclanthology.org/N16-1014."""
    points, grams = distinct_points(texts, n)
    return float(points.sum() / max(1, grams.sum()))


def run_finder(texts: Iterable[str], n: int = 3) -> Callable[[str], int]:
    """Index texts; the result tells the longest run of at least n words another shares with one."""
    # A gap between the texts, so that no run goes on from one into the next.
    grams = itertools.chain.from_iterable([*ngrams(text, n), None] for text in texts)
    places: dict[tuple[str, ...] | None, list[int]] = defaultdict(list)
    for place, gram in enumerate(grams):
        places[gram].append(place)

    def longest_run(text: str) -> int:
        longest, runs = 0, dict[int, int]()  # place of a run's last n-gram -> its words
        for gram in ngrams(text, n):
            runs = {p: runs.get(p - 1, n - 1) + 1 for p in places.get(gram, ())}
            longest = max([longest, *runs.values()])
        return longest

    return longest_run
