"""Squeezers: transformations that take away detail which a classifier should not need. Images [N, C, H, W] in [0, 1].

After Xu, Evans & Qi, "Feature Squeezing", NDSS 2018, arXiv 1704.01155, section 3. A squeezer is a value; what it
computes has a gradient, so that an attack can see through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.errors import InputError


class Squeezer(Protocol):
    """``squeezer(x) -> x_squeezed``, both [N, C, H, W] in [0, 1]; the images of a batch do not influence each other."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class BitDepth:
    """Pixels rounded to ``bits`` bits: 2**bits equally spaced values from 0 to 1, halves to the even one.

    Its gradient is that of the identity (straight-through; BPDA of Athalye et al., arXiv 1802.00420, section 4.1):
    that of rounding is 0 everywhere and only hides what the attacker wants to know.
    """

    bits: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise InputError(f"a bit depth is a number of bits from 1 to 16, not {self.bits}")

    def __call__(self, x: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        rounded = (x * levels).round() / levels
        return rounded.detach() + (x - x.detach())  # exactly the rounded values: what is added is 0

    def __str__(self) -> str:
        return f"bit depth {self.bits}"


@dataclass(frozen=True)
class MedianFilter:
    """The median of the ``height`` x ``width`` pixels around each, channel by channel; borders are mirrored.

    An even window reaches one pixel further up and left; of an even number of pixels the upper one of the two in the
    middle is taken. Both are what ``scipy.ndimage.median_filter`` does. The gradient goes to the pixel that is the
    median.
    """

    height: int = 2
    width: int = 2

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise InputError(f"a median filter needs a window of at least 1x1 pixels, not {self.height}x{self.width}")

    def __call__(self, x: Tensor) -> Tensor:
        rows = _mirrored(x.shape[2], self.height // 2, (self.height - 1) // 2, x.device)
        columns = _mirrored(x.shape[3], self.width // 2, (self.width - 1) // 2, x.device)
        windows = x[:, :, rows][..., columns].unfold(2, self.height, 1).unfold(3, self.width, 1).flatten(4)
        return windows.kthvalue(self.height * self.width // 2 + 1, dim=-1).values

    def __str__(self) -> str:
        return f"median {self.height}x{self.width}"


@dataclass(frozen=True)
class NonLocalMeans:
    """Each pixel becomes the mean of those in the ``search`` x ``search`` window around it, weighted by likeness.

    Buades, Coll & Morel, CVPR 2005. The weight of a pixel is exp(-d / h^2); d is the mean squared difference of the
    ``block`` x ``block`` blocks (all channels) around the two, h = strength / 255. Both windows are odd; borders are
    mirrored. "Non-local means 13-3-2" of the feature-squeezing paper names search window, block and strength; there
    OpenCV computes it on 8-bit images with luminance and colour apart, here it is computed on the pixels as they are,
    which has an exact gradient.
    """

    search: int = 13
    block: int = 3
    strength: float = 2.0

    def __post_init__(self) -> None:
        if min(self.search, self.block) < 1 or self.search % 2 == 0 or self.block % 2 == 0:
            raise InputError(f"non-local means needs odd windows, not {self.search} and {self.block}")
        if not self.strength > 0:
            raise InputError(f"the strength of non-local means must be above 0, not {self.strength}")

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        reach, around = self.search // 2, self.block // 2
        rows = _mirrored(height, reach + around, reach + around, x.device)
        columns = _mirrored(width, reach + around, reach + around, x.device)
        padded = x[:, :, rows][..., columns]
        near = padded[..., reach : reach + height + 2 * around, reach : reach + width + 2 * around]
        weighted, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for down in range(self.search):  # one shift of the whole batch at a time: memory for a few maps
            for right in range(self.search):
                far = padded[..., down : down + near.shape[2], right : right + near.shape[3]]
                difference = F.avg_pool2d((far - near).square().mean(1, keepdim=True), self.block, stride=1)
                weight = (-difference / (self.strength / 255) ** 2).exp()
                centre = far[..., around : around + height, around : around + width]
                weighted, weights = weighted + weight * centre, weights + weight
        return weighted / weights

    def __str__(self) -> str:
        return f"non-local means {self.search}-{self.block}-{self.strength:g}"


def _mirrored(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Places -before .. size + after - 1 of an axis mirrored at its ends, which are repeated: c b a a b c c b a."""
    places = torch.arange(-before, size + after, device=device) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)
