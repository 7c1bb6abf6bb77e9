"""Batches of rows of like length: less padding, the same rows an epoch."""

from collections.abc import Iterator, Sequence

import torch

POOL = 16  # batches that are sorted together: more gives less padding, and less mixing


class ByLength(torch.utils.data.Sampler[int]):
    """Draws the rows of an epoch so that each batch holds rows of like length.

    A pool of rows drawn at random is sorted and cut into batches, and the batches of all pools are
    shuffled: transformers' own LengthGroupedSampler would train from long to short, and a run
    resumed in a later epoch would go on in another order.
    lengths: of each row, in tokens; batch_size: rows of one optimizer step.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn next: each has its own order, whatever was drawn before."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The rows of an epoch: all of them."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the rows, batch after batch; what is left over comes last."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draw).tolist()
        whole = len(order) - len(order) % self.batch_size
        pool, batches = POOL * self.batch_size, []
        for start in range(0, whole, pool):
            rows = sorted(order[start : min(start + pool, whole)], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        for i in torch.randperm(len(batches), generator=draw).tolist():
            yield from batches[i]
        yield from order[whole:]
