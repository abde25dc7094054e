"""Batches visit every row once, in an order that the seed alone decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nas.data.augmentation import Augmentation
from nas.data.batches import batch_count, batches
from nas.errors import InputError

X = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 5
ROWS = torch.arange(3, 50, 2)  # 24 of them


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def order(rows: torch.Tensor = ROWS, **options: Any) -> list[int]:
    return [row for batch in batches(X, Y, rows, **options) for row in batch.indices.tolist()]


def test_content_is_the_rows_in_unit_range() -> None:
    for batch in batches(X, Y, ROWS, batch_size=7, shuffle=seeded()):
        assert batch.x.dtype == torch.float32
        assert torch.equal(batch.x, X[batch.indices].float() / 255)
        assert torch.equal(batch.y, Y[batch.indices]) and batch.indices.dtype == torch.int64


@pytest.mark.parametrize("batch_size", [1, 5, 8, 24, 25, 1000])
def test_every_row_once_in_an_order_without_regard_to_the_batch_size(batch_size: int) -> None:
    assert order(batch_size=batch_size) == ROWS.tolist()
    shuffled = order(batch_size=batch_size, shuffle=seeded())
    assert sorted(shuffled) == ROWS.tolist()
    assert shuffled == order(batch_size=3, shuffle=seeded()) != ROWS.tolist()
    assert shuffled != order(batch_size=batch_size, shuffle=seeded(1))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16, 24])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize("drop_last", [False, True])
def test_count_and_sizes(n: int, batch_size: int, drop_last: bool) -> None:
    sizes = [len(batch.y) for batch in batches(X, Y, ROWS[:n], batch_size=batch_size, drop_last=drop_last)]
    assert len(sizes) == batch_count(n, batch_size, drop_last)
    assert (len(sizes) > 0) == (n > 0), "never without a batch where there are rows"
    assert all(size == batch_size for size in sizes[:-1])
    if not drop_last or n < batch_size:
        assert sum(sizes) == n
    else:
        assert set(sizes) == {batch_size} and n - sum(sizes) < batch_size


def test_augmentation_is_applied_and_reproducible() -> None:
    augmentation = Augmentation(crop=2, flip=True, cutout=3)

    def run(seed: int) -> torch.Tensor:
        stream = seeded(seed)
        made = batches(X, Y, ROWS, batch_size=10, augmentation=augmentation, augmentation_generator=stream)
        return torch.cat([batch.x for batch in made])

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    stream = seeded(1)
    by_hand = [augmentation(X[rows].float() / 255, stream) for rows in ROWS.split(10)]
    assert torch.equal(run(1), torch.cat(by_hand))


def test_the_data_and_the_global_random_state_are_left_alone() -> None:
    kept, state = X.clone(), torch.get_rng_state()
    for batch in batches(X, Y, ROWS, batch_size=5, shuffle=seeded()):
        batch.x.zero_()
    assert torch.equal(X, kept) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_order_is_the_same_on_the_gpu() -> None:
    made = list(batches(X.cuda(), Y.cuda(), ROWS, batch_size=7, shuffle=seeded()))
    assert [row for batch in made for row in batch.indices.tolist()] == order(batch_size=7, shuffle=seeded())
    assert all(tensor.is_cuda for batch in made for tensor in (batch.x, batch.y, batch.indices))


def test_wrong_use_is_told_at_the_call() -> None:
    for batch_size in (0, -1):
        with pytest.raises(InputError, match="batch size"):
            batches(X, Y, ROWS, batch_size=batch_size)
        with pytest.raises(InputError, match="batch size"):
            batch_count(5, batch_size, False)
    with pytest.raises(ValueError, match="augmentation_generator"):
        batches(X, Y, ROWS, batch_size=2, augmentation=Augmentation())
    with pytest.raises(ValueError, match="uint8"):
        batches(X.float(), Y, ROWS, batch_size=2)
