"""Rows of prompt and completion, and their way to token ids that are not too long."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Any, NamedTuple

from gemmate_lib.config import GemmateError

# (end, timestamp): what stands before that character of prompt + completion was written then; the
# last time holds to the end. None where the data set has no times.
Times = tuple[tuple[int, int], ...] | None


class Soft(NamedTuple):
    """The characters of a prompt that may be shortened, and those among them that must stay."""

    start: int
    end: int
    keep: tuple[int, int] | None = None  # an answer


@dataclass(frozen=True)
class Row:
    """One example: the loss is taken on the completion; `source_row` counts from 0."""

    prompt: str
    completion: str
    fields: dict[str, str]
    source_row: int
    times: Times = None
    soft: Soft | None = None

    @property
    def timestamp(self) -> int | None:
        """When the completion was written."""
        return self.times[-1][1] if self.times else None


@dataclass(frozen=True)
class Encoded:
    """Token ids, labels and times of one row, int [T] each; -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool
    timestamps: list[int] | None = None


def encode(row: Row, tokenizer: Any, *, max_length: int, over_long: str) -> Encoded | None:
    """Encode bos + prompt + completion + eos; None where the row is too long to keep.

    The prompt is tokenised by itself, as it is at generation. `over_long="cut"` shortens what may
    be shortened, see `fit`, else the end of the prompt; only a completion that alone exceeds
    `max_length` is cut, and so loses its eos.

    Raises:
        GemmateError: the tokenizer has no end-of-sequence token.
    """
    bos, prompt, completion = _parts(row, tokenizer)
    room = max_length - len(bos) - len(completion)
    cut = room < len(prompt)
    if cut and over_long == "drop":
        return None
    if cut and (fitted := fit(row, tokenizer, max_length=max_length)) != row:
        found = encode(fitted, tokenizer, max_length=max_length, over_long="cut")
        return found and replace(found, cut=True)
    prompt, completion = prompt[: max(room, 0)], completion[: max_length - len(bos)]
    ids = [token for token, _ in (*bos, *prompt, *completion)]
    masked = len(bos) + len(prompt)  # nothing predicts the first position
    times = None
    if row.times:
        ends = [end for end, _ in row.times[:-1]]
        starts = [start for _, start in (*bos, *prompt, *completion)]
        times = [row.times[bisect_right(ends, start)][1] for start in starts]
    return Encoded(ids, [-100] * masked + ids[masked:], cut, times)


def encode_all(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, over_long: str
) -> list[Encoded]:
    """Encode rows in their order, without those that are too long to keep."""
    found = (encode(row, tokenizer, max_length=max_length, over_long=over_long) for row in rows)
    return [ids for ids in found if ids is not None]


def token_rows(
    rows: list[Row], tokenizer: Any, *, max_length: int, over_long: str, numbered: bool = False
) -> Any:
    """Return a data set of `input_ids` and `labels` (-100 where no loss is taken).

    Where the rows have times, also of `timestamps`: each token's, for GemmaTE's collator;
    `numbered`: also of `row`, its number in the source.

    Raises: GemmateError where a row would teach nothing, or never to stop.
    """
    from datasets import Dataset

    encoded = [encode(row, tokenizer, max_length=max_length, over_long=over_long) for row in rows]
    kept = [ids for ids in encoded if ids is not None]
    for ids in kept:
        if not ids.cut and ids.labels[-1] != tokenizer.eos_token_id:
            raise GemmateError("A row does not end in EOS: the model would never learn to stop.")
    if not any(label != -100 for ids in kept for label in ids.labels):
        raise GemmateError("No row has a label: raise dataset.max_length.")
    numbers = [row.source_row for row, ids in zip(rows, encoded, strict=True) if ids is not None]
    columns: dict[str, list[Any]] = {"row": numbers} if numbered else {}
    columns |= {"input_ids": [i.input_ids for i in kept], "labels": [i.labels for i in kept]}
    if kept[0].timestamps:
        columns["timestamps"] = [i.timestamps or [] for i in kept]
    return Dataset.from_dict(columns)


