"""Batches of like length: every row once, less padding, an order of its own for each epoch."""

import random

import pytest

from gemmate_lib.sampling import ByLength


def padding(lengths: list[int], order: list[int], batch: int) -> float:
    whole = len(order) - len(order) % batch
    batches = [[lengths[i] for i in order[s : s + batch]] for s in range(0, whole, batch)]
    return sum(max(b) * batch for b in batches) / sum(sum(b) for b in batches) - 1


@pytest.mark.parametrize(("rows", "batch"), [(1003, 8), (5, 8), (64, 1), (640, 32), (0, 4)])
def test_every_row_once(rows: int, batch: int) -> None:
    lengths = [random.Random(rows).randrange(5, 90) for _ in range(rows)]
    sampler = ByLength(lengths, batch_size=batch, seed=0)
    assert sorted(sampler) == list(range(rows)) and len(sampler) == rows


def test_less_padding_and_no_drift() -> None:
    lengths = [5 + (i * 7919) % 85 for i in range(2048)]
    order = list(ByLength(lengths, batch_size=16, seed=0))
    drawn = random.Random(0).sample(range(2048), 2048)
    assert padding(lengths, order, 16) < padding(lengths, drawn, 16) / 5
    means = [sum(lengths[i] for i in order[s : s + 256]) / 256 for s in range(0, 2048, 256)]
    assert max(means) - min(means) < 30  # sorted from long to short it would be about 75


def test_an_epoch_does_not_hang_on_what_was_drawn_before() -> None:
    lengths = list(range(100))
    one, other = (ByLength(lengths, batch_size=4, seed=3) for _ in range(2))
    first = list(one)
    one.set_epoch(1)
    other.set_epoch(1)
    assert list(one) == list(other) != first
    assert list(ByLength(lengths, batch_size=4, seed=4)) != first
