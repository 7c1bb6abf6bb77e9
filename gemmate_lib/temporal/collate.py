"""Dated texts as tensors: token ids, labels on the completion alone, and the time of each row.

Shapes: `B` rows, `T` tokens of the longest row.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from gemmate_lib.adapters import encoder_of
from gemmate_lib.config import DatasetConfig, Experiment, GemmateError
from gemmate_lib.data import load_dataset_splits
from gemmate_lib.rows import encode_all
from gemmate_lib.timestamps import MISSING


class TemporalDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """The rows of a split: input_ids, labels (-100 on the prompt) and timestamps, [T] each.

    config: `id` a JSON Lines, CSV or JSON file, `timestamp` its field with milliseconds or dates
    in ISO 8601. A turn of a conversation may have its own.
    Raises: GemmateError for a time that cannot be read, naming the row; for a set without times.
    """

    def __init__(
        self,
        config: DatasetConfig,
        tokenizer: Any,
        *,
        split: Literal["train", "validation", "test"] = "train",
    ) -> None:
        if config.timestamp is None:
            raise GemmateError("The rows have no time. Name the field: dataset.timestamp=date.")
        rows = getattr(load_dataset_splits(config, tokenizer=tokenizer), split)
        found = encode_all(
            rows, tokenizer, max_length=config.max_length, over_long=config.over_long
        )
        self.rows = [
            {"input_ids": e.input_ids, "labels": e.labels, "timestamps": e.timestamps or []}
            for e in found
        ]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return one row, as lists."""
        return self.rows[index]


class TemporalCollator:
    """Pads rows on the right to [B, T]; timestamps [B], or [B, T] where a row has several.

    The mask is 0 and the label -100 on padding.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask, labels and timestamps, int64."""
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": _padded([row["labels"] for row in rows], -100),
        }
        return batch | {"timestamps": join_times([row["timestamps"] for row in rows])}


def collator_for(model: Any, tokenizer: Any, experiment: Experiment) -> TemporalCollator | None:
    """Return the collator that a time-aware model needs; None, which is TRL's own, for a plain one.

    Raises: GemmateError where only one of model and rows knows of time, rows are packed, or times
        are to be blurred that there are not.
    """
    field, aware = experiment.dataset.timestamp, encoder_of(model) is not None
    if experiment.training.blurs and not field:
        problem = "training.timestamp_blur and timestamp_withheld are for rows with times"
        raise GemmateError(f"{problem}. Name their field: dataset.timestamp=date.")
    if field and not aware:
        problem = f"The rows have times in {field}, the model has no encoder for them"
        raise GemmateError(f"{problem}. Set model.temporal_kind=calendar.")
    if aware and not field:
        problem = "The model has a temporal encoder, the rows have no times"
        raise GemmateError(f"{problem}. Name their field: dataset.timestamp=date.")
    if aware and experiment.training.packing:
        raise GemmateError("Packed rows lose their times. Set training.packing=false.")
    return TemporalCollator(tokenizer.pad_token_id) if aware else None


def join_times(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The times of rows of tokens: [B] where each row has one, else [B, T], MISSING on padding."""
    if all(len(set(row)) == 1 for row in rows):  # fewer to encode
        return torch.tensor([row[0] for row in rows])
    return _padded(rows, MISSING)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