def _parts(row: Row, tokenizer: Any) -> tuple[list[tuple[int, int]], ...]:
    """Tokens of bos, prompt, and completion with eos, each with the character it starts at."""
    if tokenizer.eos_token_id is None:
        raise GemmateError("The tokenizer has no end-of-sequence token. Set tokenizer.eos_token.")
    bos = [] if tokenizer.bos_token_id is None else [(tokenizer.bos_token_id, 0)]
    prompt, completion = (_tokens(text, row, tokenizer) for text in (row.prompt, row.completion))
    completion = [(token, start + len(row.prompt)) for token, start in completion]
    if [token for token, _ in completion[-1:]] != [tokenizer.eos_token_id]:
        completion.append((tokenizer.eos_token_id, len(row.prompt + row.completion)))
    return bos, prompt, completion


def fit(row: Row, tokenizer: Any, *, max_length: int) -> Row:
    """Shorten what may be shortened of a prompt until the row has at most `max_length` tokens.

    What must stay of it is kept in the middle; without such a place the end is cut off. The row
    comes back as it is where it fits, and as short as it gets where it cannot fit.
    """
    while row.soft and (over := sum(map(len, _parts(row, tokenizer))) - max_length) > 0:
        start, end, _ = row.soft
        spans = _spans(row.prompt[start:end], tokenizer)
        if not spans:
            break
        row = _window(row, spans, *_middle(row.soft, spans, max(len(spans) - over, 0)))
    return row


def windows(row: Row, tokenizer: Any, *, max_length: int, stride: int) -> list[Row]:
    """Slide over what may be shortened: rows that fit and together show all of it.

    stride: how many tokens of it two neighbours share. Raises: GemmateError where none would fit.
    """
    over = sum(map(len, _parts(row, tokenizer))) - max_length
    if not row.soft or over <= 0:
        return [row]
    spans = _spans(row.prompt[row.soft.start : row.soft.end], tokenizer)
    size = len(spans) - over - 2  # a cut may split a token in two, at either end
    if size <= stride:
        problem = f"Row {row.source_row} leaves {max(size, 0)} tokens for its context"
        raise GemmateError(f"{problem}. Raise dataset.max_length above {max_length}.")
    starts = [*range(0, len(spans) - size, size - stride), len(spans) - size]
    return [_window(row, spans, first, first + size) for first in starts]


def _spans(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where each token of a text starts and ends, in characters."""
    if not tokenizer.is_fast:
        raise GemmateError("Shortening a prompt needs a fast tokenizer. Use over_long=drop.")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["offset_mapping"])


def _middle(soft: Soft, spans: list[tuple[int, int]], size: int) -> tuple[int, int]:
    """The first and last + 1 of `size` tokens, around what must stay."""
    if soft.keep is None:
        return 0, size
    low, high = (place - soft.start for place in soft.keep)
    kept = [i for i, (start, end) in enumerate(spans) if start < high and end > low]
    first = (kept[0] + kept[-1] + 1 - size) // 2 if kept else 0
    first = min(max(first, 0), len(spans) - size)
    return first, first + size


def _window(row: Row, spans: list[tuple[int, int]], first: int, last: int) -> Row:
    """The row with the tokens from first to last - 1 alone in place of what may be shortened."""
    assert row.soft is not None
    while 0 < first < last and spans[first] == spans[first - 1]:
        first += 1  # a byte of a character that begins before
    while first < last < len(spans) and spans[last - 1] == spans[last]:
        last -= 1
    start, end, keep = row.soft
    low, high = (spans[first][0], spans[last - 1][1]) if first < last else (0, 0)
    text = row.prompt[start + low : start + high]
    prompt = row.prompt[:start] + text + row.prompt[end:]
    inside = keep and start + low <= keep[0] and keep[1] <= start + high
    moved = (keep[0] - low, keep[1] - low) if keep and inside else None
    return replace(row, prompt=prompt, soft=Soft(start, start + len(text), moved))


def _tokens(text: str, row: Row, tokenizer: Any) -> list[tuple[int, int]]:
    """Token ids, each with the character it starts at if the row needs to know, else with 0."""
    wanted = bool(row.times) and len(row.times or ()) > 1
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=wanted)
    ids = found["input_ids"]
    starts = [start for start, _ in found["offset_mapping"]] if wanted else [0] * len(ids)
    tokens, bos = list(zip(ids, starts, strict=True)), tokenizer.bos_token_id
    if bos == tokenizer.eos_token_id:  # GPT-2: only at the start is it a bos
        return list(dropwhile(lambda pair: pair[0] == bos, tokens))
    return [pair for pair in tokens if pair[0] != bos]  # pre-rendered text brings one along
