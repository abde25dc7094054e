"""Batches of a data set that lies on the device as a whole: no worker processes, no copies from the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.objective import Batch


def batches(
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    *,
    batch_size: int,
    shuffle: torch.Generator | None = None,
    augmentation: Augmentation | None = None,
    augmentation_generator: torch.Generator | None = None,
    drop_last: bool = False,
    trace: bool = False,
) -> Iterator[Batch]:
    """One pass over the rows ``indices`` of ``x`` and ``y``, in batches on the device of ``x``.

    x: [N, C, H, W] uint8;  y: [N] int64 on the same device;  indices: [n] int64 on any device.
    ``shuffle`` is a CPU generator: the order is drawn there so that it is the same on every device, and it
    does not depend on ``batch_size``. ``drop_last`` leaves out a short last batch unless it is the only one;
    ``trace`` adds to each batch where its pixels came from, and changes nothing else.
    Raises InputError for a batch size below 1, ValueError for images that are not uint8 and generators that do not fit.
    """
    _check_batch_size(batch_size)
    if x.dtype != torch.uint8:
        raise ValueError(f"the images are {x.dtype}; batches are made of uint8 images")
    if shuffle is not None and shuffle.device.type != "cpu":
        raise ValueError(f"the shuffle generator is on {shuffle.device}; the order must be drawn on the CPU")
    if augmentation is not None and augmentation_generator is None:
        raise ValueError("augmentation needs an augmentation_generator")
    if shuffle is not None:
        indices = indices[torch.randperm(len(indices), generator=shuffle).to(indices.device)]
    indices = indices.to(x.device)

    def generate() -> Iterator[Batch]:
        for number in range(batch_count(len(indices), batch_size, drop_last)):
            rows = indices[number * batch_size : (number + 1) * batch_size]
            images = x[rows]
            places = None
            if trace:
                # Without augmentation every pixel is in its own place.
                moved, draws = augmentation or Augmentation(), augmentation_generator or torch.Generator()
                places = moved.places(images, draws.clone_state())
            if augmentation is not None and augmentation_generator is not None:
                # Moving bytes about is four times cheaper than moving floats, with the same result.
                images = augmentation(images, augmentation_generator)
            yield Batch(x=images.to(torch.float32).div_(255), y=y[rows], indices=rows, places=places)

    # Checks and the draw of the order happen at the call, not at the first batch.
    return generate()


def batch_count(n: int, batch_size: int, drop_last: bool) -> int:
    """How many batches ``batches`` yields for ``n`` rows. Raises InputError for a batch size below 1."""
    _check_batch_size(batch_size)
    if drop_last and n >= batch_size:
        return n // batch_size
    return -(-n // batch_size)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; it must be at least 1")
