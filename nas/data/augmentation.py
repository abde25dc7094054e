"""Random crop, flip and cutout of whole batches, on the device of the batch.

Each draws from the generator it is given and leaves the global random state alone. A generator on
another device than the images is fine: a CPU generator gives the same draws on every device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from nas.errors import InputError


def crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Zero-pad each image by ``padding`` pixels on every side and cut a random window of the old size.

    x: [N, C, H, W] of any dtype. Each image has its own window, uniform over the (2 padding + 1)^2 places.
    """
    if padding == 0:
        return x
    n, _, h, w = x.shape
    top, left = _integers(2 * padding + 1, (2, n), x, generator)
    # A view of all windows, [N, C, top, left, H, W]: only the chosen ones are ever copied.
    windows = F.pad(x, [padding] * 4).unfold(2, h, 1).unfold(3, w, 1)
    return windows[torch.arange(n, device=x.device), :, top, left]


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half.  x: [N, C, H, W] of any dtype."""
    mirrored = _integers(2, (len(x), 1, 1, 1), x, generator).bool()
    return torch.where(mirrored, x.flip(-1), x)


def cutout(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Set a random square of each image to zero (DeVries & Taylor 2017, arXiv:1708.04552).

    x: [N, C, H, W] of any dtype; ``size`` in pixels. As in the authors' implementation the centre is uniform
    over the pixels and the square is clipped at the borders, so the cut area varies. There an odd ``size``
    cuts size - 1 pixels; here it cuts ``size``.
    """
    if size == 0:
        return x
    n, _, h, w = x.shape
    top = _integers(h, (n, 1, 1, 1), x, generator) - size // 2
    left = _integers(w, (n, 1, 1, 1), x, generator) - size // 2
    rows = torch.arange(h, device=x.device)[:, None]
    columns = torch.arange(w, device=x.device)
    inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    return x.masked_fill(inside, 0)


@dataclass(frozen=True)
class Augmentation:
    """What is done to each training batch, in this order; 0 and False leave a step out.

    crop: padding in pixels;  flip: left to right;  cutout: side of the square in pixels.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value < 0:
                raise InputError(f"augmentation '{entry.name}' is {value}; it must be 0 (off) or a number of pixels")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The augmented images, shaped and typed as ``x`` ([N, C, H, W]); ``x`` itself is left alone."""
        x = crop(x, self.crop, generator)
        if self.flip:
            x = flip(x, generator)
        return cutout(x, self.cutout, generator)

    def places(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where the pixels of ``self(x, generator)`` come from, from a generator in the same state: [N, H, W] int64.

        row * W + column of the pixel in ``x`` ([N, C, H, W]); -1 for a pixel that was put in (padding, cutout).
        """
        n, _, h, w = x.shape
        # The numbers of the pixels, moved about like the pixels; 0 is what crop and cutout put in.
        numbered = torch.arange(1, h * w + 1, device=x.device).view(1, 1, h, w).expand(n, 1, h, w)
        return self(numbered, generator)[:, 0] - 1


def _integers(high: int, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers in 0 .. high - 1, drawn where the generator lives and brought to the images."""
    return torch.randint(high, shape, generator=generator, device=generator.device).to(like.device)
