"""Crops are windows of the padded image, flips mirrors, cutouts clipped squares; all drawn from the given generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nas.data.augmentation import Augmentation, crop, cutout, flip
from nas.errors import InputError

STEPS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "crop": lambda x, stream: crop(x, 2, stream),
    "flip": flip,
    "cutout": lambda x, stream: cutout(x, 4, stream),
    "all": Augmentation(crop=3, flip=True, cutout=5),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 64, h: int = 9, w: int = 8) -> Tensor:
    return torch.rand(n, 3, h, w, generator=seeded(99)) + 0.5  # nowhere zero


@pytest.mark.parametrize("name", STEPS)
def test_draws_from_the_generator_only_and_leaves_its_input_alone(name: str) -> None:
    step, x = STEPS[name], images()
    kept, state = x.clone(), torch.get_rng_state()
    first = step(x, seeded())
    assert torch.equal(first, step(x, seeded()))
    assert not torch.equal(first, step(x, seeded(1)))
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)
    assert first.shape == x.shape and first.dtype == x.dtype


@pytest.mark.parametrize("name", STEPS)
def test_bytes_and_floats_are_treated_alike(name: str) -> None:
    x = (images() * 100).to(torch.uint8)
    assert torch.equal(STEPS[name](x, seeded()).float(), STEPS[name](x.float(), seeded()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_a_cpu_generator_gives_the_same_on_the_gpu(name: str) -> None:
    x = images()
    assert torch.equal(STEPS[name](x.cuda(), seeded()).cpu(), STEPS[name](x, seeded()))
    assert STEPS[name](x.cuda(), torch.Generator("cuda").manual_seed(0)).is_cuda


def test_nothing_asked_for_is_the_identity() -> None:
    x = images()
    for same in (crop(x, 0, seeded()), cutout(x, 0, seeded()), Augmentation()(x, seeded())):
        assert torch.equal(same, x)


def test_crop_cuts_a_window_of_the_padded_image() -> None:
    padding, x = 2, images(300)
    cropped, padded = crop(x, padding, seeded()), F.pad(x, [padding] * 4)
    places = set()
    for window, image in zip(cropped, padded, strict=True):
        found = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(window, image[:, top : top + 9, left : left + 8])
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) == 25, "every place occurs"


def test_flip_mirrors_about_half_and_undoes_itself() -> None:
    x = images(2000)
    flipped = flip(x, seeded())
    changed = (flipped != x).flatten(1).any(1)
    assert torch.equal(flipped[changed], x[changed].flip(-1))
    assert 900 < int(changed.sum()) < 1100  # 4.5 standard deviations
    assert torch.equal(flip(flipped, seeded()), x)


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_cutout_zeroes_a_square_clipped_at_the_borders(size: int) -> None:
    n, h, w = 500, 9, 8
    x = images(n, h, w)
    cut = cutout(x, size, seeded())
    gone = (cut == 0).all(1)
    assert torch.equal(cut, x * ~gone[:, None])
    # The exact list of squares that a centre on any pixel can give.
    possible = set()
    for centre_row in range(h):
        for centre_column in range(w):
            square = torch.zeros(h, w, dtype=torch.bool)
            top, left = centre_row - size // 2, centre_column - size // 2
            square[max(top, 0) : top + size, max(left, 0) : left + size] = True
            possible.add(tuple(square.flatten().tolist()))
    seen = {tuple(mask.flatten().tolist()) for mask in gone}
    assert seen == possible
    assert int(gone.sum((1, 2)).max()) == min(size, h) * min(size, w)


def test_steps_follow_one_another() -> None:
    x, stream = images(), seeded()
    by_hand = cutout(flip(crop(x, 3, stream), stream), 5, stream)
    assert torch.equal(Augmentation(crop=3, flip=True, cutout=5)(x, seeded()), by_hand)


@pytest.mark.parametrize("wrong", [partial(Augmentation, crop=-1), partial(Augmentation, cutout=-4)])
def test_negative_values(wrong: Callable[[], Augmentation]) -> None:
    with pytest.raises(InputError, match="must be 0"):
        wrong()
